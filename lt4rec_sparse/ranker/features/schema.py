"""The contents of a click log: its columns, its tasks, its splits, and the columns that no model may see.

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
from lt4rec_sparse.files import check_depth, check_regular
from lt4rec_sparse.ranker.features.records import SchemaError, from_plain, later, to_plain, to_stored, to_toml

ValueType = Literal["int", "string"]
# Prepared data stores ids as int32.
MAX_IDS = (1 << 31) - 1
# More cuts than a sketch of the training values has points would be noise; longer bags are no recent past.
MAX_BUCKETS = MAX_HISTORY = 1 << 16
MAX_PLACES = 1 << 14  # of a vector: each has weights of its own in the first layer
RATE_BUCKETS = 16
NUMBERS = ("standardised", "log")  # encodings whose values are inputs themselves


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _check_form(delimiter: str | None, names: tuple[str, ...], where: str) -> None:
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n' or not delimiter.isascii()):
        raise SchemaError(f"{where}: got delimiter={shown(delimiter)}, wanted one sign, such as ';' or a tab")
    twice = _repeated(names)
    if twice is not None:
        raise SchemaError(f"{where}: got {twice!r} twice in names, wanted each column once")


@dataclass(frozen=True)
class Files:
    """The files of the log, as globs relative to its folder or to the folder's `data/`; CSV and Parquet.

    Attributes:
        log: The globs. `.parquet` says Parquet; any other name CSV, also compressed (.gz, .zst, .bz2).
        delimiter: One sign between the columns of CSV. None: a tab in `.tsv`, else a comma.
        names: The columns of CSV files without a header.
        encoding: The encoding of CSV files, by Python's name.
        missing: The texts that stand for a missing value, in CSV and Parquet. None: in CSV the empty text, NA, N/A,
            NULL, null, NaN and nan; in Parquet, which has nulls, none. An empty number is missing in any case.
    """

    log: tuple[str, ...]
    delimiter: str | None = later(None)
    names: tuple[str, ...] = later(())
    encoding: str = later("utf8")
    missing: tuple[str, ...] | None = later(None)

    def __post_init__(self) -> None:
        _check_form(self.delimiter, self.names, "files")


@dataclass(frozen=True)
class Join:
    """A side table (users, videos, ...) that adds its columns to every row with the same key.

    If the log and a side table have the same column, the log's is used. How its files are written is said as in
    `Files`, and as there if it is not said; but for `names`, without which each file has a header.
    """

    files: tuple[str, ...]
    on: str
    type: ValueType = "int"
    delimiter: str | None = later(None)
    names: tuple[str, ...] = later(())
    encoding: str | None = later(None)
    missing: tuple[str, ...] | None = later(None)

    def __post_init__(self) -> None:
        _check_form(self.delimiter, self.names, f"join {' '.join(self.files)}")


@dataclass(frozen=True)
class Time:
    """The day of a row: a `day` column (sortable, e.g. 20220425 or 2022-04-25), or the date of a `timestamp`.

    A timestamp is an epoch in `unit`, also with a fraction, a text in ISO 8601, or one in `format`; without a zone of
    its own it is a time of UTC. Its date is that in `zone`, a name such as "Asia/Shanghai" or an offset such as
    "+05:30", or whole hours from UTC. `format` (of Python's `strptime`) also reads a `day` such as 25/04/2022, which is
    then named 2022-04-25 everywhere else. `order` sorts the rows of a day for histories; without it the timestamp does,
    and without that they keep the order of the files.
    """

    day: str | None = None
    timestamp: str | None = None
    unit: Literal["s", "ms", "us", "ns"] = "ms"
    utc_offset_hours: int = 0
    order: str | None = None
    zone: str | None = later(None)
    format: str | None = later(None)

    def __post_init__(self) -> None:
        if (self.day is None) == (self.timestamp is None):
            raise SchemaError(f"time: got day={self.day!r} and timestamp={self.timestamp!r}, wanted exactly one")
        if not -24 < self.utc_offset_hours < 24:
            raise SchemaError(f"time: got utc_offset_hours={shown(self.utc_offset_hours)}, wanted -23 to 23")
        if self.zone is not None and (self.utc_offset_hours or self.timestamp is None):
            raise SchemaError(f"time: got zone={self.zone!r}, wanted it with a timestamp, and no utc_offset_hours")


@dataclass(frozen=True)
class Split:
    """Which rows train, validate and test.

    Attributes:
        test_days: The last days of the log, by number; only by "day".
        validation_days: The days before them; only by "day".
        train: What is in this split: days, values of the column, or globs of files of the log.
        validation: Likewise. By "column" and "files" it may be empty: `validation_share` of the training rows.
        test: Likewise.
        by: "day"; "random", a seeded hash of the row's place in the log; "hash", one of its value in `column`, so that
            no value (no user) is in two splits; "column", whose values the lists name, by default train, validation
            and test; or "files". None: by day if the log has a time, else at random.
        column: The column that "column" and "hash" read.
        test_share: Share of the rows, or of the values, that a hash gives the test; in (0, 1).
        validation_share: Likewise; together they are below 1.
        seed: Chooses the hash.
    """

    test_days: int = 2
    validation_days: int = 2
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    by: Literal["day", "random", "hash", "column", "files"] | None = later(None)
    column: str | None = later(None)
    test_share: float = later(0.1)
    validation_share: float = later(0.1)
    seed: int = later(0)

    def __post_init__(self) -> None:
        lists = (self.train, self.validation, self.test)
        twice = _repeated(item for items in lists for item in items)
        if twice is not None:
            raise SchemaError(f"split: {self.by or 'day'} {twice!r} is listed twice, wanted it in one split")
        if self.by in ("column", "files"):
            if bool(self.train) != bool(self.test) or (self.validation and not self.train):
                raise SchemaError("split: got some of the lists train, test, wanted both, or none")
            if self.by == "files" and not self.train:
                raise SchemaError("split: got by='files' without lists, wanted globs of files in train and test")
        elif any(lists) and (self.by in ("random", "hash") or not all(lists)):
            wanted = f"none by {self.by!r}" if self.by in ("random", "hash") else "all three or none"
            raise SchemaError(f"split: got some of the lists train, validation, test, wanted {wanted}")
        if (self.column is not None) != (self.by in ("column", "hash")):
            wanted = "a column by 'column' and 'hash', and none by anything else"
            raise SchemaError(f"split: got by={self.by!r} and column={self.column!r}, wanted {wanted}")
        if self.test_days < 1 or self.validation_days < 1:
            got = f"test_days={shown(self.test_days)}, validation_days={shown(self.validation_days)}"
            raise SchemaError(f"split: got {got}, wanted at least 1 each")
        if not (self.test_share > 0 and self.validation_share > 0 and self.test_share + self.validation_share < 1):
            got = f"test_share={shown(self.test_share)}, validation_share={shown(self.validation_share)}"
            raise SchemaError(f"split: got {got}, wanted shares above 0 that sum to less than 1")
        if not 0 <= self.seed < 1 << 63:
            raise SchemaError(f"split: got seed={shown(self.seed)}, wanted 0 to 2^63 - 1")


@dataclass(frozen=True)
class Group:
    """The column that says which rows belong together (the user): the unit of GAUC and of histories."""

    column: str
    type: ValueType = "int"


@dataclass(frozen=True)
class Column:
    """One feature, and how its raw values become ids of an embedding table, or inputs of the network themselves.

    Attributes:
        name: The column in the log, in a side table, or among the derived columns.
        kind: `single` value, `multi` (a bag of values), `dense` (a number) or `vector` (`size` numbers).
        type: The type of the raw values; `dense` and `vector` ignore it.
        table: The embedding table; columns that name the same table share its ids. Empty: the column's own table.
        encoding: `vocabulary` (seen in training) or `hash` (fixed size, never fitted). Of a `dense` column `buckets`,
            cut at quantiles of all training values, which needs not be said, or `nonzero_buckets`, at quantiles of the
            nonzero ones, with a bucket more for 0: for columns that are mostly 0. `standardised` and `log` make the
            number an input of the network, by `numbers.Scale`; of a `vector`, each of its places, `standardised` if
            nothing is said.
        size: Number of ids of a hashed table, including the one for a missing value; below 2^31. Of a `vector`, how
            many numbers it has, 1 to 16,384.
        min_count: A value that is rarer than this in training counts as unseen.
        separator: Between the values of a `multi` or `vector` column that is stored as text.
        buckets: The greatest number of buckets of a `dense` column, 2 to 65,536.
        last: How many of a row's values count in a `multi` column: its last ones; 0 for all.
        pooling: What a `multi` column's vector is: the `mean` of its values' embeddings, or a sum weighted by
            `attention` to the `target` (`attention.AttentionUnit`).
        target: With attention, the `single` column whose value is attended to, such as the candidate. They share a
            table: if `table` is not said, it is the target's name.
    """

    name: str
    kind: Literal["single", "multi", "dense", "vector"] = "single"
    type: ValueType = "string"
    table: str = ""
    encoding: Literal["vocabulary", "hash", "buckets", "nonzero_buckets", "standardised", "log"] = "vocabulary"
    size: int = 0
    min_count: int = 1
    separator: str = ","
    buckets: int = 32
    last: int = later(0)
    pooling: Literal["mean", "attention"] = later("mean")
    target: str | None = later(None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", self.table or self.target or self.name)
        where = f"column {self.name!r}"
        if self.encoding in ("buckets", "nonzero_buckets") and self.kind != "dense":
            raise SchemaError(f"{where}: got encoding={self.encoding!r} of kind={self.kind!r}, wanted kind='dense'")
        if self.kind == "vector" and self.encoding == "vocabulary":
            object.__setattr__(self, "encoding", "standardised")
        if self.encoding in NUMBERS or self.kind == "vector":
            self._check_numbers(where)
        if self.encoding == "buckets":
            object.__setattr__(self, "encoding", "vocabulary")  # as stored schemas have it, and so equal to them
        if self.encoding == "hash" and (self.kind == "dense" or not 2 <= self.size <= MAX_IDS):
            got = f"hash of kind={self.kind!r}, size={shown(self.size)}"
            raise SchemaError(f"{where}: got {got}, wanted categorical, size 2 to {MAX_IDS}")
        if self.encoding != "hash" and self.size and self.kind != "vector":
            kind = {"vocabulary": "a vocabulary", "nonzero_buckets": "buckets"}.get(self.encoding, "a number")
            raise SchemaError(f"{where}: got size={shown(self.size)} with {kind}, wanted encoding='hash'")
        if self.min_count < 1 or not 2 <= self.buckets <= MAX_BUCKETS or not self.separator:
            got = f"min_count={shown(self.min_count)}, buckets={shown(self.buckets)}, separator={self.separator!r}"
            raise SchemaError(f"{where}: got {got}, wanted min_count >= 1, buckets 2 to {MAX_BUCKETS}, a separator")

        is_plain = not self.last and self.pooling == "mean" and self.target is None
        if not is_plain and self.kind != "multi":
            raise SchemaError(f"{where}: got last, pooling or target of kind={self.kind!r}, wanted kind='multi'")
        if not 0 <= self.last <= MAX_HISTORY:
            raise SchemaError(f"{where}: got last={shown(self.last)}, wanted 1 to {MAX_HISTORY}, or 0 for all")
        if (self.target is not None) != (self.pooling == "attention"):
            got = f"pooling={self.pooling!r}, target={shown(self.target)}"
            raise SchemaError(f"{where}: got {got}, wanted a target with pooling='attention', and with nothing else")

    @property
    def is_number(self) -> bool:
        """Whether its values are inputs of the network, and not ids of an embedding table."""
        return self.encoding in NUMBERS

    @property
    def is_list(self) -> bool:
        """Whether its raw values are lists, or texts with a separator."""
        return self.kind in ("multi", "vector")

    @property
    def places(self) -> int:
        """How many numbers a value has."""
        return self.size if self.kind == "vector" else 1

    def _check_numbers(self, where: str) -> None:
        if self.kind not in ("dense", "vector") or self.encoding not in NUMBERS:
            wanted = "kind='dense' or 'vector' with 'standardised' or 'log'"
            raise SchemaError(f"{where}: got encoding={self.encoding!r} of kind={self.kind!r}, wanted {wanted}")
        if self.table != self.name:
            raise SchemaError(f"{where}: got table={self.table!r}, wanted none: numbers have no embeddings")
        if self.kind == "vector" and not 1 <= self.size <= MAX_PLACES:
            raise SchemaError(f"{where}: got size={shown(self.size)} of a vector, wanted 1 to {MAX_PLACES}")


@dataclass(frozen=True)
class Task:
    """One thing to predict.

    `binary`: the label is 0 or 1 (or true or false), the loss cross-entropy, the metric AUC (higher is better). Where
    `positive` lists texts, these are 1 and all others 0, or, with `negative`, those that it lists.
    `ratio`: the label is in [0, 1], or made so by `clip(label / divide_by, 0, 1)`; the metric is MSE (lower is better).
    `divide_by` is a column or a constant.

    A row belongs to the task when every column in `rows` is nonzero and the label exists: it is not missing, and with
    `divide_by` the numerator is not negative and the divisor is positive. Other tasks keep the row. In labels, divisors
    and row filters an infinite number counts as missing; an infinite label without `divide_by` is out of range, and an
    infinite weight is refused.

    An `extra` task is prepared like any other, but left out of a run that does not name it.
    """

    name: str
    kind: Literal["binary", "ratio"]
    label: str
    divide_by: str | int | float | None = None
    rows: tuple[str, ...] = ()
    weight: str | None = None
    extra: bool = False
    positive: tuple[str, ...] = later(())
    negative: tuple[str, ...] = later(())

    def __post_init__(self) -> None:
        if self.positive and self.kind == "ratio":
            raise SchemaError(f"task {self.name!r}: got positive in a ratio task, wanted kind='binary'")
        if self.negative and not self.positive:
            raise SchemaError(f"task {self.name!r}: got negative alone, wanted positive with it")
        twice = _repeated((*self.positive, *self.negative))
        if twice is not None:
            raise SchemaError(f"task {self.name!r}: got {twice!r} twice in positive and negative, wanted it once")
        if isinstance(self.divide_by, int | float) and not 0 < self.divide_by < float("inf"):
            raise SchemaError(f"task {self.name!r}: got divide_by={shown(self.divide_by)}, wanted a number above 0")
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
    (missing before the first). With `pooling = "attention"` each bag is summed by attention to the row's own value of
    its column, which is a single one.
    """

    name: str
    when: str
    columns: tuple[str, ...]
    length: int = 10
    rates: bool = False
    pooling: Literal["mean", "attention"] = later("mean")

    def __post_init__(self) -> None:
        if not 1 <= self.length <= MAX_HISTORY:
            got = f"length={shown(self.length)}"
            raise SchemaError(f"history {self.name!r}: got {got}, wanted 1 to {MAX_HISTORY}")


@dataclass(frozen=True)
class Derived:
    """A column made by the data layer: whole days from the date in column `days_since` to the row's day.

    The date is ISO or 20220425, or in `format` (of Python's `strptime`).
    """

    name: str
    days_since: str
    format: str | None = later(None)


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

    A log without a `time` has no days: no histories, no derived ages. One without a `group` has no histories, and
    reports leave GAUC out. Exact duplicates, rows that equal an earlier row of their day in every column of the files,
    are kept, or dropped by `duplicates = "drop"`.

    Raises:
        SchemaError: If names repeat or do not resolve, tables disagree, or an outcome is a feature.
    """

    name: str
    files: Files
    time: Time | None
    group: Group | None
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
    duplicates: Literal["keep", "drop"] = later("keep", before="drop")

    def __post_init__(self) -> None:
        self._check_names()
        self._check_time()
        categorical = {column.name for column in self.columns if column.kind in ("single", "multi")}
        for history in self.histories:
            for name in history.columns:
                if name not in categorical:
                    raise SchemaError(f"history {history.name!r}: got column {name!r}, wanted a categorical feature")
        known = {column.name for column in self.features}  # which looks up the histories' columns
        stray = next((name for name in self.context if name not in known), None)
        if stray is not None:
            raise SchemaError(f"context: got column {stray!r}, wanted features")
        if all(column.is_number for column in self.features):
            got = f"numbers alone ({', '.join(known)})"
            raise SchemaError(f"columns: got {got}, wanted at least one feature with embeddings: ids, or buckets")
        twice = _repeated(column.name for column in self.features)
        if twice is not None:
            raise SchemaError(f"column {twice!r}: is also a history's, wanted one of the two")
        self._check_targets()
        tables: dict[str, tuple[str, tuple[object, ...]]] = {}
        for column in self.features:
            # Numbers never share a table, since their cuts are their own: the name is part of the rule.
            own = column.name if column.kind in ("dense", "vector") else ""
            rule = (own, column.type, column.encoding, column.size, column.min_count)
            first, wanted = tables.setdefault(column.table, (column.name, rule))
            if rule != wanted:
                agree = "one type, encoding, size and min_count, and no numbers"
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
            for name in history.columns:
                target = name if history.pooling == "attention" else None
                pooled = replace(declared[name], kind="multi", last=0, pooling=history.pooling, target=target)
                bags.append(replace(pooled, name=f"{history.name}_{name}"))
        return (*self.columns, *rates, *bags)

    @property
    def in_common(self) -> frozenset[str]:
        """Features that all candidates of a request have in common."""
        if not self.context:
            return frozenset()
        declared = {column.name for column in self.columns}
        made = {column.name for column in self.features} - declared
        group = () if self.group is None else (self.group.column,)
        return frozenset(made | ({*self.context, *group} & declared))

    @property
    def keys(self) -> dict[str, ValueType]:
        """The columns by which features are found, and their types: the group, and the keys of side tables."""
        keys = {join.on: join.type for join in self.joins}
        return keys if self.group is None else keys | {self.group.column: self.group.type}

    @property
    def moment(self) -> str | None:
        """The column that says when a row was: its day, or its timestamp."""
        return None if self.time is None else self.time.day or self.time.timestamp

    @property
    def order(self) -> str | None:
        """The column that sorts the rows of a day."""
        return None if self.time is None else self.time.order or self.time.timestamp

    @property
    def split_by(self) -> str:
        """How rows are split: `split.by`, or its default."""
        return self.split.by or ("random" if self.time is None else "day")

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

    def to_stored(self) -> dict[str, Any]:
        """Return the schema as JSON-able data for files, in which a schema of before a key was there stays the same."""
        data: dict[str, Any] = to_stored(self)
        return data

    @classmethod
    def from_stored(cls, data: Any) -> Schema:
        """Read `to_stored` back; a key that is absent means what was done before it was there.

        Raises:
            SchemaError: As in `from_dict`.
        """
        return cls.from_dict({"duplicates": "drop", **data} if isinstance(data, Mapping) else data)

    def to_toml(self) -> str:
        """Return the schema as TOML without the defaults; `Schema.from_toml` reads it back equal."""
        return to_toml(self) + "\n"

    @classmethod
    def from_toml(cls, path: Path | str, stored: bool = False) -> Schema:
        """Read a schema file; errors begin with its path. `stored` reads it as `from_stored` does.

        Raises:
            SchemaError: As in `from_dict`, or if the file is not TOML or is nested deeper than any schema.
        """
        check_regular(path, "a schema", SchemaError)
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        try:
            content = toml.loads(Path(path).read_text(encoding="utf-8"))
        except RecursionError as error:
            raise SchemaError(f"{path}: got TOML nested too deeply, wanted a schema") from error
        except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError alike
            raise SchemaError(f"{path}: {error}") from error
        try:
            check_depth(content, "schema")
            return cls.from_stored(content) if stored else cls.from_dict(content)
        except InputError as error:
            raise SchemaError(f"{path}: {error}") from error

    def _check_targets(self) -> None:
        """Refuse attention to what is no single value of the same table."""
        single = {column.name: column for column in self.features if column.kind == "single"}
        for column in self.features:
            if column.target is None:
                continue
            if column.target not in single:
                raise SchemaError(
                    f"column {column.name!r}: got target {column.target!r}, wanted a feature of kind='single'"
                )
            if (table := single[column.target].table) != column.table:
                got = f"table {column.table!r} and target {column.target!r} of table {table!r}"
                raise SchemaError(f"column {column.name!r}: got {got}, wanted one table: they are values of one kind")

    def _check_time(self) -> None:
        """Refuse what needs days or groups in a log that has none."""
        absent = [f"[{name}]" for name in ("time", "group") if getattr(self, name) is None]
        if self.histories and absent:
            got = f"history {self.histories[0].name!r}: got a log without {' and '.join(absent)}"
            raise SchemaError(f"{got}, wanted both: it is a group's rows of earlier days")
        if self.derived and self.time is None:
            raise SchemaError(
                f"derived {self.derived[0].name!r}: got a log without [time], wanted the days of its rows"
            )
        if self.split_by == "day" and self.time is None:
            raise SchemaError("split: got by='day' without [time], wanted 'random', 'hash', 'column' or 'files'")
        if self.time is None and (self.split.train and self.split.by is None):
            raise SchemaError("split: got lists without `by`, wanted by='column' or by='files': the log has no [time]")

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
