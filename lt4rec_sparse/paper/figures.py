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

from lt4rec_sparse.recsys.metrics import HIGHER_IS_BETTER, MAIN_METRIC
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


def plot_regimes(
    cells: Sequence[Mapping[str, Any]],
    budgets: Mapping[str, str],
    tasks: Mapping[str, str],
    precision: str,
    path: Path,
) -> Figure:
    """Draw how the chosen masked network differs from the chosen dense one: a line per regime, a mark per budget.

    `budgets` is row -> title of the dense networks whose time is a budget. A cell has a `title` and `chosen`,
    precision -> choices with `budget` and, where two networks were chosen, `numbers`: task -> the difference of its
    main metric on the test days (of an MSE in %) and its standard error.
    """
    styles, titles = _styles(budgets), [cell["title"] for cell in cells]
    figure = Figure(figsize=(4.6 * len(tasks) + 1.4, 0.42 * len(cells) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False).ravel()
    for axis, (task, kind) in zip(axes, tasks.items(), strict=True):
        axis.axvline(0, color=DEAD, zorder=0)
        for place, (budget, title) in enumerate(budgets.items()):
            offset = 0.6 * ((place + 0.5) / len(budgets) - 0.5)
            known = [
                (y + offset, choice["numbers"][task])
                for y, cell in enumerate(cells)
                for choice in cell["chosen"][precision]
                if choice["budget"] == budget and "numbers" in choice
            ]
            if known:
                ys, (means, errors) = [y for y, _ in known], zip(*(numbers for _, numbers in known), strict=True)
                bars = None if np.isnan(errors).any() else 2 * np.array(errors)
                axis.errorbar(means, ys, xerr=bars, linestyle="", markersize=5, label=title, **styles[budget])
        metric = MAIN_METRIC[kind]
        side = "right" if HIGHER_IS_BETTER[metric] else "left"
        unit = ", %" if metric == "mse" else ""
        axis.set(xlabel=f"{task} {metric.upper()}: masked against dense{unit}\n(to the {side}: masked is better)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(cells)), titles)
    axes[0].set_ylim(len(cells) - 0.5, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    note = f"{precision}; in the time of a single-task network, bars: two standard errors"
    figure.legend(handles, labels, title=note, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path)
    return figure


def _styles(rows: Iterable[str]) -> dict[str, dict[str, Any]]:
    pairs = zip(rows, cycle(ROW_COLOURS), cycle(ROW_MARKERS), strict=False)
    return {row: {"color": colour, "marker": marker} for row, colour, marker in pairs}
