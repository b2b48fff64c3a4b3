"""The report that a ranking engineer reads: tables and plots from `results.json`, as Markdown and as one HTML file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt

from lt4rec_sparse.files import write_whole
from lt4rec_sparse.nn.quantization import TOLERANCE
from lt4rec_sparse.recsys import plots
from lt4rec_sparse.recsys.harness.arms import MAIN_METRIC, SINGLE, TITLES

PLOTS = {"tickets": plots.plot_tickets, "ownership": plots.plot_ownership, "latency": plots.plot_latency}
SEARCHED = "tickets"  # the plot that there is only where tickets were searched

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


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Write `report.md`, `report.html` and `plots/` into a run folder.

    Args:
        results: The contents of `results.json`.
        folder: The run folder.

    Returns:
        The path of `report.md`. `report.html` holds its pictures within it.
    """
    (folder / "plots").mkdir(exist_ok=True)
    for name, plot in PLOTS.items():
        if name == SEARCHED and not _is_searched(results):
            continue
        plot(results, folder / "plots" / f"{name}.png")
    text = "\n\n".join(section for section in _sections(results) if section) + "\n"
    return write_page(text, f"LT4REC, sparse: {results['data']['name']}", folder)


def write_page(text: str, title: str, folder: Path) -> Path:
    """Write Markdown as `report.md`, and as `report.html` with its pictures within it.

    Args:
        text: With pictures as `plots/<name>.png`, which stand in the folder.
        title: Of the HTML page.
        folder: Where both go.

    Returns:
        The path of `report.md`.
    """
    write_whole(folder / "report.md", text)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>{body}"
    write_whole(folder / "report.html", re.sub(r'src="(plots/\w+\.png)"', lambda m: _inline(folder / m[1]), page))
    return folder / "report.md"


def _sections(results: dict[str, Any]) -> list[str]:
    return [
        _head(results),
        "## Accuracy on the test days",
        *(_accuracy(results, name) for name in results["seeds"][0]["test"][SINGLE]),
        _verdict(results),
        _further(results),
        *_tickets(results),
        "## Who owns which weights",
        _ownership(results),
        "![Shares of shared, private and dead weights in each layer](plots/ownership.png)",
        "## Is the served model the trained one?",
        _served(results),
        precision_section(results),
        "## Bytes",
        _bytes(results),
        "## Time of a request",
        _latency(results),
        "![Time of a request against its candidates](plots/latency.png)",
        "## Where the time of this run went",
        _seconds(results),
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers as they are given."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _head(results: dict[str, Any]) -> str:
    data, config = results["data"], results["config"]
    hidden = "-".join(str(width) for width in config["hidden"])
    epochs = epochs_in_words(config["epochs"])
    granularity = config.get("granularity", "weight")  # which older runs do not have
    pruned = "" if granularity == "weight" else f", by {granularity}"
    masks = f"{config['rounds']} rounds of pruning to" if _is_searched(results) else "random masks that keep"
    text = (
        f"{data['counts']['rows_read']:,} impressions, {data['counts']['duplicates']:,} of them duplicates that were "
        f"dropped. {len(data['fields'])} input fields, {config['embedding_dim']} wide; MLP {hidden}; {epochs} of "
        f"batches of {config['batch_size']} for every model; {masks} {config['density']:.0%} of the hidden "
        f"weights{pruned}; {_seeds(results)}."
    )
    header = [
        "split",
        "days",
        "impressions",
        *(part for task in data["tasks"] for part in (f"{task} rows", "mean label")),
    ]
    rows = []
    for split in ("train", "validation", "test"):
        counts = data["counts"][split]
        days = counts["days"]
        row = [split, days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}", f"{counts['rows']:,}"]
        for task in data["tasks"]:
            row += [f"{counts['tasks'][task]['rows']:,}", f"{counts['tasks'][task]['label_mean']:.3f}"]
        rows.append(row)
    return f"# LT4REC, sparse: {data['name']}\n\n{text}\n\n{table(header, rows)}"


def epochs_in_words(epochs: int) -> str:
    """Return "one epoch", or "2 epochs"."""
    return "one epoch" if epochs == 1 else f"{epochs} epochs"


def _seeds(results: dict[str, Any]) -> str:
    n = len(results["seeds"])
    return (
        "one seed: differences of one run's noise mean nothing" if n == 1 else f"{n} seeds, mean ± standard deviation"
    )


def _accuracy(results: dict[str, Any], part: str) -> str:
    caption = "All rows of the test days" if part == "all" else f"The slice `{part}` of the test days"
    truth = _truth(results) if part == "all" else ""
    return f"{caption}.\n\n{accuracy_table(results, part)}{truth}"


def accuracy_table(results: dict[str, Any], part: str) -> str:
    """Return Table 2 as Markdown: each arm's main metric on the test days, and its difference to single-task.

    Args:
        results: The contents of `results.json`.
        part: "all" rows, or the name of a slice.
    """
    tasks = results["data"]["tasks"]
    header = ["model"]
    for task, kind in tasks.items():
        header += [f"{task} {MAIN_METRIC[kind].upper()}", "against single-task"]
    rows = []
    for arm in results["seeds"][0]["test"]:
        row = [f"**{TITLES[arm]}**" if arm == _served_arm(results) else TITLES[arm]]
        for task, kind in tasks.items():
            row += [_spread(_values(results, arm, part, task)), _against(results, arm, part, task, kind)]
        rows.append(row)
    return table(header, rows)


def _further(results: dict[str, Any]) -> str:
    """Every other metric, over all rows: how well scores rank within a user, and whether they can be taken at face."""
    arms = results["seeds"][0]["test"]
    columns = [
        (task, metric)
        for task, kind in results["data"]["tasks"].items()
        for metric in arms[SINGLE]["all"][task]
        if metric != MAIN_METRIC[kind]
    ]
    rows = []
    for arm in arms:
        values = ([seed["test"][arm]["all"][task][metric] for seed in results["seeds"]] for task, metric in columns)
        rows.append([TITLES[arm], *(f"{np.mean(value):.4f}" for value in values)])
    header = ["model", *(f"{task} {metric.replace('_', ' ')}" for task, metric in columns)]
    text = "Means over the seeds, all rows. Calibration is predicted over observed: 1 is right."
    return f"{text}\n\n{table(header, rows)}"


def _truth(results: dict[str, Any]) -> str:
    truth = results["data"].get("truth")
    if not truth:
        return ""
    parts = ", ".join(f"{key} {value:.4f}" for key, value in truth.items() if isinstance(value, float))
    return f"\n\nThe best that the planted truth allows on these days: {parts}." if parts else ""


def _values(results: dict[str, Any], arm: str, part: str, task: str) -> list[float]:
    metric = MAIN_METRIC[results["data"]["tasks"][task]]
    return [seed["test"][arm][part][task][metric] for seed in results["seeds"]]


def _spread(values: Sequence[float]) -> str:
    return f"{values[0]:.5f}" if len(values) == 1 else f"{np.mean(values):.5f} ± {np.std(values, ddof=1):.5f}"


def _against(results: dict[str, Any], arm: str, part: str, task: str, kind: str) -> str:
    if arm == SINGLE:
        return ""
    pairs = zip(_values(results, arm, part, task), _values(results, SINGLE, part, task), strict=True)
    relative = MAIN_METRIC[kind] == "mse"
    differences = [100 * (a - b) / b if relative else a - b for a, b in pairs]
    number = f"{np.mean(differences):+.2f}" if relative else f"{np.mean(differences):+.4f}"
    if len(differences) > 1:
        error = np.std(differences, ddof=1) / len(differences) ** 0.5
        number += f" ± {error:.2f}" if relative else f" ± {error:.4f}"
    return number + (" %" if relative else "")


def _verdict(results: dict[str, Any]) -> str:
    """Say in words where sparse sharing stands, its losses as plainly as its wins."""
    lines, served = [], _served_arm(results)
    if results["config"].get("masks") == "best":
        lines.append(f"Served is what was best on the validation days with seed 0: {TITLES[served]}.\n")
    for task, kind in results["data"]["tasks"].items():
        metric = MAIN_METRIC[kind]
        mean = {arm: float(np.mean(_values(results, arm, "all", task))) for arm in results["seeds"][0]["test"]}
        # A tie is no loss: where the best ticket is the last one, two arms are the same model.
        losses = [arm for arm in mean if (mean[arm] > mean[served] if metric == "auc" else mean[arm] < mean[served])]
        against = f" It loses to {'; '.join(TITLES[arm] for arm in losses)}." if losses else " It loses to none."
        standing = f"{len(losses) + 1} of {len(mean)} by {metric.upper()}"
        lines.append(f"- **{task}**: {TITLES[served]} is {standing}.{against}")
    if len(results["seeds"]) > 1:
        note = "\n\nDifferences are paired over seeds; behind ± stands their standard error."
    else:
        note = ""
    return "\n".join(lines) + note


def _is_searched(results: dict[str, Any]) -> bool:
    return bool(results["seeds"][0]["best_level"])


def _served_arm(results: dict[str, Any]) -> str:
    """Return the arm that `model.safetensors` holds: the first that was frozen."""
    arm: str = next(iter(results["frozen"]))
    return arm


def _tickets(results: dict[str, Any]) -> list[str]:
    if not _is_searched(results):
        return []
    tasks = results["data"]["tasks"]
    levels = results["seeds"][0]["tickets"][next(iter(tasks))]
    header = ["remaining", *(f"{task} {MAIN_METRIC[kind].upper()}" for task, kind in tasks.items())]
    rows = []
    for level, ticket in enumerate(levels):
        row = [f"{ticket['density']:.2%}"]
        for task, kind in tasks.items():
            values = [seed["tickets"][task][level]["validation"][MAIN_METRIC[kind]] for seed in results["seeds"]]
            chosen = sum(seed["best_level"][task] == level for seed in results["seeds"])
            row.append(_spread(values) + (f" (chosen by {chosen} of {len(values)})" if chosen else ""))
        rows.append(row)
    text = "On the validation days, each level trained alone from the saved start (Algorithm 1; Figure 4 of the paper)."
    return [
        "## Tickets: how far can each task be pruned?",
        f"{text} Circled: the level chosen.\n\n{table(header, rows)}",
        "![Validation metric of each task against the weights that remain](plots/tickets.png)",
    ]


def _ownership(results: dict[str, Any]) -> str:
    served = _served_arm(results)
    frozen = results["frozen"][served]
    owners = list(next(iter(frozen["ownership"].values())))
    header = ["layer", "weights", *owners, *(f"overlap {pair}" for pair in frozen["overlap"])]
    rows = []
    for name, counts in frozen["ownership"].items():
        total = sum(counts.values())
        shares = [f"{counts[owner] / total:.1%}" for owner in owners]
        rows.append([name, f"{total:,}", *shares, *(f"{pair[name]:.2f}" for pair in frozen["overlap"].values())])
    text = f"{TITLES[served].capitalize()}, seed 0. Overlap is intersection over union of the masks."
    return f"{text}\n\n{table(header, rows)}"


def _served(results: dict[str, Any]) -> str:
    rows = [
        [TITLES[arm], *(f"{value:.1e}" for value in frozen["largest_difference"].values())]
        for arm, frozen in results["frozen"].items()
    ]
    text = (
        "Largest difference between the probability that the loaded artefact serves and the one of the trained, masked "
        "model in torch, over all rows of the test days."
    )
    return f"{text}\n\n{table(['model', *results['data']['tasks']], rows)}"


def precision_section(results: dict[str, Any]) -> str:
    """What each precision of the artefacts serves; nothing where a run of an older version did not judge them."""
    if not all("precisions" in frozen for frozen in results["frozen"].values()):
        return ""
    tasks = results["data"]["tasks"]
    text = (
        "Test days, scores as served; the MLP alone in microseconds a request, as timed below; int8 calibrated on "
        "training rows. A precision is accepted if on the validation days it loses at most "
        f"{TOLERANCE['auc']} of AUC against fp32 and raises the MSE by {TOLERANCE['mse']:.1%} at most."
    )
    header = ["precision"]
    for task, kind in tasks.items():
        header += [f"{task} {MAIN_METRIC[kind].upper()}", "against fp32"]
    parts = [f"## Precision\n\n{text}"]
    for arm, frozen in results["frozen"].items():
        sizes = sorted({record["candidates"] for record in frozen["latency"]})
        us = {(x["path"], x["candidates"]): x["median_us"] for x in frozen["latency"]}
        rows = []
        for precision, judged in frozen["precisions"].items():
            row = [precision]
            for task, kind in tasks.items():
                value, fp32 = (x["test"][task][MAIN_METRIC[kind]] for x in (judged, frozen["precisions"]["fp32"]))
                relative = MAIN_METRIC[kind] == "mse"
                row += [f"{value:.5f}", f"{value / fp32 - 1:+.3%}" if relative else f"{value - fp32:+.5f}"]
            path = "sparse, MLP alone" if precision == "fp32" else f"sparse {precision}, MLP alone"
            row += [f"{max(judged['largest_difference'].values()):.1e}"]
            row += [f"{us[path, size]:.0f}" for size in sizes]
            rows.append([*row, f"{judged['prepacked_bytes']:,}", "yes" if judged["accepted"] else "no"])
        columns = [*header, "largest difference of a score", *(f"µs at {size}" for size in sizes), "bytes", "accepted"]
        parts.append(f"{TITLES[arm]}:\n\n{table(columns, rows)}")
    return "\n\n".join(parts)


def _bytes(results: dict[str, Any]) -> str:
    models = list(results["frozen"].values())
    header = ["bytes", *(TITLES[arm] for arm in results["frozen"])]
    rows = [[name, *(f"{model['bytes'][name]:,}" for model in models)] for name in models[0]["bytes"]]
    lines = []
    for arm, model in results["frozen"].items():
        sizes = model["bytes"]
        dense = sizes["dense, one model a task: embeddings"] + sizes["dense, one model a task: MLPs"]
        mlp = sizes["dense, one model a task: MLPs"] / sizes["sparse sharing: MLP, canonical"]
        lines.append(
            f"- {TITLES[arm]}: the artefact is {dense / sizes['artefact on disk']:.1f}x smaller than one dense fp32 "
            f"model a task, its MLP {mlp:.1f}x; {sizes['embeddings'] / sizes['artefact on disk']:.0%} of it are "
            "embeddings."
        )
    return "\n".join(lines) + f"\n\n{table(header, rows)}"


def _latency(results: dict[str, Any]) -> str:
    frozen = next(iter(results["frozen"].values()))
    text = (
        f"All tasks, fp32, {frozen['threads']} threads, engine: {frozen['engine']}; interleaved, medians. "
        "Dense is torch with the masks multiplied in beforehand; both read ids that are encoded already and embed them "
        "alike. Above 1, sparse is faster."
    )
    header = ["candidates", "sparse, µs", "dense, µs", "ratio", "MLP: sparse, µs", "MLP: dense, µs", "ratio"]
    tables = (f"{TITLES[arm]}:\n\n{table(header, _times(x['latency']))}" for arm, x in results["frozen"].items())
    return "\n\n".join((text, *tables))


def _times(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for size in sorted({record["candidates"] for record in records}):
        us = {record["path"]: record["median_us"] for record in records if record["candidates"] == size}
        row = [str(size)]
        for sparse, dense in (("sparse", "dense"), ("sparse, MLP alone", "dense, MLP alone")):
            row += [f"{us[sparse]:.0f}", f"{us[dense]:.0f}", f"{us[dense] / us[sparse]:.2f}"]
        rows.append(row)
    return rows


def _seconds(results: dict[str, Any]) -> str:
    stages = results["seeds"][0]["seconds"]
    search = {stage: value for stage, value in stages.items() if stage.startswith("search")}
    levels = "mask search, all tasks and levels (level 0 is the single-task baseline)"
    first = levels if _is_searched(results) else "single-task baselines"
    rows = [[first, f"{sum(search.values()):.0f}"]]
    rows += [[TITLES[stage], f"{value:.0f}"] for stage, value in stages.items() if stage not in search]
    text = "Seconds of training, seed 0; every arm below trains all tasks jointly."
    return f"{text}\n\n{table(['stage', 's'], rows)}"


def _inline(path: Path) -> str:
    return f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"'
