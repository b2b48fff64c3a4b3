"""Batches: every row once per epoch, in an order that depends only on the seed and resumes exactly."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lt4rec_sparse.recsys.data import Batch, BatchStream, DataError, Prepared
from lt4rec_sparse.recsys.data.memory import CACHE

# The function-scoped fixture sets a constant, the same for every example.
few_examples = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same(a: Batch, b: Batch) -> None:
    for left, right in zip(flat(a), flat(b), strict=True):
        assert torch.equal(left, right)


def flat(batch: Batch) -> list[torch.Tensor]:
    features = [batch.features.single, batch.features.multi_values, batch.features.multi_offsets]
    parts = (batch.labels, batch.rows, batch.weights, batch.slices, batch.values)
    return [*features, *(column for part in parts for column in part.values()), batch.groups]


def rows(batches: list[Batch]) -> list[tuple[object, ...]]:
    """Return every row as something comparable."""
    out: list[tuple[object, ...]] = []
    for batch in batches:
        values, offsets = batch.features.multi_values.tolist(), batch.features.multi_offsets.tolist()
        bags = [tuple(values[begin:end]) for begin, end in pairwise(offsets)]
        per_row = (bags[row :: batch.batch] for row in range(batch.batch))
        columns = [column.tolist() for column in flat(batch)[3:]]
        out += zip(map(tuple, batch.features.single.tolist()), map(tuple, per_row), *columns, strict=True)
    return out


def watched_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by every window read from disk."""
    read: list[int] = []
    original = BatchStream._decoded

    def watched(stream: BatchStream, window: int) -> Batch:
        read.append(window)
        return original(stream, window)

    monkeypatch.setattr(BatchStream, "_decoded", watched)
    return read


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lt4rec_sparse.recsys.data.batches.WINDOW_ROWS", 1_000)


def test_types_and_shapes(prepared: Prepared) -> None:
    batch = next(prepared.stream("train", 64).epoch(0))
    assert batch.batch == 64
    assert {tensor.shape[0] for tensor in (*batch.labels.values(), batch.groups, batch.features.single)} == {64}
    assert batch.features.single.dtype == batch.features.multi_values.dtype == batch.groups.dtype == torch.int64
    assert batch.labels.keys() == batch.rows.keys() == batch.weights.keys() == {"ctr", "cvr"}
    assert batch.labels["cvr"].dtype == batch.weights["cvr"].dtype == torch.float32
    assert batch.values.keys() == {"time_ms", "play_time_ms", "duration_ms", "truth_click", "truth_watch"}
    assert {(column.dtype, *column.shape) for column in batch.values.values()} == {(torch.float64, 64)}
    assert batch.rows["cvr"].dtype == batch.slices["tab_0"].dtype == torch.bool
    n_multi = sum(field.multi for field in prepared.encoder.fields)
    assert batch.features.multi_offsets.shape == (n_multi * 64 + 1,)


@pytest.mark.parametrize("batch_size", [7, 500, 10_000])
def test_epoch_is_a_permutation_of_all_rows(prepared: Prepared, batch_size: int) -> None:
    plain = list(prepared.stream("validation", batch_size, shuffle=False).epoch(0))
    shuffled = list(prepared.stream("validation", batch_size, seed=3).epoch(0))
    assert [batch.batch for batch in shuffled] == [batch.batch for batch in plain]
    assert all(batch.batch == batch_size for batch in shuffled[:-1])
    assert rows(plain) != rows(shuffled)
    assert sorted(rows(plain)) == sorted(rows(shuffled))
    assert sum(batch.batch for batch in plain) == prepared.counts["validation"]["rows"]


def test_order_depends_on_seed_and_epoch(prepared: Prepared) -> None:
    def first(seed: int, epoch: int) -> torch.Tensor:
        return next(prepared.stream("train", 256, seed).epoch(epoch)).groups

    assert torch.equal(first(1, 2), first(1, 2))
    assert not torch.equal(first(1, 2), first(1, 3))
    assert not torch.equal(first(1, 2), first(2, 2))


@few_examples
@given(batch_size=st.integers(50, 1_500), epoch=st.integers(0, 3), shuffle=st.booleans(), data=st.data())
def test_resumed_equals_uninterrupted(
    prepared: Prepared, batch_size: int, epoch: int, shuffle: bool, data: st.DataObject
) -> None:
    stream = prepared.stream("test", batch_size, seed=5, shuffle=shuffle)
    whole = list(stream.epoch(epoch))
    assert len(stream) == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    resumed = list(prepared.stream("test", batch_size, seed=5, shuffle=shuffle).epoch(epoch, start))
    assert len(resumed) == len(whole) - start
    for a, b in zip(resumed, whole[start:], strict=True):
        assert_same(a, b)


def test_resuming_reads_no_window_before_the_cursor(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, read = prepared.stream("train", 100), watched_reads(monkeypatch)
    list(stream.epoch(0, start=len(stream) - 1))
    assert len(read) == 1


def test_cache_holds_what_fits(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    read = watched_reads(monkeypatch)
    epochs = []
    for cache_bytes, times_read in ((0, 2), (1 << 30, 1)):
        read.clear()
        monkeypatch.setenv(CACHE, str(cache_bytes))
        stream = prepared.stream("train", 100, shuffle=False)
        epochs += [list(stream.epoch(0)) for _ in range(2)]
        assert all(read.count(window) == times_read for window in set(read))
    for batches in zip(*epochs, strict=True):
        for batch in batches[1:]:
            assert_same(batch, batches[0])


def test_all_streams_of_a_process_share_the_memory_of_caches(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lt4rec_sparse.recsys.data.batches._STREAMS", WeakSet[BatchStream]())
    monkeypatch.setenv(CACHE, str(1 << 30))
    first = prepared.stream("validation", 100)
    list(first.epoch(0))
    held = sum(window.nbytes for window in first._cache.values())
    monkeypatch.setenv(CACHE, str(int(held * 1.5)))
    second = prepared.stream("validation", 100)
    list(second.epoch(0))
    assert len(first._cache) == len(first._windows) > len(second._cache)
    assert sum(window.nbytes for window in second._cache.values()) <= held / 2
    monkeypatch.setenv(CACHE, str(held))
    del first
    list(second.epoch(0))
    assert len(second._cache) == len(second._windows)


def test_taking_slices_and_joining_batches(prepared: Prepared) -> None:
    batch = next(prepared.stream("train", 50).epoch(0))
    parts = [batch.take(torch.arange(0, 20)), batch.take(torch.arange(20, 50))]
    assert_same(Batch.cat(parts), batch)


@pytest.mark.parametrize("damage", ["cut", "empty", "absent", "zeros within", "twice"])
def test_a_damaged_part_is_named(prepared: Prepared, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(prepared.folder, tmp_path / "out")
    part = sorted((folder / "train").iterdir())[0]
    content = part.read_bytes()
    if damage == "absent":
        part.unlink()
    elif damage == "twice":
        part.with_name("part-99999.parquet").write_bytes(content)
    else:
        changed = {"cut": content[:-100], "empty": b"", "zeros within": content[:200] + bytes(2_000) + content[2_200:]}
        part.write_bytes(changed[damage])
    with pytest.raises(
        DataError, match=r"out: got \d+ rows in train|part-00000\.parquet: got a damaged file"
    ) as caught:
        list(Prepared.load(folder).stream("train", 100).epoch(0))
    assert "\n" not in str(caught.value)


def test_wrong_arguments(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: got 0"):
        prepared.stream("train", 0)
    with pytest.raises(ValueError, match="split: got 'dev', wanted one of train, validation, test"):
        prepared.stream("dev", 1)
