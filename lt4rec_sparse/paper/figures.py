"""The paper's figures, and those that explain its tables, from the records of trials.

A record is one trained model: its row, its seed, its metrics by split, slice and task, and where it has them its masks,
tickets and serving times. A row has one colour and marker, a task one colour, in every figure that takes the same
`titles` or `tasks`. Means are over the seeds, error bars are standard errors, dots are the seeds themselves.
Every function writes its file and returns the figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.recsys.harness.arms import HARD, HIGHER_IS_BETTER, MAIN_METRIC, SINGLE, TITLES
from lt4rec_sparse.recsys.plots import DEAD, SHARED, TASK_COLOURS

Record = Mapping[str, Any]
Point = tuple[Sequence[float], Sequence[float]]  # x and y of each seed

# Five colours and seven markers have no common divisor: 35 rows differ before a pair comes again.
ROW_COLOURS = (*TASK_COLOURS, "#56b4e9", "#7f3c8d", "#555555")
ROW_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REGIME_OPPONENTS = {HARD: TITLES[HARD], SINGLE: TITLES[SINGLE], "random": "random masks, scaled up"}
WAYS = ("tickets", "random")  # how the masks of `plot_recovery` came about
# A single seed, in its row's colour; the black edge shows it within the mark of the mean too.
SEED_MARKS: dict[str, Any] = {
    "linestyle": "",
    "marker": "o",
    "markersize": 3.5,
    "markeredgecolor": "black",
    "markeredgewidth": 0.7,
    "zorder": 4,
}
PANEL_WIDTH, PANEL_HEIGHT = 4.6, 3.4  # inches; two panels side by side are as wide as a README


def plot_figure4(records: Sequence[Record], tasks: Mapping[str, str], path: Path) -> Figure:
    """Draw Figure 4: each task's validation metric against the hidden weights that remain.

    A thin line a seed, a bold one for their mean, a circle around the level that each seed chose.

    Args:
        records: One a seed, with `tickets` and `best_level`.
        tasks: Task -> kind, "binary" or "ratio".
        path: Of the picture.

    Raises:
        InputError: If a seed comes twice, has no tickets, or has other levels than the first.

    Source: LT4REC (arXiv 2008.09872), Figure 4.
    """
    _check_seeds(records, "records")
    figure, axes = _panels(len(tasks))
    for axis, (task, kind), colour in zip(axes, tasks.items(), cycle(TASK_COLOURS), strict=False):
        points = _ticket_points(records, task, kind)
        xs, ys = (np.array([point[i] for point in points]) for i in range(2))  # [levels, seeds]
        for seed, record in enumerate(records):
            axis.plot(xs[:, seed], ys[:, seed], color=colour, linewidth=0.9, alpha=0.5, marker="o", markersize=2.5)
            best = record["best_level"][task]
            axis.plot(
                xs[best, seed], ys[best, seed], "o", markersize=9, markerfacecolor="none", color="black", zorder=4
            )
        axis.plot(xs.mean(1), ys.mean(1), color=colour, linewidth=2.6, zorder=3)
        _density_axis(axis, xs.mean(1), "hidden weights remaining, %")
        _metric_axis(axis, task, kind, "validation")
    handles = [
        Line2D([], [], color="#555555", linewidth=0.9, marker="o", markersize=2.5, label="one seed"),
        Line2D([], [], color="#555555", linewidth=2.6, label=f"mean of {_seeds(len(records))}"),
        Line2D(
            [], [], color="black", linestyle="", marker="o", markersize=9, markerfacecolor="none", label="level chosen"
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)
    return figure


def plot_granularity(
    records: Sequence[Record],
    titles: Mapping[str, str],
    tasks: Mapping[str, str],
    path: Path,
    split: str = "test",
) -> Figure:
    """Draw each task's metric against the density of its mask, a line a granularity.

    Args:
        records: One a row and seed; rows that are not in `titles` are left out.
        titles: Row -> the name of its line. Rows of one name, at several densities, are points of one line.
        tasks: Task -> kind, "binary" or "ratio".
        path: Of the picture.
        split: "test" for a point a row, from its masks, or "validation" for a point a level of its tickets.

    Raises:
        InputError: If a row has no record, a seed twice, or not what `split` asks of it; if `split` is another.
    """
    if split not in ("test", "validation"):
        raise InputError(f"split: got {split!r}, wanted 'test' or 'validation'")
    rows = _by_row(records, titles)
    styles = _styles(titles.values())
    figure, axes = _panels(len(tasks))
    for axis, (task, kind) in zip(axes, tasks.items(), strict=False):
        lines: dict[str, list[Point]] = {title: [] for title in styles}
        for row, found in rows.items():
            points = _ticket_points(found, task, kind) if split == "validation" else [_test_point(found, task, kind)]
            lines[titles[row]] += points
        for title, points in lines.items():
            colour, marker = styles[title]
            points.sort(key=lambda point: -float(np.mean(point[0])))
            for x, y in points:
                axis.plot(x, y, color=colour, **SEED_MARKS)
            mean_x, mean_y = ([float(np.mean(point[i])) for point in points] for i in range(2))
            errors = [standard_error(y) for _, y in points]
            axis.errorbar(mean_x, mean_y, errors, color=colour, marker=marker, markersize=6, capsize=3, label=title)
        _density_axis(
            axis, [float(np.mean(x)) for points in lines.values() for x, _ in points], "hidden weights kept, %"
        )
        _metric_axis(axis, task, kind, split)
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
    """Draw each task's test metric against the time of a request: a mark a row, hollow where the model is dense.

    Args:
        records: One a row and seed, with `serving`; rows that are not in `titles` are left out.
        titles: Row -> what the legend calls it; rows without masks are the dense baselines.
        tasks: Task -> kind, "binary" or "ratio".
        path: Of the picture.
        candidates: Of a request.

    Raises:
        InputError: If a row has no record, a seed twice, or no time for so many candidates.
    """
    rows = _by_row(records, titles)
    styles = _styles(titles)
    dense = {row: found[0].get("masks") is None for row, found in rows.items()}
    times = {row: [_microseconds(record, candidates) for record in found] for row, found in rows.items()}
    figure, axes = _panels(len(tasks))
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
        _metric_axis(axis, task, kind, "test")
        axis.set(xlabel=f"microseconds a request of {candidates} candidates")
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


def plot_overlap(records: Sequence[Record], titles: Mapping[str, str], path: Path) -> Figure:
    """Draw who owns the weights of each layer, as stacked bars: a group a row, a bar a layer, means over the seeds.

    A short black line stands where one seed's part ends, for every seed.

    Args:
        records: One a row and seed, with `masks`; rows that are not in `titles` are left out.
        titles: Row -> the headline of its bars.
        path: Of the picture.

    Raises:
        InputError: If a row has no record, a seed twice, or no masks.

    Source: LT4REC (arXiv 2008.09872), Figure 3, counted.
    """
    rows = _by_row(records, titles)
    shares = {row: _shares(found) for row, found in rows.items()}
    owners = list(dict.fromkeys(owner for layers in shares.values() for share in layers.values() for owner in share))
    alone = [owner for owner in owners if owner not in ("shared", "dead")]
    colours = {"shared": SHARED, "dead": DEAD} | dict(zip(alone, cycle(TASK_COLOURS), strict=False))
    layers = sum(len(layers) for layers in shares.values())
    figure = Figure(figsize=(7.5, 0.9 + 0.45 * len(rows) + 0.34 * layers), layout="constrained")
    ratios = [len(layers) for layers in shares.values()]
    axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=ratios).ravel()
    for axis, (row, by_layer) in zip(axes, shares.items(), strict=True):
        for y, by_owner in enumerate(by_layer.values()):
            left: NDArray[np.float64] = np.zeros(len(rows[row]))
            for owner, share in by_owner.items():
                start, width = float(left.mean()), float(share.mean())
                axis.barh(y, width, left=start, color=colours[owner], height=0.76)
                if width >= 5:  # less has no room for its number
                    axis.text(start + width / 2, y, f"{width:.0f}", ha="center", va="center", fontsize=9)
                left = left + share
                if len(left) > 1:
                    inner = left[(left > 0) & (left < 100 - 1e-9)]
                    axis.vlines(inner, y + 0.2, y + 0.38, color="black", linewidth=0.8)
        axis.set_yticks(range(len(by_layer)), [name.replace("layers.", "layer ") for name in by_layer])
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_title(titles[row], loc="left", fontsize=10)
    axes[-1].set(xlabel="% of the layer's weights (short lines: where each seed's part ends)")
    handles = [mpl.patches.Patch(color=colours[owner], label=owner) for owner in owners]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(6, len(owners)), frameon=False)
    figure.savefig(path)
    return figure


def plot_regimes(cells: Sequence[Mapping[str, Any]], path: Path) -> Figure:
    """Draw where sparse sharing pays: its CVR MSE against other models over click rate and conflict.

    Args:
        cells: One a simulated log: `click_rate` and `conflict` of the simulator, and `differences`, for each of the
            same other models (`REGIME_OPPONENTS`) a list over seeds: relative difference of S-Weight's CVR MSE in %,
            below 0 if S-Weight is better.
        path: Of the picture.

    Raises:
        InputError: If there is no cell, or one comes twice.
    """
    rates, conflicts = (sorted({cell[name] for cell in cells}) for name in ("click_rate", "conflict"))
    where = [(conflicts.index(cell["conflict"]), rates.index(cell["click_rate"])) for cell in cells]
    if not cells or len(set(where)) < len(where):
        raise InputError(f"cells: got {len(where)}, {len(set(where))} of them distinct, wanted one a regime")
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
    """Draw what masks keep of each kind of field against what was planted: tickets beside random masks.

    Args:
        found: One a way and seed: `way` ("tickets" or "random"), `seed`, and `density`: task -> kind of field
            ("shared", "click-only", ...) -> kept share of the weights that read such fields, in [0, 1].
        planted: Task -> the kinds of field that its truth depends on. Their names are bold.
        path: Of the picture.

    Raises:
        InputError: If a way is missing or another, or a seed comes twice.
    """
    by_way = {way: [record for record in found if record["way"] == way] for way in WAYS}
    if any(not records for records in by_way.values()) or sum(map(len, by_way.values())) < len(found):
        raise InputError(f"found: got the ways {sorted({record['way'] for record in found})}, wanted {sorted(WAYS)}")
    for way, records in by_way.items():
        _check_seeds(records, way)
    figure, axes = _panels(len(planted))
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


def standard_error(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Return the standard error of a mean, NaN for a single value: one seed says nothing of its noise."""
    return float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def _check_seeds(records: Sequence[Record], name: str) -> None:
    seeds = [record["seed"] for record in records]
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"{name}: got the seeds {seeds}, wanted each once and at least one")


def _by_row(records: Sequence[Record], titles: Mapping[str, str]) -> dict[str, list[Record]]:
    """Return the records of each titled row; no row may be missing, or a figure would drop it in silence."""
    rows = {row: [record for record in records if record["row"] == row] for row in titles}
    for row, found in rows.items():
        _check_seeds(found, row)
    return rows


def _ticket_points(records: Sequence[Record], task: str, kind: str) -> list[Point]:
    """Return kept weights in % and the validation metric of each level, over the seeds."""
    curves = []
    for record in records:
        if not record.get("tickets"):
            raise InputError(f"tickets of {record['row']}, seed {record['seed']}: got none, wanted {task!r}")
        curves.append(record["tickets"][task])
    if len({len(curve) for curve in curves}) > 1:
        raise InputError(f"tickets of {task!r}: got {[len(curve) for curve in curves]} levels, wanted as many a seed")
    metric = MAIN_METRIC[kind]
    return [
        ([100 * ticket["density"] for ticket in level], [ticket["validation"][metric] for ticket in level])
        for level in zip(*curves, strict=True)
    ]


def _test_point(records: Sequence[Record], task: str, kind: str) -> Point:
    """Return kept weights in % and the test metric of one row, over the seeds."""
    densities = [100 * _masks(record)["density"][task] for record in records]
    return densities, [_test_value(record, task, kind) for record in records]


def _test_value(record: Record, task: str, kind: str) -> float:
    return float(record["test"]["all"][task][MAIN_METRIC[kind]])


def _masks(record: Record) -> Mapping[str, Any]:
    masks: Mapping[str, Any] | None = record.get("masks")
    if masks is None:
        raise InputError(f"masks of {record['row']}, seed {record['seed']}: got none, wanted a masked model")
    return masks


def _microseconds(record: Record, candidates: int) -> float:
    times = (record.get("serving") or {}).get("microseconds", {})
    if str(candidates) not in times:
        name = f"serving of {record['row']}, seed {record['seed']}"
        raise InputError(f"{name}: got times of {sorted(times)} candidates, wanted {candidates}")
    return float(times[str(candidates)])


def _shares(records: Sequence[Record]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return layer -> owner -> % of the layer's weights, over the seeds."""
    owned = [_masks(record)["ownership"] for record in records]
    return {
        layer: {
            owner: np.array([100 * seed[layer][owner] / sum(seed[layer].values()) for seed in owned])
            for owner in counts
        }
        for layer, counts in owned[0].items()
    }


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure of at most two panels a line: more would be unreadable at the width of a page."""
    columns = min(count, 2)
    lines = -(-count // columns)
    width = PANEL_WIDTH * columns if columns > 1 else 6.0
    figure = Figure(figsize=(width, PANEL_HEIGHT * lines + 0.4), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    axes = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _metric_axis(axis: Axes, task: str, kind: str, split: str) -> None:
    metric = MAIN_METRIC[kind]
    better = "higher" if HIGHER_IS_BETTER[metric] else "lower"
    axis.set(ylabel=f"{split} {metric.upper()}", title=f"{task} ({better} is better)")
    axis.ticklabel_format(axis="y", useOffset=False, style="plain")
    axis.grid(axis="y", alpha=0.3)


def _density_axis(axis: Axes, percents: Iterable[float], label: str) -> None:
    """Make x logarithmic, from dense to sparse, with a tick at each density that has room for one."""
    ticks: list[float] = []
    ordered = sorted(percents, reverse=True)
    room = 0.09 * np.log(ordered[0] / ordered[-1])  # a label takes about 8 % of a panel
    for percent in ordered:
        if not ticks or np.log(ticks[-1] / percent) > room:
            ticks.append(percent)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:.0f}" if tick >= 10 else f"{tick:.2g}" for tick in ticks])
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.set(xlabel=label)


def _time_axis(axis: Axes, microseconds: Sequence[float]) -> None:
    low, high = min(microseconds) / 1.25, max(microseconds) * 1.25
    ticks = _round_ticks(low, high)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.minorticks_off()


def _round_ticks(low: float, high: float) -> list[float]:
    """Return the round numbers of a logarithmic axis, the fewer in a decade the wider it is."""
    steps = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 8 else (1, 2, 5) if high / low < 300 else (1,)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [tick for decade in decades for step in steps if low <= (tick := step * 10.0**decade) <= high]


def _styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    return dict(zip(dict.fromkeys(names), zip(cycle(ROW_COLOURS), cycle(ROW_MARKERS), strict=False), strict=False))


def _legend(figure: Figure, handles: Sequence[Line2D], title: str) -> None:
    """Put a legend below the panels, in as many columns as there is room for, and make the figure higher by it."""
    width, height = figure.get_size_inches()
    longest = max(len(str(handle.get_label())) for handle in handles)
    # Inches: 0.07 a character, 0.6 for the marker and what is between two columns, 0.21 a line.
    columns = max(1, min(4, len(handles), int(width / (0.07 * longest + 0.6))))
    figure.set_size_inches(width, height + 0.21 * -(-len(handles) // columns))
    figure.legend(handles=handles, title=title, loc="outside lower center", ncols=columns, frameon=False)


def _difference(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):+.1f}"
    return f"{mean}\n± {standard_error(values):.1f} %" if len(values) > 1 else f"{mean} %"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"
