"""From a raw value to its id in an embedding table: a vocabulary, a hash, or a quantile bucket.

Id 0 is a missing value everywhere and is given by the encoder; a table sees only values that are present. In a
vocabulary id 1 is any value unseen in training. A table has a `size`, the rows of its embedding table, the missing one
included; its `lookup` gives ids in `[1, size)` to values `[n]`, int64, object (str) or float64; `to_arrays` returns
what was fitted, which `from_arrays` reads back. A fit takes training values in chunks and makes a table of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import pairwise, repeat
from pathlib import Path
from tempfile import mkstemp
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lt4rec_sparse.errors import shown

MISSING, UNSEEN = 0, 1
Array = NDArray[Any]
Ids = NDArray[np.int64]
Hashes = NDArray[np.uint64]
# Merging costs a sort: counts wait until there are this many of them, or as many as the vocabulary has values.
MERGE_AT = 1 << 20
# Of more values than this, searches for ascending distinct ones miss the caches less, which is worth a sort.
SEARCHED_AT_ONCE = 4096
# Distinct values whose counts a fit holds at most before it writes them to disk.
HELD = 1 << 20
# A sketch of this many points places a quantile within 1e-5 of its rank.
SKETCH_POINTS = 1 << 17


class IntVocabulary:
    """Known integers. Ids follow `keys`, which the fit orders by descending count, then value."""

    def __init__(self, keys: Ids) -> None:
        self.keys = keys
        self.size = len(keys) + 2
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def lookup(self, values: Array) -> Ids:
        """Return ids by binary search."""
        if len(values) > SEARCHED_AT_ONCE:
            distinct, place = np.unique(values, return_inverse=True)
            return self._searched(distinct)[place]
        return self._searched(values)

    def _searched(self, values: Array) -> Ids:
        ids = np.full(len(values), UNSEEN, np.int64)
        if len(self.keys):
            place = np.minimum(np.searchsorted(self._sorted, values), len(self.keys) - 1)
            known = self._sorted[place] == values
            ids[known] = self._order[place[known]] + 2
        return ids

    def grown(self, other: IntVocabulary) -> IntVocabulary:
        """Return the keys with those of another that are not among them behind, in its order: ids stay."""
        return IntVocabulary(np.concatenate([self.keys, other.keys[~np.isin(other.keys, self.keys)]]))

    def to_arrays(self) -> dict[str, Array]:
        """Return `keys`, int64 in id order."""
        return {"keys": self.keys}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array]) -> IntVocabulary:
        """Read `to_arrays` back."""
        vocabulary = cls(checked_array(arrays, "keys", np.int64))
        twice = vocabulary._sorted[1:][vocabulary._sorted[1:] == vocabulary._sorted[:-1]]
        if len(twice):
            raise ValueError(f"keys: got {twice[0]} twice, wanted each once")
        return vocabulary


class StringVocabulary:
    """Known strings, in id order as in `IntVocabulary`."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = tuple(keys)
        self.size = len(self.keys) + 2
        self._ids = {key: index + 2 for index, key in enumerate(self.keys)}

    def lookup(self, values: Array) -> Ids:
        """Return ids from a dict."""
        return np.fromiter(map(self._ids.get, values, repeat(UNSEEN)), np.int64, len(values))

    def grown(self, other: StringVocabulary) -> StringVocabulary:
        """Return the keys with those of another that are not among them behind, in its order: ids stay."""
        return StringVocabulary([*self.keys, *(key for key in other.keys if key not in self._ids)])

    def to_arrays(self) -> dict[str, Array]:
        """Return the keys as one run of UTF-8 `bytes` (uint8) and where each begins and ends (`offsets`, int64)."""
        encoded = [key.encode("utf-8", "surrogatepass") for key in self.keys]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return {"bytes": np.frombuffer(b"".join(encoded), np.uint8), "offsets": offsets}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array]) -> StringVocabulary:
        """Read `to_arrays` back."""
        data, offsets = checked_array(arrays, "bytes", np.uint8).tobytes(), checked_array(arrays, "offsets", np.int64)
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
            raise ValueError(f"offsets: got no ascending cut of {len(data)} bytes, wanted 0 first and {len(data)} last")
        cuts = offsets.tolist()
        vocabulary = cls([data[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(cuts)])
        if len(vocabulary._ids) < len(vocabulary.keys):
            twice = next(key for i, key in enumerate(vocabulary.keys) if vocabulary._ids[key] != i + 2)
            raise ValueError(f"keys: got {shown(twice)} twice, wanted each once")
        return vocabulary


class HashTable:
    """Ids of any values, by a hash that is the same in every process and on every machine: `1 + hash % (size - 1)`."""

    def __init__(self, size: int) -> None:
        self.size = size

    def lookup(self, values: Array) -> Ids:
        """Return ids by splitmix64 (int64 values) or the first 8 bytes of blake2b (strings)."""
        slots: Ids = (hash64(values) % np.uint64(self.size - 1)).astype(np.int64)
        return slots + 1

    def to_arrays(self) -> dict[str, Array]:
        """Return nothing: a hash is not fitted."""
        return {}

    def add(self, values: Array) -> None:
        """Learn nothing: a hash is its own fit."""

    def table(self) -> HashTable:
        """Return the table itself."""
        return self


class QuantileTable:
    """Buckets of a dense value between fixed cuts: id `1 + number of cuts below the value`."""

    def __init__(self, cuts: NDArray[np.float64]) -> None:
        self.cuts = cuts
        self.size = len(cuts) + 2  # missing, and one more bucket than there are cuts

    def lookup(self, values: Array) -> Ids:
        """Return ids; a value on a cut is in the bucket below it, so that a frequent value gets its own bucket."""
        below: Ids = np.searchsorted(self.cuts, values, side="left")
        return below + 1

    def to_arrays(self) -> dict[str, Array]:
        """Return `cuts`, float64, ascending."""
        return {"cuts": self.cuts}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array]) -> QuantileTable:
        """Read `to_arrays` back."""
        cuts = checked_array(arrays, "cuts", np.float64)
        if np.isnan(cuts).any() or not (np.diff(cuts) > 0).all():
            raise ValueError("cuts: got an unsorted array, wanted ascending values")
        return cls(cuts)


class SpilledCounts:
    """Counts of values in a file, dealt by the values' hash to parts that are read back one at a time.

    Attributes:
        path: The file; None until something was added.
    """

    PARTS = 64

    def __init__(self, folder: Path) -> None:
        self.path: Path | None = None
        self._folder = folder
        self._places: list[list[int]] = [[] for _ in range(self.PARTS)]

    def add(self, values: Array, counts: Ids) -> None:
        """Append the counts of distinct values, int64 or objects (str)."""
        if self.path is None:
            descriptor, name = mkstemp(".counts", dir=self._folder)
            os.close(descriptor)
            self.path = Path(name)
        part_of = hash64(values) % np.uint64(self.PARTS)
        with self.path.open("ab") as file:
            for part, places in enumerate(self._places):
                chosen = part_of == part
                places.append(file.tell())
                for array in (*_as_numbers(values[chosen]), counts[chosen]):
                    np.save(file, array)

    def parts(self) -> Iterator[list[tuple[Array, Ids]]]:
        """Yield what was added, part by part: values and their counts, one pair per call of `add`; remove the file."""
        if self.path is None:
            return
        with self.path.open("rb") as file:
            for places in self._places:
                yield [_read_counts(file, place) for place in places]
        self.path.unlink()
        self.path = None


def _as_numbers(values: Array) -> tuple[Array, Ids]:
    """Return values as int64 or bytes, and for strings where each begins and ends."""
    if values.dtype != np.object_:
        return values, np.empty(0, np.int64)
    stored = StringVocabulary(values.tolist()).to_arrays()
    return stored["bytes"], stored["offsets"]


def _read_counts(file: BinaryIO, place: int) -> tuple[Array, Ids]:
    file.seek(place)
    values, offsets, counts = (np.load(file) for _ in range(3))
    if len(offsets):
        keys = StringVocabulary.from_arrays({"bytes": values, "offsets": offsets}).keys
        values = np.empty(len(keys), object)
        values[:] = keys
    return values, counts


class StringFit:
    """Counts of strings.

    Args:
        min_count: Strings that come up less often are unknown.
        scratch: A folder for counts beyond `HELD`; without one all are in memory.
    """

    def __init__(self, min_count: int, scratch: Path | None = None) -> None:
        self._min_count = min_count
        self._counts: Counter[str] = Counter()
        self._spilled = None if scratch is None else SpilledCounts(scratch)

    def add(self, values: Array) -> None:
        """Count one chunk."""
        self._counts.update(values.tolist())
        if self._spilled is not None and len(self._counts) > HELD:
            self._spill(self._spilled)

    def table(self) -> StringVocabulary:
        """Return the values seen at least `min_count` times."""
        kept: dict[str, int] = {}
        parts: Iterable[Counter[str]] = (self._counts,)
        if self._spilled is not None and self._spilled.path is not None:
            self._spill(self._spilled)
            parts = map(_counter, self._spilled.parts())
        for counts in parts:
            kept.update((key, count) for key, count in counts.items() if count >= self._min_count)
        return StringVocabulary(sorted(kept, key=lambda key: (-kept[key], key)))

    def _spill(self, spilled: SpilledCounts) -> None:
        keys = np.empty(len(self._counts), object)
        keys[:] = [*self._counts]
        spilled.add(keys, np.fromiter(self._counts.values(), np.int64, len(keys)))
        self._counts.clear()


def _counter(pieces: list[tuple[Array, Ids]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for values, of_values in pieces:
        counts.update(dict(zip(values.tolist(), of_values.tolist(), strict=True)))
    return counts


class _Histogram:
    """Distinct values of a stream and their counts, merged by sorting, in memory that `limit` bounds if it is given."""

    def __init__(self, dtype: type[np.generic], limit: int | None = None) -> None:
        self._values: Array = np.empty(0, dtype)
        self._counts = np.empty(0, np.int64)
        self._limit = limit
        self._pending: list[tuple[Array, Ids]] = []
        self._waiting = 0

    def add(self, values: Array) -> None:
        """Count one chunk."""
        distinct, counts = np.unique(values, return_counts=True)
        self._pending.append((distinct, counts))
        self._waiting += len(distinct)
        if self._waiting > max(MERGE_AT, len(self._values)):
            self._merged()

    def _merged(self) -> tuple[Array, Ids]:
        values = np.concatenate([self._values, *(values for values, _ in self._pending)])
        counts = np.concatenate([self._counts, *(counts for _, counts in self._pending)])
        self._pending, self._waiting = [], 0
        self._values, place = np.unique(values, return_inverse=True)
        self._counts = np.zeros(len(self._values), np.int64)
        np.add.at(self._counts, place.reshape(-1), counts)
        if self._limit is not None and len(self._values) > self._limit:
            # Values at equal steps of rank are kept; each takes the count of the values it stands for.
            below = np.cumsum(self._counts)
            ranks = np.arange(1, self._limit + 1) * below[-1] // self._limit
            kept = np.unique(np.searchsorted(below, ranks))
            self._values, self._counts = self._values[kept], np.diff(below[kept], prepend=0)
        return self._values, self._counts


class IntFit(_Histogram):
    """Counts of integers; the arguments are those of `StringFit`."""

    def __init__(self, min_count: int, scratch: Path | None = None) -> None:
        super().__init__(np.int64)
        self._min_count = min_count
        self._spilled = None if scratch is None else SpilledCounts(scratch)

    def add(self, values: Array) -> None:
        """Count one chunk."""
        super().add(values)
        if self._spilled is not None and self._waiting + len(self._values) > HELD:
            self._merged()
            if len(self._values) > HELD // 2:
                self._spill(self._spilled)

    def table(self) -> IntVocabulary:
        """Return the values seen at least `min_count` times."""
        self._merged()
        kept = [self._kept()]
        if self._spilled is not None and self._spilled.path is not None:
            self._spill(self._spilled)
            kept = []
            for pieces in self._spilled.parts():
                self._pending = pieces
                self._merged()
                kept.append(self._kept())
                self._empty()
        keys, counts = (np.concatenate(part) for part in zip(*kept, strict=True))
        return IntVocabulary(keys[np.lexsort((keys, -counts))])

    def _kept(self) -> tuple[Array, Ids]:
        often = self._counts >= self._min_count
        return self._values[often], self._counts[often]

    def _spill(self, spilled: SpilledCounts) -> None:
        spilled.add(self._values, self._counts)
        self._empty()

    def _empty(self) -> None:
        self._values, self._counts = self._values[:0], self._counts[:0]


class QuantileFit(_Histogram):
    """Quantiles of a stream: exact up to `SKETCH_POINTS` distinct values, then of that many equal parts.

    Args:
        buckets: The most of them.
        nonzero: Zeros do not count, and have a bucket of their own beside the others.
    """

    def __init__(self, buckets: int, nonzero: bool = False) -> None:
        super().__init__(np.float64, SKETCH_POINTS)
        self._buckets, self._nonzero = buckets, nonzero
        self._zeros = 0

    def add(self, values: Array) -> None:
        """Count one chunk."""
        kept = values[values != 0] if self._nonzero else values
        self._zeros += len(values) - len(kept)
        super().add(kept)

    def table(self) -> QuantileTable:
        """Return the cuts at `1/buckets, 2/buckets, ...`; equal cuts merge, and none lies at the largest value."""
        values, counts = self._merged()
        if not len(values):
            return QuantileTable(values)
        below = np.cumsum(counts)
        ranks = np.arange(1, self._buckets) * below[-1] / self._buckets
        cuts = values[np.searchsorted(below, ranks)]
        largest = values[-1]
        if self._zeros:
            # A value on a cut is below it: 0 is alone between the largest negative value and itself.
            cuts = np.concatenate([cuts, values[values < 0][-1:], [0.0]])
            largest = max(largest, 0.0)
        cuts = np.unique(cuts)
        return QuantileTable(cuts[cuts < largest])


Table = IntVocabulary | StringVocabulary | HashTable | QuantileTable
Fit = IntFit | StringFit | HashTable | QuantileFit


def hash64(values: Array) -> Hashes:
    """Hash `[n]` values: splitmix64 of int64, or the first 8 little-endian bytes of blake2b of UTF-8 strings.

    Neither may ever change: the hashed ids of served models depend on them.
    """
    if values.dtype != np.object_:
        return _splitmix64(values.astype(np.int64).view(np.uint64))
    distinct = {value: _blake2b8(value) for value in set(values.tolist())}
    return np.fromiter(map(distinct.__getitem__, values), np.uint64, len(values))


def _splitmix64(x: Hashes) -> Hashes:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = x ^ (x >> np.uint64(31))
    return mixed


def _blake2b8(value: str) -> int:
    return int.from_bytes(blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def checked_array(arrays: Mapping[str, Array], name: str, dtype: type[np.generic]) -> Array:
    """Return an array of a file that is not trusted: of one dimension and a dtype, or a ValueError."""
    array = arrays.get(name)
    if array is None or array.ndim != 1 or array.dtype != dtype:
        got = "nothing" if array is None else f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"{name}: got {got}, wanted one dimension of {np.dtype(dtype)}")
    return array
