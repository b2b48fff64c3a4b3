"""Batches of a prepared split: shuffled by a seed, resumable at any batch, read from Parquet once if memory allows.

Row groups are joined to *windows* of about half a million rows, each a cross-section of the whole split (every k-th
row group), because the files are in the order of days. An epoch visits the windows in a seeded order and permutes the
rows within each window; a small split is a single window and thus fully shuffled. Without shuffling, rows come in the
order of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from lt4rec_sparse.errors import told
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.recsys.data.memory import cache_bytes
from lt4rec_sparse.recsys.data.source import DataError

SPLITS = ("train", "validation", "test")
# The columns of a part of a split, or what their names begin with; see `prepare`.
FEATURE, LABEL, MEMBER, WEIGHT, SLICE, VALUE = "feature.", "label.", "member.", "weight.", "slice.", "value."
GROUP, DAY, NUMBERS = "group", "day", "numbers"
# Ten million ids or so: large enough to shuffle well, small enough that a few fit in memory.
WINDOW_ROWS = 1 << 19


@dataclass(frozen=True)
class Batch:
    """Rows with their labels; every tensor but the features is `[batch]`."""

    features: EncodedFeatures
    groups: Tensor | None  # int64, the group (user) of each row; None in a log without
    labels: dict[str, Tensor]  # per task, float32; 0 where the row does not belong to the task
    rows: dict[str, Tensor]  # per task, bool: True where the row belongs to the task
    weights: dict[str, Tensor]  # per task, float32
    slices: dict[str, Tensor]  # per slice of the schema, bool
    values: dict[str, Tensor]  # per carried column of the schema, float64, NaN where missing

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.features.batch

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        columns = (column for part in self._parts() for column in part.values())
        return self.features.nbytes + sum(column.nbytes for column in columns)

    def take(self, rows: Tensor) -> Batch:
        """Return the rows at positions `rows [n]` int64, in that order."""
        parts = [{name: column.index_select(0, rows) for name, column in part.items()} for part in self._parts()]
        return Batch(self.features.take(rows), parts[0].get(""), *parts[1:])

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        """Return the rows of all batches, one batch after another; each has at least one row."""
        if len(batches) == 1:
            return batches[0]
        alike = zip(*(batch._parts() for batch in batches), strict=True)
        parts = [{name: torch.cat([part[name] for part in same]) for name in same[0]} for same in alike]
        features = EncodedFeatures.cat([batch.features for batch in batches])
        return Batch(features, parts[0].get(""), *parts[1:])

    def _parts(self) -> tuple[dict[str, Tensor], ...]:
        groups = {} if self.groups is None else {"": self.groups}
        return groups, self.labels, self.rows, self.weights, self.slices, self.values


class BatchStream:
    """Epochs of batches over one split of a prepared folder.

    The order of an epoch depends on `seed`, the epoch's number and the prepared files only, so `(epoch, batch)` is the
    whole cursor: `stream.epoch(3, start=40)` yields, bit for bit, what `stream.epoch(3)` yields from its 41st batch on.
    Without `shuffle` rows keep the order of the files. The last batch may be smaller than `batch_size`.

    Memory holds a window or two, and besides, of all streams of this process together, as many decoded windows as
    `memory.cache_bytes` allows.

    Raises:
        ValueError: If the batch size is not positive or there is no such split.
        DataError: If a file of the split is damaged; the message begins with its path.
    """

    def __init__(self, folder: Path, split: str, batch_size: int, seed: int = 0, shuffle: bool = True) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, wanted at least 1")
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, wanted one of {', '.join(SPLITS)}")
        self.batch_size = batch_size
        self._seed, self._shuffle = seed, shuffle
        self._files = sorted((folder / split).glob("part-*.parquet"))  # in the order of days
        groups = [
            (file, group, metadata.row_group(group).num_rows)
            for file, path in enumerate(self._files)
            for metadata in (_read(path, attrgetter("metadata")),)
            for group in range(metadata.num_row_groups)
        ]
        self.rows: int = sum(rows for _, _, rows in groups)
        count = ceil(self.rows / WINDOW_ROWS) if shuffle else len(groups)
        self._windows = [groups[first::count] for first in range(count)]
        self._cache: dict[int, Batch] = {}
        _STREAMS.add(self)

    def __len__(self) -> int:
        """Batches per epoch."""
        return ceil(self.rows / self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of epoch `number` from batch `start` on; windows before it are not read."""
        order = list(range(len(self._windows)))
        if self._shuffle:
            order = np.random.default_rng([self._seed, number]).permutation(len(order)).tolist()
        skip, parts, held = start * self.batch_size, list[Batch](), 0
        for window in order:
            rows = sum(rows for _, _, rows in self._windows[window])
            if skip >= rows:
                skip -= rows
                continue
            data, permutation = self._window(window), torch.arange(rows)
            if self._shuffle:
                permutation = torch.from_numpy(np.random.default_rng([self._seed, number, window]).permutation(rows))
            while skip < rows:
                parts.append(data.take(permutation[skip : skip + self.batch_size - held]))
                skip, held = skip + parts[-1].batch, held + parts[-1].batch
                if held == self.batch_size:
                    yield Batch.cat(parts)
                    parts, held = [], 0
            skip = 0
        if parts:
            yield Batch.cat(parts)

    def _window(self, window: int) -> Batch:
        if window in self._cache:
            return self._cache[window]
        batch = self._decoded(window)
        # An epoch visits every window once: those that fit are kept for ever, and none would be a better choice.
        held = sum(cached.nbytes for stream in _STREAMS for cached in stream._cache.values())
        if batch.nbytes + held <= cache_bytes():
            self._cache[window] = batch
        return batch

    def _decoded(self, window: int) -> Batch:
        groups: dict[int, list[int]] = {}
        for file, group, _ in self._windows[window]:
            groups.setdefault(file, []).append(group)
        tables = [_read(self._files[file], methodcaller("read_row_groups", chosen)) for file, chosen in groups.items()]
        return _decoded(pa.concat_tables(tables).combine_chunks())


# Those that live: their caches share the memory.
_STREAMS: WeakSet[BatchStream] = WeakSet()


def damaged(path: Path, error: Exception) -> DataError:
    """Return the error of a file in a prepared folder that cannot be read."""
    return DataError(f"{path}: got a damaged file ({told(error)}), wanted a part of a prepared log: prepare it again")


def _read(path: Path, read: Callable[[Any], Any]) -> Any:
    try:
        with pq.ParquetFile(path) as parquet:
            return read(parquet)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from error


def _decoded(table: Any) -> Batch:
    """Return a prepared table as tensors; ids stay int32, which halves the cache."""
    fields = _with_prefix(table, FEATURE)
    single = [column.to_numpy() for column in fields.values() if not pa.types.is_list(column.type)]
    bags = [column for column in fields.values() if pa.types.is_list(column.type)]
    ids = [bag.flatten().to_numpy() for bag in bags]
    lengths = [np.diff(bag.offsets.to_numpy()) for bag in bags]
    return Batch(
        EncodedFeatures(
            torch.from_numpy(np.stack(single, 1) if single else np.empty((table.num_rows, 0), np.int32)),
            torch.from_numpy(np.concatenate([np.empty(0, np.int32), *ids])),
            torch.from_numpy(np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)),
            torch.from_numpy(_numbers(table)),
        ),
        _tensors(table, GROUP).get(""),
        *(_tensors(table, prefix) for prefix in (LABEL, MEMBER, WEIGHT, SLICE, VALUE)),
    )


def _numbers(table: Any) -> NDArray[np.float32]:
    """Return the inputs of raw numbers, `[rows, n_numbers]`."""
    if NUMBERS not in table.column_names:
        return np.empty((table.num_rows, 0), np.float32)
    column = table[NUMBERS].combine_chunks()
    return np.array(column.flatten().to_numpy().reshape(len(column), -1))


def _with_prefix(table: Any, prefix: str) -> dict[str, Any]:
    """Return the columns whose name begins with `prefix`, keyed by the rest of the name, as plain Arrow arrays."""
    names = [name for name in table.column_names if name.startswith(prefix)]
    return {name.removeprefix(prefix): table[name].combine_chunks() for name in names}


def _tensors(table: Any, prefix: str) -> dict[str, Tensor]:
    # A copy, because Arrow's memory is read-only, which torch does not respect.
    columns = _with_prefix(table, prefix).items()
    return {name: torch.from_numpy(np.array(column.to_numpy(zero_copy_only=False))) for name, column in columns}
