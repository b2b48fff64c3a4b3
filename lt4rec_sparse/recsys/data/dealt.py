"""Rows of a log dealt to the days that they are of, one file of the log after another, and checked on the way.

Each file of the log leaves a folder, whole or absent: `days.json`, and one Arrow stream per day. Memory holds a batch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lt4rec_sparse.files import read_json, whole_folder
from lt4rec_sparse.ranker.features import Schema, Time
from lt4rec_sparse.recsys.data.labels import stray_label
from lt4rec_sparse.recsys.data.reading import log_form, read_file
from lt4rec_sparse.recsys.data.source import DataError, RawType, Source
from lt4rec_sparse.recsys.data.splits import RowSplits

SPLIT = "__split__"
DAYS_FILE = "days.json"
# Each day keeps a file open while rows are dealt, and a process may usually open 1,024.
MAX_DAYS = 900
MAX_WEIGHT = float(np.finfo(np.float32).max)
LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")


class Dealt(NamedTuple):
    """Rows on disk, in order: Arrow streams of one schema."""

    paths: tuple[Path, ...]
    rows: int
    nbytes: int  # once they are read

    def read(self, names: Sequence[str] | None = None) -> Iterator[Any]:
        """Yield record batches, of all columns or of some.

        A mapped file would count as memory of the process as soon as it is read.
        """
        for path in self.paths:
            with pa.OSFile(str(path)) as file:
                reader = pa.ipc.open_stream(file)
                if names is not None:
                    fields = [reader.schema.get_field_index(name) for name in names]
                    file.seek(0)
                    reader = pa.ipc.open_stream(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
                yield from reader

    def remove(self) -> None:
        """Remove the files."""
        for path in self.paths:
            path.unlink(missing_ok=True)


class Dealing:
    """Writes rows to one file per key, `<number>.arrow` in the order of first use; a context.

    Args:
        folder: For the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self._writers: dict[Any, Any] = {}
        self._sizes: dict[Any, list[int]] = {}

    def __enter__(self) -> Dealing:
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def __len__(self) -> int:
        """Keys so far."""
        return len(self._sizes)

    def write(self, key: Any, batch: Any) -> None:
        """Append a record batch to the rows of a key."""
        if key not in self._writers:
            file = self._stack.enter_context(pa.OSFile(str(self._path(len(self._sizes))), "wb"))
            self._writers[key] = self._stack.enter_context(pa.ipc.new_stream(file, batch.schema, options=LZ4))
            self._sizes[key] = [0, 0]
        self._writers[key].write_batch(batch)
        self._sizes[key][0] += batch.num_rows
        self._sizes[key][1] += batch.nbytes

    def dealt(self) -> dict[Any, Dealt]:
        """Return the rows of every key."""
        sizes = enumerate(self._sizes.items())
        return {key: Dealt((self._path(place),), *size) for place, (key, size) in sizes}

    def _path(self, place: int) -> Path:
        return self._folder / f"{place}.arrow"


def deal_log(
    source: Source,
    folder: Path,
    types: Mapping[str, RawType],
    names: Sequence[str],
    progress: Callable[[str, int, int], None],
    resumed: bool = False,
) -> dict[str, Dealt]:
    """Deal the named columns of a log to its days; return the rows of every day, in the order of the files.

    Args:
        source: The log.
        folder: For `dealt-<number>`, one folder per file of the log.
        types: The types of columns; see `read_file`.
        names: The columns of the log to read. `__split__` is added where rows are not split by day.
        progress: Called with stage, done and total.
        resumed: Whether to keep what an earlier call with the same arguments left in the folder.

    Raises:
        DataError: If a file, a type, a label or a day contradicts the schema.
    """
    splits = None if source.schema.split_by == "day" else RowSplits(source)
    layout = None
    days: dict[str, list[Dealt]] = {}
    for place, path in enumerate(source.log):
        target = folder / f"dealt-{place:05}"
        if not (resumed and (target / DAYS_FILE).is_file()):
            with whole_folder(target) as fresh:
                _deal_file(path, source.schema, fresh, types, names, splits, layout)
        elif splits is not None:
            splits.skip(read_json(target / DAYS_FILE)["rows"])
        of_file = read_json(target / DAYS_FILE)
        for index, (day, size) in enumerate(of_file["days"].items()):
            found = target / f"{index}.arrow"
            days.setdefault(day, []).append(Dealt((found,), *size))
            if len(days) > MAX_DAYS:
                raise DataError(f"{path}: got more than {MAX_DAYS} days, wanted a column of days")
        if layout is None and of_file["layout"] is not None:
            layout = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(of_file["layout"])))
        progress("read log", place + 1, len(source.log))
    return {
        day: Dealt(
            tuple(path for part in parts for path in part.paths),
            sum(part.rows for part in parts),
            sum(part.nbytes for part in parts),
        )
        for day, parts in days.items()
    }


def _deal_file(
    path: Path,
    schema: Schema,
    folder: Path,
    types: Mapping[str, RawType],
    names: Sequence[str],
    splits: RowSplits | None,
    layout: Any,
) -> None:
    rows = 0
    with Dealing(folder) as dealing:
        for batch in read_file(path, types, names, log_form(schema)):
            _check(path, batch, schema)
            if splits is not None:
                batch = batch.append_column(SPLIT, pa.array(splits.of(path, batch)))
            layout = layout or batch.schema
            for day, part in _by_day(path, batch, schema.time) if schema.time else [("", batch)]:
                dealing.write(day, _alike(path, part, layout))
                if len(dealing) > MAX_DAYS:
                    raise DataError(f"{path}: got more than {MAX_DAYS} days, wanted a column of days")
            rows += batch.num_rows
    content = {
        "rows": rows,
        "days": {day: [part.rows, part.nbytes] for day, part in dealing.dealt().items()},
        "layout": None if layout is None else layout.serialize().to_pybytes().hex(),
    }
    (folder / DAYS_FILE).write_text(json.dumps(content), encoding="utf-8")


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


def _by_day(path: Path, batch: Any, time: Time) -> Iterator[tuple[str, Any]]:
    """Cut a batch into its days; rows keep their order."""
    coded = days_of(path, batch, time).dictionary_encode()
    codes = coded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(coded.dictionary)))
    ordered = batch.take(pa.array(order))
    for day, begin, end in zip(coded.dictionary.to_pylist(), [0, *ends], ends, strict=False):
        yield day, ordered.slice(begin, end - begin)


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
