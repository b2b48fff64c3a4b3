"""From requests to candidates: what training would have known of each row at its moment.

A request is a row of a file: the group, the keys of the side tables, columns of the log that are known beforehand, and
the day, in the column that says it in the log. Side tables add their columns, dates become ages, and histories are of
the days of the log that are strictly earlier, all of them if the log has ended before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lt4rec_sparse.files import check_regular
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data.casts import typed
from lt4rec_sparse.recsys.data.days import Progress, check_days, partition
from lt4rec_sparse.recsys.data.dealt import days_of
from lt4rec_sparse.recsys.data.joined import Joined, group_ids
from lt4rec_sparse.recsys.data.past import Past
from lt4rec_sparse.recsys.data.reading import column_names, read_file, request_form
from lt4rec_sparse.recsys.data.source import DataError, RawType, Source, feature_type, raw_types

CHUNK_ROWS = 65_536


class Candidates(NamedTuple):
    """Rows with every feature of a model, in the order of the requests.

    Attributes:
        table: The columns of the requests, then all other features, a `pyarrow.Table`.
        absent: Features, and dates of derived ones, that requests lack, and that are the log's or in no side table:
            they are missing in every row.
    """

    table: Any
    absent: tuple[str, ...]


def complete_requests(
    source: Source,
    path: Path,
    at: str | None,
    scratch: Path,
    progress: Progress = lambda stage, done, total: None,
) -> Candidates:
    """Make candidates of a file of requests, CSV or Parquet, in any order.

    A column that the log has is the log's, as in training: requests bring it, or it is missing. Any other that requests
    have takes precedence over those of side tables; those that are no feature are carried through. Equal rows stay,
    each with its own result. A group without a past has empty histories, a count of 0 and no rate; a key that a side
    table lacks has missing values. Memory holds the requests, the side tables, the histories and a bounded part of the
    log.

    Args:
        source: The log with its side tables, and the schema of the model.
        path: The requests.
        at: The day of all of them; None if the log's column of days or timestamps says it.
        scratch: An empty folder for temporary files of the size of the log.
        progress: Called with stage, done and total.

    Raises:
        DataError: If a key, the group or the day is absent or missing, a column is one that is made here, a value has
            another type than in training, or the log contradicts its schema.
    """
    schema = source.schema
    rows, days = _read(source, path, at)
    coded = days.dictionary_encode()
    moments, codes = coded.dictionary.to_pylist(), coded.indices.to_numpy()
    past, ended = None, dict.fromkeys(moments, 0)
    where = f"{path}: column {schema.moment!r}" if at is None else "--at"
    if schema.histories and moments:
        log = partition(source, scratch, CHUNK_ROWS, progress)
        ended = {moment: log.earlier(moment, where) for moment in moments}
        past = Past(source, log)
    elif moments and schema.time is not None:
        check_days(source, moments, where)
    joined = Joined(source, rows, [column.name for column in schema.columns])
    types = _types(schema)
    complete = rows | {name: pa.nulls(len(days), types[name].arrow) for name in joined.absent}
    places = [np.empty(0, np.int64)]
    parts = [_no_rows(schema)]
    for done, moment in enumerate(sorted(moments, key=ended.__getitem__)):
        if past is not None:
            past.advance(ended[moment])
        of_moment = np.flatnonzero(codes == moments.index(moment))
        for first in range(0, len(of_moment), CHUNK_ROWS):
            places.append(of_moment[first : first + CHUNK_ROWS])
            taken = {name: column.take(pa.array(places[-1])) for name, column in complete.items()}
            parts.append(_features(joined, moment, taken, past))
        progress("complete requests", done + 1, len(moments))
    made = pa.concat_tables(parts).take(np.argsort(np.concatenate(places)))
    return Candidates(pa.table(rows | {name: made[name] for name in made.column_names}), joined.absent)


def _types(schema: Schema) -> dict[str, RawType]:
    """Return how the columns are read that features are made of: they have the types of the log."""
    made = {derived.name: derived.days_since for derived in schema.derived}
    names = [made.get(column.name, column.name) for column in schema.columns]
    names += schema.keys
    types = raw_types(schema)
    return {name: types[name] for name in names}


def _check_columns(schema: Schema, path: Path, there: Sequence[str], at: str | None) -> None:
    """Refuse requests whose keys, group or day are absent, and those that have what is made here."""
    made = {column.name for column in schema.features} - {column.name for column in schema.columns}
    made |= {derived.name for derived in schema.derived}
    given = next((name for name in there if name in made), None)
    if given is not None:
        raise DataError(f"{path}: column {given!r}: got values, wanted none: it is made of the log and the side tables")
    roles = {join.on: f"the key of {join.files[0]}" for join in schema.joins}
    roles |= {} if schema.group is None else {schema.group.column: "the group"}
    for name, role in roles.items():
        if name not in there:
            raise DataError(f"{path}: column {name!r} is absent, wanted {role}")
    time = schema.moment
    if schema.time is None:
        if at is not None:
            raise DataError(f"--at: got {at!r}, wanted none: the log has no [time]")
        return
    if at is not None and time in there:
        raise DataError(f"{path}: column {time!r} and --at: got both, wanted one of them")
    if at is None and time not in there:
        what = "day" if schema.time.day else "time"
        raise DataError(f"{path}: column {time!r} is absent, wanted the {what} of every request in it, or --at DAY")


def _read(source: Source, path: Path, at: str | None) -> tuple[dict[str, Any], Any]:
    """Return the columns of the requests as Arrow arrays, and the day of each."""
    schema = source.schema
    check_regular(path, kind=DataError)
    there = column_names(path)
    _check_columns(schema, path, there, at)
    types, all_types = _types(schema), raw_types(schema)
    batches = [batch for batch in read_file(path, types, there, request_form(schema)) if batch.num_rows]
    days = [pa.repeat(at or "", batch.num_rows) for batch in batches]
    if at is None and schema.time is not None:
        moments = (typed(path, batch.select([schema.moment]), all_types) for batch in batches)
        days = [days_of(path, moment, schema.time) for moment in moments]
    if not batches:
        kinds = {name: types[name].arrow if name in types else pa.string() for name in there}
        return {name: pa.nulls(0, kind) for name, kind in kinds.items()}, pa.nulls(0, pa.string())
    rows = {name: pa.concat_arrays([batch[name] for batch in batches]) for name in there}
    if schema.group is not None and rows[schema.group.column].null_count:
        raise DataError(f"{path}: column {schema.group.column!r}: got a missing value, wanted the group of every row")
    return rows, pa.concat_arrays(days)


def _features(joined: Joined, moment: str, rows: Mapping[str, Any], past: Past | None) -> Any:
    """Return every feature of rows of one day, as a table."""
    schema = joined.schema
    columns = joined.columns(moment, rows)
    if past is not None and schema.group is not None:
        made = past.histories.features(group_ids(columns[schema.group.column]))
        columns |= {name: _arrow(values) for name, values in made.items()}
    return pa.table({column.name: columns[column.name].cast(feature_type(column).arrow) for column in schema.features})


def _no_rows(schema: Schema) -> Any:
    return pa.table({column.name: pa.nulls(0, feature_type(column).arrow) for column in schema.features})


def _arrow(values: Any) -> Any:
    """Return what a history made as an Arrow array: numbers, NaN where missing, or bags."""
    if isinstance(values, tuple):
        return pa.ListArray.from_arrays(pa.array(values[1], pa.int32()), pa.array(values[0]))
    return pa.array(values, from_pandas=True)
