"""From a click log to a prepared folder: `prepare` once, then train for any number of epochs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lt4rec_sparse.errors import shown
from lt4rec_sparse.files import read_json, write_whole
from lt4rec_sparse.ranker.features import EncodedFeatures, FeatureEncoder, Schema, Split
from lt4rec_sparse.ranker.features.records import from_plain
from lt4rec_sparse.recsys.data.batches import CACHE_BYTES, BatchStream
from lt4rec_sparse.recsys.data.days import log_columns, partition
from lt4rec_sparse.recsys.data.folders import whole_folder
from lt4rec_sparse.recsys.data.layout import (
    DAY,
    FEATURE,
    GROUP,
    LABEL,
    MEMBER,
    PREPARED,
    SLICE,
    SPLITS,
    VALUE,
    WEIGHT,
    load_encoder,
    save_encoder,
)
from lt4rec_sparse.recsys.data.progress import Progress, silent
from lt4rec_sparse.recsys.data.rows import RowReader, Rows
from lt4rec_sparse.recsys.data.source import DataError, FileState, Source, open_source

# To be raised when the layout or the contents change: older prepared folders are then stale.
VERSION = 2
ROW_GROUP_ROWS = 65_536


@dataclass(frozen=True)
class Prepared:
    """A prepared folder.

    Attributes:
        folder: Its path.
        encoder: Fitted on the training days.
        counts: `rows_read`, `duplicates`, and per split `days`, `rows` and per task `rows` and `label_mean`.
    """

    folder: Path
    encoder: FeatureEncoder
    counts: dict[str, Any]

    @property
    def schema(self) -> Schema:
        """The schema of the log."""
        return self.encoder.schema

    @classmethod
    def load(cls, folder: Path) -> Prepared:
        """Open what `prepare` wrote.

        Raises:
            DataError: If the folder was not prepared by this version, or a file in it is damaged.
        """
        content = _content(folder)
        if content.get("version") != VERSION:
            raise DataError(f"{folder}: got {PREPARED} of version {content.get('version')}, wanted {VERSION}")
        return cls(folder, load_encoder(folder), content["counts"])

    def stream(
        self, split: str, batch_size: int, seed: int = 0, shuffle: bool = True, cache_bytes: int = CACHE_BYTES
    ) -> BatchStream:
        """Return the batches of `train`, `validation` or `test`; see `BatchStream`.

        Raises:
            DataError: If the split has lost files or gained some.
        """
        stream = BatchStream(self.folder, split, batch_size, seed, shuffle, cache_bytes)
        if stream.rows != self.counts[split]["rows"]:
            got = f"{stream.rows} rows in {split}"
            raise DataError(f"{self.folder}: got {got}, wanted {self.counts[split]['rows']} as in {PREPARED}")
        return stream


def prepare(
    source_folder: Path,
    out: Path,
    schema: Schema | None = None,
    progress: Progress = silent,
    row_group_rows: int = ROW_GROUP_ROWS,
    replace: bool = True,
) -> Prepared:
    """Read a click log, join, split by day, fit the encoder on the training days and write encoded Parquet.

    The log is streamed: memory holds one day of it, the side tables, the vocabularies and the histories. `out` appears
    completely or not at all; if it was prepared from the same files with the same schema, it is opened unchanged. Files
    are the same if their bytes are; files whose size and modification time have not changed are not read again.

    Args:
        source_folder: A folder of CSV or Parquet files.
        out: The prepared folder.
        schema: See `open_source`.
        progress: Called as `progress(stage, done, total)`.
        row_group_rows: Rows that are read and shuffled together.
        replace: Whether `out` is replaced if its source, the schema or the layout has changed since.

    Raises:
        DataError: If the data is not what the schema says, a split is empty or has no row of a task, or `out` holds
            something else or must not be replaced.
        SchemaError: If the schema contradicts itself.
    """
    source = open_source(source_folder, schema)
    fingerprint = source.fingerprint(VERSION, row_group_rows)
    if _is_current(out, source, fingerprint):
        return Prepared.load(out)
    if not replace and (out / PREPARED).is_file():
        changed = f"got data of other files, contents, schema or version than {source_folder} has now"
        raise DataError(f"{out}: {changed}, wanted the same")
    with whole_folder(out, PREPARED) as folder:
        # Before the log is read, so that a file that changes meanwhile is noticed next time.
        states = source.states()
        scratch = folder / "scratch"
        scratch.mkdir()
        log = partition(source, scratch, row_group_rows, progress)
        splits = split_days(log.days, source.schema.split)
        reader = RowReader(source, log, log_columns(source))
        train = reader.read(frozenset(splits["train"]))
        encoder = FeatureEncoder.fit(
            source.schema, (rows.features for rows in _reported(train, "fit", splits, progress))
        )
        counts = {name: _Counts(source.schema, days) for name, days in splits.items()}
        split_of = {day: name for name, days in splits.items() for day in days}
        _write(
            folder, encoder, _reported(reader.read(frozenset(split_of)), "encode", splits, progress), split_of, counts
        )
        content = {
            "version": VERSION,
            "fingerprint": fingerprint,
            "files": _plain(states),
            "counts": {
                "rows_read": log.rows_read,
                "duplicates": log.duplicates,
                **{name: count.checked(f"{source_folder}: split {name!r}") for name, count in counts.items()},
            },
        }
        save_encoder(encoder, folder)
        shutil.rmtree(scratch)
        (folder / PREPARED).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return Prepared.load(out)


def split_days(days: tuple[str, ...], split: Split) -> dict[str, tuple[str, ...]]:
    """Return the days of train, validation and test.

    Raises:
        DataError: If there are too few days, or a listed day is not in the log.
    """
    if split.train:
        listed = dict(zip(SPLITS, (split.train, split.validation, split.test), strict=True))
        for name, wanted in listed.items():
            for day in wanted:
                if day not in days:
                    raise DataError(f"split {name!r}: got day {day!r}, wanted one of {', '.join(days)}")
        return listed
    held_out = split.validation_days + split.test_days
    if len(days) <= held_out:
        got = f"{len(days)} days ({', '.join(days)})"
        parts = f"{split.validation_days} to validate, {split.test_days} to test, at least 1 to train on"
        raise DataError(f"split: got {got}, wanted more than {held_out}: {parts}")
    train, test = len(days) - held_out, len(days) - split.test_days
    return {"train": days[:train], "validation": days[train:test], "test": days[test:]}


class _Counts:
    """The contents of a split, counted while it is written."""

    def __init__(self, schema: Schema, days: tuple[str, ...]) -> None:
        self._days, self._rows = days, 0
        self._tasks = {task.name: (0, 0.0) for task in schema.tasks}

    def add(self, rows: Rows) -> None:
        self._rows += len(rows.groups)
        for name, task in rows.tasks.items():
            members, total = self._tasks[name]
            # Labels are 0 outside the task, so their sum needs no mask.
            self._tasks[name] = (members + int(task.member.sum()), total + float(task.label.sum(dtype=np.float64)))

    def checked(self, where: str) -> dict[str, Any]:
        """Return the counts as data for JSON.

        Raises:
            DataError: If a task has no row.
        """
        for name, (members, _) in self._tasks.items():
            if not members:
                raise DataError(f"{where}: got {self._rows} rows and none of task {name!r}, wanted some of every task")
        tasks = {name: {"rows": rows, "label_mean": total / rows} for name, (rows, total) in self._tasks.items()}
        return {"days": list(self._days), "rows": self._rows, "tasks": tasks}


def _write(
    folder: Path, encoder: FeatureEncoder, stream: Iterator[Rows], split_of: dict[str, str], counts: dict[str, _Counts]
) -> None:
    writer: Any = None
    written: str | None = None
    parts = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        (folder / split).mkdir()
    try:
        for rows in stream:
            split = split_of[rows.day]
            table = _table(encoder, rows)
            if rows.day != written:
                if writer is not None:
                    writer.close()
                path = folder / split / f"part-{parts[split]:05}.parquet"
                writer = pq.ParquetWriter(path, table.schema, compression="zstd")
                written, parts[split] = rows.day, parts[split] + 1
            writer.write_table(table)
            counts[split].add(rows)
    finally:
        if writer is not None:
            writer.close()


def _table(encoder: FeatureEncoder, rows: Rows) -> Any:
    """Return encoded rows in the columns of `data.layout`."""
    encoded = encoder.encode(rows.features)
    columns: dict[str, Any] = _feature_columns(encoder, encoded)
    for name, task in rows.tasks.items():
        columns |= {LABEL + name: task.label, MEMBER + name: task.member, WEIGHT + name: task.weight}
    columns[GROUP] = rows.groups
    columns |= {SLICE + name: rows_in for name, rows_in in rows.slices.items()}
    columns |= {VALUE + name: values for name, values in rows.values.items()}
    columns[DAY] = pa.repeat(rows.day, len(rows.groups))
    return pa.table(columns)


def _feature_columns(encoder: FeatureEncoder, encoded: EncodedFeatures) -> dict[str, Any]:
    single = encoded.single.numpy().astype(np.int32)
    values, offsets = encoded.multi_values.numpy().astype(np.int32), encoded.multi_offsets.numpy()
    columns: dict[str, Any] = {}
    for place, field in enumerate(encoder.fields):
        if field.multi:
            bag = (place - single.shape[1]) * encoded.batch
            cuts = offsets[bag : bag + encoded.batch + 1]
            ends = pa.array(cuts - cuts[0], pa.int32())
            columns[FEATURE + field.column] = pa.ListArray.from_arrays(ends, pa.array(values[cuts[0] : cuts[-1]]))
        else:
            columns[FEATURE + field.column] = np.ascontiguousarray(single[:, place])
    return columns


def _reported(
    stream: Iterator[Rows], stage: str, splits: dict[str, tuple[str, ...]], progress: Progress
) -> Iterator[Rows]:
    """Pass rows on and report the progress by days."""
    total = len(splits["train"]) if stage == "fit" else sum(map(len, splits.values()))
    seen: set[str] = set()
    for rows in stream:
        yield rows
        if rows.day not in seen:
            seen.add(rows.day)
            progress(stage, len(seen), total)


def _is_current(out: Path, source: Source, fingerprint: str) -> bool:
    """Return whether `out` holds what `prepare` would write; note there the new times of unchanged files."""
    content = _content(out)
    if content.get("fingerprint") != fingerprint:
        return False
    known = {name: _state(out / PREPARED, name, state) for name, state in content["files"].items()}
    states = source.states(known)
    if _digests(states) != _digests(known):
        return False
    if states != known:
        with suppress(OSError):  # a folder that cannot be written to is current too; its files are read again next time
            write_whole(out / PREPARED, json.dumps(content | {"files": _plain(states)}, indent=1))
    return True


def _state(path: Path, name: str, plain: Any) -> FileState:
    state: FileState = from_plain(plain, FileState, f"{path}: {name}")
    return state


def _digests(states: Mapping[str, FileState]) -> dict[str, str]:
    return {name: state.digest for name, state in states.items()}


def _plain(states: Mapping[str, FileState]) -> dict[str, dict[str, Any]]:
    return {name: asdict(state) for name, state in states.items()}


def _content(folder: Path) -> dict[str, Any]:
    """Return `prepared.json`, or nothing if there is none.

    Raises:
        InputError: If the file is damaged; the message begins with its path.
    """
    path = folder / PREPARED
    if not path.is_file():
        return {}
    content = read_json(path)
    for name, kind in {"version": int, "fingerprint": str, "files": dict, "counts": dict}.items():
        if not isinstance(content.get(name), kind):
            raise DataError(f"{path}: {name}: got {shown(content.get(name))}, wanted a {kind.__name__}")
    return content
