"""Serving on a GPU: every way that a plan knows, against the dense opponents of `bench/gpu_peers.py`, case by case.

A case is a network, a structure of its masks, a sparsity and a batch. Weights, biases and x are rounded to 16 bits
first, so that all compute the same network. There is no sigmoid, which would cost an opponent a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from bench.cpu import OVERLAP, masked_mlp
from bench.gpu_peers import Opponent, TaskLayer, opponents, semi_structured
from bench.gpu_setting import FAILURES, Case, Setting, named
from bench.peers import Peer, check, reference
from lt4rec_sparse import Mask, MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.lottery.pruning import project_to_2_4, spread_tiles, tile_shape
from lt4rec_sparse.nn import gpu
from lt4rec_sparse.nn.plan import Plan
from lt4rec_sparse.stopwatch import Timing
from tests.oracle import Bounded, Layer

NETWORKS = {"narrow": (1024, 512, 256, 128), "wide": (4096, 1024, 512, 256, 128)}
DRY_NETWORKS = {"narrow": (32, 16, 16)}
TASKS = ("ctr", "cvr")
# Each entry holds the batches of one plan; the first case of a plan waits for all of it.
MIDDLE, LARGE, SMALL = (256, 2048), (8192,), (1, 16, 64, 1024)
FIGURES = ("replayed", "cold", "called", "waited")
TOWARDS = {"a": "called", "b": "replayed", "c": "called", "b'": "replayed"}  # the figure by which an opponent is judged


class Load(NamedTuple):
    """What is served in a case."""

    network: str
    structure: str  # "unstructured", "block32", "neuron" or "2:4"
    sparsity: float
    batch: int

    def __str__(self) -> str:
        return f"{self.network} {self.structure} {self.sparsity:.0%} batch {self.batch}"


class Way(NamedTuple):
    """One way of ours to the logits of all tasks."""

    run: Callable[[Tensor], Tensor]  # x -> [batch, tasks * out_features]
    weight_bytes: int


class Ours(NamedTuple):
    """The result of a plan for one network and batch."""

    ways: dict[str, Way]  # the plan's winner first
    served: Callable[[Tensor], Tensor]  # what a user calls
    plan: str


def suite(setting: Setting) -> Iterator[Case]:
    """Yield the cases, first those of the goals."""
    for load in loads(setting.is_dry):
        yield str(load), partial(_measure, setting, load)


def loads(is_dry: bool) -> list[Load]:
    """Return every case once, in order of importance."""
    if is_dry:
        return [Load("narrow", structure, 0.5, batch) for structure, batch in (("unstructured", 1), ("block32", 20))]
    unstructured = [("narrow", "unstructured", s) for s in (0.9, 0.8, 0.95, 0.5)]
    structures = ("unstructured", "block32", "neuron", "2:4")
    groups = [
        (*unstructured[0], MIDDLE),
        (*unstructured[0], LARGE),
        ("wide", "block32", 0.9, LARGE),
        ("wide", "unstructured", 0.9, LARGE),
        *(("narrow", structure, 0.9, batches) for structure in structures for batches in (MIDDLE, LARGE)),
        (*unstructured[0], SMALL),
        *((*group, batches) for group in unstructured for batches in (MIDDLE, LARGE)),
        *(("wide", structure, 0.9, batches) for structure in structures for batches in (LARGE, MIDDLE)),
        *(("wide", structure, 0.9, SMALL) for structure in ("unstructured", "block32")),
        *(
            (network, structure, sparsity, batches)
            for batches in (LARGE, MIDDLE, SMALL)
            for sparsity in (0.8, 0.95, 0.5, 0.9)
            for network in NETWORKS
            for structure in structures
        ),
    ]
    return [Load(*group, batch) for *group, batches in dict.fromkeys(groups) for batch in batches]


def _ours(load: Load, setting: Setting) -> Ours:
    """Return a plan's ways, prepacked. Only this function and `_planned` know how `nn.gpu` is used."""
    plans = [(load.batch,)] if setting.is_dry else [MIDDLE, LARGE, SMALL]
    batches = next(batches for batches in plans if load.batch in batches)
    plan, made, served = _planned(setting, load.network, load.structure, load.sparsity, batches)
    chains = plan.batches[batches.index(load.batch)].chains
    networks = {found.name: made.network(found.chain) for found in chains}
    return Ours({name: Way(network, network.nbytes) for name, network in networks.items()}, served, str(plan))


@lru_cache(maxsize=1)
def _planned(
    setting: Setting, network: str, structure: str, sparsity: float, batches: tuple[int, ...]
) -> tuple[Plan, gpu.Ways, SparseMLP]:
    """Measure a plan for several batches at once, since most of the work is prepacking."""
    _, frozen = masked_network(_widths(setting, network), structure, sparsity)
    # A rehearsal needs a plan, not a good one; the interpreter would take a minute over it.
    with mock.patch.object(gpu, "_timed", _untimed) if setting.is_dry else nullcontext():
        plan = gpu.measure_plan(frozen.network, batches, setting.precision, setting.device)
    made = gpu.Ways(frozen.network, setting.precision, setting.device)
    executor = gpu.GraphExecutor(frozen.network, plan, device=setting.device)
    return plan, made, SparseMLP(frozen.network, plan.precision, executor)


def _untimed(calls: Mapping[Any, object], *_: object) -> dict[Any, Timing]:
    # Later ones count as faster: those are dense, and quickly interpreted.
    return {key: Timing(*[1.0 / (1 + i)] * 3) for i, key in enumerate(calls)}


def _measure(setting: Setting, load: Load) -> dict[str, Any]:
    mlp, frozen = masked_network(_widths(setting, load.network), load.structure, load.sparsity)
    tasks = [_task_layers(mlp, task, setting) for task in TASKS]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(load.batch, mlp.in_features, generator=generator).to(setting.device, setting.dtype)
    with torch.inference_mode():
        dense, absent = _dense(tasks, x, load, setting)
        ours, wrong = _ours_checked(load, tasks, x, setting)
        calls = _timed(dense, ours, x, setting)
    return {
        **load._asdict(),
        "density": {task: mlp.mask(task).layer_density() for task in TASKS},
        "canonical_bytes": frozen.nbytes,
        "absent": absent | wrong,
        "reduced_sums": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "plan": "" if ours is None else ours.plan,
        "contestants": calls,
        "ratios": ratios(calls),
    }


def _ours_checked(
    load: Load, tasks: Sequence[Sequence[TaskLayer]], x: Tensor, setting: Setting
) -> tuple[Ours | None, dict[str, str]]:
    """Return our ways except the wrong ones, and what is wrong with those; None if the plan's choice is wrong."""
    try:
        ours = _ours(load, setting)
    except FAILURES as error:  # the opponents' times are still worth having
        return None, {"ours": named(error)}
    wrong = _wrong({name: way.run for name, way in ours.ways.items()} | {"served": ours.served}, tasks, x, setting)
    whys = {f"ours {name}": why for name, why in wrong.items()}
    if "served" in wrong or next(iter(ours.ways)) in wrong:
        return None, whys
    return ours._replace(ways={name: way for name, way in ours.ways.items() if name not in wrong}), whys


def _dense(
    tasks: Sequence[Sequence[TaskLayer]], x: Tensor, load: Load, setting: Setting
) -> tuple[list[Opponent], dict[str, str]]:
    """Make the opponents; return those that are right, and for each of the others the reason why it is not timed.

    cuBLAS may add the parts of a sum in bfloat16, as torch allows by default. If this breaks the bound, all opponents
    are timed with their sums in float32.
    """
    made = opponents(tasks, setting.compiler)
    absent = {}
    if load.structure == "2:4" and not setting.is_dry:
        try:
            made.append(semi_structured(tasks))
        except FAILURES as error:  # shapes or GPUs that torch's 2:4 does not take
            absent["torch 2:4"] = named(error)
    runs = {opponent.name: opponent.run for opponent in made}
    _reduce_in_bf16(True)
    wrong = _wrong(runs, tasks, x, setting)
    if wrong:
        _reduce_in_bf16(False)
        still_wrong = _wrong(runs, tasks, x, setting)
        _reduce_in_bf16(still_wrong.keys() == wrong.keys())
        wrong = still_wrong
    return [opponent for opponent in made if opponent.name not in wrong], absent | wrong


def _reduce_in_bf16(is_allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = is_allowed


def _wrong(
    runs: Mapping[str, Callable[[Tensor], Any]], tasks: Sequence[Sequence[TaskLayer]], x: Tensor, setting: Setting
) -> dict[str, str]:
    """Return what is wrong with each call that leaves the rounding bound or cannot run."""
    expected = [reference(_layers(layers), x, setting.precision) for layers in tasks]
    return {name: why for name, run in runs.items() if (why := _failure(name, run, expected, x, setting))}


def _failure(name: str, run: Callable[[Tensor], Any], expected: Sequence[Bounded], x: Tensor, setting: Setting) -> str:
    """Say why a way must not be timed; return nothing if it is right."""
    try:
        # Checked as it will be timed, from a graph. `served` has one already, and a graph cannot hold another.
        scores = (run if name == "served" else setting.stopwatch.graphed(run, x))(x)
        parts = scores.chunk(len(expected), dim=1) if isinstance(scores, Tensor) else scores
        for part, wanted in zip(parts, expected, strict=True):
            check(Peer(name, setting.precision, "", run, partial(_kept, part)), wanted)
    except FAILURES as error:
        return named(error)
    return ""


def _timed(dense: Sequence[Opponent], ours: Ours | None, x: Tensor, setting: Setting) -> dict[str, Any]:
    """Take all four figures of the opponents and of the plan's choice, and the first of other ways and slower (b')."""
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[Tensor], Any]] = {}
    for opponent in dense:
        found[opponent.name] = {"kind": opponent.kind, "weight_bytes": opponent.weight_bytes}
        runs[opponent.name] = opponent.run
    for i, (name, way) in enumerate(ours.ways.items() if ours else ()):
        found[f"ours {name}"] = {"kind": "other way" if i else "ours", "weight_bytes": way.weight_bytes}
        runs[f"ours {name}"] = way.run
    replayed = setting.stopwatch.replayed({name: partial(run, x) for name, run in runs.items()})
    strongest: dict[str, str] = {}
    for name, facts in found.items():
        facts["replayed"] = replayed[name]._asdict()
        best = strongest.setdefault(facts["kind"], name)
        if replayed[name].median_us < replayed[best].median_us:
            strongest[facts["kind"]] = name
    calls: dict[str, Callable[[], object]] = {}
    graphed = {opponent.name for opponent in dense if opponent.is_graphed}
    for kind, name in strongest.items():
        found[name]["is_strongest"] = True
        if kind == "ours" and ours is not None:
            calls[name] = partial(ours.served, x)
        else:
            run = setting.stopwatch.graphed(runs[name], x) if name in graphed or kind == "other way" else runs[name]
            calls[name] = partial(run, x)
    figures: dict[str, dict[str, Timing]] = {
        "cold": setting.stopwatch.cold({name: partial(runs[name], x) for name in calls}),
        "called": setting.stopwatch.called(calls),
        "waited": setting.stopwatch.waited(calls),
    }
    for figure, timings in figures.items():
        for name, timing in timings.items():
            found[name][figure] = timing._asdict()
    return found


def ratios(calls: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return kind -> figure -> how many times the plan's choice is faster than its strongest opponent; and bytes."""
    strongest = {facts["kind"]: facts for facts in calls.values() if facts.get("is_strongest")}
    if "ours" not in strongest:
        return {}
    ours = strongest.pop("ours")
    return {
        kind: {figure: facts[figure]["median_us"] / ours[figure]["median_us"] for figure in FIGURES}
        | {"weight_bytes": facts["weight_bytes"] / ours["weight_bytes"]}
        for kind, facts in strongest.items()
    }


@lru_cache(maxsize=8)
def masked_network(widths: tuple[int, ...], structure: str, sparsity: float) -> tuple[MaskedMLP, SparseMLP]:
    """Make a network whose weights and biases are exact in 16 bits, and freeze it."""
    mlp = masked_mlp(dict(zip(TASKS, masks(widths, structure, sparsity, 0), strict=True)), 0)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(parameter.bfloat16())
    if structure == "2:4":
        for task in TASKS:
            mlp.set_mask(project_to_2_4(mlp.masked_weights(), mlp.mask(task)), task)
    frozen = freeze(mlp)
    assert isinstance(frozen, SparseMLP)
    return mlp, frozen


def _widths(setting: Setting, network: str) -> tuple[int, ...]:
    return (DRY_NETWORKS if setting.is_dry else NETWORKS)[network]


def masks(widths: Sequence[int], structure: str, sparsity: float, seed: int) -> list[Mask]:
    """Draw two tasks' masks at random, tile by tile; `bench.cpu.OVERLAP` of the tiles that either keeps are in both."""
    generator = torch.Generator().manual_seed(seed)
    granularity = "weight" if structure in ("unstructured", "2:4") else structure
    layers: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for i, shape in enumerate(zip(widths[1:], widths[:-1], strict=True)):
        tile = tile_shape(granularity, shape)
        grid = -(-shape[0] // tile[0]), -(-shape[1] // tile[1])
        count = grid[0] * grid[1]
        kept = max(1, round(count * (1 - sparsity)))
        common = min(kept, max(round(kept * 2 * OVERLAP / (1 + OVERLAP)), 2 * kept - count))
        order = torch.randperm(count, generator=generator)
        for of_task, chosen in zip(layers, (order[:kept], order[kept - common : 2 * kept - common]), strict=True):
            tiles = torch.zeros(count, dtype=torch.bool)
            tiles[chosen] = True
            of_task[f"layers.{i}"] = spread_tiles(tiles.view(grid), tile, shape)
    return [Mask(of_task) for of_task in layers]


def _task_layers(mlp: MaskedMLP, task: str, setting: Setting) -> list[TaskLayer]:
    head = mlp.heads[task]
    assert isinstance(head, nn.Linear)
    layers = [(layer.weight, layer.mask(task), layer.bias) for layer in mlp.masked_layers()]
    return [
        TaskLayer(
            weight.detach().to(setting.device, setting.dtype),
            None if mask is None else mask.to(setting.device),
            bias.detach().to(setting.device, setting.dtype),
        )
        for weight, mask, bias in (*layers, (head.weight, None, head.bias))
    ]


def _layers(layers: Sequence[TaskLayer]) -> list[Layer]:
    *hidden, head = [(layer.masked.float(), layer.bias.float()) for layer in layers]
    return [*(Layer(*layer, "relu") for layer in hidden), Layer(*head, "none")]


def _kept(value: Tensor) -> Tensor:
    return value
