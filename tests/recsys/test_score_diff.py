"""How far scores are apart: against definitions row by row, and the same through a file and through a log."""

from dataclasses import replace
from functools import partial

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse import MaskedMLP, freeze
from lt4rec_sparse.cli_diff import _scores
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker import Ranker, save
from lt4rec_sparse.ranker.features import Column, FeatureEncoder, Join
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.data import complete_requests, open_source
from lt4rec_sparse.recsys.score_diff import _spearman, _top_overlap, compare_file, compare_log

SCORES = st.sampled_from([0.0, 0.25, 0.5, 0.75])  # with ties
ROWS = st.lists(st.tuples(SCORES, SCORES, st.integers(0, 3)), min_size=2, max_size=30)


def ranker_of(encoder, seed, tasks=("ctr", "cvr")):
    torch.manual_seed(seed)
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, dim=4)
    return Ranker(encoder, inputs, freeze(MaskedMLP(inputs.out_features, (8,), tasks=tasks), sigmoid=True))


@given(ROWS)
def test_rank_correlation_is_that_of_mean_ranks(rows):
    a, b, _ = (np.array(column) for column in zip(*rows, strict=True))

    def rank(values):
        return [
            sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values
        ]

    got = _spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert got is None
    else:
        assert got == pytest.approx(np.corrcoef(rank(a), rank(b))[0, 1], abs=1e-12)


@given(ROWS, st.integers(1, 4))
def test_top_overlap_is_the_mean_over_groups_of_shared_first_rows(rows, k):
    a, b, groups = (np.array(column) for column in zip(*rows, strict=True))
    shares = []
    for group in set(groups.tolist()):
        of_group = np.flatnonzero(groups == group)
        if len(of_group) > k:
            first = [set(sorted(of_group, key=lambda row: -scores[row])[:k]) for scores in (a, b)]
            shares.append(len(first[0] & first[1]) / k)
    got = _top_overlap(a, b, groups, k)
    assert got == (pytest.approx(np.mean(shares), abs=1e-12) if shares else None)


@given(st.lists(st.integers(0, 99), min_size=2, max_size=20, unique=True).map(partial(np.array, dtype=float)))
def test_equal_and_reversed_orders(scores):
    groups = np.zeros(len(scores), np.int64)
    assert _spearman(scores, scores**3 + 1) == pytest.approx(1)
    assert _spearman(scores, -scores) == pytest.approx(-1)
    assert _top_overlap(scores, scores, groups, 1) == 1


def requests_of(folder, day, path):
    """Write the distinct rows of a day in their order, without what was known only afterwards."""
    rows = pq.read_table(folder / "log" / f"{day}.parquet").to_pylist()
    distinct = {tuple(row.items()): row for row in rows}.values()
    late = ("is_click", "long_view", "play_time_ms", "truth_click", "truth_watch")
    known = [{name: value for name, value in row.items() if name not in late} for row in distinct]
    pq.write_table(pa.Table.from_pylist(sorted(known, key=lambda row: row["time_ms"])), path)
    return path


def test_a_file_and_the_log_it_was_made_of_give_the_same(small_log, small_folder, tmp_path):
    a, b = ranker_of(small_log.encoder, 0), ranker_of(small_log.encoder, 1)
    for name in ("scratch", "other"):
        (tmp_path / name).mkdir()
    of_log = compare_log(a, b, small_folder, tmp_path / "scratch", "2024-01-06", k=3)
    assert of_log.rows > 100 and of_log.groups > 0 and of_log.k == 3
    asked = requests_of(small_folder, "2024-01-06", tmp_path / "requests.parquet")
    made = complete_requests(open_source(small_folder, small_log.schema), asked, None, tmp_path / "other")
    pq.write_table(made.table, tmp_path / "candidates.parquet")
    assert compare_file(a, b, tmp_path / "candidates.parquet", k=3) == of_log
    same = compare_file(a, a, tmp_path / "candidates.parquet", k=3)
    for scores in same.tasks.values():
        assert (scores.mean, scores.largest, scores.top) == (0, 0, 1)
        assert scores.rank_correlation == pytest.approx(1)


def test_models_of_two_schemas_are_compared_by_their_own_features(small_log, small_folder, tmp_path):
    schema = replace(small_log.schema, columns=small_log.schema.columns[1:], context=(), histories=())
    other = FeatureEncoder.fit(schema, [{c.name: [] for c in schema.features}])
    a, b = ranker_of(small_log.encoder, 0), ranker_of(other, 0, ("cvr", "ctr"))
    found = compare_log(a, b, small_folder, tmp_path, "2024-01-06")
    assert list(found.tasks) == ["ctr", "cvr"] and found.rows > 100
    assert all(0 < scores.mean <= scores.largest for scores in found.tasks.values())


def test_what_cannot_be_compared_is_refused(small_log, small_folder, tmp_path):
    a, b = ranker_of(small_log.encoder, 0), ranker_of(small_log.encoder, 0, ("buy",))
    with pytest.raises(InputError, match="tasks: got ctr, cvr and buy, wanted one that both have"):
        compare_log(a, b, small_folder, tmp_path)
    with pytest.raises(InputError, match="top_k: got 0, wanted at least 1"):
        compare_log(a, a, small_folder, tmp_path, k=0)


@pytest.mark.parametrize(
    ("part", "change", "days", "message"),
    [
        (
            "time",
            {"order": "play_time_ms"},
            "2024-01-06",
            r"time.order: got .* in A's schema and 'play_time_ms' in B's",
        ),
        ("split", {"validation_days": 1}, "test", r"split.validation_days: got 2 in A's schema and 1 in B's, wanted"),
        (None, {"duplicates": "keep"}, "test", r"duplicates: got 'drop' in A's schema and 'keep' in B's, wanted"),
        (None, {"group": None, "histories": ()}, "test", r"group: got Group\(.* in A's schema and None in B's, wanted"),
    ],
)
def test_schemas_of_other_rows_are_refused_before_a_log_is_read(small_log, tmp_path, part, change, days, message):
    schema = small_log.schema
    other = replace(schema, **(change if part is None else {part: replace(getattr(schema, part), **change)}))
    b = ranker_of(FeatureEncoder.fit(other, [{c.name: [] for c in other.features}]), 0)
    with pytest.raises(InputError, match=message):
        compare_log(ranker_of(small_log.encoder, 0), b, tmp_path / "absent", tmp_path, days)


def test_another_split_of_named_days_is_compared(small_log, small_folder, tmp_path):
    other = replace(small_log.schema, split=replace(small_log.schema.split, validation_days=1))
    encoder = FeatureEncoder(other, {n: small_log.encoder.table(n) for n in small_log.encoder.table_sizes})
    a, b = ranker_of(small_log.encoder, 0), ranker_of(encoder, 0)
    found = compare_log(a, b, small_folder, tmp_path, "2024-01-06")
    assert {scores.largest for scores in found.tasks.values()} == {0}


def test_side_tables_of_both_schemas_are_copied_from_a_url(small_log, small_folder, tmp_path):
    system = fsspec.filesystem("memory")
    for path in small_folder.rglob("*.parquet"):
        system.pipe_file(f"/bucket/two/{path.relative_to(small_folder)}", path.read_bytes())
    system.pipe_file("/bucket/two/shops.csv", b"user_id,shop\n1,2\n")
    schema = small_log.schema
    other = replace(
        schema,
        columns=(*schema.columns, Column("shop", "single")),
        joins=(*schema.joins, Join(("shops.csv",), "user_id")),
    )
    b = FeatureEncoder.fit(other, [{c.name: [] for c in other.features}])
    save(ranker_of(small_log.encoder, 0), tmp_path / "a.safetensors")
    save(ranker_of(b, 0), tmp_path / "b.safetensors")
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for pair in (paths, paths[::-1]):
        found = _scores(*pair, None, "memory://bucket/two", "2024-01-06", 10, lambda *_: None)
        assert found is not None and found.rows > 100
    system.rm("/bucket/two", recursive=True)
