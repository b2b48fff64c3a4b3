"""A ranker on a GPU: the same scores as on the CPU. Interpreted where there is no GPU."""

import copy

import pytest
import torch
from oracle import Layer, assert_exact, assert_rounding, mlp_reference

from lt4rec_sparse import MaskedMLP, Ranker, freeze, load, save
from lt4rec_sparse.cli import app
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def ranker(small_log):
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(small_log.encoder.fields, small_log.encoder.table_sizes, dim=4, std=0.3)
    mlp = MaskedMLP(inputs.out_features, (32, 16), tasks=("ctr", "cvr"))
    generator = torch.Generator().manual_seed(0)
    for task in mlp.tasks:
        shapes = mlp.mask(task).shapes
        mlp.set_mask(Mask.random(shapes, {n: r * c // 5 for n, (r, c) in shapes.items()}, generator), task)
    return Ranker(small_log.encoder, inputs, freeze(mlp, sigmoid=True))


@pytest.fixture(scope="module")
def features(small_log):
    return next(small_log.stream("test", 20, shuffle=False).epoch(0)).features


def test_a_gpu_scores_as_the_cpu_does(ranker, features):
    gpu = ranker.on_gpu("fp32", device=DEVICE, batch_sizes=(8,))
    x = ranker.inputs(features)
    scores = gpu.score_encoded(features).cpu()
    for i, (head, task) in enumerate(zip(ranker.mlp.network.heads.values(), ranker.tasks, strict=True)):
        layers = [Layer(layer.weight.to_dense(task), layer.bias, "relu") for layer in ranker.mlp.network.hidden]
        layers.append(Layer(head.weight, head.bias, "sigmoid"))
        assert_rounding(scores[:, i : i + 1], mlp_reference(x.detach(), layers))
    assert gpu.precision == "fp32" and gpu.tasks == ranker.tasks


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_rounded_embeddings_and_given_vectors_move_to_the_gpu(ranker, features, kind):
    first, *_ = ranker.encoder.fields
    rounded = Ranker(ranker.encoder, ranker.inputs.rounded(kind), ranker.mlp)
    dense = Ranker(ranker.encoder, rounded.inputs.rounded("fp32"), ranker.mlp)
    without = Ranker(ranker.encoder, rounded.inputs.without([first.table]), ranker.mlp)
    given = {
        field.column: dense.inputs.embed(features)[:, i]
        for i, field in enumerate(ranker.encoder.fields)
        if field.table == first.table
    }
    wanted = dense.on_gpu("fp32", device=DEVICE, batch_sizes=(8,)).score_encoded(features)
    for held, vectors in ((rounded, None), (without, given)):
        gpu = held.on_gpu("fp32", device=DEVICE, batch_sizes=(8,))
        assert gpu.inputs.device.type == DEVICE
        assert_exact(gpu.score_encoded(features, vectors), wanted)


def test_it_is_saved_as_the_ranker_that_it_was_made_from(ranker, tmp_path, features):
    gpu = ranker.on_gpu("fp16", device=DEVICE, batch_sizes=(4,))
    save(ranker, tmp_path / "cpu.safetensors")
    save(gpu, tmp_path / "gpu.safetensors")
    assert (tmp_path / "gpu.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()
    assert_exact(load(tmp_path / "gpu.safetensors").score_encoded(features), ranker.score_encoded(features))


def test_what_a_gpu_cannot_do_is_refused(ranker, monkeypatch):
    gpu = ranker.on_gpu("fp16", device=DEVICE, batch_sizes=(1,))
    with pytest.raises(ValueError, match="on_gpu: got an MLP that is served by a GraphExecutor, wanted"):
        gpu.on_gpu(device=DEVICE)
    with pytest.raises(ValueError, match="to_precision: got an MLP that is served by a GraphExecutor, wanted"):
        copy.copy(gpu).to_precision("bf16")
    with pytest.raises(ValueError, match="precision: got 'int8', wanted one of bf16, fp16, fp32"):
        ranker.on_gpu("int8", device=DEVICE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device: got cuda, wanted one that this machine's torch sees: cpu"):
        ranker.on_gpu()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "device: got 'tpu', wanted cpu or cuda"),
        pytest.param(
            "cuda",
            "device: got cuda, wanted one that this machine's torch sees: cpu",
            marks=pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU"),
        ),
    ],
)
def test_the_command_names_a_device_that_is_not_there(ranker, tmp_path, capsys, device, message):
    save(ranker, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit):
        app(
            [
                "score",
                str(tmp_path / "model.safetensors"),
                "rows.parquet",
                str(tmp_path / "out.parquet"),
                "--device",
                device,
            ]
        )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.parquet").exists()
