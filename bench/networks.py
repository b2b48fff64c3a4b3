"""Whole networks, pruned and frozen, against the engines that people run them with (`bench/network_peers.py`).

Each network of `bench/architectures.py` is pruned by magnitude, layer by layer: single weights, and blocks of 16 x 4.
Its masks are made permanent, zeros in plain linear layers, and `freeze(model, trace=True)` is all that ours gets.
Layers of fewer than 16 outputs (heads, gates) stay dense. Of a network, a batch size and a number of threads everything
is timed in one interleaved run, after its result passed the gate of its precision (`bench/network_gate.py`). Dense
opponents take the weights of the highest sparsity: their time is the same for all.

`python -m bench networks` measures all, `python -m bench networks DLRM MMoE` only what is named, and prints it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from bench import record
from bench.architectures import ARCHITECTURES, SMALL, SPREAD, Architecture, made
from bench.cpu import KINDS, best, has, ratio
from bench.network_gate import Inputs, references
from bench.network_peers import MAKERS, OLD_OPSET, OPSET, NetworkCase, first_rows
from bench.peers import Peer, check, gathered, timings
from lt4rec_sparse import Mask, freeze
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.lottery import prune_by_magnitude, wanted_nnz
from lt4rec_sparse.nn.observe import calls_of, inputs_of, rows_of
from lt4rec_sparse.recsys.tables import table
from tests.oracle import Bounded

SPARSITIES = (0.8, 0.9)
GRANULARITY = {"ours": "weight", "blocks": "16x4"}
LEAST_OUTPUTS = 16
CALIBRATION_ROWS = 64  # at least, of what enters a linear layer
PLACE = ("network", "batch", "threads")
SETTINGS: dict[str, Any] = {"rounds": 7}
LOSS = 1.03  # a ratio below is listed: ours is slower than dense, or so little faster that another run may say slower


def run(names: Sequence[str] = (), is_short: bool = False) -> None:
    """Measure and write `results/networks.json`, beside the records of other processors.

    Args:
        names: Networks to measure instead of all; nothing is written then.
        is_short: Run small networks once, print the tables and write nothing.

    Raises:
        ValueError: If there is no such network.
    """
    known = {architecture.name: architecture for architecture in (SMALL if is_short else ARCHITECTURES)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"networks: got {', '.join(unknown)}, wanted some of {', '.join(known)}")
    settings = {"rounds": 1, "round_us": 1.0} if is_short else SETTINGS
    threads = torch.get_num_threads()
    counts = [1] if is_short else sorted({1, threads})
    result: dict[str, Any] = {
        "machine": record.machine(),
        "engine": cpu.isa(),
        "spread": SPREAD,
        "opsets": {"DeepSparse and static int8": OLD_OPSET, "the others": OPSET},
        "cases": [],
    }
    try:
        for name in names or known:
            for case in measured(known[name], counts, settings):
                Console().print(_line(case), markup=False)
                result["cases"].append(case)
    finally:
        torch.set_num_threads(threads)
    if not names and not is_short:
        records = record.read("networks") if (record.RESULTS / "networks.json").exists() else {}
        records[result["machine"]["processor"]] = result
        Console().print(record.write("networks", records))
    Console(width=200).print(tables_of(result), markup=False)


class Entry(NamedTuple):
    """A call to time: an opponent or ours, the sparsity of its weights if that matters, and what its scores may be."""

    peer: Peer
    sparsity: float | None
    expected: Bounded


def measured(architecture: Architecture, threads: Sequence[int], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time one network, and yield a case per batch size and number of threads; none if its package is absent."""
    try:
        model = made(architecture)
    except ImportError as error:
        yield {"network": architecture.name, "contestants": {}, "absent": {architecture.name: str(error)}}
        return
    models = {(kind, s): pruned(model, s, GRANULARITY[kind]) for kind, s in product(KINDS, SPARSITIES)}
    frozen = {key: freeze(one, trace=True) for key, one in models.items()}
    for batch in architecture.batches:
        inputs, seen = _inputs(architecture, batch)
        expected = {key: references(one, inputs, seen) for key, one in models.items()}
        ours = [entry for key in models for entry in _ours(frozen[key], *key, inputs, seen, expected[key])]
        with ExitStack() as files:
            folders = {s: Path(files.enter_context(TemporaryDirectory())) for s in SPARSITIES}
            for n in threads:
                torch.set_num_threads(n)
                with ExitStack() as stack:
                    entries, absent = list(ours), {}
                    for s in SPARSITIES:
                        case = NetworkCase(models["ours", s], inputs, seen, n, folders[s], stack)
                        found, missing = _opponents(case, s, expected["ours", s])
                        entries += found
                        absent |= missing
                    calls = _timed(entries, settings)
                where = {"network": architecture.name, "batch": batch, "threads": n}
                yield {**where, "contestants": calls, "absent": absent}


def pruned(model: nn.Module, sparsity: float, granularity: str) -> nn.Module:
    """Return a copy, each linear layer of at least 16 outputs pruned by magnitude, the pruned weights zero."""
    model = copy.deepcopy(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, layer in layers.items():
        if layer.out_features < LEAST_OUTPUTS:
            continue
        if granularity == "weight":  # what `prune_by_magnitude` does, without sorting 45 million weights
            flat = layer.weight.view(-1)
            least = round(sparsity * flat.numel())
            flat[torch.from_numpy(np.argpartition(flat.abs().numpy(), least)[:least])] = 0
            continue
        full = Mask.full({name: (layer.out_features, layer.in_features)})
        nnz = wanted_nnz(full, 1 - sparsity, "layer")
        layer.weight.mul_(prune_by_magnitude({name: layer.weight}, full, nnz, granularity)[name])
    return model


def to_int8(frozen: nn.Module, seen: Sequence[Inputs]) -> nn.Module:
    """Return a frozen model with every call of the engine in int8, calibrated on what enters it."""
    entered = [inputs_of(frozen, tuple(inputs)) for inputs in seen]
    memo: dict[int, Any] = {}
    for name, call in calls_of(frozen).items():
        xs = [rows_of(x) for of_inputs in entered for x in of_inputs.get(name, ())]
        if xs:
            memo[id(call)] = call.calibrated(torch.cat(xs)).to_precision("int8")
    int8: nn.Module = copy.deepcopy(frozen, memo)  # which shares the compressed weights
    return int8


def _inputs(architecture: Architecture, batch: int) -> tuple[Inputs, list[Inputs]]:
    """Return the inputs, and these with others of the same shapes, for ranges of int8 that nothing clips."""
    generator = torch.Generator().manual_seed(1)
    count = max(CALIBRATION_ROWS // (batch * architecture.tokens), 2)
    some = [architecture.inputs(batch, generator) for _ in range(count)]
    return some[0], some


def _ours(
    frozen: nn.Module, kind: str, sparsity: float, inputs: Inputs, seen: Sequence[Inputs], expected: dict[str, Bounded]
) -> Iterator[Entry]:
    """Yield the frozen network in fp32 and int8, checked."""
    for precision, model in (("fp32", frozen), ("int8", to_int8(frozen, seen))):
        run = partial(model, *inputs)
        peer = Peer(f"{kind} {sparsity:.0%} {precision}", precision, kind, run, first_rows(run))
        check(peer, expected[precision])
        yield Entry(peer, sparsity, expected[precision])


def _opponents(case: NetworkCase, sparsity: float, expected: dict[str, Bounded]) -> tuple[list[Entry], dict[str, str]]:
    makers = {name: maker for name, maker in MAKERS.items() if maker[1] == "sparse" or sparsity == max(SPARSITIES)}
    present, absent = gathered(makers, case, expected)
    entries = []
    for peer in present:
        own = None if peer.kind == "dense" else sparsity
        name = peer.name if own is None else f"{peer.name} {own:.0%}"
        entries.append(Entry(peer._replace(name=name), own, expected[peer.precision]))
    return entries, {name if makers[name][1] == "dense" else f"{name} {sparsity:.0%}": why for name, why in absent}


def _timed(entries: Sequence[Entry], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = timings([entry.peer for entry in entries], **settings)
    return {
        peer.name: {
            "precision": peer.precision,
            "kind": peer.kind,
            "sparsity": sparsity,
            "error": _error(peer, expected.value),
            **found[peer.name]._asdict(),
        }
        for peer, sparsity, expected in entries
    }


def _error(peer: Peer, value: Tensor) -> float:
    """Return the largest error of a score over the largest score."""
    with torch.inference_mode():
        return ((peer.scores() - value).abs().max() / value.abs().max()).item()


def at(case: dict[str, Any], sparsity: float) -> dict[str, Any]:
    """Return a case with what has this sparsity, and the dense opponents, which have none."""
    calls = case["contestants"]
    return {**case, "contestants": {n: c for n, c in calls.items() if c["sparsity"] in (None, sparsity)}}


def tables_of(result: dict[str, Any]) -> str:
    """Return the tables of a record as Markdown."""
    cases = [case for case in result["cases"] if case["contestants"]]
    return "\n\n".join(
        [
            _made(result),
            "Dense of the same precision over ours, which takes its precision or a finer one:",
            _ratios(cases),
            _losses(cases),
            f"{max(SPARSITIES):.0%}, each opponent's time over ours in the same precision, single weights / blocks:",
            _opponents_table(cases),
            _absent(result),
        ]
    )


def _made(result: dict[str, Any]) -> str:
    """Say what the networks' weights and the exported files are; records made before either changed lack it."""
    spread, opsets = result.get("spread"), result.get("opsets", {"every runtime": OLD_OPSET})
    weights = (
        f"rows and columns scaled by log-normal factors of sigma {spread}" if spread else "drawn alike for every row"
    )
    files = ", ".join(f"{opset} for {reader}" for reader, opset in opsets.items())
    return f"Weights are random, {weights}. Opset of the exported files: {files}."


def _absent(result: dict[str, Any]) -> str:
    """Name every opponent that a case lacks, and why; a record made before cases knew it has one list for all."""
    places: dict[tuple[str, str], list[str]] = {}
    for case in result["cases"]:
        for name, why in case.get("absent", {}).items():
            places.setdefault((name, why), []).append(" ".join(_place(case)))
    lines = [f"- {name}: {why}; in some case" for name, why in result.get("absent", {}).items()]
    for (name, why), found in places.items():
        where = "every case" if len(found) == len(result["cases"]) else ", ".join(found)
        lines.append(f"- {name}: {why}; in {where}")
    return "\n".join(["Absent, as network, batch, threads:", "", *lines]) if lines else "No opponent is absent."


def _ratios(cases: Sequence[dict[str, Any]]) -> str:
    columns = list(product(("fp32", "int8"), KINDS, SPARSITIES))
    rows = []
    for case in cases:
        row = _place(case)
        for precision in ("fp32", "int8"):
            row.append(f"{best(case, 'dense', [precision])[1]:,.0f}" if has(case, "dense", precision) else "")
        row += [f"{ratio(at(case, s), p, kind):.1f}" if has(case, "dense", p) else "" for p, kind, s in columns]
        rows.append(row)
    words = {"ours": "single", "blocks": "blocks"}
    header = [*PLACE, "dense fp32, µs", "int8, µs", *(f"{words[kind]} {s:.0%}, {p}" for p, kind, s in columns)]
    return table(header, rows)


def _losses(cases: Sequence[dict[str, Any]]) -> str:
    """Name every cell in which fp32 is not clearly faster than the best dense fp32."""
    found = []
    for case, kind, s in product(cases, KINDS, SPARSITIES):
        if (gain := ratio(at(case, s), "fp32", kind)) < LOSS:
            found.append(f"{' '.join(_place(case))}, {KINDS[kind].lower()} {s:.0%}: {gain:.2f}")
    listed = "; ".join(found) if found else "none"
    return f"Not faster than the best dense fp32 (below {LOSS}), as network, batch, threads: {listed}."


def _opponents_table(cases: Sequence[dict[str, Any]]) -> str:
    sparsity = max(SPARSITIES)
    rows = []
    for case in cases:
        calls = at(case, sparsity)["contestants"]
        row = _place(case)
        for name, (precision, kind, _) in MAKERS.items():
            call = calls.get(name if kind == "dense" else f"{name} {sparsity:.0%}")
            ours = [calls[f"{k} {sparsity:.0%} {precision}"]["median_us"] for k in KINDS]
            row.append(" / ".join(f"{call['median_us'] / us:.1f}" for us in ours) if call else "")
        rows.append(row)
    return table([*PLACE, *MAKERS], rows)


def _place(case: dict[str, Any]) -> list[str]:
    return [str(case[part]) for part in PLACE if part in case]  # a network that is absent has only its name


def _line(case: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {c['median_us']:,.0f} ({c['error']:.0e})" for name, c in case["contestants"].items())
    return f"{' '.join(map(str, (case['network'], case.get('batch'), case.get('threads'))))}: {times or case['absent']}"
