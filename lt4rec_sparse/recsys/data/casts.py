"""Columns of files as the types that a schema wants, exactly or not at all.

Text and typed columns of the same values become the same: CSV and Parquet mean the same. An integer is never read
through a float, which above 2^53 would make two ids one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lt4rec_sparse.errors import shown
from lt4rec_sparse.recsys.data.source import DataError, RawType

BOOLS = {"true": 1, "false": 0}
UNITS_US = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}  # microseconds of one
EXACT = 1 << 53  # every int up to it is a float64; of larger ones not all
# An epoch in another unit than the schema's is one that would be in these years.
PLAUSIBLE = range(1990, 2101)
WHOLE = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
ZONED = r"[0-9](Z|[+-][0-9]{2}(:?[0-9]{2})?)$"
NUMBER = " (a label of other texts: positive in its task; another spelling of a missing value: missing in [files])"
TEXT_IDS = ' (type = "string" reads ids of any kind)'
OTHER_LISTS = (pa.types.is_fixed_size_list, pa.types.is_list_view, pa.types.is_large_list_view)
USUAL = {
    pa.types.is_string_view: pa.string(),
    pa.types.is_binary_view: pa.binary(),
    pa.types.is_float16: pa.float32(),
}
TIMES = (
    ' (wanted an epoch, ISO 8601 such as 2024-01-13T10:00:00+02:00, or its format in [time], such as "%d/%m/%Y %H:%M")'
)


def is_list(kind: Any) -> bool:
    """Return whether an Arrow type is one of lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def is_text(kind: Any) -> bool:
    """Return whether an Arrow type is one of texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def plain(column: Any) -> Any:
    """Return an Arrow array as one of a type that all readers know; its values stay the same.

    Dictionaries and runs become their values, extension types what they store, views and lists of a fixed size usual
    texts and lists, small decimals and floats larger ones.

    Raises:
        TypeError: If an extension type stores bytes, as of a UUID, whose text only its maker knows; or Arrow knows no
            way (`pyarrow.ArrowException`).
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return plain(column.dictionary).take(column.indices)  # Arrow decodes none of views
    if pa.types.is_run_end_encoded(kind):
        return plain(pc.run_end_decode(column))
    if isinstance(kind, pa.BaseExtensionType):
        if pa.types.is_fixed_size_binary(kind.storage_type):
            raise TypeError(f"got {kind}, wanted it as text")
        return plain(column.storage)
    if is_list(kind) or any(is_kind(kind) for is_kind in OTHER_LISTS):
        return _plain_lists(column)
    wanted = next((wanted for is_kind, wanted in USUAL.items() if is_kind(kind)), kind)
    if pa.types.is_decimal(kind) and kind.bit_width < 128:
        wanted = pa.decimal128(kind.precision, kind.scale)
    return column if wanted == kind else column.cast(wanted)


def _plain_lists(lists: Any) -> Any:
    found = lists.flatten()  # without those of missing lists
    values = plain(found)
    if is_list(lists.type) and values.type == found.type:
        return lists
    # A cast of views loses lists after a missing one (Arrow 26).
    ends = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy())])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values, mask=lists.is_null())


def floats(column: Any) -> NDArray[np.float64]:
    """Return a float64 column, writable, with NaN for missing and for infinite values: no count or time is infinite."""
    values = np.array(column.to_numpy(zero_copy_only=False), np.float64)
    values[np.isinf(values)] = np.nan
    return values


def typed(path: Path, batch: Any, types: Mapping[str, RawType], missing: Sequence[str] | None = None) -> Any:
    """Return a batch of a file with the types that the schema wants, which the values must fit without loss.

    `missing` are texts that stand for a missing value; None where the reader has seen to them.
    """
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        column = plain_column(path, name, column)
        if missing and is_text(column.type):
            absent = pc.is_in(column, pa.array(missing, column.type))
            column = pc.if_else(absent, pa.scalar(None, column.type), column)
        if name in types:
            try:
                column = _cast(column, types[name])
            except (pa.ArrowException, TypeError) as error:
                got = str(error).splitlines()[0]
                wanted = f"{types[name].arrow}{_hint(types[name])}"
                raise DataError(f"{path}: column {name!r}: {got}, wanted {wanted}") from error
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def plain_column(path: Path | str, name: str, column: Any) -> Any:
    """Return a column of a file or a table through `plain`.

    Raises:
        DataError: If it holds neither values nor lists of values.
    """
    try:
        found = plain(column)
    except (pa.ArrowException, TypeError) as error:
        got = str(error).splitlines()[0]
        raise DataError(f"{path}: column {name!r}: {got}, wanted values or lists of values") from error
    if pa.types.is_nested(found.type) and not is_list(found.type):
        raise DataError(f"{path}: column {name!r}: got {found.type}, wanted values or lists of values")
    return found


def _hint(wanted: RawType) -> str:
    if pa.types.is_timestamp(wanted.arrow):
        return TIMES
    return {pa.float64(): NUMBER, pa.int64(): TEXT_IDS}.get(wanted.arrow, "")


def _cast(column: Any, wanted: RawType) -> Any:
    text = is_text(column.type)
    if wanted.size is not None:
        return _vectors(column, wanted.separator, wanted.size)
    if pa.types.is_list(wanted.arrow):
        if text:  # blanks around values and empty values are dropped
            lists = pc.split_pattern(column, pattern=wanted.separator)
            values = pc.utf8_trim_whitespace(lists.flatten())
            return _bags(lists, values, pc.not_equal(values, "")).cast(wanted.arrow)
        lists = column.cast(wanted.arrow)
        values = lists.flatten()
        return _bags(lists, values, values.is_valid())
    if pa.types.is_floating(column.type):
        if wanted.arrow == pa.string():
            # A float has several texts, such as "1" and "1.0": training and serving might disagree.
            raise TypeError(f"got {column.type}")
        column = pc.if_else(pc.is_nan(column), None, column)
    if pa.types.is_timestamp(wanted.arrow):
        return _times(column, wanted.unit or "us", wanted.format)
    if wanted.arrow == pa.string():
        if wanted.format is not None and text:
            return _by_value(column, lambda value: _moment(value, wanted.format).date().isoformat(), pa.string())
        return column.cast(pa.string())
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return _ints(column) if wanted.arrow == pa.int64() else _numbers(column)


def _ints(column: Any) -> Any:
    if is_text(column.type):
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid:
            # Some programs write the integers of a column with missing values as 3.0.
            return _by_value(column, _exact_int, pa.int64())
    if pa.types.is_floating(column.type):
        large = pc.greater(pc.abs(column.cast(pa.float64())), float(EXACT))
        if pc.any(large).as_py():
            got = column.filter(large)[0].as_py()
            raise TypeError(f"got {got!r} in a column of floats, which hold no id above 2^53 exactly")
    if pa.types.is_uint64(column.type) and (largest := pc.max(column).as_py() or 0) >= 1 << 63:
        raise TypeError(f"got {largest}")
    return column.cast(pa.int64())


def _exact_int(text: str) -> int | None:
    text = text.strip()
    if not text:
        return None
    if text.lower() in BOOLS:
        return BOOLS[text.lower()]
    number = Decimal(text) if WHOLE.fullmatch(text) else None
    is_whole = number is not None and number.adjusted() < 20 and number == number.to_integral_value()
    if number is None or not is_whole or not -(1 << 63) <= number < 1 << 63:
        raise TypeError(f"got {shown(text)}")
    return int(number)


def _numbers(column: Any) -> Any:
    if pa.types.is_integer(column.type):
        try:
            return column.cast(pa.float64())
        except pa.ArrowInvalid as error:
            largest = pc.max(column).as_py()
            raise TypeError(f"got {largest}, which no float64 holds exactly") from error
    if not is_text(column.type):
        return column.cast(pa.float64())
    try:
        numbers = column.cast(pa.float64())
    except pa.ArrowInvalid:
        numbers = _by_value(column, _number, pa.float64())
    return pc.if_else(pc.is_nan(numbers), None, numbers)


def _number(text: str) -> float | None:
    text = text.strip()
    if not text:
        return None
    try:
        return BOOLS[text.lower()] if text.lower() in BOOLS else float(text)
    except ValueError:
        raise TypeError(f"got {shown(text)}") from None


def _by_value(column: Any, read: Callable[[str], Any], kind: Any) -> Any:
    """Read each distinct text of a column once."""
    coded = column.dictionary_encode()
    values = [None if text is None else read(text) for text in coded.dictionary.to_pylist()]
    return pa.array(values, kind).take(coded.indices)


def _moment(text: str, layout: str | None) -> datetime:
    """Read a time by its format; one with a zone as that of UTC."""
    try:
        found = datetime.strptime(text.strip(), layout or "")
    except ValueError:
        raise TypeError(f"got {shown(text)}, not in the format {layout!r}") from None
    return found if found.tzinfo is None else found.astimezone(timezone.utc).replace(tzinfo=None)


def _times(column: Any, unit: str, layout: str | None) -> Any:
    """Return moments in UTC, as microseconds."""
    us = pa.timestamp("us")
    if is_text(column.type):
        if layout is not None:
            return _by_value(column, lambda text: _moment(text, layout), us)
        column = _epochs(column)
    if is_text(column.type):
        zoned = pc.match_substring_regex(column, ZONED)
        # A text without a zone is a time of UTC, as a timestamp without one is in Parquet.
        with_zone = pc.if_else(zoned, column, None).cast(pa.timestamp("us", "UTC")).cast(us)
        return pc.coalesce(with_zone, pc.if_else(zoned, None, column).cast(us))
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        return _of_epochs(column, unit)
    return column.cast(us, safe=False)


def _epochs(column: Any) -> Any:
    """Return texts as numbers if all of them are."""
    for kind in (pa.int64(), pa.float64()):
        with suppress(pa.ArrowInvalid):
            return column.cast(kind)
    return column


def _of_epochs(column: Any, unit: str) -> Any:
    if pa.types.is_integer(column.type):
        whole = column.cast(pa.int64())
        us = pc.divide(whole, 1000) if unit == "ns" else pc.multiply_checked(whole, int(UNITS_US[unit]))
    else:
        us = pc.round(pc.multiply(column.cast(pa.float64()), UNITS_US[unit])).cast(pa.int64())
    moments = us.cast(pa.timestamp("us"))
    years = pc.year(moments)
    odd = pc.or_(pc.less(years, PLAUSIBLE.start), pc.greater_equal(years, PLAUSIBLE.stop))
    for value, moment in zip(column.filter(odd).slice(0, 1000), moments.filter(odd).slice(0, 1000), strict=True):
        other = next((name for name in UNITS_US if _is_plausible(value.as_py(), name)), None)
        if other is not None:
            got = f"got {value.as_py()}, which in {unit!r} is of the year {pc.year(moment).as_py()}"
            raise TypeError(f"{got} and in {other!r} is not: unit = {other!r} in [time]?")
    return moments


def _is_plausible(value: Any, unit: str) -> bool:
    seconds = float(value) * UNITS_US[unit] / 1e6
    return (PLAUSIBLE.start - 1970) * 31_556_952 <= seconds < (PLAUSIBLE.stop - 1970) * 31_556_952


def _vectors(column: Any, separator: str | None, size: int) -> Any:
    """Return lists of `size` numbers, an empty one where there is none; a missing number is NaN."""
    if is_text(column.type):
        column = pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), None, column)
        column = pc.split_pattern(column, pattern=separator)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    wrong = (lengths != 0) & (lengths != size)
    if wrong.any():
        raise TypeError(f"got {lengths[wrong.argmax()]} numbers in a row, wanted {size}")
    values = column.flatten()
    numbers = (pc.utf8_trim_whitespace(values) if is_text(values.type) else values).cast(pa.float64())
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pc.fill_null(numbers, float("nan")))


def _bags(lists: Any, values: Any, kept: Any) -> Any:
    """Return `lists` with only those of its flat `values` that are kept; a missing list becomes an empty one."""
    ends = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy())])
    counts = np.concatenate([[0], np.cumsum(kept.to_numpy(zero_copy_only=False))])
    return pa.ListArray.from_arrays(pa.array(counts[ends], pa.int32()), values.filter(kept))
