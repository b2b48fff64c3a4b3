"""The report of a run: tables and plots from its results, put into the template `run.md`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lt4rec_sparse.nn.quantization import TOLERANCE
from lt4rec_sparse.recsys.harness.rows import BASE
from lt4rec_sparse.recsys.metrics import MAIN_METRIC
from lt4rec_sparse.recsys.plots import plot_latency, plot_ownership, plot_tickets
from lt4rec_sparse.recsys.report.commands import steps
from lt4rec_sparse.recsys.report.page import render, worded, write_page
from lt4rec_sparse.recsys.report.results import Results, Run, path_of
from lt4rec_sparse.recsys.report.verdict import sentences
from lt4rec_sparse.recsys.report.warned import warned
from lt4rec_sparse.recsys.tables import (
    LEGEND,
    NOT_KNOWN,
    comparison_table,
    further_table,
    levels_table,
    reasons,
    table,
)


def write_report(results: Results, folder: Path) -> Path:
    """Write a run's `report.md`, `report.html` and `plots/` into its folder; return the path of `report.md`."""
    run, plots = Run(results), folder / "plots"
    plots.mkdir(exist_ok=True)
    if run.searched:
        plot_tickets(run.searched, run.tasks, plots / "tickets.png")
    plot_ownership(run.records, {run.served: run.titles[run.served]}, plots / "ownership.png")
    plot_latency(run.frozen, run.titles, plots / "latency.png")
    text = render("run.md", **_values(run, folder))
    return write_page(worded(text, run.data["counts"]), f"LT4REC, sparse: {run.data['name']}", folder)


def _values(run: Run, folder: Path) -> dict[str, Any]:
    """Return what the template says."""
    tasks, records, titles = run.tasks, run.records, run.titles
    shown = {row: f"**{title}**" if row == run.served else title for row, title in titles.items()}
    parts = [name for name in records[0]["test"] if name != "all"]
    rates = sorted({rate for of_row in run.results["learning_rates"].values() for rate in of_row.values()})
    return {
        "run": run,
        "served": titles[run.served],
        "verdict": sentences(run.results),
        "warnings": warned(run.results),
        "steps": steps(run, folder),
        "comparison": comparison_table(records, shown, BASE, tasks, left_out=run.left_out),
        "reasons": reasons(run.left_out),
        "legend": LEGEND,
        "truth": [f"{key} {value:.4f}" for key, value in run.data.get("truth", {}).items() if isinstance(value, float)],
        "slices": {part: comparison_table(records, shown, BASE, tasks, part) for part in parts},
        "further": further_table(records, shown, tasks),
        "levels": levels_table(run.searched, tasks) if run.searched else "",
        "ownership": _ownership(run),
        "recovery": _recovery(run),
        "difference": _difference(run),
        "tolerance": TOLERANCE,
        "precisions": {titles[row]: _precisions(run, row) for row in run.frozen},
        "sizes": {titles[row]: _ratios(run, row) for row in run.frozen},
        "bytes": _bytes(run),
        "timed": run.frozen[run.served],
        "latency": {titles[row]: _latency(run, row) for row in run.frozen},
        "noise": _noise(run),
        "rates": [f"{rate:g}" for rate in rates],
        "splits": _splits(run),
        "has_binary": "binary" in tasks.values(),
    }


def _splits(run: Run) -> str:
    header = ["split", "days", "impressions"]
    header += [part for task in run.tasks for part in (f"{task} rows", "mean label")]
    lines = []
    for split in ("train", "validation", "test"):
        counts = run.data["counts"][split]
        days = counts["days"]
        span = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else NOT_KNOWN
        line = [split, span, f"{counts['rows']:,}"]
        for task in run.tasks:
            line += [f"{counts['tasks'][task]['rows']:,}", f"{counts['tasks'][task]['label_mean']:.3f}"]
        lines.append(line)
    return table(header, lines)


def _noise(run: Run) -> dict[str, float]:
    """Return how far repeated timings of one call spread, `(p80 - p20) / median`: the median call, and the worst."""
    spreads = [(t["p80_us"] - t["p20_us"]) / t["median_us"] for row in run.frozen.values() for t in row["latency"]]
    return {"median": float(np.median(spreads)), "worst": max(spreads)}


def _ownership(run: Run) -> str:
    (layers, *_) = (record["masks"]["ownership"] for record in run.records if record["row"] == run.served)
    overlaps = run.frozen[run.served]["overlap"]
    owners = list(next(iter(layers.values())))
    header = ["layer", "weights", *owners, *(f"overlap {pair}" for pair in overlaps)]
    lines = []
    for name, counts in layers.items():
        total = sum(counts.values())
        shares = [f"{counts[owner] / total:.1%}" for owner in owners]
        lines.append([name, f"{total:,}", *shares, *(f"{pair[name]:.2f}" for pair in overlaps.values())])
    return table(header, lines)


def _recovery(run: Run) -> str:
    lines = [
        [run.titles[row], task, f"{found['planted'][task]:.1%}", f"{found['other'][task]:.1%}", f"{auc:.3f}"]
        for row, found in run.results["recovery"].items()
        for task, auc in found["auc"].items()
    ]
    return table(["masks", "task", "kept: planted for the task", "kept: others", "AUC"], lines) if lines else ""


def _difference(run: Run) -> str:
    lines = [
        [run.titles[row], *(f"{value:.1e}" for value in frozen["largest_difference"].values())]
        for row, frozen in run.frozen.items()
    ]
    return table(["model", *run.tasks], lines)


def _precisions(run: Run, row: str) -> str:
    header = ["precision"]
    for task, kind in run.tasks.items():
        header += [f"{task} {MAIN_METRIC[kind].upper()}", "against fp32"]
    us, precisions, lines = run.us(row), run.frozen[row]["precisions"], []
    for precision, judged in precisions.items():
        line = [precision]
        for task, kind in run.tasks.items():
            value, fp32 = (x["test"][task][MAIN_METRIC[kind]] for x in (judged, precisions["fp32"]))
            relative = MAIN_METRIC[kind] == "mse"
            line += [f"{value:.5f}", f"{value / fp32 - 1:+.3%}" if relative else f"{value - fp32:+.5f}"]
        line += [f"{max(judged['largest_difference'].values()):.1e}"]
        line += [f"{at_size[path_of(precision)]:.0f}" for at_size in us.values()]
        lines.append([*line, f"{judged['prepacked_bytes']:,}", "yes" if judged["accepted"] else "no"])
    columns = [*header, "largest difference of a score", *(f"µs at {size}" for size in us), "bytes", "accepted"]
    return table(columns, lines)


def _ratios(run: Run, row: str) -> dict[str, float]:
    """Return how much smaller the artefact and its MLP are than dense ones, and the artefact's share of embeddings."""
    sizes = run.frozen[row]["bytes"]
    dense = sizes["dense, one model per task: embeddings"] + sizes["dense, one model per task: MLPs"]
    return {
        "artefact": dense / sizes["artefact on disk"],
        "mlp": sizes["dense, one model per task: MLPs"] / sizes["sparse sharing: MLP, canonical"],
        "embeddings": sizes["embeddings"] / sizes["artefact on disk"],
    }


def _bytes(run: Run) -> str:
    names = run.frozen[run.served]["bytes"]
    lines = [[name, *(f"{model['bytes'][name]:,}" for model in run.frozen.values())] for name in names]
    return table(["bytes", *(run.titles[row] for row in run.frozen)], lines)


def _latency(run: Run, row: str) -> str:
    header = ["candidates", "sparse, µs", "dense, µs", "ratio", "MLP: sparse, µs", "MLP: dense, µs", "ratio"]
    lines = []
    for size, us in run.us(row).items():
        line = [str(size)]
        for sparse, dense in (("sparse", "dense"), ("sparse, MLP alone", "dense, MLP alone")):
            line += [f"{us[sparse]:.0f}", f"{us[dense]:.0f}", f"{us[dense] / us[sparse]:.2f}"]
        lines.append(line)
    return table(header, lines)
