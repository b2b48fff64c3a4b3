"""The measured plan: which layers of a frozen MLP run sparse and which dense on this machine, batch size by batch size.

How many weights must be pruned before the engine beats a dense product depends on the CPU, the threads, the batch and
the layer. A `Plan` holds what a measurement said, and a `PlannedMLP` serves by it:

    plan = Plan.measure(frozen)
    print(plan)
    plan.save("plan.json")
    served = PlannedMLP(frozen, plan)

That is a CPU's. `nn.gpu` measures a GPU's, and serves by it.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lt4rec_sparse import ops
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import write_whole
from lt4rec_sparse.nn.dense import DenseLayer, dense_kernels
from lt4rec_sparse.nn.masked import task_index
from lt4rec_sparse.nn.sparse import SparseMLP
from lt4rec_sparse.stopwatch import Timing, interleaved

VERSION = 1
KERNELS = ("sparse", "dense", "onednn")  # of a CPU
GPU_KERNELS = (  # `kernels.gpu_network` tells what they are
    *("dense", "apart", "premasked", "masked", "shared", "block16", "block32", "block64", "2:4", "compact"),
    *("tail premasked", "tail masked", "tail shared", "tail dense", "tail branches"),
)
GPU_PRECISIONS = ("bf16", "fp16", "fp32")
BATCH_SIZES = (1, 8, 64, 256, 1024)
TIE = 0.02  # one chain differs by as much from one measurement to the next
DENSITY_DRIFT = 0.1  # of a layer's kept weights: its time changes by as much


class Segment(NamedTuple):
    """Neighbouring layers that run in one way, for all tasks alike.

    `kernel` is "sparse", the engine, for all its layers in one call; or for a single layer "dense", torch's product, or
    "onednn", the same of a packed weight (`dense_kernels`).
    """

    kernel: str
    precision: str
    first: int
    last: int  # included

    def __str__(self) -> str:
        span = f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"
        return f"{self.kernel} {self.precision} {span}"


Chain = tuple[Segment, ...]


class Contestant(NamedTuple):
    """One way through the whole network, measured end to end."""

    name: str  # "sparse <precision>", "dense <precision>" or "mixed"; on a GPU the kernel that it is named after
    chain: Chain
    timing: Timing


class BatchPlan(NamedTuple):
    """What was measured at one batch size. Timings compare within `contestants` and within `segments`."""

    batch: int
    contestants: tuple[Contestant, ...]  # the winner first
    segments: tuple[tuple[Segment, Timing], ...]


class Machine(NamedTuple):
    """What a plan's timings depend on, besides the network."""

    engine: (
        str  # the engine's instruction set, or "reference" without the engine; or a GPU's name, and Triton's version
    )
    threads: int  # 0 on a GPU
    torch: str


class Network(NamedTuple):
    """What of a network its timings depend on."""

    in_features: int
    out_features: tuple[int, ...]  # of each layer, the heads' last
    tasks: int
    densities: tuple[float, ...]  # of each layer, mean over the tasks


@dataclass(frozen=True)
class Plan:
    """Which layers run how at each batch size, and the measurement that says so.

    For each batch size the winner is the fastest of these, end to end: the engine alone and dense layers alone, in each
    precision allowed, and the best mixture of all. So it is slower than dense by noise at most. Within 2 % is a tie,
    which goes to the higher precision, then to the engine (less memory; its bits do not depend on the batch), and to a
    mixture last.

    In bf16 a dense layer rounds its sums to bfloat16 too, where the engine does not; so no head is dense in bf16, whose
    scores would be full of ties. "dense bf16" is the fastest of both precisions, layer by layer.
    """

    machine: Machine
    network: Network
    precision: str  # the lowest allowed
    batches: tuple[BatchPlan, ...]  # by ascending batch

    @classmethod
    def measure(cls, mlp: SparseMLP, batch_sizes: Sequence[int] = BATCH_SIZES, precision: str | None = None) -> Plan:
        """Measure a frozen MLP on this machine, with torch's current thread count, weights warm in the cache.

        Every run of neighbouring layers is timed in the engine and every layer dense; from these comes the best
        mixture, and then all ways through the network are timed end to end in one interleaved run.

        Example:
            >>> from lt4rec_sparse.nn import MaskedMLP, freeze
            >>> plan = Plan.measure(freeze(MaskedMLP(8, hidden=(4, 2))), batch_sizes=(1,))
            >>> plan.batches[0].contestants[0].timing.median_us > 0
            True

        Args:
            mlp: The frozen MLP; calibrated, if int8 is allowed.
            batch_sizes: Ascending; those that will be served, or near them.
            precision: The lowest allowed: "fp32" allows itself alone, "bf16" both, "int8" all three; None takes the
                MLP's own.

        Raises:
            ValueError: If the batch sizes do not ascend from 1, there is no such precision, or an MLP that is not
                calibrated is to run in int8.
        """
        precision = mlp.precision if precision is None else precision
        if precision not in ops.PRECISIONS:
            raise ValueError(f"precision: got {precision!r}, wanted one of {', '.join(ops.PRECISIONS)}")
        sizes = tuple(batch_sizes)
        if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"batch_sizes: got {sizes}, wanted at least one, ascending from 1")
        if precision == "int8" and mlp.codes is None:
            raise ValueError("mlp: got one without codes, wanted a calibrated one for int8: mlp.calibrated(x)")
        runs = {segment: _run(mlp, segment) for segment in _candidates(len(mlp._paths()[0]), precision)}
        batches = tuple(_measure_batch(mlp, runs, batch, precision) for batch in sizes)
        return cls(_this_machine(), network_of(mlp), precision, batches)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        raw = {
            "version": VERSION,
            "machine": self.machine._asdict(),
            "network": self.network._asdict(),
            "precision": self.precision,
            "batches": [
                {
                    "batch": plan.batch,
                    "contestants": [
                        {"name": name, "chain": [x._asdict() for x in chain], "timing": timing._asdict()}
                        for name, chain, timing in plan.contestants
                    ],
                    "segments": [
                        {"segment": segment._asdict(), "timing": timing._asdict()} for segment, timing in plan.segments
                    ],
                }
                for plan in self.batches
            ],
        }
        write_whole(path, json.dumps(raw, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote. Whether it fits this machine and a network is for `PlannedMLP` to check.

        Raises:
            FileNotFoundError: If there is no such file.
            InputError: If it is no plan, or one of another version.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            version = raw["version"]
            if version == VERSION:
                return _from_json(raw)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: got no plan ({error!r}), wanted what Plan.save wrote") from error
        raise InputError(f"{path}: got a plan of version {version}, wanted {VERSION}: measure again")

    def __str__(self) -> str:
        """Show every way through the network at every batch size, the winner first."""
        widths = " -> ".join(str(width) for width in (self.network.in_features, *self.network.out_features))
        densities = ", ".join(f"{density:.0%}" for density in self.network.densities)
        width = max(len(contestant.name) for plan in self.batches for contestant in plan.contestants)
        lines = [
            f"{widths}, densities {densities}, tasks {self.network.tasks}, precision {self.precision}",
            f"engine {self.machine.engine}, "
            + (f"threads {self.machine.threads}, " if self.machine.threads else "")
            + f"torch {self.machine.torch}",
            f"{'batch':>5}   {'':<{width}} {'median us':>10} {'p20':>10} {'p80':>10} {'ratio':>6}  layers",
        ]
        for plan in self.batches:
            best_us = plan.contestants[0].timing.median_us
            for i, (name, chain, timing) in enumerate(plan.contestants):
                lines.append(
                    f"{'' if i else plan.batch:>5} {' ' if i else '*'} {name:<{width}} {timing.median_us:>10.1f} "
                    f"{timing.p20_us:>10.1f} {timing.p80_us:>10.1f} {timing.median_us / best_us:>6.2f}  "
                    f"{_show(chain)}"
                )
        return "\n".join(lines)


class PlannedMLP(nn.Module):
    """A frozen MLP that serves by a plan: takes the place of the `SparseMLP` it is made from.

    A call follows the plan of the measured batch size whose ratio to its own is nearest to 1, for times go by ratios:
    9 rows are more like 8 than like 64. Weights are prepacked for the chosen segments, once for all batch sizes. For
    inference alone: autograd and `torch.compile` do not see the engine here.

    Results are those of the segments, each as the engine or torch defines it: in fp32 within rounding of the
    `SparseMLP`'s (unless `torch.set_float32_matmul_precision` lowers it). Two of its promises hold no more: a
    candidate's bits may depend on the size of its batch, since sizes have their own segments; and in a dense one a
    pruned weight meets its activation as 0, which makes NaN of an Inf.

    Args:
        mlp: The frozen MLP. It is left as it is.
        plan: What was measured for it, or for one like it, on this machine.

    Raises:
        InputError: If the plan is of another network (widths, tasks, or a density that differs by more than a tenth),
            instruction set, thread count or torch.
        ValueError: If the plan runs layers in int8 and the MLP is not calibrated.
    """

    def __init__(self, mlp: SparseMLP, plan: Plan) -> None:
        super().__init__()
        check_fits(mlp, plan, _this_machine())
        self.plan = plan
        self.in_features = mlp.in_features
        self.out_features = mlp.out_features
        self.tasks = mlp.tasks
        self.hidden = mlp.hidden
        self.heads = mlp.heads
        self.codes = mlp.codes
        self.precision = plan.precision
        self.nbytes = mlp.nbytes
        winners = [batch.contestants[0].chain for batch in plan.batches]
        self._runs = {segment: _run(mlp, segment) for segment in dict.fromkeys(s for chain in winners for s in chain)}
        self._chains = [[self._runs[segment] for segment in chain] for chain in winners]
        self._borders = [math.sqrt(a.batch * b.batch) for a, b in pairwise(plan.batches)]

    def forward(self, x: Tensor, task: str | None = None) -> Tensor:
        """Score every task, or return one task's part of it.

        Args:
            x: `[..., in_features]`, float32 or bfloat16, on the CPU.
            task: The task's name; None returns every task. All are computed in any case.

        Returns:
            `[..., tasks * out_features]`, float32, or `[..., out_features]` of the task, as `SparseMLP.forward`.

        Raises:
            ValueError: If the last dimension is another, or there is no such task.
            TypeError: If `x` is not float32 or bfloat16 on the CPU.
        """
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., {self.in_features}]")
        if x.dtype not in ops.X_DTYPES or x.device.type != "cpu":
            raise TypeError(f"x: got {x.dtype} on {x.device}, wanted torch.float32 or torch.bfloat16 on cpu")
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        y = _follow(self._chain(rows.shape[0]), len(self.tasks), rows)
        y = y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.out_features)
        return y if task is None else y.chunk(len(self.tasks), dim=-1)[task_index(self.tasks, task)]

    def score_into(self, x: Tensor, out: Tensor) -> None:
        """Write every task's scores into `out`; without a copy where the engine runs all layers.

        Args:
            x: `[batch, in_features]`, float32 or bfloat16; rows may be strided, elements of a row not.
            out: `[batch, tasks * out_features]`, float32; rows may be strided. Must not overlap `x`.

        Raises:
            ValueError: If a shape, dtype, device or stride is another.
        """
        runs = self._chain(x.shape[0])
        if len(runs) == 1 and isinstance(runs[0], _EngineRun):
            runs[0].write(x, out)
            return
        y = self(x)
        if out.shape != y.shape or out.dtype != y.dtype:
            raise ValueError(f"out: got {out.dtype} {tuple(out.shape)}, wanted {y.dtype} {tuple(y.shape)}")
        out.copy_(y)

    @property
    def prepacked_nbytes(self) -> int:
        """Bytes of the weights as the chosen segments want them."""
        return sum(run.nbytes for run in self._runs.values())

    def extra_repr(self) -> str:
        """Show tasks and the winners."""
        winners = [f"{batch.batch}: {_show(batch.contestants[0].chain)}" for batch in self.plan.batches]
        return f"tasks={', '.join(self.tasks)}, batch {'; '.join(winners)}"

    def _chain(self, batch: int) -> list[_Run]:
        return self._chains[bisect_left(self._borders, batch)]


class _EngineRun:
    """A sparse segment: one call of the engine for all tasks where they read x, one for each task further on."""

    def __init__(self, mlp: SparseMLP, segment: Segment) -> None:
        layers = slice(segment.first, segment.last + 1)
        paths = [path[layers] for path in mlp._paths()]
        codes = None if mlp.codes is None else [mlp.codes[task][layers] for task in mlp.tasks]
        together = [slice(None)] if segment.first == 0 else [slice(t, t + 1) for t in range(len(paths))]
        if len(paths[0]) == len(mlp.hidden) + 1 and segment.precision == mlp.precision:
            blobs = [mlp.prepacked]
        else:
            blobs = [
                ops.prepack(paths[tasks], segment.precision, None if codes is None else codes[tasks])
                for tasks in together
            ]
        self._networks = [ops.Network(blob) for blob in blobs if blob is not None]
        self._outputs = paths[0][-1][0].weight.shape[0] * len(paths[together[0]])
        self.nbytes = sum(network.facts.nbytes for network in self._networks)

    def __call__(self, hs: Sequence[Tensor]) -> list[Tensor]:
        outs = [h.new_empty(h.shape[0], self._outputs, dtype=torch.float32) for h in hs]
        for h, network, out in zip(hs, self._networks, outs, strict=True):
            network.sparse_mlp(h, out)
        return outs

    def write(self, x: Tensor, out: Tensor) -> None:
        """Write what layers that read x make of it, for all tasks."""
        self._networks[0].sparse_mlp(x, out)


_Run = _EngineRun | DenseLayer


def _run(mlp: SparseMLP, segment: Segment) -> _Run:
    if segment.kernel == "sparse":
        return _EngineRun(mlp, segment)
    layers = [path[segment.first] for path in mlp._paths()]
    return DenseLayer(layers, segment.first == 0, segment.kernel, segment.precision)


def _follow(runs: Sequence[_Run], tasks: int, x: Tensor) -> Tensor:
    """Run segment after segment. Between them the tasks' activations stand apart, or side by side in one tensor."""
    hs: Sequence[Tensor] = runs[0]([x])
    for run in runs[1:]:
        hs = run(hs if len(hs) == tasks else hs[0].chunk(tasks, dim=1))
    return hs[0] if len(hs) == 1 else torch.cat(tuple(hs), dim=1)


def _candidates(layers: int, precision: str) -> Iterator[Segment]:
    """Yield what is timed alone: every run of layers in the engine, every layer dense.

    Neighbours in the engine are one call, and save the transposes between them; dense neighbours save nothing.
    """
    for allowed in ops.PRECISIONS[: ops.PRECISIONS.index(precision) + 1]:
        if ops.cpu_engine() != "reference":
            for first in range(layers):
                for last in range(first, layers):
                    yield Segment("sparse", allowed, first, last)
        for kernel in dense_kernels(allowed):
            for layer in range(layers if allowed == "fp32" else layers - 1):
                yield Segment(kernel, allowed, layer, layer)


def _measure_batch(mlp: SparseMLP, runs: Mapping[Segment, _Run], batch: int, precision: str) -> BatchPlan:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, mlp.in_features, generator=generator)
    inputs: list[Sequence[Tensor]] = [[x]]
    for layer in mlp.hidden:
        h = torch.randn(batch, len(mlp.tasks) * layer.weight.shape[0], generator=generator).relu_()
        inputs.append(h.chunk(len(mlp.tasks), dim=1))
    with torch.inference_mode():
        # These only propose a mixture: the verdict is the second measurement's, which takes longer.
        alone = interleaved(
            {str(segment): partial(run, inputs[segment.first]) for segment, run in runs.items()},
            rounds=5,
            round_us=2_000,
        )
        segments = dict(zip(runs, alone.values(), strict=True))
        chains = _chains({segment: timing.median_us for segment, timing in segments.items()}, precision)
        ends = interleaved(
            {
                name: partial(_follow, [runs[segment] for segment in chain], len(mlp.tasks), x)
                for name, chain in chains.items()
            }
        )
    contestants = [Contestant(name, chain, ends[name]) for name, chain in chains.items()]
    return BatchPlan(batch, ranked(contestants), tuple(segments.items()))


def _chains(us: Mapping[Segment, float], precision: str) -> dict[str, Chain]:
    """Choose the ways through the network to time end to end, in the order that ties prefer; none stands twice."""
    subsets = {}
    for i, allowed in enumerate(ops.PRECISIONS[: ops.PRECISIONS.index(precision) + 1]):
        subsets[f"sparse {allowed}"] = [s for s in us if s[:2] == ("sparse", allowed)]
        if dense_kernels(allowed):
            subsets[f"dense {allowed}"] = [
                s for s in us if s.kernel != "sparse" and s.precision in ops.PRECISIONS[: i + 1]
            ]
    subsets["mixed"] = list(us)
    chains: dict[str, Chain] = {}
    for name, subset in subsets.items():
        chain = fastest_chain({segment: us[segment] for segment in subset})
        if chain and chain not in chains.values():
            chains[name] = chain
    return chains


def fastest_chain(us: Mapping[Segment, float]) -> Chain:
    """Return the segments that cover all layers in the least time together, or nothing if none do."""
    layers = 1 + max((segment.last for segment in us), default=0)

    @cache
    def rest(first: int, before: tuple[str, str]) -> tuple[float, Chain]:
        if first == layers:
            return 0.0, ()
        found: list[tuple[float, Chain]] = []
        for segment, segment_us in us.items():
            # Neighbours in the engine are one segment, whatever noise says of their sum.
            joined = segment.kernel == "sparse" and segment[:2] == before
            if segment.first == first and not joined:
                rest_us, chain = rest(segment.last + 1, segment[:2])
                found.append((segment_us + rest_us, (segment, *chain)))
        return min(found, default=(math.inf, ()))

    return rest(0, ("", ""))[1]


def ranked(contestants: Sequence[Contestant]) -> tuple[Contestant, ...]:
    """Put the winner first: of those within a tie of the fastest the one given first; then by time."""
    limit = (1 + TIE) * min(x.timing.median_us for x in contestants)
    winner = next(x for x in contestants if x.timing.median_us <= limit)
    return (winner, *sorted((x for x in contestants if x is not winner), key=lambda x: x.timing.median_us))


def _show(chain: Chain) -> str:
    """Say which layers run how, neighbours of one kernel and precision together."""
    groups = [list(group) for _, group in groupby(chain, lambda segment: segment[:2])]
    return ", ".join(str(group[0]._replace(last=group[-1].last)) for group in groups)


def _from_json(raw: Mapping[str, Any]) -> Plan:
    facts = raw["network"]
    network = Network(facts["in_features"], tuple(facts["out_features"]), facts["tasks"], tuple(facts["densities"]))
    if len(network.densities) != len(network.out_features):
        raise ValueError(f"densities: got {len(network.densities)}, wanted {len(network.out_features)}")
    batches = []
    for batch in raw["batches"]:
        contestants = [
            Contestant(x["name"], tuple(Segment(**s) for s in x["chain"]), Timing(**x["timing"]))
            for x in batch["contestants"]
        ]
        segments = [(Segment(**x["segment"]), Timing(**x["timing"])) for x in batch["segments"]]
        _check_chain(contestants[0].chain if contestants else (), len(network.out_features))
        batches.append(BatchPlan(batch["batch"], tuple(contestants), tuple(segments)))
    if not batches or any(a.batch >= b.batch for a, b in pairwise(batches)):
        raise ValueError(f"batches: got {[b.batch for b in batches]}, wanted at least one, ascending")
    return Plan(Machine(**raw["machine"]), network, raw["precision"], tuple(batches))


def _check_chain(chain: Chain, layers: int) -> None:
    covered = [layer for segment in chain for layer in range(segment.first, segment.last + 1)]
    known = all(s.kernel in GPU_KERNELS and s.precision in GPU_PRECISIONS for s in chain) or all(
        s.precision in ops.PRECISIONS and s.kernel in KERNELS and (s.kernel == "sparse" or s.first == s.last)
        for s in chain
    )
    if not known or covered != list(range(layers)):
        raise ValueError(f"chain: got {[tuple(s) for s in chain]}, wanted known kernels for layers 0 to {layers - 1}")


def check_fits(mlp: SparseMLP, plan: Plan, machine: Machine) -> None:
    """Refuse a plan of another network or machine.

    Raises:
        InputError: If one of the facts that its timings depend on is another.
    """
    network = network_of(mlp)
    facts = {**plan.machine._asdict(), **plan.network._asdict()}
    wanted = {**machine._asdict(), **network._asdict()}
    for name, want in wanted.items():
        got = facts[name]
        if name == "densities" and all(abs(g - w) <= DENSITY_DRIFT * w for g, w in zip(got, want, strict=True)):
            continue
        if got != want:
            raise InputError(f"plan: got one for {name} {got}, wanted {want}: measure again")


def _this_machine() -> Machine:
    return Machine(ops.cpu_engine(), torch.get_num_threads(), str(torch.__version__))


def network_of(mlp: SparseMLP) -> Network:
    """Return what of a frozen MLP its timings depend on."""
    paths = mlp._paths()
    densities = [
        round(sum(layer.weight.mask(task).float().mean().item() for layer, task in layers) / len(layers), 4)
        for layers in zip(*paths, strict=True)
    ]
    widths = tuple(layer.weight.shape[0] for layer, _ in paths[0])
    return Network(mlp.in_features, widths, len(mlp.tasks), tuple(densities))
