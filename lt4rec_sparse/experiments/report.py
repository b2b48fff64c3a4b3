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

from lt4rec_sparse.experiments import plots
from lt4rec_sparse.experiments.arms import MAIN_METRIC, SINGLE, SPARSE, TITLES
from lt4rec_sparse.files import write_whole

PLOTS = {"tickets": plots.plot_tickets, "ownership": plots.plot_ownership, "latency": plots.plot_latency}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
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
        plot(results, folder / "plots" / f"{name}.png")
    text = "\n\n".join(section for section in _sections(results) if section) + "\n"
    write_whole(folder / "report.md", text)
    body = MarkdownIt("commonmark").enable("table").render(text)
    title = html.escape(f"LT4REC, sparse: {results['data']['name']}")
    page = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>{body}"
    write_whole(folder / "report.html", re.sub(r'src="(plots/[a-z]+\.png)"', lambda m: _inline(folder / m[1]), page))
    return folder / "report.md"


def _sections(results: dict[str, Any]) -> list[str]:
    return [
        _head(results),
        "## Accuracy on the test days",
        *(_accuracy(results, name) for name in results["seeds"][0]["test"][SINGLE]),
        _verdict(results),
        "## Tickets: how far can each task be pruned?",
        _tickets(results),
        "![Validation metric of each task against the weights that remain](plots/tickets.png)",
        "## Who owns which weights",
        _ownership(results),
        "![Shares of shared, private and dead weights in each layer](plots/ownership.png)",
        "## Is the served model the trained one?",
        _served(results),
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
    counts = data["counts"]
    hidden = "-".join(str(width) for width in config["hidden"])
    lines = [
        f"# LT4REC, sparse: {data['name']}",
        f"{_count(counts)}. {len(data['fields'])} input fields, {config['embedding_dim']} wide; MLP {hidden}; "
        f"{config['epochs']} epochs of batches of {config['batch_size']} for every model; "
        f"{config['rounds']} rounds to {config['density']:.0%} of the hidden weights; {_seeds(results)}.",
    ]
    return "\n\n".join(lines)


def _count(counts: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')}: {value:,}" for key, value in counts.items() if isinstance(value, int))


def _seeds(results: dict[str, Any]) -> str:
    n = len(results["seeds"])
    return (
        "one seed: differences of one run's noise mean nothing" if n == 1 else f"{n} seeds, mean ± standard deviation"
    )


def _accuracy(results: dict[str, Any], part: str) -> str:
    tasks = results["data"]["tasks"]
    header = ["model"]
    for task, kind in tasks.items():
        header += [f"{task} {MAIN_METRIC[kind].upper()}", "against single-task"]
    rows = []
    for arm in results["seeds"][0]["test"]:
        row = [f"**{TITLES[arm]}**" if arm == SPARSE else TITLES[arm]]
        for task, kind in tasks.items():
            row += [_spread(_values(results, arm, part, task)), _against(results, arm, part, task, kind)]
        rows.append(row)
    caption = "All rows of the test days" if part == "all" else f"The slice `{part}` of the test days"
    truth = _truth(results) if part == "all" else ""
    return f"{caption}.\n\n{table(header, rows)}{truth}"


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
    lines = []
    for task, kind in results["data"]["tasks"].items():
        metric = MAIN_METRIC[kind]
        mean = {arm: float(np.mean(_values(results, arm, "all", task))) for arm in results["seeds"][0]["test"]}
        ranked = sorted(mean, key=lambda arm: -mean[arm] if metric == "auc" else mean[arm])
        place = ranked.index(SPARSE) + 1
        comparisons = []
        for other in mean:
            if other != SPARSE:
                better = mean[SPARSE] > mean[other] if metric == "auc" else mean[SPARSE] < mean[other]
                comparisons.append((other, better))
        losses = [other for other, better in comparisons if not better]
        against = f" It loses to {'; '.join(TITLES[arm] for arm in losses)}." if losses else " It loses to none."
        standing = f"{place} of {len(ranked)} by {metric.upper()}"
        lines.append(f"- **{task}**: sparse sharing through the best tickets is {standing}.{against}")
    if len(results["seeds"]) > 1:
        note = "\n\nDifferences are paired over seeds; behind ± stands their standard error."
    else:
        note = ""
    return "\n".join(lines) + note


def _tickets(results: dict[str, Any]) -> str:
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
    return f"{text} Circled: the level chosen.\n\n{table(header, rows)}"


def _ownership(results: dict[str, Any]) -> str:
    frozen = results["frozen"]
    owners = list(next(iter(frozen["ownership"].values())))
    header = ["layer", "weights", *owners, *(f"overlap {pair}" for pair in frozen["overlap"])]
    rows = []
    for name, counts in frozen["ownership"].items():
        total = sum(counts.values())
        shares = [f"{counts[owner] / total:.1%}" for owner in owners]
        rows.append([name, f"{total:,}", *shares, *(f"{pair[name]:.2f}" for pair in frozen["overlap"].values())])
    return f"Seed 0. Overlap is intersection over union of the masks.\n\n{table(header, rows)}"


def _served(results: dict[str, Any]) -> str:
    parts = ", ".join(f"{task} {value:.1e}" for task, value in results["frozen"]["largest_difference"].items())
    return (
        "Largest difference between the probability that the loaded artefact serves and the one of the trained, masked "
        f"model, over all rows of the test days: {parts}."
    )


def _bytes(results: dict[str, Any]) -> str:
    sizes = results["frozen"]["bytes"]
    rows = [[name, f"{value:,}", f"{value / 1e6:.2f}"] for name, value in sizes.items()]
    share = sizes["embeddings"] / sizes["artefact on disk"]
    dense = sizes["dense, one model a task: embeddings"] + sizes["dense, one model a task: MLPs"]
    ratio = dense / sizes["artefact on disk"]
    mlp = sizes["dense, one model a task: MLPs"] / sizes["sparse sharing: MLP, canonical"]
    return (
        f"The artefact is {ratio:.1f}x smaller than one dense fp32 model a task ({dense:,} bytes), its MLP {mlp:.1f}x; "
        f"{share:.0%} of the artefact are embeddings.\n\n{table(['what', 'bytes', 'MB'], rows)}"
    )


def _latency(results: dict[str, Any]) -> str:
    records = results["frozen"]["latency"]
    header = [
        "candidates",
        "sparse, µs",
        "dense, µs",
        "dense / sparse",
        "MLP: sparse, µs",
        "MLP: dense, µs",
        "MLP: dense / sparse",
    ]
    rows = []
    for size in sorted({record["candidates"] for record in records}):
        us = {record["path"]: record["median_us"] for record in records if record["candidates"] == size}
        whole, alone = us["dense"] / us["sparse"], us["dense, MLP alone"] / us["sparse, MLP alone"]
        rows.append(
            [
                str(size),
                f"{us['sparse']:.0f}",
                f"{us['dense']:.0f}",
                f"{whole:.2f}",
                f"{us['sparse, MLP alone']:.0f}",
                f"{us['dense, MLP alone']:.0f}",
                f"{alone:.2f}",
            ]
        )
    frozen = results["frozen"]
    text = (
        f"All tasks, fp32, {frozen['threads']} threads, engine: {frozen['engine']}; interleaved, medians. "
        "Dense is torch with the masks multiplied in beforehand; both read ids that are encoded already and embed them "
        "alike. Above 1, sparse is faster."
    )
    return f"{text}\n\n{table(header, rows)}"


def _seconds(results: dict[str, Any]) -> str:
    stages = results["seeds"][0]["seconds"]
    search = {stage: value for stage, value in stages.items() if stage.startswith("search")}
    rows = [["mask search, all tasks and levels (level 0 is the single-task baseline)", f"{sum(search.values()):.0f}"]]
    rows += [[TITLES[stage], f"{value:.0f}"] for stage, value in stages.items() if stage not in search]
    text = "Seconds of training, seed 0; every arm below the search trains all tasks jointly."
    return f"{text}\n\n{table(['stage', 's'], rows)}"


def _inline(path: Path) -> str:
    return f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"'
