"""Scores of candidates, in a file or a record batch, or of a log's own rows, beside columns that say which is which."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import scratch_beside
from lt4rec_sparse.ranker import Ranker
from lt4rec_sparse.ranker.artefact import load
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data import read_candidates
from lt4rec_sparse.recsys.data.batches import SPLITS
from lt4rec_sparse.recsys.data.candidates import features_of, ids_of
from lt4rec_sparse.recsys.data.days import DayLog, Progress, partition
from lt4rec_sparse.recsys.data.reading import column_names, list_columns, log_form
from lt4rec_sparse.recsys.data.rows import RowReader
from lt4rec_sparse.recsys.data.source import Source
from lt4rec_sparse.recsys.data.written import check_flat, check_table_name, written_table

CHUNK_ROWS = 16_384  # scored together: the MLP's input is of some thousand bytes per row


def score(batch: Any, model: str | Path, keep: Sequence[str] = ()) -> Any:
    """Return the columns to keep of a `pyarrow.RecordBatch` of candidates, then the scores of every task (float32).

    `functools.partial(score, model=..., keep=...)` is what Ray's `map_batches` and Spark's `mapInArrow` run, and can be
    pickled: a process loads the artefact at its first batch, and again once the file is another one.

    Args:
        batch: A column for every feature, of the types of training or of such that fit these without loss; rows are
            scored for themselves.
        model: The artefact.
        keep: Columns of the batch.

    Returns:
        A `pyarrow.RecordBatch` with the rows of `batch`, in its order.

    Raises:
        InputError: If a feature or a column to keep is absent, has a wrong value, or has the name of a task.
    """
    stat = Path(model).stat()
    ranker = _loaded(str(model), stat.st_ino, stat.st_mtime_ns)
    _check_kept(ranker, keep)
    features = features_of(batch, ranker.encoder.schema, keep)
    kept = {name: batch.column(name) for name in dict.fromkeys(keep)}
    return pa.RecordBatch.from_pydict(kept | {task: pa.array(of) for task, of in ranker.score(features).items()})


@lru_cache(maxsize=1)
def _loaded(model: str, *_: int) -> Ranker:
    """Return the ranker of a file in a state; one process scores with one model."""
    return load(model)


def score_file(ranker: Ranker, candidates: Path, out: Path, keep: Sequence[str] | None = None) -> None:
    """Score a file of candidates, CSV or Parquet: one row of `out` per row, in the same order.

    Args:
        ranker: The model.
        candidates: A file with a column for every feature; all of it is read into memory.
        out: CSV or Parquet, as its name says: the columns to keep, then one column per task.
        keep: Columns of the file. None: its ids, see `ids_of`.

    Raises:
        InputError: If a feature or a column to keep is absent, has a wrong value, or cannot be written.
    """
    check_table_name(out)
    schema = ranker.encoder.schema
    if keep is None:
        keep = ids_of(candidates, schema, ranker.tasks)
    _check_kept(ranker, keep)
    lists = list_columns(candidates) | {column.name for column in schema.features if column.is_list}
    check_flat(out, (name for name in keep if name in lists))
    features, kept = read_candidates(candidates, schema, keep)
    columns = dict(zip(kept.column_names, kept.columns, strict=True))
    with written_table(out) as append:
        append(pa.table(columns | ranker.score(features)))


def score_log(
    ranker: Ranker,
    source: Source,
    out: Path,
    days: str = "test",
    keep: Sequence[str] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Score rows of a log as training would have seen them: joined, with histories of strictly earlier days.

    Rows come by day, within a day in the order of the schema, without those that training dropped as duplicates. Memory
    holds a bounded part of the log.

    Args:
        ranker: The model.
        source: The log with its side tables, and the schema of the model.
        out: CSV or Parquet, as its name says: the columns to keep, then one column per task.
        days: "train", "validation", "test", or days of the log as `DayLog.named` reads them.
        keep: Columns of the log. None: the group, the keys of side tables, and the day or time; without any of these,
            all that are no feature.
        progress: Called with stage, done and total.

    Raises:
        InputError: If the log contradicts the schema, there is no such day, or a column to keep is not in the log.
    """
    check_table_name(out)
    schema = source.schema
    if keep is None:
        group = None if schema.group is None else schema.group.column
        ids = [name for name in (group, *schema.keys, schema.moment) if name is not None]
        if not ids:
            features = {column.name for column in schema.features}
            ids = [name for name in column_names(source.log[0], log_form(schema)) if name not in features]
        unfit = {*ranker.tasks, *(list_columns(source.log[0]) if out.suffix == ".csv" else ())}
        keep = tuple(name for name in dict.fromkeys(ids) if name not in unfit)
    _check_kept(ranker, keep)
    lists = {column.name for column in schema.columns if column.is_list}.union(*map(list_columns, source.log))
    check_flat(out, (name for name in keep if name in lists))
    with scratch_beside(out) as scratch:
        log = partition(source, scratch, CHUNK_ROWS, progress, keep)
        split, wanted = chosen_rows(log, schema, days)
        scored: set[str] = set()
        with written_table(out) as append:
            for rows in RowReader(source, log, keep).read(wanted, split):
                append(pa.table(rows.kept | ranker.score(rows.features)))
                scored.add(rows.day)
                progress("score days", len(scored), len(wanted))


def chosen_rows(log: DayLog, schema: Schema, text: str) -> tuple[str | None, frozenset[str]]:
    """Return the split and the days that `--days` names, as `RowReader.read` takes them."""
    if text in SPLITS:
        return text, frozenset(log.days_of(schema)[text])
    if schema.time is None:
        raise InputError(f"--days: got {text!r}, wanted {', '.join(SPLITS)}: the log has no [time]")
    return None, frozenset(log.named(text, "--days", f"{', '.join(SPLITS)}, or "))


def _check_kept(ranker: Ranker, keep: Sequence[str]) -> None:
    twice = next((name for name in keep if name in ranker.tasks), None)
    if twice is not None:
        raise InputError(f"--keep: got {twice!r}, the name of a task, wanted columns of other names")
