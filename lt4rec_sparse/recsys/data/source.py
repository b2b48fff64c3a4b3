"""A data set on disk: a folder, a schema, its CSV or Parquet files, and the types that their columns are read as.

Types come from the schema and are never inferred from values: a column whose first file holds only digits would change
its type with the next file. Columns that the schema does not name are read as text from CSV, only to find duplicates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pyarrow as pa

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import check_regular, take_place, unfinished_folder, whole_folder
from lt4rec_sparse.ranker.features import Column, Schema

SCHEMA_FILE = "schema.toml"
TRUTH = "truth.json"  # beside the schema of a simulated log
DIGEST_BLOCK_BYTES = 1 << 20
ARROW_TYPES = {"int": pa.int64(), "string": pa.string()}


class DataError(InputError):
    """A data set contradicts its schema; the message is one line: file, column, what was found and what was wanted."""


@dataclass(frozen=True)
class RawType:
    """How a raw column is read: as int64, float64, string, or a list of int64 or string split at a separator.

    With a `size`, a list is a vector of so many float64, or empty where it is missing.

    Times are timestamps of microseconds: of epochs in a `unit`, or of texts in ISO 8601 or a `format`. A string with a
    format is a date in it, and becomes an ISO date.
    """

    arrow: Any
    separator: str | None = None
    unit: str | None = None
    format: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Source:
    """A folder whose files have been found: the files of the log and of every side table of the schema."""

    folder: Path
    schema: Schema
    log: tuple[Path, ...]
    joins: tuple[tuple[Path, ...], ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """All files, of the log and of the side tables."""
        return (*self.log, *(path for join in self.joins for path in join))

    def states(self, known: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the state of every file, by its path relative to the folder, given earlier states.

        A state is its size (`size_bytes`), its modification time (`changed_ns`) and a `digest` (blake2b) of its bytes.
        A copy has another time and the same digest: the digest decides, and the time only saves reading the file again.
        """
        states = {}
        for path in self.files:
            name, stat = str(path.relative_to(self.folder)), path.stat()
            state: dict[str, Any] = {"size_bytes": stat.st_size, "changed_ns": stat.st_mtime_ns}
            before = known.get(name, {})
            is_known = "digest" in before and before.items() >= state.items()
            states[name] = state | {"digest": before["digest"] if is_known else file_digest(path)}
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
    schema = schema or schema_of(folder)
    if schema is None:
        wanted = f"{SCHEMA_FILE}, or KuaiRand's {' '.join(kuairand_schema().files.log)} there or in data/"
        raise DataError(f"{folder}: got no data set, wanted {wanted}")
    joins = tuple(_found(folder, join.files) for join in schema.joins)
    return Source(folder, schema, _found(folder, schema.files.log), joins)


def schema_of(folder: Path) -> Schema | None:
    """Return the schema of a folder: its `schema.toml`, or KuaiRand's if its log is there, or None."""
    if (folder / SCHEMA_FILE).is_file():
        # Simulated logs of before `duplicates` could be named dropped them: trials on them stay valid.
        return Schema.from_toml(folder / SCHEMA_FILE, stored=(folder / TRUTH).is_file())
    schema = kuairand_schema()
    return schema if any(matching_files(folder, pattern) for pattern in schema.files.log) else None


def kuairand_schema() -> Schema:
    """Return the packaged schema of KuaiRand (Pure, 1K and 27K), doi 10.1145/3511808.3557624."""
    with as_file(files("lt4rec_sparse.recsys.data") / "kuairand.toml") as path:
        return Schema.from_toml(path)


def feature_type(column: Column) -> RawType:
    """Return how to read a feature column from a file."""
    if column.kind == "vector":
        return RawType(pa.list_(pa.float64()), column.separator, size=column.size)
    if column.kind == "multi":
        return RawType(pa.list_(ARROW_TYPES[column.type]), column.separator)
    return RawType(pa.float64() if column.kind == "dense" else ARROW_TYPES[column.type])


def raw_types(schema: Schema) -> dict[str, RawType]:
    """Return how to read every column that the schema needs from a file."""
    types: dict[str, RawType] = {}

    def use(name: str | None, arrow: Any, unit: str | None = None, layout: str | None = None) -> None:
        wanted = RawType(arrow, None, unit, layout)
        if name is None or types.setdefault(name, wanted) == wanted:
            return
        if types[name].arrow != arrow:
            raise DataError(f"schema {schema.name!r}: column {name!r} is used as {types[name].arrow} and as {arrow}")
        raise DataError(f"schema {schema.name!r}: column {name!r} is used as a date and as text, wanted one of the two")

    made = {column.name for column in schema.derived}
    types |= {column.name: feature_type(column) for column in schema.columns if column.name not in made}
    mapped = {task.label: (task.positive, task.negative) for task in schema.tasks if task.positive}
    numbers = [task.label for task in schema.tasks if not task.positive]
    for task in schema.tasks:
        use(task.label if task.positive else None, pa.string())
        numbers += [name for name in (task.divide_by, task.weight) if isinstance(name, str)]
    filters = [(name, f"row filter of {task.name!r}") for task in schema.tasks for name in task.rows]
    filters += [(history.when, f"history {history.name!r}") for history in schema.histories]
    for name, role in filters:
        readings = {(task.positive, task.negative) for task in schema.tasks if task.label == name and task.positive}
        if len(readings) > 1:
            raise DataError(f"{role}: tasks read column {name!r} in {len(readings)} ways, wanted one")
    numbers += [name for name, _ in filters if name not in mapped]
    numbers += [name for name in schema.carried if name not in made]
    time = schema.time
    for name in numbers:
        use(name, pa.float64())
    for derived in schema.derived:
        use(derived.days_since, pa.string(), None, derived.format)
    for part in schema.slices:
        use(part.column, pa.int64() if isinstance(part.value, int) else pa.string())
    for join in schema.joins:
        use(join.on, ARROW_TYPES[join.type])
    if schema.group is not None:
        use(schema.group.column, ARROW_TYPES[schema.group.type])
    if time is not None:
        use(time.order, pa.float64())
        use(time.day, pa.string(), None, time.format)
        use(time.timestamp, pa.timestamp("us"), time.unit, time.format)
    if schema.split.column is not None:
        types.setdefault(schema.split.column, RawType(pa.string()))
    return types


def matching_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files that a glob finds in the folder, or else in its `data/`, sorted."""
    check_pattern(folder, pattern)
    return sorted(folder.glob(pattern)) or sorted((folder / "data").glob(pattern))


def check_pattern(folder: Path | str, pattern: str) -> None:
    """Refuse a glob that is empty or leaves the folder."""
    if not pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise DataError(f"{folder}: got file pattern {pattern!r}, wanted one relative to the folder and within it")


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


def file_digest(path: Path) -> str:
    """Return the BLAKE2b of a file's bytes, in hex."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(DIGEST_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def prepared_folder(out: Path, marker: str, resumed: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `out` that takes its place on a clean exit and is removed otherwise.

    Parents that had to be made for `out` are removed with it. `out` is a new or an empty folder, or an earlier one,
    which has a file `marker` and is replaced; anything else would be lost and is refused.

    If it is `resumed` it is that of `unfinished_folder`, with what an earlier process left in it, and takes the place
    only with a `marker` in it.
    """
    if out.exists() and not (out / marker).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: got files without {marker}, wanted a new, an empty or an earlier folder")
    made = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if resumed:
            with unfinished_folder(out) as folder:
                yield folder
                if (folder / marker).is_file():
                    take_place(folder, out)
        else:
            with whole_folder(out) as folder:
                yield folder
    finally:
        for parent in made:
            with suppress(OSError):  # it holds `out`, or somebody else's files
                parent.rmdir()
