"""Schema, tables and encoder: what is learnt from training, what an id means, and that serving encodes as training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rankers import NA

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import Column, EncodedFeatures, FeatureEncoder, Schema, SchemaError
from lt4rec_sparse.ranker.features import tables as id_tables
from lt4rec_sparse.ranker.features.raw import bags, single
from lt4rec_sparse.ranker.features.tables import (
    IntFit,
    IntVocabulary,
    QuantileFit,
    QuantileTable,
    StringFit,
    StringVocabulary,
    hash64,
)


def schema_dict(**changes: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "files": {"log": ["*.csv"]},
        "time": {"day": "date"},
        "group": {"column": "user"},
        "columns": [
            {"name": "video", "type": "int", "min_count": 2},
            {"name": "price", "kind": "dense", "buckets": 4},
            {"name": "colour"},
            {"name": "tags", "kind": "multi"},
            {"name": "seen", "kind": "multi", "type": "int", "table": "video", "min_count": 2},
            {"name": "shop", "encoding": "hash", "size": 11},
        ],
        "tasks": [
            {"name": "ctr", "kind": "binary", "label": "click"},
            {"name": "cvr", "kind": "ratio", "label": "play", "divide_by": "length", "rows": ["click"]},
        ],
        **changes,
    }


SCHEMA = Schema.from_dict(schema_dict())
SLICE = {"name": "part", "column": "tab", "value": 0}
ROW = st.fixed_dictionaries(
    {
        "video": st.one_of(st.none(), st.integers(-5, 5), st.sampled_from([2**62, -(2**62)])),
        "price": st.one_of(st.none(), st.floats(-3, 3), st.just(float("nan"))),
        "colour": st.one_of(st.none(), st.sampled_from(["red", "green", "", "grün"])),
        "tags": st.one_of(st.none(), st.lists(st.sampled_from(["a", "b", "c"]), max_size=3)),
        "seen": st.lists(st.integers(-5, 5), max_size=4),
        "shop": st.text(max_size=3),
    }
)
ROWS = st.lists(ROW, min_size=1, max_size=12)


class Series:
    """A column of a data frame, of no type that numpy knows."""

    def __init__(self, values: list[Any]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def to_list(self) -> list[Any]:
        return self._values


@pytest.mark.parametrize("as_column", [list, Series, lambda values: np.array(values, object)])
def test_the_na_of_data_frames_is_a_missing_value(as_column: Any) -> None:
    encoder = FeatureEncoder.fit(SCHEMA, [NA_ROWS])
    one, other = (
        encoder.encode({name: as_column([*values, missing]) for name, values in NA_ROWS.items()})
        for missing in (NA, None)
    )
    for part in ("single", "multi_values", "multi_offsets"):
        assert torch.equal(getattr(one, part), getattr(other, part))


NA_ROWS: dict[str, list[Any]] = {
    "video": [1, 1, 2],
    "price": [1.5, 2.5, 3.5],
    "colour": ["red", "red", "green"],
    "tags": ["a,b", "b", "a"],
    "seen": ["1,2", "2", "1"],
    "shop": ["x", "y", "z"],
}


def test_na_within_a_list_is_left_out_and_other_values_are_still_refused() -> None:
    column = Column("tags", "multi")
    values, offsets = bags(column, [["a", NA], NA, [NA, "b"]])
    assert (values.tolist(), offsets.tolist()) == (["a", "b"], [0, 1, 1, 2])
    for wrong in (np.array([1, 2]), object()):  # whose comparison is no bool, or one
        with pytest.raises(InputError, match=r"column 'town': got .*, wanted str"):
            single(Column("town"), ["Ulm", wrong])


def columns_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: [row[name] for row in rows] for name in ROW_NAMES}


ROW_NAMES = [column.name for column in SCHEMA.features]


def assert_same(a: EncodedFeatures, b: EncodedFeatures) -> None:
    assert torch.equal(a.single, b.single)
    assert torch.equal(a.multi_values, b.multi_values)
    assert torch.equal(a.multi_offsets, b.multi_offsets)


def bag(features: EncodedFeatures, field: int, row: int) -> list[int]:
    first = field * features.batch + row
    begin, end = features.multi_offsets[first : first + 2].tolist()
    return features.multi_values[begin:end].tolist()


def encoder(**raw: Any) -> FeatureEncoder:
    """An encoder of one int column, fitted on the given values."""
    columns = [{"name": name, "type": "int"} for name in raw]
    return FeatureEncoder.fit(Schema.from_dict(schema_dict(columns=columns)), [raw])


# The schema


def test_schema_survives_json() -> None:
    assert Schema.from_dict(json.loads(json.dumps(SCHEMA.to_dict()))) == SCHEMA


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), st.integers(1, 9))
def test_schema_survives_toml(text: str, number: int) -> None:
    columns = [{"name": text, "separator": text}, {"name": "other", "kind": "dense", "buckets": number + 1}]
    schema = Schema.from_dict(schema_dict(columns=columns, carried=[text], slices=[{**SLICE, "value": number}]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "schema.toml"
        path.write_bytes(schema.to_toml().encode())
        assert Schema.from_toml(path) == schema


def test_schema_written_before_columns_were_carried_and_tasks_extra() -> None:
    older = SCHEMA.to_dict()
    del older["carried"]
    for task in older["tasks"]:
        del task["extra"]
    assert Schema.from_dict(older) == SCHEMA


def test_a_carried_outcome_is_no_feature_and_must_be_none() -> None:
    carried = Schema.from_dict(schema_dict(carried=["play", "price", "length"]))
    assert carried.features == SCHEMA.features
    columns = [{"name": "play", "kind": "dense"}]
    with pytest.raises(SchemaError, match="column 'play': 'play' is an outcome"):
        Schema.from_dict(schema_dict(columns=columns, carried=["play"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "schema 'test': key 'colour' is unknown, wanted one of name, files"),
        ({"time": {"day": "date", "timestamp": "t"}}, "got day='date' and timestamp='t', wanted exactly one"),
        ({"columns": [{"name": "a", "kind": "dens"}]}, r"columns\[0\] 'a': kind: got 'dens', wanted one of 'single'"),
        ({"columns": [{"name": "a", "min_count": "2"}]}, r"'a': min_count: got '2', wanted int"),
        ({"columns": [{"name": "a", "min_count": True}]}, r"'a': min_count: got True, wanted int"),
        ({"columns": [{"kind": "multi"}]}, r"columns\[0\]: key 'name' is absent"),
        ({"columns": [{"name": "a"}, {"name": "a"}]}, "column 'a': declared twice"),
        ({"columns": "a"}, "columns: got 'a', wanted a list"),
        ({"columns": []}, "got 0 columns and 2 tasks"),
        ({"columns": [{"name": "a", "encoding": "hash"}]}, "column 'a': got hash of kind='single', size=0"),
        ({"columns": [{"name": "a", "size": 3}]}, "column 'a': got size=3 with a vocabulary"),
        (
            {"columns": [{"name": "a", "encoding": "buckets"}]},
            "got encoding='buckets' of kind='single', wanted",
        ),
        (
            {"columns": [{"name": "a", "kind": "dense", "encoding": "number"}]},
            "column.*'a': encoding: got 'number', wanted one of .*'standardised', 'log'",
        ),
        ({"columns": [{"name": "a"}, {"name": "b", "table": "a", "type": "int"}]}, "table 'a': 'a' and 'b' differ"),
        (
            {"columns": [{"name": "a", "kind": "dense"}, {"name": "b", "table": "a", "kind": "dense"}]},
            "table 'a': 'a' and 'b' differ",
        ),
        ({"columns": [{"name": "click"}]}, "column 'click': 'click' is an outcome"),
        ({"columns": [{"name": "play", "kind": "dense"}]}, "column 'play': 'play' is an outcome"),
        ({"columns": [{"name": "like"}], "outcomes": ["like"]}, "column 'like': 'like' is an outcome"),
        ({"derived": [{"name": "age", "days_since": "click"}]}, "column 'age': 'click' is an outcome"),
        ({"histories": [{"name": "h", "when": "click", "columns": ["price"]}]}, "history 'h': got column 'price'"),
        (
            {"histories": [{"name": "h", "when": "click", "columns": ["video"], "length": 0}]},
            "history 'h': got length=0",
        ),
        (
            {"histories": [{"name": "h", "when": "click", "columns": ["video"], "length": 2**62}]},
            "history 'h': got length=4611686018427387904, wanted 1 to 65536",
        ),
        ({"tasks": [{"name": "t", "kind": "binary", "label": "l", "divide_by": "d"}]}, "task 't': got divide_by='d'"),
        ({"tasks": [{"name": "t", "kind": "binary", "label": "l", "extra": True}]}, "got extra tasks only"),
        ({"carried": ["play", "click", "play"]}, "carried: got 'play' twice"),
        ({"columns": [{"name": "a", "encoding": "hash", "size": 2**31}]}, "size=2147483648, wanted .* 2 to 2147483647"),
        ({"columns": [{"name": "a", "encoding": "hash", "size": 2**62}]}, "column 'a': got hash of .* size=4611"),
        ({"columns": [{"name": "a", "kind": "dense", "buckets": 2**62}]}, "column 'a': got min_count=1, buckets=46116"),
        ({"columns": [{"name": "a", "size": 10**4000}]}, r"column 'a': got size=10+\.\.\. with a vocabulary"),
        ({"time": {"day": "date", "utc_offset_hours": 10**9}}, "got utc_offset_hours=1000000000, wanted -23 to 23"),
        ({"split": {"test_days": 0}}, "got test_days=0, validation_days=2"),
        ({"split": {"train": ["1"]}}, "wanted all three or none"),
        ({"split": {"train": ["1"], "validation": ["2"], "test": ["1"]}}, "day '1' is listed twice"),
        ({"slices": [{"name": "s", "column": "tab", "value": 0.5}]}, "value: got 0.5, wanted int or str"),
    ],
)
def test_schema_error_names_place_got_and_wanted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message) as caught:
        Schema.from_dict(schema_dict(**changes))
    assert "\n" not in str(caught.value)


def test_toml_error_names_the_file(tmp_path: Any) -> None:
    path = tmp_path / "schema.toml"
    path.write_text("name = 'x'\nname = 'y'")
    with pytest.raises(SchemaError, match=r"schema\.toml"):
        Schema.from_toml(path)
    path.write_text("nam = 'x'")
    with pytest.raises(SchemaError, match=r"schema\.toml: schema: key 'nam' is unknown"):
        Schema.from_toml(path)


@pytest.mark.parametrize(
    "text", ["name = " + "[" * 100_000, "name = " + "[" * 200 + "]" * 200, ".".join(["name"] * 2_000) + " = 1"]
)
def test_toml_that_is_nested_too_deeply_is_one_line(tmp_path: Any, text: str) -> None:
    path = tmp_path / "schema.toml"
    path.write_text(text)
    with pytest.raises(SchemaError, match=r"schema\.toml: .*nested too deeply, wanted") as caught:
        Schema.from_toml(path)
    assert "\n" not in str(caught.value)


def test_divisor_may_be_a_feature() -> None:
    columns = [{"name": "length", "kind": "dense"}]
    assert Schema.from_dict(schema_dict(columns=columns)).features[0].name == "length"


def test_history_columns_share_the_table_of_their_column() -> None:
    histories = [{"name": "past", "when": "click", "columns": ["video", "tags"]}]
    features = {column.name: column for column in Schema.from_dict(schema_dict(histories=histories)).features}
    assert features["past_video"] == Column("past_video", "multi", "int", "video", min_count=2)
    assert features["past_tags"].table == "tags"


# Fitting


def test_ids_are_missing_unseen_then_by_count_then_value() -> None:
    fitted = encoder(video=[7, 7, 5, 3, 5, 9, None])
    ids = fitted.encode({"video": [None, 100, 5, 7, 3, 9]}).single[:, 0]
    assert ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert fitted.table_sizes == {"video": 6}


def test_strings_order_as_integers_do() -> None:
    columns = [{"name": "colour"}]
    fitted = FeatureEncoder.fit(Schema.from_dict(schema_dict(columns=columns)), [{"colour": ["b", "c", "a", "c"]}])
    assert fitted.encode({"colour": ["c", "a", "b", "x", None]}).single[:, 0].tolist() == [2, 3, 4, 1, 0]


def test_shared_table_counts_all_its_columns() -> None:
    chunk = columns_of([{"video": 1, "price": 1.0, "colour": "a", "tags": [], "seen": [2, 1], "shop": "s"}])
    fitted = FeatureEncoder.fit(SCHEMA, [chunk])
    # Video 1 is seen once as a video and once as a past video, which makes two; video 2 only once.
    assert fitted.table_sizes["video"] == 3
    ids = fitted.encode(
        columns_of([{"video": 1, "price": 1.0, "colour": "a", "tags": [], "seen": [1, 2], "shop": "s"}])
    )
    assert ids.single[0, 0].item() == 2
    assert bag(ids, 1, 0) == [2, 1]


@given(ROWS, ROWS)
def test_fit_does_not_depend_on_chunks(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    whole = FeatureEncoder.fit(SCHEMA, [columns_of(first + second)]).to_arrays()[0]
    parts = FeatureEncoder.fit(SCHEMA, [columns_of(first), columns_of(second)]).to_arrays()[0]
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


@given(ROWS, ROWS)
def test_ids_are_in_their_table(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> None:
    fitted = FeatureEncoder.fit(SCHEMA, [columns_of(train)])
    encoded = fitted.encode(columns_of(test))
    single = [field for field in fitted.fields if not field.multi]
    for place, field in enumerate(single):
        assert 0 <= encoded.single[:, place].min() <= encoded.single[:, place].max() < fitted.table_sizes[field.table]
    for place, field in enumerate(field for field in fitted.fields if field.multi):
        for row in range(encoded.batch):
            assert all(1 <= value < fitted.table_sizes[field.table] for value in bag(encoded, place, row))


@given(ROWS, ROWS)
def test_values_unseen_in_training_have_the_unseen_id(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> None:
    encoded = FeatureEncoder.fit(SCHEMA, [columns_of(train)]).encode(columns_of(test))
    colours = {row["colour"] for row in train}
    for row, colour in enumerate(row["colour"] for row in test):
        assert (encoded.single[row, 2] == 0) == (colour is None)
        assert (encoded.single[row, 2] == 1) == (colour is not None and colour not in colours)


def test_dense_buckets_are_quantiles_and_a_tie_has_its_own() -> None:
    fit = QuantileFit(buckets=4)
    fit.add(np.array([0.0] * 60 + [1.0] * 20 + [2.0, 3.0] * 10))
    table = fit.table()
    assert table.cuts.tolist() == [0.0, 1.0]
    assert table.lookup(np.array([-np.inf, 0, 0.5, 1, 2, np.inf])).tolist() == [1, 1, 2, 2, 3, 3]


@given(st.lists(st.integers(-3, 3) | st.floats(-2, 2), max_size=30), st.integers(2, 5))
def test_zero_is_alone_where_it_does_not_count(values: list[float], buckets: int) -> None:
    """Other values are cut as without the zeros, but for the two cuts about 0."""
    all_values, nonzero = np.array(values, np.float64), np.array([v for v in values if v], np.float64)
    fits = QuantileFit(buckets, nonzero=True), QuantileFit(buckets)
    fits[0].add(all_values)
    fits[1].add(nonzero)
    table, plain = (fit.table() for fit in fits)
    about_zero = {0.0, nonzero[nonzero < 0].max(initial=-np.inf)}
    assert set(plain.cuts) <= set(table.cuts) <= {*plain.cuts, *about_zero}
    if 0 in values:
        zero, ids = table.lookup(np.zeros(1))[0], table.lookup(nonzero)
        assert (ids != zero).all() and (ids[nonzero > 0] > zero).all()
    else:
        assert table.cuts.tolist() == plain.cuts.tolist()


def test_a_column_that_is_mostly_zero_has_buckets_for_the_rest() -> None:
    amounts = {"price": [0.0] * 97 + [1.0, 2.0, 3.0]}
    cuts = {}
    for encoding in ("buckets", "nonzero_buckets"):
        columns = [{"name": "price", "kind": "dense", "buckets": 4, "encoding": encoding}]
        fitted = FeatureEncoder.fit(Schema.from_dict(schema_dict(columns=columns)), [amounts])
        cuts[encoding] = fitted.to_arrays()[0]["price.cuts"].tolist()
        meta = json.loads(json.dumps(fitted.to_arrays()[1]))
        assert FeatureEncoder.from_arrays(fitted.to_arrays()[0], meta).schema == fitted.schema
    assert cuts == {"buckets": [0.0], "nonzero_buckets": [0.0, 1.0, 2.0]}


def test_dense_column_of_missing_values_only() -> None:
    columns = [{"name": "price", "kind": "dense"}]
    fitted = FeatureEncoder.fit(Schema.from_dict(schema_dict(columns=columns)), [{"price": [None, float("nan")]}])
    assert fitted.encode({"price": [1.0, None]}).single[:, 0].tolist() == [1, 0]


def test_quantile_sketch_keeps_ranks_of_more_values_than_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lt4rec_sparse.ranker.features.tables.MERGE_AT", 1 << 12)
    values = np.random.default_rng(0).permutation(1 << 18) / (1 << 18)
    fit = QuantileFit(buckets=8)
    for chunk in np.split(values, 64):
        fit.add(chunk)
    assert np.abs(fit.table().cuts - np.arange(1, 8) / 8).max() < 1e-4


def test_int_counts_merge_across_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lt4rec_sparse.ranker.features.tables.MERGE_AT", 3)
    fit = IntFit(min_count=2)
    for values in ([1, 2, 3], [3, 4, 4], [5, 3], [1]):
        fit.add(np.array(values))
    assert fit.table().keys.tolist() == [3, 1, 4]


# The hash, fixed for ever


def test_hash_is_pinned() -> None:
    # The first is splitmix64's published first output for seed 0.
    integers = hash64(np.array([0, 1, -1, 2**62], np.int64)).tolist()
    assert integers == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1, 0xE4D971771B652C20, 0x00AA50EA8E0FA9EB]
    strings = hash64(np.array(["", "a", "grün"], object)).tolist()
    assert strings == [0xB4B2797457A0A6E4, 0x2F42665B399EF840, 0x0F69A4364A07E9E9]


def test_hash_is_the_same_in_another_process() -> None:
    load = "import numpy as np; from lt4rec_sparse.ranker.features.tables import hash64"
    code = f"{load}; print(hash64(np.array(['a'], object))[0])"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert int(run.stdout) == hash64(np.array(["a"], object))[0]


# Encoding


@given(ROWS, ROWS)
def test_batch_equals_row_by_row(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> None:
    fitted = FeatureEncoder.fit(SCHEMA, [columns_of(train)])
    rows = [fitted.encode(columns_of([row])) for row in test]
    assert_same(fitted.encode(columns_of(test)), EncodedFeatures.cat(rows))


@given(ROWS, ROWS)
def test_arrays_restore_the_encoder(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> None:
    fitted = FeatureEncoder.fit(SCHEMA, [columns_of(train)])
    arrays, meta = fitted.to_arrays()
    restored = FeatureEncoder.from_arrays(arrays, json.loads(json.dumps(meta)))
    assert restored.fields == fitted.fields
    assert restored.table_sizes == fitted.table_sizes
    assert_same(restored.encode(columns_of(test)), fitted.encode(columns_of(test)))


def test_a_table_that_columns_share_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, meta = FeatureEncoder.fit(SCHEMA, [columns_of([dict.fromkeys(ROW_NAMES)])]).to_arrays()
    read: list[str] = []
    kinds: tuple[Any, ...] = (IntVocabulary, StringVocabulary, QuantileTable)
    for kind in kinds:

        def counted(of_table: dict[str, Any], own: Any = kind.from_arrays) -> Any:
            read.extend(of_table)
            return own(of_table)

        monkeypatch.setattr(kind, "from_arrays", counted)
    FeatureEncoder.from_arrays(arrays, meta)
    assert sorted(read) == sorted(name.rpartition(".")[2] for name in arrays)  # "seen" has the table of "video"


COUNTED = st.lists(st.lists(st.integers(-9, 9), max_size=12), max_size=6)


@settings(max_examples=10, deadline=None)
@given(COUNTED, st.integers(1, 3), st.integers(1, 8))
def test_counts_on_disk_are_those_in_memory(chunks: list[list[int]], min_count: int, held: int) -> None:
    with tempfile.TemporaryDirectory() as folder, patch.object(id_tables, "HELD", held):
        for kind, values_of in (
            (IntFit, lambda chunk: np.array(chunk, np.int64)),
            (StringFit, lambda chunk: np.array([f"é{number}" * abs(number) for number in chunk], object)),
        ):
            in_memory, on_disk = kind(min_count), kind(min_count, Path(folder))
            for chunk in chunks:
                in_memory.add(values_of(chunk))
                on_disk.add(values_of(chunk))
            assert [*on_disk.table().keys] == [*in_memory.table().keys]
            assert not [*Path(folder).iterdir()]


def test_counts_beyond_a_bound_go_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_tables, "HELD", 100)
    numbers, texts = IntFit(1, tmp_path), StringFit(1, tmp_path)
    for first in range(0, 1000, 50):
        chunk = np.arange(first, first + 50)
        numbers.add(chunk)
        texts.add(chunk.astype(str).astype(object))
        assert len(numbers._values) + numbers._waiting <= 200 and len(texts._counts) <= 100
    assert len([*tmp_path.iterdir()]) == 2
    assert numbers.table().keys.tolist() == list(range(1000))
    assert texts.table().keys == tuple(sorted(map(str, range(1000))))


@given(ROWS)
def test_forms_of_a_column_agree(rows: list[dict[str, Any]]) -> None:
    fitted = FeatureEncoder.fit(SCHEMA, [columns_of(rows)])
    raw = columns_of(rows)
    videos = [row["video"] for row in rows]
    tags = [row["tags"] or [] for row in rows]
    seen = [row["seen"] for row in rows]
    arrays = {
        "video": np.ma.MaskedArray([video or 0 for video in videos], [video is None for video in videos]),
        "price": np.array([np.nan if row["price"] is None else row["price"] for row in rows]),
        "colour": np.array([row["colour"] for row in rows], object),
        "tags": [",".join(row) for row in tags],
        "seen": (np.array([v for row in seen for v in row], np.int64), np.cumsum([0, *map(len, seen)])),
        "shop": np.array([row["shop"] for row in rows], object),
    }
    assert_same(fitted.encode(arrays), fitted.encode(raw))


@given(ROWS, st.sets(st.sampled_from(ROW_NAMES)), st.integers(0, 4))
def test_a_column_of_one_row_holds_for_all(rows: list[dict[str, Any]], once: set[str], batch: int) -> None:
    fitted = FeatureEncoder.fit(SCHEMA, [columns_of(rows)])
    first, others = rows[0], [rows[i % len(rows)] for i in range(batch)]
    whole = columns_of([{**row, **{name: first[name] for name in once}} for row in others])
    if once >= set(ROW_NAMES):
        whole = columns_of([first])  # nothing says that there are more
    sent = {name: [first[name]] if name in once else values for name, values in whole.items()}
    assert_same(fitted.encode(sent), fitted.encode(whole))


@given(ROWS, st.sets(st.sampled_from(ROW_NAMES)))
def test_what_is_given_is_not_read(rows: list[dict[str, Any]], given: set[str]) -> None:
    fitted = FeatureEncoder.fit(SCHEMA, [columns_of(rows)])
    raw = columns_of(rows)
    missing = {name: [None] * len(rows) for name in given}
    rest = {name: values for name, values in raw.items() if name not in given}
    assert_same(fitted.encode(rest, dict.fromkeys(given, len(rows))), fitted.encode({**raw, **missing}))


@given(ROWS, st.sets(st.integers(0, len(ROW_NAMES) - 1)))
def test_some_fields_of_a_batch(rows: list[dict[str, Any]], places: set[int]) -> None:
    encoded = FeatureEncoder.fit(SCHEMA, [columns_of(rows)]).encode(columns_of(rows))
    n_single = encoded.single.shape[1]
    some = encoded.of_fields(sorted(places))
    assert_same(some, encoded.take(torch.arange(len(rows))).of_fields(sorted(places)))
    assert torch.equal(some.single, encoded.single[:, [p for p in sorted(places) if p < n_single]])
    fields = [place - n_single for place in sorted(places) if place >= n_single]
    for at, field in enumerate(fields):
        assert [bag(some, at, row) for row in range(len(rows))] == [
            bag(encoded, field, row) for row in range(len(rows))
        ]
    assert some.multi_offsets.numel() == len(fields) * len(rows) + 1


def test_missing_values_inside_a_bag_are_left_out() -> None:
    fitted = FeatureEncoder.fit(SCHEMA, [columns_of([dict.fromkeys(ROW_NAMES)])])
    encoded = fitted.encode({**columns_of([dict.fromkeys(ROW_NAMES)] * 2), "tags": [["x", None], [None]]})
    assert bag(encoded, 0, 0) == [1]
    assert bag(encoded, 0, 1) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": None}, "column 'video': got None"),
        ({"video": [1, 2, 3]}, "column 'price': got 2 rows, wanted 3 as in 'video', or 1"),
        ({"tags": []}, "column 'tags': got 0 rows, wanted 2 as in 'video', or 1"),
        ({"video": ["1", "2"]}, r"column 'video': got '1' \(str\), wanted int"),
        ({"video": [1.5, 2]}, r"column 'video': got 1.5 \(float\), wanted int"),
        ({"video": np.array([1.5, 2])}, "column 'video': got np.float64.1.5."),
        ({"video": [True, 1]}, r"column 'video': got True \(bool\), wanted int"),
        ({"video": [2**70, 1]}, "wanted an int of 64 bits"),
        ({"price": ["1", 2]}, r"column 'price': got '1' \(str\), wanted a number"),
        ({"price": [False, None]}, r"column 'price': got False \(bool\), wanted a number"),
        ({"colour": ["a", 2]}, r"column 'colour': got 2 \(int\), wanted str"),
        ({"colour": np.array([1, 2])}, r"column 'colour': got .*wanted str"),
        ({"colour": "ab"}, r"column 'colour': got 'ab' \(str\), wanted a sequence"),
        ({"seen": ["1,x", ""]}, r"column 'seen': got 'x' \(str\), wanted int"),
        ({"seen": [1, 2]}, r"column 'seen': got 1 \(int\), wanted a list"),
        ({"seen": (np.array([1, 2]), np.array([0, 3, 2]))}, "column 'seen': .*wanted offsets"),
    ],
)
def test_encode_error_names_the_column(changes: dict[str, Any], message: str) -> None:
    row = {"video": 1, "price": 1.0, "colour": "a", "tags": [], "seen": [], "shop": "s"}
    fitted = FeatureEncoder.fit(SCHEMA, [columns_of([row])])
    with pytest.raises(ValueError, match=message):
        fitted.encode({**columns_of([row, row]), **changes})


def test_absent_column_is_named_and_others_are_ignored() -> None:
    fitted = encoder(video=[1, 2])
    with pytest.raises(ValueError, match="column 'video': got nothing"):
        fitted.encode({"audio": [1]})
    assert fitted.encode({"audio": [1, 2], "video": [2]}).batch == 1


def test_no_rows() -> None:
    fitted = FeatureEncoder.fit(SCHEMA, [columns_of([dict.fromkeys(ROW_NAMES)])])
    encoded = fitted.encode({name: [] for name in ROW_NAMES})
    assert encoded.single.shape == (0, 4)
    assert encoded.multi_offsets.tolist() == [0]
    assert encoded.take(torch.empty(0, dtype=torch.int64)).batch == 0


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("video.keys", None, "encoder table 'video': keys: got nothing"),
        ("video.keys", np.zeros(3, np.float32), "keys: got float32 of shape"),
        ("colour.offsets", np.array([0, 9]), "encoder table 'colour': offsets: got no ascending cut"),
        ("price.cuts", np.array([np.nan]), "encoder table 'price': cuts: got an unsorted array"),
        ("price.cuts", np.array([1.0, 0.0]), "encoder table 'price': cuts: got an unsorted array"),
    ],
)
def test_malformed_arrays_are_refused(name: str, array: Any, message: str) -> None:
    row = {"video": 1, "price": 1.0, "colour": "a", "tags": ["x"], "seen": [1], "shop": "s"}
    arrays, meta = FeatureEncoder.fit(SCHEMA, [columns_of([row])]).to_arrays()
    changed = {key: value for key, value in {**arrays, name: array}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        FeatureEncoder.from_arrays(changed, meta)
    with pytest.raises(ValueError, match="encoder format: got 99, wanted 1"):
        FeatureEncoder.from_arrays(arrays, {**meta, "format": 99})


# Rows of encoded features


@given(ROWS, st.data())
def test_take_equals_encoding_the_taken_rows(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    fitted = FeatureEncoder.fit(SCHEMA, [columns_of(rows)])
    encoded = fitted.encode(columns_of(rows))
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    taken = encoded.take(torch.tensor(picked, dtype=torch.int64))
    assert_same(taken, fitted.encode(columns_of([rows[index] for index in picked])))


@settings(max_examples=20)
@given(ROWS)
def test_bags_pool_as_embedding_bag_does(rows: list[dict[str, Any]]) -> None:
    fitted = FeatureEncoder.fit(SCHEMA, [columns_of(rows)])
    encoded = fitted.encode(columns_of(rows))
    table = torch.randint(-3, 4, (64, 4)).float()
    pooled = torch.nn.functional.embedding_bag(
        encoded.multi_values, table, encoded.multi_offsets, mode="sum", include_last_offset=True
    )
    for field in range(2):
        for row in range(encoded.batch):
            wanted = table[torch.tensor(bag(encoded, field, row), dtype=torch.int64)].sum(0)
            assert torch.equal(pooled[field * encoded.batch + row], wanted)


@pytest.mark.parametrize(
    "values", [np.array([np.inf]), np.array([1e300]), np.array([2**63 + 5], np.uint64), [2**63], np.array([1.5])]
)
def test_what_is_no_int_of_64_bits_is_refused_in_every_form(values: Any) -> None:
    with pytest.raises(ValueError, match="column 'video': got"):
        single(Column("video", type="int"), values)


@pytest.mark.parametrize("values", [[7.0, float("nan")], np.array([7.0, np.nan]), [7, None]])
def test_an_int_column_with_a_missing_value_may_come_as_floats(values: Any) -> None:
    got, present = single(Column("video", type="int"), values)
    assert got.tolist() == [7]
    assert present.tolist() == [True, False]


@given(ROWS, ROWS, ROWS)
def test_a_grown_encoder_keeps_every_id_and_adds_what_is_frequent(first, later, asked):
    before = FeatureEncoder.fit(SCHEMA, [columns_of(first)], "1")
    grown = before.grown([columns_of(later)], "2")
    assert (before.until, grown.until) == ("1", "2")
    old, new = before.encode(columns_of(asked)), grown.encode(columns_of(asked))
    fitted = FeatureEncoder.fit(SCHEMA, [columns_of(later)])
    for table in before.table_sizes:
        a, b = before.table(table), grown.table(table)
        if not isinstance(a, IntVocabulary | StringVocabulary):
            assert a is b
            continue
        keys = list(a.keys)
        assert list(b.keys) == keys + [key for key in fitted.table(table).keys if key not in keys]
        assert grown.table_sizes[table] == len(b.keys) + 2
    for kept, now in ((old.single, new.single), (old.multi_values, new.multi_values)):
        assert torch.equal(kept[kept != 1], now[kept != 1])
    assert torch.equal(old.multi_offsets, new.multi_offsets)
    again = FeatureEncoder.from_arrays(*grown.to_arrays())
    assert again.until == "2" and torch.equal(again.encode(columns_of(asked)).single, new.single)


def test_a_day_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"^until: got 7, wanted a day, or none$"):
        FeatureEncoder.from_arrays({}, {"format": 1, "schema": SCHEMA.to_stored(), "until": 7})
