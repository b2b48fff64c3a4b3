"""Networks as torch's own exporters write them."""

import copy
import logging

import pytest
import torch
from onnx_models import runtime
from oracle import Layer, assert_rounding, mlp_reference
from torch import nn
from torch.nn.utils import prune

from lt4rec_sparse import SparseMLP, from_onnx
from lt4rec_sparse.nn.chain import layers_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the older exporter, and within both
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def pruned(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, "weight", 0.8)
            prune.remove(module, "weight")
    return model.eval()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Linear(12, 32), nn.GELU(), nn.Dropout(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 32)]
    norm = nn.BatchNorm1d(32)
    norm.running_mean.normal_()
    parts += [norm, nn.Hardswish(), nn.Linear(32, 16), nn.GELU(approximate="tanh"), nn.Linear(16, 16), nn.PReLU()]
    parts += [nn.Linear(16, 16), nn.ELU(), nn.Linear(16, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.Tanh()]
    return pruned(nn.Sequential(*parts, nn.Linear(8, 2), nn.Sigmoid()))


class Block(nn.Module):
    """A transformer's block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.before(x)
        shares = torch.softmax(self.q(h) @ self.k(h).transpose(-1, -2) / x.shape[-1] ** 0.5, -1)
        x = x + self.o(shares @ self.v(h))
        return x + self.narrow(nn.functional.gelu(self.wide(self.between(x))))


def export(model: nn.Module, x: torch.Tensor, path, exporter: str) -> None:
    """Write a model whose first dimension varies, as an exporter does."""
    if exporter == "dynamo":
        pytest.importorskip("onnxscript", reason="torch.onnx.export asks for it")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
        torch.onnx.export(copy.deepcopy(model), (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        return
    opset = int(exporter.removeprefix("opset "))
    names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(copy.deepcopy(model), (x,), path, dynamo=False, opset_version=opset, **names)


EXPORTERS = ("dynamo", "opset 20", "opset 17", "opset 13")


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_an_mlp_is_one_call(exporter, tmp_path):
    model, x, path = mlp(), torch.randn(5, 12), tmp_path / "m.onnx"
    export(model, x, path, exporter)
    module = from_onnx(path)
    assert isinstance(module, SparseMLP)
    layers = [Layer(layer.weight, layer.bias, layer.activation, layer.slope) for layer in layers_of(model)]
    assert [layer.activation for layer in module.network.hidden] == [layer.activation for layer in layers]
    for rows in (x, torch.randn(1, 12)):
        reference = mlp_reference(rows, layers)
        assert_rounding(module(rows), reference)
        assert_rounding(runtime(path, rows)[0], reference)


@pytest.mark.parametrize("exporter", ["dynamo", "opset 13"])
def test_of_a_transformer_the_linear_layers_are_calls(exporter, tmp_path):
    torch.manual_seed(0)
    model, x, path = pruned(nn.Sequential(Block(32), Block(32))), torch.randn(3, 7, 32), tmp_path / "m.onnx"
    export(model, x, path, exporter)
    module = from_onnx(path)
    # Of each block q, k, v and o, and both layers with their GELU in one; before, between and behind them parts.
    assert (module.parts, len(module.calls)) == (7, 10)
    assert [call.network.depth for call in module.calls.values()] == 2 * [1, 1, 1, 1, 2]
    for rows in (x, torch.randn(2, 7, 32)):
        wanted = runtime(path, rows)[0]
        torch.testing.assert_close(module(rows), wanted)
        torch.testing.assert_close(model(rows).detach(), wanted)
