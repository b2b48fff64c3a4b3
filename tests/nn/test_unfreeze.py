"""`unfreeze` and `to_dense`: plain modules with exactly the weights that were served."""

import copy
from dataclasses import replace

import pytest
import torch
from oracle import (
    UNIT_ROUNDOFF,
    Bounded,
    Layer,
    activated,
    assert_exact,
    assert_rounding,
    mlp_reference,
    small_integers,
)
from pruned_models import Residual, in_blocks, pruned
from torch import nn

from lt4rec_sparse import Dice, MaskedLinear, MaskedMLP, SparseLinear, SparseMLP, freeze, unfreeze
from lt4rec_sparse.lottery import random_masks
from lt4rec_sparse.network import ACTIVATIONS, SLOPED, DenseLayer, FrozenNetwork
from lt4rec_sparse.network_state import to_tensors
from lt4rec_sparse.nn.plain import MODULES

RELU = freeze(MaskedMLP(8, (4,), tasks=("a",))).network
SWISH = replace(RELU, hidden=(RELU.hidden[0]._replace(activation="silu"),))
TANH_HEAD = replace(RELU, heads={"a": RELU.heads["a"]._replace(activation="tanh")})


def integers(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model small integers where its weights are not zero, so that results are exact."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter != 0) * small_integers(*parameter.shape, generator=generator).clamp(-1, 1))
    return model


def test_every_activation_leads_back():
    assert MODULES.keys() == ACTIVATIONS.keys() - {"none"}
    for name, make in MODULES.items():
        z = torch.linspace(-4, 4, 33)[None]
        slope = 0.25 if name in SLOPED else torch.randn(3, 33) if name == "dice" else 0.0
        module = make(slope).eval()
        if name == "dice":  # a norm's operations are others
            exact = Bounded(z.double(), torch.zeros_like(z, dtype=torch.float64))
            assert_rounding(module(z).detach(), activated(exact, name, slope, UNIT_ROUNDOFF[torch.float32]))
        else:
            assert_exact(module(z), ACTIVATIONS[name](z.clone(), slope))
        layer = SparseLinear.from_dense(torch.eye(33), activation=module)
        again = SparseMLP.from_sequential(layer.to_dense()).network.hidden[0]
        assert again.activation == name
        assert_exact(torch.as_tensor(again.slope), torch.as_tensor(slope))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [nn.PReLU(8, init=-0.3), Dice(8)], ids=["PReLU", "Dice"])
def test_activations_with_parameters_compute_in_16_bits(dtype, activation):
    mlp = SparseMLP.from_sequential(nn.Sequential(pruned(9, 8), activation, pruned(8, 4)))
    first, _, last = mlp.to_dense()
    of_first = mlp.network.hidden[0]
    layers = [
        Layer(first.weight.detach(), first.bias.detach(), of_first.activation, of_first.slope),
        Layer(last.weight.detach(), last.bias.detach(), "none"),
    ]
    x, dense = torch.randn(5, 9), mlp.to(dtype).to_dense()
    y = dense(x.to(dtype)).detach()
    assert y.dtype == dtype
    assert_rounding(y, mlp_reference(x, layers, accumulate=dtype, operands=dtype))


@pytest.mark.parametrize("layer", [pruned(9, 6), in_blocks(40, 32), nn.Linear(3, 2, bias=False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_layer_has_the_same_weight(layer, dtype):
    layer = copy.deepcopy(layer).to(dtype)
    dense = SparseLinear.from_linear(layer).to_dense()
    assert type(dense) is nn.Linear
    assert dense.state_dict().keys() == layer.state_dict().keys()
    for name, value in layer.state_dict().items():
        assert_exact(dense.state_dict()[name], value)


def test_a_model_is_plain_again():
    model = integers(nn.Sequential(nn.Sequential(pruned(16, 16), nn.ReLU(), pruned(16, 8)), nn.Flatten(), pruned(8, 8)))
    frozen = freeze(model)
    dense, x = unfreeze(frozen), small_integers(5, 16, generator=torch.Generator().manual_seed(1))
    assert not any(isinstance(module, SparseMLP) for module in dense.modules())
    assert {type(m) for m in dense.modules()} <= {nn.Sequential, nn.Linear, nn.ReLU, nn.Identity, nn.Flatten}
    assert_exact(dense(x).detach(), model(x).detach())
    assert_exact(freeze(dense)(x), frozen(x))
    assert all(parameter.requires_grad for parameter in dense.parameters())
    dense[0][0][0].weight.data.zero_()
    assert_exact(frozen(x), model(x).detach())  # copies


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_tasks_stand_side_by_side(precision):
    mlp = MaskedMLP(8, (6, 4), tasks=("a", "b"))
    for task, mask in random_masks(mlp.mask("a").shapes, 0.5, mlp.tasks, torch.Generator().manual_seed(0)).items():
        mlp.set_mask(mask, task)
    frozen = freeze(mlp).calibrated(torch.randn(50, 8)).to_precision(precision)
    dense, x = unfreeze(frozen), torch.randn(2, 5, 8)
    torch.testing.assert_close(dense(x), mlp(x))
    for task in mlp.tasks:
        torch.testing.assert_close(dense(x, task), mlp(x, task))
        assert_exact(frozen.to_dense(task)(x), dense(x, task))
    with pytest.raises(ValueError, match="task: got 'c', wanted one of a, b"):
        dense(x, "c")
    with pytest.raises(ValueError, match="task: got 'c', wanted one of a, b"):
        frozen.to_dense("c")
    assert torch.export.export(dense, (x,)).module()(x).shape == (2, 5, 2)


def test_one_task_of_a_layer():
    layer = MaskedLinear(4, 3, tasks=("a", "b"))
    layer.set_mask(torch.eye(3, 4) > 0, "b")
    assert_exact(freeze(layer).to_dense("b").weight, layer.weight * torch.eye(3, 4))


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU()])
def test_torchs_transformer_takes_its_fast_path_again(activation):
    model = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True)
    with torch.no_grad():
        model.linear1.weight *= torch.rand(model.linear1.weight.shape) < 0.2
    dense, x = unfreeze(freeze(model)), torch.randn(2, 3, 16)
    assert vars(dense)["activation_relu_or_gelu"] == vars(model)["activation_relu_or_gelu"]
    torch.testing.assert_close(dense(x), model.eval()(x))


def test_what_is_not_sparse_is_copied():
    model = Residual(16)
    dense = unfreeze(model)
    assert dense is not model
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("granularity", ["16x4", "weight", None])
def test_a_frozen_network_goes_back_to_masks_and_is_the_same_when_it_is_frozen_again(granularity):
    torch.manual_seed(0)
    masked = MaskedMLP(24, (32, 16), tasks=("ctr", "cvr"))
    if granularity is not None:
        masked.set_mask(random_masks(masked.mask("ctr").shapes, 0.3, masked.tasks, torch.Generator(), granularity))
    network = freeze(masked, sigmoid=True).network
    again = MaskedMLP.from_network(network)
    x = small_integers(5, 24, generator=torch.Generator().manual_seed(0))
    for task in masked.tasks:
        assert again.mask(task) == masked.mask(task)
        assert_exact(again(x, task), masked(x, task))
    (tensors, data), (wanted, same) = (to_tensors(n) for n in (freeze(again, sigmoid=True).network, network))
    assert data == same and tensors.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())


def test_a_network_in_16_bits_goes_back_to_its_stored_weights():
    network = freeze(MaskedMLP(8, (4,), tasks=("a",))).network.to(torch.bfloat16)
    again = MaskedMLP.from_network(network)
    assert_exact(again.masked_layers()[0].weight.detach(), network.layer(0, "a").weight)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in again.parameters())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (SparseMLP.from_sequential(nn.Sequential(pruned(8, 4), nn.Tanh(), pruned(4, 2))).network, "wanted both"),
        (FrozenNetwork((), {"a": DenseLayer(torch.ones(1, 2), None, "none")}), "wanted both"),
        (SWISH, "layer 0: got activation silu, wanted relu"),
        (TANH_HEAD, "head of a: got activation tanh, wanted none or sigmoid"),
    ],
)
def test_other_networks_do_not_go_back_to_masks(network, message):
    with pytest.raises(ValueError, match=message):
        MaskedMLP.from_network(network)
