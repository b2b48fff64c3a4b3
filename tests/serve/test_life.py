"""Processes: they stop after what they have begun, take in a new artefact, and count together."""

import json
import os
import subprocess
import sys
import threading
import time

import httpx
import pytest
from serve.live import ROOT, Live
from serve.models import plain_request, small_ranker, tensors

from lt4rec_sparse import save
from lt4rec_sparse.serve.settings import Limits, Settings
from lt4rec_sparse.serve.worker import settings_from


@pytest.fixture
def artefact(tmp_path):
    save(small_ranker(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_stopped_server_is_unready_first_and_answers_what_it_has_begun(artefact):
    with Live(artefact, "--drain", "2") as live, httpx.Client(base_url=live.url, timeout=30) as client:
        body = json.dumps(plain_request()).encode()
        begun, go = threading.Event(), threading.Event()
        answers = []

        def slowly():
            yield body[:10]
            begun.set()
            go.wait(30)
            yield body[10:]

        request = threading.Thread(target=lambda: answers.append(client.post("/rank", content=slowly())))
        request.start()
        assert begun.wait(30)
        live.terminate()
        live.wait_for("draining")
        assert live.get("/v2/health/ready").status_code == 503
        assert live.get("/v2/health/live").status_code == 200
        assert live.post("/rank", plain_request()).status_code == 200, "requests that still come are answered"
        go.set()
        request.join(30)
        assert [answer.status_code for answer in answers] == [200]
        assert live.wait() == -15  # ended by the signal, when it was done
    assert not any("Traceback" in line for line in live.errors), live.errors


def test_a_file_that_cannot_be_served_ends_the_start_with_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"nonsense")
    for workers in ("1", "2"):
        command = [sys.executable, "-m", "lt4rec_sparse", "serve", str(path), "--port", "0", "--workers", workers]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode != 0
        assert "lt4rec-sparse: " in done.stderr and "wanted an artefact" in done.stderr
        assert "Traceback" not in done.stderr
        assert json.loads(done.stdout.splitlines()[0])["event"] == "refused"
    save(small_ranker(), path)
    (tmp_path / "requests.json").write_text('{"requests": 3}', "utf-8")
    command = [sys.executable, "-m", "lt4rec_sparse", "serve", str(path), "--port", "0", "--examples", "requests.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 3 and "requests.json: got requests 3" in done.stderr and "Traceback" not in done.stderr
    absent = [sys.executable, "-m", "lt4rec_sparse", "serve", str(tmp_path / "none")]
    done = subprocess.run(absent, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and "no such file" in done.stderr


def test_workers_count_together_unload_together_and_take_in_a_new_artefact(artefact):
    options = ("--workers", "2", "--control", "--watch", "0.05", "--drain", "0")
    with Live(artefact, *options) as live:
        live.wait_for("loaded", 2)
        wait_until_ready(live)
        with httpx.Client(base_url=live.url) as client:
            for _ in range(3):
                assert client.post("/v2/models/shop/infer", json={"inputs": tensors()}).status_code == 200
        for _ in range(20):  # each on a connection of its own: some of them to the other worker
            assert live.post("/v2/models/shop/infer", {"inputs": tensors()}).status_code == 200
        (stats,) = live.get("/v2/models/shop/stats").json()["model_stats"]
        assert stats["execution_count"] == 23
        assert 'nv_inference_request_success{model="shop"' in live.get("/metrics").text
        assert live.post("/v2/repository/models/shop/unload", {}).status_code == 200
        for _ in range(10):
            assert live.post("/rank", plain_request()).status_code == 404
        assert live.post("/v2/repository/models/shop/load", {}).status_code == 200
        for _ in range(10):
            assert live.post("/rank", plain_request()).status_code == 200
        save(small_ranker(seed=1), artefact)
        live.wait_for("loaded", 4)
        versions = {live.post("/rank", plain_request()).json()["version"] for _ in range(10)}
        assert len(versions) == 1 and versions != {stats["version"]}
        live.terminate()
        live.wait()
    assert not any("Traceback" in line for line in live.errors), live.errors


def wait_until_ready(live):
    for _ in range(300):
        try:
            if live.get("/v2/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(live.errors)


def test_settings_reach_a_worker_as_they_were():
    import dataclasses

    settings = Settings("a.safetensors", limits=Limits(rows=7))
    assert settings_from(json.dumps(dataclasses.asdict(settings))) == settings
