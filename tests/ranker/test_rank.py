"""A request: the candidates in order, what they have in common given once."""

import re
import warnings

import numpy as np
import pytest
import torch
from rankers import NA

from lt4rec_sparse import MaskedMLP, Ranker, freeze
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import FeatureEncoder, Schema
from lt4rec_sparse.ranker.features.records import SchemaError
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings

SCHEMA = {
    "name": "shop",
    "context": ["age"],
    "files": {"log": ["log.csv"]},
    "time": {"day": "date"},
    "group": {"column": "user", "type": "int"},
    "columns": [
        {"name": "item", "type": "int"},
        {"name": "age"},
        {"name": "length", "kind": "dense"},
        {"name": "tags", "kind": "multi"},
    ],
    "tasks": [
        {"name": "ctr", "kind": "binary", "label": "is_click"},
        {"name": "cvr", "kind": "binary", "label": "is_buy"},
    ],
    "histories": [{"name": "clicked", "when": "is_click", "columns": ["item"], "rates": True}],
}
CONTEXT = {"age": ["30-40"], "clicked_item": [[3, 4, 3]], "clicked_count": [3], "clicked_rate": [0.25]}
CANDIDATES = {
    "item": [5, 2, None, 77, 1],
    "length": [60.0, 5.0, 12.5, 0.0, 600.0],
    "tags": [["a", "b"], [], None, ["b"], ["z", "a"]],
}


@pytest.fixture(scope="module")
def ranker():
    schema = Schema.from_dict(SCHEMA)
    rows = {
        "item": [0, 1, 2, 3, 4, 5],
        "age": ["20-30", "30-40"] * 3,
        "length": [1.0, 10.0, 30.0, 60.0, 300.0, 900.0],
        "tags": [["a"], ["b"], ["c"], [], ["a", "c"], []],
        "clicked_item": [[1], [2], [], [3], [4], [5]],
        "clicked_count": [0, 1, 2, 3, 4, 5],
        "clicked_rate": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    }
    encoder = FeatureEncoder.fit(schema, [rows])
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, dim=4, std=1.0)
    return Ranker(encoder, inputs, freeze(MaskedMLP(inputs.out_features, (32, 16), tasks=("ctr", "cvr")), sigmoid=True))


def test_candidates_come_in_descending_order_of_the_product_of_all_tasks(ranker):
    scores = ranker.score(CANDIDATES | CONTEXT)
    ranked = ranker.rank(CANDIDATES, CONTEXT)
    assert sorted(ranked.rows.tolist()) == list(range(5)) and len(ranked) == 5
    assert (np.diff(ranked.rank_scores) <= 0).all()
    for task, of_task in scores.items():
        assert (ranked.scores[task] == of_task[ranked.rows]).all()
    product = scores["ctr"].astype(np.float64) * scores["cvr"]
    assert np.allclose(ranked.rank_scores, product[ranked.rows], rtol=1e-15)


def test_what_is_given_once_counts_as_if_repeated(ranker):
    repeated = {name: values * 5 for name, values in CONTEXT.items()}
    once, every = ranker.rank(CANDIDATES, CONTEXT), ranker.rank(CANDIDATES | repeated)
    assert (once.rows == every.rows).all() and (once.rank_scores == every.rank_scores).all()


def test_a_column_multiplies_the_rank_score_by_its_power(ranker):
    ranked = ranker.rank(CANDIDATES, CONTEXT, by={"cvr": 2, "length": 0.5})
    cvr, length = ranker.score(CANDIDATES | CONTEXT)["cvr"].astype(np.float64), np.array(CANDIDATES["length"])
    assert np.allclose(ranked.rank_scores, (cvr**2 * length**0.5)[ranked.rows], rtol=1e-14)
    assert ranked.rows[-1] == 3  # which has a length of 0


def test_the_na_of_data_frames_is_missing_from_a_request(ranker):
    def request_with(missing):
        candidates = {name: [*values[:4], missing] for name, values in CANDIDATES.items()}
        return candidates, {name: [missing] for name in CONTEXT}

    with_na, with_none = ranker.rank(*request_with(NA)), ranker.rank(*request_with(None))
    assert (with_na.rows == with_none.rows).all() and (with_na.rank_scores == with_none.rank_scores).all()


def test_k_candidates_are_the_first_of_all(ranker):
    every = ranker.rank(CANDIDATES, CONTEXT)
    for k in (1, 3, 5, 9):
        assert (ranker.rank(CANDIDATES, CONTEXT, k).rows == every.rows[:k]).all()


def test_level_candidates_keep_their_order_and_none_give_none(ranker):
    alike = {"item": [5] * 4, "length": [1.0] * 4, "tags": [["a"]] * 4}
    assert ranker.rank(alike, CONTEXT).rows.tolist() == [0, 1, 2, 3]
    assert len(ranker.rank({"item": [], "length": [], "tags": []}, CONTEXT)) == 0


@pytest.mark.parametrize(
    ("candidates", "context", "options", "message"),
    [
        (CANDIDATES, CONTEXT, {"k": 0}, "k: got 0, wanted a whole number from 1 on"),
        (CANDIDATES, CONTEXT, {"k": True}, "k: got True"),
        (CANDIDATES | {"age": ["x"] * 5}, CONTEXT, {}, "column 'age': got it in candidates and in context"),
        (CANDIDATES, CONTEXT | {"age": ["x"] * 5}, {}, "column 'age': got 5 rows in context, wanted 1"),
        (CANDIDATES, CONTEXT | {"age": "x"}, {}, "column 'age': got 'x'"),
        (CANDIDATES, {}, {}, "column 'age': got nothing"),
        (CANDIDATES, CONTEXT, {"by": {}}, "by: got nothing"),
        (CANDIDATES, CONTEXT, {"by": {"ctr": -1}}, "by: got exponent -1 of 'ctr'"),
        (CANDIDATES, CONTEXT, {"by": {"ctr": float("nan")}}, "by: got exponent nan"),
        (CANDIDATES, CONTEXT, {"by": {"ctr": 10**400}}, "by: got exponent 1000"),
        (CANDIDATES | {"length": [10**400] * 5}, CONTEXT, {}, "column 'length': got 1000"),
        (CANDIDATES, CONTEXT, {"by": {"price": 1}}, "by: got 'price', wanted a task or a column"),
        (CANDIDATES, CONTEXT, {"by": {"age": 1}}, "column 'age': got '30-40'"),
        (CANDIDATES | {"bid": [1.0, 2.0]}, CONTEXT, {"by": {"bid": 1}}, "column 'bid': got 2 rows, wanted 5, or 1"),
        (CANDIDATES | {"bid": [1.0, -2.0, 1, 1, 1]}, CONTEXT, {"by": {"bid": 1}}, "column 'bid': got -2 in row 1"),
        (
            CANDIDATES | {"bid": [1] * 5},
            CONTEXT | {"bid": [1]},
            {"by": {"bid": 1}},
            "column 'bid': got it in candidates",
        ),
        (CANDIDATES | {"bid": [1] * 5}, CONTEXT | {"bid": [1]}, {}, "column 'bid': got it in candidates"),
        (CANDIDATES | {"bid": 3}, CONTEXT, {"by": {"bid": 1}}, "column 'bid': got 3 (int), wanted a sequence"),
        (CANDIDATES | {"bid": [None] * 5}, CONTEXT, {"by": {"bid": 1}}, "column 'bid': got nan in row 0"),
    ],
)
def test_a_wrong_request_is_refused(ranker, candidates, context, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ranker.rank(candidates, context, **options)


def test_what_ranks_is_checked_before_anything_is_scored(ranker):
    with pytest.raises(InputError, match="by: got 'price', wanted a task or a column of the request"):
        ranker.rank({"item": [1]}, by={"price": 1})
    with pytest.raises(InputError, match="column 'item': got it in candidates and in context, wanted it in one of"):
        ranker.rank({"item": [1]}, {"item": [1]}, by={"item": 1})
    with pytest.raises(InputError, match="column 'item': got -1 in row 0, wanted finite numbers of at least 0"):
        ranker.rank({"item": [-1]}, by={"item": 1})


@pytest.mark.parametrize(
    ("columns", "by", "message"),
    [
        ({"bid": [1, 1, 1e200, 1, 1]}, {"bid": 2}, "rank score of row 2: got inf, wanted a finite number"),
        ({"bid": [1, 1e200, 1, 1, 1], "fee": [1e200]}, {"bid": 1, "fee": 1}, "rank score of row 1: got inf"),
        ({"bid": [1, 1, 1, 1e200, 1], "fee": [0]}, {"bid": 2, "fee": 1}, "rank score of row 3: got nan"),
    ],
)
def test_a_rank_score_beyond_float64_is_refused_with_its_row(ranker, columns, by, message):
    with warnings.catch_warnings(record=True) as warned, pytest.raises(InputError, match=message):
        warnings.simplefilter("always")
        ranker.rank(CANDIDATES | columns | {"fee": columns.get("fee", [1]) * 5}, CONTEXT, by=by)
    assert not warned


def test_the_largest_rank_scores_are_still_in_order(ranker):
    bids = {"bid": [1e154, 1e-200, 0, 1.3e154, 1]}
    assert ranker.rank(CANDIDATES | bids, CONTEXT, by={"bid": 2}).rows.tolist() == [3, 0, 4, 1, 2]


def test_the_schema_says_what_candidates_have_in_common():
    schema = Schema.from_dict(SCHEMA)
    assert schema.in_common == {"age", "clicked_item", "clicked_count", "clicked_rate"}
    with pytest.raises(SchemaError, match="context: got column 'bid', wanted features"):
        Schema.from_dict(SCHEMA | {"context": ["bid"]})
    with pytest.raises(SchemaError, match="context: got 'age' twice"):
        Schema.from_dict(SCHEMA | {"context": ["age", "age"]})


def test_an_encoder_keeps_what_candidates_have_in_common_beside_the_schema(ranker):
    arrays, description = ranker.encoder.to_arrays()
    assert description["context"] == ["age"] and "context" not in description["schema"]
    assert FeatureEncoder.from_arrays(arrays, description).schema == ranker.encoder.schema
    del description["context"]  # as files of before it have none
    assert FeatureEncoder.from_arrays(arrays, description).schema.context == ()
