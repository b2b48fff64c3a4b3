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
from matplotlib.lines import Line2D

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.recsys.metrics import MAIN_METRIC
from lt4rec_sparse.recsys.plots import (
    DEAD,
    TASK_COLOURS,
    Point,
    Record,
    by_row,
    check_seeds,
    density_axis,
    masks_of,
    metric_axis,
    panels,
    standard_error,
    ticket_points,
)

# Five colours and seven markers have no common divisor: 35 rows differ before a pair comes again.
ROW_COLOURS = (*TASK_COLOURS, "#56b4e9", "#7f3c8d", "#555555")
ROW_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REGIME_OPPONENTS = {
    "hard_sharing": "hard sharing",
    "single_task": "single-task",
    "random": "random masks, scaled up",
}
WAYS = ("tickets", "random")  # the two origins of masks in `plot_recovery`
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
    records: Sequence[Record],
    titles: Mapping[str, str],
    tasks: Mapping[str, str],
    path: Path,
    split: str = "test",
) -> Figure:
    """Draw each task's metric against the density of its mask, one line per granularity.

    Args:
        records: One per row and seed; rows that are not in `titles` are left out.
        titles: Row -> the name of its line. Rows with one name, at several densities, are points of one line.
        tasks: Task -> kind, "binary" or "ratio".
        path: Where to write the picture.
        split: "test" for one point per row, from its masks, or "validation" for one per level of its tickets.

    Raises:
        InputError: If a row has no record, has a seed twice, or lacks what `split` needs; or if `split` is unknown.
    """
    if split not in ("test", "validation"):
        raise InputError(f"split: got {split!r}, wanted 'test' or 'validation'")
    rows = by_row(records, titles)
    styles = _styles(titles.values())
    figure, axes = panels(len(tasks))
    for axis, (task, kind) in zip(axes, tasks.items(), strict=False):
        lines: dict[str, list[Point]] = {title: [] for title in styles}
        for row, found in rows.items():
            points = ticket_points(found, task, kind) if split == "validation" else [_test_point(found, task, kind)]
            lines[titles[row]] += points
        for title, points in lines.items():
            colour, marker = styles[title]
            points.sort(key=lambda point: -float(np.mean(point[0])))
            for x, y in points:
                axis.plot(x, y, color=colour, **SEED_MARKS)
            mean_x, mean_y = ([float(np.mean(point[i])) for point in points] for i in range(2))
            errors = [standard_error(y) for _, y in points]
            axis.errorbar(mean_x, mean_y, errors, color=colour, marker=marker, markersize=6, capsize=3, label=title)
        density_axis(
            axis, [float(np.mean(x)) for points in lines.values() for x, _ in points], "hidden weights kept, %"
        )
        metric_axis(axis, task, kind, split)
    handles = [Line2D([], [], color=c, marker=m, markersize=6, label=title) for title, (c, m) in styles.items()]
    _legend(figure, handles, "dots: seeds; bars: standard error")
    figure.savefig(path)
    return figure


def plot_speed(
    records: Sequence[Record],
    titles: Mapping[str, str],
    tasks: Mapping[str, str],
    path: Path,
    candidates: int = 256,
) -> Figure:
    """Draw each task's test metric against the time of a request: one mark per row, hollow where the model is dense.

    Args:
        records: One per row and seed, with `serving`; rows that are not in `titles` are left out.
        titles: Row -> what the legend calls it; rows without masks are the dense baselines.
        tasks: Task -> kind, "binary" or "ratio".
        path: Where to write the picture.
        candidates: Candidates per request.

    Raises:
        InputError: If a row has no record, has a seed twice, or has no time for that many candidates.
    """
    rows = by_row(records, titles)
    styles = _styles(titles)
    dense = {row: found[0].get("masks") is None for row, found in rows.items()}
    times = {row: [_microseconds(record, candidates) for record in found] for row, found in rows.items()}
    figure, axes = panels(len(tasks))
    for axis, (task, kind) in zip(axes, tasks.items(), strict=False):
        for row, found in rows.items():
            colour, marker = styles[row]
            values = [_test_value(record, task, kind) for record in found]
            axis.plot(times[row], values, color=colour, **SEED_MARKS)
            axis.errorbar(
                float(np.mean(times[row])),
                float(np.mean(values)),
                standard_error(values),
                standard_error(times[row]),
                color=colour,
                marker=marker,
                markersize=9,
                markerfacecolor="white" if dense[row] else colour,
                capsize=3,
                label=titles[row],
            )
        _time_axis(axis, [value for found in times.values() for value in found])
        metric_axis(axis, task, kind, "test")
        axis.set(xlabel=f"microseconds per request of {candidates} candidates")
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=marker,
            color=colour,
            markerfacecolor="white" if dense[row] else colour,
            markersize=9,
            label=titles[row],
        )
        for row, (colour, marker) in styles.items()
    ]
    _legend(figure, handles, "filled: masked; hollow: dense; dots: seeds; bars: standard error")
    figure.savefig(path)
    return figure


def plot_regimes(cells: Sequence[Mapping[str, Any]], path: Path) -> Figure:
    """Draw where sparse sharing pays: its CVR MSE against other models over click rate and conflict.

    Args:
        cells: One per simulated log: `click_rate` and `conflict` of the simulator, and `differences`: for each of the
            other models (`REGIME_OPPONENTS`) a list over seeds of S-Weight's relative difference of CVR MSE in %, below
            0 if S-Weight is better.
        path: Where to write the picture.

    Raises:
        InputError: If there is no cell, or a cell comes twice.
    """
    rates, conflicts = (sorted({cell[name] for cell in cells}) for name in ("click_rate", "conflict"))
    where = [(conflicts.index(cell["conflict"]), rates.index(cell["click_rate"])) for cell in cells]
    if not cells or len(set(where)) < len(where):
        raise InputError(f"cells: got {len(where)}, {len(set(where))} of them distinct, wanted one per regime")
    panels = {}
    for other in cells[0]["differences"]:
        panels[other] = np.full((len(conflicts), len(rates)), np.nan)
        for place, cell in zip(where, cells, strict=True):
            panels[other][place] = np.mean(cell["differences"][other])
    limit = max(float(np.nanmax(np.abs(means))) for means in panels.values()) or 1.0
    size = (len(panels) * (0.72 * len(rates) + 0.4) + 1.4, 0.62 * len(conflicts) + 1.2)
    figure = Figure(figsize=(max(3.2 * len(panels) + 0.6, size[0]), max(2.8, size[1])), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False).ravel()
    for axis, (other, means) in zip(axes, panels.items(), strict=True):
        axis.set_facecolor(DEAD)  # shows where there is no cell
        image = axis.imshow(means, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
        for (y, x), cell in zip(where, cells, strict=True):
            ink = "white" if abs(means[y, x]) > 0.7 * limit else "black"
            text = _difference(cell["differences"][other])
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


def plot_recovery(found: Sequence[Mapping[str, Any]], planted: Mapping[str, Sequence[str]], path: Path) -> Figure:
    """Draw what share of each kind of field the masks keep, tickets beside random masks, against what was planted.

    Args:
        found: One per way and seed: `way` ("tickets" or "random"), `seed`, and `density`: task -> kind of field
            ("shared", "click-only", ...) -> kept share of the weights that read such fields, in [0, 1].
        planted: Task -> the kinds of field that its truth depends on; their names are bold.
        path: Where to write the picture.

    Raises:
        InputError: If a way is missing or unknown, or a seed comes twice.
    """
    by_way = {way: [record for record in found if record["way"] == way] for way in WAYS}
    if any(not records for records in by_way.values()) or sum(map(len, by_way.values())) < len(found):
        raise InputError(f"found: got the ways {sorted({record['way'] for record in found})}, wanted {sorted(WAYS)}")
    for way, records in by_way.items():
        check_seeds(records, way)
    figure, axes = panels(len(planted))
    for axis, (task, needed), colour in zip(axes, planted.items(), cycle(TASK_COLOURS), strict=False):
        kinds = list(found[0]["density"][task])
        width = 0.4
        for side, (way, records) in enumerate(by_way.items()):
            values = 100 * np.array([[record["density"][task][kind] for kind in kinds] for record in records])
            x = np.arange(len(kinds)) + (side - 0.5) * width
            axis.bar(x, values.mean(0), width * 0.94, color=colour if way == WAYS[0] else DEAD, label=way)
            errors = [standard_error(column) for column in values.T]
            axis.errorbar(x, values.mean(0), errors, linestyle="", color="black", capsize=3)
            for place, value in zip(np.linspace(-0.3, 0.3, len(records) + 2)[1:-1], values, strict=True):
                axis.plot(x + place * width, value, "o", color="black", markersize=3, alpha=0.5, markeredgewidth=0)
        axis.set_xticks(range(len(kinds)), kinds)
        for label, kind in zip(axis.get_xticklabels(), kinds, strict=True):
            label.set_fontweight("bold" if kind in needed else "normal")
        axis.tick_params(axis="x", length=0)
        axis.set_ylim(bottom=0)
        axis.set(ylabel="weights kept, % (dots: seeds)", xlabel="kind of field (bold: planted for the task)")
        axis.set_title(task, loc="left")
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderpad=0)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    figure.savefig(path)
    return figure


def _test_point(records: Sequence[Record], task: str, kind: str) -> Point:
    """Return kept weights in % and the test metric of one row, over the seeds."""
    densities = [100 * masks_of(record)["density"][task] for record in records]
    return densities, [_test_value(record, task, kind) for record in records]


def _test_value(record: Record, task: str, kind: str) -> float:
    return float(record["test"]["all"][task][MAIN_METRIC[kind]])


def _microseconds(record: Record, candidates: int) -> float:
    times = (record.get("serving") or {}).get("microseconds", {})
    if str(candidates) not in times:
        name = f"serving of {record['row']}, seed {record['seed']}"
        raise InputError(f"{name}: got times of {sorted(times)} candidates, wanted {candidates}")
    return float(times[str(candidates)])


def _time_axis(axis: Axes, microseconds: Sequence[float]) -> None:
    low, high = min(microseconds) / 1.25, max(microseconds) * 1.25
    ticks = _round_ticks(low, high)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.minorticks_off()


def _round_ticks(low: float, high: float) -> list[float]:
    """Return round numbers for a logarithmic axis; a wider axis gets fewer per decade."""
    steps = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 8 else (1, 2, 5) if high / low < 300 else (1,)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [tick for decade in decades for step in steps if low <= (tick := step * 10.0**decade) <= high]


def _styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    return dict(zip(dict.fromkeys(names), zip(cycle(ROW_COLOURS), cycle(ROW_MARKERS), strict=False), strict=False))


def _legend(figure: Figure, handles: Sequence[Line2D], title: str) -> None:
    """Put a legend below the panels, in as many columns as fit, and make the figure higher to hold it."""
    width, height = figure.get_size_inches()
    longest = max(len(str(handle.get_label())) for handle in handles)
    # Inches: 0.07 per character, 0.6 for the marker and the gap between columns, 0.21 per line.
    columns = max(1, min(4, len(handles), int(width / (0.07 * longest + 0.6))))
    figure.set_size_inches(width, height + 0.21 * -(-len(handles) // columns))
    figure.legend(handles=handles, title=title, loc="outside lower center", ncols=columns, frameon=False)


def _difference(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):+.1f}"
    return f"{mean}\n± {standard_error(values):.1f} %" if len(values) > 1 else f"{mean} %"
