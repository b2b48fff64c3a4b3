"""Tables of features in one file, which is replaced whole: a reader has the old ones or the new ones.

A safetensors file as `checked_file` writes it, of the kind `lt4rec_sparse.features`. Its JSON:

```text
version   1
day       the day that histories and ages are as of, as text; null if they are of none
schema    the schema of the model, as in an artefact
tables    a list of {"key": column of a request, "hashed": bool, "columns": [names of features]}
```

Arrays of table `t` are `<t>.key.<array>`: `keys` (int64 `[n]`), or `bytes` and `offsets` of strings as in
`StringVocabulary`; those of its column `c` are `<t>.<c>.<array>`, as `columns` describes them by the kind that the
schema gives the column. They are of uint8, int64 and float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lt4rec_sparse import checked_file
from lt4rec_sparse.checked_file import ArtefactError
from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.ranker.features import Column, Schema
from lt4rec_sparse.ranker.features.tables import Array
from lt4rec_sparse.ranker.store.columns import from_arrays, from_raw
from lt4rec_sparse.ranker.store.table import KeyedTable, key_index, stored_index

KIND, VERSION = "lt4rec_sparse.features", 1
WANTED = "a file of features"


@dataclass(frozen=True)
class FeatureTable:
    """Features of keys, raw, to be written.

    Attributes:
        key: The column of a request that holds such keys: the group's, or the key of a side table.
        keys: `n` distinct ints or strings, as the schema says; hashes of string groups as int64 (`hash64`).
        columns: Feature -> `n` values, in any form of `features.raw`.
    """

    key: str
    keys: Any
    columns: Mapping[str, Any] = field(default_factory=dict)


class Features(NamedTuple):
    """What a file of features holds."""

    schema: Schema
    day: str | None
    tables: tuple[KeyedTable, ...]

    @property
    def columns(self) -> dict[str, str]:
        """Feature -> the column of a request by which it is found."""
        return {name: table.key.name for table in self.tables for name in table.columns}


def write_features(path: Path | str, schema: Schema, tables: Sequence[FeatureTable], day: str | None = None) -> None:
    """Write a file of features, completely or not at all.

    A key that a table lacks has missing values, and counts of histories of 0, as training has them.

    Args:
        path: The file, such as features.safetensors beside the artefact.
        schema: That of the model: `ranker.encoder.schema`.
        tables: At least one; several may have the same key.
        day: The day that histories and ages are as of, for those that read the file.

    Raises:
        InputError: If a column is no feature or is in two tables, a key is not one of the schema's, keys repeat, or a
            value has a wrong type.
    """
    columns = {column.name: column for column in schema.features}
    counts = {f"{history.name}_count" for history in schema.histories if history.rates}
    made = []
    for table in tables:
        key = _key(schema, table.key)
        index, is_hashed = key_index(key, table.keys)
        stray = next((name for name in table.columns if name not in columns), None)
        if stray is not None:
            raise InputError(f"column {stray!r}: got no feature, wanted one of the schema {schema.name!r}")
        stored = {
            name: from_raw(columns[name], raw, 0.0 if name in counts else np.nan) for name, raw in table.columns.items()
        }
        made.append(KeyedTable(key, index, is_hashed, stored))
    _check_distinct(made)
    described: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for t, keyed in enumerate(made):
        described.append({"key": keyed.key.name, "hashed": keyed.is_hashed, "columns": list(keyed.columns)})
        arrays = {f"{t}.key.{name}": array for name, array in keyed.to_arrays().items()}
        for c, column in enumerate(keyed.columns.values()):
            arrays |= {f"{t}.{c}.{name}": array for name, array in column.to_arrays().items()}
        tensors |= {
            name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in arrays.items()
        }
    meta = {"version": VERSION, "day": day, "schema": schema.to_stored(), "tables": described}
    checked_file.write(path, KIND, meta, tensors)


def read_features(path: Path | str) -> Features:
    """Read a file of features, memory-mapped, all of it checked.

    Raises:
        FileNotFoundError: If there is no such file.
        ArtefactError: If the file is truncated, altered, of another kind or version, or inconsistent.
    """
    meta, tensors = checked_file.read(path, KIND, WANTED, (VERSION,), ("U8", "I64", "F64"))
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    for array in arrays.values():
        array.flags.writeable = False  # all requests share them
    try:
        day = meta.get("day")
        if not (day is None or isinstance(day, str)):
            raise InputError(f"day: got {shown(day)}, wanted text or null")
        schema = Schema.from_stored(meta.get("schema", {}))
        tables = meta.get("tables")
        if not isinstance(tables, list):
            raise InputError(f"tables: got {shown(tables)}, wanted a list")
        made = tuple(_stored(schema, t, described, arrays) for t, described in enumerate(tables))
        _check_distinct(made)
    except ValueError as error:
        raise ArtefactError(f"{path}: {error}") from error
    return Features(schema, day, made)


def _stored(schema: Schema, t: int, described: Any, arrays: Mapping[str, Array]) -> KeyedTable:
    named = described if isinstance(described, dict) else {}
    names, columns = named.get("columns"), {column.name: column for column in schema.features}
    if not isinstance(names, list) or not all(isinstance(name, str) and name in columns for name in names):
        raise InputError(f"table {t}: got {shown(described)}, wanted a key and columns that are features")
    key = _key(schema, named.get("key"))
    stored = {name: from_arrays(columns[name], _under(f"{t}.{c}.", arrays)) for c, name in enumerate(names)}
    hashed = named.get("hashed")
    return KeyedTable(key, stored_index(key, hashed, _under(f"{t}.key.", arrays)), bool(hashed), stored)


def _under(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _key(schema: Schema, name: Any) -> Column:
    if not isinstance(name, str) or name not in schema.keys:
        raise InputError(f"key: got {shown(name)}, wanted one of {', '.join(schema.keys)}")
    return Column(name, type=schema.keys[name])


def _check_distinct(tables: Sequence[KeyedTable]) -> None:
    names = [name for table in tables for name in table.columns]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"column {twice!r}: got it in two tables, wanted it in one")
