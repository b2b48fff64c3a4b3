"""`save_module` and `load_module`: what was frozen comes back to the bit, and nothing else does."""

import json

import pytest
import torch
from oracle import assert_exact
from pruned_models import Residual, in_blocks, pruned
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lt4rec_sparse import MaskedMLP, SparseLinear, SparseMLP, checked_file, freeze, load_module, save_module
from lt4rec_sparse.checked_file import ArtefactError
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.lottery import random_masks
from lt4rec_sparse.nn.module_file import KEY


def mlp(tasks=("a", "b"), granularity="weight"):
    masked = MaskedMLP(24, (32, 16), tasks=tasks)
    generator = torch.Generator().manual_seed(0)
    for task, mask in random_masks(
        masked.mask(tasks[0]).shapes, 0.3, tasks, generator, granularity=granularity
    ).items():
        masked.set_mask(mask, task)
    return masked


def network() -> nn.Module:
    return nn.Sequential(
        Residual(16), nn.Sequential(pruned(16, 16), nn.GELU(), pruned(16, 8)), nn.BatchNorm1d(5), nn.Linear(8, 2)
    )


def assert_same(loaded: nn.Module, saved: nn.Module, x: torch.Tensor) -> None:
    assert_exact(loaded(x), saved(x))
    ours, theirs = loaded.state_dict(), saved.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert_exact(ours[name], value)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("granularity", ["weight", "16x4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_an_mlp_alone(granularity, dtype, precision, tmp_path):
    x = torch.randn(40, 24)
    saved = freeze(mlp(granularity=granularity), sigmoid=True).calibrated(x).to_precision(precision).to(dtype)
    save_module(saved, tmp_path / "mlp.safetensors")
    loaded = load_module(tmp_path / "mlp.safetensors")
    assert type(loaded) is SparseMLP
    assert (loaded.precision, loaded.tasks, loaded.network.dtype) == (precision, ("a", "b"), dtype)
    assert loaded.network.quantization == saved.network.quantization
    assert_same(loaded, saved, x)


def test_a_layer_with_a_slope_and_no_bias(tmp_path):
    saved = SparseLinear.from_dense(torch.eye(5), activation=nn.LeakyReLU(0.2))
    save_module(saved, tmp_path / "layer.safetensors")
    loaded = load_module(tmp_path / "layer.safetensors")
    assert type(loaded) is SparseLinear
    assert_same(loaded, saved, torch.randn(3, 5))


@pytest.mark.parametrize("into", ["dense", "frozen", "meta"])
def test_a_network_is_loaded_into_one_built_alike(into, tmp_path):
    x = torch.randn(2, 5, 16)
    saved = freeze(network(), precision="int8", example=x)
    save_module(saved, tmp_path / "net.safetensors")
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    if into == "frozen":
        model = freeze(model)
    if into == "meta":
        model = model.to("meta")
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    assert_same(load_module(tmp_path / "net.safetensors", model), saved, x)
    if into != "meta":
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.last = pruned(8, 8)

    def forward(self, x):
        return self.last(self.first(x).relu())


def test_a_layer_in_two_places_is_one(tmp_path):
    model = Twice()
    saved = freeze(model)
    save_module(saved, tmp_path / "net.safetensors")
    loaded = load_module(tmp_path / "net.safetensors", model)
    assert loaded.first is loaded.last
    assert_same(loaded, saved, torch.randn(3, 8))


@pytest.mark.parametrize("activation", ["gelu", nn.GELU()])
@pytest.mark.parametrize("is_whole", [False, True])
def test_torchs_transformer_calls_its_sparse_parts(is_whole, activation, tmp_path):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True), 2)
    with torch.no_grad():
        for layer in model.layers:
            layer.linear1.weight *= torch.rand(32, 16) < 0.2
            if is_whole:
                layer.linear2.weight *= torch.rand(16, 32) < 0.2
    saved, x = freeze(model), torch.randn(2, 3, 16)
    save_module(saved, tmp_path / "net.safetensors")
    assert_same(load_module(tmp_path / "net.safetensors", model), saved, x)


def test_shared_parameters_are_stored(tmp_path):
    model = nn.Sequential(pruned(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[1].weight
    saved = freeze(model)
    save_module(saved, tmp_path / "net.safetensors")
    assert_same(load_module(tmp_path / "net.safetensors", model), saved, torch.randn(3, 8))


class Own(SparseMLP):
    """A user's subclass, which a file cannot name."""


class OnGpu:
    """What a GPU's executor has that a module sees."""

    def __init__(self, network):
        self.network, self.precision = network, "fp16"


def in_fp16() -> SparseMLP:
    network = freeze(mlp()).network
    return SparseMLP(network, "fp16", OnGpu(network))


class Extra(nn.Module):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (nn.Linear(3, 3), ValueError, "module: got a Linear without a sparse layer, wanted one that freeze made"),
        (nn.Sequential(Own(freeze(mlp()).network)), ValueError, "0: got a Own, wanted a SparseLinear or a SparseMLP"),
        (in_fp16(), ValueError, "module: got precision fp16, which only a GPU has, wanted fp32, bf16, int8: save the"),
        (
            nn.Sequential(freeze(pruned(8, 8)), Extra()),
            ValueError,
            "1._extra_state: got a dict in the state, wanted tensors alone",
        ),
        (
            SparseLinear.from_dense(torch.tensor([[torch.nan, 0.0]])),
            InputError,
            "layers.0.compressed: got NaN or Inf among 1 numbers",
        ),
    ],
)
def test_what_cannot_be_saved_leaves_no_file(module, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save_module(module, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "model: got None for a file of sparse layers 0.wide, 0.narrow, 1.0, wanted a model"),
        (nn.Sequential(nn.Linear(16, 8)), "0.wide: got a place that the model lacks"),
        (
            nn.Sequential(Residual(32), nn.Sequential(pruned(16, 16), nn.GELU(), pruned(16, 8))),
            "0.wide: got 16 in_features, wanted the model's, 32",
        ),
        (
            nn.Sequential(*network(), nn.Linear(2, 2)),
            r"state: got none for 4.bias, 4.weight, wanted the \d+ of",
        ),
        (network()[:3], r"state: got 3.bias, 3.weight, wanted the \d+ of the model"),
        (nn.Sequential(*network()[:3], nn.Linear(8, 3)), r"state: Error.* size mismatch for 3.weight"),
    ],
)
def test_another_model_is_refused(model, message, tmp_path):
    save_module(freeze(network()), tmp_path / "net.safetensors")
    with pytest.raises(ArtefactError, match=rf"net.safetensors: got contents that do not fit: {message}"):
        load_module(tmp_path / "net.safetensors", model)


class Unstored(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = pruned(8, 8)
        self.register_buffer("positions", torch.arange(8.0), persistent=False)

    def forward(self, x):
        return self.layer(x + self.positions)


def test_a_buffer_that_no_state_stores_needs_a_model_with_values(tmp_path):
    saved, x = freeze(Unstored()), torch.randn(2, 8)
    save_module(saved, tmp_path / "net.safetensors")
    assert_same(load_module(tmp_path / "net.safetensors", Unstored()), saved, x)
    with pytest.raises(ArtefactError, match="positions: got a buffer on the meta device, wanted values"):
        load_module(tmp_path / "net.safetensors", Unstored().to("meta"))


def rewritten(path, change):
    """Write a file again with a right checksum, after a change of its table and tensors."""
    meta, tensors = checked_file.read(path, KEY, "a module", (1,))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(meta, tensors)
    checked_file.write(path, KEY, meta, tensors)


def in_float8(name):
    return lambda meta, tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta, tensors: meta.update(version=3), r"got version 3, wanted 1 or 2"),
        (lambda meta, tensors: meta.update(calls=[]), r"calls: got \[\], wanted a list of tables"),
        (lambda meta, tensors: meta["calls"][0].update(kind="Linear"), r"calls\[0\]: got \('Linear', 'fp32'\)"),
        (lambda meta, tensors: meta["calls"][0].update(kind=[]), r"calls\[0\]: got \(\[\], 'fp32'\), wanted one of"),
        (lambda meta, tensors: meta["calls"][0].update(kind={}), r"calls\[0\]: got \({}, 'fp32'\), wanted one of"),
        (lambda meta, tensors: meta["calls"][0].update(precision=[]), r"calls\[0\]: got \('SparseMLP', \[\]\)"),
        (in_float8("calls.0.layers.1.compressed"), "compressed: got torch.float8_e4m3fn, wanted one of torch.float16"),
        (in_float8("calls.0.layers.1.bias"), "bias: got torch.float8_e4m3fn, wanted one of torch.float16"),
        (in_float8("calls.0.heads.a.weight"), "weight: got torch.float8_e4m3fn, wanted one of torch.float16"),
        (lambda meta, tensors: meta["calls"][0].update(precision=4), r"calls\[0\]: got \('SparseMLP', 4\)"),
        (lambda meta, tensors: meta["calls"][0].update(kind="SparseLinear"), "got 3 layers for a SparseLinear"),
        (lambda meta, tensors: meta["calls"][0].update(places=[]), r"calls\[0\]: got no place"),
        (lambda meta, tensors: meta["calls"][0].update(places="a"), "places: got 'a', wanted a list of names"),
        (lambda meta, tensors: meta["calls"][0].update(precision="int8"), "wanted a calibrated one for int8"),
        (lambda meta, tensors: tensors.pop("calls.0.layers.1.bitmask"), "layers.1.bitmask: is absent"),
        (lambda meta, tensors: tensors["calls.0.layers.1.row_offsets"].add_(1), "row_offsets"),
        (
            lambda meta, tensors: tensors["calls.0.layers.1.compressed"].fill_(torch.inf),
            "calls.0.layers.1.compressed: got NaN or Inf",
        ),
    ],
)
def test_a_file_is_not_trusted(change, message, tmp_path):
    path = tmp_path / "mlp.safetensors"
    save_module(freeze(mlp()), path)
    rewritten(path, change)
    with pytest.raises(ArtefactError, match=message):
        load_module(path)


def test_a_file_that_is_damaged_absent_or_of_another_kind(tmp_path):
    path = tmp_path / "mlp.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file, wanted what save_module wrote"):
        load_module(path)
    save_module(freeze(mlp()), path)
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtefactError, match="damaged file"):
            load_module(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtefactError, match="do not match their checksum"):
        load_module(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ArtefactError, match="safetensors of another kind"):
        load_module(path)
    save_file({"a": torch.ones(1)}, path, metadata={KEY: json.dumps([1])})
    with pytest.raises(ArtefactError, match="damaged file"):
        load_module(path)


def test_a_file_is_small(tmp_path):
    saved = freeze(nn.Sequential(in_blocks(512, 512)))
    save_module(saved, tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        nbytes = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert nbytes == saved[0].nbytes
