"""The oracle must reject what a sparse kernel gets wrong, and nothing that is right."""

import pytest
import torch
from oracle import Layer, assert_exact, assert_rounding, linear_reference, mlp_reference, small_integers

FAULTS = {
    "shifted": lambda y: y + y.abs().max() * 1e-3,
    "rolled": lambda y: y.roll(1, dims=1),
    "truncated": lambda y: y[:-1],
    "nan": lambda y: y.index_fill(1, torch.tensor([3]), float("nan")),
    "row swapped": lambda y: y.flip(0),
    "zeroed column": lambda y: y.index_fill(1, torch.tensor([5]), 0.0),
}


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=generator)
    weight = torch.randn(128, 512, generator=generator)
    weight[torch.rand(128, 512, generator=generator) > 0.3] = 0
    return x, weight, torch.randn(128, generator=generator)


def test_accepts_torch_itself(problem):
    x, weight, bias = problem
    y = torch.nn.functional.linear(x, weight, bias)
    assert_rounding(y, linear_reference(x, weight, bias, torch.float32))


@pytest.mark.parametrize("fault", FAULTS)
def test_rounding_rejects(problem, fault):
    x, weight, bias = problem
    y = FAULTS[fault](torch.nn.functional.linear(x, weight, bias))
    with pytest.raises(AssertionError):
        assert_rounding(y, linear_reference(x, weight, bias, torch.float32))


@pytest.mark.parametrize("fault", FAULTS)
def test_exact_rejects(fault):
    generator = torch.Generator().manual_seed(1)
    x, weight = small_integers(16, 40, generator=generator), small_integers(24, 40, generator=generator)
    y = x @ weight.T
    assert_exact(y, y.clone())
    with pytest.raises(AssertionError):
        assert_exact(FAULTS[fault](y), y)


def test_exact_rejects_another_dtype():
    y = torch.ones(2, 2)
    with pytest.raises(AssertionError, match="dtype"):
        assert_exact(y, y.double())


@pytest.mark.parametrize("trial", range(20))
def test_one_dropped_weight_is_rejected(problem, trial):
    x, weight, bias = problem
    kept = weight.nonzero()
    row, column = kept[torch.randint(len(kept), (1,), generator=torch.Generator().manual_seed(trial))][0]
    dropped = weight.clone()
    dropped[row, column] = 0
    with pytest.raises(AssertionError):
        assert_rounding(torch.nn.functional.linear(x, dropped, bias), linear_reference(x, weight, bias, torch.float32))


def test_mlp_bound_accepts_torch_and_rejects_a_dropped_weight(problem):
    x, weight, bias = problem
    head = torch.randn(1, 128, generator=torch.Generator().manual_seed(2)) / 64
    layers = [Layer(weight / 16, bias, "relu"), Layer(head, None, "sigmoid")]
    reference = mlp_reference(x, layers)
    hidden = torch.relu(torch.nn.functional.linear(x, weight / 16, bias))
    assert_rounding(torch.sigmoid(hidden @ head.T), reference)
    head[0, 7] = 0
    with pytest.raises(AssertionError):
        assert_rounding(torch.sigmoid(hidden @ head.T), reference)


@pytest.fixture
def rounded_mlp():
    """Three layers whose operands are bfloat16, and `x`."""
    generator = torch.Generator().manual_seed(3)
    layers = []
    for k, n in ((300, 128), (128, 60), (60, 2)):
        weight = torch.randn(n, k, generator=generator) * (2 / (0.3 * k)) ** 0.5
        weight[torch.rand(n, k, generator=generator) > 0.3] = 0
        layers.append(Layer(weight, torch.randn(n, generator=generator), "relu" if n > 2 else "none"))
    return torch.randn(32, 300, generator=generator), layers


def in_bfloat16(x, layers):
    """Operands rounded to bfloat16, products added in float32."""
    for layer in layers:
        y = torch.nn.functional.linear(x.bfloat16().float(), layer.weight.bfloat16().float(), layer.bias)
        x = y.relu() if layer.activation == "relu" else y
    return x


def test_the_bound_of_rounded_operands_accepts_bfloat16_and_no_coarser_rounding(rounded_mlp):
    x, layers = rounded_mlp
    reference = mlp_reference(x, layers, operands=torch.bfloat16)
    assert_rounding(in_bfloat16(x, layers), reference)
    # Of one layer, whose operands are known, the reference is exact but for the sum.
    first = mlp_reference(x, layers[:1], operands=torch.bfloat16)
    assert_rounding(in_bfloat16(x, layers[:1]), first)
    for wrong in (torch.relu(x @ layers[0].weight.T + layers[0].bias), in_bfloat16(x, layers[:1]).bfloat16().float()):
        with pytest.raises(AssertionError):
            assert_rounding(wrong, first)


@pytest.mark.parametrize("depth", range(3))
def test_the_bound_of_rounded_operands_rejects_a_dropped_weight(rounded_mlp, depth):
    # In the last layer: what a hidden layer's rounding may amount to two layers later hides a single weight, which is
    # why an engine must be exact on integers too.
    x, layers = rounded_mlp
    layers = [*layers[:depth], layers[depth]._replace(activation="none")]
    reference = mlp_reference(x, layers, operands=torch.bfloat16)
    weight = layers[depth].weight.clone()
    weight.view(-1)[weight.abs().argmax()] = 0
    layers[depth] = layers[depth]._replace(weight=weight)
    with pytest.raises(AssertionError):
        assert_rounding(in_bfloat16(x, layers), reference)
