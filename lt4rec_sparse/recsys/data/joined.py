"""Columns of rows, of the side tables that their keys find, and derived from both: the same for a log and for requests.

A column that the log has is the log's, whether rows have it or not: no side table stands in for it. What rows have
themselves takes precedence over a side table, and an earlier side table over a later one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lt4rec_sparse.ranker.features import Join
from lt4rec_sparse.ranker.features.tables import Ids, IntVocabulary, StringVocabulary, hash64
from lt4rec_sparse.recsys.data.casts import is_text
from lt4rec_sparse.recsys.data.reading import Form, column_names, join_form, log_form, read_file
from lt4rec_sparse.recsys.data.source import DataError, RawType, Source, raw_types


class Joined:
    """Joins rows with side tables, of which only the wanted columns are in memory.

    Args:
        source: The folder with the side tables.
        there: The columns that rows have themselves.
        wanted: The columns to have; derived ones are made from those that they need.

    Attributes:
        schema: That of the source.
        sides: One per join of the schema.
        absent: Wanted columns that rows lack, and that are the log's or in no side table.
    """

    def __init__(self, source: Source, there: Collection[str], wanted: Collection[str]) -> None:
        self.schema, self._source = source.schema, source
        self._derived = {item.name: item.days_since for item in source.schema.derived if item.name in wanted}
        types = raw_types(source.schema)
        lacked = list(dict.fromkeys(self._derived.get(name, name) for name in wanted))
        lacked = [name for name in lacked if name not in there]
        of_log = {*column_names(source.log[0], log_form(source.schema))}
        left = [name for name in lacked if name not in of_log]
        self.sides = []
        for join, paths in zip(source.schema.joins, source.joins, strict=True):
            side = SideTable(join, paths, types, left, join_form(source.schema, join))
            left = [name for name in left if name not in side.names]
            self.sides.append(side)
        self.absent = tuple(name for name in lacked if name in of_log or name in left)

    def check_none_absent(self) -> None:
        """Refuse a wanted column that is nowhere.

        Raises:
            DataError: If one is absent.
        """
        if self.absent:
            files = ", ".join(path.name for path in self._source.files)
            raise DataError(f"{self._source.folder}: column {self.absent[0]!r} is absent, wanted it in one of {files}")

    def columns(self, day: str, rows: Mapping[str, Any], names: Collection[str] | None = None) -> dict[str, Any]:
        """Return the columns of rows of a day, and those of side tables and derived ones that are among `names`.

        None stands for all wanted columns. All are Arrow arrays.
        """
        dates = {name: date for name, date in self._derived.items() if names is None or name in names}
        columns = dict(rows)
        for side in self.sides:
            of_side = [name for name in side.names if names is None or name in names or name in dates.values()]
            if of_side:
                columns |= side.lookup(columns[side.on], of_side)
        return columns | {name: _days_since(day, date, columns[date]) for name, date in dates.items()}

    def derived(self, day: str, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return the derived columns of rows of a day: those whose dates are among the columns."""
        dates = {name: date for name, date in self._derived.items() if date in columns}
        return {name: _days_since(day, date, columns[date]) for name, date in dates.items()}


class SideTable:
    """A side table in memory: only the wanted columns, found by key.

    Texts are coded: most are of few kinds, and there may be millions of rows.

    Attributes:
        on: The column of the key.
        names: The columns; the key is not among them.
        keys: The key of every row, int64 or str.
    """

    def __init__(
        self, join: Join, paths: tuple[Path, ...], types: Mapping[str, RawType], wanted: list[str], form: Form
    ) -> None:
        self.on = join.on
        where = f"{paths[0].parent}: {' '.join(path.name for path in paths)}"
        parts = []
        for path in paths:
            there = column_names(path, form)
            if join.on not in there:
                raise DataError(f"{path}: column {join.on!r} is absent, wanted the key of the side table")
            columns = [join.on, *(name for name in wanted if name in there and name != join.on)]
            parts += [_coded(batch, join.on) for batch in read_file(path, types, columns, form)]
        if len({tuple(part.column_names) for part in parts}) > 1:
            raise DataError(f"{where}: differ in columns, wanted the same in each")
        if not parts:
            raise DataError(f"{where}: got no row, wanted a side table")
        table = pa.concat_tables(parts).unify_dictionaries()
        parts.clear()
        # Nothing joins a row without a key; and a missing int key would turn all keys into floats.
        table = table.filter(table[join.on].is_valid()).combine_chunks()
        keys = table[join.on].combine_chunks()
        self._columns = {name: table[name].combine_chunks() for name in table.column_names if name != join.on}
        self.names = tuple(self._columns)
        counts = pc.value_counts(keys)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            first = twice[0]["values"].as_py()
            raise DataError(f"{where}: column {join.on!r}: got key {first!r} twice, wanted each once")
        self.keys = keys.to_numpy(zero_copy_only=False)
        self._index = IntVocabulary(self.keys) if join.type == "int" else StringVocabulary(self.keys)

    @property
    def columns(self) -> dict[str, Any]:
        """Name -> values of every row, an Arrow array."""
        return {name: _plain(column) for name, column in self._columns.items()}

    def lookup(self, keys: Any, names: Collection[str]) -> dict[str, Any]:
        """Return the named columns at the keys; an unknown or missing key has missing values."""
        present = keys.is_valid().to_numpy(zero_copy_only=False)
        places = np.full(len(keys), -1, np.int64)
        places[present] = self._index.lookup(keys.drop_null().to_numpy(zero_copy_only=False)) - 2
        rows = pa.array(places, mask=places < 0)
        return {name: _plain(self._columns[name].take(rows)) for name in names}


def _coded(batch: Any, key: str) -> Any:
    """Return a table whose columns of texts are dictionaries, but for the key."""
    columns = {
        name: column.dictionary_encode() if is_text(column.type) and name != key else column
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
    return pa.table(columns)


def _plain(column: Any) -> Any:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def group_ids(column: Any) -> Ids:
    """Return the groups of rows as int64; text has its 64-bit hash as id."""
    groups: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return groups if groups.dtype == np.int64 else hash64(groups).view(np.int64)


def raw_column(column: Any) -> Any:
    """Return an Arrow column as `features.raw` takes it: an array, masked where missing, or values and offsets."""
    if pa.types.is_list(column.type):
        # A key that the side table lacks gives a missing list: an empty bag.
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        return raw_column(column.flatten()), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if column.null_count == 0 or not pa.types.is_integer(column.type):
        return column.to_numpy(zero_copy_only=False)  # missing text becomes None, a missing float NaN
    return np.ma.MaskedArray(column.fill_null(0).to_numpy(), column.is_null().to_numpy(zero_copy_only=False))


def _days_since(day: str, name: str, column: Any) -> Any:
    today = as_date(day, "the day")
    coded = column.dictionary_encode()
    ages = [float((today - as_date(text, f"column {name!r}")).days) for text in coded.dictionary.to_pylist()]
    return pa.array(ages, pa.float64()).take(coded.indices)


def as_date(text: str, where: str) -> date:
    """Read 2022-04-25, 20220425, or either followed by a time.

    Raises:
        DataError: If the text begins with no such date.
    """
    digits = text[:10].replace("-", "")[:8]
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        raise DataError(f"{where}: got {text!r}, wanted a date such as 2022-04-25 or 20220425") from None
