"""The past of a log, day by day: what histories hold of strictly earlier days, for rows of the log and for requests."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.ranker.features.tables import Ids
from lt4rec_sparse.recsys.data.days import DayLog
from lt4rec_sparse.recsys.data.history import Histories
from lt4rec_sparse.recsys.data.joined import Joined, group_ids
from lt4rec_sparse.recsys.data.source import Source


def noted_rows(
    log: DayLog, day: str, joined: Joined, histories: Histories, names: Collection[str] | None = None
) -> Iterator[tuple[Ids | None, dict[str, Any]]]:
    """Yield the groups (None without) and joined columns of a day's rows; then the day is past to `histories`.

    `names` are those of `Joined.columns`, to which the columns of histories belong.
    """
    group = joined.schema.group
    for batch in log.read(day):
        columns = joined.columns(day, dict(zip(batch.schema.names, batch.columns, strict=True)), names)
        groups = None if group is None else group_ids(columns[group.column])
        if groups is not None:
            histories.note(groups, columns)
        yield groups, columns
    histories.end_day()


def columns_of_histories(schema: Schema) -> list[str]:
    """Return the columns whose past values histories list."""
    return [name for history in schema.histories for name in history.columns]


class Past:
    """The histories of a log before a day that only moves on.

    Raises:
        DataError: If the column of a history is absent.
    """

    def __init__(self, source: Source, log: DayLog) -> None:
        self.histories = Histories(source.schema)
        self._log, self._ended = log, 0
        self._joined = Joined(source, log.columns, columns_of_histories(source.schema))
        self._joined.check_none_absent()

    def advance(self, days: int) -> None:
        """Let the first `days` of the log be past; they are at least as many as before."""
        for day in self._log.days[self._ended : days]:
            for _ in noted_rows(self._log, day, self._joined, self.histories):
                pass
        self._ended = max(self._ended, days)
