"""The ways to run a layer of a frozen MLP on a GPU, each with what it reads, prepacked.

A *run* takes activations `[tasks, rows, in_features]`, or `[1, rows, in_features]` of an input that all tasks read, and
returns `[tasks, rows, out_features]`, in float32 where its layer is the network's last. The ways, by the names that
plans use:

- "dense": the masks multiplied in beforehand, cuBLAS; the first layer of all tasks in one product, later ones in one
  batched product. "apart": the later ones task by task, each with its ReLU in the product's epilogue.
- "premasked", "masked", "shared": the Triton product of `masked_matmul`, from that format of `device_weight`.
- "tail premasked", "tail masked", "tail shared": `fused_tail`, from there to the scores in one launch.
- "tail dense", "tail branches": the same layers by cuBLAS, task after task with bias and ReLU in the epilogues, or the
  tasks side by side as branches of a CUDA graph.
- "block16", "block32", "block64": `block_sparse`.
- "2:4": torch's semi-structured tensors, on the sparse tensor cores, for masks that keep two of four.
- "compact": the whole network, as what of it still computes (`nn.compaction`), dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lt4rec_sparse.kernels.gpu import block_sparse, fused_tail, masked_matmul
from lt4rec_sparse.kernels.gpu.block_sparse import BlockWeight
from lt4rec_sparse.kernels.gpu.device_weight import Weight
from lt4rec_sparse.kernels.gpu.fused_tail import Tail
from lt4rec_sparse.kernels.gpu.mask_and_cast import matmul
from lt4rec_sparse.kernels.gpu.masked_linear import precision


class StackedRun(NamedTuple):
    """A dense layer on an input that all tasks read: one product, its neurons task beside task."""

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
        weight = self.weight.transpose(1, 2)
        if self.is_last:  # logits are not rounded to 16 bits: scores would be full of ties
            return _activate(matmul(h, weight, torch.float32).add_(self.bias), self.activation)
        return _activate(torch.baddbmm(self.bias, h, weight), self.activation)


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
                _activate(torch.addmm(bias, x, weight.T, out=rows), self.activation)
        return y


class ProductRun(NamedTuple):
    """A layer by the Triton product."""

    weight: Weight
    bias: Tensor  # [tasks, N]
    activation: str
    is_last: bool

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        tasks, rows, n = self.weight.tasks, h.shape[1], self.weight.shape[0]
        y = h.new_empty(tasks * rows, n, dtype=torch.float32 if self.is_last else h.dtype)
        x = h[0] if h.shape[0] == 1 else h
        ranges = ((0,) * tasks, (rows,) * tasks)
        masked_matmul.forward_into(x, self.weight, self.bias, y, *ranges, self.activation, precision())
        return y.view(tasks, rows, n)


class BlockRun(NamedTuple):
    """A layer by the block-sparse product."""

    weight: BlockWeight
    bias: Tensor  # [tasks, N]
    activation: str
    is_last: bool

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        tasks, rows, n = self.weight.tasks, h.shape[1], self.weight.shape[0]
        y = h.new_empty(tasks * rows, n, dtype=torch.float32 if self.is_last else h.dtype)
        starts = (0,) * tasks if h.shape[0] == 1 else tuple(rows * t for t in range(tasks))
        x = h.reshape(-1, h.shape[2])
        lengths = (rows,) * tasks
        block_sparse.forward_into(x, self.weight, self.bias, y, starts, lengths, self.activation, precision())
        return y.view(tasks, rows, n)


class TailRun(NamedTuple):
    """One or two hidden layers and the head, fused."""

    tail: Tail

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        tasks, out, _ = self.tail.head.shape
        scores = h.new_empty(h.shape[1], tasks * out, dtype=torch.float32)
        fused_tail.fused_tail_into(h, self.tail, scores, precision())
        return scores.view(h.shape[1], tasks, out).transpose(0, 1)


class DenseTailRun(NamedTuple):
    """The layers after the first and the head, dense, of each task by itself."""

    weights: tuple[Tensor, ...]  # of each layer [tasks, N, K]; the head's outputs padded, which cuBLAS is slow without
    biases: tuple[Tensor, ...]  # of each layer [tasks, N]
    outputs: int  # of the head
    activation: str  # of the head
    in_branches: bool

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        tasks = range(len(self.weights[0]))
        if not (self.in_branches and h.is_cuda):
            return torch.stack([self._task(h[t], t) for t in tasks])
        main = torch.cuda.current_stream(h.device)
        sides = _sides(h.device, len(tasks) - 1)
        parts = []
        for t, side in zip(tasks[1:], sides, strict=True):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                parts.append(self._task(h[t], t))
        parts.insert(0, self._task(h[0], 0))
        for side in sides:
            main.wait_stream(side)
        return torch.stack(parts)

    def _task(self, h: Tensor, task: int) -> Tensor:
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = _dense(h, weight[task], bias[task], "none" if i == last else "relu", i == last)
        return _activate(h[:, : self.outputs], self.activation)


class SemiStructuredRun(NamedTuple):
    """A layer on the sparse tensor cores, task by task."""

    weights: tuple[Tensor, ...]  # torch's semi-structured tensors
    bias: Tensor  # [tasks, N]
    activation: str

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        inputs = h.expand(len(self.weights), -1, -1)
        parts = zip(inputs, self.weights, self.bias, strict=True)
        return torch.stack([_activate(F.linear(x.contiguous(), *part), self.activation) for x, *part in parts])


class CompactRun(NamedTuple):
    """The whole network without what is dead in it: each task has its own widths."""

    columns: Tensor  # int64, of x
    weights: tuple[tuple[Tensor, ...], ...]  # of each task; the first stand in `first`
    biases: tuple[tuple[Tensor, ...], ...]
    activations: tuple[tuple[str, ...], ...]  # of each task, its first layer's too
    first: Tensor | None  # [sum of widths, K]; None where a task has one layer only
    first_bias: Tensor | None

    def __call__(self, h: Tensor) -> Tensor:
        """Apply it."""
        x = h[0]
        x = x.index_select(1, self.columns)
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
    StackedRun | BatchedRun | ApartRun | ProductRun | BlockRun | TailRun | DenseTailRun | SemiStructuredRun | CompactRun
)


@cache
def _sides(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """Return streams for branches, of a priority of their own: torch hands out 32 of each, in turn."""
    return tuple(torch.cuda.Stream(device, priority=-1) for _ in range(count))  # type: ignore[no-untyped-call]


def _dense(x: Tensor, weight: Tensor, bias: Tensor, activation: str, is_last: bool) -> Tensor:
    """`activation(x @ weight.T + bias)`; of a last layer in float32."""
    if is_last:
        return _activate(matmul(x, weight.T, torch.float32).add_(bias), activation)
    if activation == "relu":
        return torch._addmm_activation(bias, x, weight.T)  # cuBLASLt's epilogue: bias and ReLU
    return _activate(torch.addmm(bias, x, weight.T), activation)


_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda y: y, "relu": torch.relu_, "sigmoid": torch.sigmoid_}


def _activate(y: Tensor, activation: str) -> Tensor:
    return _ACTIVATE[activation](y)
