"""The ways to run a layer of a frozen network on a GPU, each with its prepacked weights.

A *run* takes activations `[tasks, rows, in_features]`, or `[1, rows, in_features]` of an input that all tasks read, and
returns `[tasks, rows, out_features]`, in float32 where its layer is the network's last. The ways, by the names that
plans use:

- "dense": the masks multiplied in beforehand, cuBLAS; the first layer of all tasks in one product, later ones in one
  batched product. "apart": the later ones task by task, each with its ReLU in the product's epilogue.
- "premasked", "masked": the Triton product of `masked_matmul`, from that layout of `weights`.
- "tail premasked", "tail masked": `fused_tail`, from that layer to the scores in one launch.
- "tail dense", "tail branches": the same layers by cuBLAS, task after task with bias and ReLU in the epilogues, or the
  tasks side by side as branches of a CUDA graph.
- "block16", "block32", "block64": `block_sparse`.
- "2:4": torch's semi-structured tensors, on the sparse tensor cores, for masks that keep two of four.
- "compact": the whole network without what is dead in it (`nn.compaction`), dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lt4rec_sparse.kernels.gpu import block_sparse, fused_tail, masked_matmul
from lt4rec_sparse.kernels.gpu.block_sparse import BlockWeight
from lt4rec_sparse.kernels.gpu.fused_tail import Tail
from lt4rec_sparse.kernels.gpu.mask_and_cast import matmul
from lt4rec_sparse.kernels.gpu.masked_linear import precision
from lt4rec_sparse.kernels.gpu.weights import Weight
from lt4rec_sparse.network import ACTIVATIONS


class StackedRun(NamedTuple):
    """A dense layer on an input that all tasks read: one product for the neurons of all tasks side by side."""

    weight: Tensor  # [tasks * N, K]
    bias: Tensor  # [tasks * N]
    tasks: int
    activation: str
    is_last: bool

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        y = _dense(h[0], self.weight, self.bias, self.activation, self.is_last)
        return y.view(h.shape[1], self.tasks, len(self.bias) // self.tasks).transpose(0, 1)


class BatchedRun(NamedTuple):
    """A dense layer, all tasks in one batched product."""

    weight: Tensor  # [tasks, N, K]
    bias: Tensor  # [tasks, 1, N]
    activation: str
    is_last: bool

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        weight, activate = self.weight.transpose(1, 2), ACTIVATIONS[self.activation]
        if self.is_last:  # not rounded to 16 bits, which would give many scores ties
            return activate(matmul(h, weight, torch.float32).add_(self.bias))
        return activate(torch.baddbmm(self.bias, h, weight))


class ApartRun(NamedTuple):
    """A hidden dense layer task by task, its ReLU in the epilogue."""

    weight: Tensor  # [tasks, N, K]
    bias: Tensor  # [tasks, N]
    activation: str

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        y = h.new_empty(h.shape[0], h.shape[1], self.weight.shape[1])
        for x, weight, bias, rows in zip(h, self.weight, self.bias, y, strict=True):
            if self.activation == "relu":
                torch._addmm_activation(bias, x, weight.T, out=rows)
            else:
                rows.copy_(_dense(x, weight, bias, self.activation, False))
        return y


class ProductRun(NamedTuple):
    """A layer by the Triton product."""

    weight: Weight
    bias: Tensor  # [tasks, N]
    activation: str
    is_last: bool

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        y = _result(h, self.weight.tasks, self.weight.shape[0], self.is_last)
        masked_matmul.forward_launch(h, self.weight, self.bias, y, self.activation, precision()).run()
        return y


class BlockRun(NamedTuple):
    """A layer by the block-sparse product."""

    weight: BlockWeight
    bias: Tensor  # [tasks, N]
    activation: str
    is_last: bool

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        y = _result(h, self.weight.tasks, self.weight.shape[0], self.is_last)
        block_sparse.forward_into(h, self.weight, self.bias, y, self.activation)
        return y


class TailRun(NamedTuple):
    """One or two hidden layers and the head, fused."""

    tail: Tail

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        tasks, out, _ = self.tail.head.shape
        scores = h.new_empty(h.shape[1], tasks * out, dtype=torch.float32)
        fused_tail.fused_tail_launch(h, self.tail, scores).run()
        return scores.view(h.shape[1], tasks, out).transpose(0, 1)


class DenseTailRun(NamedTuple):
    """The layers after the first and the head, dense, task by task."""

    weights: tuple[Tensor, ...]  # of each layer [tasks, N, K]; the head's outputs are padded: cuBLAS is slow otherwise
    biases: tuple[Tensor, ...]  # of each layer [tasks, N]
    outputs: int  # of the head
    activation: str  # of the head

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        return torch.stack([self.task(h[t], t) for t in range(len(h))])

    def task(self, h: Tensor, task: int) -> Tensor:
        """Return one task's outputs, from its own `h [rows, in_features]`."""
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = _dense(h, weight[task], bias[task], "none" if i == last else "relu", i == last)
        return ACTIVATIONS[self.activation](h[:, : self.outputs])


class BranchedTailRun(NamedTuple):
    """The same with the tasks side by side, as branches of a CUDA graph."""

    tail: DenseTailRun
    sides: tuple[torch.cuda.Stream, ...]  # of this network alone: graphs of one stream share cuBLAS' workspace

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        main = torch.cuda.current_stream(h.device)
        parts = []
        for t, side in enumerate(self.sides, 1):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                parts.append(self.tail.task(h[t], t))
        parts.insert(0, self.tail.task(h[0], 0))
        for side in self.sides:
            main.wait_stream(side)
        return torch.stack(parts)


class SemiStructuredRun(NamedTuple):
    """A layer on the sparse tensor cores, task by task."""

    weights: tuple[Tensor, ...]  # torch's semi-structured tensors
    bias: Tensor  # [tasks, N]
    activation: str

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        parts = zip(h.expand(len(self.weights), -1, -1), self.weights, self.bias, strict=True)
        return ACTIVATIONS[self.activation](torch.stack([F.linear(x.contiguous(), *part) for x, *part in parts]))


class CompactRun(NamedTuple):
    """The whole network without what is dead in it: each task has its own widths."""

    columns: Tensor  # int64, of x
    weights: tuple[tuple[Tensor, ...], ...]  # of each task; the first layers are in `first`
    biases: tuple[tuple[Tensor, ...], ...]
    activations: tuple[tuple[str, ...], ...]  # of each task, its first layer's too
    first: Tensor | None  # [sum of widths, K]; None where a task has one layer only
    first_bias: Tensor | None

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        x = h[0].index_select(1, self.columns)
        hs: Sequence[Tensor] = [x] * len(self.weights)
        if self.first is not None and self.first_bias is not None:
            y = _dense(x, self.first, self.first_bias, self.activations[0][0], False)
            hs = torch.split(y, [weights[0].shape[1] for weights in self.weights], dim=1)
        scores = []
        for z, weights, biases, activations in zip(hs, self.weights, self.biases, self.activations, strict=True):
            own = activations[len(activations) - len(weights) :]
            for i, parts in enumerate(zip(weights, biases, own, strict=True)):
                z = _dense(z, *parts, i == len(weights) - 1)
            scores.append(z)
        return torch.stack(scores)


Run = (
    StackedRun
    | BatchedRun
    | ApartRun
    | ProductRun
    | BlockRun
    | TailRun
    | DenseTailRun
    | BranchedTailRun
    | SemiStructuredRun
    | CompactRun
)


def _result(h: Tensor, tasks: int, outputs: int, is_last: bool) -> Tensor:
    return h.new_empty(tasks, h.shape[1], outputs, dtype=torch.float32 if is_last else h.dtype)


def _dense(x: Tensor, weight: Tensor, bias: Tensor, activation: str, is_last: bool) -> Tensor:
    """`activation(x @ weight.T + bias)`; for the last layer in float32."""
    if is_last:
        return ACTIVATIONS[activation](matmul(x, weight.T, torch.float32).add_(bias))
    if activation == "relu":
        return torch._addmm_activation(bias, x, weight.T)  # cuBLASLt's epilogue: bias and ReLU
    return ACTIVATIONS[activation](torch.addmm(bias, x, weight.T))
