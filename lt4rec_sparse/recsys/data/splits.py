"""Which rows train, validate and test: whole days, or row by row, while the log is read.

A row's split by anything but its day is kept beside it as a number, its place in `SPLITS`. A hash decides by
`hash64(hash64(x) + seed)` over 2^64, of the row's place in the log or of its value in a column: below `test_share` a
row tests, below `test_share + validation_share` it validates, else it trains. It is the same on every machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lt4rec_sparse.ranker.features import Schema, Split
from lt4rec_sparse.ranker.features.tables import hash64
from lt4rec_sparse.recsys.data.batches import SPLITS
from lt4rec_sparse.recsys.data.source import DataError, Source, matching_files

TRAIN, VALIDATION, TEST = range(len(SPLITS))
Places = NDArray[np.int8]


def split_days(days: tuple[str, ...], split: Split) -> dict[str, tuple[str, ...]]:
    """Return the days of train, validation and test."""
    if split.train:
        listed = _lists(split)
        for name, wanted in listed.items():
            for day in wanted:
                if day not in days:
                    raise DataError(f"split {name!r}: got day {day!r}, wanted one of {', '.join(days)}")
        return listed
    held_out = split.validation_days + split.test_days
    if len(days) <= held_out:
        got = f"{len(days)} days ({', '.join(days)})"
        parts = f"{split.validation_days} to validate, {split.test_days} to test, at least 1 to train on"
        other = "or by = 'random', 'hash', 'column' or 'files' in [split]"
        raise DataError(f"split: got {got}, wanted more than {held_out}: {parts}; {other}")
    train, test = len(days) - held_out, len(days) - split.test_days
    return {"train": days[:train], "validation": days[train:test], "test": days[test:]}


def described(schema: Schema) -> str | None:
    """Return in words how rows are split if it is not by day."""
    split = schema.split
    hashed = f"seed {split.seed}, {split.test_share:.0%} test, {split.validation_share:.0%} validate"
    drawn = f", {split.validation_share:.0%} of the training rows validate, seed {split.seed}"
    drawn = drawn if split.train and not split.validation else ""
    return {
        "day": None,
        "random": f"at random by rows ({hashed})",
        "hash": f"by a hash of {split.column} ({hashed})",
        "column": f"by column {split.column}{drawn}",
        "files": f"by files{drawn}",
    }[schema.split_by]


class RowSplits:
    """The split of every row of a log that is not split by day.

    Args:
        source: The log.

    Raises:
        DataError: If a file of the log is in no list of the schema, or in two, or a glob finds none of them.
    """

    def __init__(self, source: Source) -> None:
        self._schema, self._split, self._by = source.schema, source.schema.split, source.schema.split_by
        self._files = _split_files(source) if self._by == "files" else {}
        self._rows = 0

    def of(self, path: Path, batch: Any) -> Places:
        """Return the split of each row of the next batch of the log, `[rows]`, as places in `SPLITS`.

        Raises:
            DataError: If the column that decides has a missing value, or one in no list.
        """
        rows = np.arange(self._rows, self._rows + batch.num_rows)
        self._rows += batch.num_rows
        if self._by == "random":
            return self._hashed(rows)
        if self._by == "hash":
            return self._hashed(_hashable(self._present(path, batch)))
        if self._by == "files":
            places = np.full(batch.num_rows, self._files[path], np.int8)
        else:
            places = self._listed(path, self._present(path, batch))
        if self._split.train and not self._split.validation:
            drawn = (places == TRAIN) & (self._uniform(rows) < self._split.validation_share)
            places[drawn] = VALIDATION
        return places

    def skip(self, rows: int) -> None:
        """Pass over rows of the log that are split already."""
        self._rows += rows

    def _present(self, path: Path, batch: Any) -> Any:
        column = batch[self._split.column]
        if column.null_count:
            raise DataError(f"{path}: column {self._split.column!r}: got a missing value, wanted one in every row")
        return column

    def _listed(self, path: Path, column: Any) -> Places:
        lists = _lists(self._split) if self._split.train else {name: (name,) for name in SPLITS}
        place_of = {value: place for place, values in enumerate(lists.values()) for value in values}
        coded = column.cast(pa.string()).dictionary_encode()
        values = coded.dictionary.to_pylist()
        stray = next((value for value in values if value not in place_of), None)
        if stray is not None:
            wanted = f"one of {', '.join(place_of)} (train, validation and test in [split] name them)"
            raise DataError(f"{path}: column {self._split.column!r}: got split {stray!r}, wanted {wanted}")
        places: Places = np.array([place_of[value] for value in values], np.int8)[coded.indices.to_numpy()]
        return places

    def _hashed(self, values: Any) -> Places:
        drawn = self._uniform(values)
        held_out = self._split.test_share + self._split.validation_share
        return np.where(drawn < self._split.test_share, TEST, np.where(drawn < held_out, VALIDATION, TRAIN)).astype(
            np.int8
        )

    def _uniform(self, values: Any) -> NDArray[np.float64]:
        """Return a number in [0, 1) for each value; the second hash makes seeds differ in more than their order."""
        mixed = hash64((hash64(values) + np.uint64(self._split.seed)).view(np.int64))
        drawn: NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
        return drawn


def _hashable(column: Any) -> Any:
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64()).to_numpy()
    return column.cast(pa.string()).to_numpy(zero_copy_only=False)


def _lists(split: Split) -> dict[str, tuple[str, ...]]:
    return dict(zip(SPLITS, (split.train, split.validation, split.test), strict=True))


def _split_files(source: Source) -> dict[Path, int]:
    places: dict[Path, int] = {}
    for place, (name, patterns) in enumerate(_lists(source.schema.split).items()):
        for pattern in patterns:
            found = [path for path in matching_files(source.folder, pattern) if path in source.log]
            if not found:
                raise DataError(f"split {name!r}: got no file {pattern!r} of the log, wanted some of its files")
            for path in found:
                if places.setdefault(path, place) != place:
                    raise DataError(f"{path}: got it in two splits, wanted it in one of them")
    absent = next((path for path in source.log if path not in places), None)
    if absent is not None:
        raise DataError(f"{absent}: got a file of the log in no split, wanted it in train, validation or test")
    return places


def split_counts(places: Places) -> dict[str, int]:
    """Return the rows of each split."""
    return dict(zip(SPLITS, np.bincount(places, minlength=len(SPLITS)).tolist(), strict=True))


def inside(column: Any, split: str) -> Any:
    """Return which rows of a column of splits are in `split`, as an Arrow array."""
    return pc.equal(column, SPLITS.index(split))
