"""The measured plan as a value: which layers of a frozen network run in which kernel, batch size by batch size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch

from lt4rec_sparse import ops
from lt4rec_sparse.errors import InputError, shown, told
from lt4rec_sparse.files import check_regular, write_whole
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.network import PRECISIONS, FrozenNetwork
from lt4rec_sparse.stopwatch import Timing

VERSION = 1
DENSE_KERNELS = ("dense", "onednn")
KERNELS = ("sparse", *cpu.UNSTRUCTURED, *DENSE_KERNELS)  # of a CPU
GPU_KERNELS = (  # `nn.ways` tells what they are
    *("dense", "block16", "block32", "block64", "2:4", "compact"),
    *("tail premasked", "tail dense", "tail branches"),
)
GPU_PRECISIONS = ("bf16", "fp16", "fp32")
TIE = 0.02  # one chain differs this much between two measurements
DENSITY_DRIFT = 0.1  # of a layer's kept weights: its time changes about as much


class Segment(NamedTuple):
    """Neighbouring layers that run in one kernel, for all tasks alike.

    `kernel` is "sparse", the engine, for all its layers in one call; "tables", "slices" or "filled", the engine held to
    that layout, for the whole network; or for a single layer one of `dense_kernels`; or on a GPU one of `GPU_KERNELS`.
    """

    kernel: str
    precision: str
    first: int
    last: int  # included

    def __str__(self) -> str:
        span = f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"
        return f"{self.kernel} {self.precision} {span}"


Chain = tuple[Segment, ...]


class TimedChain(NamedTuple):
    """One chain of kernels through the whole network, measured end to end."""

    name: str  # "mixed", or kernel and precision; on a GPU the kernel that it is named after
    chain: Chain
    timing: Timing


class TimedSegment(NamedTuple):
    """One segment, measured alone."""

    segment: Segment
    timing: Timing


class BatchPlan(NamedTuple):
    """What was measured at one batch size. Timings compare within `chains` and within `segments`."""

    batch: int
    chains: tuple[TimedChain, ...]  # the winner first; "contestants" in a file
    segments: tuple[TimedSegment, ...]


class Machine(NamedTuple):
    """What a plan's timings depend on, besides the network."""

    engine: str  # its instruction set, or "reference" without the engine; or a GPU's name and Triton's version
    threads: int  # 0 on a GPU
    torch: str


class NetworkFacts(NamedTuple):
    """The facts of a network that its timings depend on."""

    in_features: int
    out_features: tuple[int, ...]  # of each layer, the heads' last
    tasks: int
    densities: tuple[float, ...]  # of each layer, mean over the tasks

    @classmethod
    def of(cls, network: FrozenNetwork) -> NetworkFacts:
        """Read them from a network."""
        densities = [round(density, 4) for density in network.densities]
        return cls(
            network.in_features, network.widths, len(network.tasks), (*densities, *([1.0] if network.heads else []))
        )


@dataclass(frozen=True)
class Plan:
    """Which kernel runs which layers at each batch size, with the measurement behind the choice.

    For each batch size the winner is the fastest of these, end to end: the engine alone, with the layout that it
    chooses and with each that it can have, and dense layers alone, in each precision allowed, and the best mixture of
    all. So it is slower than dense by noise at most. Within 2 % is a tie, which goes to the higher precision, then to
    the engine (less memory; its bits do not depend on the batch), and to a mixture last.

    In bf16 a dense layer rounds its sums to bfloat16 too, where the engine does not; so no head is dense in bf16, whose
    scores would be full of ties. "dense bf16" is the fastest of both precisions, layer by layer.
    """

    machine: Machine
    network: NetworkFacts
    precision: str  # the lowest allowed
    batches: tuple[BatchPlan, ...]  # by ascending batch

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        batches = [_plain(batch) for batch in self.batches]
        for batch in batches:
            batch["contestants"] = batch.pop("chains")
        head = {"machine": _plain(self.machine), "network": _plain(self.network), "precision": self.precision}
        write_whole(path, json.dumps({"version": VERSION, **head, "batches": batches}, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote. `check_fits` tells whether it fits this machine and a network.

        Raises:
            FileNotFoundError: If there is no such file.
            InputError: If it is no plan, or one of another version.
        """
        check_regular(path, "what Plan.save wrote")
        try:
            raw = _read(json.loads(Path(path).read_text(encoding="utf-8")), dict, "plan")
            version = _read(raw.get("version"), int, "version")
            if version == VERSION:
                for batch in _read(raw.get("batches"), list, "batches"):
                    chains = _read(batch, dict, "batch").get("contestants")
                    batch["chains"] = chains
                plan = cls(**{name: _read(raw.get(name), kind, name) for name, kind in get_type_hints(cls).items()})
                _check(plan)
                return plan
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: got no plan ({told(error)}), wanted what Plan.save wrote") from error
        raise InputError(f"{path}: got a plan of version {shown(version)}, wanted {VERSION}: measure again")

    def __str__(self) -> str:
        """Show every measured chain at every batch size, the winner first."""
        widths = " -> ".join(str(width) for width in (self.network.in_features, *self.network.out_features))
        densities = ", ".join(f"{density:.0%}" for density in self.network.densities)
        width = max(len(timed.name) for plan in self.batches for timed in plan.chains)
        lines = [
            f"{widths}, densities {densities}, tasks {self.network.tasks}, precision {self.precision}",
            f"engine {self.machine.engine}, "
            + (f"threads {self.machine.threads}, " if self.machine.threads else "")
            + f"torch {self.machine.torch}",
            f"{'batch':>5}   {'':<{width}} {'median us':>10} {'p20':>10} {'p80':>10} {'ratio':>6}  layers",
        ]
        for plan in self.batches:
            best_us = plan.chains[0].timing.median_us
            for i, (name, chain, timing) in enumerate(plan.chains):
                lines.append(
                    f"{'' if i else plan.batch:>5} {' ' if i else '*'} {name:<{width}} {timing.median_us:>10.1f} "
                    f"{timing.p20_us:>10.1f} {timing.p80_us:>10.1f} {timing.median_us / best_us:>6.2f}  "
                    f"{show(chain)}"
                )
        return "\n".join(lines)


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


def ranked(chains: Sequence[TimedChain]) -> tuple[TimedChain, ...]:
    """Put the winner first: of those within a tie of the fastest the one given first; then by time."""
    limit = (1 + TIE) * min(x.timing.median_us for x in chains)
    winner = next(x for x in chains if x.timing.median_us <= limit)
    return (winner, *sorted((x for x in chains if x is not winner), key=lambda x: x.timing.median_us))


def show(chain: Chain) -> str:
    """Name the kernel of each layer, neighbours of one kernel and precision together."""
    groups = [list(group) for _, group in groupby(chain, lambda segment: segment[:2])]
    return ", ".join(str(group[0]._replace(last=group[-1].last)) for group in groups)


def check_fits(network: FrozenNetwork, plan: Plan, machine: Machine) -> None:
    """Refuse a plan of another network or machine.

    Raises:
        InputError: If one of the facts that its timings depend on differs.
    """
    facts = {**plan.machine._asdict(), **plan.network._asdict()}
    wanted = {**machine._asdict(), **NetworkFacts.of(network)._asdict()}
    for name, want in wanted.items():
        got = facts[name]
        if name == "densities" and len(got) == len(want):
            is_same = all(abs(g - w) <= DENSITY_DRIFT * w for g, w in zip(got, want, strict=True))
        else:
            is_same = got == want
        if not is_same:
            raise InputError(f"plan: got one for {name} {got}, wanted {want}: measure again")


def this_machine() -> Machine:
    """Return the facts of this CPU."""
    return Machine(ops.cpu_engine(), torch.get_num_threads(), str(torch.__version__))


def check_asked(precision: str, precisions: Sequence[str], batch_sizes: Sequence[int]) -> None:
    """Check what a plan is to be measured for.

    Raises:
        ValueError: If the precision is none of `precisions`, or the batch sizes do not ascend from 1.
    """
    if precision not in precisions:
        raise ValueError(f"precision: got {shown(precision)}, wanted one of {', '.join(precisions)}")
    if not batch_sizes or batch_sizes[0] < 1 or any(a >= b for a, b in pairwise(batch_sizes)):
        raise ValueError(f"batch_sizes: got {shown(tuple(batch_sizes))}, wanted at least one, ascending from 1")


def _plain(value: Any) -> Any:
    """Return what JSON can hold: a NamedTuple becomes an object of its fields."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _read(raw: Any, kind: Any, name: str) -> Any:
    """Return what `_plain` made of a value of this kind: a NamedTuple, a tuple of one kind, a number or a string."""
    if hasattr(kind, "_fields"):
        kinds, fields = get_type_hints(kind), _read(raw, dict, name)
        return kind(*(_read(fields.get(field), kinds[field], field) for field in kind._fields))
    if get_origin(kind) is tuple:
        return tuple(_read(part, get_args(kind)[0], name) for part in _read(raw, list, name))
    # An int beyond 2^53 would be another float, and one of hundreds of digits none.
    value = float(raw) if kind is float and type(raw) is int and abs(raw) <= 1 << 53 else raw
    if type(value) is not kind:
        raise ValueError(f"{name}: got {shown(value)}, wanted a {kind.__name__}")
    return value


def _check(plan: Plan) -> None:
    """Check that a plan that was read is one that could be followed."""
    is_gpu, layers = plan.machine.threads == 0, len(plan.network.out_features)
    check_asked(plan.precision, GPU_PRECISIONS if is_gpu else PRECISIONS, [batch.batch for batch in plan.batches])
    if len(plan.network.densities) != layers:
        raise ValueError(f"densities: got {len(plan.network.densities)}, wanted {layers}")
    for batch in plan.batches:
        if not batch.chains:
            raise ValueError("chains: got none, wanted at least one")
        for timed in batch.chains:
            _check_chain(timed.chain, layers, is_gpu)
        for timing in (timed.timing for of_kind in (batch.chains, batch.segments) for timed in of_kind):
            if not all(0 < us < math.inf for us in timing):
                raise ValueError(f"timing: got {shown(tuple(timing))}, wanted microseconds above 0")


def _check_chain(chain: Chain, layers: int, is_gpu: bool) -> None:
    kernels, precisions = (GPU_KERNELS, GPU_PRECISIONS) if is_gpu else (KERNELS, PRECISIONS)
    following = 0
    for kernel, precision, first, last in chain:
        if kernel in cpu.UNSTRUCTURED:
            fits = (first, last) == (0, layers - 1)
        else:
            fits = first == last or kernel in ("sparse", "compact") or kernel.startswith("tail ")
        is_known = kernel in kernels and precision in precisions and fits
        if not is_known or first != following or not first <= last < layers:
            got = (kernel, precision, first, last)
            raise ValueError(f"chain: got {shown(got)}, wanted a known kernel for layer {following} of {layers}")
        following = last + 1
    if following != layers:
        raise ValueError(f"chain: got one that ends before layer {following}, wanted {layers} layers")
