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
from lt4rec_sparse.recsys.harness.baselines import TREES
from lt4rec_sparse.recsys.harness.by_rows import few_steps
from lt4rec_sparse.recsys.harness.rows import BASE, HARD, SMALL
from lt4rec_sparse.recsys.harness.statistics import paired_difference, summary
from lt4rec_sparse.recsys.metrics import HIGHER_IS_BETTER, MAIN_METRIC
from lt4rec_sparse.recsys.plots import plot_latency, plot_ownership, plot_tickets
from lt4rec_sparse.recsys.tables import (
    LEGEND,
    NOT_KNOWN,
    comparison_table,
    count,
    further_table,
    levels_table,
    reasons,
    table,
    values_of,
)

MISCALIBRATED = 0.1  # how far predicted over observed may be from 1 without a warning

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0; }
table { font-variant-numeric: tabular-nums; }
td:not(:first-child) { white-space: nowrap; }
td:first-child { min-width: 11rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
th { border-bottom: 2px solid #888; }
img { max-width: 100%; }
h2 { margin-top: 2.2rem; }
code { background: #f4f4f4; padding: 0 .2rem; }
"""

Results = Mapping[str, Any]  # the contents of `results.json`


def write_page(text: str, title: str, folder: Path) -> Path:
    """Write Markdown as `report.md`, and as `report.html` with its pictures, `plots/<name>.png`, embedded.

    A picture from anywhere else, as the name of a folder or a column may ask for, stays text: a page asks for nothing.
    """

    def embedded(match: re.Match[str]) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    text = re.sub(r"!\[(?![^\[\]]*\]\(plots/\w+\.png\))", r"!\\[", text)
    write_whole(folder / "report.md", text)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    head = "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
    page = f"{head}<title>{html.escape(title)}</title><style>{STYLE}</style>{body}"
    write_whole(folder / "report.html", re.sub(r'src="(plots/\w+\.png)"', embedded, page))
    return folder / "report.md"


def write_report(results: Results, folder: Path) -> Path:
    """Write a run's `report.md`, `report.html` and `plots/` into its folder; return the path of `report.md`."""
    run, plots = _Run(results), folder / "plots"
    plots.mkdir(exist_ok=True)
    if run.searched:
        plot_tickets(run.searched, run.tasks, plots / "tickets.png")
    plot_ownership(run.records, {run.served: run.titles[run.served]}, plots / "ownership.png")
    plot_latency(run.frozen, run.titles, plots / "latency.png")
    text = "\n\n".join(section for section in _sections(run) if section) + "\n"
    text = worded(text, run.data["counts"])
    return write_page(text, f"LT4REC, sparse: {results['data']['name']}", folder)


def verdict(results: Results) -> str:
    """Return in one sentence which model is served and why, and how it compares on the test days."""
    run = _Run(results)
    masked = {record["row"] for record in run.records if record["masks"]}
    why = {"random": "the masks that were asked for", "tickets": "the tickets that were asked for"}.get(
        results["config"]["masks"], f"the best of {count(len(masked), 'masked model')} on the validation days"
    )
    text = (
        f"Serve {run.titles[run.served]} ({results['files'][run.served]}), {why}: on the test days it is "
        f"{_against(run, BASE, 'single-task models')} and "
        f"{_against(run, HARD + SMALL, 'a dense network with as many weights')}"
    )
    found = _found(run)
    return worded(f"{text}; {found}." if found else f"{text}.", run.data["counts"])


def worded(text: str, counts: Mapping[str, Any]) -> str:
    """Return a text about the rows of splits, which are whole days only in a log that is split by day."""
    return re.sub(r"\b(training|validation|test) days\b", r"\1 rows", text) if "split_by" in counts else text


class _Run:
    """Parts of `results.json`."""

    def __init__(self, results: Results) -> None:
        self.results, self.data, self.config = results, results["data"], results["config"]
        self.tasks: Mapping[str, str] = self.data["tasks"]
        self.records: list[dict[str, Any]] = results["records"]
        self.titles: Mapping[str, str] = results["rows"]
        self.frozen: Mapping[str, Any] = results["frozen"]
        # The row that `model.safetensors` holds, the first one frozen; the row whose tickets the report shows, if any.
        self.served: str = next(iter(self.frozen))
        tickets = [record for record in self.records if record["tickets"]]
        self.searched = [record for record in tickets if record["row"] == tickets[0]["row"]]

    def mean(self, row: str, task: str, metric: str) -> float:
        """Return a row's metric of a task on the test days, over the seeds."""
        return summary(list(values_of(self.records, row, task, metric).values())).mean

    def us(self, row: str) -> dict[int, dict[str, float]]:
        """Return a frozen row's median microseconds: candidates -> path -> time."""
        us: dict[int, dict[str, float]] = {}
        for timed in self.frozen[row]["latency"]:
            us.setdefault(timed["candidates"], {})[timed["path"]] = timed["median_us"]
        return us


def _against(run: _Run, base: str, who: str) -> str:
    """Return how the served row compares with another, such as "better than single-task models (ctr AUC +0.0021)"."""
    words, together, apart = [], [], []
    for task, kind in run.tasks.items():
        metric = MAIN_METRIC[kind]
        mine, others = (values_of(run.records, row, task, metric) for row in (run.served, base))
        difference = paired_difference(mine, others, metric == "mse")
        words.append("no better" if not difference.mean else "better" if _is_gain(difference.mean, metric) else "worse")
        together.append(f"{task} {metric.upper()} {difference}")
        apart.append(f"{words[-1]} at {task} ({metric.upper()} {difference})")
    if len(set(words)) == 1:
        return f"{words[0]} than {who} ({', '.join(together)})"
    return f"{' and '.join(apart)} than {who}"


def _is_gain(difference: float, metric: str) -> bool:
    return (difference > 0) == HIGHER_IS_BETTER[metric]


def _found(run: _Run) -> str:
    """Return in words how much of a planted truth the served model and its masks found; empty without one."""
    truth, parts = run.data.get("truth", {}), []
    for task, kind in run.tasks.items():
        metric = MAIN_METRIC[kind]
        if (key := f"{task}_{metric}") in truth:
            constant, best = truth["constant"][key], truth[key]
            value = run.mean(run.served, task, metric)
            parts.append(f"{_percent((value - constant) / (best - constant))} ({task})")
    found = [f"it reaches {' and '.join(parts)} of what the planted truth allows over a constant"] if parts else []
    if masks := run.results["recovery"].get(run.served):
        kept = {kind: [_percent(masks[kind][task]) for task in masks[kind]] for kind in ("planted", "other")}
        planted, other, names = (" and ".join(words) for words in (*kept.values(), masks["planted"]))
        found.append(f"its masks keep {planted} of the inputs planted for {names}, {other} of the others")
    return ", and ".join(found)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _sections(run: _Run) -> list[str]:
    tasks, records, titles = run.tasks, run.records, run.titles
    shown = {row: f"**{title}**" if row == run.served else title for row, title in titles.items()}
    left_out = run.results.get("left_out", {})
    parts = [name for name in records[0]["test"] if name != "all"]
    truth = [f"{key} {value:.4f}" for key, value in run.data.get("truth", {}).items() if isinstance(value, float)]
    levels = (
        "On the validation days, each level trained alone from the saved start (Algorithm 1; Figure 4 of the paper)."
    )
    tickets = [
        f"## Tickets: how far can each task be pruned?\n\n{levels} Circled: the level chosen.",
        levels_table(run.searched, tasks) if run.searched else "",
        "![Validation metric of each task against the weights that remain](plots/tickets.png)",
    ]
    return [
        f"# LT4REC, sparse: {run.data['name']}",
        f"**{verdict(run.results)}**",
        f"## What to do next\n\n{_next(run)}",
        _warnings(run),
        f"## How it was made\n\n{_made(run)}",
        f"## Accuracy on the test days\n\n{comparison_table(records, shown, BASE, tasks, left_out=left_out)}",
        reasons(left_out),
        f"The best values that the planted truth allows on these days: {', '.join(truth)}." if truth else "",
        LEGEND,
        *(f"The slice `{part}`:\n\n{comparison_table(records, shown, BASE, tasks, part)}" for part in parts),
        "Every other metric, and the cost of each model. Calibration is predicted over observed; 1 is ideal.",
        further_table(records, shown, tasks),
        *(tickets if run.searched else ()),
        f"## Who owns which weights\n\n{_ownership(run)}",
        "![Shares of shared, private and dead weights in each layer](plots/ownership.png)",
        _recovery(run),
        f"## Is the served model the trained one?\n\n{_difference(run)}",
        f"## Precision\n\n{_precision(run)}",
        f"## Bytes\n\n{_bytes(run)}",
        f"## Time of a request\n\n{_latency(run)}",
        "![Time of a request against its candidates](plots/latency.png)",
    ]


def _next(run: _Run) -> str:
    """Return a list of what the results suggest."""
    lines = [
        "- Score the log's test days: `lt4rec-sparse score model.safetensors SCORES.csv --data FOLDER`. For requests "
        "of your own, `lt4rec-sparse candidates` makes what `score` reads."
    ]
    if _is_beaten(run, HARD + SMALL):
        lines.append("- The narrow dense network is better at every task and simpler to serve: consider it instead.")
    if TREES in run.titles and _is_beaten(run, TREES):
        lines.append("- Gradient-boosted trees are better at every task: networks need more rows, or longer training.")
    if run.config["seeds"] == 1:
        lines.append("- One seed cannot tell a difference from noise: `--seeds 3` adds two to this run.")
    if len(run.config["learning_rates"]) == 1:
        lines.append(
            "- Learning rates were not searched: `--learning-rate 0.0005,0.001,0.002` chooses among these for every "
            "model and task, on the validation days."
        )
    us = run.us(run.served)
    size = max(size for size in us if size <= 256)
    precisions = run.frozen[run.served]["precisions"]
    mine = {p: us[size][_path(p)] for p, found in precisions.items() if p == "fp32" or found["accepted"]}
    best = min(mine, key=lambda precision: mine[precision])
    ratio = us[size]["dense, MLP alone"] / mine[best]
    lines.append(
        f"- Serve in {best} (`--precision {best}`): of the accepted precisions it is the fastest here at "
        f"{count(size, 'candidate')}, the MLPs {ratio:.1f}x as fast as dense fp32 torch."
        + (" **Dense torch is faster here**: let `lt4rec-sparse plan` choose the kernels." if ratio < 1 else "")
    )
    lines.append("- To see which property of a mask matters: `lt4rec-sparse experiment tickets --data FOLDER`.")
    return "\n".join(lines)


def _is_beaten(run: _Run, row: str) -> bool:
    """Return whether a row is better than the served one at every task."""
    mains = {task: MAIN_METRIC[kind] for task, kind in run.tasks.items()}
    return all(_is_gain(run.mean(row, t, main) - run.mean(run.served, t, main), main) for t, main in mains.items())


def _warnings(run: _Run) -> str:
    lines = []
    for task in run.tasks:
        ratio = run.mean(run.served, task, "calibration")
        if not abs(ratio - 1) <= MISCALIBRATED:
            lines.append(
                f"- **{task} is miscalibrated**: the served model predicts {ratio:.2f} times what the test days show. "
                "The order by this score is unaffected; recalibrate it before multiplying it with anything else."
            )
    if warning := few_steps(run.results["steps"]):
        lines.append(f"- **Few steps**: {warning}")
    return "## Warnings\n\n" + "\n".join(lines) if lines else ""


def _made(run: _Run) -> str:
    data, config, machine = run.data, run.config, run.results["machine"]
    hidden = "-".join(str(width) for width in config["hidden"])
    pruned = "" if config["granularity"] == "weight" else f", by {config['granularity']}"
    masks = f"{config['rounds']} rounds of pruning to" if run.searched else "random masks that keep"
    rates = sorted({rate for of_row in run.results["learning_rates"].values() for rate in of_row.values()})
    text = (
        f"{data['counts']['rows_read']:,} impressions{_dropped(data['counts'])}. "
        f"{len(data['fields'])} input fields, {config['embedding_dim']} wide; MLP {hidden}; "
        f"{_epochs(config)} of batches of {config['batch_size']} for every model; learning rates "
        f"{', '.join(f'{rate:g}' for rate in rates)}; matrix products in {config['dtype']} while training; {masks} "
        f"{config['density']:.0%} of the hidden weights{pruned}; {count(config['seeds'], 'seed')}."
    )
    if config.get("sparse_gradients"):
        text += " A step moves only the embeddings that its batch looks up."
    if "embeddings" in config:
        text += f" The artefact holds embeddings in {config['embeddings']}."
    if "split_by" in data["counts"]:
        text += f" Rows are split {data['counts']['split_by']}."
    if any(kind == "binary" for kind in run.tasks.values()) and not data.get("grouped", True):
        text += f" There is no {_of_groups(config)}: the log has no group, within which rows are compared."
    where = (
        f"`{run.results['command']}`, {run.results['seconds']:.0f} s on {count(machine['cores'], 'core')} "
        f"({machine['architecture']}, {machine['torch_capability']}, engine: {machine['engine']}); lt4rec-sparse "
        f"{machine['lt4rec_sparse']}, torch {machine['torch']}, Python {machine['python']}."
    )
    header = ["split", "days", "impressions"]
    header += [part for task in run.tasks for part in (f"{task} rows", "mean label")]
    lines = []
    for split in ("train", "validation", "test"):
        counts = data["counts"][split]
        days = counts["days"]
        span = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else NOT_KNOWN
        line = [split, span, f"{counts['rows']:,}"]
        for task in run.tasks:
            line += [f"{counts['tasks'][task]['rows']:,}", f"{counts['tasks'][task]['label_mean']:.3f}"]
        lines.append(line)
    return f"{where}\n\n{text}\n\n{table(header, lines)}"


def _dropped(counts: Mapping[str, Any]) -> str:
    duplicates = counts["duplicates"]
    return f", of which {duplicates:,} duplicates were dropped" if duplicates else ""


def _of_groups(config: Mapping[str, Any]) -> str:
    return "GAUC, NDCG or hit rate" if config.get("top_k") else "GAUC"


def _epochs(config: Mapping[str, Any]) -> str:
    epochs, patience = count(config["epochs"], "epoch"), config.get("patience", 0)
    return f"at most {epochs}, {patience} without a gain end a training," if patience else epochs


def _ownership(run: _Run) -> str:
    (layers, *_) = (record["masks"]["ownership"] for record in run.records if record["row"] == run.served)
    overlaps = run.frozen[run.served]["overlap"]
    owners = list(next(iter(layers.values())))
    header = ["layer", "weights", *owners, *(f"overlap {pair}" for pair in overlaps)]
    lines = []
    for name, counts in layers.items():
        total = sum(counts.values())
        shares = [f"{counts[owner] / total:.1%}" for owner in owners]
        lines.append([name, f"{total:,}", *shares, *(f"{pair[name]:.2f}" for pair in overlaps.values())])
    text = f"{run.titles[run.served]}, seed 0. Overlap is intersection over union of the masks."
    return f"{text}\n\n{table(header, lines)}"


def _recovery(run: _Run) -> str:
    lines = [
        [run.titles[row], task, f"{found['planted'][task]:.1%}", f"{found['other'][task]:.1%}", f"{auc:.3f}"]
        for row, found in run.results["recovery"].items()
        for task, auc in found["auc"].items()
    ]
    text = (
        "In the simulated log it is known which fields matter for which task. First layer, seed 0: the share of the "
        "weights that the masks keep on inputs planted for a task, and on all others; and how well the number of "
        "weights that an input keeps tells the two apart (AUC, 0.5 by chance)."
    )
    header = ["masks", "task", "kept: planted for the task", "kept: others", "AUC"]
    return f"## Found and planted\n\n{text}\n\n{table(header, lines)}" if lines else ""


def _difference(run: _Run) -> str:
    lines = [
        [run.titles[row], *(f"{value:.1e}" for value in frozen["largest_difference"].values())]
        for row, frozen in run.frozen.items()
    ]
    text = (
        "Largest difference between the probability that the loaded artefact serves and that of the trained, masked "
        "model in torch, over all rows of the test days."
    )
    return f"{text}\n\n{table(['model', *run.tasks], lines)}"


def _precision(run: _Run) -> str:
    parts = [
        "On the test days: scores as served, and the time of the MLP alone in microseconds per request. int8 is "
        "calibrated on training rows. A precision is accepted if on the validation days it loses at most "
        f"{TOLERANCE['auc']} of AUC against fp32 and raises the MSE by {TOLERANCE['mse']:.1%} at most."
    ]
    header = ["precision"]
    for task, kind in run.tasks.items():
        header += [f"{task} {MAIN_METRIC[kind].upper()}", "against fp32"]
    for row, frozen in run.frozen.items():
        us, lines = run.us(row), []
        for precision, judged in frozen["precisions"].items():
            line = [precision]
            for task, kind in run.tasks.items():
                value, fp32 = (x["test"][task][MAIN_METRIC[kind]] for x in (judged, frozen["precisions"]["fp32"]))
                relative = MAIN_METRIC[kind] == "mse"
                line += [f"{value:.5f}", f"{value / fp32 - 1:+.3%}" if relative else f"{value - fp32:+.5f}"]
            line += [f"{max(judged['largest_difference'].values()):.1e}"]
            line += [f"{at_size[_path(precision)]:.0f}" for at_size in us.values()]
            lines.append([*line, f"{judged['prepacked_bytes']:,}", "yes" if judged["accepted"] else "no"])
        columns = [*header, "largest difference of a score", *(f"µs at {size}" for size in us), "bytes", "accepted"]
        parts.append(f"{run.titles[row]}:\n\n{table(columns, lines)}")
    return "\n\n".join(parts)


def _bytes(run: _Run) -> str:
    names = run.frozen[run.served]["bytes"]
    lines = [[name, *(f"{model['bytes'][name]:,}" for model in run.frozen.values())] for name in names]
    facts = []
    for row, model in run.frozen.items():
        sizes = model["bytes"]
        dense = sizes["dense, one model per task: embeddings"] + sizes["dense, one model per task: MLPs"]
        mlp = sizes["dense, one model per task: MLPs"] / sizes["sparse sharing: MLP, canonical"]
        facts.append(
            f"- {run.titles[row]}: the artefact is {dense / sizes['artefact on disk']:.1f}x smaller on disk than "
            f"one dense fp32 model per task, its MLP {mlp:.1f}x; {sizes['embeddings'] / sizes['artefact on disk']:.0%} "
            "of it are embeddings."
        )
    return "\n".join(facts) + f"\n\n{table(['bytes', *(run.titles[row] for row in run.frozen)], lines)}"


def _latency(run: _Run) -> str:
    frozen = run.frozen[run.served]
    parts = [
        f"All tasks, fp32, {count(frozen['threads'], 'thread')}, engine: {frozen['engine']}; interleaved, medians. "
        "Dense is torch with the masks multiplied in beforehand; both read encoded ids and embed them in the same "
        "way. A ratio above 1 means that sparse is faster."
    ]
    header = ["candidates", "sparse, µs", "dense, µs", "ratio", "MLP: sparse, µs", "MLP: dense, µs", "ratio"]
    for row in run.frozen:
        lines = []
        for size, us in run.us(row).items():
            line = [str(size)]
            for sparse, dense in (("sparse", "dense"), ("sparse, MLP alone", "dense, MLP alone")):
                line += [f"{us[sparse]:.0f}", f"{us[dense]:.0f}", f"{us[dense] / us[sparse]:.2f}"]
            lines.append(line)
        parts.append(f"{run.titles[row]}:\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def _path(precision: str) -> str:
    """Return what `freeze_and_compare` calls the sparse MLP of a precision."""
    return "sparse, MLP alone" if precision == "fp32" else f"sparse {precision}, MLP alone"
