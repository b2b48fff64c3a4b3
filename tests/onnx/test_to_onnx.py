"""What is written is what is served, by ONNX Runtime and when it is read back."""

import onnx
import pytest
import torch
from onnx_models import runtime
from oracle import Layer, assert_exact, assert_rounding, mlp_reference
from torch import nn

from lt4rec_sparse import MaskedMLP, SparseLinear, SparseMLP, freeze, from_onnx, to_onnx
from lt4rec_sparse.lottery import random_masks
from lt4rec_sparse.network import ACTIVATIONS, SLOPED, FrozenNetwork, SparseLayer
from lt4rec_sparse.nn.plain import network_of, of_tensors


def pruned(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * (torch.rand(rows, columns, generator=generator) < 0.3)


PER_OUTPUT = "leaky_relu, a slope per output"


def mlp_of(activation: str) -> SparseMLP:
    layers = [of_tensors(pruned(16, 12, 1), torch.randn(16)), of_tensors(pruned(5, 16, 2))]
    generator = torch.Generator().manual_seed(3)
    drawn = {
        PER_OUTPUT: torch.randn(16, generator=generator),
        "dice": torch.randn(3, 16, generator=generator),
        **dict.fromkeys(SLOPED, 0.25),
    }
    slope = drawn.get(activation, 0.0)
    activation = "leaky_relu" if activation == PER_OUTPUT else activation
    layers[0] = layers[0]._replace(activation=activation, slope=slope)
    return SparseMLP(network_of(layers)).eval()


def layers_of(network: FrozenNetwork, task: str) -> list[Layer]:
    return [Layer(*network.layer(i, task)) for i in range(network.depth)]


def two_tasks(granularity: str = "weight", sigmoid: bool = True) -> SparseMLP:
    torch.manual_seed(0)
    mlp = MaskedMLP(24, hidden=(32, 16), out_features=2, tasks=("ctr", "cvr"))
    generator = torch.Generator().manual_seed(0)
    masks = random_masks(mlp.mask("ctr").shapes, 0.3, mlp.tasks, generator, granularity=granularity)
    for task, mask in masks.items():
        mlp.set_mask(mask, task)
    return freeze(mlp, sigmoid=sigmoid)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, PER_OUTPUT])
def test_every_activation_is_written_and_read_back(activation, sparse, tmp_path):
    mlp, x = mlp_of(activation), torch.randn(7, 12)
    written = to_onnx(mlp, tmp_path / "m.onnx", sparse=sparse)
    reference = mlp_reference(x, layers_of(mlp.network, "task"))
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=not sparse)
    for source in (written, tmp_path / "m.onnx"):
        assert_rounding(runtime(source, x)[0], reference)
        read = from_onnx(source)
        assert isinstance(read, SparseMLP)
        assert_exact(read(x), mlp(x))
        for i in range(2):
            layer, wanted = read.network.layer(i, "task"), mlp.network.layer(i, "task")
            assert torch.equal(layer.weight, wanted.weight)
            assert layer.activation == wanted.activation
            assert torch.equal(torch.as_tensor(layer.slope), torch.as_tensor(wanted.slope))
            assert (layer.bias is None) == (wanted.bias is None)
            assert layer.bias is None or torch.equal(layer.bias, wanted.bias)


@pytest.mark.parametrize("granularity", ["weight", "16x4"])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_each_task_is_an_output(granularity, sigmoid):
    mlp, x = two_tasks(granularity, sigmoid), torch.randn(5, 24)
    written = to_onnx(mlp)
    assert [value.name for value in written.graph.output] == ["ctr", "cvr"]
    read = from_onnx(written)
    assert read.output_names == ("ctr", "cvr")
    for task, of_runtime, of_engine in zip(mlp.tasks, runtime(written, x), read(x), strict=True):
        reference = mlp_reference(x, layers_of(mlp.network, task))
        assert_rounding(of_runtime, reference)
        assert_rounding(of_engine, reference)
        assert_rounding(mlp(x, task), reference)
    kept = {call.network.is_in_blocks for call in read.calls.values()}
    assert kept == {granularity == "16x4"}


def test_outputs_of_tasks_side_by_side_in_a_layer():
    masks = {"a": torch.eye(8, dtype=torch.bool), "b": torch.ones(8, 8, dtype=torch.bool)}
    weight = SparseLinear.from_dense(torch.eye(8)).network.hidden[0].weight
    layer = SparseLayer(type(weight).from_dense(torch.arange(64.0).view(8, 8), masks), None, "none")
    module, x = SparseLinear(FrozenNetwork((layer,))), torch.arange(8.0).view(1, 8)
    assert_exact(torch.cat(runtime(to_onnx(module), x), 1), module(x))


def test_sparse_initializers_keep_zeros_that_are_kept():
    weight = pruned(16, 12, 0)
    mask = weight != 0
    weight[:8] = 0
    mlp = SparseLinear.from_dense(weight, mask=mask)
    read = from_onnx(to_onnx(mlp, sparse=True))
    assert torch.equal(read.network.mask(0, "task"), mlp.network.mask(0, "task"))
    assert torch.equal(read.weight, mlp.weight)


def test_an_empty_batch():
    mlp = two_tasks()
    assert [y.shape for y in from_onnx(to_onnx(mlp))(torch.zeros(0, 24))] == [(0, 2), (0, 2)]


def test_what_cannot_be_written_is_refused(tmp_path):
    mlp = two_tasks()
    with pytest.raises(TypeError, match="module: got a Sequential, wanted a SparseMLP, a SparseLinear or a Ranker"):
        to_onnx(nn.Sequential(mlp))
    with pytest.raises(ValueError, match="module: got precision bf16, wanted fp32"):
        to_onnx(mlp.to_precision("bf16"))
    named = FrozenNetwork((), heads={"x": mlp.network.heads["ctr"]})
    with pytest.raises(ValueError, match="names: got 'x' twice, wanted each task and column another name"):
        to_onnx(SparseMLP(named), tmp_path / "m.onnx")
    with pytest.raises(FileNotFoundError):
        to_onnx(mlp, tmp_path / "absent" / "m.onnx")
    assert not list(tmp_path.iterdir())
