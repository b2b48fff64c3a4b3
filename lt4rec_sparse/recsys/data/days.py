"""The log, day by day: read once, labels checked while the file is still known, and each row's split noted.

One pass deals the rows to one file per day (`dealt.py`); then each day is freed of duplicates if the schema asks for
it, sorted (`ordered.py`) and written with the columns that the schema needs. Memory is bounded, however long the log or
a day of it is. A log without a time is one day, named "", in the order of the files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lt4rec_sparse.files import read_json, whole_file, write_whole
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data.batches import SPLITS
from lt4rec_sparse.recsys.data.dealt import LZ4, SPLIT, days_of, deal_log
from lt4rec_sparse.recsys.data.ordered import in_chunks, ordered
from lt4rec_sparse.recsys.data.reading import Form, column_names, is_parquet, log_form, read_file
from lt4rec_sparse.recsys.data.source import DataError, Source, raw_types
from lt4rec_sparse.recsys.data.splits import split_counts, split_days

Progress = Callable[[str, int, int], None]  # progress(stage, done, total)


@dataclass(frozen=True)
class DayLog:
    """The log in a temporary folder, one file per day."""

    columns: list[str]
    rows_read: int
    duplicates: int  # rows dropped because they equal an earlier row of the same day
    paths: dict[str, Path]  # by day, ascending: as numbers if all days are numbers, else as text, such as ISO dates
    splits: dict[str, tuple[str, ...]] | None  # the days that have rows of each split, if rows are not split by day

    @property
    def days(self) -> tuple[str, ...]:
        """The days, ascending."""
        return tuple(self.paths)

    def days_of(self, schema: Schema) -> dict[str, tuple[str, ...]]:
        """Return the days of train, validation and test; by rows, those that have some of them."""
        return split_days(self.days, schema.split) if self.splits is None else self.splits

    def later(self, day: str, where: str) -> tuple[str, ...]:
        """Return the days of the log after `day`; errors are those of `earlier`."""
        return tuple(known for known in self.days[self.earlier(day, where) :] if known != day)

    def named(self, text: str, where: str, also: str = "") -> tuple[str, ...]:
        """Return the days that a text names, ascending: days of the log and spans of them, as in "1,3..5".

        `where` begins an error's message, `also` is what else would have been taken.

        Raises:
            DataError: If it names none, a day that the log does not have, or a span that ends before it begins.
        """
        found: set[str] = set()
        for part in (part.strip() for part in text.split(",") if part.strip()):
            first, dots, last = (side.strip() for side in part.partition(".."))
            for day in (first, last) if dots else (first,):
                if day not in self.paths:
                    wanted = f"{also}days of {self.days[0]} to {self.days[-1]}"
                    raise DataError(f"{where}: got {day!r}, wanted {wanted}")
            begin, end = self.days.index(first), self.days.index(last if dots else first)
            if end < begin:
                raise DataError(f"{where}: got {part!r}, wanted the earlier day first")
            found.update(self.days[begin : end + 1])
        if not found:
            raise DataError(f"{where}: got {text!r}, wanted {also}days of {self.days[0]} to {self.days[-1]}")
        return tuple(day for day in self.days if day in found)

    def earlier(self, day: str, where: str) -> int:
        """Return how many days of the log are before `day`, which may be any; `where` begins an error's message.

        Raises:
            DataError: If the day is written in another form than the log's are, and so cannot be compared with them.
        """
        if not _fits(self.paths, day):
            raise _other_form(self.paths, day, where)
        key = int if are_numbers(self.paths) else str
        return sum(key(known) < key(day) for known in self.paths)  # type: ignore[operator]

    def read(self, day: str) -> Iterator[Any]:
        """Yield the rows of a day, in order, as record batches."""
        with pa.OSFile(str(self.paths[day])) as file:  # a map would count as memory of the process
            yield from pa.ipc.open_stream(file)


def _log_columns(source: Source) -> list[str]:
    """Return the columns of the log, in which its files agree and none is absent that must be there."""
    schema, first = source.schema, source.log[0]
    form = log_form(schema)
    names = column_names(first, form)
    for path in source.log[1:]:
        differing = set(names) ^ set(column_names(path, form))
        if differing:
            raise DataError(
                f"{path}: column {min(differing)!r} is in one of this and {first.name}, wanted the same columns"
            )
    roles = {"time": schema.moment, "order": schema.order, "split": schema.split.column}
    roles["group"] = None if schema.group is None else schema.group.column
    for task in schema.tasks:
        roles |= {f"label of {task.name}": task.label, f"weight of {task.name}": task.weight}
        roles |= {f"row filter {row!r} of {task.name}": row for row in task.rows}
    roles |= {f"history {history.name}": history.when for history in schema.histories}
    roles |= {f"join {join.files[0]}": join.on for join in schema.joins}
    wanted = {role: name for role, name in roles.items() if name is not None}
    for role, name in wanted.items():
        if name not in names:
            hint = _header_hint(first, form, names) if not set(names) & set(wanted.values()) else ""
            raise DataError(f"{first}: column {name!r} is absent, wanted it in the log ({role}){hint}")
    return names


def _header_hint(path: Path, form: Form, names: list[str]) -> str:
    if is_parquet(path) or form.names:
        return ""
    return f"; its first line is {', '.join(names)[:80]}: if that is no header, wanted names = [...] in [files]"


def partition(
    source: Source,
    folder: Path,
    batch_rows: int,
    progress: Progress,
    keep: Collection[str] = (),
    resumed: bool = False,
) -> DayLog:
    """Read the log once and write it to `folder`, for temporary files, by day and in order.

    `DayLog.read` yields record batches of `batch_rows`, of the columns that the schema needs and those in `keep`.
    Progress is reported after every file read and day sorted. If it is `resumed`, what an earlier call for the same
    source with the same arguments left in `folder` is not done again.

    Raises:
        DataError: If a file, a type, a label or a day contradicts the schema, or the log has no such column to keep.
    """
    types, names = raw_types(source.schema), _log_columns(source)
    schema = source.schema
    absent = next((name for name in keep if name not in names), None)
    if absent is not None:
        raise DataError(f"{source.log[0]}: column {absent!r} is absent, wanted one of {', '.join(names)}")
    dealt = deal_log(source, folder, types, names, progress, resumed)
    if not dealt:
        raise DataError(f"{source.log[0]}: got no row, wanted a log")
    _check_order(source.log[0], schema, dealt)
    days = sorted(dealt, key=int if are_numbers(dealt) else str)
    by_rows = schema.split_by != "day"
    needed = [name for name in names if name in types or name in keep] + [SPLIT] * by_rows
    paths = {day: folder / f"day-{index}.arrow" for index, day in enumerate(days)}
    split: dict[str, tuple[str, ...]] = dict.fromkeys(SPLITS, ())
    kept = 0
    for index, day in enumerate(days):
        counted = paths[day].with_suffix(".json")
        if not (resumed and counted.exists()):
            tables = ordered(dealt[day], schema, names, folder / f"day-{index}")
            counts = _write_day(paths[day], in_chunks((table.select(needed) for table in tables), batch_rows))
            write_whole(counted, json.dumps(counts))
        dealt[day].remove()
        counts = read_json(counted)
        kept += counts["rows"]
        split = {name: (*held, day) if counts.get(name) else held for name, held in split.items()}
        progress("order days", index + 1, len(days))
    rows_read = sum(rows.rows for rows in dealt.values())
    if schema.duplicates == "drop":
        progress("duplicates dropped", rows_read - kept, rows_read)
    return DayLog(names, rows_read, rows_read - kept, paths, split if by_rows else None)


def _write_day(path: Path, tables: Iterator[Any]) -> dict[str, int]:
    """Write the rows of a day and return how many they are, of all splits and of each, if rows are not split by day."""
    counts: Counter[str] = Counter()
    with whole_file(path) as temporary, ExitStack() as stack:
        writer = None
        for table in tables:
            if writer is None:
                file = stack.enter_context(pa.OSFile(str(temporary), "wb"))
                writer = stack.enter_context(pa.ipc.new_stream(file, table.schema, options=LZ4))
            writer.write_table(table)
            counts["rows"] += table.num_rows
            if SPLIT in table.column_names:
                counts.update(split_counts(table[SPLIT].to_numpy()))
    return dict(counts)


def check_days(source: Source, days: Collection[str], where: str) -> None:
    """Refuse a day in another form than the log's days have; `where` begins the message.

    The log is read until its days have the forms of all: its first rows, unless one is refused.

    Raises:
        DataError: If one cannot be compared with the log's, the log has no row, or its columns contradict the schema.
    """
    _log_columns(source)
    schema, types = source.schema, raw_types(source.schema)
    assert schema.time is not None and schema.moment is not None  # nobody asks for a day of a log without
    known: dict[str, None] = {}
    for path in source.log:
        for batch in read_file(path, types, [schema.moment], log_form(schema)):
            known |= dict.fromkeys(days_of(path, batch, schema.time).unique().to_pylist())
            if known and all(_fits(known, day) for day in days):
                return
    if not known:
        raise DataError(f"{source.log[0]}: got no row, wanted a log")
    raise _other_form(known, next(day for day in days if not _fits(known, day)), where)


def _fits(known: Collection[str], day: str) -> bool:
    """Return whether a day is in a form of known ones, and so can be compared with them."""
    forms = {_form(other) for other in known}
    # Numbers that all have eight digits are dates, or might be; others count days.
    return are_numbers([day]) if are_numbers(known) and forms != {"00000000"} else _form(day) in forms


def _other_form(known: Iterable[str], day: str, where: str) -> DataError:
    wanted = f"one in the form of the log's days, such as {[*known][-1]}"
    return DataError(f"{where}: got day {day!r}, wanted {wanted}")


def are_numbers(days: Iterable[str]) -> bool:
    """Return whether days are whole numbers, which are ordered as such."""
    return all(day.removeprefix("-").isdecimal() for day in days)


def _check_order(path: Path, schema: Schema, days: Collection[str]) -> None:
    """Refuse days whose order as text is not that of time: 25/04/2022, or 2022-4-9 beside 2022-4-10."""
    for day in days:
        parts = re.fullmatch(r"(\d+)[/.-](\d+)[/.-](\d+)", day)
        if parts is not None and (len(parts[1]) < 4 or {len(parts[2]), len(parts[3])} != {2}):
            shape = "%Y-%m-%d" if len(parts[1]) == 4 else "%d/%m/%Y"
            got = f"{path}: column {schema.moment!r}: got day {day!r}, which does not sort as text"
            raise DataError(f"{got}, wanted its format in [time], such as {shape!r}")


def _form(day: str) -> str:
    """Return a day with its digits as zeros."""
    return re.sub(r"\d", "0", day)
