"""Rows ready to be encoded: of a log, joined with side tables, their past and labels, or candidates of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lt4rec_sparse.files import check_regular
from lt4rec_sparse.ranker.features import Join, Schema, Task
from lt4rec_sparse.ranker.features.tables import Ids, IntVocabulary, StringVocabulary, hash64
from lt4rec_sparse.recsys.data.batches import GROUP, LABEL, MEMBER, SLICE, VALUE, WEIGHT
from lt4rec_sparse.recsys.data.days import DayLog
from lt4rec_sparse.recsys.data.history import PastRows
from lt4rec_sparse.recsys.data.source import (
    DataError,
    RawType,
    Source,
    column_names,
    feature_type,
    raw_types,
    read_file,
)

Bools = NDArray[np.bool_]
# The groups of some rows, which of the rows count for a history, and the history's columns of those that do.
Events = tuple[Ids, Bools, dict[str, Any]]


class Rows(NamedTuple):
    """Consecutive rows of one day."""

    day: str
    features: dict[str, Any]  # raw, as `FeatureEncoder` takes them
    columns: dict[str, Any]  # all others: `label.<task>`, `member.<task>` and so on, as `prepare` describes them


class RowReader:
    """Rows of the log with everything that is known before each impression.

    Columns of the log take precedence over columns of a side table with the same name.
    """

    def __init__(self, source: Source, log: DayLog) -> None:
        self._schema, self._log = source.schema, log
        types = raw_types(source.schema)
        wanted = [name for name in types if name not in log.columns]
        self._sides = []
        for join, paths in zip(source.schema.joins, source.joins, strict=True):
            side = _SideTable(join, paths, types, wanted)
            wanted = [name for name in wanted if name not in side.columns]
            self._sides.append(side)
        if wanted:
            files = ", ".join(path.name for paths in (source.log, *source.joins) for path in paths)
            raise DataError(f"{source.folder}: column {wanted[0]!r} is absent, wanted it in one of {files}")

    def read(self, days: frozenset[str]) -> Iterator[Rows]:
        """Yield the rows of the given days, in order; earlier days only enter the histories."""
        pasts = {history.name: PastRows(history) for history in self._schema.histories}
        last = max(map(self._log.days.index, days), default=-1)
        for day in self._log.days[: last + 1]:
            events = {name: list[Events]() for name in pasts}
            for batch in self._log.read(day):
                columns = self._columns(day, batch)
                groups = columns[self._schema.group.column].to_numpy(zero_copy_only=False)
                if groups.dtype != np.int64:  # text has its 64-bit hash as id
                    groups = hash64(groups).view(np.int64)
                for history in self._schema.histories:
                    counts = np.nan_to_num(_floats(columns[history.when])) != 0
                    kept = {name: columns[name].filter(pa.array(counts)) for name in history.columns}
                    events[history.name].append((groups, counts, kept))
                if day in days:
                    yield self._rows(day, columns, groups, pasts)
            for name, past in pasts.items():
                of_day, counted, kept_columns = zip(*events[name], strict=True)
                joined = {key: pa.concat_arrays([part[key] for part in kept_columns]) for key in kept_columns[0]}
                past.add_day(np.concatenate(of_day), np.concatenate(counted), joined)

    def _columns(self, day: str, batch: Any) -> dict[str, Any]:
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        for side in self._sides:
            columns |= side.lookup(columns[side.on])
        for derived in self._schema.derived:
            columns[derived.name] = _days_since(day, derived.days_since, columns[derived.days_since])
        return columns

    def _rows(self, day: str, columns: Mapping[str, Any], groups: Ids, pasts: Mapping[str, PastRows]) -> Rows:
        features = {column.name: _raw_column(columns[column.name]) for column in self._schema.columns}
        for history in self._schema.histories:
            name, past = history.name, pasts[history.name]
            if history.rates:
                features |= dict(zip((f"{name}_count", f"{name}_rate"), past.rates(groups), strict=True))
            features |= {f"{name}_{column}": bags for column, bags in past.bags(groups).items()}
        others: dict[str, Any] = {}
        for task in self._schema.tasks:
            others |= _task_columns(task, columns)
        others[GROUP] = groups
        for part in self._schema.slices:
            inside = pc.fill_null(pc.equal(columns[part.column], part.value), False)
            others[SLICE + part.name] = inside.to_numpy(zero_copy_only=False)
        return Rows(day, features, others | {VALUE + name: _floats(columns[name]) for name in self._schema.carried})


class _SideTable:
    """A side table in memory: only the wanted columns, found by key."""

    def __init__(self, join: Join, paths: tuple[Path, ...], types: Mapping[str, RawType], wanted: list[str]) -> None:
        self.on = join.on
        where = f"{paths[0].parent}: {' '.join(path.name for path in paths)}"
        parts = []
        for path in paths:
            there = column_names(path)
            if join.on not in there:
                raise DataError(f"{path}: column {join.on!r} is absent, wanted the key of the side table")
            columns = [join.on, *(name for name in wanted if name in there)]
            parts += [pa.table(batch) for batch in read_file(path, types, columns)]
        if len({tuple(part.column_names) for part in parts}) > 1:
            raise DataError(f"{where}: differ in columns, wanted the same in each")
        if not parts:
            raise DataError(f"{where}: got no row, wanted a side table")
        table = pa.concat_tables(parts)
        # Nothing joins a row without a key; and a missing int key would turn all keys into floats.
        table = table.filter(table[join.on].is_valid()).combine_chunks()
        self.columns = {name: table[name].combine_chunks() for name in table.column_names}
        keys = self.columns.pop(join.on)
        counts = pc.value_counts(keys)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            first = twice[0]["values"].as_py()
            raise DataError(f"{where}: column {join.on!r}: got key {first!r} twice, wanted each once")
        values = keys.to_numpy(zero_copy_only=False)
        self._keys = IntVocabulary(values) if join.type == "int" else StringVocabulary(values)

    def lookup(self, keys: Any) -> dict[str, Any]:
        """Return the columns at the keys; an unknown or missing key has missing values."""
        present = keys.is_valid().to_numpy(zero_copy_only=False)
        places = np.full(len(keys), -1, np.int64)
        places[present] = self._keys.lookup(keys.drop_null().to_numpy(zero_copy_only=False)) - 2
        rows = pa.array(places, mask=places < 0)
        return {name: column.take(rows) for name, column in self.columns.items()}


def read_candidates(path: Path, schema: Schema, keep: Sequence[str] = ()) -> tuple[dict[str, Any], Any]:
    """Read the feature columns of a CSV or Parquet file, and columns to keep beside the scores.

    They have the types of training, so that they are encoded as in training. Derived columns and the bags of histories
    are ordinary columns here: the caller knows the past of each candidate. Columns in `keep` may be features; others
    have the types of the file, which in CSV is text.

    Returns:
        The features in the forms that `FeatureEncoder.encode` takes, and a `pyarrow.Table` of the columns to keep.

    Raises:
        DataError: If the file cannot be read, a feature or a column to keep is absent, or a value is not of its
            column's type.
    """
    check_regular(path, kind=DataError)
    there = column_names(path)
    types = {column.name: feature_type(column) for column in schema.features}
    for names, wanted in ((types, "every feature of the model"), (keep, f"one of {', '.join(there)}")):
        for name in names:
            if name not in there:
                raise DataError(f"{path}: column {name!r} is absent, wanted {wanted}")
    names = list(dict.fromkeys((*types, *keep)))
    batches = list(read_file(path, types, names))
    if not batches:
        return {name: [] for name in types}, pa.table({name: pa.nulls(0) for name in keep})
    table = pa.Table.from_batches(batches).combine_chunks()
    features = {name: _raw_column(pa.concat_arrays(table[name].chunks)) if table.num_rows else [] for name in types}
    return features, table.select(list(dict.fromkeys(keep)))


def _raw_column(column: Any) -> Any:
    """Return an Arrow column as `features.raw` takes it: an array, masked where missing, or values and offsets."""
    if pa.types.is_list(column.type):
        # A key that the side table lacks gives a missing list: an empty bag.
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        return _raw_column(column.flatten()), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if column.null_count == 0 or not pa.types.is_integer(column.type):
        return column.to_numpy(zero_copy_only=False)  # missing text becomes None, a missing float NaN
    return np.ma.MaskedArray(column.fill_null(0).to_numpy(), column.is_null().to_numpy(zero_copy_only=False))


def _task_columns(task: Task, columns: Mapping[str, Any]) -> dict[str, Any]:
    label = _floats(columns[task.label])
    member = ~np.isnan(label)
    if task.divide_by is not None:
        divisor = _floats(columns[task.divide_by])
        member &= (label >= 0) & (divisor > 0)  # NaN compares false: no divisor, no label
        with np.errstate(over="ignore"):  # a ratio beyond float64 is cut to 1 like any other above 1
            label = np.clip(np.divide(label, divisor, out=np.zeros_like(label), where=member), 0, 1)
    for name in task.rows:
        member &= np.nan_to_num(_floats(columns[name])) != 0
    weight = np.ones_like(label) if task.weight is None else _floats(columns[task.weight])
    member &= ~np.isnan(weight)
    return {
        LABEL + task.name: np.where(member, label, 0).astype(np.float32),
        MEMBER + task.name: member,
        WEIGHT + task.name: np.where(member, weight, 0).astype(np.float32),
    }


def _floats(column: Any) -> NDArray[np.float64]:
    """Return a float64 column, writable, with NaN for missing and for infinite values: no count or time is infinite."""
    values = np.array(column.to_numpy(zero_copy_only=False), np.float64)
    values[np.isinf(values)] = np.nan
    return values


def _days_since(day: str, name: str, column: Any) -> Any:
    today = _date(day, "the day")
    coded = column.dictionary_encode()
    ages = [float((today - _date(text, f"column {name!r}")).days) for text in coded.dictionary.to_pylist()]
    return pa.array(ages, pa.float64()).take(coded.indices)


def _date(text: str, where: str) -> date:
    """Read 2022-04-25, 20220425, or either followed by a time."""
    digits = text[:10].replace("-", "")[:8]
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        raise DataError(f"{where}: got {text!r}, wanted a date such as 2022-04-25 or 20220425") from None
