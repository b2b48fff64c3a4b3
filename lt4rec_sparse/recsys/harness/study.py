"""From a table of rows to its records: tune every row alike, then train all seeds side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.harness.jobs import jobs_of, run_jobs
from lt4rec_sparse.recsys.harness.objectives import obstacle
from lt4rec_sparse.recsys.harness.rows import BASE, Row, Rows
from lt4rec_sparse.recsys.harness.trials import Trial
from lt4rec_sparse.recsys.harness.tuning import RATES, Rates, tuned_rates

Progress = Callable[[str, int, int], None]
Carry = Callable[[str, Sequence[Trial]], Mapping[Trial, Mapping[str, Any]]]
"""Carries out a stage's trials, and returns the record of each."""
Trials = Mapping[tuple[str, int], tuple[Trial, ...]]
"""(row, seed) -> the trials trained for it."""


@dataclass(frozen=True)
class Resources:
    """What a study may use: processes, None for one per core; and one of `jobs.EXECUTORS`."""

    workers: int | None = None
    executor: str = "processes"


@dataclass(frozen=True)
class Study:
    """The results of a table of rows.

    Attributes:
        rows: Row -> title of each that was trained, in order.
        left_out: Title of a row that this log cannot train -> the reason.
        rates: Row -> task -> learning rate.
        trials: Those of each row and seed.
        records: One per trained model: `row`, and the laboratory's record of it.
    """

    rows: dict[str, str]
    left_out: dict[str, str]
    rates: dict[str, Rates]
    trials: Trials
    records: list[dict[str, Any]]


def carry_out(
    make: Callable[[Rows], list[Row]],
    rows: Rows,
    seeds: int,
    schema: Schema,
    folder: Path,
    carry: Carry,
    grid: Sequence[float] = RATES,
    others: Callable[[Rows], list[Row]] | None = None,
) -> Study:
    """Tune the baselines, whose rates the mask searches use; then tune all other rows; then train every seed.

    Args:
        make: Makes the table's rows; rows that the log cannot train are left out.
        rows: What the rows have in common.
        seeds: How many seeds, from 0 on.
        schema: The log's.
        folder: The folder of `tuning.json`.
        carry: Carries out trials.
        grid: The learning rates to try.
        others: Makes more rows, for rows of the table that take the rate of a row outside it.
    """
    kinds = {task.name: task.kind for task in schema.tasks}
    rates = tuned_rates([rows.base()], kinds, folder, partial(carry, "tune the baselines"), grid)
    rows = replace(rows, search_rates=tuple(rates[BASE].items()))
    wanted = make(rows)
    reasons = {row.title: [obstacle(trial, kinds, schema.carried) for trial in row.trials] for row in wanted}
    left_out = {title: "; ".join(filter(None, found)) for title, found in reasons.items() if any(found)}
    table = [row for row in wanted if row.title not in left_out]
    searched = rate_rows(table, others(rows) if others else [])
    rates |= tuned_rates(searched, kinds, folder, partial(carry, "tune the rows"), grid)
    trials = {(row.key, seed): row.at(seed, rates[row.rate_of]) for row in table for seed in range(seeds)}
    titles, chosen = {row.key: row.title for row in table}, {row.key: rates[row.rate_of] for row in table}
    return Study(titles, left_out, chosen, trials, train_all(trials, carry))


def train_all(trials: Trials, carry: Carry) -> list[dict[str, Any]]:
    """Return the records of a study's trials on the log that `carry` trains on."""
    found = carry("train", [trial for of_row in trials.values() for trial in of_row])
    return [{"row": key, **found[trial]} for (key, _), of_row in trials.items() for trial in of_row]


def carrier(folder: Path, resources: Resources, progress: Progress, name: str) -> Carry:
    """Return a function that carries out trials on a folder's log."""

    def carry(stage: str, trials: Sequence[Trial]) -> dict[Trial, dict[str, Any]]:
        tell = partial(progress, f"{name}: {stage}")
        results = run_jobs(jobs_of(folder, trials), resources.workers, resources.executor, tell)
        return {trial: results[trial] for trial in trials}

    return carry


def rate_rows(table: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Return the rows whose learning rates must be searched, including those whose rates other rows take."""
    own = {row.key: row for row in table if row.rate_of == row.key and row.key != BASE}
    missing = {row.rate_of for row in table} - own.keys() - {BASE}
    further = {row.key: row for row in others if row.key in missing}
    if missing - further.keys():
        raise InputError(f"rates: got no row {', '.join(missing - further.keys())}, wanted one to search")
    return [*own.values(), *further.values()]
