"""Raw numbers and vectors: what a value becomes, to the bit, in training, in files and in every way of serving."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rankers import columns_of, schema_of

from lt4rec_sparse import MaskedMLP, Ranker, freeze, load, save
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import Column, EncodedFeatures, FeatureEncoder, Schema, SchemaError
from lt4rec_sparse.ranker.features.numbers import LARGEST, Scale, ScaleFit, signed_log
from lt4rec_sparse.ranker.features.raw import numbers
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.ranker.module import padded_ids
from lt4rec_sparse.ranker.store.columns import from_arrays, from_raw
from tests.oracle import assert_exact
from tests.ranker.agreement import assert_agrees, bounded_scores
from tests.ranker.reader import Reader
from tests.ranker.reader import signed_log as log_of_page

COLUMNS: list[dict[str, Any]] = [
    {"name": "length", "kind": "dense", "encoding": "standardised"},
    {"name": "item", "type": "int"},
    {"name": "gain", "kind": "dense", "encoding": "log"},
    {"name": "view", "kind": "vector", "size": 3, "separator": "|"},
    {"name": "tags", "kind": "multi"},
    {"name": "price", "kind": "dense", "buckets": 4},
]
ROWS = {
    "length": [1.0, 2.0, None, 4.0],
    "item": [1, 2, 2, 3],
    "gain": [0.0, -1.0, 7.0, 1e6],
    "view": [[1.0, 0.0, -2.0], [2.0, 0.0, 2.0], None, [0.5, 0.0, 1e9]],
    "tags": [["a"], [], ["a", "b"], None],
    "price": [1.0, 2.0, 3.0, None],
}
FLOATS = st.floats(-LARGEST, LARGEST, width=32)
REQUEST = st.lists(
    st.fixed_dictionaries(
        {
            "length": st.none() | st.floats(-1e6, 1e6),
            "item": st.none() | st.integers(0, 5),
            "gain": st.none() | st.floats(-1e20, 1e20),
            "view": st.none() | st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3),
            "tags": st.lists(st.sampled_from("abc"), max_size=3),
            "price": st.none() | st.floats(0, 5),
        }
    ),
    min_size=1,
    max_size=6,
)


def ranker_of(**changes: Any) -> Ranker:
    encoder = FeatureEncoder.fit(schema_of(COLUMNS, **changes), [ROWS])
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, dim=3, std=1.0, numbers=encoder.n_numbers)
    return Ranker(encoder, inputs, freeze(MaskedMLP(inputs.out_features, (12, 8), tasks=("ctr",)), sigmoid=True))


RANKER = ranker_of()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("numbers") / "model.safetensors"
    save(RANKER, path)
    return path


def scale(column: Column, *chunks: Any) -> Scale:
    fit = ScaleFit(column)
    for chunk in chunks:
        fit.add(*numbers(column, chunk))
    return fit.scale()


@given(st.lists(FLOATS, min_size=1, max_size=20))
def test_the_logarithm_is_that_of_the_page_to_the_bit_and_close_to_the_true_one(values):
    found = signed_log(np.array(values))
    assert found.tolist() == [log_of_page(v) for v in values]
    assert np.array_equal(np.signbit(found), np.signbit(np.array(values)))
    with localcontext() as context:
        context.prec = 90
        for v, got in zip(values, found.tolist(), strict=True):
            exact = (1 + abs(Decimal(v))).ln()
            # Each of its steps, the terms of the series among them, rounds once, none to more than the result.
            assert abs(abs(Decimal(got)) - exact) <= 30 * Decimal(2) ** -53 * exact


@given(st.integers(0, 5).flatmap(lambda k: st.lists(st.integers(-1000, 1000), min_size=2**k, max_size=2**k)))
def test_the_scale_is_that_of_all_values_however_they_come(values):
    # In chunks of 1, 1, 2, 4, ... every mean is of as many values as a power of two, so that nothing rounds.
    ends = [0, *(2**k for k in range(6) if 2**k <= len(values))]
    column = Column("a", "dense", encoding="standardised")
    found = scale(column, *(values[first:last] for first, last in itertools.pairwise(ends)))
    mean = Fraction(sum(values), len(values))
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    assert Fraction(found.mean[0]) == mean
    assert found.std.tolist() == [math.sqrt(variance) or 1.0]
    assert not found.has_indicator


@pytest.mark.parametrize("value", [0.1, -3.7, 1e30])
def test_a_constant_is_its_own_mean_with_deviation_1(value):
    found = scale(Column("a", "dense", encoding="standardised"), [value] * 7, [value] * 3)
    assert (found.mean.tolist(), found.std.tolist()) == ([value], [1.0])


def test_a_missing_value_is_0_and_has_an_indicator_only_where_training_has_missing_ones():
    column = Column("a", "dense", encoding="standardised")
    with_gaps, without = scale(column, [1.0, None, 3.0]), scale(column, [1.0, 3.0])
    values = numbers(column, [None, 3.0, 2.0])
    assert with_gaps.inputs(*values).tolist() == [[0, 1], [1, 0], [0, 0]]
    assert without.inputs(*values).tolist() == [[0], [1], [0]]
    nothing = scale(column, [None, None])
    assert nothing.inputs(*values).tolist() == [[0, 1], [3, 0], [2, 0]]


@pytest.mark.parametrize("as_form", ["lists", "text", "array", "arrays", "pair"])
def test_every_form_of_a_vector_is_the_same(as_form):
    column = Column("view", "vector", size=3, separator="|")
    rows = [[1.0, 2.5, -3.0], None, [1e-3, 0.0, 4e8]]
    forms: dict[str, Any] = {
        "lists": rows,
        "text": ["1|2.5| -3", " ", "1e-3|0|4e8"],
        "array": np.array([row or [np.nan] * 3 for row in rows]),
        "arrays": [np.array(row or []) for row in rows],
        "pair": (np.array([*rows[0], *rows[2]]), np.array([0, 3, 3, 6])),
    }
    values, present = numbers(column, forms[as_form])
    assert (values.tolist(), present.tolist()) == ([rows[0], rows[2]], [True, False, True])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([[1.0, 2.0]], "got 2 numbers in row 0, wanted 3, or none"),
        ([None, [1.0, 2.0, 3.0, 4.0]], "got 4 numbers in row 1, wanted 3, or none"),
        ([[1.0, None, 3.0]], "got 2 numbers and missing ones in row 0, wanted 3"),
        (["1|x|2"], r"got 'x' \(str\), wanted a number"),
        (["1||2"], r"got '' \(str\), wanted a number"),
        ([["1", 2.0, 3.0]], r"got '1' \(str\), wanted a number"),
        ([[True, 2.0, 3.0]], r"got True \(bool\), wanted a number"),
        ([3.0], r"got 3.0 \(float\), wanted a list or a string"),
        (np.zeros((2, 2)), "got 2 numbers in row 0, wanted 3, or none"),
        (np.zeros((1, 3, 1)), "wanted a sequence of values"),
        ([[1.0, 2.0, math.inf]], "got inf, wanted a finite number that float32 holds"),
        ([[1.0, 2.0, -1e39]], "got -1e[+]39, wanted a finite number that float32 holds"),
        ([[1e38, 2.0, 1.0]], None),
    ],
)
def test_a_vector_that_is_none_is_refused_by_one_line(raw, message):
    columns = {**{name: values[:1] for name, values in ROWS.items()}, "view": raw}
    if message is None:
        assert RANKER.encoder.encode(columns).numbers.isfinite().all()
        return
    with pytest.raises(InputError, match=rf"^column 'view': [^\n]*{message}[^\n]*$"):
        RANKER.encoder.encode(columns)


def test_what_float32_cannot_hold_once_standardised_is_refused():
    small = scale(Column("a", "dense", encoding="standardised"), [0.0, 1e-30])
    with pytest.raises(InputError, match=r"column 'a': got 1e[+]30, which is too far from the values of the training"):
        small.inputs(np.array([[1e30]]), np.array([True]))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"encoding": "standardised"}, "got encoding='standardised' of kind='single', wanted kind='dense' or 'vector'"),
        ({"kind": "multi", "encoding": "log"}, "got encoding='log' of kind='multi'"),
        ({"kind": "vector", "size": 3, "encoding": "hash"}, "got encoding='hash' of kind='vector'"),
        ({"kind": "vector", "size": 3, "encoding": "buckets"}, "got encoding='buckets' of kind='vector'"),
        ({"kind": "vector"}, "got size=0 of a vector, wanted 1 to 16384"),
        ({"kind": "vector", "size": 2**31}, "got size=2147483648 of a vector"),
        ({"kind": "dense", "encoding": "log", "size": 2}, "got size=2 with a number, wanted encoding='hash'"),
        ({"kind": "dense", "encoding": "log", "table": "item"}, "got table='item', wanted none: numbers have no"),
    ],
)
def test_a_schema_with_a_number_that_cannot_be_is_refused(column, message):
    with pytest.raises(SchemaError, match=f"column 'a': {message}"):
        schema_of([{"name": "item"}, {"name": "a", **column}])


def test_a_log_of_numbers_alone_and_a_history_of_a_vector_are_refused():
    with pytest.raises(SchemaError, match=r"columns: got numbers alone \(a\), wanted at least one feature with"):
        schema_of([{"name": "a", "kind": "dense", "encoding": "log"}])
    past = {"histories": [{"name": "h", "when": "click", "columns": ["view"]}], "time": {"day": "d"}}
    with pytest.raises(SchemaError, match="history 'h': got column 'view', wanted a categorical feature"):
        schema_of(COLUMNS, **past, group={"column": "user"})


def test_a_schema_is_read_back_equal(tmp_path):
    schema = RANKER.encoder.schema
    (tmp_path / "s.toml").write_text(schema.to_toml())
    assert Schema.from_toml(tmp_path / "s.toml") == schema == Schema.from_stored(schema.to_stored())


@given(REQUEST, st.randoms())
def test_rows_are_encoded_each_by_itself_and_as_the_page_says(saved, rows, random):
    encoded = RANKER.encoder.encode(columns_of(rows))
    one_by_one = [RANKER.encoder.encode(columns_of([row])) for row in rows]
    assert_exact(encoded.numbers, EncodedFeatures.cat(one_by_one).numbers)
    of_page = Reader(saved.read_bytes()).raw_numbers(columns_of(rows), len(rows))
    assert encoded.numbers.tolist() == of_page.tolist()
    some = [random.randrange(len(rows)) for _ in range(4)]
    assert_exact(encoded.take(torch.tensor(some)).numbers, encoded.numbers[some])
    assert encoded.nbytes == encoded.single.nbytes + encoded.multi_values.nbytes + (
        encoded.multi_offsets.nbytes + encoded.numbers.nbytes
    )


@given(REQUEST)
def test_scores_agree_with_the_second_reader_and_in_every_way_of_serving(saved, rows):
    columns, loaded = columns_of(rows), load(saved)
    scores = loaded.score(columns)
    assert_agrees(scores, bounded_scores(Reader(saved.read_bytes()), columns))
    ranking = loaded.rank(columns)
    assert ranking.scores["ctr"].tolist() == scores["ctr"][ranking.rows].tolist()
    encoded = loaded.encoder.encode(columns)
    assert loaded.score_encoded(encoded)[:, 0].tolist() == scores["ctr"].tolist()
    dense = loaded.to_dense()(*padded_ids(encoded, loaded.encoder.fields))
    assert_agrees({"ctr": dense["ctr"].numpy()}, bounded_scores(Reader(saved.read_bytes()), columns))


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="ONNX Runtime is absent")
def test_an_onnx_model_takes_the_numbers_as_one_more_input(saved):
    from onnx_models import runtime

    from lt4rec_sparse import to_onnx

    ids = padded_ids(RANKER.encoder.encode(ROWS), RANKER.encoder.fields)
    written = to_onnx(RANKER)
    assert [value.name for value in written.graph.input] == ["item", "price", "tags", "numbers"]
    assert_agrees({"ctr": runtime(written, *ids)[0].numpy()}, bounded_scores(Reader(saved.read_bytes()), ROWS))


def test_what_is_in_common_may_be_given_once():
    ranker = ranker_of(context=["length", "view"])
    context = {"length": [3.0], "view": [[1.0, 0.0, 5.0]]}
    own = {name: values for name, values in ROWS.items() if name not in context}
    ranking = ranker.rank(own, context)
    whole = ranker.score({**own, **{name: values * 4 for name, values in context.items()}})
    assert ranking.scores["ctr"].tolist() == whole["ctr"][ranking.rows].tolist()


def test_the_number_of_inputs_is_checked():
    inputs = CrossedEmbeddings(RANKER.encoder.fields, RANKER.encoder.table_sizes, dim=3)
    with pytest.raises(InputError, match="numbers: got 7 per row, wanted 0"):
        inputs(RANKER.encoder.encode(ROWS))
    features = RANKER.encoder.encode(ROWS)
    bare = EncodedFeatures(features.single, features.multi_values, features.multi_offsets)
    with pytest.raises(InputError, match="numbers: got 0 per row, wanted 7"):
        RANKER.inputs(bare)
    ids = padded_ids(features, RANKER.encoder.fields)
    for wrong, message in ((ids[:-1], "got 3 tensors, wanted 4"), ((*ids[:-1], ids[-1][:, 1:]), "numbers: got shape")):
        with pytest.raises(ValueError, match=message):
            RANKER.to_dense()(*wrong)


def test_numbers_are_no_embeddings_and_no_engine_file_holds_them(tmp_path):
    given_rows = {"length": torch.zeros(4, 3)}
    with pytest.raises(InputError, match="embeddings: got column 'length', wanted one of"):
        RANKER.score(ROWS, given_rows)
    with pytest.raises(InputError, match="column 'length': got raw numbers, wanted ids, means of bags, or numbers in"):
        RANKER.to_engine_file(tmp_path / "e")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_rounded_embeddings_and_absent_tables_leave_numbers_alone(tmp_path, kind):
    save(RANKER, tmp_path / "m", kind, without=["item"])
    ranker, reader = load(tmp_path / "m"), Reader((tmp_path / "m").read_bytes())
    given_rows = {"item": np.full((4, 3), 0.25, np.float32)}
    assert reader.meta["version"] == 5
    assert_agrees(ranker.score(ROWS, given_rows), bounded_scores(reader, ROWS, given_rows))


@given(st.lists(st.none() | st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=2), max_size=5))
def test_a_store_gives_back_the_vectors_it_was_given(vectors):
    column = Column("view", "vector", size=2)
    stored = from_arrays(column, from_raw(column, vectors).to_arrays())
    assert len(stored) == len(vectors) + 1
    rows = np.arange(len(vectors) + 1)
    values, present = numbers(column, stored.take(rows, are_known=False))
    again, there = numbers(column, [*vectors, None])
    assert (values.tolist(), present.tolist()) == (again.tolist(), there.tolist())
    with pytest.raises(InputError, match="column 'view': values: got 3 numbers, wanted a multiple of 2"):
        from_arrays(column, {"values": np.zeros(3)})
