"""Raw columns in the forms that callers have them, checked once and reduced to present values and their positions.

A categorical or dense column is a sequence of `batch` values (list, array, masked array, or a column of pyarrow, polars
or pandas); None, NaN, pandas' NA and masked are missing. A multi-valued column is a sequence of `batch` lists or
separated strings, or the pair `(values, offsets)` with row `b` in `values[offsets[b] : offsets[b + 1]]`, which is the
fast form. A vector has these forms too, and that of an array `[batch, size]`; an empty one is missing, and so is one of
NaN alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.ranker.features.schema import Column
from lt4rec_sparse.ranker.features.tables import Array, Ids

Present = NDArray[np.bool_]
TEXT = {str, np.str_}


def columns_of(table: Any) -> dict[str, Any]:
    """Return the columns of a table by name: of a mapping, a record batch or a data frame.

    Raises:
        InputError: If it is none of these.
    """
    if isinstance(table, Mapping):
        return table if isinstance(table, dict) else dict(table)
    if hasattr(table, "column_names"):  # pyarrow
        return {name: table.column(name) for name in table.column_names}
    if hasattr(table, "columns") and hasattr(table, "__getitem__"):  # polars, pandas
        return {str(name): table[name] for name in table.columns}
    raise InputError(f"columns: got {type(table).__name__}, wanted a dict of columns, a record batch or a data frame")


def _plain(raw: Any) -> Any:
    """Return a column of a table as a list of Python's values; other columns as they are."""
    if isinstance(raw, list | tuple | np.ndarray):
        return raw
    to_list = getattr(raw, "to_pylist", None) or getattr(raw, "to_list", None)
    return raw if to_list is None else to_list()


def rows_of(column: Column, raw: Any) -> int:
    """Return how many rows a raw column has."""
    if _is_bags(column, raw):
        return len(raw[1]) - 1
    dimensions = (1, 2) if column.is_list else (1,)  # of an array, whose rows may be the lists
    if isinstance(raw, str | bytes) or not hasattr(raw, "__len__") or getattr(raw, "ndim", 1) not in dimensions:
        raise _refuse(column, raw, "a sequence of values")
    return len(raw)


def single(column: Column, raw: Any) -> tuple[Array, Present]:
    """Return the values that are present (int64, object or float64 by the column) and which rows have one (bool)."""
    raw = _plain(raw)
    if column.kind == "dense":
        return _numbers(column, raw)
    return _integers(column, raw) if column.type == "int" else _strings(column, raw)


def bags(column: Column, raw: Any) -> tuple[Array, Ids]:
    """Return a multi-valued column as `(values [nnz], offsets [batch + 1])`, without missing values, at most `last`."""
    flat, offsets = _flat(column, raw)
    values, present = single(column, flat)
    if not present.all():
        offsets = np.concatenate([[0], np.cumsum(present, dtype=np.int64)])[offsets]
    return _last(values, offsets, column.last) if column.last else (values, offsets)


def _last(values: Array, offsets: Ids, most: int) -> tuple[Array, Ids]:
    """Return the last values of each bag, `most` of them or fewer."""
    lengths = np.minimum(np.diff(offsets), most)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    places = np.repeat(offsets[1:] - ends[1:], lengths) + np.arange(ends[-1])
    return values[places], ends


def numbers(column: Column, raw: Any) -> tuple[Array, Present]:
    """Return the numbers or vectors that are present, `[n, places]` float64, and which rows have one (bool).

    Raises:
        InputError: If a value is no number, or a vector has another size or some places without a number.
    """
    if column.kind != "vector":
        values, present = _numbers(column, _plain(raw))
        return values[:, None], present
    if isinstance(raw, np.ndarray) and raw.ndim == 2:
        width = raw.shape[1]
        flat, offsets = raw.reshape(-1), np.arange(len(raw) + 1, dtype=np.int64) * width
    else:
        flat, offsets = _flat(column, raw)
    lengths = np.diff(offsets)
    wrong = (lengths != 0) & (lengths != column.size)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"column {column.name!r}: got {lengths[row]} numbers in row {row}, wanted {column.size}, or none"
        )
    values, present = _numbers(column, flat)
    counts = np.zeros(len(lengths), np.int64)
    counts[lengths != 0] = present.reshape(-1, column.size).sum(1)
    partial = (counts != 0) & (counts != column.size)
    if partial.any():
        row = int(partial.argmax())
        raise InputError(
            f"column {column.name!r}: got {counts[row]} numbers and missing ones in row {row}, wanted {column.size}"
        )
    return values.reshape(-1, column.size), counts > 0


def _flat(column: Column, raw: Any) -> tuple[Any, Ids]:
    """Return the values of lists one after another, and where each begins and ends."""
    if _is_bags(column, raw):
        flat, offsets = raw[0], raw[1].astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != len(flat) or (np.diff(offsets) < 0).any():
            raise _refuse(column, offsets, f"offsets that ascend from 0 to {len(flat)}")
        return flat, offsets
    rows = [_bag(column, row) for row in _plain(raw)]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    there = [row for row in rows if len(row)]
    # Arrays of numbers of one dtype stay arrays; of several, ints would become floats.
    if len({getattr(row, "dtype", None) for row in there}) == 1 and all(_is_numeric(row) for row in there):
        return np.concatenate(there), offsets
    return list(chain.from_iterable(there)), offsets


def _is_numeric(row: Any) -> bool:
    return type(row) is np.ndarray and row.ndim == 1 and row.dtype.kind in "biuf"


def _is_bags(column: Column, raw: Any) -> bool:
    if not column.is_list or not isinstance(raw, tuple) or len(raw) != 2:
        return False
    return all(isinstance(part, np.ndarray) and part.ndim == 1 for part in raw) and len(raw[1]) > 0


def _bag(column: Column, row: Any) -> Any:
    if isinstance(row, str):
        if column.kind == "vector":
            return [_parsed_number(column, text) for text in row.split(column.separator)] if row.strip() else ()
        texts = [text for part in row.split(column.separator) if (text := part.strip())]
        return texts if column.type == "string" else [_parsed(column, text) for text in texts]
    if isinstance(row, list | tuple | np.ndarray):
        return () if row is np.ma.masked else row
    if not _is_there(row):
        return ()
    raise _refuse(column, row, f"a list or a string separated by {column.separator!r}")


def _parsed(column: Column, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _refuse(column, text, "int") from None


def _parsed_number(column: Column, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _refuse(column, text, "a number") from None


def _numbers(column: Column, raw: Any) -> tuple[Array, Present]:
    values, present = _unmasked(raw)
    if values.dtype.kind not in "iuf":
        if values.dtype.kind != "O":
            raise _refuse(column, values[0], "a number")
        present &= _there(values)
        numbers = int | float | np.number
        stray = next((v for v in values[present] if not isinstance(v, numbers) or isinstance(v, bool)), None)
        if stray is not None:
            raise _refuse(column, stray, "a number")
        values = np.where(present, values, np.nan)
    try:
        values = values.astype(np.float64)
    except OverflowError:
        raise _refuse(column, max(values[present], key=abs), "a number of 64 bits") from None
    present &= ~np.isnan(values)
    return values[present], present


def _integers(column: Column, raw: Any) -> tuple[Array, Present]:
    values, present = _unmasked(raw)
    if values.dtype.kind == "f":
        if not isinstance(raw, np.ndarray):
            # A list such as [2**60 + 1, None-as-NaN] would lose its last bits as floats.
            values = np.array(raw, object)
        else:
            present &= ~np.isnan(values)
            # A float of 2^63 or more, infinity among them, would wrap around as int64.
            stray = present & ((values != np.trunc(values)) | (np.abs(values) >= 2.0**63))
            if stray.any():
                raise _refuse(column, values[stray][0], "an int of 64 bits")
    if values.dtype == np.uint64 and (values[present] > np.iinfo(np.int64).max).any():
        raise _refuse(column, values[present].max(), "an int of 64 bits")
    if values.dtype.kind == "O":
        present &= _there(values)
        for value in values[present]:
            # 7.0 is 7: a column of ints with a missing one comes as floats from many tools.
            whole = isinstance(value, float | np.floating) and float(value).is_integer()
            if not (whole or isinstance(value, int | np.integer)) or isinstance(value, bool):
                raise _refuse(column, value, "int")
    elif values.dtype.kind not in "iuf":
        raise _refuse(column, values[0], "int")
    try:
        return values[present].astype(np.int64), present
    except OverflowError:
        raise _refuse(column, max(values[present], key=abs), "an int of 64 bits") from None


def _strings(column: Column, raw: Any) -> tuple[Array, Present]:
    values, present = _unmasked(raw if isinstance(raw, np.ndarray) else np.array([*raw], object))
    if values.dtype.kind == "U":
        values = values.astype(object)
    elif values.dtype.kind != "O":
        raise _refuse(column, values[0], "str")
    present &= _there(values)
    values = values[present]
    if not set(map(type, values)) <= TEXT:
        raise _refuse(column, next(value for value in values if type(value) not in TEXT), "str")
    return values, present


def _unmasked(raw: Any) -> tuple[Array, Present]:
    """Return the data and a new mask of the values that are present; an empty column may have any type: object."""
    values = np.ma.getdata(raw) if isinstance(raw, np.ndarray) else _array(raw)
    present = ~np.ma.getmaskarray(raw) if isinstance(raw, np.ma.MaskedArray) else np.ones(len(values), np.bool_)
    return (values if len(values) else values.astype(object)), present


def _array(raw: Any) -> Array:
    """Return a list as numpy does, but without turning mixed types into text or refusing ragged lists."""
    if not set(map(type, raw)) <= {int, float}:
        values = np.empty(len(raw), object)
        values[:] = raw
        return values
    return np.array(raw)


def _there(values: Array) -> Present:
    """Return which objects are there."""
    return np.fromiter(map(_is_there, values), np.bool_, len(values))


def _is_there(value: Any) -> bool:
    """Return whether a value is neither None, NaN, which differs from itself, nor NA, whose `NA == NA` is NA."""
    if value is None:
        return False
    same = value == value
    if same is True:  # soon: there are many
        return True
    return bool(same) if isinstance(same, bool | np.bool_) else same is not value


def _refuse(column: Column, got: Any, wanted: str) -> InputError:
    return InputError(f"column {column.name!r}: got {shown(got)} ({type(got).__name__}), wanted {wanted}")
