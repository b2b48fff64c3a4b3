"""Serving by a plan: each layer in the kernel that was measured to be fastest for the batch size."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lt4rec_sparse import ops
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.network import FrozenNetwork
from lt4rec_sparse.nn.dense import DenseRun
from lt4rec_sparse.nn.plan.plan import DENSE_KERNELS, Plan, Segment, check_fits, this_machine


class PlannedExecutor:
    """Runs a frozen network by a plan.

    A call follows the plan of the measured batch size whose ratio to its own is nearest to 1, because times go by
    ratios: 9 rows are more like 8 than like 64. Weights are prepacked for the chosen segments, once for all batch
    sizes.

    Results are those of the segments, each as the engine or torch defines it: in fp32 within rounding of the engine's
    (unless `torch.set_float32_matmul_precision` lowers it). Two promises of the engine no longer hold: a candidate's
    bits may depend on the size of its batch, since sizes have their own segments; and in a dense segment a pruned
    weight meets its activation as 0, which makes NaN of an Inf.

    Args:
        network: The frozen network.
        plan: What was measured for it, or for one like it, on this machine.

    Raises:
        InputError: If the plan is of another network (widths, tasks, or a density that differs by more than a tenth),
            instruction set, thread count or torch.
        ValueError: If the plan runs layers in int8 and the network is not calibrated.
    """

    def __init__(self, network: FrozenNetwork, plan: Plan) -> None:
        check_fits(network, plan, this_machine())
        self.network, self.plan, self.precision = network, plan, plan.precision
        winners = [batch.chains[0].chain for batch in plan.batches]
        self._runs = {s: make_run(network, s) for s in dict.fromkeys(s for chain in winners for s in chain)}
        self._chains = [[self._runs[segment] for segment in chain] for chain in winners]
        self._borders = [math.sqrt(a.batch * b.batch) for a, b in pairwise(plan.batches)]

    def __reduce__(self) -> tuple[type[PlannedExecutor], tuple[FrozenNetwork, Plan]]:
        """Copy the network and the plan: a copy prepacks for itself."""
        return type(self), (self.network, self.plan)

    def run(self, x: Tensor, out: Tensor) -> None:
        """Write every task's outputs, side by side (`ops.Executor.run`).

        Raises:
            ValueError: If a shape, dtype or device is not what the network reads.
        """
        runs = self._chains[self._place(len(x))]
        if len(runs) == 1 and isinstance(runs[0], EngineRun):
            runs[0].write(x, out)
            return
        if x.dtype not in ops.X_DTYPES or not x.is_cpu:
            raise ValueError(f"x: got {x.dtype} on {x.device}, wanted torch.float32 or torch.bfloat16 on cpu")
        if x.shape[1:] != (self.network.in_features,):
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [batch, {self.network.in_features}]")
        y = follow(runs, len(self.network.tasks), x)
        if out.shape != y.shape or out.dtype != torch.float32:
            raise ValueError(f"out: got {out.dtype} {tuple(out.shape)}, wanted torch.float32 {tuple(y.shape)}")
        out.copy_(y)

    def kernel_for(self, rows: int) -> str:
        """Name the segments that a batch of so many rows takes."""
        return ", ".join(str(segment) for segment in self.plan.batches[self._place(rows)].chains[0].chain)

    def _place(self, rows: int) -> int:
        return bisect_left(self._borders, rows)

    @property
    def prepacked_nbytes(self) -> dict[str, int]:
        """Segment -> bytes of its weights."""
        return {str(segment): run.nbytes for segment, run in self._runs.items()}


class EngineRun:
    """A sparse segment: one call of the engine for all tasks where they read x, one for each task further on."""

    def __init__(self, network: FrozenNetwork, segment: Segment) -> None:
        first, last, tasks = segment.first, segment.last, network.tasks
        groups = [tasks] if first == 0 else [(task,) for task in tasks]
        spans = [network.span(first, last, group) for group in groups]
        layout = None if segment.kernel == "sparse" else segment.kernel
        self._executors = [ops.executor(span, segment.precision, layout=layout) for span in spans]
        if layout is not None and layout not in (known := ops.layouts(network, segment.precision)):
            raise InputError(
                f"plan: got {layout} in {segment.precision}, wanted what the network has: {', '.join(known)}"
            )

    def __call__(self, hs: Sequence[Tensor]) -> list[Tensor]:
        """Run all tasks: from one x, or from each task's own activations."""
        outs = [
            h.new_empty(len(h), executor.network.outputs, dtype=torch.float32)
            for h, executor in zip(hs, self._executors, strict=True)
        ]
        for h, executor, out in zip(hs, self._executors, outs, strict=True):
            executor.run(h, out)
        return outs

    def write(self, x: Tensor, out: Tensor) -> None:
        """Write what layers that read x make of it, for all tasks."""
        self._executors[0].run(x, out)

    @property
    def nbytes(self) -> int:
        """Bytes of what is prepacked so far."""
        return sum(sum(executor.prepacked_nbytes.values()) for executor in self._executors)


Run = EngineRun | DenseRun


def make_run(network: FrozenNetwork, segment: Segment) -> Run:
    """Prepare one segment."""
    if segment.kernel in DENSE_KERNELS:
        return DenseRun(network, segment.first, segment.kernel, segment.precision)
    return EngineRun(network, segment)


def follow(runs: Sequence[Run], tasks: int, x: Tensor) -> Tensor:
    """Run segment after segment. Between them the tasks' activations stand apart, or side by side in one tensor."""
    with ops.without_autocast(x):  # each segment has its precision
        hs: Sequence[Tensor] = runs[0]([x])
        for run in runs[1:]:
            hs = run(hs if len(hs) == tasks else hs[0].chunk(tasks, dim=1))
        return hs[0] if len(hs) == 1 else torch.cat(tuple(hs), dim=1)
