"""The report that a ranking engineer reads: verdict, next steps, tables and plots, as Markdown and one HTML file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from lt4rec_sparse.files import write_whole
from lt4rec_sparse.nn.quantization import TOLERANCE
from lt4rec_sparse.recsys.harness.rows import BASE, HARD, SMALL
from lt4rec_sparse.recsys.harness.statistics import paired_difference, summary
from lt4rec_sparse.recsys.metrics import HIGHER_IS_BETTER, MAIN_METRIC
from lt4rec_sparse.recsys.plots import plot_latency, plot_ownership, plot_tickets
from lt4rec_sparse.recsys.tables import (
    LEGEND,
    comparison_table,
    count,
    further_table,
    levels_table,
    table,
    values_of,
)

MISCALIBRATED = 0.1  # how far predicted over observed may be from 1 without a warning
FEW_STEPS = 100  # of the optimiser per task; with fewer, scores are hardly better than a constant

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0; }
table { font-variant-numeric: tabular-nums; }
td:not(:first-child) { white-space: nowrap; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
th { border-bottom: 2px solid #888; }
img { max-width: 100%; }
h2 { margin-top: 2.2rem; }
code { background: #f4f4f4; padding: 0 .2rem; }
"""

Results = Mapping[str, Any]
"""The contents of `results.json`."""


def write_page(text: str, title: str, folder: Path) -> Path:
    """Write Markdown as `report.md`, and as `report.html` with its pictures, `plots/<name>.png`, embedded."""

    def embedded(match: re.Match[str]) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    write_whole(folder / "report.md", text)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    head = "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
    page = f"{head}<title>{html.escape(title)}</title><style>{STYLE}</style>{body}"
    write_whole(folder / "report.html", re.sub(r'src="(plots/\w+\.png)"', embedded, page))
    return folder / "report.md"


def write_report(results: Results, folder: Path) -> Path:
    """Write a run's `report.md`, `report.html` and `plots/` into its folder; return the path of `report.md`."""
    plots, served = folder / "plots", _served(results)
    plots.mkdir(exist_ok=True)
    titles, tasks = results["rows"], results["data"]["tasks"]
    searched = _searched(results)
    if searched:
        plot_tickets(searched, tasks, plots / "tickets.png")
    plot_ownership(results["records"], {served: titles[served]}, plots / "ownership.png")
    plot_latency(results["frozen"], titles, plots / "latency.png")
    text = "\n\n".join(section for section in _sections(results) if section) + "\n"
    return write_page(text, f"LT4REC, sparse: {results['data']['name']}", folder)


def verdict(results: Results) -> str:
    """Return in one sentence which model is served and why, and how it compares on the test days."""
    rows, served = results["rows"], _served(results)
    chosen = [row for row in rows if any(record["row"] == row and record["masks"] for record in results["records"])]
    why = {"random": "the masks that were asked for", "tickets": "the tickets that were asked for"}.get(
        results["config"]["masks"], f"the best of {count(len(chosen), 'masked model')} on the validation days"
    )
    text = (
        f"Serve {rows[served]} ({results['files'][served]}), {why}: on the test days it is {_against(results, BASE)} "
        f"than single-task models and {_against(results, HARD + SMALL)} than a dense network with as many weights"
    )
    found = _found(results)
    return f"{text}; {found}." if found else f"{text}."


def _against(results: Results, base: str) -> str:
    """Return how the served row compares with another, task by task, such as "better at ctr (AUC +0.0021)"."""
    parts = []
    for task, kind in results["data"]["tasks"].items():
        metric = MAIN_METRIC[kind]
        mine, others = (values_of(results["records"], row, task, metric) for row in (_served(results), base))
        difference = paired_difference(mine, others, metric == "mse")
        word = "no better" if difference.mean == 0 else "better" if _is_gain(difference.mean, metric) else "worse"
        parts.append(f"{word} at {task} ({metric.upper()} {difference})")
    return ", ".join(parts)


def _is_gain(difference: float, metric: str) -> bool:
    return (difference > 0) == HIGHER_IS_BETTER[metric]


def _mean(results: Results, row: str, task: str, metric: str) -> float:
    """Return a row's metric of a task on the test days, over the seeds."""
    return summary(list(values_of(results["records"], row, task, metric).values())).mean


def _found(results: Results) -> str:
    """Return in words how much of a planted truth the served model and its masks found; empty without one."""
    truth, parts = results["data"].get("truth", {}), []
    for task, kind in results["data"]["tasks"].items():
        metric = MAIN_METRIC[kind]
        if (key := f"{task}_{metric}") in truth:
            constant, best = truth["constant"][key], truth[key]
            value = _mean(results, _served(results), task, metric)
            parts.append(f"{(value - constant) / (best - constant):.0%} ({task})")
    text = f"it reaches {', '.join(parts)} of what the planted truth allows over a constant" if parts else ""
    masks = results["recovery"].get(_served(results))
    if masks:
        kept = (
            f"{masks['planted'][task]:.0%} of the inputs planted for {task}, {masks['other'][task]:.0%} of the others"
            for task in masks["planted"]
        )
        text += f"{', and ' if text else ''}its masks keep {'; '.join(kept)}"
    return text


def _served(results: Results) -> str:
    """Return the row that `model.safetensors` holds: the first one frozen."""
    row: str = next(iter(results["frozen"]))
    return row


def _searched(results: Results) -> list[dict[str, Any]]:
    """Return the records of the row whose tickets the report shows, one per seed; none without a search."""
    records = [record for record in results["records"] if record["tickets"]]
    return [record for record in records if record["row"] == records[0]["row"]]


def _sections(results: Results) -> list[str]:
    tasks, records, titles = results["data"]["tasks"], results["records"], results["rows"]
    shown = {row: f"**{title}**" if row == _served(results) else title for row, title in titles.items()}
    parts = [name for name in records[0]["test"] if name != "all"]
    return [
        f"# LT4REC, sparse: {results['data']['name']}",
        f"**{verdict(results)}**",
        f"## What to do next\n\n{_next(results)}",
        _warnings(results),
        f"## How it was made\n\n{_made(results)}",
        f"## Accuracy on the test days\n\n{comparison_table(records, shown, BASE, tasks)}",
        _truth(results),
        LEGEND,
        *(f"The slice `{part}`:\n\n{comparison_table(records, shown, BASE, tasks, part)}" for part in parts),
        "Every other metric, and the cost of each model. Calibration is predicted over observed; 1 is ideal.",
        further_table(records, shown, tasks),
        *_tickets(results),
        f"## Who owns which weights\n\n{_ownership(results)}",
        "![Shares of shared, private and dead weights in each layer](plots/ownership.png)",
        _recovery(results),
        f"## Is the served model the trained one?\n\n{_difference(results)}",
        f"## Precision\n\n{_precision(results)}",
        f"## Bytes\n\n{_bytes(results)}",
        f"## Time of a request\n\n{_latency(results)}",
        "![Time of a request against its candidates](plots/latency.png)",
    ]


def _next(results: Results) -> str:
    """Return a list of what the results suggest."""
    config, served, tasks = results["config"], _served(results), results["data"]["tasks"]
    lines = ["- Score candidates: `lt4rec-sparse score model.safetensors CANDIDATES SCORES`."]
    narrow = {
        task: _is_gain(
            _mean(results, HARD + SMALL, task, MAIN_METRIC[kind]) - _mean(results, served, task, MAIN_METRIC[kind]),
            MAIN_METRIC[kind],
        )
        for task, kind in tasks.items()
    }
    if all(narrow.values()):
        lines.append("- The narrow dense network is better at every task and simpler to serve: consider it instead.")
    if config["seeds"] == 1:
        lines.append("- One seed cannot tell a difference from noise: `--seeds 3` adds two to this run.")
    if len(config["learning_rates"]) == 1:
        lines.append(
            "- Learning rates were not searched: `--learning-rate 0.0005,0.001,0.002` chooses among these for every "
            "model and task, on the validation days."
        )
    frozen = results["frozen"][served]
    us = _medians(frozen)
    size = max(size for size in us if size <= 256)
    mine = {p: us[size][_path(p)] for p, x in frozen["precisions"].items() if p == "fp32" or x["accepted"]}
    best = min(mine, key=lambda precision: mine[precision])
    ratio = us[size]["dense, MLP alone"] / mine[best]
    lines.append(
        f"- Serve in {best} (`--precision {best}`): of the accepted precisions it is the fastest here at "
        f"{count(size, 'candidate')}, the MLPs {ratio:.1f}x as fast as dense fp32 torch."
        + (" **Dense torch is faster here**: let `lt4rec-sparse plan` choose the kernels." if ratio < 1 else "")
    )
    lines.append("- To see which property of a mask matters: `lt4rec-sparse experiment tickets --data FOLDER`.")
    return "\n".join(lines)


def _warnings(results: Results) -> str:
    lines = []
    for task in results["data"]["tasks"]:
        ratio = _mean(results, _served(results), task, "calibration")
        if not abs(ratio - 1) <= MISCALIBRATED:
            lines.append(
                f"- **{task} is miscalibrated**: the served model predicts {ratio:.2f} times what the test days show. "
                "The order by this score is unaffected; recalibrate it before multiplying it with anything else."
            )
    if results["steps"] < FEW_STEPS:
        lines.append(
            f"- **Few steps**: every model took {results['steps']} per task. With fewer than about {FEW_STEPS} it is "
            "hardly trained: use smaller batches (`--batch-size`) or more epochs (`--epochs`)."
        )
    return "## Warnings\n\n" + "\n".join(lines) if lines else ""


def _made(results: Results) -> str:
    data, config, machine = results["data"], results["config"], results["machine"]
    hidden = "-".join(str(width) for width in config["hidden"])
    pruned = "" if config["granularity"] == "weight" else f", by {config['granularity']}"
    masks = f"{config['rounds']} rounds of pruning to" if _searched(results) else "random masks that keep"
    rates = sorted({rate for of_row in results["learning_rates"].values() for rate in of_row.values()})
    text = (
        f"{data['counts']['rows_read']:,} impressions, of which {data['counts']['duplicates']:,} duplicates were "
        f"dropped. {len(data['fields'])} input fields, {config['embedding_dim']} wide; MLP {hidden}; "
        f"{count(config['epochs'], 'epoch')} of batches of {config['batch_size']} for every model; learning rates "
        f"{', '.join(f'{rate:g}' for rate in rates)}; matrix products in {config['dtype']} while training; {masks} "
        f"{config['density']:.0%} of the hidden weights{pruned}; {count(config['seeds'], 'seed')}."
    )
    where = (
        f"`{results['command']}`, {results['seconds']:.0f} s on {count(machine['cores'], 'core')} "
        f"({machine['architecture']}, {machine['torch_capability']}, engine: {machine['engine']}); lt4rec-sparse "
        f"{machine['lt4rec_sparse']}, torch {machine['torch']}, Python {machine['python']}."
    )
    header = ["split", "days", "impressions"]
    header += [part for task in data["tasks"] for part in (f"{task} rows", "mean label")]
    lines = []
    for split in ("train", "validation", "test"):
        counts = data["counts"][split]
        days = counts["days"]
        line = [split, days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}", f"{counts['rows']:,}"]
        for task in data["tasks"]:
            line += [f"{counts['tasks'][task]['rows']:,}", f"{counts['tasks'][task]['label_mean']:.3f}"]
        lines.append(line)
    return f"{where}\n\n{text}\n\n{table(header, lines)}"


def _truth(results: Results) -> str:
    truth = results["data"].get("truth", {})
    parts = ", ".join(f"{key} {value:.4f}" for key, value in truth.items() if isinstance(value, float))
    return f"The best values that the planted truth allows on these days: {parts}." if parts else ""


def _tickets(results: Results) -> list[str]:
    searched = _searched(results)
    if not searched:
        return []
    text = "On the validation days, each level trained alone from the saved start (Algorithm 1; Figure 4 of the paper)."
    return [
        f"## Tickets: how far can each task be pruned?\n\n{text} Circled: the level chosen.",
        levels_table(searched, results["data"]["tasks"]),
        "![Validation metric of each task against the weights that remain](plots/tickets.png)",
    ]


def _ownership(results: Results) -> str:
    served = _served(results)
    (layers, *_) = (record["masks"]["ownership"] for record in results["records"] if record["row"] == served)
    overlaps = results["frozen"][served]["overlap"]
    owners = list(next(iter(layers.values())))
    header = ["layer", "weights", *owners, *(f"overlap {pair}" for pair in overlaps)]
    lines = []
    for name, counts in layers.items():
        total = sum(counts.values())
        shares = [f"{counts[owner] / total:.1%}" for owner in owners]
        lines.append([name, f"{total:,}", *shares, *(f"{pair[name]:.2f}" for pair in overlaps.values())])
    text = f"{results['rows'][served]}, seed 0. Overlap is intersection over union of the masks."
    return f"{text}\n\n{table(header, lines)}"


def _recovery(results: Results) -> str:
    lines = [
        [results["rows"][row], task, f"{found['planted'][task]:.1%}", f"{found['other'][task]:.1%}", f"{auc:.3f}"]
        for row, found in results["recovery"].items()
        for task, auc in found["auc"].items()
    ]
    text = (
        "In the simulated log it is known which fields matter for which task. First layer, seed 0: the share of the "
        "weights that the masks keep on inputs planted for a task, and on all others; and how well the number of "
        "weights that an input keeps tells the two apart (AUC, 0.5 by chance)."
    )
    header = ["masks", "task", "kept: planted for the task", "kept: others", "AUC"]
    return f"## Found and planted\n\n{text}\n\n{table(header, lines)}" if lines else ""


def _difference(results: Results) -> str:
    lines = [
        [results["rows"][row], *(f"{value:.1e}" for value in frozen["largest_difference"].values())]
        for row, frozen in results["frozen"].items()
    ]
    text = (
        "Largest difference between the probability that the loaded artefact serves and that of the trained, masked "
        "model in torch, over all rows of the test days."
    )
    return f"{text}\n\n{table(['model', *results['data']['tasks']], lines)}"


def _precision(results: Results) -> str:
    tasks = results["data"]["tasks"]
    text = (
        "On the test days: scores as served, and the time of the MLP alone in microseconds per request. int8 is "
        "calibrated on training rows. A precision is accepted if on the validation days it loses at most "
        f"{TOLERANCE['auc']} of AUC against fp32 and raises the MSE by {TOLERANCE['mse']:.1%} at most."
    )
    header = ["precision"]
    for task, kind in tasks.items():
        header += [f"{task} {MAIN_METRIC[kind].upper()}", "against fp32"]
    parts = [text]
    for row, frozen in results["frozen"].items():
        us = _medians(frozen)
        lines = []
        for precision, judged in frozen["precisions"].items():
            line = [precision]
            for task, kind in tasks.items():
                value, fp32 = (x["test"][task][MAIN_METRIC[kind]] for x in (judged, frozen["precisions"]["fp32"]))
                relative = MAIN_METRIC[kind] == "mse"
                line += [f"{value:.5f}", f"{value / fp32 - 1:+.3%}" if relative else f"{value - fp32:+.5f}"]
            line += [f"{max(judged['largest_difference'].values()):.1e}"]
            line += [f"{at_size[_path(precision)]:.0f}" for at_size in us.values()]
            lines.append([*line, f"{judged['prepacked_bytes']:,}", "yes" if judged["accepted"] else "no"])
        columns = [*header, "largest difference of a score", *(f"µs at {size}" for size in us), "bytes", "accepted"]
        parts.append(f"{results['rows'][row]}:\n\n{table(columns, lines)}")
    return "\n\n".join(parts)


def _bytes(results: Results) -> str:
    models = results["frozen"]
    names = next(iter(models.values()))["bytes"]
    lines = [[name, *(f"{model['bytes'][name]:,}" for model in models.values())] for name in names]
    facts = []
    for row, model in models.items():
        sizes = model["bytes"]
        dense = sizes["dense, one model per task: embeddings"] + sizes["dense, one model per task: MLPs"]
        mlp = sizes["dense, one model per task: MLPs"] / sizes["sparse sharing: MLP, canonical"]
        facts.append(
            f"- {results['rows'][row]}: the artefact is {dense / sizes['artefact on disk']:.1f}x smaller on disk than "
            f"one dense fp32 model per task, its MLP {mlp:.1f}x; {sizes['embeddings'] / sizes['artefact on disk']:.0%} "
            "of it are embeddings."
        )
    return "\n".join(facts) + f"\n\n{table(['bytes', *(results['rows'][row] for row in models)], lines)}"


def _latency(results: Results) -> str:
    frozen = next(iter(results["frozen"].values()))
    text = (
        f"All tasks, fp32, {count(frozen['threads'], 'thread')}, engine: {frozen['engine']}; interleaved, medians. "
        "Dense is torch with the masks multiplied in beforehand; both read encoded ids and embed them in the same "
        "way. A ratio above 1 means that sparse is faster."
    )
    header = ["candidates", "sparse, µs", "dense, µs", "ratio", "MLP: sparse, µs", "MLP: dense, µs", "ratio"]
    parts = [text]
    for row, of_row in results["frozen"].items():
        lines = []
        for size, us in _medians(of_row).items():
            line = [str(size)]
            for sparse, dense in (("sparse", "dense"), ("sparse, MLP alone", "dense, MLP alone")):
                line += [f"{us[sparse]:.0f}", f"{us[dense]:.0f}", f"{us[dense] / us[sparse]:.2f}"]
            lines.append(line)
        parts.append(f"{results['rows'][row]}:\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def _medians(frozen: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """Return candidates -> path -> median microseconds."""
    us: dict[int, dict[str, float]] = {}
    for timed in frozen["latency"]:
        us.setdefault(timed["candidates"], {})[timed["path"]] = timed["median_us"]
    return us


def _path(precision: str) -> str:
    """Return what `freeze_and_compare` calls the sparse MLP of a precision."""
    return "sparse, MLP alone" if precision == "fp32" else f"sparse {precision}, MLP alone"
