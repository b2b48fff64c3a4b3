"""The base rates of a log: what a model should predict before it has learned anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lt4rec_sparse.recsys.data import Prepared
from lt4rec_sparse.recsys.data.batches import LABEL, MEMBER, WEIGHT, damaged

Columns = dict[str, NDArray[np.float64]]


def base_rates(prepared: Prepared, tasks: tuple[str, ...], entire_space: bool = False) -> dict[str, float]:
    """Return task -> the weighted mean label of its training rows, which is the best constant for them.

    Of a binary task that is its share of positives. With `entire_space`, as ESMM trains, a later task's rate is that
    of its label given the first task's: the mean label over the mean label of the first, both over the impressions
    whose label is known (`objectives.of_trial`).

    A rate is at least half a row away from 0 and from 1, so that it has a logit.
    """
    totals = dict.fromkeys(tasks, (0.0, 0.0, 0))  # weighted labels, what they are a share of, rows
    first = tasks[0]
    for columns in _labels(prepared, tasks):
        clicked = columns[LABEL + first]
        for task, (labels, whole, count) in totals.items():
            rows, label, of = columns[MEMBER + task] > 0, columns[LABEL + task], np.ones_like(clicked)
            weight = columns[WEIGHT + task]
            if entire_space and task != first:
                rows = (columns[MEMBER + first] > 0) & (rows | (clicked < 0.5))
                of, weight = clicked, columns[WEIGHT + first]
            totals[task] = (
                labels + float((weight * label)[rows].sum()),
                whole + float((weight * of)[rows].sum()),
                count + int(rows.sum()),
            )
    return {task: _within(labels, whole, count) for task, (labels, whole, count) in totals.items()}


def _within(labels: float, whole: float, count: int) -> float:
    least = 0.5 / max(count, 1)
    return min(max(labels / whole if whole else 0.5, least), 1 - least)


def _labels(prepared: Prepared, tasks: tuple[str, ...]) -> Iterator[Columns]:
    """Yield the labels, rows and weights of the training days, part by part."""
    names = [prefix + task for task in tasks for prefix in (LABEL, MEMBER, WEIGHT)]
    for path in sorted((prepared.folder / "train").glob("part-*.parquet")):
        yield from _read(path, names)


def _read(path: Path, names: list[str]) -> Iterator[Columns]:
    try:
        with pq.ParquetFile(path) as file:
            for part in file.iter_batches(columns=names):
                yield {name: np.asarray(part.column(name), np.float64) for name in names}
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from error
