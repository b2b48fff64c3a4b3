"""What a log and its side tables know on a day, by key: the tables of a feature store."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from lt4rec_sparse.ranker.store import FeatureTable
from lt4rec_sparse.recsys.data.days import DayLog, Progress, are_numbers, check_days, partition
from lt4rec_sparse.recsys.data.joined import Joined, as_date, raw_column
from lt4rec_sparse.recsys.data.past import Past
from lt4rec_sparse.recsys.data.requests import CHUNK_ROWS
from lt4rec_sparse.recsys.data.source import DataError, Source


class Snapshot(NamedTuple):
    """Tables of features as of a day; None of a log without a time."""

    day: str | None
    tables: tuple[FeatureTable, ...]

    @property
    def columns(self) -> dict[str, str]:
        """Feature -> the column of a request by which it is found."""
        return {name: table.key for table in self.tables for name in table.columns}


def take_snapshot(
    source: Source, at: str | None, scratch: Path, progress: Progress = lambda stage, done, total: None
) -> Snapshot:
    """Return every feature that is found by a key: of the side tables, derived from them, and of the histories.

    They are those of `complete_requests` for requests of the same day. Features that the log has are in no table.

    Args:
        source: The log with its side tables, and the schema of the model.
        at: The day, in the form of the log's; None for the day after the log's last.
        scratch: An empty folder for temporary files of the size of the log.
        progress: Called with stage, done and total.

    Raises:
        DataError: If no feature is found by a key, the log contradicts its schema, or `at` cannot be compared with its
            days.
    """
    schema = source.schema
    tables: list[FeatureTable] = []
    past = None
    if at is not None and schema.time is None:
        raise DataError(f"--at: got {at!r}, wanted none: the log has no [time]")
    keys = list(schema.keys)
    features = {column.name for column in schema.columns}
    joined = Joined(source, keys, [column.name for column in schema.columns])
    if not schema.histories and not any(side.names for side in joined.sides):
        wanted = "a model with histories, or features of side tables"
        raise DataError(f"schema {schema.name!r}: got no feature that is found by a key, wanted {wanted}")
    if schema.histories or (at is None and schema.time is not None):
        log = partition(source, scratch, CHUNK_ROWS, progress)
        at = day_after(log) if at is None else at
        past = Past(source, log)
        past.advance(log.earlier(at, "--at"))
    elif at is not None:
        check_days(source, [at], "--at")
    for side in joined.sides:
        of_side = side.columns
        columns = of_side | joined.derived(at or "", of_side)
        raw = {name: raw_column(column) for name, column in columns.items() if name in features}
        if raw:
            tables.append(FeatureTable(side.on, side.keys, raw))
    if past is not None and schema.histories and schema.group is not None:
        groups = past.histories.groups
        tables.append(FeatureTable(schema.group.column, groups, past.histories.features(groups)))
    return Snapshot(at, tuple(tables))


def day_after(log: DayLog) -> str:
    """Return the day after the last one of a log, in the same form: the next date or number.

    Raises:
        DataError: If the days are neither dates nor numbers.
    """
    last = log.days[-1]
    if are_numbers(log.days) and len(last) != len("20220425"):
        return str(int(last) + 1)
    try:
        day = as_date(last, "--at") + timedelta(days=1)
    except DataError as error:
        raise DataError(f"--at: got nothing, wanted a day: the log's last, {last!r}, is no date") from error
    return day.isoformat() if "-" in last else day.strftime("%Y%m%d")
