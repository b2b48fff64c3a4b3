import pytest
import torch
from oracle import Layer, assert_rounding, mlp_reference
from torch import nn

from lt4rec_sparse.recsys.models.mlp import MLP, half, lower_and_upper


def test_equals_the_reference_and_starts_as_torchs_linear():
    torch.manual_seed(0)
    linears = [nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 1)]
    torch.manual_seed(0)
    mlp, x = MLP(5, (4, 3), head=1), torch.randn(6, 5)
    layers = [
        Layer(linear.weight.detach(), linear.bias.detach(), activation)
        for linear, activation in zip(linears, ("relu", "relu", "none"), strict=True)
    ]
    assert_rounding(mlp(x).detach(), mlp_reference(x, layers))
    assert mlp.out_features == 1


def test_without_a_head_it_ends_in_relu():
    mlp = MLP(5, (4,))
    assert mlp.out_features == 4
    assert (mlp(torch.randn(6, 5)) >= 0).all()
    assert len(list(MLP(5, (), head=1).parameters())) == 2


def test_widths():
    assert lower_and_upper((512, 256, 128)) == ((512, 256), (128,))
    assert lower_and_upper((64,)) == ((64,), ())
    assert half((512, 3, 1)) == (256, 1, 1)


def test_bad_widths_are_named():
    with pytest.raises(ValueError, match=r"hidden: got \(4, 0\) after 5, wanted widths of at least 1"):
        MLP(5, (4, 0))
    with pytest.raises(ValueError, match="hidden: got no layer, wanted at least one width"):
        lower_and_upper(())
