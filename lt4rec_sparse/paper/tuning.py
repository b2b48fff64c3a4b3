"""The same small search of a learning rate for every row, on the validation days, with a seed that no result uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lt4rec_sparse.files import write_whole
from lt4rec_sparse.paper.declared import Row
from lt4rec_sparse.recsys.harness.arms import LOSS
from lt4rec_sparse.recsys.harness.statistics import best_of
from lt4rec_sparse.recsys.harness.trials import Trial

RATES = (5e-4, 1e-3, 2e-3)
FURTHER = 2
SEED = 1000
FILE = "tuning.json"

Carry = Callable[[Sequence[Trial]], Mapping[Trial, Mapping[str, Any]]]
"""Carries out trials and returns the record of each."""


def tuned_rates(
    rows: Sequence[Row], kinds: Mapping[str, str], folder: Path, carry: Carry
) -> dict[str, tuple[float, ...]]:
    """Return the learning rates of each row that searches its own, one a trial, and leave what was tried on disk.

    Every trial is trained once with each of `RATES` and judged on the validation days by all its tasks together: the
    rate is chosen that minimises the sum over tasks of the loss over the least loss that any rate gave (log loss of a
    binary task, MSE of a ratio). While the best is at an edge, twice or half of it is tried too, `FURTHER` times.

    Args:
        rows: Rows whose `rate_of` is another row are passed over.
        kinds: Task -> kind of its label.
        folder: Where `tuning.json` stands. What was searched before is read from it.
        carry: Trains.
    """
    path = folder / FILE
    tried: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    own = {row.key: row for row in rows if row.rate_of == row.key}
    names = {trial: f"{key}-{trial.at(SEED, RATES[0]).key}" for key, row in own.items() for trial in row.trials}
    row_of = {trial: key for key, row in own.items() for trial in row.trials}
    losses: dict[Trial, dict[float, dict[str, float]]] = {
        trial: {} for trial, name in names.items() if name not in tried
    }
    wanted = {trial: list(RATES) for trial in losses}
    for _ in range(1 + FURTHER):
        asked = {(trial, rate): trial.at(SEED, rate, is_tested=False) for trial, rs in wanted.items() for rate in rs}
        records = carry(list(asked.values()))
        for (trial, rate), at_rate in asked.items():
            losses[trial][rate] = _losses(records[at_rate], kinds)
        further = {trial: beyond(found) for trial, found in losses.items()}
        wanted = {trial: [rate] for trial, rate in further.items() if rate is not None}
        if not wanted:
            break
    for trial, found in losses.items():
        tried[names[trial]] = {
            "row": row_of[trial],
            "tasks": trial.tasks,
            "losses": {str(rate): found[rate] for rate in sorted(found)},
            "chosen": best_of(found),
        }
    write_whole(path, json.dumps(tried, indent=1) + "\n")
    return {key: tuple(tried[names[trial]]["chosen"] for trial in row.trials) for key, row in own.items()}


def beyond(losses: Mapping[float, Mapping[str, float]]) -> float | None:
    """Return the rate to try next: beyond the best where that is at an edge, else None."""
    best = best_of(losses)
    if best == max(losses):
        return 2 * best
    return best / 2 if best == min(losses) else None


def _losses(record: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, float]:
    return {task: found[LOSS[kinds[task]]] for task, found in record["validation"]["all"].items()}
