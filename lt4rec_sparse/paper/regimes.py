"""When sparse sharing pays: the same models over simulated logs, whose truth and conflict are known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import write_whole
from lt4rec_sparse.paper import figures
from lt4rec_sparse.recsys.data import SimulatorConfig, prepare, simulate
from lt4rec_sparse.recsys.data.simulator import TRUTH
from lt4rec_sparse.recsys.harness.jobs import DATA, Job, has_trained, laboratory, run_jobs
from lt4rec_sparse.recsys.harness.recovery import recovery
from lt4rec_sparse.recsys.harness.rows import BASE, HARD, RANDOM_RESCALED, S_WEIGHT, S_WEIGHT_LAST, Rows
from lt4rec_sparse.recsys.harness.settings import locked
from lt4rec_sparse.recsys.harness.statistics import paired_difference
from lt4rec_sparse.recsys.harness.study import Progress, Resources, carrier, carry_out, train_all
from lt4rec_sparse.recsys.harness.trials import Training
from lt4rec_sparse.recsys.report import write_page
from lt4rec_sparse.recsys.tables import LEGEND, NOT_KNOWN, comparison_table, table, values_of

LOG = "log"
MIDDLE = (0.1, 0.5)  # where learning rates are searched, for all cells
TRAINING = Training(hidden=(128, 64, 32), embedding_dim=8, batch_size=2048)
TASKS = ("ctr", "cvr")
OPPONENTS = {"hard_sharing": HARD, "single_task": BASE, "random": RANDOM_RESCALED}


@dataclass(frozen=True)
class Regimes:
    """Size of the map of regimes: rows of each log, and how every row trains, except for its learning rates.

    Cells differ in their share of clicks (fewer leave less to learn watching from) and in how much the tasks oppose
    each other on what both depend on.
    """

    impressions: int = 2_000_000
    # Four out of ten clicked, as in the paper's log; and fewer, down to its conversions.
    click_rates: tuple[float, ...] = (0.02, 0.1, 0.41)
    conflicts: tuple[float, ...] = (0.0, 0.5, 1.0)
    training: Training = TRAINING

    def config(self, click_rate: float, conflict: float) -> SimulatorConfig:
        """Return a cell's log: two planted fields of each kind on each side; half of the truth is shared."""
        return SimulatorConfig(
            users=max(100, self.impressions // 20),
            videos=max(100, self.impressions // 100),
            impressions=self.impressions,
            click_rate=click_rate,
            watch_rate=0.4,
            conflict=conflict,
            planted_fields=2,
        )


def run_regimes(
    out: Path,
    seeds: int,
    regimes: Regimes | None = None,
    resources: Resources | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Path:
    """Simulate a log per cell, train every row on each, and write the map and how much of the truth the masks found.

    Learning rates are searched in the middle cell, for each row alike, and used in all cells. `out` then holds a folder
    per cell, `tuning.json`, and `report.md`, whose path is returned, with its plots and `records.json`. All seeds of a
    cell train on the same log. For the other arguments see `run_experiment`.
    """
    regimes, resources = regimes or Regimes(), resources or Resources()
    cells = {
        cell: out / f"click_{cell[0]}-conflict_{cell[1]}" for cell in product(regimes.click_rates, regimes.conflicts)
    }
    middle = cells.get(MIDDLE, next(iter(cells.values())))
    with locked(out):
        logs = {folder: Job(prepare_cell, (folder, regimes.config(*cell))) for cell, folder in cells.items()}
        run_jobs(logs, resources.workers, resources.executor, partial(progress, "regimes: simulate"))
        study = carry_out(
            lambda rows: [rows.base(), rows.hard(), *rows.tickets(), rows.random()[1]],
            Rows(TASKS, regimes.training),
            seeds,
            laboratory(middle).prepared.schema,
            out,
            carrier(middle, resources, progress, "regimes"),
        )
        results = []
        for (click_rate, conflict), folder in cells.items():
            name = f"regimes, clicks {click_rate:.0%}, conflict {conflict:g}"
            records = train_all(study.trials, carrier(folder, resources, progress, name))
            truth = json.loads((folder / LOG / TRUTH).read_text(encoding="utf-8"))
            lab = laboratory(folder)
            recovered = [
                {"seed": seed, "way": way, **recovery(lab, study.trials[key, seed][0], truth["fields"])}
                for seed in range(seeds)
                for way, key in (("tickets", S_WEIGHT_LAST), ("random", RANDOM_RESCALED))
            ]
            results.append(
                {
                    "click_rate": click_rate,
                    "conflict": conflict,
                    "counts": lab.prepared.counts,
                    "truth": {name: value for name, value in truth.items() if name != "fields"},
                    "differences": _differences(records),
                    "recovery": recovered,
                    "records": records,
                }
            )
        (out / "plots").mkdir(exist_ok=True)
        facts = {"rows": study.rows, "seeds": seeds, "learning_rates": study.rates}
        write_whole(out / "records.json", json.dumps({**facts, "cells": results}, indent=1) + "\n")
        return write_page(_page(results, study.rows, out), "regimes: simulated logs", out)


def prepare_cell(folder: Path, config: SimulatorConfig) -> None:
    """Simulate and prepare a cell's log, unless that is done already; a folder with trials on another is refused."""
    truth = folder / LOG / TRUTH
    if has_trained(folder) and json.loads(truth.read_text(encoding="utf-8"))["config"] != asdict(config):
        raise InputError(
            f"{folder}: got trials on another simulated log, wanted those of {config}; choose another --out"
        )
    simulate(config, folder / LOG)
    prepare(folder / LOG, folder / DATA)


def _differences(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return how S-Weight's CVR MSE differs from the other rows', in percent, one number per seed."""
    mse = {name: values_of(records, row, "cvr", "mse") for name, row in {"mine": S_WEIGHT, **OPPONENTS}.items()}
    return {
        name: [paired_difference({s: mine}, {s: mse[name][s]}, relative=True).mean for s, mine in mse["mine"].items()]
        for name in OPPONENTS
    }


def _page(cells: Sequence[Mapping[str, Any]], titles: Mapping[str, str], folder: Path) -> str:
    figures.plot_regimes(cells, folder / "plots" / "regimes.png")
    parts = [
        "# When does sparse sharing pay?",
        "Simulated logs whose truth is known, one per cell. Cells differ in how many impressions are clicked (fewer "
        "clicks leave less to learn watching from) and in how much the two tasks oppose each other on what both "
        "depend on.",
        "![CVR MSE of S-Weight against hard sharing, single-task and random masks](plots/regimes.png)",
        _recovery_table(cells),
        LEGEND,
    ]
    for cell in cells:
        truth = cell["truth"]
        parts.append(
            f"## Clicks {cell['click_rate']:.0%}, conflict {cell['conflict']:g}\n\n"
            f"The truth itself scores ctr AUC {truth['ctr_auc']:.4f}, cvr MSE {truth['cvr_mse']:.5f}; a constant "
            f"cvr MSE {truth['constant']['cvr_mse']:.5f}.\n\n"
            + comparison_table(cell["records"], titles, BASE, {"ctr": "binary", "cvr": "ratio"})
        )
    return "\n\n".join(parts) + "\n"


def _recovery_table(cells: Sequence[Mapping[str, Any]]) -> str:
    header = ["clicks", "conflict", "masks", *(f"{task}: AUC of columns" for task in TASKS)]
    header += ["co-owned: both need", "one needs", "none needs"]
    lines = []
    for cell in cells:
        for way in ("tickets", "random"):
            found = [record for record in cell["recovery"] if record["way"] == way]
            line = [f"{cell['click_rate']:.0%}", f"{cell['conflict']:g}", way]
            line += [f"{fmean(record['auc'][task] for record in found):.3f}" for task in TASKS]
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
