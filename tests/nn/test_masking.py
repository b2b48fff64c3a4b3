"""Linear layers of any model become masked ones in place: nothing else changes, and what cannot be masked stays."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from lt4rec_sparse import MaskedLinear, SparseMLP, freeze, mask_linears


def tower(*widths: int) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    return nn.Sequential(*layers)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(0, 3))
def test_the_model_computes_what_it_did_and_keeps_its_parameters(widths, seed):
    torch.manual_seed(seed)
    model, x = tower(*widths), torch.randn(3, widths[0])
    y, parameters = model(x), [id(parameter) for parameter in model.parameters()]
    masked = mask_linears(model)
    assert torch.equal(model(x), y)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert list(masked) == [f"{i}.0" for i in range(len(widths) - 1)]
    assert not any(type(module) is nn.Linear for module in model.modules())


def test_an_optimiser_made_before_steps_what_is_kept():
    model = tower(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    layer = mask_linears(model)["0.0"]
    before, kept = layer.weight.detach().clone(), torch.rand(4, 8) < 0.5
    layer.set_mask(kept)
    layer(torch.rand(16, 8) + 1).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight == before, ~kept)


def test_tied_weights_and_layers_in_two_places_stay_one():
    one = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": one, "b": nn.Sequential(one), "words": nn.Embedding(4, 4), "read": nn.Linear(4, 4)})
    model["read"].weight = model["words"].weight
    mask_linears(model)
    assert model["a"] is model["b"][0] and isinstance(model["a"], MaskedLinear)
    assert model["read"].weight is model["words"].weight


def test_zeros_pruned_weights_modes_and_frozen_parameters_are_kept():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    prune.random_unstructured(model[0], "weight", 0.5)
    with torch.no_grad():
        model[1].weight[:3] = 0
    model[2].weight.requires_grad_(False)
    pruned, x = model[0].weight_mask.bool(), torch.randn(3, 8)
    y = model(x)
    masked = mask_linears(model)
    assert torch.equal(masked["0"].mask(), pruned)
    assert not masked["1"].mask()[:3].any() and masked["1"].mask()[3:].all()
    assert not masked["2"].weight.requires_grad and not masked["2"].training
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(("zero_rows", "is_whole"), [(0, True), (1, True), (2, False), (3, False), (4, True)])
def test_a_layer_that_was_not_pruned_stays_whole(zero_rows, is_whole):
    """Few zeros are of an initialisation, and so is a layer of zeros alone: as of LoRA, or the end of a residual."""
    model = nn.Sequential(nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[:zero_rows] = 0
    layer = mask_linears(model)["0"]
    assert torch.equal(layer.mask(), torch.ones(4, 8, dtype=torch.bool) if is_whole else layer.weight != 0)
    layer(torch.ones(1, 8)).sum().backward()
    assert torch.equal(layer.weight.grad != 0, layer.mask())


def test_what_torch_pruned_stays_pruned_whatever_its_share():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    prune.random_unstructured(model[0], "weight", 0.1)
    prune.random_unstructured(model[1], "weight", 1.0)
    pruned = [layer.weight_mask.bool() for layer in model]
    assert all(torch.equal(layer.mask(), m) for layer, m in zip(mask_linears(model).values(), pruned, strict=True))


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def test_what_cannot_be_masked_is_left():
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    attention = nn.MultiheadAttention(4, 2)
    model = nn.ModuleList([nn.Linear(4, 4), Doubled(4, 4), hooked, attention, nn.Linear(4, 1), MaskedLinear(4, 4)])
    left, masked = [*model][1:5], model[5]
    assert list(mask_linears(model, leave=["4"])) == ["0", "5"]
    assert all(a is b for a, b in zip([*model][1:5], left, strict=True)) and model[5] is masked


@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_layer_with_a_hook_is_left_and_calls_it(hook):
    called = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    getattr(model[0], hook)(lambda *_: called.append(hook))
    assert list(mask_linears(model)) == ["1"]
    model(torch.ones(1, 4, requires_grad=True)).sum().backward()
    assert called == [hook]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_layer_sees_its_masks_at_inference_too(activation):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation=activation).eval()
    plain = copy.deepcopy(layer)
    vars(plain)["activation_relu_or_gelu"] = 0  # calls its layers, as the masked one does
    for name, one in mask_linears(layer).items():
        one.set_mask(torch.rand(one.weight.shape) < 0.3)
        plain.get_submodule(name).weight.data *= one.mask()
    x = torch.randn(3, 5, 16)
    with torch.inference_mode():
        assert torch.equal(layer(x), plain(x))
    assert type(freeze(layer).linear1) is SparseMLP  # both of them, in one call


@pytest.mark.parametrize(
    ("model", "leave", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), ["1"], "leave: got '1', wanted names of linear layers"),
        (nn.Sequential(nn.Linear(2, 2)), ["0"], "model: got a Sequential without linear layers to mask"),
        (nn.Sequential(nn.ReLU()), [], "model: got a Sequential without linear layers to mask"),
        (nn.Linear(2, 2), [], "model: got a linear layer, wanted a model that contains it"),
    ],
)
def test_bad_input_is_named(model, leave, message):
    with pytest.raises(ValueError, match=message):
        mask_linears(model, leave)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_an_encoder_of_masked_layers_takes_padding():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padded = torch.randn(3, 5, 16), torch.arange(5)[None] >= torch.tensor([[5], [3], [2]])
    wanted = model(x, src_key_padding_mask=padded).detach()
    mask_linears(model)
    with torch.inference_mode():
        y = model(x, src_key_padding_mask=padded)
    torch.testing.assert_close(y[~padded], wanted[~padded], rtol=1e-5, atol=1e-5)
