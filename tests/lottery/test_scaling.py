"""Weights behind sparse masks start larger, so that the variance of a neuron's sums is kept."""

import pytest
import torch

from lt4rec_sparse import MaskedMLP
from lt4rec_sparse.lottery import scale_to_density
from lt4rec_sparse.masks import Mask

TASKS = ("ctr", "cvr")


FULL, NOTHING = torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
DIAGONAL = torch.eye(4, dtype=torch.bool)
HALF = DIAGONAL | DIAGONAL.roll(1, 0)  # of each neuron's inputs
TWO_NEURONS = torch.tensor([[True], [False], [True], [False]]).expand(4, 4)


@pytest.mark.parametrize(
    ("ctr", "cvr", "factor"),
    [
        (FULL, FULL, 1.0),
        (DIAGONAL, DIAGONAL, 2.0),
        (HALF, NOTHING, 2**0.5),
        (TWO_NEURONS, TWO_NEURONS, 1.0),  # those that are alive have lost no input
        (TWO_NEURONS & DIAGONAL, NOTHING, 2.0),
        (NOTHING, NOTHING, 1.0),
    ],
)
def test_by_one_over_the_root_of_the_density_of_neurons_alive(ctr, cvr, factor):
    mlp = MaskedMLP(4, hidden=(4,), tasks=TASKS)
    for task, kept in zip(TASKS, (ctr, cvr), strict=True):
        mlp.set_mask(Mask({"layers.0": kept}), task)
    before = {name: p.detach().clone() for name, p in mlp.named_parameters()}
    scale_to_density(mlp)
    for name, parameter in mlp.named_parameters():
        wanted = before[name] / (1 / factor if name == "layers.0.weight" else 1.0)
        assert torch.equal(parameter, wanted)


def test_sums_keep_their_variance():
    torch.manual_seed(0)
    mlp = MaskedMLP(400, hidden=(300,))
    x = torch.randn(200, 400)
    layer = mlp.masked_layers()[0]
    layer.bias.data.zero_()
    full = layer(x).var().item()
    mlp.set_mask(Mask.random({"layers.0": (300, 400)}, {"layers.0": 24_000}, torch.Generator().manual_seed(1)))
    sparse = layer(x).var().item()
    scale_to_density(mlp)
    # 60,000 sums: the variance of one draw of masks and weights is known to a few percent.
    assert sparse / full == pytest.approx(0.2, rel=0.1)
    assert layer(x).var().item() / full == pytest.approx(1.0, rel=0.1)
