"""What `freeze` made of a model, layer by layer: format, bytes, time against dense torch; and why the rest is dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lt4rec_sparse.formats import BlockWeight
from lt4rec_sparse.network import FrozenNetwork
from lt4rec_sparse.nn import dice, plain
from lt4rec_sparse.nn.convert import LEAST_SPARSITY, obstacle
from lt4rec_sparse.nn.dense import dense_kernels
from lt4rec_sparse.nn.masked import MaskedLinear
from lt4rec_sparse.nn.observe import calls_of, inputs_of, rows_of
from lt4rec_sparse.nn.plan.executor import follow, make_run
from lt4rec_sparse.nn.plan.plan import Segment
from lt4rec_sparse.nn.reading import hook_of
from lt4rec_sparse.nn.sparse import SparseMLP
from lt4rec_sparse.stopwatch import interleaved


@dataclass(frozen=True)
class Entry:
    """One call of the engine, or a linear layer that is dense.

    Attributes:
        name: The module's name in the model.
        widths: Inputs, and the outputs of each layer.
        format: "blocks", "weights" or "dense".
        density: Kept weights over all weights.
        nbytes: Bytes of weights and biases in canonical form.
        dense_nbytes: Bytes of the same layers dense, a copy per task, in float32.
        why_dense: The reason, where it is dense.
        kernel: What runs it, where it was measured: a layout of the engine, or a plan's segments.
        rows: Rows of the example, where it was measured.
        microseconds, dense_microseconds: Of a call, and of dense products with the masks multiplied in beforehand.
    """

    name: str
    widths: tuple[int, ...]
    format: str
    density: float
    nbytes: int
    dense_nbytes: int
    why_dense: str = ""
    kernel: str = ""
    rows: int | None = None
    microseconds: float | None = None
    dense_microseconds: float | None = None


@dataclass(frozen=True)
class Report:
    """The linear layers of a model; printed as a table.

    Attributes:
        entries: One per layer, or call of several.
        left: Name of a module that is called Dice and left to torch -> why.
    """

    entries: tuple[Entry, ...]
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        names = [entry.name or "(the model)" for entry in self.entries]
        widths = ["-".join(map(str, entry.widths)) for entry in self.entries]
        name_width, widths_width = (max(map(len, ["layer ", *texts])) for texts in (names, widths))
        head = f"{'layer':<{name_width}} {'widths':<{widths_width}} {'format':<8} {'density':>8}"
        lines = [f"{head} {'KB':>9} {'of dense':>9}  against dense"]
        for name, width, entry in zip(names, widths, self.entries, strict=True):
            share = entry.nbytes / entry.dense_nbytes
            line = f"{name:<{name_width}} {width:<{widths_width}} {entry.format:<8} {entry.density:>8.1%}"
            line += f" {entry.nbytes / 1000:>9,.1f} {share:>9.0%}  {_comparison(entry)}"
            lines.append(line.rstrip())
        lines += [f"{name or '(the model)'}: left to torch: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def report(model: nn.Module, example: Any = None) -> Report:
    """Tell which layers of a model are compressed, and why the rest is dense; with an example also how fast it is.

    Example:
        >>> from lt4rec_sparse import SparseLinear
        >>> model = nn.Sequential(SparseLinear.from_dense(torch.eye(64)), nn.Linear(64, 2))
        >>> [(entry.name, entry.format) for entry in report(model).entries]
        [('0', 'weights'), ('1', 'dense')]

    Args:
        model: Any module, frozen or not.
        example: An input that the model is called with, a tuple of them, or a mapping of them by name. Each call of
            the engine is then timed on what enters it, beside the faster of torch and oneDNN in float32, with torch's
            current thread count, in one interleaved run. The model runs once, as in `eval()`, if it has such a call.
    """
    calls = calls_of(model)
    inputs = {} if example is None or not calls else _inputs_in_eval(model, example)
    times = _times({name: (calls[name], of_call[-1]) for name, of_call in inputs.items()})
    entries, left = [], {}
    for name, module in model.named_modules():
        if isinstance(module, SparseMLP):
            entry = _of_call(name, module.network)
            if name in inputs:
                rows = len(rows_of(inputs[name][-1]))
                dense = min(times[name, kernel] for kernel in dense_kernels("fp32"))
                kernel = module.kernel_for(rows)
                entry = replace(
                    entry, kernel=kernel, rows=rows, microseconds=times[name, "ours"], dense_microseconds=dense
                )
            entries.append(entry)
        elif isinstance(module, nn.Linear):
            entries.append(_of_linear(name, module))
        elif dice.is_called_so(module) and (why := dice.obstacle(module)):
            left[name] = why
    return Report(tuple(entries), left)


def _inputs_in_eval(model: nn.Module, example: Any) -> dict[str, list[Tensor]]:
    """Return what enters each call, without a trace in the model: in training, BatchNorm's statistics would move."""
    modes = {module: module.training for module in model.modules()}
    try:
        return inputs_of(model.eval(), example)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _of_call(name: str, network: FrozenNetwork) -> Entry:
    kept = total = dense = 0
    for i in range(network.depth):
        for task in network.tasks:
            mask = network.mask(i, task)
            kept, total = kept + int(mask.sum()), total + mask.numel()
            dense += 4 * (mask.numel() + len(mask) * (network.layer(i, task).bias is not None))
    is_blocks = all(isinstance(layer.weight, BlockWeight) for layer in network.hidden)
    widths = (network.in_features, *network.widths)
    return Entry(name, widths, "blocks" if is_blocks else "weights", kept / total, network.nbytes, dense)


def _of_linear(name: str, linear: nn.Linear) -> Entry:
    why, density = obstacle(linear), 1.0
    if isinstance(linear, MaskedLinear):
        why, density = hook_of(linear) or "not frozen", linear.masks.float().mean().item()
    elif why is None:
        density = plain.of_linear(linear).mask.float().mean().item()
        is_pruned = 1 - density >= LEAST_SPARSITY
        why = "not frozen" if is_pruned else f"{1 - density:.0%} is zero, wanted {LEAST_SPARSITY:.0%}"
    numbers = linear.in_features * linear.out_features + (linear.out_features if linear.bias is not None else 0)
    widths = (linear.in_features, linear.out_features)
    return Entry(name, widths, "dense", density, 4 * numbers, 4 * numbers, why)


def _times(calls: dict[str, tuple[SparseMLP, Tensor]]) -> dict[tuple[str, str], float]:
    timed: dict[tuple[str, str], Callable[[], object]] = {}
    for name, (module, x) in calls.items():
        network = module.network
        rows = rows_of(x)
        timed[name, "ours"] = partial(module, x)
        for kernel in dense_kernels("fp32"):
            runs = [make_run(network, Segment(kernel, "fp32", i, i)) for i in range(network.depth)]
            timed[name, kernel] = partial(follow, runs, len(network.tasks), rows)
    with torch.inference_mode():
        return {name: timing.median_us for name, timing in interleaved(timed, rounds=7).items()}


def _comparison(entry: Entry) -> str:
    if entry.microseconds is None or entry.dense_microseconds is None:
        return entry.why_dense
    ratio = entry.dense_microseconds / entry.microseconds
    times = f"{entry.microseconds:,.0f} of {entry.dense_microseconds:,.0f} µs"
    return f"{ratio:.1f}x ({times}, rows: {entry.rows:,}, {entry.kernel})"
