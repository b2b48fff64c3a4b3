"""The ways to run layers of a frozen network on a GPU, each with its prepacked weights.

A *run* takes activations `[tasks, rows, in_features]`, or `[1, rows, in_features]` of an input that all tasks read, and
returns `[tasks, rows, out_features]`, in float32 where its layer is the network's last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lt4rec_sparse.kernels.gpu import block_sparse, fused_tail
from lt4rec_sparse.kernels.gpu.block_sparse import BlockWeight
from lt4rec_sparse.kernels.gpu.fused_tail import Tail
from lt4rec_sparse.kernels.gpu.mask_and_cast import matmul
from lt4rec_sparse.kernels.gpu.masked_linear import precision
from lt4rec_sparse.network import ACTIVATIONS


class DenseRun(NamedTuple):
    """A layer by cuBLAS, all tasks in one product: their neurons side by side on one input, otherwise batched."""

    weight: Tensor  # [tasks, N, K]
    bias: Tensor  # [tasks, N]
    activation: str
    is_last: bool

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        tasks, n, _ = self.weight.shape
        if len(h) == 1:
            y = _dense(h[0], self.weight.flatten(0, 1), self.bias.flatten(), self.activation, self.is_last)
            return y.view(h.shape[1], tasks, n).transpose(0, 1)
        weight, bias, activate = self.weight.transpose(1, 2), self.bias[:, None], ACTIVATIONS[self.activation]
        if self.is_last:  # not rounded to 16 bits, which would give many scores ties
            return activate(matmul(h, weight, torch.float32).add_(bias), 0.0)
        return activate(torch.baddbmm(bias, h, weight), 0.0)


class BlockRun(NamedTuple):
    """A layer by the block-sparse product."""

    weight: BlockWeight
    bias: Tensor  # [tasks, N]
    activation: str
    is_last: bool

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        dtype = torch.float32 if self.is_last else h.dtype
        y = h.new_empty(self.weight.tasks, h.shape[1], self.weight.shape[0], dtype=dtype)
        block_sparse.block_sparse_launch(h, self.weight, self.bias, y, self.activation).run()
        return y


class SemiStructuredRun(NamedTuple):
    """A layer on the sparse tensor cores, task by task."""

    weights: tuple[Tensor, ...]  # torch's semi-structured tensors
    bias: Tensor  # [tasks, N]
    activation: str

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        parts = zip(h.expand(len(self.weights), -1, -1), self.weights, self.bias, strict=True)
        return ACTIVATIONS[self.activation](torch.stack([F.linear(x.contiguous(), *part) for x, *part in parts]), 0.0)


class TailRun(NamedTuple):
    """The last layers, fused by `fused_tail`."""

    tail: Tail

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        tasks, out, _ = self.tail.head.shape
        scores = h.new_empty(h.shape[1], tasks * out, dtype=torch.float32)
        fused_tail.fused_tail_launch(h, self.tail, scores).run()
        return scores.view(h.shape[1], tasks, out).transpose(0, 1)


class TaskwiseRun(NamedTuple):
    """The last layers by cuBLAS, task by task, bias and ReLU in the products' epilogues."""

    weights: tuple[tuple[Tensor, ...], ...]  # of each task's layers; a head's rows may be padded
    biases: tuple[tuple[Tensor, ...], ...]
    activations: tuple[str, ...]  # of each layer
    outputs: int  # of a head
    # Where there are any, the tasks run side by side, as branches of a CUDA graph: one stream for each task but the
    # first, of this network alone, because graphs of one stream share cuBLAS' workspace.
    sides: tuple[torch.cuda.Stream, ...] = ()

    def __call__(self, h: Tensor | Sequence[Tensor]) -> Tensor:
        """Apply it to each task's activations, which may differ in width."""
        if not self.sides:
            return torch.stack([self._task(x, t) for t, x in enumerate(h)])
        main = torch.cuda.current_stream(h[0].device)
        parts = []
        for t, side in enumerate(self.sides, 1):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                parts.append(self._task(h[t], t))
        parts.insert(0, self._task(h[0], 0))
        for side in self.sides:
            main.wait_stream(side)
        return torch.stack(parts)

    def _task(self, h: Tensor, task: int) -> Tensor:
        last = len(self.activations) - 1
        for i, parts in enumerate(zip(self.weights[task], self.biases[task], self.activations, strict=True)):
            h = _dense(h, *parts, i == last)
        return h[:, : self.outputs]


class CompactRun(NamedTuple):
    """A whole network without what is dead in it: each task has its own widths."""

    columns: Tensor  # int64, of x
    weight: Tensor  # [sum of the tasks' widths, K], of their first layers
    bias: Tensor
    activation: str
    rest: TaskwiseRun

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        y = _dense(h[0].index_select(1, self.columns), self.weight, self.bias, self.activation, False)
        return self.rest(torch.split(y, [weights[0].shape[1] for weights in self.rest.weights], dim=1))


def fits(run: Callable[[Tensor], Tensor], h: Tensor) -> bool:
    """Tell whether a run's kernel fits on the device of `h`, by running it once."""
    try:
        run(h)
    except OutOfResources:
        return False
    return True


def engine(device: torch.device, dtype: torch.dtype) -> str:
    """Name what a plan's timings depend on: the GPU, Triton's version, and the arithmetic of float32 products."""
    arithmetic = f", {precision()}" if dtype == torch.float32 else ""
    if device.type != "cuda":
        return f"interpreter on {device.type}{arithmetic}"
    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}{arithmetic}"


def _dense(x: Tensor, weight: Tensor, bias: Tensor, activation: str, is_last: bool) -> Tensor:
    """`activation(x @ weight.T + bias)`; for the last layer in float32."""
    if is_last:
        return ACTIVATIONS[activation](matmul(x, weight.T, torch.float32).add_(bias), 0.0)
    if activation == "relu":
        return torch._addmm_activation(bias, x, weight.T)  # cuBLASLt's epilogue: bias and ReLU
    return ACTIVATIONS[activation](torch.addmm(bias, x, weight.T), 0.0)
