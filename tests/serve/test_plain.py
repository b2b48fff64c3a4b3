"""Short JSON for people: candidates as columns or as rows, what they have in common alone."""

import json

import pytest
from serve.models import CANDIDATES, CONTEXT, plain_request

from lt4rec_sparse.serve import body
from lt4rec_sparse.serve.settings import RequestError


def rows():
    return [dict(zip(CANDIDATES, values, strict=True)) for values in zip(*CANDIDATES.values(), strict=True)]


def ranking(response):
    assert response.status_code == 200, response.text
    return response.json()["ranking"]


def test_rows_and_columns_are_ranked_alike_and_as_the_ranker_ranks(client, ranker):
    wanted = ranker.rank(CANDIDATES, {name: [value] for name, value in CONTEXT.items()})
    for candidates in (CANDIDATES, rows()):
        ranked = ranking(client.post("/rank", json={"context": CONTEXT, "candidates": candidates}))
        assert [entry["row"] for entry in ranked] == wanted.rows.tolist()
        assert [entry["rank_score"] for entry in ranked] == wanted.rank_scores.tolist()


def test_k_exponents_and_precision_are_those_of_the_request(client, ranker):
    ranked = ranking(client.post("/rank", json=plain_request(k=2, by={"ctr": 0, "cvr": 1}, precision="bf16")))
    context = {name: [value] for name, value in CONTEXT.items()}
    wanted = ranker.to_precision("bf16").rank(CANDIDATES, context, 2, by={"ctr": 0, "cvr": 1})
    assert [entry["rank_score"] for entry in ranked] == wanted.rank_scores.tolist()


def test_an_answer_says_what_ranked_and_how_long_it_took(client):
    answer = client.post("/rank", json=plain_request()).json()
    assert answer["model"] == "shop" and answer["precision"] == "fp32" and len(answer["version"]) == 12
    assert set(answer["us"]) == {"read", "queue", "compute"} and all(us >= 0 for us in answer["us"].values())


def test_separated_text_is_a_bag(client):
    context = CONTEXT | {"similar": "3,4,3"}
    assert ranking(client.post("/rank", json=plain_request(context=context))) == ranking(
        client.post("/rank", json=plain_request())
    )


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "candidates: got None"),
        ({"candidates": []}, "candidates: got []"),
        ({"candidates": [3]}, "candidates: got [3]"),
        ({"candidates": [{}]}, "candidates: got a row without columns"),
        (plain_request(top=3), "'top': got an unknown key"),
        (plain_request(context=3), "context: got 3, wanted an object"),
        (plain_request(context=CONTEXT | {"price": 3}), "column 'price': got no column of the model"),
        (plain_request(context={"age": "x"}), "column 'similar': got nothing"),
        (plain_request(context=CONTEXT | {"age": ["x"]}), "column 'age': got ['x'], wanted one value"),
        (plain_request(context=CONTEXT | {"age": {}}), "column 'age': got {}, wanted one value"),
        (plain_request(context=CONTEXT | {"age": 3}), "column 'age': got 3"),
        (plain_request(context=CONTEXT | {"similar": [[3]]}), "column 'similar': got [[3]], wanted a list of values"),
        (plain_request(context=CONTEXT | {"similar": [1] * 21}), "column 'similar': got 21 values in one row"),
        (plain_request(context=CONTEXT | {"similar": "1," * 20}), "column 'similar': got 21 values in one row"),
        (plain_request(context=CONTEXT | {"similar": "x"}), "column 'similar': got 'x'"),
        (plain_request(context=CONTEXT | {"age": "x" * 65}), "column 'age': got a text of 65 bytes"),
        (plain_request(context=CONTEXT | {"item": 3}), "column 'item': got it in candidates and in context"),
        (plain_request(candidates=CANDIDATES | {"item": 5}), "column 'item': got 5 in candidates, wanted a list"),
        (plain_request(candidates=CANDIDATES | {"item": [1, 2]}), "column 'length': got 5 rows, wanted 2"),
        (plain_request(candidates=CANDIDATES | {"item": [1] * 301}), "column 'item': got 301 rows, wanted at most 300"),
        (plain_request(candidates=rows() * 61), "candidates: got 305 rows, wanted at most 300"),
        (plain_request(candidates=[*rows(), {"item": 3}]), "column 'length': got it in some rows, not in row 5"),
        (plain_request(candidates=CANDIDATES | {"length": [10**400] * 5}), "column 'length': got 1000"),
        (plain_request(candidates=CANDIDATES | {"length": [True] * 5}), "column 'length': got True"),
        (plain_request(k="3"), "k: got '3'"),
        (plain_request(by=[]), "by: got []"),
        (plain_request(by={}), "by: got nothing"),
        (plain_request(by=dict.fromkeys(map(str, range(65)), 1)), "by: got 65 exponents, wanted at most 64"),
        (plain_request(by={"price": 1}), "by: got 'price'"),
        (plain_request(precision=8), "precision: got 8"),
        (plain_request(precision="fp64"), "precision: got 'fp64', wanted one of fp32, bf16, int8"),
    ],
)
def test_a_malformed_request_is_refused_by_the_name_of_the_field(client, request_, message):
    response = client.post("/rank", json=request_)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"] and "\n" not in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "body: got no JSON"),
        (b"[]", "body: got JSON of type list"),
        (b"\xff", "body: got bytes that are no UTF-8 at 0"),
        (b'{"k": 1, "k": 2}', "'k': got it twice in one object"),
        (b'{"k": ' + b"[" * 9 + b"]" * 9 + b"}", "body: got JSON nested more than 8 levels deep"),
        (b"[" * 100_000, "body: got JSON nested more than 8 levels deep"),
        (b'{"k": ' + b"9" * 5000 + b"}", "body: got no JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(client, body, message):
    response = client.post("/rank", content=body)
    assert response.status_code == 400 and message in response.json()["error"]


class Counted(str):
    """A text that may be compared with another, or hashed, so many times in all."""

    left = 0

    def _count(self):
        Counted.left -= 1
        assert Counted.left > 0, "more work than linear"

    def __eq__(self, other):
        self._count()
        return str.__eq__(self, other)

    def __hash__(self):
        self._count()
        return str.__hash__(self)


def test_a_late_repeat_among_many_keys_is_found_in_linear_work(monkeypatch):
    keys = 100_000
    text = "{" + ", ".join(f'"{i}": 0' for i in [*range(keys), keys - 1]) + "}"
    loads = json.loads

    def counted(data, object_pairs_hook):
        return loads(data, object_pairs_hook=lambda pairs: object_pairs_hook([(Counted(key), x) for key, x in pairs]))

    monkeypatch.setattr(json, "loads", counted)
    Counted.left = 20 * keys
    with pytest.raises(RequestError, match="'99999': got it twice"):
        body.parse(text.encode(), 8)
    assert Counted.left < 19 * keys, "it was counted"
