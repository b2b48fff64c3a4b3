"""Weights behind sparse masks begin as much larger as keeps the variance of a neuron's sums."""

import pytest
import torch

from lt4rec_sparse import MaskedMLP
from lt4rec_sparse.lottery import scale_to_density
from lt4rec_sparse.masks import Mask

TASKS = ("ctr", "cvr")


@pytest.mark.parametrize(("kept", "factor"), [((16, 16), 1.0), ((4, 4), 2.0), ((2, 6), 2.0), ((0, 0), 1.0)])
def test_by_one_over_the_root_of_the_tasks_mean_density(kept, factor):
    mlp = MaskedMLP(4, hidden=(4,), tasks=TASKS)
    generator = torch.Generator().manual_seed(0)
    for task, nnz in zip(TASKS, kept, strict=True):
        mlp.set_mask(Mask.random({"layers.0": (4, 4)}, {"layers.0": nnz}, generator), task)
    before = {name: p.detach().clone() for name, p in mlp.named_parameters()}
    scale_to_density(mlp)
    for name, parameter in mlp.named_parameters():
        # Factors that are powers of two are exact.
        assert torch.equal(parameter, before[name] * (factor if name == "layers.0.weight" else 1.0))


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
