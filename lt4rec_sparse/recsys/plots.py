"""Plots of trained models, for every report (tickets, ownership, latency), and the style that all figures share.

A record is one trained model, as the laboratory leaves it, with its row. A task has one colour in every figure with the
same `tasks` (name -> kind). Every plot writes its file, `path`, and returns the figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from lt4rec_sparse.recsys.metrics import HIGHER_IS_BETTER, MAIN_METRIC
from lt4rec_sparse.recsys.tables import Record, count

Point = tuple[Sequence[float], Sequence[float]]  # x and y of each seed

# A colour-blind safe order (Okabe and Ito); grey is for weights that no task owns.
TASK_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
SHARED, DEAD = "#56b4e9", "#d9d9d9"
THIN: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.5, "marker": "o", "markersize": 2.5}
CIRCLE: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 9, "mfc": "none", "color": "black", "zorder": 4}
PANEL_WIDTH, PANEL_HEIGHT = 4.6, 3.4  # inches; two panels side by side are as wide as a README

mpl.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130}


def plot_tickets(records: Sequence[Record], tasks: Mapping[str, str], path: Path) -> Figure:
    """Draw Figure 4: each task's validation metric against the hidden weights that remain; `records` are one per seed.

    A thin line per seed, a bold one for their mean, and a circle around the level that each seed chose.

    Source: LT4REC (arXiv 2008.09872), Figure 4.
    """
    figure, axes = panels(len(tasks))
    for axis, (task, kind), colour in zip(axes, tasks.items(), cycle(TASK_COLOURS), strict=False):
        points = ticket_points(records, task, kind)
        xs, ys = (np.array([point[i] for point in points]) for i in range(2))  # [levels, seeds]
        for seed, record in enumerate(records):
            names = ("one seed", "level chosen") if seed == 0 else ("", "")
            axis.plot(xs[:, seed], ys[:, seed], color=colour, label=names[0], **THIN)
            best = record["best_level"][task]
            axis.plot(xs[best, seed], ys[best, seed], label=names[1], **CIRCLE)
        mean = f"mean of {count(len(records), 'seed')}"
        axis.plot(xs.mean(1), ys.mean(1), color=colour, linewidth=2.6, zorder=3, label=mean)
        log_axis(axis, "hidden weights remaining, %")
        axis.invert_xaxis()
        metric_axis(axis, task, kind, "validation")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)
    return figure


def plot_ownership(records: Sequence[Record], titles: Mapping[str, str], path: Path) -> Figure:
    """Draw who owns the weights of each layer of the titled rows, as stacked bars: means over the seeds.

    Short black lines show where each seed's part ends.

    Source: LT4REC (arXiv 2008.09872), Figure 3, counted.
    """
    shares = {row: _shares([record for record in records if record["row"] == row]) for row in titles}
    owners = list(dict.fromkeys(owner for layers in shares.values() for share in layers.values() for owner in share))
    alone = [owner for owner in owners if owner not in ("shared", "dead")]
    colours = {"shared": SHARED, "dead": DEAD} | dict(zip(alone, cycle(TASK_COLOURS), strict=False))
    layers = sum(len(layers) for layers in shares.values())
    figure = Figure(figsize=(7.5, 0.9 + 0.45 * len(shares) + 0.34 * layers), layout="constrained")
    ratios = [len(layers) for layers in shares.values()]
    axes = figure.subplots(len(shares), 1, sharex=True, squeeze=False, height_ratios=ratios).ravel()
    for axis, (row, by_layer) in zip(axes, shares.items(), strict=True):
        for y, by_owner in enumerate(by_layer.values()):
            left: NDArray[np.float64] = np.zeros(1)
            for owner, share in by_owner.items():
                start, width = float(left.mean()), float(share.mean())
                axis.barh(y, width, left=start, color=colours[owner], height=0.76)
                if width >= 5:  # a narrower bar has no room for its number
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


def plot_latency(frozen: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], path: Path) -> Figure:
    """Draw the median time of a request against its candidates: sparse models and dense torch, whole and MLP alone.

    `frozen` is what `freeze_and_compare` found of each row, the served one first.
    """
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    paths = {"the whole request": ("dense", "sparse"), "the MLP alone": ("dense, MLP alone", "sparse, MLP alone")}
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (title, (dense, sparse)) in zip(axes, paths.items(), strict=True):
        lines = {"dense torch": (next(iter(frozen)), dense, "#555555")}
        lines |= {titles[row]: (row, sparse, colour) for row, colour in zip(frozen, TASK_COLOURS, strict=False)}
        for label, (row, name, colour) in lines.items():
            records = [record for record in frozen[row]["latency"] if record["path"] == name]
            sizes = [record["candidates"] for record in records]
            axis.plot(sizes, [r["median_us"] for r in records], color=colour, marker="o", label=label)
            low, high = ([r[key] for r in records] for key in ("p20_us", "p80_us"))
            axis.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_yscale("log")
        axis.set(xlabel="candidates per request", title=title)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="microseconds (median, p20 to p80)")
    axes[0].legend(frameon=False)
    figure.savefig(path)
    return figure


def standard_error(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Return the standard error of a mean; NaN for a single value, since one seed says nothing about noise."""
    return float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def ticket_points(records: Sequence[Record], task: str, kind: str) -> list[Point]:
    """Return kept weights in % and the validation metric of each level, over the seeds."""
    return [
        ([100 * ticket["density"] for ticket in level], [ticket["validation"][MAIN_METRIC[kind]] for ticket in level])
        for level in zip(*(record["tickets"][task] for record in records), strict=True)
    ]


def _shares(records: Sequence[Record]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return layer -> owner -> % of the layer's weights, over the seeds."""
    owned = [record["masks"]["ownership"] for record in records]
    return {
        layer: {
            owner: np.array([100 * seed[layer][owner] / sum(seed[layer].values()) for seed in owned])
            for owner in counts
        }
        for layer, counts in owned[0].items()
    }


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with at most two panels per line: more would be unreadable at the width of a page."""
    columns = min(count, 2)
    lines = -(-count // columns)
    width = PANEL_WIDTH * columns if columns > 1 else 6.0
    figure = Figure(figsize=(width, PANEL_HEIGHT * lines + 0.4), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    axes = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def metric_axis(axis: Axes, task: str, kind: str, split: str) -> None:
    """Label an axis with a task's main metric, and the panel with its better direction."""
    metric = MAIN_METRIC[kind]
    better = "higher" if HIGHER_IS_BETTER[metric] else "lower"
    axis.set(ylabel=f"{split} {metric.upper()}", title=f"{task} ({better} is better)")
    axis.ticklabel_format(axis="y", useOffset=False, style="plain")
    axis.grid(axis="y", alpha=0.3)


def log_axis(axis: Axes, label: str) -> None:
    """Make x logarithmic, with a tick at round numbers."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.minorticks_off()
    axis.set(xlabel=label)
