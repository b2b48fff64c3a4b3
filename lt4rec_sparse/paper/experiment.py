"""An experiment from a log to its tables: prepare, tune every row alike, train all seeds side by side, write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import write_whole
from lt4rec_sparse.paper import declared, pages
from lt4rec_sparse.paper.declared import BASE, Row, Rows, Variants
from lt4rec_sparse.paper.tuning import tuned_rates
from lt4rec_sparse.recsys.data import Prepared, open_source, prepare
from lt4rec_sparse.recsys.harness.grid import run_jobs
from lt4rec_sparse.recsys.harness.jobs import DATA, has_trained, jobs_of
from lt4rec_sparse.recsys.harness.trials import Training, Trial

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Experiment:
    """What one experiment is made of.

    Attributes:
        rows: Makes its rows.
        write: Writes its page from the records of all rows and seeds.
        all_tasks: Whether it trains every task of the log, those that are left out elsewhere too.
        carried: Columns that it reads beside the features.
        kinds: Of the tasks that it is about, in their order; empty if it is about any.
        most_tasks: With more, masks of which nothing is co-owned do not fit into a layer.
    """

    rows: Callable[[Rows], list[Row]]
    write: Callable[[pages.Findings], str]
    all_tasks: bool = False
    carried: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    most_tasks: int = 62


CLICK_AND_WATCH = ("binary", "ratio")
VIEWS = ("play_time_ms", "duration_ms", "time_ms")
EXPERIMENTS = {
    "table2": Experiment(declared.table2, pages.table2, carried=("duration_ms",), kinds=CLICK_AND_WATCH),
    "table3": Experiment(declared.table3, pages.table3, carried=VIEWS, kinds=CLICK_AND_WATCH),
    "figure4": Experiment(declared.figure4, pages.figure4),
    "granularity": Experiment(declared.granularity, pages.granularity),
    "cheap": Experiment(declared.cheap, pages.cheap),
    "tickets": Experiment(declared.tickets, pages.tickets, most_tasks=4),
    "tasks": Experiment(declared.many_tasks, pages.many_tasks, all_tasks=True),
}


@dataclass(frozen=True)
class Resources:
    """What an experiment may use.

    Attributes:
        workers: Processes; None for one a core.
        executor: One of `grid.EXECUTORS`.
    """

    workers: int | None = None
    executor: str = "processes"


def run_experiment(
    name: str,
    data: Path,
    out: Path,
    seeds: int,
    training: Training | None = None,
    resources: Resources | None = None,
    progress: Progress = lambda stage, done, total: None,
    variants: Variants | None = None,
) -> Path:
    """Carry out an experiment, or what of it is not done yet, and write its tables and plots.

    All experiments on one log share the folder `out`: a model that two of them need is trained once. It then holds
    `data/`, the prepared log; `singles/`, `searches/` and `trials/`, one JSON a trained model; `tuning.json`, every
    learning rate that was tried; and a folder an experiment with `report.md`, `report.html`, `plots/` and
    `records.json`, everything that the report says.

    Every row gets the same epochs and batches in the same order. Every model and variant gets the same search of its
    learning rate on the validation days; rows that differ in their masks alone share one (`Row.rate_of`). The test days
    are read once a trial, when it is trained.

    Args:
        name: One of `EXPERIMENTS`.
        data: A folder with a schema file, or in KuaiRand's layout.
        out: Where everything stands.
        seeds: How many, from 0 on.
        training: Of every row, but for its learning rate; None for the default.
        resources: Processes.
        progress: Called with a stage's name, steps done and steps in all.
        variants: What the paper's variants are; None for the default.

    Returns:
        The path of `report.md`.

    Raises:
        InputError: If there is no such experiment, or no seed, a loss is of no task, or the log has other tasks or
            fewer columns than the experiment is about.
        DataError: If the data are not what their schema says, or others than `out` holds trials of.
    """
    if name not in EXPERIMENTS:
        raise InputError(f"experiment: got {name!r}, wanted one of {', '.join(EXPERIMENTS)}")
    if seeds < 1:
        raise InputError(f"seeds: got {seeds}, wanted at least 1")
    experiment = EXPERIMENTS[name]
    training, schema = training or Training(), open_source(data).schema
    missing = [column for column in experiment.carried if column not in schema.carried]
    if missing:
        raise InputError(
            f"{name}: got a log that does not carry {', '.join(missing)}, wanted it in the schema's carried"
        )
    kinds = [task.kind for task in schema.tasks if experiment.all_tasks or not task.extra]
    if experiment.kinds and kinds != list(experiment.kinds):
        raise InputError(f"{name}: got tasks of the kinds {', '.join(kinds)}, wanted {', '.join(experiment.kinds)}")
    if len(kinds) > experiment.most_tasks:
        raise InputError(f"{name}: got {len(kinds)} tasks, wanted at most {experiment.most_tasks}")
    unknown = dict(training.losses).keys() - {task.name for task in schema.tasks}
    if unknown:
        raise InputError(f"losses: got one of {', '.join(unknown)}, wanted them of the log's tasks")
    # What was trained before is of the data as they were then.
    prepared = prepare(data, out / DATA, schema, progress, replace=not has_trained(out))
    return _carry_out(
        name, experiment, prepared, out, seeds, training, resources or Resources(), progress, variants or Variants()
    )


def _carry_out(
    name: str,
    experiment: Experiment,
    prepared: Prepared,
    out: Path,
    seeds: int,
    training: Training,
    resources: Resources,
    progress: Progress,
    variants: Variants,
) -> Path:
    kinds = {task.name: task.kind for task in prepared.schema.tasks if experiment.all_tasks or not task.extra}
    every_kind = {task.name: task.kind for task in prepared.schema.tasks}

    def carry(stage: str) -> Callable[[Sequence[Trial]], dict[Trial, dict[str, Any]]]:
        def run(trials: Sequence[Trial]) -> dict[Trial, dict[str, Any]]:
            jobs = jobs_of(out, trials)
            results = run_jobs(
                jobs, resources.workers, resources.executor, lambda done, total: progress(stage, done, total)
            )
            return {trial: results[trial] for trial in trials}

        return run

    # The baselines first: their learning rates are those of the searches.
    rows = Rows(tuple(kinds), training, variants=variants)
    rates = tuned_rates([rows.base()], every_kind, out, carry(f"{name}: tune the baselines"))
    rows = replace(rows, search_rates=tuple(zip(kinds, rates[BASE], strict=True)))
    table = experiment.rows(rows)
    rates |= tuned_rates(rate_rows(table, rows), every_kind, out, carry(f"{name}: tune the rows"))
    trials = {(row.key, seed): row.at(seed, rates[row.rate_of]) for row in table for seed in range(seeds)}
    found = carry(f"{name}: train")([trial for of_row in trials.values() for trial in of_row])
    records = [{"row": key, **found[trial]} for (key, _), of_row in trials.items() for trial in of_row]
    folder = out / name
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    facts = {
        "experiment": name,
        "data": prepared.schema.name,
        "counts": prepared.counts,
        "tasks": kinds,
        "rows": {row.key: row.title for row in table},
        "seeds": seeds,
        "training": Trial("sparse_sharing", tuple(kinds), training=training).to_plain()["training"],
        "learning_rates": {row.key: rates[row.rate_of] for row in table},
    }
    progress(f"{name}: write", 0, 1)
    findings = pages.Findings(facts, records, trials, out, folder)
    text = experiment.write(findings)
    results = {**facts, "further": findings.further, "records": records}
    write_whole(folder / "records.json", json.dumps(results, indent=1) + "\n")
    progress(f"{name}: write", 1, 1)
    return pages.write(text, f"{name}: {prepared.schema.name}", folder)


def rate_rows(table: Sequence[Row], rows: Rows) -> list[Row]:
    """Return the rows whose learning rate must be searched; those that others take theirs from, too."""
    own: Mapping[str, Row] = {row.key: row for row in table if row.rate_of == row.key and row.key != BASE}
    missing = {row.rate_of for row in table} - own.keys() - {BASE}
    others = {row.key: row for row in declared.table2(rows) if row.key in missing}
    if missing - others.keys():
        raise InputError(f"rates: got no row {', '.join(missing - others.keys())}, wanted one to search")
    return [*own.values(), *others.values()]
