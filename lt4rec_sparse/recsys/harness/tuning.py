"""The search of learning rates: on the validation days, with seeds that no result uses, alike for every row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lt4rec_sparse.files import write_whole
from lt4rec_sparse.recsys.harness.rows import Row
from lt4rec_sparse.recsys.harness.statistics import best_of
from lt4rec_sparse.recsys.harness.trials import Trial
from lt4rec_sparse.recsys.metrics import LOSS

RATES = (5e-4, 1e-3, 2e-3)
FURTHER = 2
SEEDS = (1000, 1001)
FILE = "tuning.json"

Rates = Mapping[str, float]
"""Task -> learning rate."""

Tried = dict[tuple[float, ...], dict[str, float]]
"""A rate per task, in the order of the trial's tasks -> task -> loss."""


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
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    names = {trial: f"{row.key}-{trial.at(0).key}-{'-'.join(map(str, grid))}" for row in own for trial in row.trials}
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
                    "chosen": _best(tried[trial]),
                }
    if tried:
        write_whole(path, json.dumps(known, indent=1) + "\n")
    chosen = {trial: dict(zip(trial.tasks, known[name]["chosen"], strict=True)) for trial, name in names.items()}
    return {row.key: {task: rate for trial in row.trials for task, rate in chosen[trial].items()} for row in own}


def favourites(trial: Trial, tried: Tried) -> dict[str, float]:
    """Return the rate at which each task did best by its own loss, or all tasks together where a step serves all."""
    if trial.steps_together:
        return dict(zip(trial.tasks, _best(tried), strict=True))
    common = {rates[0]: losses for rates, losses in tried.items() if len(set(rates)) == 1}
    return {task: min(common, key=lambda rate: common[rate][task]) for task in trial.tasks}


def _best(tried: Tried) -> tuple[float, ...]:
    rates: tuple[float, ...] = best_of(tried)
    return rates


def beyond(trial: Trial, tried: Tried) -> list[float]:
    """Return the rates to try next: beyond the edges at which some task did best."""
    best = favourites(trial, tried).values()
    low, high = min(rates[0] for rates in tried), max(rates[0] for rates in tried)
    return [2 * high] * (high in best) + [low / 2] * (low in best)
