"""From a table of rows to its records: tune every row alike, then train all seeds side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.recsys.harness.grid import run_jobs
from lt4rec_sparse.recsys.harness.jobs import jobs_of
from lt4rec_sparse.recsys.harness.objectives import obstacle
from lt4rec_sparse.recsys.harness.rows import BASE, Row, Rows
from lt4rec_sparse.recsys.harness.trials import Trial
from lt4rec_sparse.recsys.harness.tuning import RATES, Carry, Rates, tuned_rates

Progress = Callable[[str, int, int], None]
Maker = TypeVar("Maker", bound=Rows)


@dataclass(frozen=True)
class Resources:
    """The resources that a study may use.

    Attributes:
        workers: Processes; None for one per core.
        executor: One of `grid.EXECUTORS`.
    """

    workers: int | None = None
    executor: str = "processes"


@dataclass(frozen=True)
class Study:
    """The results of a table of rows.

    Attributes:
        table: The rows that were trained, in order.
        left_out: Title of a row that this log cannot train -> the reason.
        rates: Row -> task -> learning rate.
        trials: (row, seed) -> the trials trained for it.
        records: One per trained model: `row`, and the laboratory's record of it.
    """

    table: list[Row]
    left_out: dict[str, str]
    rates: dict[str, Rates]
    trials: dict[tuple[str, int], tuple[Trial, ...]]
    records: list[dict[str, Any]]


def carry_out(
    make: Callable[[Maker], list[Row]],
    rows: Maker,
    seeds: int,
    kinds: Mapping[str, str],
    carried: Sequence[str],
    folder: Path,
    carry: Callable[[str], Carry],
    grid: Sequence[float] = RATES,
    others: Callable[[Maker], list[Row]] | None = None,
) -> Study:
    """Tune the baselines, whose rates the mask searches use; then tune all other rows; then train every seed.

    Args:
        make: Makes the table's rows.
        rows: What the rows have in common.
        seeds: How many seeds, from 0 on.
        kinds: Task -> kind of its label, for all tasks of the log.
        carried: The columns that the log carries in addition to its features.
        folder: The folder of `tuning.json`.
        carry: Makes, from a stage's name, the function that carries out trials.
        grid: The learning rates to try.
        others: Makes more rows, for rows of the table that take the rate of a row outside it.

    Raises:
        InputError: If no row can be trained on the log, or a row takes the rate of a row that does not exist.
    """
    rates = tuned_rates([rows.base()], kinds, folder, carry("tune the baselines"), grid)
    rows = replace(rows, search_rates=tuple(rates[BASE].items()))
    table, left_out = _possible(make(rows), kinds, carried)
    rates |= tuned_rates(rate_rows(table, others(rows) if others else []), kinds, folder, carry("tune the rows"), grid)
    trials = {(row.key, seed): row.at(seed, rates[row.rate_of]) for row in table for seed in range(seeds)}
    found = carry("train")([trial for of_row in trials.values() for trial in of_row])
    records = [{"row": key, **found[trial]} for (key, _), of_row in trials.items() for trial in of_row]
    return Study(table, left_out, {row.key: rates[row.rate_of] for row in table}, trials, records)


def carrier(folder: Path, resources: Resources, progress: Progress, name: str) -> Callable[[str], Carry]:
    """Return a function that makes, from a stage's name, the function that carries out trials on a folder's log."""

    def of(stage: str) -> Carry:
        def carry(trials: Sequence[Trial]) -> dict[Trial, dict[str, Any]]:
            jobs, title = jobs_of(folder, trials), f"{name}: {stage}"
            results = run_jobs(
                jobs, resources.workers, resources.executor, lambda done, total: progress(title, done, total)
            )
            return {trial: results[trial] for trial in trials}

        return carry

    return of


def rate_rows(table: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Return the rows whose learning rates must be searched, including those whose rates other rows take.

    Raises:
        InputError: If there is no such row.
    """
    own = {row.key: row for row in table if row.rate_of == row.key and row.key != BASE}
    missing = {row.rate_of for row in table} - own.keys() - {BASE}
    further = {row.key: row for row in others if row.key in missing}
    if missing - further.keys():
        raise InputError(f"rates: got no row {', '.join(missing - further.keys())}, wanted one to search")
    return [*own.values(), *further.values()]


def _possible(
    table: Sequence[Row], kinds: Mapping[str, str], carried: Sequence[str]
) -> tuple[list[Row], dict[str, str]]:
    """Return the rows that the log can train, and for the others, by title, the reason why it cannot."""
    reasons = {row.title: [obstacle(trial, kinds, carried) for trial in row.trials] for row in table}
    left_out = {title: "; ".join(filter(None, found)) for title, found in reasons.items() if any(found)}
    return [row for row in table if row.title not in left_out], left_out
