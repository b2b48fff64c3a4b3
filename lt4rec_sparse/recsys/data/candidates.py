"""Candidates to be scored, from a file: read with the types of training, so that they are encoded as in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data.rows import raw_column
from lt4rec_sparse.recsys.data.source import DataError, column_names, feature_type, read_file


def read_candidates(path: Path, schema: Schema) -> dict[str, Any]:
    """Read the feature columns of a CSV or Parquet file, in the forms that `FeatureEncoder.encode` takes.

    Derived columns and the bags of histories are columns like any other here: whoever asks for scores knows the past.

    Raises:
        DataError: If the file cannot be read, a feature is absent, or a value is not of its column's type.
    """
    there = column_names(path)
    types = {column.name: feature_type(column) for column in schema.features}
    for name in types:
        if name not in there:
            raise DataError(f"{path}: column {name!r} is absent, wanted every feature of the model")
    layout = pa.schema([(name, kind.arrow) for name, kind in types.items()])
    table = pa.Table.from_batches(read_file(path, types, list(types)), layout).combine_chunks()
    return {name: raw_column(pa.concat_arrays(table[name].chunks)) if table.num_rows else [] for name in types}
