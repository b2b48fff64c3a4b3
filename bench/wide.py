"""One wide layer: the engine against dense engines, and against DeepSparse, and how long it takes to get it ready.

The widths are those of transformers' feed-forward layers. As in `bench/cpu.py` all calls of a case run in interleaved
rounds, after each passed the gate of its precision.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from rich.console import Console

from bench import record
from bench.cpu import KINDS, both_masks, engines, has, is_sparse_peer, layers_of, masked_mlp, ratio
from bench.peers import NAMES, peers, timings
from lt4rec_sparse import MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.recsys.tables import table
from lt4rec_sparse.stopwatch import interleaved, one_thread

SHAPES = ((768, 3072), (4096, 4096), (4096, 11008))  # in_features, out_features
BATCHES = (1, 16, 128)
SPARSITIES = (0.8, 0.9)
WITH_DEEPSPARSE = (768, 3072)
SETTINGS: dict[str, Any] = {"rounds": 9}


def run(is_short: bool = False) -> None:
    """Measure all cases and write `results/wide.json`, beside the records of other processors."""
    if is_short:
        print(table_of({"cases": [measured((64, 32), 2, 0.9, {"rounds": 1, "round_us": 1.0})]}))
        return
    machine = record.machine()
    cases = []
    with one_thread():
        for shape, batch, sparsity in product(SHAPES, BATCHES, SPARSITIES):
            cases.append(measured(shape, batch, sparsity, SETTINGS))
            Console().print(table_of({"cases": cases[-1:]}))
    records = record.read("wide") if (record.RESULTS / "wide.json").exists() else {}
    records[machine["processor"]] = {"machine": machine, "engine": cpu.isa(), "cases": cases}
    record.write("wide", records)


def measured(shape: tuple[int, int], batch: int, sparsity: float, settings: dict[str, Any]) -> dict[str, Any]:
    """Time one layer of `shape`, in_features and out_features, with a ReLU and a head of one output, on one thread."""
    x = torch.randn(batch, shape[0], generator=torch.Generator().manual_seed(0))
    mlps = {kind: masked_mlp({"task": mask}, 0) for kind, mask in both_masks(sparsity, 0, shape).items()}
    ours = [peer for kind, mlp in mlps.items() for peer in engines(mlp, x, kind)]
    ready = {kind: _ready(mlp, batch) for kind, mlp in mlps.items()}
    names = [n for n in NAMES if not is_sparse_peer(n) or ("deepsparse" in n and shape == WITH_DEEPSPARSE)]
    with peers(layers_of(mlps["ours"]), x, 1, names) as (present, absent):
        found = timings([*ours, *present], **settings)
    return {
        "shape": list(shape),
        "batch": batch,
        "sparsity": sparsity,
        "contestants": {
            peer.name: {"precision": peer.precision, "kind": peer.kind, **found[peer.name]._asdict()}
            for peer in (*ours, *present)
        },
        "absent": dict(absent),
        "ready": ready,
    }


def table_of(wide: dict[str, Any]) -> str:
    """Return the ratios of a record as Markdown: best dense of a precision over the engine in it or a finer one."""
    rows = []
    for case in wide["cases"]:
        us = {name: call["median_us"] for name, call in case["contestants"].items()}
        row = [" x ".join(map(str, case["shape"])), str(case["batch"]), f"{case['sparsity']:.0%}"]
        for precision, kind in product(("fp32", "int8"), KINDS):
            row.append(f"{ratio(case, precision, kind):.1f}" if has(case, "dense", precision) else "")
        row += [f"{us['deepsparse int8'] / us[f'{k} int8']:.2f}" if "deepsparse int8" in us else "" for k in KINDS]
        row += [f"{case['ready'][k]['compress_s']:.2f} + {case['ready'][k]['prepack_s']:.2f}" for k in KINDS]
        rows.append(row)
    header = ["in x out", "rows", "sparsity"]
    header += [f"{words}, {precision}" for precision, words in product(("fp32", "int8"), ("single", "blocks"))]
    header += [f"{words} over DeepSparse, int8" for words in ("single", "blocks")]
    header += [f"{words}: compress + prepack, s" for words in ("single", "blocks")]
    return table(header, rows)


def _ready(mlp: MaskedMLP, batch: int) -> dict[str, float]:
    """Return the seconds from masked weights to compressed ones, and from these to what the engine reads."""
    frozen = freeze(mlp)
    assert isinstance(frozen, SparseMLP)
    calls = {"compress_s": partial(freeze, mlp), "prepack_s": partial(cpu.prepack, frozen.network, "fp32", batch=batch)}
    return {name: timing.median_us / 1e6 for name, timing in interleaved(calls, rounds=3, round_us=1.0).items()}
