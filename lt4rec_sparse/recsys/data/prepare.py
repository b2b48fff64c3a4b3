"""From a click log to a prepared folder: `prepare` once, then train for any number of epochs.

```text
prepared.json                 fingerprint, states of the source's files, counts, days of each split
encoder.safetensors           the fitted tables; format and schema as JSON in its metadata
<split>/part-<number>.parquet one file per day of the split, in order; split is train, validation or test
```

Columns of a part: `feature.<field>` (int32, or list of int32); `numbers` (fixed-size list of float32: the inputs of all
raw numbers and vectors, one after another) if the log has any; and for every task `label.<task>` (float32),
`member.<task>` (bool: the row belongs to the task), `weight.<task>` (float32); `group` (int64) if the log has one;
`slice.<name>` (bool);
`value.<column>` (float64, NaN where missing) for every carried column; `day` (string).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lt4rec_sparse.errors import shown
from lt4rec_sparse.files import check_regular, parse_json, read_json, whole_file, write_whole
from lt4rec_sparse.ranker.features import FeatureEncoder, Schema
from lt4rec_sparse.recsys.data.batches import DAY, FEATURE, LABEL, MEMBER, NUMBERS, SPLITS, BatchStream, damaged
from lt4rec_sparse.recsys.data.days import DayLog, Progress, partition
from lt4rec_sparse.recsys.data.remote import local_data
from lt4rec_sparse.recsys.data.rows import RowReader, Rows
from lt4rec_sparse.recsys.data.source import DataError, Source, open_source, prepared_folder
from lt4rec_sparse.recsys.data.splits import described

PREPARED, ENCODER = "prepared.json", "encoder.safetensors"
# In the folder's `scratch/` while it is unfinished: what it is made of, and the days that are encoded.
BEGUN, ENCODED = "begun.json", "encoded.json"
# To be raised when the layout or the contents change: older prepared folders are then stale.
VERSION = 2
ROW_GROUP_ROWS = 65_536


def state_of(folder: Path) -> tuple[int, ...]:
    """Return what tells a prepared folder from one that takes its place later; nothing where there is none."""
    path = folder / PREPARED
    if not path.is_file():
        return ()
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, with the encoder as fitted on the training days.

    `counts` are `rows_read`, `duplicates` dropped, and per split `days`, `rows` and per task `rows` and `label_mean`;
    `split_by` says in words how rows were split if it was not by day.
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

    def stream(self, split: str, batch_size: int, seed: int = 0, shuffle: bool = True) -> BatchStream:
        """Return the batches of `train`, `validation` or `test`; see `BatchStream`.

        Raises:
            DataError: If the split has lost files or gained some.
        """
        stream = BatchStream(self.folder, split, batch_size, seed, shuffle)
        if stream.rows != self.counts[split]["rows"]:
            got = f"{stream.rows} rows in {split}"
            raise DataError(f"{self.folder}: got {got}, wanted {self.counts[split]['rows']} as in {PREPARED}")
        return stream


def prepare(
    source_folder: Path | str,
    out: Path,
    schema: Schema | None = None,
    progress: Progress = lambda stage, done, total: None,
    row_group_rows: int = ROW_GROUP_ROWS,
    replace: bool = True,
) -> Prepared:
    """Read a click log, join, split, fit the encoder on the training rows and write encoded Parquet.

    The log is streamed: memory holds the side tables, the known values of the vocabularies and the histories, and a
    bounded part of the rows. `out` appears completely or not at all; if it was prepared from the same files with the
    same schema, it is opened unchanged. Files are the same if their bytes are; files whose size and modification time
    have not changed are not read again. If the process is killed, the next one goes on after the last file read, day
    ordered, encoder fitted or day encoded, in `.<name>.unfinished` beside `out`, and its result is the same. Of several
    processes that prepare the same folder one does, and the others wait for it.

    `source_folder` and `schema` are those of `open_source`; the files of a URL are first copied to `<out>.copy`, which
    stays (`local_data`). `progress` is called with stage, done and total. Rows of a group of `row_group_rows` are read
    and shuffled together. `replace` says whether `out` is replaced if its source, the schema or the layout has changed
    since.

    Raises:
        DataError: If the data or the schema is wrong, or `out` holds something else or must not be replaced.
    """
    local = local_data(source_folder, out.with_name(f"{out.name}.copy"), schema, progress)
    source = open_source(local, schema)

    def encoded(log: DayLog, reader: RowReader) -> Encoded:
        splits = log.days_of(source.schema)
        until = next(reversed(splits["train"]), "") or None  # "" is the day of a log without a time

        def fit(scratch: Path) -> FeatureEncoder:
            train = reported(reader.read(split="train"), "fit", len(splits["train"]), progress)
            return FeatureEncoder.fit(source.schema, (rows.features for rows in train), until, scratch)

        return Encoded(splits, fit, lambda done: reader.read(done=done))

    return prepare_as(source, out, (), encoded, progress, row_group_rows, replace)


class Encoded(NamedTuple):
    """What is written of a log; nothing is read before it is asked for."""

    splits: Mapping[str, tuple[str, ...]]  # the days of each
    fit: Callable[[Path], FeatureEncoder]  # the encoder, given a folder for temporary files
    rows: Callable[[Collection[str]], Iterator[Rows]]  # with their splits, day by day, without days that are done


def prepare_as(
    source: Source,
    out: Path,
    rules: Sequence[Any],
    encoded: Callable[[DayLog, RowReader], Encoded],
    progress: Progress,
    row_group_rows: int = ROW_GROUP_ROWS,
    replace: bool = True,
    tasks: Sequence[str] = (),
) -> Prepared:
    """Write what `encoded` makes of a log, or open what was written by the same rules from the same files.

    `rules` are what `encoded` depends on besides the source's schema, as data for JSON. Each of `tasks` (none: of all)
    has rows in every split that has days. The rest is as in `prepare`.
    """
    how = json.dumps([source.schema.to_stored(), [VERSION, row_group_rows], *rules], sort_keys=True)
    fingerprint = hashlib.sha256(how.encode()).hexdigest()  # the states of the files cover the rest
    before = state_of(out)
    if _is_current(out, source, fingerprint):
        return Prepared.load(out)
    if not replace and (out / PREPARED).is_file():
        changed = f"got data of other files, contents, schema or version than {source.folder} has now"
        raise DataError(f"{out}: {changed}, wanted the same")
    with prepared_folder(out, PREPARED, resumed=True) as folder:
        # Another process may have prepared it meanwhile.
        if state_of(out) == before or not _is_current(out, source, fingerprint):
            known = _content(out).get("files", {})  # files that have not changed are not read for their digests again
            _prepare(source, folder, fingerprint, known, encoded, progress, row_group_rows, tasks)
    return Prepared.load(out)


def _prepare(
    source: Source,
    folder: Path,
    fingerprint: str,
    known: Mapping[str, Any],
    encoded: Callable[[DayLog, RowReader], Encoded],
    progress: Progress,
    row_group_rows: int,
    tasks: Sequence[str],
) -> None:
    """Fill a folder that may hold a part of the same: the stages and days that are there are not done again."""
    scratch = folder / "scratch"
    states = _begin(source, folder, fingerprint, known)
    if not (folder / PREPARED).is_file():
        log = partition(source, scratch, row_group_rows, progress, resumed=True)
        made = encoded(log, RowReader(source, log))
        if not (folder / ENCODER).is_file():
            arrays, meta = made.fit(scratch).to_arrays()
            with whole_file(folder / ENCODER) as path:  # for the permissions: safetensors gives them to the owner alone
                save_file(arrays, path, metadata={"encoder": json.dumps(meta)})
        counts: dict[str, Any] = {"rows_read": log.rows_read, "duplicates": log.duplicates}
        if (split_by := described(source.schema)) is not None:
            counts["split_by"] = split_by
        counts |= _write(folder, load_encoder(folder), made, str(source.folder), tasks, progress)
        content = {"version": VERSION, "fingerprint": fingerprint, "files": states, "counts": counts}
        write_whole(folder / PREPARED, json.dumps(content, indent=1))
    if scratch.exists():
        shutil.rmtree(scratch)


def _begin(source: Source, folder: Path, fingerprint: str, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the states of the source's files, and empty the folder if it was begun with other ones or other rules.

    `known` are earlier states of the files.
    """
    begun = folder / "scratch" / BEGUN
    before = read_json(begun) if begun.is_file() else _content(folder)
    # Before the log is read, so that a file that changes meanwhile is noticed next time.
    states = source.states({**known, **before.get("files", {})})
    content = {"fingerprint": fingerprint, "files": states}
    begun_with = {name: state.get("digest") for name, state in before.get("files", {}).items()}
    digests = {name: state["digest"] for name, state in states.items()}
    if (before.get("fingerprint"), begun_with) != (fingerprint, digests):
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        begun.parent.mkdir()
    if begun.parent.is_dir() and not content.items() <= before.items():  # also new times of the same files
        write_whole(begun, json.dumps(content))
    return states


def _write(
    folder: Path,
    encoder: FeatureEncoder,
    encoded: Encoded,
    where: str,
    wanted: Sequence[str],
    progress: Progress,
) -> dict[str, Any]:
    """Write the parts of every split and return its counts; no wanted task may be without rows in a split with days."""
    tasks = [task.name for task in encoder.schema.tasks]
    finished = folder / "scratch" / ENCODED
    counts: dict[str, Any] = {
        split: {
            "days": [day for day in days if day],
            "rows": 0,
            "tasks": {task: {"rows": 0, "label_mean": 0.0} for task in tasks},
        }
        for split, days in encoded.splits.items()
    }
    done: list[str] = []
    parts = dict.fromkeys(SPLITS, 0)
    if finished.is_file():
        so_far = read_json(finished, "days", "parts", "counts")
        done, parts, counts = so_far["days"], so_far["parts"], so_far["counts"]

    def table_of(rows: Rows) -> Any:
        table = pa.table(_feature_columns(encoder, rows) | rows.columns)
        counts[rows.split]["rows"] += len(table)
        for name, task in counts[rows.split]["tasks"].items():
            task["rows"] += int(rows.columns[MEMBER + name].sum())
            # A sum until all rows are counted. Labels are 0 outside the task, so it needs no mask.
            task["label_mean"] += float(rows.columns[LABEL + name].sum(dtype=np.float64))
        return table.append_column(DAY, pa.repeat(rows.day, len(table)))

    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
    days = {day for split in SPLITS for day in encoded.splits[split]}
    for day, of_day in groupby(encoded.rows(done), lambda rows: rows.day):
        writers: dict[str, Any] = {}
        with ExitStack() as stack:
            for rows in of_day:
                split, table = rows.split, table_of(rows)
                if split not in writers:
                    path = stack.enter_context(whole_file(folder / split / f"part-{parts[split]:05}.parquet"))
                    writers[split] = stack.enter_context(pq.ParquetWriter(path, table.schema, compression="zstd"))
                    parts[split] += 1
                writers[split].write_table(table)
        done.append(day)
        write_whole(finished, json.dumps({"days": done, "parts": parts, "counts": counts}))
        progress("encode", len(done), len(days))
    for split, count in counts.items():
        for name, task in count["tasks"].items():
            if not task["rows"] and encoded.splits[split] and name in (wanted or tasks):
                got = f"{count['rows']} rows and none of task {name!r}"
                raise DataError(f"{where}: split {split!r}: got {got}, wanted some of every task")
            task["label_mean"] /= max(task["rows"], 1)
    return counts


def _feature_columns(encoder: FeatureEncoder, rows: Rows) -> dict[str, Any]:
    encoded = encoder.encode(rows.features)
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
    if encoder.n_numbers:
        flat = pa.array(encoded.numbers.numpy().reshape(-1))
        columns[NUMBERS] = pa.FixedSizeListArray.from_arrays(flat, encoder.n_numbers)
    return columns


def reported(stream: Iterator[Rows], stage: str, total: int, progress: Progress) -> Iterator[Rows]:
    """Pass rows on and report the progress by days."""
    seen: set[str] = set()
    for rows in stream:
        yield rows
        if rows.day not in seen:
            seen.add(rows.day)
            progress(stage, len(seen), total)


def load_encoder(folder: Path) -> FeatureEncoder:
    """Read the encoder of a prepared folder."""
    path = folder / ENCODER
    check_regular(path, kind=DataError)
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the file is not a mapping
            meta = parse_json((file.metadata() or {}).get("encoder", "{}"), "encoder")
        return FeatureEncoder.from_arrays(arrays, meta)
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from error


def _is_current(out: Path, source: Source, fingerprint: str) -> bool:
    """Return whether `out` holds what `prepare` would write; note there the new times of unchanged files."""
    content = _content(out)
    if content.get("fingerprint") != fingerprint:
        return False
    known = content["files"]
    states = source.states(known)
    if {name: s["digest"] for name, s in states.items()} != {name: s.get("digest") for name, s in known.items()}:
        return False
    if states != known:
        with suppress(OSError):  # a folder that cannot be written to is current too; its files are read again next time
            write_whole(out / PREPARED, json.dumps(content | {"files": states}, indent=1))
    return True


def _content(folder: Path) -> dict[str, Any]:
    """Return `prepared.json`, or nothing if there is none."""
    path = folder / PREPARED
    if not path.is_file():
        return {}
    content = read_json(path)
    for name, kind in {"version": int, "fingerprint": str, "files": dict, "counts": dict}.items():
        if not isinstance(content.get(name), kind):
            raise DataError(f"{path}: {name}: got {shown(content.get(name))}, wanted a {kind.__name__}")
    # A damaged state is unknown.
    content["files"] = {name: state for name, state in content["files"].items() if isinstance(state, dict)}
    return content
