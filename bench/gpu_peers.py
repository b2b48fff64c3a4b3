"""The dense opponents of serving on a GPU, weakest first, all of them checked.

All compute every task's logits from one `x`, in one dtype throughout, weights on the device before the clock starts,
and hand them back task by task:

- (a) `F.linear(x, weight * mask)` for each task, eager: how masked networks are served when left as trained.
- (b) the masks multiplied in beforehand, for each task, through torch.compile, in a CUDA graph.
- (c) the same, eager.
- (b') an engineer's version: in the first layer, which all tasks read, their weights in one product; bias
  and ReLU in cuBLAS' epilogue; heads padded to 8 outputs, since cuBLAS is slow on rows of 2 bytes; a CUDA graph. After
  the first layer the tasks go one after another, or in branches of the graph side by side, or as batched products with
  the bias as one more column. The fastest of these is (b'), case by case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_stopwatch import PRIORITY

PAD = 8  # elements of 16 bits that make 16 bytes, the alignment that cuBLAS' fast kernels ask for


class TaskLayer(NamedTuple):
    """One layer of one task."""

    weight: Tensor  # [out_features, in_features], masked or not: pruned weights count as zero
    mask: Tensor | None  # bool; a head has none
    bias: Tensor

    @property
    def masked(self) -> Tensor:
        """The weight with zeros where it is pruned."""
        return self.weight if self.mask is None else self.weight * self.mask


Run = Callable[[Tensor], list[Tensor]]  # x -> [batch, out_features] of each task


class Opponent(NamedTuple):
    """One way to the logits of all tasks."""

    name: str
    kind: str  # "a", "b", "c" or "b'"
    is_graphed: bool  # how its user calls it
    run: Run
    weight_bytes: int


Tasks = Sequence[Sequence[TaskLayer]]
Layers = Sequence[tuple[Tensor, Tensor]]


def opponents(tasks: Tasks, compiler: str) -> list[Opponent]:
    """Make all opponents of a network: for each task its layers, input first, the head last."""
    dense = [[(layer.masked, layer.bias) for layer in layers] for layers in tasks]
    dense_bytes = sum(part.nbytes for layers in dense for layer in layers for part in layer)
    masked_bytes = dense_bytes + sum(layer.mask.nbytes for ls in tasks for layer in ls if layer.mask is not None)
    compiled = _compiled(compiler)
    engineered = {"tasks in turn": _in_turn(dense), "batched": _batched(dense)}
    if dense[0][0][0].is_cuda:
        engineered["branches"] = _branches(dense)
    return [
        Opponent("(a) eager, masked", "a", False, lambda x: _each(_masked_chain, tasks, x), masked_bytes),
        Opponent("(b) torch.compile", "b", True, lambda x: _each(compiled, dense, x), dense_bytes),
        Opponent("(c) eager", "c", False, lambda x: _each(_chain, dense, x), dense_bytes),
        *(Opponent(f"(b') {name}", "b'", True, run, nbytes) for name, (run, nbytes) in engineered.items()),
    ]


def semi_structured(tasks: Tasks) -> Opponent:
    """Make torch's own 2:4 layers, one task after another; masks must be 2:4 and heads stay dense."""
    from torch.sparse import to_sparse_semi_structured

    layers = [
        [(layer.masked if layer.mask is None else to_sparse_semi_structured(layer.masked), layer.bias) for layer in ls]
        for ls in tasks
    ]
    # Half of the values, each with 2 bits of metadata.
    nbytes = sum(
        layer.weight.nbytes // (1 if layer.mask is None else 2)
        + (0 if layer.mask is None else layer.weight.numel() // 8)
        for ls in tasks
        for layer in ls
    )
    return Opponent("torch 2:4", "2:4", True, lambda x: _each(_chain, layers, x), nbytes)


def _each(chain: Callable[..., Tensor], tasks: Sequence[Sequence[object]], x: Tensor) -> list[Tensor]:
    return [chain(x, layers) for layers in tasks]


def _masked_chain(x: Tensor, layers: Sequence[TaskLayer]) -> Tensor:
    *hidden, head = layers
    for layer in hidden:
        x = torch.relu_(F.linear(x, layer.weight * layer.mask, layer.bias))
    return F.linear(x, head.weight, head.bias)


def _chain(x: Tensor, layers: Layers) -> Tensor:
    *hidden, head = layers
    for weight, bias in hidden:
        x = torch.relu(F.linear(x, weight, bias))
    return F.linear(x, *head)


@cache
def _compiled(compiler: str) -> Callable[..., Tensor]:
    """Return one function for all weights and batches, so that it is compiled once per set of shapes."""
    compiled: Callable[..., Tensor] = torch.compile(_chain, backend=compiler, dynamic=False)
    return compiled


@cache
def _side(index: int) -> torch.cuda.Stream:
    """Return a stream for a branch, with the stopwatch's priority; torch hands out 32 in turn, so another one."""
    return torch.cuda.Stream(priority=PRIORITY)


def _in_turn(tasks: Sequence[Layers]) -> tuple[Run, int]:
    first, tails = _stacked(tasks)

    def run(x: Tensor) -> list[Tensor]:
        hs = torch._addmm_activation(first[1], x, first[0]).chunk(len(tails), dim=1)
        return [_tail(h, tail) for h, tail in zip(hs, tails, strict=True)]

    return run, _nbytes(first, *(layer for tail in tails for layer in tail.layers))


def _branches(tasks: Sequence[Layers]) -> tuple[Run, int]:
    first, tails = _stacked(tasks)
    sides = [_side(i) for i in range(len(tails) - 1)]

    def run(x: Tensor) -> list[Tensor]:
        hs = torch._addmm_activation(first[1], x, first[0]).chunk(len(tails), dim=1)
        main, ys = torch.cuda.current_stream(), []
        for side, h, tail in zip(sides, hs[1:], tails[1:], strict=True):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                ys.append(_tail(h, tail))
        ys.insert(0, _tail(hs[0], tails[0]))
        for side in sides:
            main.wait_stream(side)
        return ys

    return run, _nbytes(first, *(layer for tail in tails for layer in tail.layers))


class _Tail(NamedTuple):
    """What follows a first layer: weights transposed, the last one's outputs padded."""

    layers: Layers
    outputs: int


def _stacked(tasks: Sequence[Layers]) -> tuple[tuple[Tensor, Tensor], list[_Tail]]:
    """Return the first layers as one, and each task's other layers."""
    first = torch.cat([layers[0][0] for layers in tasks]).T, torch.cat([layers[0][1] for layers in tasks])
    tails = []
    for _, *hidden, (weight, bias) in tasks:
        rows = -len(bias) % PAD
        head = F.pad(weight, (0, 0, 0, rows)).T, F.pad(bias, (0, rows))
        tails.append(_Tail([*((w.T, b) for w, b in hidden), head], len(bias)))
    return first, tails


def _tail(h: Tensor, tail: _Tail) -> Tensor:
    *hidden, head = tail.layers
    for weight, bias in hidden:
        h = torch._addmm_activation(bias, h, weight)
    return torch.addmm(head[1], h, head[0])[:, : tail.outputs]


def _batched(tasks: Sequence[Layers]) -> tuple[Run, int]:
    """Carry a one beside the activations, which the next layer's weights multiply by its bias."""
    firsts = [(F.pad(w, (0, 0, 0, PAD)), torch.cat([b, _one(b)])) for (w, b), *_ in tasks]
    weight, bias = torch.cat([w for w, _ in firsts]).T, torch.cat([b for _, b in firsts])
    further = [
        torch.stack([_augmented(*layers[i], is_head=i == len(tasks[0]) - 1) for layers in tasks]).transpose(1, 2)
        for i in range(1, len(tasks[0]))
    ]
    outputs = len(tasks[0][-1][1])

    def run(x: Tensor) -> list[Tensor]:
        h = torch._addmm_activation(bias, x, weight).unflatten(1, (len(tasks), -1)).transpose(0, 1)
        for i, w in enumerate(further):
            h = torch.bmm(h, w)
            if i < len(further) - 1:
                h = h.relu_()
        return list(h[:, :, :outputs])

    return run, _nbytes((weight, bias)) + sum(w.nbytes for w in further)


def _augmented(weight: Tensor, bias: Tensor, is_head: bool) -> Tensor:
    """Return `[out_features, in_features + PAD]` with the bias as a column, and rows that pass the one on."""
    rows = torch.cat([weight, bias[:, None], weight.new_zeros(len(bias), PAD - 1)], dim=1)
    if is_head:
        return F.pad(rows, (0, 0, 0, -len(bias) % PAD))
    one = torch.zeros_like(rows[:1]).expand(PAD, -1).clone()
    one[0, weight.shape[1]] = 1
    return torch.cat([rows, one])


def _one(like: Tensor) -> Tensor:
    return F.pad(like.new_ones(1), (0, PAD - 1))


def _nbytes(*layers: tuple[Tensor, Tensor]) -> int:
    return sum(part.nbytes for layer in layers for part in layer)
