"""Clients of the Open Inference Protocol as they come, over loopback."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from serve.live import ROOT, Live
from serve.models import CANDIDATES, raw_columns, small_ranker, tensors

from lt4rec_sparse import load, save

KSERVE = ROOT / ".kserve" / "bin" / "python"  # its own: kserve wants an older protobuf, and brings pandas and gRPC


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    path = tmp_path_factory.mktemp("live") / "model.safetensors"
    save(small_ranker(), path)
    with Live(path, "--control", "--drain", "0") as server:
        server.artefact = path
        yield server


@pytest.fixture
def triton(live):
    http = pytest.importorskip("tritonclient.http", reason="the client is an extra")
    client = http.InferenceServerClient(live.url.removeprefix("http://"))
    yield client
    client.close()


def triton_inputs(is_binary):
    from tritonclient.http import InferInput

    found = []
    for entry in tensors():
        missing = [value is None for value in entry["data"]]
        dtype = {"INT64": np.int64, "FP64": np.float64, "BYTES": np.object_}[entry["datatype"]]
        # Without binary data the client knows no null: what is missing is marked beside the column.
        data = np.array([(value if value is not None else 0) for value in entry["data"]], dtype)
        if entry["datatype"] == "BYTES":
            data = np.array([text.encode() for text in entry["data"]], np.object_)
        found.append(InferInput(entry["name"], entry["shape"], entry["datatype"]))
        found[-1].set_data_from_numpy(data, binary_data=is_binary)
        if any(missing):
            found.append(InferInput(f"{entry['name']}.present", entry["shape"], "BOOL"))
            found[-1].set_data_from_numpy(~np.array(missing), binary_data=is_binary)
    return found


@pytest.mark.parametrize("is_binary", [True, False])
def test_triton_s_client_reads_the_rankers_scores(live, triton, is_binary):
    from tritonclient.http import InferRequestedOutput

    scores = load(live.artefact).score(raw_columns())
    outputs = [InferRequestedOutput(task, binary_data=is_binary) for task in ("ctr", "cvr")]
    for asked in (None, outputs):
        result = triton.infer("shop", triton_inputs(is_binary), outputs=asked, request_id="7")
        assert result.get_response()["id"] == "7"
        for task, of_task in scores.items():
            assert (result.as_numpy(task) == of_task).all() and result.as_numpy(task).dtype == np.float32
    ranked = triton.infer("shop", triton_inputs(is_binary), parameters={"k": 2, "by.ctr": 1.0})
    assert ranked.as_numpy("row").tolist() == np.argsort(-scores["ctr"], kind="stable")[:2].tolist()


def test_triton_s_client_sees_the_model_and_its_counters(live, triton):
    assert triton.is_server_live() and triton.is_server_ready() and triton.is_model_ready("shop")
    assert not triton.is_model_ready("other") and not triton.is_model_ready("shop", "7")
    assert triton.get_server_metadata()["name"] == "lt4rec_sparse"
    about = triton.get_model_metadata("shop")
    assert {entry["name"] for entry in about["inputs"]} == {entry["name"] for entry in tensors()}
    (version,) = about["versions"]
    before = triton.get_inference_statistics("shop")["model_stats"][0]["inference_count"]
    triton.infer("shop", triton_inputs(True), model_version=version)
    (stats,) = triton.get_inference_statistics("shop", version)["model_stats"]
    assert stats["inference_count"] == before + len(CANDIDATES["item"])


def test_triton_s_client_raises_our_errors(triton):
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match="column 'item': got nothing") as raised:
        triton.infer("shop", triton_inputs(True)[2:])
    assert raised.value.status() == "400"


def test_triton_s_client_loads_and_unloads(triton):
    triton.unload_model("shop")
    assert not triton.is_server_ready() and not triton.is_model_ready("shop")
    assert triton.get_model_repository_index()[0]["state"] == "UNAVAILABLE"
    triton.load_model("shop")
    assert triton.is_model_ready("shop")
    assert triton.get_model_repository_index()[0]["state"] == "READY"


@pytest.mark.skipif(not KSERVE.exists(), reason="kserve is not in .kserve: python -m tests.check installs it")
def test_kserve_s_client_reads_the_rankers_scores(live):
    script = Path(__file__).with_name("kserve_client.py")
    given = json.dumps(tensors())
    done = subprocess.run(
        [KSERVE, script, live.url], input=given, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    scores = load(live.artefact).score(raw_columns())
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers.pop("health") == [True, True, True]
    assert list(answers) == ["json", "binary"]
    for found in answers.values():
        assert {task: np.float32(values).tolist() for task, values in found.items()} == {
            task: of_task.tolist() for task, of_task in scores.items()
        }
