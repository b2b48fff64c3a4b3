"""Rows of a log ready to be encoded: joined with side tables, with their past and their labels."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from lt4rec_sparse.ranker.features import Schema, Task
from lt4rec_sparse.ranker.features.tables import Ids
from lt4rec_sparse.recsys.data.batches import GROUP, LABEL, MEMBER, SLICE, SPLITS, VALUE, WEIGHT
from lt4rec_sparse.recsys.data.casts import floats
from lt4rec_sparse.recsys.data.days import DayLog
from lt4rec_sparse.recsys.data.dealt import SPLIT
from lt4rec_sparse.recsys.data.history import Histories
from lt4rec_sparse.recsys.data.joined import Joined, raw_column
from lt4rec_sparse.recsys.data.labels import label_of, number_of
from lt4rec_sparse.recsys.data.past import columns_of_histories, noted_rows
from lt4rec_sparse.recsys.data.source import Source, raw_types
from lt4rec_sparse.recsys.data.splits import inside


class Rows(NamedTuple):
    """Rows of one day and one split, in order."""

    day: str
    split: str
    features: dict[str, Any]  # raw, as `FeatureEncoder` takes them
    columns: dict[str, Any]  # all others: `label.<task>`, `member.<task>` and so on, as `prepare` describes them
    kept: dict[str, Any]  # Arrow arrays of the columns that the reader was asked to keep


class RowReader:
    """Rows of the log with everything that is known before each impression; `keep` names columns to return as well."""

    def __init__(self, source: Source, log: DayLog, keep: Sequence[str] = ()) -> None:
        self._schema, self._log, self._keep = source.schema, log, keep
        made = [derived.name for derived in source.schema.derived]
        self._joined = Joined(source, log.columns, (*raw_types(source.schema), *made))
        self._joined.check_none_absent()

    def read(
        self, days: frozenset[str] | None = None, split: str | None = None, done: Collection[str] = ()
    ) -> Iterator[Rows]:
        """Yield rows in order: of some days or of all that have such rows, and of one split or of all three.

        Days that are not asked for, and those that are `done`, only enter the histories. Where rows are split by day,
        days that are asked for may be in no split, and their rows have the split "".
        """
        histories = Histories(self._schema)
        wanted = SPLITS if split is None else (split,)
        split_of: dict[str, str] = {}
        if days is None:
            of_splits = self._log.days_of(self._schema)
            split_of = {day: name for name in wanted for day in of_splits[name]}
            days = frozenset(split_of)
        days = days.difference(done)
        last = max(map(self._log.days.index, days), default=-1)
        past_only = columns_of_histories(self._schema)
        for day in self._log.days[: last + 1]:
            names = None if day in days else past_only
            for groups, columns in noted_rows(self._log, day, self._joined, histories, names):
                if day not in days:
                    continue
                if SPLIT not in columns:
                    yield self._rows(day, split_of.get(day, ""), columns, groups, histories)
                    continue
                for name in wanted:
                    chosen = inside(columns[SPLIT], name)
                    if chosen.true_count:
                        kept = {key: column.filter(chosen) for key, column in columns.items()}
                        of_kept = None if groups is None else groups[chosen.to_numpy(zero_copy_only=False)]
                        yield self._rows(day, name, kept, of_kept, histories)

    def _rows(self, day: str, split: str, columns: Mapping[str, Any], groups: Ids | None, histories: Histories) -> Rows:
        features = {column.name: raw_column(columns[column.name]) for column in self._schema.columns}
        others: dict[str, Any] = {}
        for task in self._schema.tasks:
            others |= _task_columns(self._schema, task, columns)
        if groups is not None:
            others[GROUP] = groups
            features |= histories.features(groups)
        for part in self._schema.slices:
            inside = pc.fill_null(pc.equal(columns[part.column], part.value), False)
            others[SLICE + part.name] = inside.to_numpy(zero_copy_only=False)
        others |= {VALUE + name: floats(columns[name]) for name in self._schema.carried}
        return Rows(day, split, features, others, {name: columns[name] for name in self._keep})


def _task_columns(schema: Schema, task: Task, columns: Mapping[str, Any]) -> dict[str, Any]:
    label = label_of(task, columns[task.label])
    member = ~np.isnan(label)
    if task.divide_by is not None:
        by = task.divide_by
        divisor = floats(columns[by]) if isinstance(by, str) else np.full(len(label), by, np.float64)
        member &= (label >= 0) & (divisor > 0)  # NaN compares false: no divisor, no label
        with np.errstate(over="ignore"):  # a ratio beyond float64 is cut to 1 like any other above 1
            label = np.clip(np.divide(label, divisor, out=np.zeros_like(label), where=member), 0, 1)
    for name in task.rows:
        member &= np.nan_to_num(number_of(schema, name, columns[name])) != 0
    weight = np.ones_like(label) if task.weight is None else floats(columns[task.weight])
    member &= ~np.isnan(weight)
    return {
        LABEL + task.name: np.where(member, label, 0).astype(np.float32),
        MEMBER + task.name: member,
        WEIGHT + task.name: np.where(member, weight, 0).astype(np.float32),
    }
