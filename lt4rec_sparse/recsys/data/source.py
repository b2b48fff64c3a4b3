"""A data set on disk: a folder, a schema, and CSV or Parquet files that are read as typed record batches.

Types come from the schema and are never inferred from values: a column whose first file holds only digits would change
its type with the next file. Columns that the schema does not name are read as text from CSV, only to find duplicates.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import check_regular, whole_folder
from lt4rec_sparse.ranker.features import Column, Schema

SCHEMA_FILE = "schema.toml"
TRUTH = "truth.json"  # beside the schema of a simulated log
# Text of about 150,000 rows of a wide log: large enough to be fast, small compared with a day of any log.
CSV_BLOCK_BYTES = 16 << 20
DIGEST_BLOCK_BYTES = 1 << 20
NULL_TEXTS = ["", "NA", "N/A", "NULL", "null", "NaN", "nan"]
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error)
ARROW_TYPES = {"int": pa.int64(), "string": pa.string()}


class DataError(InputError):
    """A data set contradicts its schema; the message is one line: file, column, what was found and what was wanted."""


@dataclass(frozen=True)
class RawType:
    """How a raw column is read: as int64, float64, string, or a list of int64 or string split at a separator."""

    arrow: Any
    separator: str | None = None


@dataclass(frozen=True)
class Source:
    """A folder whose files have been found: the files of the log and of every side table of the schema."""

    folder: Path
    schema: Schema
    log: tuple[Path, ...]
    joins: tuple[tuple[Path, ...], ...]

    def states(self, known: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the state of every file, by its path relative to the folder, given earlier states.

        A state is its size (`size_bytes`), its modification time (`changed_ns`) and a `digest` (blake2b) of its bytes.
        A copy has another time and the same digest: the digest decides, and the time only saves reading the file again.
        """
        states = {}
        for path in (*self.log, *(path for join in self.joins for path in join)):
            name, stat = str(path.relative_to(self.folder)), path.stat()
            state: dict[str, Any] = {"size_bytes": stat.st_size, "changed_ns": stat.st_mtime_ns}
            before = known.get(name, {})
            is_known = "digest" in before and before.items() >= state.items()
            states[name] = state | {"digest": before["digest"] if is_known else _digest(path)}
        return states


def open_source(folder: Path, schema: Schema | None = None) -> Source:
    """Find the files of a data set.

    They are found by the globs of the schema, in the folder itself or in its `data/`. The schema is by default the
    folder's `schema.toml`; if there is none, KuaiRand's if its log is there.

    Raises:
        DataError: If the folder, a schema or files are missing, a glob leaves the folder, or a file is not regular.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: got no folder, wanted a data set")
    if schema is None and (folder / SCHEMA_FILE).is_file():
        # Simulated logs of before `duplicates` could be named dropped them: trials on them stay valid.
        schema = Schema.from_toml(folder / SCHEMA_FILE, stored=(folder / TRUTH).is_file())
    if schema is None:
        schema = kuairand_schema()
        if not any(matching_files(folder, pattern) for pattern in schema.files.log):
            wanted = f"{SCHEMA_FILE}, or KuaiRand's {' '.join(schema.files.log)} there or in data/"
            raise DataError(f"{folder}: got no data set, wanted {wanted}")
    joins = tuple(_found(folder, join.files) for join in schema.joins)
    return Source(folder, schema, _found(folder, schema.files.log), joins)


def kuairand_schema() -> Schema:
    """Return the packaged schema of KuaiRand (Pure, 1K and 27K), doi 10.1145/3511808.3557624."""
    with as_file(files("lt4rec_sparse.recsys.data") / "kuairand.toml") as path:
        return Schema.from_toml(path)


def feature_type(column: Column) -> RawType:
    """Return how to read a feature column from a file."""
    if column.kind == "multi":
        return RawType(pa.list_(ARROW_TYPES[column.type]), column.separator)
    return RawType(pa.float64() if column.kind == "dense" else ARROW_TYPES[column.type])


def raw_types(schema: Schema) -> dict[str, RawType]:
    """Return how to read every column that the schema needs from a file."""
    types: dict[str, RawType] = {}

    def use(name: str | None, arrow: Any) -> None:
        if name is not None and types.setdefault(name, RawType(arrow)).arrow != arrow:
            raise DataError(f"schema {schema.name!r}: column {name!r} is used as {types[name].arrow} and as {arrow}")

    made = {column.name for column in schema.derived}
    types |= {column.name: feature_type(column) for column in schema.columns if column.name not in made}
    numbers = [name for task in schema.tasks for name in (task.label, task.divide_by, task.weight, *task.rows)]
    numbers += [history.when for history in schema.histories]
    numbers += [name for name in schema.carried if name not in made]
    time = schema.time
    for name in numbers:
        use(name, pa.float64())
    for derived in schema.derived:
        use(derived.days_since, pa.string())
    for part in schema.slices:
        use(part.column, pa.int64() if isinstance(part.value, int) else pa.string())
    for join in schema.joins:
        use(join.on, ARROW_TYPES[join.type])
    if schema.group is not None:
        use(schema.group.column, ARROW_TYPES[schema.group.type])
    if time is not None:
        use(time.order, pa.float64())
        use(time.day, pa.string())
        use(time.timestamp, pa.timestamp(time.unit))
    if schema.split.column is not None:
        types.setdefault(schema.split.column, RawType(pa.string()))
    return types


def column_names(path: Path) -> list[str]:
    """Return the names of a file's columns."""
    with _opened(path, None) as (names, _):
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path}: column {twice!r}: got two of this name, wanted one")
    return names


def list_columns(path: Path) -> set[str]:
    """Return the names of a file's columns that hold lists or structures; in CSV all are text."""
    if path.suffix != ".parquet":
        return set()
    return {field.name for field in pq.read_schema(path) if pa.types.is_nested(field.type)}


def read_file(path: Path, types: Mapping[str, RawType], columns: Sequence[str]) -> Iterator[Any]:
    """Yield the named columns as record batches, with the types of `types`, and others as they are in the file."""
    with _opened(path, list(columns)) as (_, batches):
        yield from (typed(path, batch, types) for batch in batches)


@contextmanager
def _opened(path: Path, columns: list[str] | None) -> Iterator[tuple[list[str], Iterable[Any]]]:
    """Give the names of a file's columns, and some or all columns as record batches."""
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as parquet:
                yield parquet.schema_arrow.names, parquet.iter_batches(columns=columns)
            return
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file), [])
        convert = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            include_columns=columns,
            null_values=NULL_TEXTS,
            strings_can_be_null=True,
        )
        read = pyarrow.csv.ReadOptions(block_size=CSV_BLOCK_BYTES)
        with pyarrow.csv.open_csv(path, read_options=read, convert_options=convert) as reader:
            yield reader.schema.names, reader
    except UNREADABLE as error:
        wanted = "Parquet" if path.suffix == ".parquet" else "CSV with a line of column names"
        raise DataError(f"{path}: got {str(error).splitlines()[0]}, wanted {wanted}") from error


def matching_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files that a glob finds in the folder, or else in its `data/`, sorted."""
    if not pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise DataError(f"{folder}: got file pattern {pattern!r}, wanted one relative to the folder and within it")
    return sorted(folder.glob(pattern)) or sorted((folder / "data").glob(pattern))


def _found(folder: Path, patterns: Sequence[str]) -> tuple[Path, ...]:
    if not patterns:
        raise DataError(f"{folder}: got an empty list of files, wanted at least one pattern")
    paths: list[Path] = []
    for pattern in patterns:
        matches = matching_files(folder, pattern)
        if not matches:
            raise DataError(f"{folder}: got no file {pattern!r}, wanted one there or in data/")
        for path in matches:
            check_regular(path, kind=DataError)
        paths += matches
    return tuple(paths)


def is_list(kind: Any) -> bool:
    """Return whether an Arrow type is one of lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def floats(column: Any) -> NDArray[np.float64]:
    """Return a float64 column, writable, with NaN for missing and for infinite values: no count or time is infinite."""
    values = np.array(column.to_numpy(zero_copy_only=False), np.float64)
    values[np.isinf(values)] = np.nan
    return values


def typed(path: Path, batch: Any, types: Mapping[str, RawType]) -> Any:
    """Return a batch of a file with the types that the schema wants, which the values must fit without loss."""
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if name in types:
            try:
                column = _cast(column, types[name])
            except (pa.ArrowException, TypeError) as error:
                got = str(error).splitlines()[0]
                raise DataError(f"{path}: column {name!r}: {got}, wanted {types[name].arrow}") from error
        elif pa.types.is_nested(column.type) and not is_list(column.type):
            raise DataError(f"{path}: column {name!r}: got {column.type}, wanted values or lists of values")
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _cast(column: Any, wanted: RawType) -> Any:
    """Cast a column without loss (a timestamp: to its declared unit)."""
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
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
        return (_integers(column) if text else column).cast(wanted.arrow, safe=False)
    return (_integers(column) if text and wanted.arrow == pa.int64() else column).cast(wanted.arrow)


def _integers(column: Any) -> Any:
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        # Some programs write the integers of a column with missing values as 3.0.
        return column.cast(pa.float64()).cast(pa.int64())


def _bags(lists: Any, values: Any, kept: Any) -> Any:
    """Return `lists` with only those of its flat `values` that are kept; a missing list becomes an empty one."""
    ends = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy())])
    counts = np.concatenate([[0], np.cumsum(kept.to_numpy(zero_copy_only=False))])
    return pa.ListArray.from_arrays(pa.array(counts[ends], pa.int32()), values.filter(kept))


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(DIGEST_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def prepared_folder(out: Path, marker: str) -> Iterator[Path]:
    """Give an empty folder beside `out` that takes its place on a clean exit and is removed otherwise.

    Parents that had to be made for `out` are removed with it. `out` is a new or an empty folder, or an earlier one,
    which has a file `marker` and is replaced; anything else would be lost and is refused.
    """
    if out.exists() and not (out / marker).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: got files without {marker}, wanted a new, an empty or an earlier folder")
    made = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_folder(out) as fresh:
            yield fresh
    finally:
        for parent in made:
            with suppress(OSError):  # it holds `out`, or somebody else's files
                parent.rmdir()
