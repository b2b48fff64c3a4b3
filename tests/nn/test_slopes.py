"""LeakyReLU with a slope per output, as `nn.PReLU(features)` has it: on every way through the engine, and back."""

import pytest
import torch
from kernels.networks import BLOCK_KERNELS, KERNELS, Kernel, prepack, random_block_mask, random_mask, random_task
from oracle import assert_exact, assert_rounding, mlp_reference
from pruned_models import in_blocks, pruned
from torch import nn

from lt4rec_sparse import SparseLinear, SparseMLP, freeze, load_module, save_module, unfreeze
from lt4rec_sparse.kernels import cpu, reference
from lt4rec_sparse.network import PRECISIONS, DenseLayer, FrozenNetwork

needs_engine = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")
OPERANDS = {"fp32": None, "bf16": torch.bfloat16}


def prelu(features: int, seed: int = 0) -> nn.PReLU:
    module = nn.PReLU(features)
    module.weight.data = torch.randn(features, generator=torch.Generator().manual_seed(seed))
    return module


def network(linear=pruned) -> nn.Module:
    return nn.Sequential(
        linear(48, 32, seed=1), prelu(32), linear(32, 16, seed=2), prelu(16, 1), linear(16, 16, seed=3)
    )


@needs_engine
@pytest.mark.parametrize("way", [*KERNELS, *BLOCK_KERNELS], ids="-".join)
@pytest.mark.parametrize("batch", [1, 7, 70])
def test_every_kernel_applies_them_to_their_outputs(way: Kernel, batch: int) -> None:
    """Two tasks that share most of their first layer; the same slope for all outputs is a slope that is a number."""
    draw = random_block_mask if way.path == "blocks" else random_mask
    tasks = [random_task((37, 40, 24, 5), 0.5, 3, activation="leaky_relu", draw_mask=draw) for _ in range(2)]
    mask = draw(40, 37, 0.5, 11)
    tasks[1][0] = tasks[1][0]._replace(mask=tasks[1][0].mask & mask, weight=tasks[1][0].weight * mask)
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 37, generator=generator)
    layouts = ("blocks",) if way.path == "blocks" else cpu.UNSTRUCTURED

    def run(slopes):
        sloped = [
            [layer._replace(activation="leaky_relu", slope=slopes(len(layer.weight))) for layer in task]
            for task in tasks
        ]
        with cpu.forced_isa(way.isa):
            return way.run(x, prepack(sloped, way.precision, layouts)), sloped

    y, sloped = run(lambda features: torch.randn(features, generator=generator))
    assert_exact(run(lambda features: torch.full((features,), 0.3))[0], run(lambda features: 0.3)[0])
    if way.precision != "int8":
        for t, task in enumerate(sloped):
            wanted = mlp_reference(x, [layer.dense() for layer in task], operands=OPERANDS[way.precision])
            assert_rounding(y[:, 5 * t : 5 * t + 5], wanted)


@needs_engine
@pytest.mark.parametrize("linear", [pruned, in_blocks])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [1, 70])
def test_the_engine_computes_as_the_reference(linear, precision, batch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(batch, 50), 48, generator=generator)
    mlp = SparseMLP.from_sequential(network(linear)).calibrated(x).to_precision(precision)
    assert mlp.network.is_in_blocks == (linear is in_blocks)
    out = torch.empty(len(x), 16)
    reference.Executor(mlp.network, precision).run(x, out)
    if precision == "int8":
        assert_exact(mlp(x[:batch]), out[:batch])
    else:
        torch.testing.assert_close(mlp(x[:batch]), out[:batch], rtol=0.02 if precision == "bf16" else 1e-5, atol=1e-5)


def test_a_network_is_served_saved_planned_and_led_back(tmp_path):
    model, x = network(), torch.randn(9, 48)
    frozen = freeze(model)
    assert isinstance(frozen[0], SparseMLP)
    torch.testing.assert_close(frozen(x), model(x).detach(), rtol=1e-5, atol=1e-5)
    save_module(frozen, tmp_path / "net.safetensors")
    assert_exact(load_module(tmp_path / "net.safetensors", network())(x), frozen(x))
    other = freeze(network())
    other[0].network.hidden[0].slope.zero_()
    assert not torch.equal(other(x), frozen(x))
    other.load_state_dict(frozen.state_dict())
    assert_exact(other(x), frozen(x))
    again = unfreeze(frozen)[0]
    assert torch.equal(again[1].weight, model[1].weight)
    assert_exact(freeze(again)(x), frozen(x))
    planned = frozen[0].planned(frozen[0].measure_plan(batch_sizes=(1, 9)))
    torch.testing.assert_close(planned(x), frozen(x), rtol=1e-5, atol=1e-5)
    dense = nn.Sequential(nn.Linear(48, 32), prelu(32))
    assert freeze(nn.Sequential(dense, pruned(32, 8)))[0][1].weight is not dense[1].weight


def test_dense_layers_of_several_tasks_have_them_too():
    slopes, generator = torch.tensor([0.5, -1.0, 2.0]), torch.Generator().manual_seed(0)
    heads = {
        task: DenseLayer(torch.randn(3, 8, generator=generator), None, "leaky_relu", slopes) for task in ("a", "b")
    }
    mlp, x = SparseMLP(FrozenNetwork((), heads)), torch.randn(5, 8)
    wanted = torch.cat([nn.functional.prelu(x @ head.weight.T, slopes) for head in heads.values()], dim=1)
    torch.testing.assert_close(mlp(x), wanted)
    torch.testing.assert_close(mlp.planned(mlp.measure_plan(batch_sizes=(5,)))(x), wanted)
    assert mlp.nbytes == 2 * 4 * (3 * 8 + 3)


@pytest.mark.parametrize(
    ("activation", "slope", "message"),
    [
        ("leaky_relu", torch.ones(2), r"got slopes torch.float32 \(2,\), wanted finite torch.float32 \(3,\)"),
        ("leaky_relu", torch.ones(3).double(), r"got slopes torch.float64 \(3,\), wanted"),
        ("leaky_relu", torch.tensor([1.0, torch.nan, 1.0]), r"wanted finite"),
        ("elu", torch.ones(3), "got a slope per output of elu, wanted one of leaky_relu or dice alone"),
        ("relu", torch.ones(3), "got a slope per output of relu, wanted one of leaky_relu or dice alone"),
    ],
)
def test_slopes_that_cannot_be_are_refused(activation, slope, message):
    with pytest.raises(ValueError, match=message):
        FrozenNetwork((), {"a": DenseLayer(torch.ones(3, 2), None, activation, slope)})


def test_a_prelu_of_another_width_is_refused():
    with pytest.raises(ValueError, match="activation: got a PReLU with 5 slopes, wanted 1 or 4"):
        SparseLinear.from_dense(torch.eye(4), activation=nn.PReLU(5))
