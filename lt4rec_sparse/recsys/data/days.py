"""The log, day by day: read once, labels checked while the file is still known, and each row's split noted.

One pass distributes the rows to one file per day; then each day is freed of duplicates if the schema asks for it,
sorted and written with the columns that the schema needs. Memory is bounded by one day of the log, however long the log
is. A log without a time is one day, named "", in the order of the files, and streamed but for dropping duplicates.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lt4rec_sparse.ranker.features import Schema, Time
from lt4rec_sparse.recsys.data.batches import SPLITS
from lt4rec_sparse.recsys.data.casts import is_list
from lt4rec_sparse.recsys.data.labels import stray_label
from lt4rec_sparse.recsys.data.reading import Form, column_names, is_parquet, log_form, read_file
from lt4rec_sparse.recsys.data.source import DataError, RawType, Source, raw_types
from lt4rec_sparse.recsys.data.splits import RowSplits, split_counts, split_days

Progress = Callable[[str, int, int], None]  # progress(stage, done, total)

POSITION, SPLIT = "__position__", "__split__"
# Each day keeps a file open while rows are distributed, and a process may usually open 1,024.
MAX_DAYS = 900
MAX_WEIGHT = float(np.finfo(np.float32).max)


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
        with pa.memory_map(str(self.paths[day])) as file:
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


def partition(source: Source, folder: Path, batch_rows: int, progress: Progress, keep: Collection[str] = ()) -> DayLog:
    """Read the log once and write it to `folder`, for temporary files, by day and in order.

    `DayLog.read` yields record batches of `batch_rows`, of the columns that the schema needs and those in `keep`.
    Progress is reported after every file read and day sorted.

    Raises:
        DataError: If a file, a type, a label or a day contradicts the schema, or the log has no such column to keep.
    """
    types, names = raw_types(source.schema), _log_columns(source)
    schema = source.schema
    absent = next((name for name in keep if name not in names), None)
    if absent is not None:
        raise DataError(f"{source.log[0]}: column {absent!r} is absent, wanted one of {', '.join(names)}")
    dealt, rows_read = _deal(source, folder, types, names, progress)
    if not dealt:
        raise DataError(f"{source.log[0]}: got no row, wanted a log")
    _check_order(source.log[0], schema, dealt)
    days = sorted(dealt, key=int if are_numbers(dealt) else str)
    by_rows = schema.split_by != "day"
    needed = [name for name in names if name in types or name in keep] + [SPLIT] * by_rows
    paths: dict[str, Path] = {}
    split: dict[str, tuple[str, ...]] = dict.fromkeys(SPLITS, ())
    kept = 0
    for index, day in enumerate(days):
        paths[day] = folder / f"day-{index}.arrow"
        counts: Counter[str] = Counter()
        with pa.memory_map(str(dealt[day])) as dealt_file, ExitStack() as stack:
            reader, writer = pa.ipc.open_stream(dealt_file), None
            for table in _ordered(reader, schema, names, needed, batch_rows):
                if writer is None:
                    file = stack.enter_context(pa.OSFile(str(paths[day]), "wb"))
                    writer = stack.enter_context(pa.ipc.new_stream(file, table.schema))
                writer.write_table(table, max_chunksize=batch_rows)
                kept += table.num_rows
                if by_rows:
                    counts.update(split_counts(table[SPLIT].to_numpy()))
        split = {name: (*held, day) if counts[name] else held for name, held in split.items()}
        dealt[day].unlink()
        progress("order days", index + 1, len(days))
    if schema.duplicates == "drop":
        progress("duplicates dropped", rows_read - kept, rows_read)
    return DayLog(names, rows_read, rows_read - kept, paths, split if by_rows else None)


def _ordered(reader: Any, schema: Schema, names: list[str], needed: list[str], batch_rows: int) -> Iterator[Any]:
    """Yield the rows of a day as tables: at once if they are sorted or compared, else some batches at a time."""
    order = schema.order
    if order is None and schema.duplicates == "keep":
        held: list[Any] = []
        for batch in reader:
            held.append(batch.select(needed))
            if sum(part.num_rows for part in held) >= batch_rows:
                table = pa.Table.from_batches(held)
                whole = table.num_rows - table.num_rows % batch_rows
                yield table.slice(0, whole).combine_chunks()
                held = table.slice(whole).combine_chunks().to_batches()
        if held:
            yield pa.Table.from_batches(held).combine_chunks()
        return
    table = reader.read_all()
    if schema.duplicates == "drop":
        table = _distinct(table, names)
    if order is not None:  # stable: rows at the same moment keep the order of the files
        table = table.take(np.argsort(table[order].to_numpy(), kind="stable"))
    yield table.select(needed)


def _deal(
    source: Source, folder: Path, types: Mapping[str, RawType], names: list[str], progress: Progress
) -> tuple[dict[str, Path], int]:
    paths: dict[str, Path] = {}
    writers: dict[str, Any] = {}
    layout, rows = None, 0
    splits = None if source.schema.split_by == "day" else RowSplits(source)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with ExitStack() as stack:
        for done, path in enumerate(source.log):
            for batch in read_file(path, types, names, log_form(source.schema)):
                _check(path, batch, source.schema)
                if splits is not None:
                    batch = batch.append_column(SPLIT, pa.array(splits.of(path, batch)))
                layout = layout or batch.schema
                for day, part in _by_day(path, batch, source.schema.time) if source.schema.time else [("", batch)]:
                    if day not in writers:
                        paths[day] = folder / f"dealt-{len(paths)}.arrow"
                        if len(paths) > MAX_DAYS:
                            raise DataError(f"{path}: got more than {MAX_DAYS} days, wanted a column of days")
                        file = stack.enter_context(pa.OSFile(str(paths[day]), "wb"))
                        writers[day] = stack.enter_context(pa.ipc.new_stream(file, layout, options=options))
                    writers[day].write_batch(_alike(path, part, layout))
                rows += batch.num_rows
            progress("read log", done + 1, len(source.log))
    return paths, rows


def _alike(path: Path, batch: Any, layout: Any) -> Any:
    """Return a batch in the types of the first one: files may differ in the types of columns that the schema omits."""
    columns = []
    for field in layout:
        column = batch[field.name]
        try:
            columns.append(column.cast(field.type))
        except pa.ArrowException as error:
            wanted = f"{field.type} as in the log's first file"
            raise DataError(f"{path}: column {field.name!r}: got {column.type}, wanted {wanted}") from error
    return pa.RecordBatch.from_arrays(columns, schema=layout)


def days_of(path: Path, batch: Any, time: Time) -> Any:
    """Return the day of every row of a batch as text, from the column that says it.

    Raises:
        DataError: If one is missing.
    """
    column = time.day or time.timestamp or ""
    days = batch[column]
    if days.null_count:
        raise DataError(f"{path}: column {column!r}: got a missing day, wanted one in every row")
    if time.timestamp is None:
        return days
    return _local(days, time).cast(pa.date32(), safe=False).cast(pa.string())


def _local(moments: Any, time: Time) -> Any:
    """Return moments of UTC as they are in the schema's zone."""
    zone = time.zone
    offset = re.fullmatch(r"([+-])(\d\d):?(\d\d)", zone or "")
    if offset is not None:
        shift = timedelta(hours=int(offset[2]), minutes=int(offset[3]))
        return pc.add(moments, pa.scalar(shift if offset[1] == "+" else -shift))
    if zone is None:
        return pc.add(moments, pa.scalar(timedelta(hours=time.utc_offset_hours)))
    try:
        return pc.local_timestamp(moments.cast(pa.timestamp("us", zone)))
    except pa.ArrowInvalid as error:
        got = f"time: got zone={zone!r}"
        raise DataError(f"{got}, wanted a name such as Asia/Shanghai, or an offset such as +05:30") from error


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


def _by_day(path: Path, batch: Any, time: Time) -> Iterator[tuple[str, Any]]:
    """Cut a batch into its days; rows keep their order."""
    coded = days_of(path, batch, time).dictionary_encode()
    codes = coded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(coded.dictionary)))
    ordered = batch.take(pa.array(order))
    for day, begin, end in zip(coded.dictionary.to_pylist(), [0, *ends], ends, strict=False):
        yield day, ordered.slice(begin, end - begin)


def _distinct(table: Any, names: list[str]) -> Any:
    """Return the rows of a day without those that equal an earlier one in every column."""
    keys = table.append_column(POSITION, pa.array(np.arange(table.num_rows)))
    for place, name in enumerate(names):
        if is_list(table[name].type):  # Arrow does not group by lists: they become text
            text = pc.binary_join(table[name].cast(pa.list_(pa.string())), "\x1f")
            keys = keys.set_column(place, name, text)
    first = keys.group_by(names).aggregate([(POSITION, "min")])[f"{POSITION}_min"]
    return table.take(first.take(pc.sort_indices(first)))


def _check(path: Path, batch: Any, schema: Schema) -> None:
    """Refuse labels out of range, weights that are negative or no float32, and rows without a group.

    A missing label is no error: its row does not belong to the task. With `divide_by` no value is an error.
    """
    if schema.group is not None and batch[schema.group.column].null_count:
        raise DataError(f"{path}: column {schema.group.column!r}: got a missing value, wanted the group of every row")
    for task in schema.tasks:
        label = batch[task.label]
        if task.positive:
            stray = stray_label(task, label)
            if stray is not None:
                wanted = f"one of {', '.join((*task.positive, *task.negative))} for task {task.name!r}"
                raise DataError(f"{path}: column {task.label!r}: got {stray!r}, wanted {wanted}")
        elif task.kind == "binary":
            fine, wanted = pc.or_(pc.equal(label, 0), pc.equal(label, 1)), "0 or 1"
        else:
            fine, wanted = pc.and_(pc.greater_equal(label, 0), pc.less_equal(label, 1)), "a ratio in [0, 1]"
        if task.divide_by is None and not task.positive:
            _refuse_first(path, task.label, label, fine, f"{wanted} for task {task.name!r}")
        if task.weight is not None:
            weight = batch[task.weight]
            fine = pc.and_(pc.greater_equal(weight, 0), pc.less_equal(weight, MAX_WEIGHT))
            _refuse_first(path, task.weight, weight, fine, f"a finite weight of at least 0 for task {task.name!r}")


def _refuse_first(path: Path, name: str, values: Any, fine: Any, wanted: str) -> None:
    wrong = values.filter(pc.invert(fine))  # a missing value compares as missing, and is dropped
    if len(wrong):
        raise DataError(f"{path}: column {name!r}: got {wrong[0].as_py()}, wanted {wanted}")
