"""A server of a ranker with raw numbers and vectors: both spellings of a request mean what the ranker means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from serve.models import Client, settings

from lt4rec_sparse import MaskedMLP, Ranker, freeze, load, save
from lt4rec_sparse.ranker.features import FeatureEncoder, Schema
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.serve import examples
from lt4rec_sparse.serve.service import Service

SCHEMA = {
    "name": "shop",
    "context": ["user"],
    "files": {"log": ["log.csv"]},
    "columns": [
        {"name": "item", "type": "int"},
        {"name": "length", "kind": "dense", "encoding": "log"},
        {"name": "view", "kind": "vector", "size": 2, "separator": "|"},
        {"name": "user", "kind": "vector", "size": 3},
    ],
    "tasks": [{"name": "ctr", "kind": "binary", "label": "is_click"}],
}
ROWS: dict[str, list[Any]] = {
    "item": [1, 2, None],
    "length": [0.0, None, 250.0],
    "view": [[1.0, 2.0], None, [-0.5, 1e6]],
    "user": [[0.0, 1.0, 2.0]] * 3,
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("numbers")
    encoder = FeatureEncoder.fit(Schema.from_dict(SCHEMA), [ROWS])
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, dim=4, std=1.0, numbers=encoder.n_numbers)
    mlp = freeze(MaskedMLP(inputs.out_features, (16,), tasks=("ctr",)), sigmoid=True)
    save(Ranker(encoder, inputs, mlp.calibrated(inputs(encoder.encode(ROWS)).detach())), folder / "model.safetensors")
    service = Service(settings(folder))
    service.load()
    client = Client(service)
    yield client
    client.close()


def test_the_model_lists_its_vectors_and_both_spellings_give_the_rankers_scores(client):
    wanted = load(client.service.settings.artefact).rank(ROWS)
    own = {name: values for name, values in ROWS.items() if name != "user"}
    texts = own | {"view": ["1|2", "", "-0.5| 1e6"]}
    for candidates in (own, texts):
        response = client.post("/rank", json={"context": {"user": [0.0, 1.0, 2.0]}, "candidates": candidates})
        assert response.status_code == 200, response.text
        ranked = response.json()["ranking"]
        assert [entry["row"] for entry in ranked] == wanted.rows.tolist()
        assert [entry["rank_score"] for entry in ranked] == wanted.rank_scores.tolist()
    inputs = [
        {"name": "item", "datatype": "INT64", "shape": [3], "data": ROWS["item"]},
        {"name": "length", "datatype": "FP64", "shape": [3], "data": ROWS["length"]},
        {"name": "view", "datatype": "FP64", "shape": [6], "data": [1.0, 2.0, None, None, -0.5, 1e6]},
        {"name": "user", "datatype": "FP64", "shape": [3], "data": [0.0, 1.0, 2.0]},
    ]
    response = client.infer({"inputs": inputs, "parameters": {"k": 3}})
    assert response.status_code == 200, response.text
    found = {output["name"]: output["data"] for output in response.json()["outputs"]}
    assert found["row"] == wanted.rows.tolist() and found["rank_score"] == wanted.rank_scores.tolist()
    listed = {entry["name"]: entry["datatype"] for entry in client.get("/v2/models/shop").json()["inputs"]}
    assert listed == {"item": "INT64", "length": "FP64", "view": "FP64", "user": "FP64"}


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"datatype": "FP64", "shape": [5], "data": [1.0] * 5}, "view': got 5 elements, wanted a multiple of 2"),
        ({"datatype": "BYTES", "shape": [3], "data": ["1|2"] * 3}, "view': got BYTES, wanted FP64"),
        ({"datatype": "FP64", "shape": [6], "data": [1.0, None] * 3}, "view': got 1 numbers and missing ones"),
        ({"datatype": "FP64", "shape": [602], "data": [1.0] * 602}, "view': got 602 elements, wanted at most 600"),
    ],
)
def test_a_tensor_that_is_no_vector_of_the_model_is_refused(client, view, message):
    inputs = [
        {"name": "item", "datatype": "INT64", "shape": [3], "data": [1, 2, 3]},
        {"name": "length", "datatype": "FP64", "shape": [3], "data": [1.0, 2.0, 3.0]},
        {"name": "view", **view},
        {"name": "user", "datatype": "FP64", "shape": [3], "data": [0.0, 1.0, 2.0]},
    ]
    response = client.infer({"inputs": inputs})
    assert response.status_code == 400 and message in response.json()["error"], response.text


@pytest.mark.parametrize(("view", "message"), [([[1.0]], "got 1 numbers in row 0"), ([[[1.0]]], "wanted a list of")])
def test_short_json_with_no_vector_of_the_model_is_refused(client, view, message):
    candidates = {"item": [1], "length": [2.0], "view": view}
    response = client.post("/rank", json={"context": {"user": [1.0, 2.0, 3.0]}, "candidates": candidates})
    assert response.status_code == 400 and message in response.text


def test_made_requests_are_of_the_model(client):
    made = examples.made(load(client.service.settings.artefact).encoder, requests=3, rows=4)
    assert {*made[0]["context"]} == {"user"} and len(made[0]["candidates"][0]["view"]) == 2
    for request in made:
        assert client.post("/rank", json=request).status_code == 200
