"""From a table of rows to its records: tune every row alike, then train all seeds side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import read_json, write_whole
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.harness.jobs import jobs_of, run_jobs
from lt4rec_sparse.recsys.harness.objectives import obstacle
from lt4rec_sparse.recsys.harness.rows import BASE, Row, Rows
from lt4rec_sparse.recsys.harness.statistics import best_of
from lt4rec_sparse.recsys.harness.trackers import NONE, check_tracker, tracking
from lt4rec_sparse.recsys.harness.trials import Trial
from lt4rec_sparse.recsys.metrics import LOSS

RATES = (5e-4, 1e-3, 2e-3)
FURTHER = 2
SEEDS = (1000, 1001)  # of the search of rates; no result uses them
FILE = "tuning.json"

Progress = Callable[[str, int, int], None]
Carry = Callable[[str, Sequence[Trial]], Mapping[Trial, Mapping[str, Any]]]  # carries out a stage's trials -> records
Rates = Mapping[str, float]  # task -> learning rate
Tried = dict[tuple[float, ...], dict[str, float]]  # a rate per task of the trial, in order -> task -> loss
Trials = Mapping[tuple[str, int], tuple[Trial, ...]]  # (row, seed) -> the trials trained for it


@dataclass(frozen=True)
class Resources:
    """What a study may use: processes, None for one per core; one of `jobs.EXECUTORS`; and a tracker, or "none"."""

    workers: int | None = None
    executor: str = "processes"
    tracker: str = NONE

    def __post_init__(self) -> None:
        check_tracker(self.tracker)


@dataclass(frozen=True)
class Study:
    """The results of a table of rows.

    Titles of the rows that were trained, in order, and the reasons for titles that this log cannot train; row -> task
    -> learning rate; the trials; and one record per trained model: `row`, and the laboratory's record of it.
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

    Rows that the log cannot train are left out. `carry` carries out trials; what was tried of `grid` is left in
    `tuning.json` in the folder. `others` makes more rows, for rows of the table that take the rate of a row outside it.
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
    trials = {
        (row.key, seed): tuple(trial.at(seed, rates[row.rate_of]) for trial in row.trials)
        for row in table
        for seed in range(seeds)
    }
    titles, chosen = {row.key: row.title for row in table}, {row.key: rates[row.rate_of] for row in table}
    return Study(titles, left_out, chosen, trials, train_all(trials, carry))


def train_all(trials: Trials, carry: Carry) -> list[dict[str, Any]]:
    """Return the records of a study's trials on the log that `carry` trains on."""
    found = carry("train", [trial for of_row in trials.values() for trial in of_row])
    return [{"row": key, **found[trial]} for (key, _), of_row in trials.items() for trial in of_row]


def carrier(folder: Path, resources: Resources, progress: Progress, name: str) -> Carry:
    """Return a function that carries out trials on a folder's log."""
    tracking(folder, resources.tracker).begin()

    def carry(stage: str, trials: Sequence[Trial]) -> dict[Trial, dict[str, Any]]:
        tell = partial(progress, f"{name}: {stage}")
        results = run_jobs(jobs_of(folder, trials, resources.tracker), resources.workers, resources.executor, tell)
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


def tuned_rates(
    rows: Sequence[Row],
    kinds: Mapping[str, str],
    folder: Path,
    carry: Callable[[Sequence[Trial]], Mapping[Trial, Mapping[str, Any]]],
    grid: Sequence[float] = RATES,
) -> dict[str, Rates]:
    """Return the learning rates, task -> rate, of each row that searches its own, and write what was tried to disk.

    Every task of every model gets its own rate, from the same candidates, whether the model serves one task or
    several:

    1. Each model is trained once per rate of the grid, all its tasks at that rate. While some task has its least loss
       at an edge of the rates tried, twice or half that rate is tried too, up to `FURTHER` times.
    2. Each task takes the rate at which its own loss was least. If the tasks of a shared model take different rates,
       the model is trained once more with these rates together.
    3. Of everything tried, the choice is the one with the least sum over tasks of the task's loss over its least loss.

    A model whose one step serves all tasks (`Trial.steps_together`) has one rate by its nature, chosen by rule 3.
    Losses (log loss of a binary task, MSE of a ratio) are means over `SEEDS` on the validation days. `carry` carries
    out trials; earlier searches are read from `tuning.json` in the folder; of a single rate nothing is searched.
    """
    own = [row for row in rows if row.rate_of == row.key]
    if len(grid) == 1:
        return {row.key: {task: grid[0] for trial in row.trials for task in trial.tasks} for row in own}
    path = folder / FILE
    known: dict[str, Any] = read_json(path) if path.exists() else {}
    names = {
        trial: f"{row.key}-{replace(trial, top_k=0).at(0).key}-{'-'.join(map(str, grid))}"
        for row in own
        for trial in row.trials
    }
    tried: dict[Trial, Tried] = {trial: {} for trial, name in names.items() if name not in known}

    def attempt(wanted: Mapping[Trial, Sequence[tuple[float, ...]]]) -> None:
        asked = {
            (trial, rates, seed): trial.at(seed, dict(zip(trial.tasks, rates, strict=True)), is_tested=False)
            for trial, of_trial in wanted.items()
            for rates in of_trial
            if rates not in tried[trial]
            for seed in SEEDS
        }
        records = carry(list(asked.values())) if asked else {}
        for trial, rates, _ in asked:
            judged = [records[asked[trial, rates, seed]]["validation"]["all"] for seed in SEEDS]
            tried[trial][rates] = {task: fmean(j[task][LOSS[kinds[task]]] for j in judged) for task in trial.tasks}

    wanted = {trial: [(rate,) * len(trial.tasks) for rate in grid] for trial in tried}
    for _ in range(1 + FURTHER):
        attempt(wanted)
        wanted = {trial: [(r,) * len(trial.tasks) for r in beyond(trial, found)] for trial, found in tried.items()}
    attempt({trial: [tuple(favourites(trial, found).values())] for trial, found in tried.items()})
    for row in own:
        for trial in row.trials:
            if trial in tried:
                known[names[trial]] = {
                    "row": row.key,
                    "tasks": trial.tasks,
                    "tried": [{"rates": rates, "losses": losses} for rates, losses in sorted(tried[trial].items())],
                    "chosen": best_of(tried[trial]),
                }
    if tried:
        write_whole(path, json.dumps(known, indent=1) + "\n")
    chosen = {trial: dict(zip(trial.tasks, known[name]["chosen"], strict=True)) for trial, name in names.items()}
    return {row.key: {task: rate for trial in row.trials for task, rate in chosen[trial].items()} for row in own}


def favourites(trial: Trial, tried: Tried) -> dict[str, float]:
    """Return the rate at which each task did best by its own loss, or all tasks together where a step serves all."""
    if trial.steps_together:
        chosen = best_of(tried)
        return dict(zip(trial.tasks, chosen, strict=True))
    common = {rates[0]: losses for rates, losses in tried.items() if len(set(rates)) == 1}
    return {task: min(common, key=lambda rate: common[rate][task]) for task in trial.tasks}


def beyond(trial: Trial, tried: Tried) -> list[float]:
    """Return the rates to try next: beyond the edges at which some task did best."""
    best = favourites(trial, tried).values()
    low, high = min(rates[0] for rates in tried), max(rates[0] for rates in tried)
    return [2 * high] * (high in best) + [low / 2] * (low in best)
