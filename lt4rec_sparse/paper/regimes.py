"""Where sparse networks beat narrow dense ones: the same rows over simulated logs, each trained until it gains no more.

One regime is the middle; each other one differs from it in one thing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import read_json, write_whole
from lt4rec_sparse.paper import declared, figures
from lt4rec_sparse.paper.equal_time import CHOSEN, PRECISIONS, choices, chosen_table, curves_of, difference, measure
from lt4rec_sparse.paper.pages import Findings
from lt4rec_sparse.recsys.data import SimulatorConfig, prepare, simulate
from lt4rec_sparse.recsys.data.source import TRUTH
from lt4rec_sparse.recsys.harness.by_rows import few_steps
from lt4rec_sparse.recsys.harness.jobs import DATA, Job, check_executor, has_trained, laboratory, run_jobs
from lt4rec_sparse.recsys.harness.recovery import recovery
from lt4rec_sparse.recsys.harness.rows import BASE, S_WEIGHT_LAST, Rows
from lt4rec_sparse.recsys.harness.settings import locked
from lt4rec_sparse.recsys.harness.study import Progress, Resources, carrier, carry_out
from lt4rec_sparse.recsys.harness.trials import Training
from lt4rec_sparse.recsys.report import write_page
from lt4rec_sparse.recsys.tables import LEGEND, NOT_KNOWN, comparison_table, count, table

LOG = "log"
TRAINING = Training(hidden=(256, 128, 64), embedding_dim=8, epochs=20, patience=1, batch_size=512)
TASKS = {"ctr": "binary", "cvr": "ratio"}
WEIGHTS = ("weights", "s_weight")  # rows of single weights, which no budget chooses: the question is of blocks
FOUND = {"tickets of weights": S_WEIGHT_LAST, "tickets of 16x4": "tickets_4", "random weights": "weights_0.2"}


@dataclass(frozen=True)
class Regime:
    """A simulated log and the hidden widths of the networks on it.

    `planted_fields` are those of each kind, on each side: more of them share the same truth, so that each column says
    less. For the others see `SimulatorConfig`.
    """

    impressions: int = 60_000
    click_rate: float = 0.1
    conflict: float = 0.5
    planted_fields: int = 2
    hidden: tuple[int, ...] = TRAINING.hidden

    def config(self) -> SimulatorConfig:
        """Return the log: half of the truth is shared by the tasks, and four out of ten clicks are viewed long."""
        return SimulatorConfig(
            users=max(100, self.impressions // 20),
            videos=max(100, self.impressions // 100),
            impressions=self.impressions,
            click_rate=self.click_rate,
            watch_rate=0.4,
            conflict=self.conflict,
            planted_fields=self.planted_fields,
        )


def around(middle: Regime) -> dict[str, Regime]:
    """Return title -> regime: the middle, and those that differ from it in one thing."""
    narrow, wide = (tuple(max(1, int(factor * width)) for width in middle.hidden) for factor in (0.25, 4))
    changes: dict[str, dict[str, Any]] = {
        "middle": {},
        "a quarter of the rows": {"impressions": middle.impressions // 4},
        "twice the rows": {"impressions": 2 * middle.impressions},
        "2 % clicks": {"click_rate": 0.02},
        "41 % clicks": {"click_rate": 0.41},
        "no conflict": {"conflict": 0.0},
        "full conflict": {"conflict": 1.0},
        "one strong column of each kind": {"planted_fields": 1},
        "six weak columns of each kind": {"planted_fields": 6},
        "a quarter of the width": {"hidden": narrow},
        "four times the width": {"hidden": wide},
    }
    return {title: replace(middle, **change) for title, change in changes.items()}


def run_regimes(
    out: Path,
    seeds: int,
    regimes: Mapping[str, Regime] | None = None,
    training: Training = TRAINING,
    resources: Resources | None = None,
    progress: Progress = lambda stage, done, total: None,
    warn: Callable[[str], None] = lambda warning: None,
) -> Path:
    """Simulate a log per regime, train every row on each, time and judge what is served, and write the map.

    Each regime searches its learning rates itself. `out` then holds a folder per regime and `report.md`, whose path is
    returned, with its plots and `records.json`. All seeds of a regime train on the same log. For the other arguments
    see `run_experiment`; the hidden widths are the regime's own.
    """
    regimes, resources = regimes or around(Regime()), resources or Resources()
    check_executor(resources.workers, resources.executor)
    folders = {title: out / title.replace(" ", "_").replace("%", "percent") for title in regimes}
    with locked(out):
        logs = {folders[title]: Job(prepare_regime, (folders[title], r.config())) for title, r in regimes.items()}
        run_jobs(logs, resources.workers, resources.executor, partial(progress, "regimes: simulate"))
        (out / "plots").mkdir(exist_ok=True)
        results = []
        few = {}
        for title, folder in folders.items():
            few[title] = few_steps(laboratory(folder).batches(training) * training.epochs)
            if few[title]:
                warn(f"few steps: {title}: {few[title]}")
        for title, regime in regimes.items():
            folder = folders[title]
            study = carry_out(
                declared.regimes,
                Rows(tuple(TASKS), replace(training, hidden=regime.hidden)),
                seeds,
                laboratory(folder).prepared.schema,
                folder,
                carrier(folder, resources, progress, f"regimes, {title}"),
            )
            facts = {"experiment": "regimes", "tasks": TASKS, "seeds": seeds}
            known = {"title": title, "regime": asdict(regime), "few_steps": few[title]}
            results.append({**known, **_found(Findings(facts, study, folder))})
        named = {"rows": results[0]["rows"], "tasks": TASKS, "seeds": seeds, "training": asdict(training)}
        write_whole(out / "records.json", json.dumps({**named, "cells": results}, indent=1) + "\n")
        return write_page(_page(results, out), "regimes: simulated logs", out)


def prepare_regime(folder: Path, config: SimulatorConfig) -> None:
    """Simulate and prepare a regime's log, unless that is done; a folder with trials on another log is refused."""
    truth = folder / LOG / TRUTH
    if has_trained(folder) and read_json(truth, "config")["config"] != asdict(config):
        raise InputError(
            f"{folder}: got trials on another simulated log, wanted those of {config}; choose another --out"
        )
    simulate(config, folder / LOG)
    prepare(folder / LOG, folder / DATA)


def _found(findings: Findings) -> dict[str, Any]:
    """Return what was measured in a regime."""
    times, study = measure(findings), findings.study
    blocks = {row: title for row, title in curves_of(findings.rows).items() if not row.startswith(WEIGHTS)}
    chosen = {precision: choices(findings, blocks, times[precision], precision) for precision in PRECISIONS}
    for precision, of_precision in chosen.items():
        for choice in of_precision:
            if "differences" in choice:
                pair = choice["masked"], choice["dense"]
                found = {task: difference(findings, *pair, task, precision) for task in TASKS}
                choice["numbers"] = {task: [d.mean, d.error] for task, d in found.items()}
    lab = laboratory(findings.out)
    truth = read_json(findings.out / LOG / TRUTH)
    return {
        "counts": lab.prepared.counts,
        "truth": {name: value for name, value in truth.items() if name != "fields"},
        "rows": study.rows,
        "learning_rates": study.rates,
        "microseconds": times,
        "chosen": chosen,
        "recovery": [
            {"seed": seed, "way": way, **recovery(lab, study.trials[row, seed][0], truth["fields"])}
            for seed in range(findings.facts["seeds"])
            for way, row in FOUND.items()
        ],
        "records": findings.records,
    }


def _page(cells: Sequence[Mapping[str, Any]], folder: Path) -> str:
    parts = [
        "# Where do sparse networks beat narrow dense ones?",
        "Simulated logs whose truth is known, one per regime. Each regime differs from the middle in one thing. Every "
        "row of each searches its learning rates, and trains until the validation days gain no more.",
    ]
    budgets = {row: budget_title(row) for row in (choice["budget"] for choice in cells[0]["chosen"][PRECISIONS[0]])}
    for precision in PRECISIONS:
        figures.plot_regimes(cells, budgets, TASKS, precision, folder / "plots" / f"regimes_{precision}.png")
        caption = f"The chosen masked network against the chosen dense one in every regime, {precision}"
        parts.append(f"![{caption}](plots/regimes_{precision}.png)")
    parts += [CHOSEN, _regimes_table(cells, budgets), _recovery_table(cells), LEGEND]
    for cell in cells:
        truth = cell["truth"]
        parts.append(
            f"## {cell['title'].capitalize()}\n\n"
            f"{count(cell['counts']['train']['rows'], 'row')} to train on. The truth itself scores ctr AUC "
            f"{truth['ctr_auc']:.4f}, cvr MSE {truth['cvr_mse']:.5f}; a constant cvr MSE "
            f"{truth['constant']['cvr_mse']:.5f}." + (f"\n\n**Few steps**: {few}" if (few := cell["few_steps"]) else "")
        )
        for precision in PRECISIONS:
            text = chosen_table(cell["chosen"][precision], cell["rows"], list(TASKS))
            parts.append(f"Chosen on the validation days, {precision}:\n\n{text}")
        parts.append(comparison_table(cell["records"], cell["rows"], BASE, TASKS))
    return "\n\n".join(parts) + "\n"


def _regimes_table(cells: Sequence[Mapping[str, Any]], budgets: Mapping[str, str]) -> str:
    """Return, per precision and task, how the masked networks differ from the dense ones in every budget."""
    parts = []
    for precision in PRECISIONS:
        header = ["regime", *(f"time of {title}" for title in budgets.values())]
        for task in TASKS:
            lines = []
            for cell in cells:
                of_budget = {choice["budget"]: choice for choice in cell["chosen"][precision]}
                differences = (of_budget[budget].get("differences", {}).get(task, NOT_KNOWN) for budget in budgets)
                lines.append([cell["title"], *differences])
            parts.append(f"## {task}, {precision}: masked against dense\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def budget_title(row: str) -> str:
    """Return the words for the dense single-task row whose time is a budget."""
    return f"dense {row.rpartition('_')[2]}x" if row != BASE else "dense"


def _recovery_table(cells: Sequence[Mapping[str, Any]]) -> str:
    header = ["regime", "masks", *(f"{task}: AUC of columns" for task in TASKS)]
    header += ["co-owned: both need", "one needs", "none needs"]
    lines = []
    for cell in cells:
        for way in FOUND:
            found = [record for record in cell["recovery"] if record["way"] == way]
            line = [cell["title"], way, *(f"{fmean(record['auc'][task] for record in found):.3f}" for task in TASKS)]
            for part in ("shared", "private", "neither"):
                known = [record["sharing"][part] for record in found if record["sharing"][part] is not None]
                line.append(f"{fmean(known):.3f}" if known else NOT_KNOWN)
            lines.append(line)
    text = (
        "What the masks at 20 % found of the planted structure, in the first layer. AUC of columns: how well the "
        "number of weights that a column keeps tells whether the task depends on it (0.5 by chance). "
        "Co-owned: which share of the weights that either task keeps is kept by both."
    )
    return f"## Found and planted\n\n{text}\n\n{table(header, lines)}"
