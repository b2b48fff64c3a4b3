"""Files of tables as record batches: Parquet, and CSV with any delimiter, header and compression."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from lt4rec_sparse.files import check_regular
from lt4rec_sparse.ranker.features import Join, Schema
from lt4rec_sparse.recsys.data.casts import typed
from lt4rec_sparse.recsys.data.source import DataError, RawType

# Text of about 150,000 rows of a wide log: large enough to be fast, small compared with a day of any log.
CSV_BLOCK_BYTES = 16 << 20
PARQUET_BUFFER_BYTES = 1 << 20  # of each column
NULL_TEXTS = ("", "NA", "N/A", "NULL", "null", "NaN", "nan")
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError, LookupError, csv.Error)


class Form(NamedTuple):
    """How a file is written; the attributes are those of `Files`."""

    delimiter: str | None = None
    names: tuple[str, ...] = ()
    encoding: str = "utf8"
    missing: tuple[str, ...] | None = None


PLAIN = Form()  # a header, commas


def log_form(schema: Schema) -> Form:
    """Return how the files of the log are written."""
    files = schema.files
    return Form(files.delimiter, files.names, files.encoding, files.missing)


def join_form(schema: Schema, join: Join) -> Form:
    """Return how the files of a side table are written: what it does not say is as in the log."""
    files = schema.files
    missing = files.missing if join.missing is None else join.missing
    return Form(join.delimiter or files.delimiter, join.names, join.encoding or files.encoding, missing)


def request_form(schema: Schema) -> Form:
    """Return how files of requests and candidates are written: with a header and commas; missing is as in the log."""
    return Form(missing=schema.files.missing)


def missing_texts(schema: Schema) -> tuple[str, ...]:
    """Return the texts that CSV files of a schema hold for missing values."""
    return NULL_TEXTS if schema.files.missing is None else schema.files.missing


def is_parquet(path: Path) -> bool:
    """Return whether a file is Parquet by its name; else it is CSV."""
    return path.suffix == ".parquet"


def column_names(path: Path, form: Form = PLAIN) -> list[str]:
    """Return the names of a file's columns."""
    with _opened(path, None, form) as (names, _):
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path}: column {twice!r}: got two of this name, wanted one")
    return names


def list_columns(path: Path) -> set[str]:
    """Return the names of a file's columns that hold lists or structures; in CSV all are text.

    Raises:
        DataError: If the file cannot be read.
    """
    check_regular(path, kind=DataError)
    if not is_parquet(path):
        return set()
    try:
        return {field.name for field in pq.read_schema(path) if pa.types.is_nested(field.type)}
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def read_file(path: Path, types: Mapping[str, RawType], columns: Sequence[str], form: Form = PLAIN) -> Iterator[Any]:
    """Yield the named columns as record batches, with the types of `types`, and others as they are in the file."""
    missing = form.missing if is_parquet(path) else None
    with _opened(path, list(columns), form) as (_, batches):
        yield from (typed(path, batch, types, missing) for batch in batches)


@contextmanager
def _opened(path: Path, columns: list[str] | None, form: Form) -> Iterator[tuple[list[str], Iterable[Any]]]:
    """Give the names of a file's columns, and some or all columns as record batches."""
    try:
        if is_parquet(path):
            # A page at a time: by default whole row groups would be in memory, and a file may be a single one.
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES) as parquet:
                yield parquet.schema_arrow.names, parquet.iter_batches(columns=columns)
            return
        delimiter = form.delimiter or ("\t" if ".tsv" in path.suffixes else ",")
        names = _names(path, delimiter, form)
        convert = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            include_columns=columns,
            null_values=list(NULL_TEXTS if form.missing is None else form.missing),
            strings_can_be_null=True,
        )
        read = pyarrow.csv.ReadOptions(
            block_size=CSV_BLOCK_BYTES, encoding=form.encoding, column_names=list(form.names) or None
        )
        parse = pyarrow.csv.ParseOptions(delimiter=delimiter)
        with pyarrow.csv.open_csv(path, read_options=read, parse_options=parse, convert_options=convert) as reader:
            yield reader.schema.names, reader
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    wanted = "Parquet" if is_parquet(path) else "CSV with a line of column names"
    got = str(error).splitlines()[0]
    if "codec can't decode" in got or "UTF8" in got:
        wanted += ', in UTF-8, or the name of its encoding, such as encoding = "latin-1" in [files]'
    return DataError(f"{path}: got {got}, wanted {wanted}")


def _names(path: Path, delimiter: str, form: Form) -> list[str]:
    """Return the columns of a CSV file: those of its first line, which must be as many as the schema names, if any."""
    encoding = "utf-8-sig" if form.encoding == "utf8" else form.encoding
    with pa.input_stream(str(path), compression="detect") as stream:
        first = next(csv.reader(io.TextIOWrapper(stream, encoding, newline=""), delimiter=delimiter), [])
    other = next((sign for sign in "\t;|," if len(first) == 1 and sign in first[0]), None)
    if other is not None:
        got = f"one column {first[0][:80]!r}"
        raise DataError(f"{path}: got {got}, wanted columns cut at {delimiter!r}, or delimiter = {other!r} in [files]")
    if form.names and len(form.names) != len(first):
        raise DataError(f"{path}: got {len(first)} columns, wanted {len(form.names)} as in names of [files]")
    return list(form.names) or first
