"""A graph of linear layers, and what fuses with them, is one call of the engine."""

import math

import numpy as np
import pytest
import torch
from onnx_models import model, node, runtime, sparse_floats, sparse_integers
from oracle import Layer, assert_exact, assert_rounding, mlp_reference, small_integers

from lt4rec_sparse import SparseLinear, SparseMLP, from_onnx

W1, W2 = sparse_floats(16, 12, 1), sparse_floats(5, 16, 2)
B1, B2 = (np.random.default_rng(3).standard_normal(n).astype(np.float32) for n in (16, 5))


def x_of(rows: int = 7, columns: int = 12) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def assert_layers(module, x, *layers, original=None):
    """Fail unless a module is one MLP of these layers; ONNX Runtime must agree with the reference too."""
    assert isinstance(module, SparseMLP)
    tensors = [Layer(torch.tensor(w), None if b is None else torch.tensor(b), *rest) for w, b, *rest in layers]
    network = module.network
    assert [layer.activation for layer in network.hidden] == [layer.activation for layer in tensors]
    for i, layer in enumerate(tensors):
        assert network.layer(i, "task").slope == pytest.approx(layer.slope, rel=1e-7)
    reference = mlp_reference(x, tensors)
    assert_rounding(module(x), reference)
    if original is not None:
        assert_rounding(runtime(original, x)[0], reference)


def two_layers(behind, constants=None, opset=20):
    """Return a model of two Gemm nodes with nodes between them, from `a` to `b`."""
    nodes = [node("Gemm", "x w1 b1", "a", transB=1), *behind, node("Gemm", "b w2 b2", "y", transB=1)]
    return model(
        nodes,
        {"w1": W1, "b1": B1, "w2": W2, "b2": B2, **(constants or {})},
        {"x": ["batch", 12]},
        ["y"],
        opset,
    )


f32 = np.float32
HALF, ONE, THREE, SIX = (np.array(v, np.float32) for v in (0.5, 1, 3, 6))
ERF = {"root2": f32(math.sqrt(2)), "half": HALF, "one": ONE}
TANH = {"c": f32(0.044715), "root": f32(math.sqrt(2 / math.pi)), "half": HALF, "one": ONE, "three": THREE}

# Name -> nodes from a to b, their constants, the activation, its slope, and the operator set.
ACTIVATIONS = {
    "Relu": ([node("Relu", "a", "b")], {}, "relu", 0.0, 13),
    "Sigmoid": ([node("Sigmoid", "a", "b")], {}, "sigmoid", 0.0, 13),
    "Tanh": ([node("Tanh", "a", "b")], {}, "tanh", 0.0, 13),
    "LeakyRelu": ([node("LeakyRelu", "a", "b", alpha=0.25)], {}, "leaky_relu", 0.25, 13),
    "LeakyRelu, default": ([node("LeakyRelu", "a", "b")], {}, "leaky_relu", 0.01, 13),
    "Elu": ([node("Elu", "a", "b", alpha=0.5)], {}, "elu", 0.5, 13),
    "Elu, default": ([node("Elu", "a", "b")], {}, "elu", 1.0, 13),
    "PRelu": ([node("PRelu", "a s", "b")], {"s": np.full((1, 1), 0.25, f32)}, "leaky_relu", 0.25, 13),
    "PRelu, one for all": ([node("PRelu", "a s", "b")], {"s": np.array(0.25, f32)}, "leaky_relu", 0.25, 13),
    "HardSwish": ([node("HardSwish", "a", "b")], {}, "hardswish", 0.0, 14),
    "HardSigmoid": (
        [node("HardSigmoid", "a", "h", alpha=1 / 6, beta=0.5), node("Mul", "a h", "b")],
        {},
        "hardswish",
        0.0,
        13,
    ),
    "Clip": (
        [
            node("Add", "a three", "s"),
            node("Clip", "s zero six", "c"),
            node("Mul", "a c", "m"),
            node("Div", "m six", "b"),
        ],
        {"three": THREE, "six": SIX, "zero": f32(0)},
        "hardswish",
        0.0,
        13,
    ),
    "Gelu": ([node("Gelu", "a", "b")], {}, "gelu", 0.0, 20),
    "Gelu, tanh": ([node("Gelu", "a", "b", approximate="tanh")], {}, "gelu_tanh", 0.0, 20),
    "SiLU": ([node("Sigmoid", "a", "s"), node("Mul", "s a", "b")], {}, "silu", 0.0, 13),
    "GELU as torch writes it": (
        [
            node("Div", "a root2", "d"),
            node("Erf", "d", "e"),
            node("Add", "e one", "p"),
            node("Mul", "a p", "m"),
            node("Mul", "m half", "b"),
        ],
        ERF,
        "gelu",
        0.0,
        13,
    ),
    "GELU, halved first": (
        [
            node("Mul", "a half", "h"),
            node("Div", "a root2", "d"),
            node("Erf", "d", "e"),
            node("Add", "one e", "p"),
            node("Mul", "p h", "b"),
        ],
        ERF,
        "gelu",
        0.0,
        13,
    ),
    "GELU by tanh": (
        [
            node("Pow", "a three", "cube"),
            node("Mul", "cube c", "m"),
            node("Add", "a m", "s"),
            node("Mul", "s root", "r"),
            node("Tanh", "r", "t"),
            node("Add", "t one", "p"),
            node("Mul", "half a", "h"),
            node("Mul", "h p", "b"),
        ],
        TANH,
        "gelu_tanh",
        0.0,
        13,
    ),
    "GELU by tanh, with products": (
        [
            node("Mul", "a a", "square"),
            node("Mul", "a square", "cube"),
            node("Mul", "c cube", "m"),
            node("Add", "m a", "s"),
            node("Mul", "root s", "r"),
            node("Tanh", "r", "t"),
            node("Mul", "half t", "u"),
            node("Add", "u half", "p"),
            node("Mul", "a p", "b"),
        ],
        TANH,
        "gelu_tanh",
        0.0,
        13,
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_fused(name):
    nodes, constants, activation, slope, opset = ACTIVATIONS[name]
    original = two_layers(nodes, constants, opset)
    x = x_of()
    assert_layers(from_onnx(original), x, (W1, B1, activation, slope), (W2, B2, "none"))
    wanted = runtime(original, x)[0]
    torch.testing.assert_close(from_onnx(original)(x), wanted)


NEAR = {
    "Sigmoid of twice": [node("Add", "a a", "d"), node("Sigmoid", "d", "s"), node("Mul", "s a", "b")],
    "Sigmoid times its input's square": [node("Sigmoid", "a", "s"), node("Mul", "a a", "q"), node("Mul", "s q", "b")],
    "erf of the wrong width": [
        node("Mul", "a half", "h"),
        node("Erf", "a", "e"),
        node("Add", "one e", "p"),
        node("Mul", "p h", "b"),
    ],
    "Sigmoid of the negative": [node("Sub", "zero a", "n"), node("Sigmoid", "n", "s"), node("Mul", "s a", "b")],
    "difference": [node("Sigmoid", "a", "s"), node("Sub", "s a", "b")],
}


@pytest.mark.parametrize("name", NEAR)
def test_what_is_nearly_an_activation_is_left_to_onnx_runtime(name):
    original = two_layers(NEAR[name], {"half": HALF, "one": ONE, "zero": f32(0)})
    module, x = from_onnx(original), x_of()
    assert module.parts == 1
    assert [call.network.hidden[0].activation for call in module.calls.values()] == ["none", "none"]
    torch.testing.assert_close(module(x), runtime(original, x)[0])


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("alpha", [1.0, -2.0])
@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("bias", [None, (16,), (1, 16), (1,), ()])
def test_gemm(is_transposed, alpha, beta, bias):
    weight = sparse_integers(16, 12)
    constants = {"w": weight if is_transposed else np.ascontiguousarray(weight.T)}
    if bias is not None:
        constants["b"] = (2 * np.arange(math.prod(bias), dtype=f32) + 4).reshape(bias)
    gemm = node("Gemm", " ".join(["x", *constants]), "y", transB=int(is_transposed), alpha=alpha, beta=beta)
    original = model([gemm], constants, {"x": ["batch", 12]}, ["y"])
    module, x = from_onnx(original), small_integers(7, 12, generator=torch.Generator().manual_seed(0))
    assert type(module) is SparseLinear
    assert_exact(module(x), runtime(original, x)[0])


def test_gemm_of_a_transposed_input():
    original = model([node("Gemm", "x w", "y", transA=1, transB=1)], {"w": W1}, {"x": [12, "batch"]}, ["y"])
    module, x = from_onnx(original), x_of()
    assert (module.parts, len(module.calls)) == (1, 1)
    assert_rounding(module(x.T), mlp_reference(x, [Layer(torch.tensor(W1), None, "none")]))


@pytest.mark.parametrize("shape", [(), (1,), (16,), (1, 16), (1, 1, 16)])
@pytest.mark.parametrize("order", ["z b", "b z"])
def test_matmul_and_the_sum_behind_it(shape, order):
    weight = sparse_integers(16, 12)
    bias = np.arange(math.prod(shape), dtype=f32).reshape(shape)
    nodes = [node("MatMul", "x w", "z"), node("Add", order, "y")]
    original = model(nodes, {"w": np.ascontiguousarray(weight.T), "b": bias}, {"x": ["a", "b", 12]}, ["y"])
    module, x = from_onnx(original), small_integers(2, 3, 12, generator=torch.Generator().manual_seed(0))
    assert type(module) is SparseLinear
    assert_exact(module(x), runtime(original, x)[0])


@pytest.mark.parametrize("shape", [(7, 16), (7, 1), (1, 1, 16)])
def test_a_sum_that_is_no_bias_is_left_to_onnx_runtime(shape):
    """It has a number per row, or a dimension more than the product."""
    weight = sparse_integers(16, 12)
    addend = np.arange(math.prod(shape), dtype=f32).reshape(shape)
    nodes = [node("MatMul", "x w", "z"), node("Add", "z b", "y")]
    original = model(nodes, {"w": np.ascontiguousarray(weight.T), "b": addend}, {"x": [7, 12]}, ["y"])
    module, x = from_onnx(original), small_integers(7, 12, generator=torch.Generator().manual_seed(0))
    assert (module.parts, len(module.calls)) == (1, 1)
    assert_exact(module(x), runtime(original, x)[0])


def test_a_sum_that_widens_one_output_is_left_to_onnx_runtime():
    nodes = [node("MatMul", "x w", "z"), node("Add", "z b", "y")]
    weight = np.zeros((12, 1), f32)
    weight[3] = 2.0
    original = model(nodes, {"w": weight, "b": np.arange(4, dtype=f32)}, {"x": ["batch", 12]}, ["y"])
    module, x = from_onnx(original), small_integers(7, 12, generator=torch.Generator().manual_seed(0))
    assert module(x).shape == (7, 4)
    assert_exact(module(x), runtime(original, x)[0])


@pytest.mark.parametrize("is_behind", [False, True])
def test_batch_normalization_of_rows_is_folded(is_behind):
    n = 16 if is_behind else 12
    rng = np.random.default_rng(4)
    scale, shift, mean = (rng.standard_normal(n).astype(f32) for _ in range(3))
    constants = {"s": scale, "t": shift, "m": mean, "v": rng.random(n).astype(f32) + 0.5, "w1": W1, "b1": B1}
    inputs = " s t m v"
    if is_behind:
        nodes = [
            node("Gemm", "x w1 b1", "a", transB=1),
            node("BatchNormalization", f"a{inputs}", "n", epsilon=0.01),
            node("Relu", "n", "y"),
        ]
    else:
        nodes = [node("BatchNormalization", f"x{inputs}", "n"), node("Gemm", "n w1 b1", "y", transB=1)]
    original = model(nodes, constants, {"x": ["batch", 12]}, ["y"], 15)
    factor = scale.astype(np.float64) / np.sqrt(constants["v"].astype(np.float64) + (0.01 if is_behind else 1e-5))
    offset = shift - mean * factor
    module, x = from_onnx(original), x_of()
    weight = W1 * factor[:, None] if is_behind else W1 * factor
    bias = B1 * factor + offset if is_behind else B1 + W1.astype(np.float64) @ offset
    assert_layers(module, x, (weight.astype(f32), bias.astype(f32), "relu" if is_behind else "none"))
    torch.testing.assert_close(module(x), runtime(original, x)[0])


def test_batch_normalization_along_another_dimension_is_left_to_onnx_runtime():
    """Of `[batch, 3, 12]` it scales the second dimension, and a linear layer the last."""
    constants = {"w": np.ascontiguousarray(W1.T), **{k: np.full(3, i + 1.0, f32) for i, k in enumerate("stmv")}}
    nodes = [node("MatMul", "x w", "a"), node("BatchNormalization", "a s t m v", "y")]
    original = model(nodes, constants, {"x": ["batch", 3, 12]}, ["y"], 15)
    module, x = from_onnx(original), torch.randn(2, 3, 12)
    assert module.parts == 1
    torch.testing.assert_close(module(x), runtime(original, x)[0])


def test_identity_and_dropout_are_dropped():
    nodes = [node("Identity", "a", "i"), node("Dropout", "i r t", "d"), node("Relu", "d", "b")]
    constants = {"r": f32(0.5), "t": np.array(False)}
    original, x = two_layers(nodes, constants, 13), x_of()
    assert_layers(from_onnx(original), x, (W1, B1, "relu"), (W2, B2, "none"), original=original)


def test_the_rule_of_freeze_decides_what_joins_a_call():
    """Of two layers one is pruned: a small dense one joins, a large one stays with ONNX Runtime."""
    for width, parts in ((1, None), (64, 1)):
        dense = np.random.default_rng(0).standard_normal((width, 16)).astype(f32)
        nodes = [node("Gemm", "x w1", "a", transB=1), node("Relu", "a", "b"), node("Gemm", "b d", "y", transB=1)]
        original = model(nodes, {"w1": W1, "d": dense}, {"x": ["batch", 12]}, ["y"])
        module, x = from_onnx(original), x_of()
        assert getattr(module, "parts", None) == parts
        layers = [Layer(torch.tensor(W1), None, "relu"), Layer(torch.tensor(dense), None, "none")]
        assert_rounding(module(x), mlp_reference(x, layers))


def test_blocks_are_kept_as_blocks():
    weight = np.zeros((32, 16), f32)
    weight[16:, 4:8] = 1.5
    original = model([node("Gemm", "x w", "y", transB=1)], {"w": weight}, {"x": ["batch", 16]}, ["y"])
    assert from_onnx(original).network.is_in_blocks
