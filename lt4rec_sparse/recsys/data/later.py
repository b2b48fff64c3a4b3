"""Later days of a log, prepared for a model that is there: encoded as its encoder does, whose vocabularies grow."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lt4rec_sparse.errors import shown
from lt4rec_sparse.ranker.features import FeatureEncoder, Schema, Split
from lt4rec_sparse.recsys.data.days import DayLog, Progress
from lt4rec_sparse.recsys.data.prepare import ROW_GROUP_ROWS, Encoded, Prepared, prepare_as, reported
from lt4rec_sparse.recsys.data.rows import RowReader, Rows
from lt4rec_sparse.recsys.data.source import SCHEMA_FILE, DataError, Source, open_source

# What must be the same for a model to go on: the rest says how files are written, and how reports cut rows.
NAMED = {"columns": "column", "tasks": "task", "histories": "history", "derived": "derived column"}
ALONE = ("time", "group", "duplicates")


def open_later(folder: Path, schema: Schema) -> Source:
    """Find the files of a log for a model of `schema`: by the folder's own schema, if it has one.

    Raises:
        DataError: As `open_source`, or if the folder's schema and the model's differ in what a model reads or learns;
            the message names the first difference.
    """
    source = open_source(folder, None if (folder / SCHEMA_FILE).is_file() else schema)
    for kind, word in NAMED.items():
        here, wanted = ({part.name: part for part in getattr(s, kind)} for s in (source.schema, schema))
        for name in (*wanted, *here):
            if name not in here or name not in wanted:
                got, want = ("none", "it") if name in wanted else ("one", "none")
                raise DataError(f"{folder}: {word} {name!r}: got {got}, wanted {want}, as in the model")
            _check_equal(folder, f"{word} {name!r}: ", here[name], wanted[name])
    for name in ALONE:
        if getattr(source.schema, name) != getattr(schema, name):
            got, want = (shown(getattr(s, name)) for s in (source.schema, schema))
            raise DataError(f"{folder}: {name}: got {got}, wanted {want}, as in the model")
    if schema.time is None:
        raise DataError(f"{folder}: got a log without [time], wanted one with days")
    # Whole days are read, however the rows of the first training were split.
    return replace(source, schema=replace(source.schema, split=Split()))


def prepare_later(
    source: Source,
    out: Path,
    encoder: FeatureEncoder,
    tasks: Sequence[str],
    days: str | None,
    validation_days: str | None = None,
    progress: Progress = lambda stage, done, total: None,
    row_group_rows: int = ROW_GROUP_ROWS,
    replace: bool = True,
) -> Prepared:
    """Prepare later days of a log as splits train and validation, with the encoder grown by the training days.

    Histories read the days before, as in `prepare`, which says the rest.

    Args:
        source: The log, as `open_later` found it.
        out: The folder to write.
        encoder: The model's.
        tasks: The model's; each has rows in both splits.
        days: The days to train on, as `DayLog.named` reads them; None for those after `encoder.until`.
        validation_days: Days after these; None for the last of them, which then does not train.
        progress: As in `prepare`.
        row_group_rows: Likewise.
        replace: Likewise.

    Raises:
        DataError: As `prepare`; if there are no such days, the model was trained on one of them, validation days are
            not after all others, or no day is left to train on.
    """

    def encoded(log: DayLog, reader: RowReader) -> Encoded:
        train, validation = _days(log, encoder.until, days, validation_days)
        split_of = dict.fromkeys(train, "train") | dict.fromkeys(validation, "validation")

        def read(wanted: Collection[str], done: Collection[str] = ()) -> Iterator[Rows]:
            for rows in reader.read(frozenset(wanted), done=done):
                yield rows._replace(split=split_of[rows.day])

        def grow(scratch: Path) -> FeatureEncoder:
            first = reported(read(train), "grow vocabularies", len(train), progress)
            return encoder.grown((rows.features for rows in first), train[-1], scratch)

        return Encoded({"train": train, "validation": validation, "test": ()}, grow, lambda done: read(split_of, done))

    arrays, described = encoder.to_arrays()
    digest = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    rules = [digest, described, list(tasks), days, validation_days]
    return prepare_as(source, out, rules, encoded, progress, row_group_rows, replace, tasks)


def _days(
    log: DayLog, until: str | None, days: str | None, validation_days: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the days to train on and those to validate on."""
    fresh = log.days if until is None else log.later(until, "--days")
    if days is None and until is None:
        raise DataError("--days: got none, wanted some: the model does not say which days it was trained on")
    train = fresh if days is None else log.named(days, "--days")
    seen = next((day for day in train if day not in fresh), None)
    if seen is not None:
        raise DataError(f"--days: got {seen!r}, wanted days after {until!r}, the last that the model was trained on")
    if validation_days is None:
        train, validation = train[:-1], train[-1:]
    else:
        validation = log.named(validation_days, "--validation-days")
        if days is None:
            train = tuple(day for day in train if log.days.index(day) < log.days.index(validation[0]))
    if not train:
        got = f"{len(fresh)} days after {until!r}" if days is None else repr(days)
        raise DataError(f"--days: got {got}, wanted at least one to train on, and later ones to validate on")
    if log.days.index(validation[0]) <= log.days.index(train[-1]):
        got = f"--validation-days: got {validation[0]!r}"
        raise DataError(f"{got}, wanted days after {train[-1]!r}, the last to train on")
    return train, validation


def _check_equal(folder: Path, where: str, got: Any, wanted: Any) -> None:
    for field in fields(wanted):
        here, there = getattr(got, field.name), getattr(wanted, field.name)
        if here != there:
            raise DataError(
                f"{folder}: {where}got {field.name} = {shown(here)}, wanted {shown(there)}, as in the model"
            )
