"""What each group (user) did on earlier days: a bounded list of past values, read before the day itself is added.

The order of calls ensures that nothing leaks: `bags` and `rates` for the rows of a day see only days that `add_day`
has added, and a day is added after its last row was read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lt4rec_sparse.ranker.features import History
from lt4rec_sparse.ranker.features.tables import Array, Ids, IntVocabulary

# Bags of strings are compared by their text, joined by a character that does not occur in it.
JOINT = "\x1f"
NOTHING = -1
Floats = NDArray[np.float64]


class PastRows:
    """The last `history.length` rows of every group, as codes of their values: `[groups, length]` per column.

    Args:
        history: Which columns, and how many rows.
    """

    def __init__(self, history: History) -> None:
        self._length = history.length
        self._index = IntVocabulary(np.empty(0, np.int64))
        self._codes = {name: np.empty((0, history.length), np.int64) for name in history.columns}
        self._known = {name: _Bags() for name in history.columns}
        self._seen = np.empty((0, 2), np.int64)  # per group: rows that count, and all rows

    def bags(self, groups: Ids) -> dict[str, tuple[Array, Ids]]:
        """Return, for rows of the groups `[n]`, the past values of every column, oldest first.

        Returns:
            Column -> `(values [nnz], offsets [n + 1])`; an unknown group has empty bags.
        """
        slots = self._index.lookup(groups) - 2
        return {
            name: self._known[name].gather(_rows(codes, slots, unknown=NOTHING)) for name, codes in self._codes.items()
        }

    def rates(self, groups: Ids) -> tuple[Floats, Floats]:
        """Return, for rows of the groups `[n]`, how many of their past rows count, and the share (NaN without any)."""
        slots = self._index.lookup(groups) - 2
        seen = _rows(self._seen, slots, unknown=0)
        count, rows = seen[:, 0].astype(np.float64), seen[:, 1]
        return count, np.divide(count, rows, out=np.full(len(groups), np.nan), where=rows > 0)

    def add_day(self, groups: Ids, counts: NDArray[np.bool_], columns: dict[str, Any]) -> None:
        """Add a day whose rows have all been read.

        Args:
            groups: `[n]` int64, the group of each row, in the order of the day.
            counts: `[n]`, which rows count.
            columns: The history's columns of the rows that count, Arrow arrays of values or of lists.
        """
        fresh = np.setdiff1d(groups, self._index.keys)
        self._index = IntVocabulary(np.concatenate([self._index.keys, fresh]))
        self._seen = np.concatenate([self._seen, np.zeros((len(fresh), 2), np.int64)])
        slots = self._index.lookup(groups) - 2
        self._seen += np.stack(
            [np.bincount(rows, minlength=len(self._seen)) for rows in (slots[counts], slots)], axis=1
        )
        slots = slots[counts]
        order = np.argsort(slots, kind="stable")
        active, begins, lengths = np.unique(slots[order], return_index=True, return_counts=True)
        # Age 0 is the last row of its group on this day; rows older than the length of the list are dropped.
        age = np.repeat(begins + lengths, lengths) - 1 - np.arange(len(order))
        young = age < self._length
        row = np.repeat(np.arange(len(active)), lengths)[young]
        kept, place = order[young], self._length - 1 - age[young]
        # The value at place p + (rows of today) moves to place p.
        source = np.arange(self._length) + lengths[:, None]
        for name, column in columns.items():
            codes = np.concatenate([self._codes[name], np.full((len(fresh), self._length), NOTHING, np.int64)])
            old = np.take_along_axis(codes[active], np.minimum(source, self._length - 1), axis=1)
            new = np.where(source < self._length, old, NOTHING)
            new[row, place] = self._known[name].codes(column)[kept]
            codes[active] = new
            self._codes[name] = codes


def _rows(table: Ids, slots: Ids, unknown: int) -> Ids:
    """Return `table[slots]`, and a row of `unknown` for a slot below 0."""
    rows = np.full((len(slots), table.shape[1]), unknown, np.int64)
    known = slots >= 0
    rows[known] = table[slots[known]]
    return rows


class _Bags:
    """Every distinct bag of a column once; its position is its code. A single value is a bag of one."""

    def __init__(self) -> None:
        self._codes: dict[Any, int] = {}
        self._values: Array = np.empty(0, np.int64)
        self._ends = np.zeros(1, np.int64)

    def codes(self, column: Any) -> Ids:
        """Return the code of each row's bag; new bags get new codes."""
        text = pc.binary_join(column.cast(pa.list_(pa.string())), JOINT) if pa.types.is_list(column.type) else column
        coded = text.dictionary_encode()
        distinct = coded.dictionary.to_pylist()
        first = np.full(len(distinct), len(column), np.int64)
        indices = coded.indices.fill_null(NOTHING).to_numpy()
        np.minimum.at(first, indices[indices >= 0], np.flatnonzero(indices >= 0))
        fresh = [place for place, key in enumerate(distinct) if key not in self._codes]
        self._codes |= {distinct[place]: len(self._ends) - 1 + new for new, place in enumerate(fresh)}
        self._append(column.take(pa.array(first[fresh])))
        codes = np.array([*(self._codes[key] for key in distinct), NOTHING], np.int64)
        found: Ids = codes[indices]
        return found

    def gather(self, codes: Ids) -> tuple[Array, Ids]:
        """Return the values of every row's bags `[n, length]` end to end, and the offsets of the rows."""
        present = codes >= 0
        flat = codes[present]
        begins = self._ends[flat]
        lengths = self._ends[flat + 1] - begins
        ends = np.concatenate([[0], np.cumsum(lengths)])
        values = self._values[np.repeat(begins - ends[:-1], lengths) + np.arange(ends[-1])]
        return values, ends[np.concatenate([[0], np.cumsum(present.sum(axis=1))])]

    def _append(self, bags: Any) -> None:
        if pa.types.is_list(bags.type):
            values, lengths = bags.flatten(), pc.list_value_length(bags).to_numpy()
        else:
            values, lengths = bags, np.ones(len(bags), np.int64)
        new = values.to_numpy(zero_copy_only=False)
        self._values = np.concatenate([self._values.astype(new.dtype, copy=False), new]) if len(new) else self._values
        self._ends = np.concatenate([self._ends, self._ends[-1] + np.cumsum(lengths)])
