"""The paper's other figures, from the records of trials; the style and every report's plots are in `recsys.plots`.

A row has one colour and marker in every figure with the same `titles`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lt4rec_sparse.recsys.metrics import MAIN_METRIC
from lt4rec_sparse.recsys.plots import (
    DEAD,
    TASK_COLOURS,
    Point,
    log_axis,
    metric_axis,
    panels,
    standard_error,
    ticket_points,
)
from lt4rec_sparse.recsys.tables import Record

# Five colours and seven markers have no common divisor: 35 rows differ before a pair comes again.
ROW_COLOURS = (*TASK_COLOURS, "#56b4e9", "#7f3c8d", "#555555")
ROW_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REGIME_OPPONENTS = {"hard_sharing": "hard sharing", "single_task": "single-task", "random": "random masks, scaled up"}
# A single seed, in its row's colour; the black edge keeps it visible on top of the mean's mark.
SEED_MARKS: dict[str, Any] = {
    "linestyle": "",
    "marker": "o",
    "markersize": 3.5,
    "markeredgecolor": "black",
    "markeredgewidth": 0.7,
    "zorder": 4,
}


def plot_granularity(
    records: Sequence[Record], titles: Mapping[str, str], tasks: Mapping[str, str], path: Path
) -> Figure:
    """Draw each task's validation metric against the density of its tickets, one line per titled row."""
    points = {
        task: {row: ticket_points([r for r in records if r["row"] == row], task, kind) for row in titles}
        for task, kind in tasks.items()
    }
    figure, axes = _seeds_and_means(points, titles, tasks, "validation", "dots: seeds; bars: standard error")
    for axis in axes:
        log_axis(axis, "hidden weights kept, %")
        axis.invert_xaxis()
    figure.savefig(path)
    return figure


def plot_speed(
    records: Sequence[Record], titles: Mapping[str, str], tasks: Mapping[str, str], path: Path, candidates: int = 256
) -> Figure:
    """Draw each task's test metric against the time of a request: one mark per row, hollow where the model is dense."""
    rows = {row: [record for record in records if record["row"] == row] for row in titles}
    times = {row: [r["serving"]["microseconds"][str(candidates)] for r in found] for row, found in rows.items()}
    points: dict[str, dict[str, list[Point]]] = {
        task: {
            row: [(times[row], [record["test"]["all"][task][MAIN_METRIC[kind]] for record in found])]
            for row, found in rows.items()
        }
        for task, kind in tasks.items()
    }
    dense = [row for row, found in rows.items() if found[0]["masks"] is None]
    note = "filled: masked; hollow: dense; dots: seeds; bars: standard error"
    figure, axes = _seeds_and_means(points, titles, tasks, "test", note, dense)
    for axis in axes:
        log_axis(axis, f"microseconds per request of {candidates} candidates")
    figure.savefig(path)
    return figure


def plot_frontier(
    records: Sequence[Record],
    curves: Mapping[str, str],
    tasks: Mapping[str, str],
    precision: str,
    hollow: Sequence[str],
    path: Path,
    candidates: int = 256,
) -> Figure:
    """Draw each task's test metric against the time of a request in a precision: one line per title in `curves`.

    `curves` is row -> title of its line; `hollow` are titles with hollow marks. What lies far outside of most points,
    as trainings that collapsed do, is outside of the axes.
    """
    titles = dict.fromkeys(curves.values())
    points: dict[str, dict[str, list[Point]]] = {task: {title: [] for title in titles} for task in tasks}
    for row, title in sorted(curves.items(), key=lambda item: _microseconds(records, item[0], precision)):
        for task, kind in tasks.items():
            found = [r for r in records if r["row"] == row and task in r["served"][precision]]
            ys = [record["served"][precision][task][MAIN_METRIC[kind]] for record in found]
            points[task][title].append(([record["microseconds"][precision] for record in found], ys))
    note = f"{precision}; filled: masked; hollow: dense; dots: seeds; bars: standard error"
    figure, axes = _seeds_and_means(points, {title: title for title in titles}, tasks, "test", note, hollow)
    for axis, task in zip(axes, tasks, strict=True):
        log_axis(axis, f"microseconds per request of {candidates} candidates")
        axis.set_ylim(*_fences([y for line in points[task].values() for _, ys in line for y in ys]))
    figure.savefig(path)
    return figure


def _fences(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of the values, but at most two interquartile ranges beyond the middle half of them."""
    low, high = np.quantile(values, (0.25, 0.75))
    margin = 2 * (high - low)
    inside = [value for value in values if low - margin <= value <= high + margin]
    space = 0.05 * (max(inside) - min(inside)) or 0.01
    return min(inside) - space, max(inside) + space


def _microseconds(records: Sequence[Record], row: str, precision: str) -> float:
    return float(next(record["microseconds"][precision] for record in records if record["row"] == row))


def _seeds_and_means(
    points: Mapping[str, Mapping[str, Sequence[Point]]],
    titles: Mapping[str, str],
    tasks: Mapping[str, str],
    split: str,
    note: str,
    hollow: Sequence[str] = (),
) -> tuple[Figure, list[Axes]]:
    """Draw a panel per task with a line per row: a dot per seed, means with standard errors; and the legend.

    `points` are those of each row's line, task -> row -> points; `hollow` are rows with hollow marks.
    """
    figure, axes = panels(len(tasks))
    styles = _styles(titles)
    for axis, (task, kind) in zip(axes, tasks.items(), strict=True):
        for row, line in points[task].items():
            for x, y in line:
                axis.plot(x, y, color=styles[row]["color"], **SEED_MARKS)
            mean_x, mean_y = ([float(np.mean(point[i])) for point in line] for i in range(2))
            errors = [standard_error(y) for _, y in line]
            (mean, *_) = axis.errorbar(
                mean_x, mean_y, errors, capsize=3, markersize=7, label=titles[row], **styles[row]
            )
            if row in hollow:
                mean.set_markerfacecolor("white")
        metric_axis(axis, task, kind, split)
    width, height = figure.get_size_inches()
    # Inches: 0.07 per character, 0.6 for the marker and the gap between columns, 0.21 per line of the legend.
    columns = max(1, min(4, len(titles), int(width / (0.07 * max(map(len, titles.values())) + 0.6))))
    figure.set_size_inches(width, height + 0.21 * -(-len(titles) // columns))
    handles = axes[0].containers
    figure.legend(handles=handles, title=note, loc="outside lower center", ncols=columns, frameon=False)
    return figure, axes


def plot_regimes(cells: Sequence[Mapping[str, Any]], path: Path) -> Figure:
    """Draw where sparse sharing pays: its CVR MSE against other models over click rate and conflict.

    A cell has `click_rate`, `conflict` and `differences`: for each of `REGIME_OPPONENTS` S-Weight's relative
    differences in %, one per seed, below 0 if S-Weight is better.
    """
    rates, conflicts = (sorted({cell[name] for cell in cells}) for name in ("click_rate", "conflict"))
    where = [(conflicts.index(cell["conflict"]), rates.index(cell["click_rate"])) for cell in cells]
    panels = {}
    for other in cells[0]["differences"]:
        panels[other] = np.full((len(conflicts), len(rates)), np.nan)
        for place, cell in zip(where, cells, strict=True):
            panels[other][place] = np.mean(cell["differences"][other])
    limit = max(float(np.nanmax(np.abs(means))) for means in panels.values()) or 1.0
    figure = Figure(figsize=(3.2 * len(panels) + 0.6, 0.62 * len(conflicts) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False).ravel()
    for axis, (other, means) in zip(axes, panels.items(), strict=True):
        axis.set_facecolor(DEAD)  # shows where there is no cell
        image = axis.imshow(means, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
        for (y, x), cell in zip(where, cells, strict=True):
            ink = "white" if abs(means[y, x]) > 0.7 * limit else "black"
            error = standard_error(cell["differences"][other])
            text = f"{means[y, x]:+.1f} %" if np.isnan(error) else f"{means[y, x]:+.1f}\n± {error:.1f} %"
            axis.text(x, y, text, ha="center", va="center", fontsize=9, linespacing=1.1, color=ink)
        axis.set_xticks(range(len(rates)), [f"{100 * rate:g}" for rate in rates])
        axis.set_yticks(range(len(conflicts)), [f"{conflict:g}" for conflict in conflicts])
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set(xlabel="click rate, %", title=f"against {REGIME_OPPONENTS[other]}")
    axes[0].set(ylabel="conflict of the tasks")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("S-Weight's CVR MSE, difference in %\n(below 0: S-Weight is better)")
    bar.outline.set_visible(False)
    figure.savefig(path)
    return figure


def _styles(rows: Iterable[str]) -> dict[str, dict[str, Any]]:
    pairs = zip(rows, cycle(ROW_COLOURS), cycle(ROW_MARKERS), strict=False)
    return {row: {"color": colour, "marker": marker} for row, colour, marker in pairs}
