"""The contents of a click log: its columns, its tasks, its days, and the columns that no model may see.

A schema is plain data. It is written as TOML beside a log, is stored as JSON in the served artefact, and is checked
once, here, so that all other code can trust it.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.files import check_depth
from lt4rec_sparse.ranker.features.records import SchemaError, from_plain, to_plain, to_toml

ValueType = Literal["int", "string"]
# Prepared data stores ids as int32.
MAX_IDS = (1 << 31) - 1
# More cuts than a sketch of the training values has points would be noise; longer bags are no recent past.
MAX_BUCKETS = MAX_HISTORY = 1 << 16
RATE_BUCKETS = 16


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


@dataclass(frozen=True)
class Files:
    """The files of the log, as globs relative to its folder or to the folder's `data/`; CSV and Parquet."""

    log: tuple[str, ...]


@dataclass(frozen=True)
class Join:
    """A side table (users, videos, ...) that adds its columns to every row with the same key.

    If the log and a side table have the same column, the log's is used.
    """

    files: tuple[str, ...]
    on: str
    type: ValueType = "int"


@dataclass(frozen=True)
class Time:
    """The day of a row: a `day` column (sortable, e.g. 20220425 or 2022-04-25), or the date of a `timestamp`.

    `order` sorts the rows of a day for histories; without it they keep the order of the files.
    """

    day: str | None = None
    timestamp: str | None = None
    unit: Literal["s", "ms", "us"] = "ms"
    utc_offset_hours: int = 0
    order: str | None = None

    def __post_init__(self) -> None:
        if (self.day is None) == (self.timestamp is None):
            raise SchemaError(f"time: got day={self.day!r} and timestamp={self.timestamp!r}, wanted exactly one")
        if not -24 < self.utc_offset_hours < 24:
            raise SchemaError(f"time: got utc_offset_hours={shown(self.utc_offset_hours)}, wanted -23 to 23")


@dataclass(frozen=True)
class Split:
    """Train, validation and test by day: the last days of the log by number, or all three as explicit lists."""

    test_days: int = 2
    validation_days: int = 2
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lists = (self.train, self.validation, self.test)
        if any(lists) and not all(lists):
            raise SchemaError("split: got some of the lists train, validation, test, wanted all three or none")
        twice = _repeated(day for days in lists for day in days)
        if twice is not None:
            raise SchemaError(f"split: day {twice!r} is listed twice, wanted it in one split")
        if self.test_days < 1 or self.validation_days < 1:
            got = f"test_days={shown(self.test_days)}, validation_days={shown(self.validation_days)}"
            raise SchemaError(f"split: got {got}, wanted at least 1 each")


@dataclass(frozen=True)
class Group:
    """The column that says which rows belong together (the user): the unit of GAUC and of histories."""

    column: str
    type: ValueType = "int"


@dataclass(frozen=True)
class Column:
    """One feature, and how its raw values become ids of an embedding table.

    Attributes:
        name: The column in the log, in a side table, or among the derived columns.
        kind: `single` value, `multi` (a bag of values) or `dense` (a number, cut at quantiles of the training days).
        type: The type of the raw values; `dense` ignores it.
        table: The embedding table; columns that name the same table share its ids. Empty: the column's own table.
        encoding: `vocabulary` (seen in training) or `hash` (fixed size, never fitted).
        size: Number of ids of a hashed table, including the one for a missing value; below 2^31.
        min_count: A value that is rarer than this in training counts as unseen.
        separator: Between the values of a `multi` column that is stored as text.
        buckets: The greatest number of buckets of a `dense` column, 2 to 65,536.
    """

    name: str
    kind: Literal["single", "multi", "dense"] = "single"
    type: ValueType = "string"
    table: str = ""
    encoding: Literal["vocabulary", "hash"] = "vocabulary"
    size: int = 0
    min_count: int = 1
    separator: str = ","
    buckets: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", self.table or self.name)
        where = f"column {self.name!r}"
        if self.encoding == "hash" and (self.kind == "dense" or not 2 <= self.size <= MAX_IDS):
            got = f"hash of kind={self.kind!r}, size={shown(self.size)}"
            raise SchemaError(f"{where}: got {got}, wanted categorical, size 2 to {MAX_IDS}")
        if self.encoding == "vocabulary" and self.size:
            raise SchemaError(f"{where}: got size={shown(self.size)} with a vocabulary, wanted encoding='hash'")
        if self.min_count < 1 or not 2 <= self.buckets <= MAX_BUCKETS or not self.separator:
            got = f"min_count={shown(self.min_count)}, buckets={shown(self.buckets)}, separator={self.separator!r}"
            raise SchemaError(f"{where}: got {got}, wanted min_count >= 1, buckets 2 to {MAX_BUCKETS}, a separator")


@dataclass(frozen=True)
class Task:
    """One thing to predict.

    `binary`: the label is 0 or 1, the loss cross-entropy, the metric AUC (higher is better).
    `ratio`: the label is in [0, 1], or made so by `clip(label / divide_by, 0, 1)`; the metric is MSE (lower is better).

    A row belongs to the task when every column in `rows` is nonzero and the label exists: it is not missing, and with
    `divide_by` the numerator is not negative and the divisor is positive. Other tasks keep the row. In labels, divisors
    and row filters an infinite number counts as missing; an infinite label without `divide_by` is out of range, and an
    infinite weight is refused.

    An `extra` task is prepared like any other, but left out of a run that does not name it.
    """

    name: str
    kind: Literal["binary", "ratio"]
    label: str
    divide_by: str | None = None
    rows: tuple[str, ...] = ()
    weight: str | None = None
    extra: bool = False

    def __post_init__(self) -> None:
        if self.kind == "binary" and self.divide_by is not None:
            raise SchemaError(
                f"task {self.name!r}: got divide_by={self.divide_by!r} in a binary task, wanted kind='ratio'"
            )


@dataclass(frozen=True)
class History:
    """The group's last `length` rows with a nonzero `when`, from strictly earlier days, one bag per column.

    `when` may be an outcome: yesterday's outcome is known today. The bags are multi-valued columns named
    `<name>_<column>` in the table of `<column>`, oldest value first.

    A mean-pooled bag of a few values hides how frequent they are. With `rates` there are also two dense columns, over
    all earlier days: `<name>_count`, how many such rows the group had, and `<name>_rate`, their share of all its rows
    (missing before the first).
    """

    name: str
    when: str
    columns: tuple[str, ...]
    length: int = 10
    rates: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.length <= MAX_HISTORY:
            got = f"length={shown(self.length)}"
            raise SchemaError(f"history {self.name!r}: got {got}, wanted 1 to {MAX_HISTORY}")


@dataclass(frozen=True)
class Derived:
    """A column made by the data layer: whole days from the date in column `days_since` to the row's day."""

    name: str
    days_since: str


@dataclass(frozen=True)
class Slice:
    """A part of the rows that reports show separately: those where `column` equals `value`."""

    name: str
    column: str
    value: int | str


@dataclass(frozen=True)
class Schema:
    """Everything that the data layer, the encoder and a report need to know about a click log.

    Columns in `carried` are numbers that stay with the rows without being features, such as the play time that a
    replay counts. They may be outcomes; a feature may be carried too.

    Columns in `context` are features that all candidates of a request have in common, such as the user's and the hour.
    Where there are any, the group's column and what the histories make are in common too, without being named. It
    changes no training: a served ranker computes what is in common once, where a request gives it once.

    Raises:
        SchemaError: If names repeat or do not resolve, tables disagree, or an outcome is a feature.
    """

    name: str
    files: Files
    time: Time
    group: Group
    columns: tuple[Column, ...]
    tasks: tuple[Task, ...]
    outcomes: tuple[str, ...] = ()
    split: Split = Split()
    joins: tuple[Join, ...] = ()
    histories: tuple[History, ...] = ()
    derived: tuple[Derived, ...] = ()
    slices: tuple[Slice, ...] = ()
    carried: tuple[str, ...] = ()
    context: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_names()
        categorical = {column.name for column in self.columns if column.kind != "dense"}
        known = {column.name for column in self.features}
        stray = next((name for name in self.context if name not in known), None)
        if stray is not None:
            raise SchemaError(f"context: got column {stray!r}, wanted features")
        for history in self.histories:
            for name in history.columns:
                if name not in categorical:
                    raise SchemaError(f"history {history.name!r}: got column {name!r}, wanted a categorical feature")
        twice = _repeated(column.name for column in self.features)
        if twice is not None:
            raise SchemaError(f"column {twice!r}: is also a history's, wanted one of the two")
        tables: dict[str, tuple[str, tuple[object, ...]]] = {}
        for column in self.features:
            # A dense column never shares a table, since its cuts are its own: its name is part of its rule.
            own = column.name if column.kind == "dense" else ""
            rule = (own, column.type, column.encoding, column.size, column.min_count)
            first, wanted = tables.setdefault(column.table, (column.name, rule))
            if rule != wanted:
                agree = "one type, encoding, size and min_count, and no dense column"
                raise SchemaError(f"table {column.table!r}: {first!r} and {column.name!r} differ, wanted {agree}")
        read_by = {column.name: column.name for column in self.columns}
        read_by |= {column.days_since: column.name for column in self.derived}
        for source, name in read_by.items():
            if source in self.forbidden:
                raise SchemaError(f"column {name!r}: {source!r} is an outcome, wanted a feature known beforehand")

    @property
    def features(self) -> tuple[Column, ...]:
        """Every input of a model: the declared columns, then the rates and the bags of the histories."""
        declared = {column.name: column for column in self.columns}
        rates, bags = [], []
        for history in self.histories:
            if history.rates:
                rates += [Column(f"{history.name}_{what}", "dense", buckets=RATE_BUCKETS) for what in ("count", "rate")]
            bags += [replace(declared[c], name=f"{history.name}_{c}", kind="multi") for c in history.columns]
        return (*self.columns, *rates, *bags)

    @property
    def in_common(self) -> frozenset[str]:
        """Features that all candidates of a request have in common."""
        if not self.context:
            return frozenset()
        declared = {column.name for column in self.columns}
        made = {column.name for column in self.features} - declared
        return frozenset(made | ({*self.context, self.group.column} & declared))

    @property
    def forbidden(self) -> frozenset[str]:
        """Columns known only after the impression: the listed outcomes, and all labels, row filters and weights."""
        of_tasks = (name for task in self.tasks for name in (task.label, *task.rows, task.weight) if name)
        return frozenset((*self.outcomes, *of_tasks))

    def to_dict(self) -> dict[str, Any]:
        """Return the schema as JSON-able data; `Schema.from_dict` reads it back equal."""
        data: dict[str, Any] = to_plain(asdict(self))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schema:
        """Build a schema from parsed TOML or JSON.

        Raises:
            SchemaError: If a key is unknown or absent, a value has the wrong type, or the schema contradicts itself.
        """
        schema: Schema = from_plain(data, cls, "schema")
        return schema

    def to_toml(self) -> str:
        """Return the schema as TOML without the defaults; `Schema.from_toml` reads it back equal."""
        return to_toml(self) + "\n"

    @classmethod
    def from_toml(cls, path: Path | str) -> Schema:
        """Read a schema file; errors begin with its path.

        Raises:
            SchemaError: As in `from_dict`, or if the file is not TOML or is nested deeper than any schema.
        """
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        try:
            content = toml.loads(Path(path).read_text(encoding="utf-8"))
        except RecursionError as error:
            raise SchemaError(f"{path}: got TOML nested too deeply, wanted a schema") from error
        except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError alike
            raise SchemaError(f"{path}: {error}") from error
        try:
            check_depth(content, "schema")
            return cls.from_dict(content)
        except InputError as error:
            raise SchemaError(f"{path}: {error}") from error

    def _check_names(self) -> None:
        named: dict[str, Sequence[Any]] = {
            "column": self.columns,
            "task": self.tasks,
            "history": self.histories,
            "derived": self.derived,
            "slice": self.slices,
        }
        for kind, items in named.items():
            twice = _repeated(item.name for item in items)
            if twice is not None:
                raise SchemaError(f"{kind} {twice!r}: declared twice, wanted one")
        for key, names in {"carried": self.carried, "context": self.context}.items():
            twice = _repeated(names)
            if twice is not None:
                raise SchemaError(f"{key}: got {twice!r} twice, wanted each column once")
        if not self.columns or not self.tasks:
            got = f"{len(self.columns)} columns and {len(self.tasks)} tasks"
            raise SchemaError(f"schema {self.name!r}: got {got}, wanted at least 1 each")
        if all(task.extra for task in self.tasks):
            raise SchemaError(f"schema {self.name!r}: got extra tasks only, wanted one that every run has")
