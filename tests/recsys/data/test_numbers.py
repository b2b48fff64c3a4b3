"""Raw numbers, vectors and sequences of a log: the same from every form of file, and in batches as encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from lt4rec_sparse import Ranker, freeze
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import EncodedFeatures, Schema
from lt4rec_sparse.recsys.data import DataError, Prepared, prepare, read_candidates
from lt4rec_sparse.recsys.data.draft import draft_schema
from lt4rec_sparse.recsys.data.written import csv_table, written_table
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.trials import Training, Trial
from tests.oracle import Bounded, Layer, assert_rounding, mlp_reference

ROWS = 60
SCHEMA: dict[str, Any] = {
    "name": "numbers",
    "files": {"log": ["log*"]},
    "split": {"by": "random"},
    "columns": [
        {"name": "item", "type": "int"},
        {"name": "age", "kind": "dense", "encoding": "standardised"},
        {"name": "gain", "kind": "dense", "encoding": "log"},
        {"name": "view", "kind": "vector", "size": 3, "separator": " "},
    ],
    "tasks": [{"name": "buy", "kind": "binary", "label": "bought"}],
}


def log_of(view: Any) -> Any:
    rng = np.random.default_rng(0)
    ages = [None if i % 7 == 0 else float(age) for i, age in enumerate(rng.integers(18, 90, ROWS))]
    gain = rng.lognormal(sigma=3, size=ROWS)
    return pa.table({"item": rng.integers(0, 5, ROWS), "age": ages, "gain": gain, "view": view, "bought": [0, 1] * 30})


def views() -> list[list[float] | None]:
    rng = np.random.default_rng(1)
    return [None if i % 9 == 0 else [float(x) for x in rng.normal(size=3)] for i in range(ROWS)]


FORMS = {
    "text.csv": lambda: [None if view is None else "  ".join(map(repr, view)).replace("  ", " ") for view in views()],
    "lists.parquet": lambda: pa.array(views(), pa.list_(pa.float64())),
    "fixed.parquet": lambda: pa.array(views(), pa.list_(pa.float64(), 3)),
    "large.parquet": lambda: pa.array(views(), pa.large_list(pa.float64())),
    "empty.parquet": lambda: pa.array([view or [] for view in views()], pa.list_(pa.float64())),
}


def prepared_from(folder: Path, name: str, view: Any, **changes: Any) -> Prepared:
    source = folder / name.partition(".")[0]
    source.mkdir()
    path = source / f"log.{name.partition('.')[2]}"
    (pq.write_table if path.suffix == ".parquet" else pyarrow.csv.write_csv)(log_of(view), path)
    return prepare(source, folder / f"{source.name}.out", Schema.from_dict({**SCHEMA, **changes}), row_group_rows=16)


def numbers_of(prepared: Prepared, split: str = "train") -> torch.Tensor:
    return torch.cat([batch.features.numbers for batch in prepared.stream(split, 7, shuffle=False).epoch(0)])


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_gives_the_same_numbers_and_they_are_standardised(tmp_path, name):
    prepared = prepared_from(tmp_path, name, FORMS[name]())
    plain = prepared_from(tmp_path, "plain.parquet", FORMS["lists.parquet"]())
    assert prepared.encoder.numbers == {"age": 2, "gain": 1, "view": 4}
    for split in ("train", "validation", "test"):
        assert torch.equal(numbers_of(prepared, split), numbers_of(plain, split))
    found = numbers_of(plain).double()
    assert found.shape == (plain.counts["train"]["rows"], 7)
    for place, indicator in ((0, 1), (2, None), (3, 6), (4, 6), (5, 6)):
        there = found[:, place] if indicator is None else found[found[:, indicator] == 0, place]
        # Each was rounded to float32 once: off by 2^-25 of numbers whose squares sum to n.
        assert abs(there.sum()) <= 2.0**-24 * len(there)
        assert abs(there.square().sum() - len(there)) <= 2.0**-23 * len(there)


def test_batches_have_the_rows_of_the_files_in_every_order(tmp_path):
    prepared = prepared_from(tmp_path, "a.parquet", FORMS["fixed.parquet"]())
    in_order = numbers_of(prepared)
    shuffled = torch.cat([batch.features.numbers for batch in prepared.stream("train", 5).epoch(0)])
    assert not torch.equal(in_order, shuffled)
    assert sorted(map(tuple, in_order.tolist())) == sorted(map(tuple, shuffled.tolist()))
    again = Prepared.load(prepared.folder)
    assert torch.equal(numbers_of(again), in_order) and again.encoder.numbers == prepared.encoder.numbers


@pytest.mark.parametrize("name", ["lists.parquet", "text.csv"])
def test_duplicates_are_told_apart_by_their_vectors(tmp_path, name):
    prepared = prepared_from(tmp_path, name, FORMS[name](), duplicates="drop")
    assert prepared.counts["duplicates"] == 0


@pytest.mark.parametrize(
    ("name", "view", "message"),
    [
        ("a.parquet", [[1.0, 2.0]] * ROWS, r"column 'view': got 2 numbers in a row, wanted 3, wanted list"),
        ("a.csv", ["1 2 3 4"] * ROWS, "column 'view': got 4 numbers in a row, wanted 3"),
        ("a.csv", ["1 x 3"] * ROWS, "column 'view': Failed to parse string: 'x'"),
        ("a.parquet", [3.0] * ROWS, "log.parquet: column 'view': "),
    ],
)
def test_a_vector_of_another_size_is_refused_with_its_file(tmp_path, name, view, message):
    with pytest.raises(DataError, match=message) as caught:
        prepared_from(tmp_path, name, view)
    assert "\n" not in str(caught.value)


def test_a_vector_with_a_number_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match="column 'view': got 2 numbers and missing ones in row 0, wanted 3"):
        prepared_from(tmp_path, "a.parquet", [[1.0, None, 2.0]] * ROWS)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_candidates_come_back_from_a_file_as_they_were(tmp_path, kind):
    prepared = prepared_from(tmp_path, "a.parquet", FORMS["lists.parquet"]())
    table = log_of(FORMS["lists.parquet"]()).drop_columns("bought")
    with written_table(tmp_path / f"c.{kind}") as append:
        append(csv_table(prepared.schema, table) if kind == "csv" else table)
    from_file = prepared.encoder.encode(read_candidates(tmp_path / f"c.{kind}", prepared.schema)[0])
    direct = prepared.encoder.encode(table.to_pydict())
    assert torch.equal(from_file.numbers, direct.numbers) and torch.equal(from_file.single, direct.single)


@pytest.mark.parametrize("name", ["lists.parquet", "fixed.parquet", "empty.parquet"])
def test_a_draft_names_vectors_and_leaves_other_lists_of_numbers_out(tmp_path, name):
    odd = pa.array([[i / 2] * (1 + i % 2) for i in range(ROWS)])
    bare = pa.array([[] if i % 2 else None for i in range(ROWS)], pa.list_(pa.float64()))
    table = log_of(FORMS[name]()).append_column("odd", odd).append_column("bare", bare)
    pq.write_table(table, tmp_path / "log.parquet")
    text = draft_schema(tmp_path)
    (tmp_path / "schema.toml").write_text(text)
    columns = {column.name: column for column in Schema.from_toml(tmp_path / "schema.toml").columns}
    assert (columns["view"].kind, columns["view"].size, columns["view"].encoding) == ("vector", 3, "standardised")
    assert "vectors of 3 numbers" in text
    assert "odd, lists of 1 to 2 numbers, wanted as many in each for a vector" in text
    assert "bare, lists without a number" in text


def test_histories_with_attention_and_last_values_are_prepared_and_trained_on(tmp_path):
    rng = np.random.default_rng(3)
    source = tmp_path / "log"
    source.mkdir()
    columns = {
        "user": rng.integers(0, 20, 400),
        "item": rng.integers(0, 9, 400),
        "day": np.sort(rng.integers(1, 7, 400)),
    }
    columns |= {"tags": [",".join(rng.choice(list("abc"), 4)) for _ in range(400)], "bought": rng.integers(0, 2, 400)}
    pyarrow.csv.write_csv(pa.table(columns), source / "log.csv")
    past = {"name": "past", "when": "bought", "columns": ["item"], "length": 4, "pooling": "attention"}
    described = {
        **SCHEMA,
        "time": {"day": "day"},
        "group": {"column": "user"},
        "split": {"test_days": 1, "validation_days": 1},
        "columns": [{"name": "item", "type": "int"}, {"name": "tags", "kind": "multi", "last": 2}],
        "histories": [past],
    }
    prepared = prepare(source, tmp_path / "out", Schema.from_dict(described))
    assert prepared.encoder.attention == {"past_item": "item"}
    batch = next(prepared.stream("train", 400, shuffle=False).epoch(0)).features
    assert batch.multi_offsets[: batch.batch + 1].diff().tolist() == [2] * batch.batch
    lab = Laboratory(prepared, tmp_path / "lab")
    training = Training(epochs=2, batch_size=32, hidden=(8,), embedding_dim=2, sparse_gradients=True)
    trial = Trial("sparse_sharing", ("buy",), 0, training)
    lab.run(trial)
    model = lab.model(trial)
    torch.manual_seed(0)
    start = lab.network("sparse_sharing", training, ("buy",), 0, {})
    moved = {
        name: not torch.equal(value, start.state_dict()[name])
        for name, value in model.state_dict().items()
        if "units" in name
    }
    assert moved and all(moved.values()), moved
    ranker = Ranker(prepared.encoder, model.inputs, freeze(model.mlp, sigmoid=True))
    served, trained = ranker.score_encoded(batch), torch.sigmoid(model(batch))
    assert_rounding(served, _reference(ranker, batch))
    assert_rounding(trained.detach(), _reference(ranker, batch))


def _reference(ranker: Ranker, batch: EncodedFeatures) -> Bounded:
    """The scores in float64 of the same inputs, which are made once for both."""
    network = ranker.mlp.network
    layers = [Layer(*network.layer(i, "buy")) for i in range(network.depth)]
    return mlp_reference(ranker.inputs(batch), layers)
