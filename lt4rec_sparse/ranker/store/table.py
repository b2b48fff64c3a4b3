"""Rows of features by key: one look-up of the keys, then every column by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.ranker.features import Column
from lt4rec_sparse.ranker.features import raw as raw_columns
from lt4rec_sparse.ranker.features.tables import Array, IntVocabulary, StringVocabulary, hash64
from lt4rec_sparse.ranker.store.columns import StoredColumn

Keys = tuple[Array, raw_columns.Present]


class KeyedTable:
    """Features of `n` distinct keys.

    Args:
        key: The column of a request that holds keys, of type int or string.
        index: The keys, in the order of the rows, each once.
        is_hashed: Whether the keys are strings of which the 64-bit hashes alone are known (`hash64`, as int64).
        columns: Name -> values of the keys, and at row `n` of any other key.

    Raises:
        InputError: If a column has another number of rows.
    """

    def __init__(
        self, key: Column, index: IntVocabulary | StringVocabulary, is_hashed: bool, columns: Mapping[str, StoredColumn]
    ) -> None:
        self.key, self.index, self.is_hashed, self.columns = key, index, is_hashed, dict(columns)
        self.rows = index.size - 2
        for name, column in self.columns.items():
            if len(column) != self.rows + 1:
                raise InputError(f"column {name!r}: got {len(column) - 1} rows, wanted {self.rows}, one per key")

    def take(self, keys: Keys, names: Sequence[str]) -> dict[str, Any]:
        """Return the named columns at keys that `read_keys` gave, raw."""
        values, present = keys
        if self.is_hashed:
            values = hash64(values).view(np.int64)
        found = self.index.lookup(values) - 2
        unknown = found < 0
        are_known = len(found) == len(present) and not unknown.any()
        if are_known:
            places = found
        else:
            found[unknown] = self.rows
            places = np.full(len(present), self.rows, np.int64)
            places[present] = found
        return {name: self.columns[name].take(places, are_known) for name in names}

    def to_arrays(self) -> dict[str, Array]:
        """Return the arrays of the keys."""
        return self.index.to_arrays()


def read_keys(key: Column, raw: Any) -> Keys:
    """Return the keys of a request `[m]`, in any form of `features.raw`: those that are there, and where they are.

    Raises:
        InputError: If they are of another type.
    """
    raw_columns.rows_of(key, raw)  # which refuses what is no sequence
    return raw_columns.single(key, raw)


def key_index(key: Column, keys: Any) -> tuple[IntVocabulary | StringVocabulary, bool]:
    """Return keys that can be looked up, and whether they are hashes of strings: int64 ones of a string column.

    Raises:
        InputError: If a key is missing, there twice, or of another type.
    """
    is_hashed = key.type == "string" and isinstance(keys, np.ndarray) and keys.dtype == np.int64
    kind = Column(key.name, type="int") if is_hashed else key
    values, present = raw_columns.single(kind, keys)
    if not present.all():
        raise InputError(f"keys of {key.name!r}: got a missing one, wanted values")
    if len(np.unique(values) if kind.type == "int" else set(values)) != len(values):
        raise InputError(f"keys of {key.name!r}: got one twice, wanted each once")
    return (IntVocabulary(values) if kind.type == "int" else StringVocabulary(values.tolist())), is_hashed


def stored_index(key: Column, is_hashed: Any, arrays: Mapping[str, Array]) -> IntVocabulary | StringVocabulary:
    """Read the keys of a table back.

    Raises:
        InputError: If an array is absent or malformed, or a key is there twice.
    """
    if not isinstance(is_hashed, bool) or (is_hashed and key.type == "int"):
        raise InputError(f"hashed: got {shown(is_hashed)}, wanted whether keys of {key.type} are hashes")
    kind = IntVocabulary if is_hashed or key.type == "int" else StringVocabulary
    try:
        return kind.from_arrays(dict(arrays))
    except ValueError as error:
        raise InputError(f"keys of {key.name!r}: {error}") from error
