"""The Open Inference Protocol: inputs in every form mean what `Ranker` means; outputs are its scores, exactly."""

import json
import struct

import numpy as np
import pytest
from serve.models import CANDIDATES, CONTEXT, as_binary, plain_request, raw_columns, tensors


def outputs(response, header=None):
    """Return name -> array of a response, from JSON or bytes."""
    length = response.headers.get("Inference-Header-Content-Length")
    content = json.loads(response.content[: int(length)] if length else response.content)
    at, found = int(length or 0), {}
    dtypes = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64}
    for output in content["outputs"]:
        dtype = np.dtype(dtypes[output["datatype"]])
        if "parameters" in output:
            size = output["parameters"]["binary_data_size"]
            found[output["name"]] = np.frombuffer(response.content[at : at + size], dtype)
            at += size
        else:
            found[output["name"]] = np.array(output["data"], dtype)
        assert output["shape"] == [len(found[output["name"]])]
    assert at == (len(response.content) if length else 0)
    return found


def assert_scores(found, ranker, columns):
    scores = ranker.score(columns)
    for task, of_task in scores.items():
        assert found[task].dtype == np.float32 and (found[task] == of_task).all()
    product = scores["ctr"].astype(np.float64) * scores["cvr"]
    assert (found["rank_score"] == product).all()
    assert found["row"].tolist() == list(range(len(product)))


def test_json_and_bytes_give_the_rankers_scores_in_the_order_of_the_candidates(client, ranker):
    listed, binary = as_binary(tensors())
    for response in (client.infer({"inputs": tensors()}), client.infer({"inputs": listed}, binary)):
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/json"
        assert_scores(outputs(response), ranker, raw_columns())


@pytest.mark.parametrize("parameters", [{"binary_data_output": True}, {"binary_data_output": True, "k": 3}])
def test_outputs_come_as_bytes_where_they_are_asked_for(client, parameters):
    as_lists = {key: value for key, value in parameters.items() if key == "k"}
    in_bytes, in_json = (client.infer({"inputs": tensors(), "parameters": chosen}) for chosen in (parameters, as_lists))
    assert in_bytes.headers["content-type"] == "application/octet-stream"
    a, b = outputs(in_bytes), outputs(in_json)
    assert list(a) == list(b) == ["ctr", "cvr", "rank_score", "row"]
    assert all((a[name] == b[name]).all() and a[name].dtype == b[name].dtype for name in a)


def test_requested_outputs_come_in_their_order_each_as_it_was_asked_for(client):
    asked = [{"name": "row", "parameters": {"binary_data": True}}, {"name": "ctr"}]
    response = client.infer({"inputs": tensors(), "outputs": asked, "id": "42"})
    found = outputs(response)
    assert list(found) == ["row", "ctr"]
    length = int(response.headers["Inference-Header-Content-Length"])
    content = json.loads(response.content[:length])
    assert content["id"] == "42" and content["model_name"] == "shop"
    assert "data" in content["outputs"][1] and "data" not in content["outputs"][0]


def test_k_and_exponents_order_the_candidates_as_the_ranker_does(client, ranker):
    parameters = {"k": 3, "by.cvr": 2, "by.bid": 0.5}
    bid = {"name": "bid", "datatype": "FP32", "shape": [5], "data": [1.0, 2.0, 8.0, 0.0, 4.0]}
    found = outputs(client.infer({"inputs": [*tensors(), bid], "parameters": parameters}))
    columns = raw_columns() | {"bid": [1.0, 2.0, 8.0, 0.0, 4.0]}
    wanted = ranker.rank(columns, k=3, by={"cvr": 2, "bid": 0.5})
    assert (found["row"] == wanted.rows).all() and (found["rank_score"] == wanted.rank_scores).all()
    assert all((found[task] == wanted.scores[task]).all() for task in ranker.tasks)


def test_what_is_missing_may_be_null_or_nan_or_not_present(client, ranker):
    """Whatever the column holds where it is not present."""
    entries = {entry["name"]: entry for entry in tensors()}
    entries["item"] |= {"data": [5, 2, 99, 77, 1]}
    entries["seller"] |= {"data": [1, 2, 3, 4, 2**60 + 1]}
    entries["length"] |= {"data": [60.0, 5.0, 12.5, float("nan"), 600.0]}
    beside = [
        {"name": "item.present", "datatype": "BOOL", "shape": [5], "data": [True, True, False, True, True]},
        {"name": "seller.present", "datatype": "BOOL", "shape": [5], "data": [True, True, True, False, True]},
    ]
    assert_scores(outputs(client.infer({"inputs": [*entries.values(), *beside]})), ranker, raw_columns())
    entries["age"] |= {"data": ["20-30"]}
    beside.append({"name": "age.present", "datatype": "BOOL", "shape": [1], "data": [False]})
    without = raw_columns() | {"age": [None]}
    assert_scores(outputs(client.infer({"inputs": [*entries.values(), *beside]})), ranker, without)
    entries["age"] |= {"data": [None]}
    assert_scores(outputs(client.infer({"inputs": [*entries.values(), *beside[:2]]})), ranker, without)


def test_a_multi_valued_column_may_be_separated_text(client, ranker):
    entries = [entry for entry in tensors() if not entry["name"].startswith(("tags", "similar"))]
    entries.append({"name": "tags", "datatype": "BYTES", "shape": [5], "data": ["a|b", "", None, " b", "z|a"]})
    entries.append({"name": "similar", "datatype": "BYTES", "shape": [1], "data": ["3,4,3"]})
    assert_scores(outputs(client.infer({"inputs": entries})), ranker, raw_columns())


@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [("INT8", "<i1"), ("INT32", "<i4"), ("UINT8", "<u1"), ("UINT64", "<u8"), ("FP16", "<f2"), ("FP32", "<f4")],
)
def test_numbers_may_come_in_any_datatype_that_holds_them_exactly(client, ranker, datatype, dtype):
    columns = {"item": [5, 2, 1], "seller": [1, 2, 3], "length": [60.0, 5.0, 12.0], "tags": [[], [], []]}
    columns |= {"age": ["30-40"], "similar": [[]]}
    kind = datatype if not datatype.startswith("FP") else "INT64"
    size = dtype if not datatype.startswith("FP") else "<i8"
    parts = {
        "item": (kind, np.array(columns["item"], size)),
        "seller": (kind, np.array(columns["seller"], size)),
        "length": (datatype, np.array(columns["length"], dtype)),
    }
    entries, binary = [], b""
    for name, (of_column, values) in parts.items():
        data = values.tobytes()
        entries.append(
            {"name": name, "datatype": of_column, "shape": [3]} | {"parameters": {"binary_data_size": len(data)}}
        )
        binary += data
    entries.append({"name": "age", "datatype": "BYTES", "shape": [1], "data": ["30-40"]})
    for name, of_column, rows in (("tags", "BYTES", 3), ("similar", "INT64", 1)):
        entries.append({"name": name, "datatype": of_column, "shape": [0], "data": []})
        entries.append({"name": f"{name}.offsets", "datatype": "INT64", "shape": [rows + 1], "data": [0] * (rows + 1)})
    assert_scores(outputs(client.infer({"inputs": entries}, binary)), ranker, columns)


def test_no_candidates_give_no_scores(client):
    entries = [entry | ({"shape": [0], "data": []} if entry["shape"] == [5] else {}) for entry in tensors()]
    for entry in entries:
        if entry["name"] == "tags":
            entry |= {"shape": [0], "data": []}
        if entry["name"] == "tags.offsets":
            entry |= {"shape": [1], "data": [0]}
    found = outputs(client.infer({"inputs": entries}))
    assert all(len(values) == 0 for values in found.values())


def changed(name, **changes):
    return [entry | changes if entry["name"] == name else entry for entry in tensors()]


TEXT = struct.pack("<I", 3) + b"20-"
BINARY = {"parameters": {"binary_data_size": 7}}


@pytest.mark.parametrize(
    ("content", "binary", "message"),
    [
        ({}, None, "inputs: got None"),
        ({"inputs": []}, None, "inputs: got [], wanted a list of at least one input"),
        ({"inputs": [3]}, None, "inputs: got 3, wanted objects"),
        ({"inputs": tensors(), "batch": 1}, None, "'batch': got an unknown key"),
        ({"inputs": tensors(), "id": 3}, None, "id: got 3, wanted text"),
        ({"inputs": tensors(), "model_name": "x"}, None, "model_name: got 'x', wanted 'shop'"),
        ({"inputs": [*tensors(), tensors()[0]]}, None, "input 'item': got it twice"),
        ({"inputs": tensors()[1:]}, None, "column 'item': got nothing"),
        ({"inputs": changed("item", shape=[-5])}, None, "input 'item': got shape [-5]"),
        ({"inputs": changed("item", shape=[5, 1])}, None, "input 'item': got shape [5, 1], wanted one dimension"),
        ({"inputs": changed("item", shape=[True])}, None, "input 'item': got shape [True]"),
        ({"inputs": changed("item", shape=[10**18])}, None, "input 'item': got 1000000000000000000 elements"),
        ({"inputs": changed("item", shape=[4])}, None, "input 'item': got 5 values in data, wanted 4"),
        ({"inputs": changed("item", datatype="INT4")}, None, "input 'item': got datatype 'INT4'"),
        ({"inputs": changed("item", datatype="FP64")}, None, "input 'item': got FP64, wanted INT64"),
        ({"inputs": changed("item", data=[[5, 2, None, 77, 1]])}, None, "input 'item': got 1 values"),
        ({"inputs": changed("item", data=[[5], 2, 3, 77, 1])}, None, "input 'item': got [5] in data"),
        ({"inputs": changed("item", data=[5.0, 2, 3, 77, 1])}, None, "input 'item': got 5.0 in data, wanted INT64"),
        ({"inputs": changed("item", data=[2**63, 2, 3, 7, 1])}, None, "input 'item': got 9223372036854775808"),
        ({"inputs": changed("length", data=[10**400, 2, 3, 7, 1])}, None, "input 'length': got 1000"),
        ({"inputs": changed("length", datatype="FP32", data=[1e39, 2, 3, 7, 1])}, None, "got 1e+39, wanted FP32"),
        ({"inputs": changed("length", datatype="BYTES", data=["x"] * 5)}, None, "input 'length': got BYTES"),
        ({"inputs": changed("length", datatype="INT64", data=[2**60] * 5)}, None, "got ints beyond 2^53"),
        ({"inputs": changed("age", data=["x" * 65])}, None, "input 'age': got a text of 65 bytes, wanted at most 64"),
        ({"inputs": changed("age", data=["é" * 33])}, None, "input 'age': got a text of 66 bytes"),
        ({"inputs": changed("age", data=["\ud800"])}, None, "text that UTF-8 can spell"),
        ({"inputs": changed("age", parameters=[])}, None, "input 'age': got parameters []"),
        ({"inputs": changed("age", parameters={"shared_memory_region": "x"})}, None, "wanted binary_data_size alone"),
        ({"inputs": changed("age", parameters={"binary_data_size": 4})}, b"", "got data beside binary_data_size"),
        ({"inputs": changed("age", data=None, **BINARY)}, TEXT[:6], "got binary_data_size 7, wanted at most 6"),
        ({"inputs": changed("age", data=None, **BINARY)}, TEXT + b"x", "body: got 8 bytes after its JSON, wanted 7"),
        ({"inputs": changed("age", data=None, **BINARY)}, b"\x04" + TEXT[1:], "wanted more: text 0 ends beyond them"),
        ({"inputs": changed("age", data=None, **BINARY)}, b"\x02" + TEXT[1:], "wanted 6, where its 1 texts end"),
        ({"inputs": changed("age", data=None, **BINARY)}, b"\xff" * 7, "input 'age': got a text of 4294967295 bytes"),
        ({"inputs": changed("age", data=None, **BINARY)}, TEXT[:4] + b"\xff\xff\xff", "bytes that are no UTF-8 at 0"),
        ({"inputs": changed("item", data=None, **BINARY)}, b"x" * 7, "input 'item': got 7 bytes, wanted 40"),
        ({"inputs": changed("tags.offsets", data=[0, 2, 1, 2, 3, 5])}, None, "input 'tags.offsets': got"),
        ({"inputs": changed("tags.offsets", data=[0, 2, 2, 2, 3, 6])}, None, "wanted offsets that ascend from 0 to 5"),
        ({"inputs": changed("tags.offsets", data=[0, 2, 2, 2, None, 5])}, None, "without missing ones"),
        ({"inputs": changed("tags.offsets", shape=[0], data=[])}, None, "wanted offsets that ascend"),
        ({"inputs": changed("similar", shape=[21], data=[1] * 21)[:-1]}, None, "got INT64 without offsets"),
        (
            {"inputs": [*changed("similar", shape=[21], data=[1] * 21)[:-1], tensors()[-1] | {"data": [0, 21]}]},
            None,
            "column 'similar': got 21 values in one row, wanted at most 20",
        ),
        ({"inputs": changed("seller", shape=[2], data=[1, 2])}, None, "column 'seller': got 2 rows, wanted 5"),
        ({"inputs": changed("seller", shape=[301], data=[1] * 301)}, None, "input 'seller': got 301 elements"),
        ({"inputs": [*tensors(), tensors()[0] | {"name": "price"}]}, None, "input 'price': got no column of the model"),
        (
            {"inputs": [*tensors(), {"name": "age.present", "datatype": "INT8", "shape": [1], "data": [1]}]},
            None,
            "input 'age.present': got INT8, wanted BOOL",
        ),
        (
            {"inputs": [*tensors(), {"name": "item.present", "datatype": "BOOL", "shape": [1], "data": [True]}]},
            None,
            "input 'item.present': got 1 elements, wanted 5",
        ),
        ({"inputs": tensors(), "parameters": {"k": 0}}, None, "k: got 0"),
        ({"inputs": tensors(), "parameters": {"k": 2.0}}, None, "k: got 2.0"),
        ({"inputs": tensors(), "parameters": {"top": 2}}, None, "parameters: got 'top'"),
        ({"inputs": tensors(), "parameters": {"by.ctr": -1}}, None, "by: got exponent -1"),
        ({"inputs": tensors(), "parameters": {"by.ctr": 1e308, "by.length": 1e308}}, None, "column 'length'"),
        ({"inputs": tensors(), "parameters": {"by.price": 1}}, None, "by: got 'price'"),
        ({"inputs": tensors(), "parameters": {"binary_data_output": 1}}, None, "binary_data_output 1"),
        ({"inputs": tensors(), "outputs": [{"name": "x"}]}, None, "outputs: got 'x', wanted some of ctr, cvr"),
        ({"inputs": tensors(), "outputs": [{"name": "ctr"}] * 2}, None, "output 'ctr': got"),
        (
            {"inputs": tensors(), "outputs": [{"name": "ctr", "parameters": {"classification": 3}}]},
            None,
            "output 'ctr': got",
        ),
    ],
)
def test_a_malformed_request_is_refused_by_the_name_of_the_field(client, content, binary, message):
    response = client.infer(content, binary)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"] and "\n" not in response.json()["error"]


def test_rank_scores_beyond_float64_are_refused(client):
    bid = {"name": "bid", "datatype": "FP64", "shape": [1], "data": [1e300]}
    response = client.infer({"inputs": [*tensors(), bid], "parameters": {"by.bid": 2}})
    assert response.status_code == 400
    assert response.json()["error"] == "rank score of row 0: got inf, wanted a finite number"


@pytest.mark.parametrize("length", ["-1", "x", "9" * 30, "100000", "1.0"])
def test_a_wrong_header_length_is_refused(client, length):
    response = client.post("/v2/models/shop/infer", content=b"{}", headers={"Inference-Header-Content-Length": length})
    assert response.status_code == 400
    assert response.json()["error"].startswith("Inference-Header-Content-Length: got")


def test_the_model_lists_its_inputs_and_outputs(client):
    about = client.get("/v2/models/shop").json()
    assert about["name"] == "shop" and len(about["versions"]) == 1
    inputs = {entry["name"]: entry["datatype"] for entry in about["inputs"]}
    assert inputs == {entry["name"]: entry["datatype"] for entry in tensors()}
    assert [entry["name"] for entry in about["outputs"]] == ["ctr", "cvr", "rank_score", "row"]
    assert client.get(f"/v2/models/shop/versions/{about['versions'][0]}").json() == about


def test_plain_json_ranks_as_the_protocol_does(client):
    found = outputs(client.infer({"inputs": tensors(), "parameters": {"k": 5}}))
    ranked = client.post("/rank", json=plain_request()).json()["ranking"]
    assert [entry["row"] for entry in ranked] == found["row"].tolist()
    assert [entry["rank_score"] for entry in ranked] == found["rank_score"].tolist()
    assert [np.float32(entry["scores"]["ctr"]) for entry in ranked] == found["ctr"].tolist()
    assert set(CANDIDATES) | set(CONTEXT) == set(client.service.slot.current.columns.features)


@pytest.mark.parametrize(
    ("datatype", "data", "beyond"),
    [
        ("FP16", [1e5, float("inf"), 60.0, 1.0, -7e4], "100000.0"),
        ("FP32", [1.0, 2.0, -1e39, 10**30, 3.0], "-1e+39"),
        ("FP64", [1e308, 10**309, 3.0, float("nan"), 1.0], "1000"),
        ("UINT8", [200, 3, -1, 4, 5], "-1"),
        ("INT8", [-128, 128, 3, 4, 5], "128"),
    ],
)
def test_the_value_that_a_datatype_cannot_hold_is_named(client, datatype, data, beyond):
    response = client.infer({"inputs": changed("length", datatype=datatype, data=data)})
    assert response.status_code == 400
    assert response.json()["error"].startswith(f"input 'length': got {beyond}") and datatype in response.json()["error"]
