"""A first schema for a folder of files: guesses from names and values, each said in a comment.

What a column is follows from its name and its values. A column that says what a label is (`explained`) would make a
model look perfect and be worthless: it is named and left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch import nn

from lt4rec_sparse.errors import shown
from lt4rec_sparse.ranker.features import Column, Files, Group, Join, Schema, Split, Task, Time
from lt4rec_sparse.ranker.features.schema import MAX_PLACES, ValueType
from lt4rec_sparse.recsys.data.batches import SPLITS
from lt4rec_sparse.recsys.data.casts import PLAUSIBLE, UNITS_US
from lt4rec_sparse.recsys.data.seen import Seen, Table, all_of, tables_of
from lt4rec_sparse.recsys.data.source import DataError

LABEL = re.compile(
    r"(^|_)(is_?)?(label|click|clicked|target|buy|bought|purchase|purchased|conversion|convert|converted|"
    r"like|liked|follow|comment|forward|share|long_view|install|installed|order|ordered|class|outcome|response|churn|fraud|income|"
    r"subscribed|survived|y)s?($|_?[0-9]*$)"
)
RATING = re.compile(r"(^|_)(rating|stars|score)s?$")
GROUP = re.compile(
    r"^(user|uid|member|customer|client|account|visitor|session|device|reviewer|query)(_?id|_?key|_?hash)?$"
)
TIME = re.compile(r"(^|_)(time|timestamp|ts|date|datetime|day|dt|time_ms|impression_time)$")
SPLIT = re.compile(r"^(split|fold|set|subset|partition|part)$")
OUTCOME = re.compile(
    r"(play|watch|dwell|stay|view|read|listen)(ing)?_?(time|duration|ratio|ms|seconds)|revenue|gmv|profit"
)
ID = re.compile(r"(^|_)(id|uid|key|hash|code|no|zip|hour|hourmin|weekday|month|tab)s?$")
DETERMINED = 0.95  # of a label's variance that a column explains: more than any honest feature does
FEW_VALUES = 64  # ints of at most so many values are categories
MANY_VALUES = 1_000  # of which rare ones share the unseen id
BINS = 64


def draft_schema(folder: Path, log: str | None = None, keys: Mapping[str, str] | None = None) -> str:
    """Return a schema as TOML, with what was guessed and why in comments.

    It reads the first 200,000 rows of the log and of every other table, which is a side table if one of its columns is
    in the log and has each value once.

    Args:
        folder: The folder with the tables.
        log: The name of the log's file; None for the largest table.
        keys: File -> the column by which a side table is found, where that is known.

    Raises:
        DataError: If there are no tables, a file cannot be read, or no column can be a label.
    """
    tables, unread = tables_of(folder)
    tables.sort(key=lambda table: log not in (None, *(path.name for path in table.paths)))
    return _Draft(folder, tables[0], tables[1:], unread, keys or {}).text()


class _Draft:
    """The parts of a schema, as they are found."""

    def __init__(
        self, folder: Path, log: Table, others: Sequence[Table], unread: Sequence[str], keys: Mapping[str, str]
    ) -> None:
        self._folder, self._log, self._keys = folder, log, keys
        self._left = dict(log.columns)  # columns without a role
        self._notes = [f"- not read: {reason}" for reason in unread]
        self._remarks: dict[str, str] = {}  # column -> what is said beside it
        self.joins, self._beside = self._found_joins(others)
        self.split = self._found_split()
        self.group = self._found_group()
        self.time = self._found_time()
        self.tasks = self._found_tasks()
        self.leaks = self._found_leaks()
        self.columns = self._found_columns()
        self.missing = self._found_missing()

    def text(self) -> str:
        """Return the TOML."""
        form = self._log.form
        files = Files(
            _globs(self._log.paths),
            delimiter=form.delimiter,
            names=form.names,
            encoding=form.encoding,
            missing=self.missing,
        )
        schema = Schema(
            self._folder.resolve().name, files, self.time, self.group, tuple(self.columns), tuple(self.tasks),
            tuple(self.leaks), self.split, tuple(self.joins)
        )  # fmt: skip
        rows = f"the first {self._log.rows:,} rows of {', '.join(p.name for p in self._log.paths[:3])}"
        head = [f"A draft, made of {rows}: read it before you train. docs/data.md explains every key.", *self._notes]
        lines = [f"# {' '.join(line.split())}" for line in head] + [""]
        in_column = False
        for line in schema.to_toml().splitlines():
            if line.startswith("["):
                in_column = line == "[[columns]]"
            if in_column and line.startswith("name = "):
                name = json.loads(line.removeprefix("name = "))
                line += f"  # {self._remarks[name]}"
            if not (in_column and line.startswith("table = ")):  # its own
                lines.append(line)
        return "\n".join(lines) + "\n"

    def _note(self, text: str) -> None:
        self._notes.append(f"- {text}")

    def _found_joins(self, others: Sequence[Table]) -> tuple[list[Join], dict[str, Seen]]:
        joins, beside = [], dict[str, Seen]()
        for table in others:
            names = ", ".join(path.name for path in table.paths)
            keys = [
                seen for seen in table.columns.values()
                if seen.name in self._log.columns and seen.kind in ("int", "text") and seen.distinct == table.rows
                and self._keys.get(table.paths[0].name, seen.name) == seen.name
            ]  # fmt: skip
            if not keys or len(table.paths) > 1:
                self._note(f"not read: {names}: no column of it is in the log and has each value once")
                continue
            key = min(keys, key=lambda seen: not seen.name.endswith("id"))
            kind: ValueType = "int" if key.kind == "int" and self._log.columns[key.name].kind == "int" else "string"
            form = table.form
            encoding = None if form.encoding == self._log.form.encoding else form.encoding
            delimiter = form.delimiter or ("," if self._log.form.delimiter else None)
            joins.append(Join(
                _globs(table.paths), key.name, kind, delimiter=delimiter, names=form.names, encoding=encoding
            ))  # fmt: skip
            beside |= {
                name: seen for name, seen in table.columns.items()
                if name not in self._log.columns and name not in beside
            }  # fmt: skip
            self._note(f"{names} is joined by {key.name}")
        return joins, beside

    def _found_split(self) -> Split:
        names = [path.name.lower() for path in self._log.paths]
        of_files = [_split_of(name) for name in names]
        if len(names) > 1 and None not in of_files and {"train", "test"} <= set(of_files):
            self._note("rows are split by files")
            lists = [tuple(p.name for p, of in zip(self._log.paths, of_files, strict=True) if of == s) for s in SPLITS]
            return Split(train=lists[0], validation=lists[1], test=lists[2], by="files")
        for seen in self._log.columns.values():
            if not SPLIT.search(seen.name.lower()) or not 2 <= seen.distinct <= 20 or seen.kind != "text":
                continue
            values = pc.unique(seen.values.drop_null()).to_pylist()
            of_values = [_split_of(value.lower()) for value in values]
            if None not in of_values and {"train", "test"} <= set(of_values) and not seen.values.null_count:
                self._note(f"rows are split by the column {seen.name}")
                del self._left[seen.name]
                lists = [tuple(v for v, of in zip(values, of_values, strict=True) if of == s) for s in SPLITS]
                return Split(train=lists[0], validation=lists[1], test=lists[2], by="column", column=seen.name)
        return Split()

    def _found_group(self) -> Group | None:
        for seen in self._log.columns.values():
            is_key = seen.kind in ("int", "text") and not seen.values.null_count and 1 < seen.distinct < self._log.rows
            if is_key and GROUP.search(seen.name.lower()):
                self._note(f"group: {seen.name}, {seen.distinct:,} values")
                keyed = {join.on: join.type for join in self.joins}
                return Group(seen.name, keyed.get(seen.name, "int" if seen.kind == "int" else "string"))
        self._note("no [group]: no column is named as one of users is; reports then have no GAUC, NDCG or hit rate")
        return None

    def _found_time(self) -> Time | None:
        looked = [(*_time_of(seen), name) for name, seen in self._log.columns.items()]
        found = [(time, days, name) for time, days, name in looked if time is not None]
        found.sort(key=lambda item: (-min(item[1], 3), item[0].day is None))
        if not found:
            at_random = "" if self.split.by else "; rows are split at random"
            self._note(f"no [time]: no column has days or times{at_random}; there are no histories")
            return None
        time, days, name = found[0]
        if not self._log.is_whole:
            days = len(set().union(*(_days_of(time, seen) for seen in all_of(self._log, name))))
        for _, _, other in found:
            self._left.pop(other, None)
            if other != name:
                self._note(f"left out: {other}, another time")
        self._note(f"time: {name}, {days:,} days")
        if self.split.by is None and days < 5:
            self.split = Split(by="random") if days < 3 else Split(test_days=1, validation_days=1)
            if days < 3:
                self._note("so few days are no splits: rows are split at random")
        return time

    def _found_tasks(self) -> list[Task]:
        tasks = []
        for seen in self._left.values():
            if LABEL.search(seen.name.lower()) and _is_binary(seen):
                tasks.append(_binary(seen, "named as a label", self._note))
            elif RATING.search(seen.name.lower()) and _is_positive(seen):
                most = float(pc.max(seen.values).as_py())
                self._note(f"task {_task_name(seen.name)}: {seen.name} over {most:g}, its largest value")
                by = int(most) if most.is_integer() else most
                tasks.append(Task(_task_name(seen.name), "ratio", seen.name, by))
        if not tasks:
            of_two = [seen for seen in self._left.values() if _is_binary(seen)]
            if not of_two:
                raise DataError(f"{self._folder}: got no column of two values, wanted one: it would be the label")
            ends = [seen for seen in of_two if seen.name in (list(self._left)[-1], next(iter(self._left)))]
            tasks.append(_binary((ends or of_two)[-1], "a guess: it has two values", self._note))
        for task in tasks:
            del self._left[task.label]
        return tasks

    def _found_leaks(self) -> list[str]:
        leaks = []
        labels = {task.label: _as_label(task, self._log.columns[task.label]) for task in self.tasks}
        for name, seen in list(self._left.items()):
            for label, values in labels.items():
                share = explained(seen, values)
                if share > DETERMINED:
                    self._note(f"left out: {name} explains {share:.0%} of {label}: known only after it, or the same")
                elif OUTCOME.search(name.lower()) or (name.startswith("is_") and label.startswith("is_")):
                    self._note(f"left out: {name} is named as an outcome; if it is known beforehand, add it")
                else:
                    continue
                leaks.append(name)
                del self._left[name]
                break
        return leaks

    def _found_columns(self) -> list[Column]:
        columns = []
        keys = {join.on: join.type for join in self.joins}
        keys |= {} if self.group is None else {self.group.column: self.group.type}
        for seen in (*self._left.values(), *self._beside.values()):
            column, remark = _column(seen, seen.name in self._left)
            if column is None:
                self._note(f"left out: {seen.name}, {remark}")
            elif self.group is not None and seen.name == self.group.column and seen.distinct * 20 > self._log.rows:
                self._note(f"left out: {seen.name}, the group, with few rows for each")
            else:
                if seen.name in keys:
                    min_count = 3 if seen.distinct > MANY_VALUES else 1
                    column = Column(seen.name, type=keys[seen.name], min_count=min_count)
                columns.append(column)
                self._remarks[seen.name] = remark
        if not columns:
            raise DataError(f"{self._folder}: got no column that can be a feature, wanted some beside the label")
        return columns

    def _found_missing(self) -> tuple[str, ...]:
        """Return the spellings of missing values: those among numbers and dates, and of NULL among texts."""
        seen = [*self._log.columns.values(), *self._beside.values()]
        found = {text for column in seen for text in column.spelled}
        for column in seen:
            if column.kind == "text":
                texts = pc.unique(column.values).drop_null()
                found |= {"NULL", "null", "\\N"} & set(texts.to_pylist())
                if "NA" in texts.to_pylist() and pc.all(pc.match_substring_regex(texts, "^[A-Z]{2}$")).as_py():
                    found.discard("NA")
                    self._note(f"{column.name} holds codes of two letters: NA is one of them and not missing")
        return ("", *sorted(found - {""}))


def explained(seen: Seen, label: NDArray[np.float64]) -> float:
    """Return the share of a label's variance that a column explains, corrected for its number of values.

    `1 - (1 - between / all) (n - 1) / (n - k)`: k values (missing is one; many numbers are 64 quantiles), n rows with a
    label, and the variance between the values' means. It is that of a random column in the mean 0. Columns in which
    hardly a value comes twice explain nothing by it.
    """
    if seen.kind in ("list", "other", "nothing"):
        return 0.0
    values = seen.values
    if seen.kind in ("int", "number") and seen.distinct > BINS:
        numbers = np.array(values.cast(pa.float64()).to_numpy(zero_copy_only=False))
        cuts = np.unique(np.nanquantile(numbers, np.linspace(0, 1, BINS + 1)[1:-1]))
        values = pa.array(np.where(np.isnan(numbers), -1, np.searchsorted(cuts, numbers)))
    known = ~np.isnan(label)
    codes = values.dictionary_encode(null_encoding="encode").indices.to_numpy()[known]
    y = label[known]
    counts = np.bincount(codes)
    n, k = len(y), int((counts > 0).sum())
    if k < 2 or n < 2 * k or y.var() == 0:
        return 0.0
    means = np.bincount(codes, y) / np.maximum(counts, 1)
    within = ((y - means[codes]) ** 2).mean()
    return float(1 - within / y.var() * (n - 1) / (n - k))


def _globs(paths: Iterable[Path]) -> tuple[str, ...]:
    # In a glob these signs are no text.
    return tuple(re.sub(r"([*?\[])", r"[\1]", path.name) for path in paths)


def _split_of(text: str) -> str | None:
    for split, pattern in {"validation": r"val|dev", "test": r"test|eval", "train": r"train"}.items():
        if re.search(pattern, text):
            return split
    return None


def _is_positive(seen: Seen) -> bool:
    return seen.kind in ("int", "number") and pc.min(seen.values).as_py() >= 0 and pc.max(seen.values).as_py() > 0


def _is_binary(seen: Seen) -> bool:
    return seen.distinct == 2 and seen.kind in ("int", "number", "bool", "text")


def _task_name(column: str) -> str:
    name = re.sub(r"[^\w-]+", "_", column).strip("_") or "label"
    return f"{name}_label" if hasattr(nn.ModuleDict, name) else name  # as a part of a model, it cannot have that name


def _binary(seen: Seen, why: str, note: Any) -> Task:
    name = _task_name(seen.name)
    values = sorted(pc.unique(seen.values.drop_null()).to_pylist())
    plain = seen.kind == "bool" or values == [0, 1]
    positive = () if plain else _positive(seen)
    note(f"task {name}: {seen.name}, {why}" + ("" if plain else f"; positive is {positive[0]!r}"))
    return Task(name, "binary", seen.name, positive=positive)


def _positive(seen: Seen) -> tuple[str, ...]:
    """Return the value that stands for yes: of numbers the larger one; of texts by its words, or the rarer one."""
    if seen.kind in ("int", "number"):
        return (_text(pc.max(seen.values).as_py()),)
    counts = pc.value_counts(seen.values.drop_null())
    texts = {_text(item["values"].as_py()): item["counts"].as_py() for item in counts}
    yes = [text for text in texts if re.fullmatch(r"(?i)y|yes|true|t|1|pos|positive|clicked|bought", text.strip())]
    return (yes[0] if len(yes) == 1 else min(texts, key=lambda text: (texts[text], text)),)


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _as_label(task: Task, seen: Seen) -> NDArray[np.float64]:
    values = seen.values.to_pylist()
    if task.positive:
        return np.array([np.nan if v is None else float(_text(v) in task.positive) for v in values])
    if seen.kind == "bool":
        return np.array([np.nan if v is None else float(str(v).lower() == "true") for v in values])
    return np.array(seen.values.cast(pa.float64()).to_numpy(zero_copy_only=False))


def _time_of(seen: Seen) -> tuple[Time | None, int]:
    """Return how a column says the time of rows, and how many days it has here."""
    time = _time(seen)
    return time, 0 if time is None else len(_days_of(time, seen))


def _time(seen: Seen) -> Time | None:
    if seen.values.null_count or not seen.distinct:
        return None
    if seen.kind in ("date", "day/month"):
        return Time(day=seen.name, format="%d/%m/%Y" if seen.kind == "day/month" else None)
    if seen.kind == "time":
        return Time(timestamp=seen.name)
    if seen.kind not in ("int", "number") or not TIME.search(seen.name.lower()):
        return None
    low, high = (float(bound.as_py()) for bound in (pc.min(seen.values), pc.max(seen.values)))
    if seen.kind == "int" and 19_900_101 <= low <= high <= 21_001_231:
        return Time(day=seen.name)
    first, last = ((year - 1970) * 31_556_952 for year in (PLAUSIBLE.start, PLAUSIBLE.stop))
    units: tuple[Literal["s", "ms", "us", "ns"], ...] = ("s", "ms", "us", "ns")
    fitting = (unit for unit in units if first <= low * UNITS_US[unit] / 1e6 <= high * UNITS_US[unit] / 1e6 < last)
    unit = next(fitting, None)
    return None if unit is None else Time(timestamp=seen.name, unit=unit)


def _days_of(time: Time, seen: Seen) -> set[Any]:
    """Return the days of a column that says the time, in any form that tells them apart."""
    days = seen.values
    if time.timestamp is not None and seen.kind == "time":
        days = pc.utf8_slice_codeunits(days.cast(pa.string()), 0, len("2024-01-13"))
    elif time.timestamp is not None:
        days = pc.floor(pc.multiply(days.cast(pa.float64()), UNITS_US[time.unit] / 86_400e6))
    return set(pc.unique(days).to_pylist())


def _column(seen: Seen, of_log: bool) -> tuple[Column | None, str]:
    """Return a column as a feature and what is said of it; or None and why it is none."""
    rows = len(seen.values)
    counted = f"{seen.distinct:,} values" + (f", {seen.missing:.0%} missing" if seen.values.null_count else "")
    if seen.kind in ("nothing", "other"):
        return None, "without a value" if seen.kind == "nothing" else f"of the type {seen.values.type}"
    if seen.distinct < 2 and not seen.values.null_count:
        return None, f"the same in every row: {shown(seen.values[0].as_py())}"
    min_count = 3 if seen.distinct > MANY_VALUES else 1
    if seen.kind == "list":
        inner = seen.values.type.value_type
        if pa.types.is_floating(inner):
            lengths = {*pc.unique(pc.list_value_length(seen.values)).drop_null().to_pylist()} - {0}  # none is missing
            if not lengths:
                return None, "lists without a number"
            least, most = min(lengths), max(lengths)
            if least < most or most > MAX_PLACES:
                return None, f"lists of {least:,} to {most:,} numbers, wanted as many in each for a vector"
            return Column(seen.name, "vector", size=most), f"vectors of {most:,} numbers"
        if not (pa.types.is_integer(inner) or pa.types.is_string(inner) or pa.types.is_large_string(inner)):
            return None, f"of the type {seen.values.type}"
        kind: ValueType = "int" if pa.types.is_integer(inner) else "string"
        return Column(seen.name, "multi", kind, min_count=min_count), counted
    # A row's number, or a text of its own, says nothing of another row; but an item of a side table is in many.
    is_own = seen.distinct == rows if seen.kind == "int" or not of_log else seen.distinct > 0.9 * rows
    if is_own and rows > FEW_VALUES and seen.kind in ("int", "text"):
        return None, f"another value in {'every' if seen.distinct == rows else 'nearly every'} row ({counted})"
    is_code = ID.search(seen.name.lower()) is not None
    if seen.kind == "number" or (seen.kind == "int" and seen.distinct > FEW_VALUES and not is_code):
        zeros = pc.sum(pc.equal(seen.values, 0)).as_py() or 0
        mostly_zero = zeros > rows / 2 and seen.distinct > 2
        counted += f", {zeros / rows:.0%} are 0" if mostly_zero else ""
        return Column(seen.name, "dense", encoding="nonzero_buckets" if mostly_zero else "vocabulary"), counted
    if seen.kind in ("time", "date", "day/month"):
        return None, "a date: [[derived]] makes an age of it"
    return Column(seen.name, type="int" if seen.kind == "int" else "string", min_count=min_count), counted
