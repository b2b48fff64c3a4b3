"""Columns of a feature table: `take` gives rows in the form that `features.raw` reads fastest.

Row `n` of a column of `n` keys is that of a key that the table lacks. `are_known` says that it is not among the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import Column
from lt4rec_sparse.ranker.features import raw as raw_columns
from lt4rec_sparse.ranker.features.tables import Array, Ids, StringVocabulary, checked_array

Bools = NDArray[np.bool_]


class Numbers:
    """Numbers; NaN is missing. File: `values`, float64 `[n + 1]`."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.values = values

    def take(self, rows: Ids, are_known: bool) -> Array:
        """Return the values of rows, float64."""
        return self.values.take(rows)

    def to_arrays(self) -> dict[str, Array]:
        """Return the arrays of the file."""
        return {"values": self.values}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Numbers:
        """Read `to_arrays` back."""
        return cls(checked_array(arrays, "values", np.float64))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.values)


class Vectors:
    """Vectors; one of NaN is missing. File: `values`, float64 `[(n + 1) * size]`, row after row."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.values = values

    def take(self, rows: Ids, are_known: bool) -> Array:
        """Return the vectors of rows, float64 `[rows, size]`."""
        return self.values.take(rows, axis=0)

    def to_arrays(self) -> dict[str, Array]:
        """Return the arrays of the file."""
        return {"values": self.values.reshape(-1)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], size: int) -> Vectors:
        """Read `to_arrays` back."""
        values = checked_array(arrays, "values", np.float64)
        if len(values) % size:
            raise InputError(f"values: got {len(values)} numbers, wanted a multiple of {size}")
        return cls(values.reshape(-1, size))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.values)


class Integers:
    """Integers that may be missing. File: `values`, int64, and `missing`, uint8, 1 where one is; both `[n + 1]`."""

    def __init__(self, values: Ids, missing: Bools) -> None:
        self.values, self.missing = values, missing
        self._has_gaps = bool(missing[:-1].any())

    def take(self, rows: Ids, are_known: bool) -> Array:
        """Return the values of rows, int64, masked where missing; an array without a mask is read faster."""
        values = self.values.take(rows)
        if are_known and not self._has_gaps:
            return values
        missing = self.missing.take(rows)
        return np.ma.MaskedArray(values, missing) if missing.any() else values

    def to_arrays(self) -> dict[str, Array]:
        """Return the arrays of the file."""
        return {"values": self.values, "missing": self.missing.view(np.uint8)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Integers:
        """Read `to_arrays` back."""
        values, missing = checked_array(arrays, "values", np.int64), checked_array(arrays, "missing", np.uint8)
        if len(missing) != len(values):
            raise InputError(f"missing: got {len(missing)} rows, wanted {len(values)}")
        return cls(values, missing != 0)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.values)


class Texts:
    """Texts, each distinct one once.

    File: `places`, int64 `[n + 1]`: which of the distinct texts a row has, -1 if it is missing; and `bytes` and
    `offsets` of these texts, as in `StringVocabulary`.
    """

    def __init__(self, places: Ids, distinct: tuple[str, ...]) -> None:
        self.places, self.distinct = places, distinct
        self.objects = np.array([*distinct, None], object)  # place -1 is its last

    def take(self, rows: Ids, are_known: bool) -> Array:
        """Return the texts of rows, object; None is missing."""
        return self.objects.take(self.places.take(rows))

    def to_arrays(self) -> dict[str, Array]:
        """Return the arrays of the file."""
        return {"places": self.places, **StringVocabulary(self.distinct).to_arrays()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Texts:
        """Read `to_arrays` back."""
        places = checked_array(arrays, "places", np.int64)
        distinct = StringVocabulary.from_arrays(dict(arrays)).keys
        if len(places) and not (places.min() >= -1 and places.max() < len(distinct)):
            raise InputError(f"places: got {places.min()} to {places.max()}, wanted -1 to {len(distinct) - 1}")
        return cls(places, distinct)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.places)


class Bags:
    """A bag of values per row, none of them missing.

    File: the arrays of its values, named `item.<array>`, and `starts`, int64 `[n + 2]`: row `r` has the values
    `starts[r]` to `starts[r + 1]`.
    """

    def __init__(self, items: Integers | Texts, starts: Ids) -> None:
        self.items, self.starts = items, starts

    def take(self, rows: Ids, are_known: bool) -> tuple[Array, Ids]:
        """Return the bags of rows as `(values [nnz], offsets [rows + 1])`."""
        if len(rows) == 1:  # what a request has once: a cut, a quarter of the time
            first, last = self.starts[rows[0]], self.starts[rows[0] + 1]
            return self._values(slice(first, last)), np.array([0, last - first])
        begins = self.starts.take(rows)
        offsets = np.zeros(len(rows) + 1, np.int64)
        lengths = self.starts.take(rows + 1) - begins
        np.cumsum(lengths, out=offsets[1:])
        return self._values(np.repeat(begins - offsets[:-1], lengths) + np.arange(offsets[-1])), offsets

    def _values(self, places: Any) -> Array:
        if isinstance(self.items, Integers):
            values: Array = self.items.values[places]
            return values
        texts: Array = self.items.objects[self.items.places[places]]
        return texts

    def to_arrays(self) -> dict[str, Array]:
        """Return the arrays of the file."""
        return {"starts": self.starts} | {f"item.{name}": array for name, array in self.items.to_arrays().items()}

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.starts) - 1


StoredColumn = Numbers | Vectors | Integers | Texts | Bags


def from_raw(column: Column, raw: Any, unknown: float = np.nan) -> StoredColumn:
    """Return a column of `n` keys, in any form of `features.raw`, with a row for other keys: missing, or a number.

    Raises:
        InputError: If a value has a wrong type.
    """
    if column.kind == "multi":
        values, offsets = raw_columns.bags(column, raw)
        items = _items(column, values, np.ones(len(values), np.bool_))
        return Bags(items, np.append(offsets, offsets[-1]))
    if column.kind == "vector":
        values, present = raw_columns.numbers(column, raw)
        vectors = np.full((len(present) + 1, column.size), np.nan)
        vectors[:-1][present] = values
        return Vectors(vectors)
    values, present = raw_columns.single(column, raw)
    if column.kind == "dense":
        numbers = np.full(len(present) + 1, np.nan)
        numbers[:-1][present] = values
        numbers[-1] = unknown
        return Numbers(numbers)
    return _items(column, values, np.append(present, False))


def from_arrays(column: Column, arrays: Mapping[str, Array]) -> StoredColumn:
    """Read a column from a file that is not trusted.

    Raises:
        InputError: If an array is absent or malformed.
    """
    try:
        return _stored(column, arrays)
    except ValueError as error:
        raise InputError(f"column {column.name!r}: {error}") from error


def _stored(column: Column, arrays: Mapping[str, Array]) -> StoredColumn:
    kind = Integers if column.type == "int" else Texts
    if column.kind == "dense":
        return Numbers.from_arrays(arrays)
    if column.kind == "vector":
        return Vectors.from_arrays(arrays, column.size)
    if column.kind == "single":
        return kind.from_arrays(arrays)
    named = {name.removeprefix("item."): array for name, array in arrays.items() if name.startswith("item.")}
    items, starts = kind.from_arrays(named), checked_array(arrays, "starts", np.int64)
    if not len(starts) or starts[0] != 0 or starts[-1] != len(items) or (np.diff(starts) < 0).any():
        raise InputError(f"starts: got no ascending cut of {len(items)} values, wanted 0 first and {len(items)} last")
    if (items.missing if isinstance(items, Integers) else items.places < 0).any():
        raise InputError("item: got a missing value in a bag, wanted it left out")
    return Bags(items, starts)


def _items(column: Column, values: Array, present: Bools) -> Integers | Texts:
    """Return the values that are present at their rows."""
    if column.type == "int":
        spread = np.zeros(len(present), np.int64)
        spread[present] = values
        return Integers(spread, ~present)
    place: dict[str, int] = {}
    places = np.full(len(present), -1, np.int64)
    places[present] = np.fromiter((place.setdefault(str(text), len(place)) for text in values), np.int64, len(values))
    return Texts(places, tuple(place))
