"""Candidates of a file, ready to be encoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lt4rec_sparse.files import check_regular
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data.casts import typed
from lt4rec_sparse.recsys.data.joined import raw_column
from lt4rec_sparse.recsys.data.reading import column_names, list_columns, read_file, request_form
from lt4rec_sparse.recsys.data.source import DataError, RawType, feature_type

EVERY = "every feature of the model, as `lt4rec-sparse candidates` makes them of requests"


def ids_of(path: Path, schema: Schema, tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of a file of candidates that say which row is which.

    They are the group, the keys of the side tables, the day or time, and whatever is no feature; but no column that has
    the name of a task, and none of lists.
    """
    check_regular(path, kind=DataError)
    features = {column.name for column in schema.features}
    ids = {*schema.keys, schema.moment}
    there = [name for name in column_names(path) if name in ids or name not in features]
    unfit = {*tasks, *list_columns(path)}
    return tuple(name for name in there if name not in unfit)


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
    types = _types(path, column_names(path), schema, keep)
    names = list(dict.fromkeys((*types, *keep)))
    batches = list(read_file(path, types, names, request_form(schema)))
    if not batches:
        return {name: [] for name in types}, pa.table({name: pa.nulls(0) for name in keep})
    table = pa.Table.from_batches(batches)
    features = {name: raw_column(pa.concat_arrays(table[name].chunks)) if table.num_rows else [] for name in types}
    return features, table.select(list(dict.fromkeys(keep)))


def features_of(batch: Any, schema: Schema, keep: Sequence[str] = ()) -> dict[str, Any]:
    """Return the features of a record batch as `read_candidates` does those of a file of Parquet.

    Raises:
        DataError: If a feature or a column to keep is absent, or a value is not of its column's type.
    """
    where = Path("batch")
    types = _types(where, batch.schema.names, schema, keep)
    if not batch.num_rows:
        return {name: [] for name in types}
    columns = typed(where, batch.select([*types]), types, schema.files.missing)
    return {name: raw_column(columns.column(name)) for name in types}


def _types(path: Path, there: Sequence[str], schema: Schema, keep: Sequence[str]) -> dict[str, RawType]:
    """Return how to read every feature; all and the columns to keep must be there."""
    types = {column.name: feature_type(column) for column in schema.features}
    for names, wanted in ((types, EVERY), (keep, f"one of {', '.join(there)}")):
        for name in names:
            if name not in there:
                raise DataError(f"{path}: column {name!r} is absent, wanted {wanted}")
    return types
