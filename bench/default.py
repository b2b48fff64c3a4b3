"""The default of a frozen module against dense torch, from hardly pruned networks on, and what it chose from.

Dense is the faster of torch's `F.linear` and weights packed by oneDNN, fp32, the masks multiplied in beforehand. All
calls of a number of tasks and a batch size run in one interleaved run, on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from bench import record
from bench.cpu import IN_FEATURES, masked_mlp, uniform_mask
from lt4rec_sparse import SparseMLP, freeze
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.nn.dense import dense_kernels, packed_product
from lt4rec_sparse.recsys.frozen import dense_pass
from lt4rec_sparse.recsys.tables import table
from lt4rec_sparse.stopwatch import interleaved, one_thread

TASKS = (1, 2)
BATCHES = (1, 2, 4, 8, 16, 64, 256, 1024)
SPARSITIES = (0.05, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9)
DENSE = "dense"
TABLES_TO = 16  # rows; of more, tables of float32 take several times as long as slices on every machine


def run(is_short: bool = False) -> None:
    """Measure and write `results/default.json`, beside the records of other processors."""
    with one_thread(), torch.inference_mode():
        if is_short:
            print(table_of({"cases": measured(2, 8, (0.2, 0.9), rounds=1, round_us=1.0)}))
            return
        cases = [case for t, b in product(TASKS, BATCHES) for case in measured(t, b, SPARSITIES, rounds=9)]
    machine = record.machine()
    records = record.read("default") if (record.RESULTS / "default.json").exists() else {}
    records[machine["processor"]] = {"machine": machine, "engine": cpu.isa(), "cases": cases}
    record.write("default", records)
    print(table_of(records[machine["processor"]]))


def measured(tasks: int, batch: int, sparsities: tuple[float, ...], **settings: Any) -> list[dict[str, Any]]:
    """Return one case per sparsity: medians in microseconds of dense torch, of each layout and of the default."""
    x = torch.randn(batch, IN_FEATURES, generator=torch.Generator().manual_seed(0))
    out = torch.empty(batch, tasks)
    calls: dict[tuple[float, str], Callable[[], object]] = {}
    cases = []
    for sparsity in sparsities:
        mlp = masked_mlp({f"task{t}": uniform_mask(sparsity, t) for t in range(tasks)}, 0)
        if not calls:
            ways = [dense_pass(mlp)] + [dense_pass(mlp, packed_product)] * ("onednn" in dense_kernels("fp32"))
            calls = {(i, DENSE): partial(way, x) for i, way in enumerate(ways)}
        frozen = freeze(mlp, sigmoid=True)
        assert isinstance(frozen, SparseMLP)
        chosen = cpu.Prepacked(cpu.prepack(frozen.network, batch=batch))
        calls[sparsity, "default"] = partial(frozen.score_into, x, out)
        for layout in cpu.UNSTRUCTURED:
            if layout == "tables" and batch > TABLES_TO:
                continue
            prepacked = cpu.Prepacked(cpu.prepack(frozen.network, "fp32", (layout,)))
            calls[sparsity, layout] = partial(prepacked.run, x, out)
        cases.append({"tasks": tasks, "batch": batch, "sparsity": sparsity, "layout": chosen.facts.layouts[0]})
    us = {name: timing.median_us for name, timing in interleaved(calls, **settings).items()}
    dense = min(time for (_, name), time in us.items() if name == DENSE)
    for case in cases:
        ours = {name: time for (sparsity, name), time in us.items() if sparsity == case["sparsity"] and name != DENSE}
        case["median_us"] = {DENSE: dense, **ours}
    return cases


def table_of(measured: dict[str, Any]) -> str:
    """Return how many times faster than dense the default is, and how far its layouts are from the fastest ones."""
    cases = measured["cases"]
    batches = sorted({case["batch"] for case in cases})
    rows = []
    for tasks, sparsity in sorted({(case["tasks"], case["sparsity"]) for case in cases}):
        at = {c["batch"]: c["median_us"] for c in cases if (c["tasks"], c["sparsity"]) == (tasks, sparsity)}
        rows.append([str(tasks), f"{sparsity:.0%}", *(f"{at[b][DENSE] / at[b]['default']:.2f}" for b in batches)])
    slower = {_excess(case): case for case in cases}
    worst = slower[max(slower)]
    note = (
        f"The chosen layout takes at most {max(slower):.2f} times as long as the fastest one ({worst['layout']}, "
        f"{worst['batch']} rows, {worst['sparsity']:.0%}, {worst['tasks']} tasks)."
    )
    return f"{table(['tasks', 'sparsity', *(f'batch {batch}' for batch in batches)], rows)}\n\n{note}"


def _excess(case: dict[str, Any]) -> float:
    us = case["median_us"]
    return float(us[case["layout"]] / min(us[layout] for layout in cpu.UNSTRUCTURED if layout in us))
