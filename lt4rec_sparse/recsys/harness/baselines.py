"""What every model must beat: the best constant, and gradient-boosted trees on the same encoded columns and split."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from time import process_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lt4rec_sparse.files import read_json, write_whole
from lt4rec_sparse.ranker.features import EncodedFeatures, FeatureEncoder
from lt4rec_sparse.recsys.data import Batch, Prepared
from lt4rec_sparse.recsys.harness.starts import Starts
from lt4rec_sparse.recsys.harness.trials import digest
from lt4rec_sparse.recsys.training.objectives import rows_of

CONSTANT, TREES = "constant", "trees"
TITLES = {CONSTANT: "a constant (base rates)", TREES: "gradient-boosted trees"}
NEEDED = (1, 7)  # of scikit-learn, which since then stops early by rows that it is given
MOST_ROWS = 5_000_000  # of the training or the validation days; trees read them all at once, as floats
MOST_CATEGORIES = 255  # scikit-learn's limit; ids of larger tables are taken as numbers, which are ranks by frequency
ROUNDS, PATIENCE, DRAW = 1000, 20, 65_536

Columns = NDArray[np.float32]


@dataclass(frozen=True)
class Baselines:
    """Rows for a table: row -> title, titles that are left out -> reason, and records as of a study's rows."""

    rows: dict[str, str]
    left_out: dict[str, str]
    records: list[dict[str, Any]]


def baselines(starts: Starts, tasks: tuple[str, ...], seeds: int, top_k: int = 0) -> Baselines:
    """Return the baselines of a log, trained and judged, or read from `baselines/` of its folder.

    The constant is each task's base rate on the training days. The trees are scikit-learn's, of each task for itself,
    stopped early by the validation days; a seed draws the rows from which their thresholds are taken. They take the
    ids that the encoder gives, as categories where a column has few; of a column of many values, how many they are and
    the first. `top_k` is as in `metrics_of`.
    """
    makers: dict[str, Callable[[Starts, tuple[str, ...], int], nn.Module]] = {CONSTANT: _constant, TREES: _trees}
    missing = obstacle(starts.prepared, tasks)
    left_out = {TITLES[TREES]: missing} if missing else {}
    rows = {row: title for row, title in TITLES.items() if title not in left_out}
    records = [_record(starts, row, makers[row], tasks, seed, top_k) for row in rows for seed in range(seeds)]
    return Baselines(rows, left_out, records)


def obstacle(prepared: Prepared, tasks: tuple[str, ...]) -> str | None:
    """Return why trees cannot be trained here, or None if they can."""
    found = version("scikit-learn") if find_spec("sklearn") else "none"
    if found == "none" or tuple(map(int, found.split(".")[:2])) < NEEDED:
        return f"scikit-learn: got {found}, wanted 1.7 or newer: `pip install 'lt4rec-sparse[baselines]'`"
    train, kinds = prepared.counts["train"], {task.name: task.kind for task in prepared.schema.tasks}
    for split, name in (("train", "training"), ("validation", "validation")):
        if (rows := prepared.counts[split]["rows"]) > MOST_ROWS:
            return f"got {rows:,} {name} rows, wanted at most {MOST_ROWS:,}"
    for task in tasks:
        if kinds[task] == "binary" and (mean := train["tasks"][task]["label_mean"]) in (0, 1):
            return f"got only labels {mean:.0f} of {task} on the training days, wanted 0 and 1"
    return None


def _record(
    starts: Starts,
    row: str,
    make: Callable[[Starts, tuple[str, ...], int], nn.Module],
    tasks: tuple[str, ...],
    seed: int,
    top_k: int,
) -> dict[str, Any]:
    settings = digest({"tasks": list(tasks), "top_k": top_k})
    path = starts.made("baselines", f"{row}-{settings}-seed_{seed}.json")
    if not path.exists():
        began = process_time()
        model = make(starts, tasks, seed)
        seconds = process_time() - began
        record = {
            "row": row,
            "seed": seed,
            "validation": starts.judge(path, model, "validation", tasks, top_k),
            "test": starts.judge(path, model, "test", tasks, top_k),
            "seconds": {"train": seconds, "search": 0.0},
            "parameters": len(tasks) if row == CONSTANT else None,
            "multiply_adds": 0 if row == CONSTANT else None,
            **dict.fromkeys(("masks", "tickets", "best_level")),
        }
        write_whole(path, json.dumps(record, indent=1, allow_nan=True))
    return read_json(path, "validation", "test")


class _Constant(nn.Module):
    """The same logit for every row of a task."""

    def __init__(self, rates: Mapping[str, float]) -> None:
        super().__init__()
        self.logits = {task: math.log(rate / (1 - rate)) for task, rate in rates.items()}

    def forward(self, features: EncodedFeatures, task: str) -> Tensor:
        """Return logits, `[batch, 1]`."""
        return torch.full((features.batch, 1), self.logits[task])


class _Trees(nn.Module):
    """A forest per task, from encoded columns to logits."""

    def __init__(self, forests: Mapping[str, Any]) -> None:
        super().__init__()
        self.forests = forests

    def forward(self, features: EncodedFeatures, task: str) -> Tensor:
        """Return logits, `[batch, 1]`."""
        forest, columns = self.forests[task], _columns(features)
        if not len(columns):
            return torch.empty(0, 1)
        if hasattr(forest, "decision_function"):
            logits = torch.from_numpy(forest.decision_function(columns))
        else:  # a ratio, which squared error may leave by a little
            logits = torch.logit(torch.from_numpy(forest.predict(columns)), eps=1e-6)
        return logits.float().unsqueeze(1)


def _constant(starts: Starts, tasks: tuple[str, ...], seed: int) -> nn.Module:
    return _Constant(starts.base_rates(tasks))


def _trees(starts: Starts, tasks: tuple[str, ...], seed: int) -> nn.Module:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    train, validation = (_whole(starts.prepared, split) for split in ("train", "validation"))
    forests = {}
    for task in tasks:
        kind = HistGradientBoostingClassifier if starts.kinds[task] == "binary" else HistGradientBoostingRegressor
        x, y, weights = _of_task(train, task)
        x_val, y_val, weights_val = _of_task(validation, task)
        how = {"categorical_features": _categories(starts.prepared.encoder), "random_state": seed}
        stopped = kind(max_iter=ROUNDS, early_stopping=True, n_iter_no_change=PATIENCE, **how)
        stopped.fit(x, y, sample_weight=weights, X_val=x_val, y_val=y_val, sample_weight_val=weights_val)
        # scikit-learn keeps the rounds after the best one, which on few rows are worse than a constant; score 0 is of
        # no round.
        best = max(1, int(np.argmax(stopped.validation_score_)))
        forests[task] = kind(max_iter=best, early_stopping=False, **how).fit(x, y, sample_weight=weights)
    return _Trees(forests)


def _whole(prepared: Prepared, split: str) -> Batch:
    return Batch.cat(list(prepared.stream(split, DRAW, shuffle=False).epoch(0)))


def _of_task(batch: Batch, task: str) -> tuple[Columns, NDArray[np.float32], NDArray[np.float32]]:
    rows = rows_of(batch, task)
    labels, weights = batch.labels[task][rows].numpy(), batch.weights[task][rows].numpy()
    return _columns(batch.features.take(rows)), labels, weights


def _columns(features: EncodedFeatures) -> Columns:
    """Return `[batch, columns]`: ids of single-valued fields; number of values and first id of others; raw numbers."""
    single = features.single.numpy().astype(np.float32)
    ends, ids = features.multi_offsets.numpy(), features.multi_values.numpy()
    starts, lengths = ends[:-1], np.diff(ends)
    first = np.full(len(starts), -1, np.float32)  # of a bag without values
    first[lengths > 0] = ids[starts[lengths > 0]]
    bags = (
        [column.reshape(-1, features.batch).T for column in (lengths.astype(np.float32), first)] if len(starts) else []
    )
    return np.ascontiguousarray(np.concatenate([single, *bags, features.numbers.numpy()], axis=1))


def _categories(encoder: FeatureEncoder) -> list[bool]:
    """Return which of `_columns` are categories: those of few ids that are no number or buckets of one."""
    is_few = {field.column: encoder.table_sizes[field.table] <= MOST_CATEGORIES for field in encoder.fields}
    kinds = {column.name: column.kind for column in encoder.schema.features}
    single = [is_few[name] and kinds[name] != "dense" for name in is_few if kinds[name] != "multi"]
    multi = [is_few[name] for name in is_few if kinds[name] == "multi"]
    return [*single, *(False for _ in multi), *multi, *(False for _ in range(encoder.n_numbers))]
