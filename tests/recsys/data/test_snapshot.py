"""A request through the feature store has the features that `candidates` makes of it, and so the same scores."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lt4rec_sparse import MaskedMLP, Ranker, freeze
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.ranker.store import FeatureStore, write_features
from lt4rec_sparse.recsys.data import (
    DataError,
    Prepared,
    complete_requests,
    open_source,
    prepare,
    read_candidates,
    take_snapshot,
)
from lt4rec_sparse.recsys.data.source import Source

Make = Callable[..., tuple[Path, Schema]]


def store_of(source: Source, at: str | None, folder: Path) -> FeatureStore:
    with tempfile.TemporaryDirectory() as scratch:
        taken = take_snapshot(source, at, Path(scratch))
    write_features(folder / "features.safetensors", source.schema, taken.tables, taken.day)
    return FeatureStore.open(folder / "features.safetensors", source.schema)


def features_of(source: Source, requests: dict[str, Any], at: str, folder: Path) -> dict[str, Any]:
    pq.write_table(pa.table(requests), folder / "requests.parquet")
    with tempfile.TemporaryDirectory() as scratch:
        made = complete_requests(source, folder / "requests.parquet", at, Path(scratch))
    pq.write_table(made.table, folder / "candidates.parquet")
    return read_candidates(folder / "candidates.parquet", source.schema)[0]


def ranker_of(prepared: Prepared) -> Ranker:
    torch.manual_seed(0)
    encoder = prepared.encoder
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, dim=4, std=1.0)
    return Ranker(encoder, inputs, freeze(MaskedMLP(inputs.out_features, (32, 16), tasks=("ctr", "cvr")), sigmoid=True))


def assert_ranked_as_scored(source: Source, prepared: Prepared, at: str, folder: Path, common: dict[str, int]) -> None:
    """Rank requests of known and unknown ids by the store, and score the candidates that are made of them."""
    ranker, store = ranker_of(prepared), store_of(source, at, folder)
    (user,), (item,) = [source.schema.group.column], [join.on for join in source.schema.joins[1:]]
    users, items = (np.sort(table.keys) for table in keys_of(source))
    rng = np.random.default_rng(0)
    for who in (*rng.choice(users, 5).tolist(), -1):
        ids = np.concatenate([rng.choice(items, 40), [-1]])
        own = {"duration_ms": rng.integers(1_000, 90_000, len(ids))}
        repeated = {name: [value] * len(ids) for name, value in ({user: who} | common).items()}
        scores = ranker.score(features_of(source, {item: ids, **own, **repeated}, at, folder))
        context = {name: [value] for name, value in ({user: who} | common).items()}
        ranked = ranker.rank(*store.complete({item: ids, **own}, context))
        for task, of_task in ranked.scores.items():
            assert np.array_equal(of_task, scores[task][ranked.rows])


def keys_of(source: Source) -> list[Any]:
    with tempfile.TemporaryDirectory() as scratch:
        return list(take_snapshot(source, None, Path(scratch)).tables[:2])


@pytest.mark.parametrize("day", [-1, 0, 1, 4, 6, 90])
def test_a_ranked_request_has_the_scores_of_its_candidates(
    simulated: Path, prepared: Prepared, tmp_path: Path, day: int
) -> None:
    """Before the log, on its first days, its last, and after it."""
    at = str(np.datetime64("2024-01-01") + day)
    assert_ranked_as_scored(open_source(simulated), prepared, at, tmp_path, {"hour": 20, "tab": 1})


def test_a_ranked_request_of_kuairand_has_the_scores_of_its_candidates(kuairand: Path, tmp_path: Path) -> None:
    prepared = prepare(kuairand, tmp_path / "out")
    common = {"tab": 1, "hourmin": 1900}
    assert_ranked_as_scored(open_source(kuairand), prepared, "20220508", tmp_path, common)


@pytest.mark.parametrize(
    ("first", "last", "after"),
    [
        ("2024-02-28", "2024-02-29", "2024-03-01"),
        ("20231230", "20231231", "20240101"),
        ("9", "10", "11"),
    ],
)
def test_features_are_by_default_for_the_day_after_the_log(
    make: Make, log: dict[str, list[Any]], tmp_path: Path, first: str, last: str, after: str
) -> None:
    source = open_source(*make(log | {"day": [first] * 3 + [last] * 3}))
    store = store_of(source, None, tmp_path)
    assert store.day == after
    _, context = store.complete({}, {"user": [1]})
    assert context["past_count"].tolist() == [3.0]
    with (
        tempfile.TemporaryDirectory() as scratch,
        pytest.raises(DataError, match="--at: got day 'soon', wanted one in"),
    ):
        take_snapshot(source, "soon", Path(scratch))


def test_days_that_are_no_dates_need_one(make: Make, log: dict[str, list[Any]], tmp_path: Path) -> None:
    source = open_source(*make(log | {"day": ["d1", "d1", "d1", "d2", "d2", "d2"]}))
    with pytest.raises(DataError, match="--at: got nothing, wanted a day: the log's last, 'd2', is no date"):
        store_of(source, None, tmp_path)
    assert store_of(source, "d3", tmp_path).day == "d3"


def test_text_groups_are_found_by_their_hash(make: Make, log: dict[str, list[Any]], tmp_path: Path) -> None:
    named = log | {"user": [f"u{user}" for user in log["user"]]}
    users = {"user": ["u1", "u2"], "town": ["Ulm", None]}
    group, joins = {"column": "user", "type": "string"}, [{"files": ["users.*"], "on": "user", "type": "string"}]
    source = open_source(*make(named, users, group=group, joins=joins))
    store = store_of(source, "3", tmp_path)
    _, context = store.complete({}, {"user": ["u1"]})
    assert context["past_count"].tolist() == [2.0] and context["town"].tolist() == ["Ulm"]
    assert context["past_video"][0].tolist() == [1, 2]
    assert store.complete({}, {"user": ["u9"]})[1]["past_count"].tolist() == [0.0]


def test_a_column_of_the_log_is_in_no_table_and_a_request_brings_it(make: Make, tmp_path: Path) -> None:
    """Training takes the log's; a column of that name in a side table differs."""
    source = open_source(*make(users={"user": [1, 2], "town": ["Ulm", None], "length": [77.0, 88.0]}))
    store = store_of(source, "3", tmp_path)
    assert "length" in store.absent and store.columns["town"] == "user"
    _, context = store.complete({}, {"user": [1]})
    assert "length" not in context and context["town"].tolist() == ["Ulm"]


def test_a_history_of_a_column_that_is_nowhere_is_refused(
    make: Make, log: dict[str, list[Any]], tmp_path: Path
) -> None:
    source = open_source(*make({name: values for name, values in log.items() if name != "tags"}))
    with pytest.raises(DataError, match=r"column 'tags' is absent, wanted it in one of log\.csv, users\.csv"):
        store_of(source, "3", tmp_path)


def test_a_model_whose_features_are_all_of_the_log_has_none_to_store(make: Make, tmp_path: Path) -> None:
    columns = [{"name": "video", "type": "int"}]
    for joins in ([], [{"files": ["users.*"], "on": "user"}]):
        source = open_source(*make(columns=columns, joins=joins, histories=[], slices=[]))
        with pytest.raises(DataError, match="schema 'small': got no feature that is found by a key, wanted a model"):
            store_of(source, "3", tmp_path)
    assert not [*tmp_path.glob("features*")]


def test_a_day_that_is_none_of_the_logs_form_is_refused_without_histories(make: Make, tmp_path: Path) -> None:
    source = open_source(*make(histories=[]))
    with pytest.raises(DataError, match="--at: got day 'foo', wanted one in the form of the log's days, such as 3"):
        store_of(source, "foo", tmp_path)
    assert store_of(source, "7", tmp_path).day == "7"


def test_a_snapshot_names_its_features_by_key_as_the_store_does(make: Make, tmp_path: Path) -> None:
    source = open_source(*make())
    with tempfile.TemporaryDirectory() as scratch:
        taken = take_snapshot(source, "3", Path(scratch))
    assert list(taken.columns.items()) == list(store_of(source, "3", tmp_path).columns.items())
