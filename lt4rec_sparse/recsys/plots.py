"""The report's pictures. Colours follow the entity: a task has one colour everywhere."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from lt4rec_sparse.recsys.harness.arms import MAIN_METRIC, TITLES

# A colour-blind safe order (Okabe and Ito); grey is what no task owns.
TASK_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
SHARED, DEAD = "#56b4e9", "#d9d9d9"

mpl.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130}


def plot_tickets(results: dict[str, Any], path: Path) -> None:
    """Figure 4: each task's validation metric against the share of weights that remain, a line a seed."""
    kinds = results["data"]["tasks"]
    figure = Figure(figsize=(4.6 * len(kinds), 3.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(kinds)))
    for axis, (task, kind), colour in zip(axes, kinds.items(), cycle(TASK_COLOURS), strict=False):
        metric = MAIN_METRIC[kind]
        for seed in results["seeds"]:
            curve = seed["tickets"][task]
            x = [100 * ticket["density"] for ticket in curve]
            y = [ticket["validation"][metric] for ticket in curve]
            axis.plot(x, y, marker="o", color=colour, alpha=0.8, linewidth=1.5, markersize=4)
            best = seed["best_level"][task]
            axis.plot(x[best], y[best], marker="o", markersize=10, markerfacecolor="none", color="black")
        axis.set_xscale("log")
        axis.set_xticks(x, [f"{value:.0f}" for value in x], minor=False)
        axis.minorticks_off()
        axis.invert_xaxis()
        better = "higher" if metric == "auc" else "lower"
        axis.set(
            xlabel="hidden weights remaining, %",
            ylabel=f"validation {metric.upper()}",
            title=f"{task} ({better} is better)",
        )
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path)


def plot_ownership(results: dict[str, Any], path: Path) -> None:
    """Figure 3, counted: who owns the weights of each layer, as stacked bars."""
    layers = next(iter(results["frozen"].values()))["ownership"]
    owners = list(next(iter(layers.values())))
    colours = {"shared": SHARED, "dead": DEAD}
    tasks = zip(results["data"]["tasks"], cycle(TASK_COLOURS), strict=False)
    colours |= {f"{task} only": colour for task, colour in tasks}
    figure = Figure(figsize=(7.5, 0.7 + 0.5 * len(layers) + 0.2 * -(-len(owners) // 4)), layout="constrained")
    axis = figure.subplots()
    names = [f"{name.replace('layers.', 'layer ')}\n{sum(c.values()):,} weights" for name, c in layers.items()]
    left = np.zeros(len(layers))
    for owner in owners:
        share = np.array([100 * counts[owner] / sum(counts.values()) for counts in layers.values()])
        axis.barh(names, share, left=left, color=colours[owner], label=owner, height=0.65)
        for y, (start, width) in enumerate(zip(left, share, strict=True)):
            if width >= 5:
                axis.text(start + width / 2, y, f"{width:.0f}", ha="center", va="center", fontsize=9)
        left += share
    axis.invert_yaxis()
    axis.set(xlabel="% of the layer's weights", xlim=(0, 100))
    axis.legend(ncols=min(4, len(owners)), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path)


def plot_latency(results: dict[str, Any], path: Path) -> None:
    """Median time of a request against its candidates: each sparse model and dense, whole and MLP alone."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    paths = {"the whole request": ("dense", "sparse"), "the MLP alone": ("dense, MLP alone", "sparse, MLP alone")}
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (title, (dense, sparse)) in zip(axes, paths.items(), strict=True):
        frozen = list(results["frozen"])
        lines = {"dense torch": (frozen[0], dense, "#555555")}
        lines |= {TITLES[arm]: (arm, sparse, c) for arm, c in zip(frozen, TASK_COLOURS, strict=False)}
        for label, (arm, name, colour) in lines.items():
            records = [record for record in results["frozen"][arm]["latency"] if record["path"] == name]
            sizes = [record["candidates"] for record in records]
            axis.plot(sizes, [r["median_us"] for r in records], color=colour, marker="o", label=label)
            low, high = ([r[key] for r in records] for key in ("p20_us", "p80_us"))
            axis.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_yscale("log")
        axis.set(xlabel="candidates a request", title=title)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="microseconds (median, p20 to p80)")
    axes[0].legend(frameon=False)
    figure.savefig(path)
