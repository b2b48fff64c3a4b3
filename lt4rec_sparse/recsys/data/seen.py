"""What the files of a folder hold, as far as a look at their first rows shows: forms, columns, types, cardinalities."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from lt4rec_sparse.recsys.data.casts import is_list, is_text
from lt4rec_sparse.recsys.data.reading import NULL_TEXTS, Form, column_names, is_parquet, read_file
from lt4rec_sparse.recsys.data.source import DataError

TABLES = {".parquet", ".csv", ".tsv", ".txt", ".data", ".dat", ".test", ".base", ".item", ".user"}
PACKED = {".gz", ".zst", ".bz2"}
SAMPLE_ROWS = 200_000
HEAD_BYTES = 1 << 16
SPELLINGS = ("", *NULL_TEXTS[1:], "\\N", "None", "?", "-")

Kind = Literal["nothing", "int", "number", "bool", "text", "list", "time", "date", "day/month", "other"]
SHAPES: dict[Kind, str] = {
    "int": r"[+-]?[0-9]{1,19}(\.0*)?",
    "number": r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?",
    "bool": r"(?i:true|false)",
    "date": r"[12][0-9]{3}-[01][0-9]-[0-3][0-9]",
    "day/month": r"[0-3]?[0-9]/[01]?[0-9]/[12][0-9]{3}",
    "time": r"[12][0-9]{3}-[01][0-9]-[0-3][0-9][T ][0-2][0-9]:[0-5][0-9](:[0-5][0-9](\.[0-9]{1,6})?)?"
    r"(Z|[+-][0-9:]{2,5})?",
}


@dataclass(frozen=True)
class Seen:
    """A column of some rows.

    Attributes:
        name: Its name.
        kind: What its values are; numbers that are all whole are "int".
        values: The values, an Arrow array, null where they are missing by any of the spellings.
        distinct: How many different values there are.
        spelled: The spellings of missing values that a column of numbers or dates holds.
    """

    name: str
    kind: Kind
    values: Any
    distinct: int
    spelled: tuple[str, ...] = ()

    @property
    def missing(self) -> float:
        """The share of missing values."""
        absent: int = self.values.null_count
        return absent / max(1, len(self.values))


@dataclass(frozen=True)
class Table:
    """Files with the same columns, and their first rows; `is_whole` if these are all."""

    paths: tuple[Path, ...]
    form: Form
    columns: dict[str, Seen]
    rows: int
    nbytes: int
    is_whole: bool


def tables_of(folder: Path) -> tuple[list[Table], list[str]]:
    """Return the tables of a folder, or of its `data/`, the largest first, and why other files were not read.

    Raises:
        DataError: If there is none.
    """
    for place in (folder, folder / "data"):
        paths = sorted(path for path in place.glob("*") if path.is_file() and is_table(path)) if place.is_dir() else []
        if paths:
            break
    else:
        raise DataError(f"{folder}: got no files of tables, wanted .parquet, .csv, .tsv or .txt there or in data/")
    alike: dict[tuple[Any, ...], list[Path]] = {}
    unread = []
    for path in paths:
        try:
            form = form_of(path)
            names = tuple(sorted(column_names(path, form)))
        except DataError as error:  # noqa: PERF203, one of few files
            unread.append(str(error))
        else:
            alike.setdefault((names, form, is_parquet(path)), []).append(path)
    if not alike:
        raise DataError(unread[0])
    tables = [_looked_at(tuple(same), form) for (_, form, _), same in alike.items()]
    return sorted(tables, key=lambda table: -table.nbytes), unread


def all_of(table: Table, name: str) -> Iterator[Seen]:
    """Yield a column of all rows, some at a time."""
    for path in table.paths:
        for batch in read_file(path, {}, [name], table.form._replace(missing=())):
            yield _seen(name, [batch[name]])


def table_suffix(path: PurePath) -> str | None:
    """Return how the name of a table ends, such as .csv.gz; None if it is not the name of one."""
    packed = path.suffix if path.suffix in PACKED else ""
    kind = PurePath(path.name.removesuffix(packed)).suffix
    return kind + packed if kind in TABLES else None


def is_table(path: PurePath) -> bool:
    """Return whether a file in a folder is a table by its name."""
    return table_suffix(path) is not None and not path.name.lower().startswith(("readme", "license"))


def form_of(path: Path) -> Form:
    """Return how a file is written: its encoding, its delimiter, and names if its first line is no header."""
    if is_parquet(path):
        return Form()
    with pa.input_stream(str(path), compression="detect") as stream:
        head = stream.read(HEAD_BYTES)
    try:
        text, encoding = head[: head.rfind(b"\n") + 1 or None].decode("utf-8-sig"), "utf8"
    except UnicodeDecodeError:
        text, encoding = head.decode("latin-1"), "latin-1"
    lines = text.splitlines()[:50]
    usual = "\t" if ".tsv" in path.suffixes else ","
    delimiter = max((usual, *"\t;|,"), key=lambda sign: _columns(lines, sign))
    first = next(csv.reader(io.StringIO(lines[0] if lines else ""), delimiter=delimiter), [])
    # A header holds no number and no empty or repeated name.
    bare = any(re.fullmatch(SHAPES["number"], cell.strip()) or not cell.strip() for cell in first)
    names = tuple(f"column_{i + 1}" for i in range(len(first))) if bare or len(set(first)) < len(first) else ()
    return Form(None if delimiter == usual else delimiter, names, encoding)


def _columns(lines: Sequence[str], delimiter: str) -> int:
    """Return into how many columns a delimiter cuts all of some lines, or 0 if they differ."""
    counts = {len(row) for row in csv.reader(lines, delimiter=delimiter)}
    return counts.pop() if len(counts) == 1 else 0


def _looked_at(paths: tuple[Path, ...], form: Form) -> Table:
    names, most = column_names(paths[0], form), max(1000, SAMPLE_ROWS // len(paths))
    batches: list[Any] = []
    is_whole = True
    for path in paths:
        first = list(_first_rows(path, names, form, most))
        is_whole &= sum(batch.num_rows for batch in first) < most
        batches += first
    columns = {name: _seen(name, [batch[name] for batch in batches]) for name in names}
    rows, nbytes = sum(batch.num_rows for batch in batches), sum(path.stat().st_size for path in paths)
    return Table(paths, form, columns, rows, nbytes, is_whole)


def _first_rows(path: Path, names: list[str], form: Form, rows: int) -> Iterator[Any]:
    for batch in read_file(path, {}, names, form._replace(missing=())):
        yield batch.slice(0, rows)
        rows -= batch.num_rows
        if rows <= 0:
            return


def _seen(name: str, parts: list[Any]) -> Seen:
    if len({part.type for part in parts}) > 1:
        parts = [part.cast(pa.string()) for part in parts]
    values = pa.concat_arrays(parts) if parts else pa.nulls(0)
    kind: Kind
    if is_list(values.type):
        return Seen(name, "list", values, len(pc.unique(values.flatten())))
    if is_text(values.type):
        return _seen_text(name, values.cast(pa.string()))
    if pa.types.is_boolean(values.type):
        kind = "bool"
    elif pa.types.is_integer(values.type):
        kind = "int"
    elif pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
        numbers = values.cast(pa.float64())
        values = pc.if_else(pc.is_finite(numbers), numbers, None)
        whole = pc.all(pc.and_(pc.equal(values, pc.floor(values)), pc.less(pc.abs(values), 2.0**53))).as_py()
        kind = "int" if whole else "number"
    elif pa.types.is_timestamp(values.type):
        kind = "time"
    elif pa.types.is_date(values.type):
        kind = "date"
    else:
        kind = "other"
    known = 0 if kind == "other" else len(pc.unique(values.drop_null()))
    return Seen(name, kind if known or kind == "other" else "nothing", values, known)


def _seen_text(name: str, values: Any) -> Seen:
    trimmed = pc.utf8_trim_whitespace(values)
    given = pc.unique(trimmed).drop_null()
    spelled = pa.array([text for text in given.to_pylist() if text in SPELLINGS], pa.string())
    rest = given.filter(pc.invert(pc.is_in(given, spelled)))
    for kind, shape in SHAPES.items():
        if len(rest) and pc.all(pc.match_substring_regex(rest, f"^({shape})$")).as_py():
            values = pc.if_else(pc.is_in(trimmed, spelled), pa.scalar(None, pa.string()), trimmed)
            if kind in ("int", "number"):
                values = _numbers(values)
            return Seen(name, kind, values, len(rest), tuple(spelled.to_pylist()))
    absent = pa.array([""], pa.string())
    values = pc.if_else(pc.is_in(values, absent), pa.scalar(None, pa.string()), values)
    known = len(pc.unique(values.drop_null()))
    return Seen(name, "text" if known else "nothing", values, known)


def _numbers(texts: Any) -> Any:
    """Return texts as ints if they are written so, which keeps large ones apart, else as floats."""
    with suppress(pa.ArrowInvalid):
        return texts.cast(pa.int64())
    return texts.cast(pa.float64())
