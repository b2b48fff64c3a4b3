"""The CPU engine against every opponent of `bench/peers.py`: one MLP, 1024-512-256-128-1 with a sigmoid.

All read row-major rows and write row-major scores, so the engine's transposes are part of its time. The engine runs a
mask of single weights ("ours") and one of blocks of 16 x 4 ("blocks"), of the same density, uniformly at random. The
calls of a case run in interleaved rounds; each is timed only after its scores passed the gate of its precision,
`peers.reference`.

Four suites make up the record: uniform masks over batch, sparsity and threads; the tickets of a run, if one is given;
the same weights hot and cold; and two tasks and break-even. The short form runs one small case of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from bench import record
from bench.peers import NAMES, Peer, check, peers, reference, timings
from bench.roofline import roofline
from lt4rec_sparse import BlockWeight, Mask, MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.ops import cpu_engine
from lt4rec_sparse.recsys.tables import table
from lt4rec_sparse.stopwatch import Timing, interleaved
from tests.oracle import Layer

IN_FEATURES, HIDDEN = 1024, (512, 256, 128)
WIDTHS = (IN_FEATURES, *HIDDEN)
BLOCK = BlockWeight.BLOCK


class Cases(NamedTuple):
    """What is measured."""

    grid: tuple[tuple[int, float], ...]  # batch, sparsity
    cold: tuple[tuple[int, float], ...]
    break_even: tuple[float, ...]  # sparsities
    two_tasks: tuple[int, ...]  # batches
    settings: dict[str, Any]  # of the stopwatch


WHOLE = Cases(
    grid=(
        *((b, s) for b in (1, 4, 8, 16) for s in (0.8, 0.9)),
        *((b, s) for b in (64, 256, 1024, 4096) for s in (0.8, 0.9, 0.95)),
    ),
    cold=tuple((b, s) for b in (1, 8) for s in (0.8, 0.9, 0.95)),
    break_even=(0.2, 0.35, 0.5, 0.6, 0.7, 0.8),
    two_tasks=(1, 8, 64, 256, 1024),
    settings={},
)
SHORT = Cases(((8, 0.9),), ((1, 0.9),), (0.2, 0.95), (8,), {"rounds": 1, "round_us": 1.0})
SPARSE_PEERS_AT = (1, 64, 256)  # batches at which the sparse opponents, the slowest of all, run too
PRECISIONS = ("fp32", "bf16", "int8")
KINDS = {"ours": "Single weights", "blocks": "Blocks of 16 x 4"}
ONEDNN_ISA, WITHOUT_AMX = "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"
COLD_SWEEP_BYTES = 256 << 20  # more than any cache, written between two calls
OVERLAP = 0.6  # of two tasks' masks, intersection over union


def run(run_folder: Path | None = None, seed: int = 0, is_short: bool = False) -> None:
    """Measure all suites and write `results/cpu.json`, beside the records of other processors.

    Args:
        run_folder: A run whose tickets are measured as well.
        seed: Seeds masks, weights and inputs.
        is_short: Run one case of each suite once, print the report and write nothing.
    """
    cases = SHORT if is_short else WHOLE
    threads_before = torch.get_num_threads()
    result: dict[str, Any] = {
        "machine": record.machine(),
        "roofline": None if is_short else roofline()._asdict(),
        "engine": cpu_engine(),
        "mlp": f"{IN_FEATURES}-{'-'.join(map(str, HIDDEN))}-1",
        "seed": seed,
        "cases": [],
        "absent": {},
    }
    try:
        for threads in sorted({1, threads_before}):
            torch.set_num_threads(threads)
            for batch, sparsity in cases.grid:
                names = [n for n in NAMES if is_short or batch in SPARSE_PEERS_AT or not is_sparse_peer(n)]
                case = _case(both_masks(sparsity, seed), batch, threads, names, seed, cases.settings)
                result["absent"] |= case.pop("absent")
                result["cases"].append({"threads": threads, "sparsity": sparsity, "batch": batch, **case})
                Console().print(_line(result["cases"][-1]))
        result["tickets"] = [] if run_folder is None else _tickets(run_folder, seed)
        torch.set_num_threads(1)
        result["cold"] = [_cold(batch, sparsity, seed, cases.settings) for batch, sparsity in cases.cold]
        result["break_even"] = _break_even(cases.break_even, seed, cases.settings)
        result["two_tasks"] = [_two_tasks(batch, 0.8, seed, cases.settings) for batch in cases.two_tasks]
    finally:
        torch.set_num_threads(threads_before)
    if not is_short:
        records = record.read("cpu") if (record.RESULTS / "cpu.json").exists() else {}
        records[result["machine"]["processor"]] = result
        Console().print(record.write("cpu", records))
    Console(width=160).print(report(result), markup=False)


def run_without_amx(seed: int = 0, is_short: bool = False) -> None:
    """Measure without AMX in torch and OpenVINO, as on most processors, and write `results/cpu_no_amx.json`.

    ONNX Runtime does not obey `ONEDNN_MAX_CPU_ISA`, so it is left out of int8. `is_short` runs one case once, prints
    it and writes nothing.

    Raises:
        RuntimeError: If `ONEDNN_MAX_CPU_ISA` does not take AMX away.
    """
    if os.environ.get(ONEDNN_ISA) != WITHOUT_AMX:
        raise RuntimeError(f"{ONEDNN_ISA}: got {os.environ.get(ONEDNN_ISA)!r}, wanted {WITHOUT_AMX!r} before the start")
    torch.set_num_threads(1)
    names = [n for n in NAMES if not is_sparse_peer(n) and n != "onnxruntime int8"]
    cases = []
    grid, *_, settings = SHORT if is_short else WHOLE
    for batch, sparsity in grid:
        if batch in (1, 8, 64, 256, 1024):
            case = _case({"ours": uniform_mask(sparsity, seed)}, batch, 1, names, seed, settings)
            case.pop("absent")
            cases.append({"threads": 1, "sparsity": sparsity, "batch": batch, **case})
    if is_short:
        Console().print(*map(_line, cases), sep="\n")
        return
    where = {"machine": record.machine(), "engine": cpu_engine(), ONEDNN_ISA: WITHOUT_AMX, "seed": seed}
    Console().print(record.write("cpu_no_amx", {**where, "cases": cases}))


def uniform_mask(sparsity: float, seed: int, widths: Sequence[int] = WIDTHS) -> Mask:
    """Return a uniform random mask of exactly this sparsity in every hidden layer; `widths` begin with the input's."""
    shapes = MaskedMLP(widths[0], widths[1:]).mask().shapes
    nnz = {name: round(rows * columns * (1 - sparsity)) for name, (rows, columns) in shapes.items()}
    return Mask.random(shapes, nnz, torch.Generator().manual_seed(seed))


def block_mask(sparsity: float, seed: int, widths: Sequence[int] = WIDTHS) -> Mask:
    """Return a mask of blocks of 16 x 4, of exactly this sparsity in every hidden layer."""
    shapes = MaskedMLP(widths[0], widths[1:]).mask().shapes
    grids = {name: (rows // BLOCK[0], columns // BLOCK[1]) for name, (rows, columns) in shapes.items()}
    nnz = {name: round(rows * columns * (1 - sparsity)) for name, (rows, columns) in grids.items()}
    return _spread(Mask.random(grids, nnz, torch.Generator().manual_seed(seed)))


def _spread(grids: Mask) -> Mask:
    """Return the mask of weights of a mask of blocks."""
    return Mask({n: grid.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1) for n, grid in grids.items()})


def both_masks(sparsity: float, seed: int, widths: Sequence[int] = WIDTHS) -> dict[str, Mask]:
    """Return a mask of each kind, by the names of `KINDS`."""
    return {"ours": uniform_mask(sparsity, seed, widths), "blocks": block_mask(sparsity, seed, widths)}


def masked_mlp(masks: dict[str, Mask], seed: int) -> MaskedMLP:
    """Return an MLP of the masks' shapes with these masks."""
    torch.manual_seed(seed)
    shapes = [shape for _, shape in next(iter(masks.values())).shapes.items()]
    mlp = MaskedMLP(shapes[0][1], [rows for rows, _ in shapes], tasks=tuple(masks))
    for task, mask in masks.items():
        mlp.set_mask(mask, task)
    return mlp


def _case(
    masks: dict[str, Mask], batch: int, threads: int, names: Sequence[str], seed: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Time the engine on each mask in every precision, and the opponents `names`, in one interleaved run.

    The opponents have the first mask: of dense ones the time is the same for all.
    """
    mlps = {kind: masked_mlp({"task": mask}, seed) for kind, mask in masks.items()}
    layers = layers_of(next(iter(mlps.values())))
    x = torch.randn(batch, layers[0].weight.shape[1], generator=torch.Generator().manual_seed(seed))
    with peers(layers, x, threads, names) as (present, absent):
        ours = [peer for kind, mlp in mlps.items() for peer in engines(mlp, x, kind)]
        measured = timings([*ours, *present], **settings)
    return {
        "nnz": sum(int((layer.weight != 0).sum()) for layer in layers),
        "contestants": {
            peer.name: {"precision": peer.precision, "kind": peer.kind, **measured[peer.name]._asdict()}
            for peer in (*ours, *present)
        },
        "absent": dict(absent),
    }


def engines(mlp: MaskedMLP, x: Tensor, kind: str = "ours") -> list[Peer]:
    """Return the engine in each precision, checked."""
    layers = layers_of(mlp)
    frozen = freeze(mlp, sigmoid=True)
    assert isinstance(frozen, SparseMLP)
    frozen = frozen.calibrated(torch.cat([x, *(x.roll(shift, 1) for shift in range(1, 1 + 64 // len(x)))]))
    ours = []
    for precision in PRECISIONS:
        sparse, out = frozen.to_precision(precision), torch.empty(len(x), frozen.out_features)
        scores = partial(_scored, sparse, x, out)
        ours.append(Peer(f"{kind} {precision}", precision, kind, partial(sparse.score_into, x, out), scores))
        check(ours[-1], reference(layers, x, precision))
    return ours


def _scored(sparse: SparseMLP, x: Tensor, out: Tensor) -> Tensor:
    sparse.score_into(x, out)
    return out


def layers_of(mlp: MaskedMLP) -> list[Layer]:
    """Return the layers of an MLP of one task, masks multiplied in."""
    hidden = ((layer.weight.detach() * layer.mask(), layer.bias.detach()) for layer in mlp.masked_layers())
    layers = [Layer(weight, bias, "relu") for weight, bias in hidden]
    head = mlp.heads["task"]
    return [*layers, Layer(head.weight.detach(), head.bias.detach(), "sigmoid")]


def _tickets(run_folder: Path, seed: int) -> list[dict[str, Any]]:
    """Time the last tickets of a run's first seed, whose density differs from layer to layer."""
    cases = []
    for task_folder in sorted((run_folder / "seed_0" / "tickets").iterdir()):
        levels = sorted(task_folder.glob("level_*.mask.safetensors"), key=lambda p: int(p.name.split(".")[0][6:]))
        mask = Mask.load(levels[-1])
        dense = [n for n in NAMES if not is_sparse_peer(n)]
        torch.set_num_threads(1)
        for batch in (1, 8, 64, 256, 1024):
            case = _case({"ours": mask}, batch, 1, dense, seed, {})
            case.pop("absent")
            cases.append(
                {"task": task_folder.name, "threads": 1, "batch": batch, "density": mask.layer_density(), **case}
            )
    return cases


def _cold(batch: int, sparsity: float, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Time single calls between which every cache is overwritten, and the same calls hot."""
    mlps = {kind: masked_mlp({"task": mask}, seed) for kind, mask in both_masks(sparsity, seed).items()}
    x = torch.randn(batch, IN_FEATURES, generator=torch.Generator().manual_seed(seed))
    sweep = np.zeros(COLD_SWEEP_BYTES, np.uint8)
    with peers(layers_of(mlps["ours"]), x, 1, [n for n in NAMES if not is_sparse_peer(n)]) as (present, _):
        calls = [*(peer for kind, mlp in mlps.items() for peer in engines(mlp, x, kind)), *present]
        hot = timings(calls, **settings)
        cold = timings(calls, **{"rounds": 9, **settings}, before=lambda: sweep.fill(1))
    return {
        "batch": batch,
        "sparsity": sparsity,
        "contestants": {
            peer.name: {
                "precision": peer.precision,
                "kind": peer.kind,
                "hot": hot[peer.name]._asdict(),
                "cold": cold[peer.name]._asdict(),
            }
            for peer in calls
        },
    }


def _break_even(
    sparsities: Sequence[float], seed: int, settings: dict[str, Any], batch: int = 256
) -> dict[str, dict[str, float | None]]:
    """Return for each kind of mask and precision the sparsity from which the engine beats the best dense opponent.

    None where it does not at any of `sparsities`, or where no opponent has the precision.
    """
    x = torch.randn(batch, IN_FEATURES, generator=torch.Generator().manual_seed(seed))
    calls = []
    for sparsity in sparsities:
        for kind, mask in both_masks(sparsity, seed).items():
            mlp = masked_mlp({"task": mask}, seed)
            calls += [peer._replace(name=f"{peer.name} {sparsity}") for peer in engines(mlp, x, kind)]
    with peers(layers_of(mlp), x, 1, [n for n in NAMES if not is_sparse_peer(n)]) as (present, _):
        measured = timings([*calls, *present], **settings)
    return {kind: _crossings(kind, sparsities, present, measured) for kind in ("ours", "blocks")}


def _crossings(
    kind: str, sparsities: Sequence[float], present: Sequence[Peer], measured: dict[str, Timing]
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for precision in PRECISIONS:
        dense = min((measured[p.name].median_us for p in present if p.precision == precision), default=0.0)
        if not dense:
            found[precision] = None
            continue
        ours = [measured[f"{kind} {precision} {s}"].median_us / dense for s in sparsities]
        faster = [i for i, time_ratio in enumerate(ours) if time_ratio < 1]
        if not faster:
            found[precision] = None
        elif faster[0] == 0:
            found[precision] = sparsities[0]
        else:  # between the last that was slower and the first that was faster
            i = faster[0]
            share = (ours[i - 1] - 1) / (ours[i - 1] - ours[i])
            found[precision] = sparsities[i - 1] + share * (sparsities[i] - sparsities[i - 1])
    return found


def _two_tasks(batch: int, sparsity: float, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Time two tasks whose masks overlap by OVERLAP, and the first of them alone."""
    x = torch.randn(batch, IN_FEATURES, generator=torch.Generator().manual_seed(seed))
    calls: dict[str, Callable[[], object]] = {}
    for kind, one in both_masks(sparsity, seed).items():
        if kind == "blocks":
            grids = Mask({name: mask[:: BLOCK[0], :: BLOCK[1]] for name, mask in one.items()})
            two = _spread(_overlapping(grids, OVERLAP, seed + 1))
        else:
            two = _overlapping(one, OVERLAP, seed + 1)
        for name, masks in (("one task", {"a": one}), ("two tasks", {"a": one, "b": two})):
            frozen = freeze(masked_mlp(masks, seed), sigmoid=True)
            assert isinstance(frozen, SparseMLP)
            frozen = frozen.calibrated(x)
            for precision in PRECISIONS:
                out = torch.empty(batch, frozen.out_features)
                call = partial(frozen.to_precision(precision).score_into, x, out)
                calls[f"{kind}, {name} {precision}"] = call
    with torch.inference_mode():
        measured = interleaved(calls, **settings)
    return {
        "batch": batch,
        "sparsity": sparsity,
        "overlap": OVERLAP,
        "contestants": {n: t._asdict() for n, t in measured.items()},
    }


def _overlapping(mask: Mask, overlap: float, seed: int) -> Mask:
    """Return a random mask of the same counts, whose intersection with `mask` over their union is `overlap`."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, tensor in mask.items():
        nnz = int(tensor.sum())
        common = round(nnz * 2 * overlap / (1 + overlap))
        inside, outside = tensor.flatten().nonzero()[:, 0], (~tensor).flatten().nonzero()[:, 0]
        chosen = torch.zeros(tensor.numel(), dtype=torch.bool)
        chosen[inside[torch.randperm(len(inside), generator=generator)[:common]]] = True
        chosen[outside[torch.randperm(len(outside), generator=generator)[: nnz - common]]] = True
        kept[name] = chosen.view_as(tensor)
    return Mask(kept)


def is_sparse_peer(name: str) -> bool:
    """Whether an opponent takes the weights' zeros."""
    return any(word in name for word in ("csr", "sparseprop", "deepsparse"))


def best(case: dict[str, Any], kind: str, precisions: Sequence[str]) -> tuple[str, float]:
    """Return the fastest call of a kind among these precisions, and its median in microseconds.

    Raises:
        ValueError: If there is none.
    """
    found = {
        name: float(c["median_us"])
        for name, c in case["contestants"].items()
        if c["kind"] == kind and c["precision"] in precisions
    }
    name = min(found, key=lambda n: found[n])
    return name, found[name]


def ratio(case: dict[str, Any], precision: str, kind: str = "ours") -> float:
    """Return how many times faster the engine, in this precision or a finer one, was than the best dense opponent."""
    finer = PRECISIONS[: PRECISIONS.index(precision) + 1]
    return best(case, "dense", [precision])[1] / best(case, kind, finer)[1]


def has(case: dict[str, Any] | None, kind: str, precision: str) -> bool:
    """Whether there is a call of a kind in this precision."""
    calls = case["contestants"].values() if case else ()
    return any(c["kind"] == kind and c["precision"] == precision for c in calls)


def _line(case: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {c['median_us']:.1f}" for name, c in case["contestants"].items())
    return f"batch {case['batch']}, sparsity {case['sparsity']}, threads {case['threads']}: {times}"


def report(result: dict[str, Any]) -> str:
    """Return the tables of a record as Markdown."""
    parts = [f"{result['mlp']}, engine {result['engine']}: best dense opponent / engine, medians of interleaved rounds"]
    for precision, (kind, words) in product(PRECISIONS, KINDS.items()):
        parts += [f"### {words}, against dense {precision}", speed_table(result, precision, kind)]
    parts += ["### Absent opponents", "\n".join(f"- {name}: {why}" for name, why in result["absent"].items()) or "none"]
    return "\n\n".join(parts)


def speed_table(result: dict[str, Any], precision: str, kind: str = "ours") -> str:
    """Return the ratios to the best dense opponent of a precision: rows threads and sparsity, columns batch.

    A cell is empty where no dense opponent has the precision.
    """
    batches = sorted({case["batch"] for case in result["cases"]})
    rows = []
    for threads in sorted({case["threads"] for case in result["cases"]}):
        for sparsity in sorted({case["sparsity"] for case in result["cases"]}):
            at = {c["batch"]: c for c in result["cases"] if c["threads"] == threads and c["sparsity"] == sparsity}
            cells = [
                f"{ratio(at[b], precision, kind):.1f}" if has(at.get(b), "dense", precision) else "" for b in batches
            ]
            rows.append([str(threads), f"{sparsity:.0%}", *cells])
    return table(["threads", "sparsity", *(f"batch {batch}" for batch in batches)], rows)
