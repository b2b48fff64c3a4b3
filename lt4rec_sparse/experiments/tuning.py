"""The same small search of a learning rate for every row, on the validation days, with a seed that no result uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lt4rec_sparse.experiments.declared import Row
from lt4rec_sparse.experiments.trials import Trial, digest
from lt4rec_sparse.files import write_whole

RATES = (5e-4, 1e-3, 2e-3)
SEED = 1000
FILE = "tuning.json"
LOSS = {"binary": "log_loss", "ratio": "mse"}

Carry = Callable[[Sequence[Trial]], Mapping[Trial, Mapping[str, Any]]]
"""Carries out trials and returns the record of each."""


def tuned_rates(rows: Sequence[Row], kinds: Mapping[str, str], folder: Path, carry: Carry) -> dict[str, float]:
    """Return the learning rate of each row that searches its own, and leave what was tried in `tuning.json`.

    Every such row is trained once with each of `RATES` and judged on the validation days by all its tasks together:
    the rate is chosen that minimises the sum over tasks of the loss over the least loss that any rate gave (log loss of
    a binary task, MSE of a ratio).

    Args:
        rows: Rows whose `rate_of` is another row are passed over.
        kinds: Task -> kind of its label.
        folder: Where `tuning.json` stands. A row that was searched before is read from it.
        carry: Trains.
    """
    path = folder / FILE
    tried: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    own = {row.key: row for row in rows if row.rate_of == row.key}
    names = {key: f"{key}-{digest({'trials': [trial.to_plain() for trial in row.trials]})}" for key, row in own.items()}
    asked = {
        (key, rate): own[key].at(SEED, rate, is_tested=False)
        for key, name in names.items()
        if name not in tried
        for rate in RATES
    }
    records = carry([trial for trials in asked.values() for trial in trials])
    for key, name in names.items():
        if name not in tried:
            losses = {rate: _losses([records[trial] for trial in asked[key, rate]], kinds) for rate in RATES}
            tried[name] = {
                "row": key,
                "losses": {str(rate): of_rate for rate, of_rate in losses.items()},
                "chosen": best_rate(losses),
            }
    write_whole(path, json.dumps(tried, indent=1) + "\n")
    return {key: tried[name]["chosen"] for key, name in names.items()}


def best_rate(losses: Mapping[float, Mapping[str, float]]) -> float:
    """Return the rate of the least sum over tasks of `loss / least loss of the task`; of equal ones the first.

    Example:
        >>> best_rate({0.1: {"ctr": 0.6, "cvr": 0.10}, 0.2: {"ctr": 0.6, "cvr": 0.09}})
        0.2
    """
    tasks = next(iter(losses.values()))
    least = {task: min(of_rate[task] for of_rate in losses.values()) for task in tasks}
    return min(losses, key=lambda rate: sum(losses[rate][task] / least[task] for task in tasks))


def _losses(records: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> dict[str, float]:
    metrics = {task: found for record in records for task, found in record["validation"]["all"].items()}
    return {task: found[LOSS[kinds[task]]] for task, found in metrics.items()}
