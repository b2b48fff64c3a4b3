"""Routes, limits, counters and the log, in process."""

import asyncio
import json
import logging
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
from serve.models import LIMITS, Client, as_binary, plain_request, raw_columns, settings, small_ranker, tensors

from lt4rec_sparse import save
from lt4rec_sparse.serve import examples, worker
from lt4rec_sparse.serve.command import cores
from lt4rec_sparse.serve.model import Model
from lt4rec_sparse.serve.service import LOG, Service
from lt4rec_sparse.serve.settings import RequestError


@pytest.fixture
def own(tmp_path):
    """A client of a service that a test may change."""
    service = Service(settings(tmp_path, control=True))
    service.load()
    client = Client(service)
    yield client
    client.close()


def test_the_server_says_that_it_lives_and_is_ready(client):
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data", "model_repository", "statistics"]
    version = client.service.slot.current.version
    for path in ("/v2/models/shop/ready", f"/v2/models/shop/versions/{version}/ready"):
        assert client.get(path).json() == {"name": "shop", "ready": True}


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2/models/other", 404, "model: got 'other', wanted 'shop'"),
        ("GET", "/v2/models/shop/versions/7/ready", 404, "version: got '7'"),
        ("POST", "/v2/models/other/infer", 404, "model: got 'other'"),
        ("GET", "/v2/nothing", 404, "path: got GET '/v2/nothing'"),
        ("DELETE", "/v2", 405, "path: got DELETE '/v2'"),
        ("GET", "/rank", 405, "path: got GET '/rank'"),
        ("POST", "/v2/repository/models/shop/load", 403, "wanted a server that was started with --control"),
    ],
)
def test_what_is_not_there_is_an_error_in_json(client, method, path, status, message):
    response = client.send(method, path, content=b"{}" if method == "POST" else None)
    assert response.status_code == status and message in response.json()["error"]


def test_a_body_over_the_limit_is_refused_by_its_length_and_as_it_comes(client):
    async def endless():
        nonlocal sent
        while True:
            sent += 1 << 16
            yield b" " * (1 << 16)

    sent = 0
    long = client.post("/rank", content=b" " * (LIMITS.body_bytes + 1))
    unknown = client.post("/rank", content=endless())
    for response in (long, unknown):
        assert response.status_code == 413
        assert response.json()["error"] == "body: got more than 1048576 bytes, wanted at most that"
        assert response.headers["connection"] == "close"
    assert LIMITS.body_bytes < sent <= LIMITS.body_bytes + (1 << 16)


def test_json_has_a_limit_of_its_own_whatever_bytes_follow_it(tmp_path):
    service = Service(settings(tmp_path, limits=replace(LIMITS, json_bytes=4000)))
    service.load()
    client = Client(service)
    listed, binary = as_binary(tensors())
    header = {"Inference-Header-Content-Length": "4001"}
    for path, headers in (("/rank", {}), ("/v2/models/shop/infer", {}), ("/v2/models/shop/infer", header)):
        response = client.post(path, content=b" " * 4001, headers=headers)
        assert response.status_code == 413 and "wanted at most" in response.json()["error"]
    assert len(json.dumps(listed)) < 4000
    long = {"name": "length", "datatype": "FP64", "shape": [1000], "parameters": {"binary_data_size": 8000}}
    refused = client.infer({"inputs": [*listed, long]}, binary + bytes(8000))
    assert refused.status_code == 400, "it was read, and refused for what it holds"
    client.close()


def test_a_body_that_does_not_come_is_given_up(tmp_path):
    service = Service(settings(tmp_path, limits=replace(LIMITS, body_seconds=0.05)))
    service.load()
    client = Client(service)

    async def stalled():
        yield b"{"
        await asyncio.Event().wait()

    response = client.post("/rank", content=stalled())
    client.close()
    assert response.status_code == 408 and response.json()["error"].startswith("body: got 1 bytes in 0.05 s")


def test_a_compressed_body_is_refused(client):
    response = client.post("/rank", content=b"{}", headers={"Content-Encoding": "gzip"})
    assert response.status_code == 415 and response.json()["error"] == "Content-Encoding: got 'gzip', wanted none"


def test_more_requests_than_may_wait_are_refused_before_they_are_read(tmp_path):
    service = Service(settings(tmp_path, waiting=0))
    service.load()
    client = Client(service)
    with service.admitted():
        response = client.post("/rank", json=plain_request())
        assert response.status_code == 503 and "wanted fewer" in response.json()["error"]
        assert client.get("/v2/health/live").status_code == 200
    assert client.post("/rank", json=plain_request()).status_code == 200
    client.close()


def test_counters_are_named_as_triton_names_them(own):
    version = own.service.slot.current.version
    for _ in range(3):
        assert own.infer({"inputs": tensors()}).status_code == 200
    assert own.infer({"inputs": []}).status_code == 400
    text = own.get("/metrics").text
    found = dict(re.findall(r'^(nv_\w+){model="shop",version="' + version + r'"} (\S+)$', text, re.MULTILINE))
    assert set(found) == {
        "nv_inference_request_success",
        "nv_inference_request_failure",
        "nv_inference_count",
        "nv_inference_exec_count",
        "nv_inference_request_duration_us",
        "nv_inference_queue_duration_us",
        "nv_inference_compute_infer_duration_us",
    }
    counted = [float(found[f"nv_inference_{name}"]) for name in ("request_success", "request_failure", "count")]
    assert counted == [3, 1, 15]
    assert "# TYPE nv_inference_request_success counter" in text
    for stage in ("read", "queue", "compute", "write"):
        assert f'lt4rec_sparse_stage_seconds_count{{stage="{stage}"}} 3.0' in text
    (stats,) = own.get("/v2/models/shop/stats").json()["model_stats"]
    assert (stats["inference_count"], stats["execution_count"]) == (15, 3)
    assert stats["inference_stats"]["success"]["count"] == 3 and stats["inference_stats"]["success"]["ns"] > 0
    assert stats["inference_stats"]["fail"]["count"] == 1
    assert own.get("/v2/models/stats").json()["model_stats"] == [stats]


def test_a_log_line_says_what_was_asked_and_what_took_how_long(tmp_path, caplog):
    service = Service(settings(tmp_path, access_log=True))
    caplog.set_level(logging.INFO, "lt4rec_sparse.serve")
    service.load()
    client = Client(service)
    answered = client.post("/rank", json=plain_request(), headers={"X-Request-ID": "abc-1"})
    refused = client.post("/rank", content=b"", headers={"X-Request-ID": "no spaces"})
    client.close()
    loaded, first, second = (json.loads(record.message) for record in caplog.records)
    assert loaded["event"] == "loaded" and loaded["model"] == "shop"
    assert (first["method"], first["path"], first["status"], first["rows"]) == ("POST", "/rank", 200, 5)
    assert (
        set(first["us"]) == {"read", "queue", "compute", "write"} and first["total_us"] >= sum(first["us"].values()) - 4
    )
    assert first["request_id"] == answered.headers["x-request-id"] == "abc-1"
    assert (second["status"], second["rows"]) == (400, 0)
    assert (
        re.fullmatch("[0-9a-f]{32}", second["request_id"]) and refused.headers["x-request-id"] == second["request_id"]
    )


def test_a_client_unloads_and_loads_the_model(own):
    assert own.post("/v2/repository/models/other/unload").status_code == 404
    assert own.post("/v2/repository/models/shop/load", json={"parameters": {"config": "x"}}).status_code == 400
    assert own.post("/v2/repository/models/shop/unload", json={"parameters": {"unload_dependents": False}}).json() == {}
    assert own.get("/v2/health/ready").status_code == 503
    assert own.post("/v2/repository/index").json()[0]["state"] == "UNAVAILABLE"
    assert own.post("/v2/repository/index", json={"ready": True}).json() == []
    assert own.infer({"inputs": tensors()}).status_code == 404
    assert own.post("/v2/repository/models/shop/load").json() == {}
    (entry,) = own.post("/v2/repository/index", json={"ready": True}).json()
    assert entry == {"name": "shop", "version": own.service.slot.current.version, "state": "READY", "reason": ""}
    assert own.infer({"inputs": tensors()}).status_code == 200


def test_a_new_artefact_takes_the_place_of_the_old_one(own, tmp_path):
    before = own.service.slot.current
    assert not own.service.slot.is_changed()
    other = small_ranker(seed=1)
    save(other, own.service.settings.artefact)
    own.service.refresh()
    assert own.service.slot.current.version != before.version
    scores = own.infer({"inputs": tensors()}).json()["outputs"][0]["data"]
    assert scores != [float(x) for x in before.ranker().score(raw_columns())["ctr"]]
    assert scores == [float(x) for x in other.score(raw_columns())["ctr"]]
    assert 'lt4rec_sparse_loads_total{result="loaded"} 2.0' in own.get("/metrics").text


@pytest.mark.parametrize("content", ["truncated", "altered", "empty", "text", "absent"])
def test_an_artefact_that_cannot_be_served_is_refused_while_the_old_one_serves(own, tmp_path, content):
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    half = len(whole) // 2
    bad = {
        "truncated": whole[:half],
        "altered": whole[:-1] + bytes([whole[-1] ^ 1]),
        "empty": b"",
        "text": b"model\n",
        "absent": None,
    }[content]
    before = own.infer({"inputs": tensors()}).json()
    path.unlink()  # as a rename would: the old file stays mapped
    if bad is not None:
        path.write_bytes(bad)
    own.service.refresh()
    refused = own.post("/v2/repository/models/shop/load")
    assert refused.status_code == 400 and "model.safetensors" in refused.json()["error"]
    assert own.infer({"inputs": tensors()}).json() == before
    assert own.post("/v2/repository/index").json()[0]["reason"] == refused.json()["error"]
    assert own.get("/v2/health/ready").status_code == 200
    assert 'result="refused"' in own.get("/metrics").text
    assert not own.service.slot.is_changed(), "one refusal per file, until there is another"
    path.unlink(missing_ok=True)
    save(small_ranker(seed=2), path)
    own.service.refresh()
    assert own.infer({"inputs": tensors()}).json()["model_version"] != before["model_version"]
    assert own.post("/v2/repository/index").json()[0]["reason"] == ""


def test_a_link_that_leads_elsewhere_is_a_new_artefact(tmp_path):
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        save(small_ranker(seed=seed), tmp_path / str(seed) / "model.safetensors")
    link = tmp_path / "current"
    link.symlink_to(tmp_path / "0")
    service = Service(settings(tmp_path, artefact=str(link / "model.safetensors")))
    before = service.load().version
    link.unlink()
    link.symlink_to(tmp_path / "1")
    service.refresh()
    service.pool.shutdown()
    assert service.model().version != before


def test_an_artefact_of_another_schema_is_refused_unless_the_model_has_a_name_of_its_own(tmp_path):
    path = tmp_path / "model.safetensors"
    other = small_ranker()
    other.encoder.schema = replace(other.encoder.schema, name="other")
    for name, wanted in (("", "shop"), ("mine", "mine")):
        save(small_ranker(), path)
        service = Service(settings(tmp_path, name=name))
        before = service.load()
        save(other, path)
        service.refresh()
        service.pool.shutdown()
        assert service.model().name == wanted
        assert (service.model() is before) == (not name)
        assert service.slot.reason == ("" if name else "name: got 'other', wanted 'shop', which is served")


@pytest.mark.parametrize("name", ["a/b", ""])
def test_a_name_that_paths_cannot_have_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"name: got '.*', wanted one without '/'"):
        Model(small_ranker(), name, "1", settings(tmp_path))


def test_examples_of_an_older_artefact_do_not_keep_a_new_one_out(tmp_path, caplog):
    (tmp_path / "requests.json").write_text('{"requests": [{"name": "x", "candidates": [{"gone": 1}]}]}', "utf-8")
    service = Service(settings(tmp_path, examples=str(tmp_path / "requests.json")))
    with caplog.at_level(logging.INFO, "lt4rec_sparse.serve"):
        model = service.load()
    assert [request["name"] for request in model.examples] == [f"request {i}" for i in range(1, 6)]
    (line,) = [line for line in map(json.loads, caplog.messages) if line["event"] == "examples"]
    assert line["reason"] == model.examples_reason and "'gone': got no column" in line["reason"]
    service.pool.shutdown()


def test_the_file_of_examples_is_read_once_per_artefact(tmp_path, monkeypatch):
    path, read = tmp_path / "requests.json", []
    path.write_text(json.dumps({"requests": [{"name": "x", **plain_request()}]}), "utf-8")
    from_file = examples.from_file
    monkeypatch.setattr(examples, "from_file", lambda *given: read.append(given) or from_file(*given))
    monkeypatch.setenv(worker.SETTINGS, json.dumps(asdict(settings(tmp_path, examples=str(path)))))
    monkeypatch.setattr(LOG, "handlers", [])
    monkeypatch.setattr(LOG, "propagate", LOG.propagate)
    level = LOG.level
    worker.app()
    LOG.setLevel(level)
    assert len(read) == 1


def test_an_unloaded_model_stays_unloaded_whatever_is_loaded(tmp_path):
    shared = {"shared_folder": str(tmp_path / "shared"), "control": True}
    (tmp_path / "shared").mkdir()
    for options in ({"control": True}, shared):
        service = Service(settings(tmp_path, **options))
        before = service.load()
        service.slot.unload()
        save(small_ranker(seed=int(before.version, 16) % 1000), service.settings.artefact)
        service.refresh()
        assert service.slot.current is not before and not service.is_ready()
        if options is shared:
            second = Service(settings(tmp_path, **shared))  # a worker that is started in the place of another
            second.load()
            second.pool.shutdown()
            assert not second.is_ready() and not service.is_ready()
        client = Client(service)
        assert client.post("/rank", json=plain_request()).status_code == 404
        assert client.post("/v2/repository/models/shop/load").status_code == 200
        assert client.post("/rank", json=plain_request()).status_code == 200
        client.close()


def test_a_precision_that_is_prepared_keeps_no_other_waiting(tmp_path, monkeypatch):
    model = Model(small_ranker(), "shop", "1", settings(tmp_path))
    begun, go = threading.Event(), threading.Event()
    ranker = model.ranker()
    to_precision = ranker.to_precision

    def slowly(precision):
        begun.set()
        assert go.wait(30)
        return to_precision(precision)

    monkeypatch.setattr(ranker, "to_precision", slowly)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(model.ranker, "bf16")
        assert begun.wait(30)
        try:
            assert pool.submit(model.ranker).result(timeout=20) is ranker
        finally:
            go.set()
        assert other.result(timeout=30).precision == "bf16"


@pytest.mark.parametrize(
    ("quota", "wanted"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8), (None, 8)],
)
def test_a_container_s_quota_bounds_the_cores(tmp_path, monkeypatch, quota, wanted):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    path = tmp_path / "cpu.max"
    if quota is not None:
        path.write_text(f"{quota}\n", "ascii")
    assert cores(path) == wanted


def test_health_answers_while_every_thread_ranks(own, monkeypatch):
    begun, go = threading.Event(), threading.Event()
    ranker = own.service.model().ranker()

    def slowly(precision=""):
        begun.set()
        assert go.wait(30)
        return ranker

    monkeypatch.setattr(own.service.model(), "ranker", slowly)

    async def both():
        ranking = asyncio.ensure_future(own.request("POST", "/rank", json=plain_request()))
        await asyncio.to_thread(begun.wait, 30)
        health = await own.request("GET", "/v2/health/live")
        assert not ranking.done()
        go.set()
        return health.status_code, (await ranking).status_code

    assert own.wait(both()) == (200, 200)


def test_a_task_with_the_name_of_an_output_is_refused(tmp_path):
    ranker = small_ranker()
    ranker.tasks = ("ctr", "row")
    with pytest.raises(ValueError, match="task 'row': got the name of an output"):
        Model(ranker, "shop", "1", settings(tmp_path))


def test_an_uncalibrated_model_has_no_int8(tmp_path):
    save(small_ranker(is_calibrated=False), tmp_path / "model.safetensors")
    service = Service(settings(tmp_path))
    assert service.load().precisions == ("fp32", "bf16")
    with pytest.raises(RequestError, match="precision: got 'int8'"):
        service.model().ranker("int8")
    service.pool.shutdown()
