"""What each group (user) did on earlier days: a bounded list of past values, read before the day itself is added.

The order of calls ensures that nothing leaks: `bags` and `rates` for the rows of a day see only days that `add_day`
has added, and a day is added after its last row was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lt4rec_sparse.ranker.features import History, Schema
from lt4rec_sparse.ranker.features.tables import Array, Ids, IntVocabulary
from lt4rec_sparse.recsys.data.casts import is_list
from lt4rec_sparse.recsys.data.labels import number_of

Floats = NDArray[np.float64]
# The groups of some rows, which of the rows count for a history, and the history's columns of those that do.
Events = tuple[Ids, NDArray[np.bool_], dict[str, Any]]
# Rows of a day that are noted before those that no list will hold are dropped.
NOTED_ROWS = 1 << 20
# All past strings together may have more than the 2 GiB that Arrow's usual types hold.
WIDE = {pa.string(): pa.large_string(), pa.list_(pa.string()): pa.large_list(pa.large_string())}


class Histories:
    """All histories of a schema: what each group did before a day.

    Rows that were noted are past once their day has ended; until then nothing sees them.
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._pasts = {history: PastRows(history) for history in schema.histories}
        self._noted: dict[History, list[Events]] = {history: [] for history in self._pasts}
        self._today: dict[History, PastRows] = {}  # of a day too long to be noted whole: what will be left of it

    @property
    def groups(self) -> Ids:
        """All groups that have a past, int64, distinct."""
        return next((past.groups for past in self._pasts.values()), np.empty(0, np.int64))

    def features(self, groups: Ids) -> dict[str, Any]:
        """Return rates and bags of rows of the groups `[n]`, raw, as `FeatureEncoder` takes them."""
        features: dict[str, Any] = {}
        for history, past in self._pasts.items():
            if history.rates:
                features |= dict(
                    zip((f"{history.name}_count", f"{history.name}_rate"), past.rates(groups), strict=True)
                )
            features |= {f"{history.name}_{column}": bags for column, bags in past.bags(groups).items()}
        return features

    def note(self, groups: Ids, columns: Mapping[str, Any]) -> None:
        """Take in rows of the day, in its order: their groups `[n]` and the columns of the schema."""
        for history, noted in self._noted.items():
            counts = np.nan_to_num(number_of(self._schema, history.when, columns[history.when])) != 0
            kept = pa.array(counts)
            noted.append((groups, counts, {name: columns[name].filter(kept) for name in history.columns}))
            if sum(len(of_part) for of_part, *_ in noted) >= NOTED_ROWS:
                self._today.setdefault(history, PastRows(history)).add_day(*_together(history, noted))
                noted.clear()

    def end_day(self) -> None:
        """Let the rows that were noted be past."""
        for history, noted in self._noted.items():
            past, today = self._pasts[history], self._today.pop(history, None)
            if today is not None:
                if noted:
                    today.add_day(*_together(history, noted))
                past.add_past(today)
            elif noted:
                past.add_day(*_together(history, noted))
            noted.clear()


def _together(history: History, noted: list[Events]) -> Events:
    groups, counts, kept = zip(*noted, strict=True)
    columns = {name: pa.concat_arrays([part[name] for part in kept]) for name in history.columns}
    return np.concatenate(groups), np.concatenate(counts), columns


class PastRows:
    """The last `history.length` rows of every group that count, oldest first, one group after another."""

    def __init__(self, history: History) -> None:
        self._length = history.length
        self._index = IntVocabulary(np.empty(0, np.int64))  # group -> its slot, plus 2
        # Per slot: rows that count, and all rows; last, at -1, none of an unknown group.
        self._seen = np.zeros((1, 2), np.int64)
        self._slots = np.empty(0, np.int64)  # of each past row, ascending
        self._ends = np.zeros(1, np.int64)  # slot s has the past rows ends[s] to ends[s + 1]
        self._columns: dict[str, Any] = dict.fromkeys(history.columns, pa.array([], pa.int64()))

    @property
    def groups(self) -> Ids:
        """All groups that have had a row."""
        return self._index.keys

    def bags(self, groups: Ids) -> dict[str, tuple[Array, Ids]]:
        """Return the past values of every column for rows of the groups `[n]`, as `(values [nnz], offsets [n + 1])`."""
        slots = self._index.lookup(groups) - 2
        begins = self._ends[slots]
        lengths = np.where(slots >= 0, self._ends[slots + 1] - begins, 0)
        ends = _cumulated(lengths)
        past = pa.array(np.repeat(begins - ends[:-1], lengths) + np.arange(ends[-1]))
        bags = {}
        for name, column in self._columns.items():
            rows = column.take(past)
            values = rows.flatten() if is_list(rows.type) else rows.drop_null()
            counts = pc.fill_null(pc.list_value_length(rows), 0) if is_list(rows.type) else rows.is_valid()
            bags[name] = values.to_numpy(zero_copy_only=False), _cumulated(counts.to_numpy(zero_copy_only=False))[ends]
        return bags

    def rates(self, groups: Ids) -> tuple[Floats, Floats]:
        """Return, for rows of the groups `[n]`, how many of their past rows count, and the share (NaN without any)."""
        count, rows = self._seen[self._index.lookup(groups) - 2].T
        return count.astype(np.float64), np.divide(count, rows, out=np.full(len(groups), np.nan), where=rows > 0)

    def add_day(self, groups: Ids, counts: NDArray[np.bool_], columns: dict[str, Any]) -> None:
        """Add a day whose rows have all been read: their groups `[n]` in the order of the day, and which count, `[n]`.

        `columns` are the history's columns of the rows that count, Arrow arrays of values or of lists.
        """
        slots = self._slots_of(groups)
        known = len(self._index.keys)
        self._seen[:-1] += np.stack([np.bincount(rows, minlength=known) for rows in (slots[counts], slots)], axis=1)
        self._append(slots[counts], columns)

    def add_past(self, other: PastRows) -> None:
        """Add rows of a later time that another one has taken in, of the same history."""
        if not len(other.groups):  # its columns have no types yet
            return
        slots = self._slots_of(other.groups)
        self._seen[slots] += other._seen[:-1]
        self._append(slots[other._slots], other._columns)

    def _slots_of(self, groups: Ids) -> Ids:
        """Return the slot of each group, and give one to those that have none."""
        fresh = np.setdiff1d(groups, self._index.keys)
        self._index = IntVocabulary(np.concatenate([self._index.keys, fresh]))
        self._seen = np.concatenate([self._seen[:-1], np.zeros((len(fresh) + 1, 2), np.int64)])
        slots: Ids = self._index.lookup(groups) - 2
        return slots

    def _append(self, slots: Ids, columns: dict[str, Any]) -> None:
        """Append rows that count, at their slots, and drop what is too old."""
        known = len(self._index.keys)
        slots = np.concatenate([self._slots, slots])
        order = np.argsort(slots, kind="stable")
        slots = slots[order]
        # The last row of its group has age 1; rows older than the length of the list are dropped.
        age = np.cumsum(np.bincount(slots, minlength=known))[slots] - np.arange(len(slots))
        young = age <= self._length
        self._slots = slots[young]
        self._ends = _cumulated(np.bincount(self._slots, minlength=known))
        kept = pa.array(order[young])
        for name, column in columns.items():
            column = column.cast(WIDE.get(column.type, column.type))
            before = self._columns[name]
            self._columns[name] = pa.concat_arrays([before, column] if len(before) else [column]).take(kept)


def _cumulated(counts: Any) -> Ids:
    """Return `[0, counts[0], counts[0] + counts[1], ...]`."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
