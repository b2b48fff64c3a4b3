"""Masks that shrink while the network trains reach the wanted density, and only ever lose weights."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lt4rec_sparse import MaskedLinear, MaskedMLP, freeze, mask_linears
from lt4rec_sparse.lottery import GRANULARITIES, SCOPES, GradualPruning
from lt4rec_sparse.nn.optim import MaskedAdam


def train(mlp: MaskedMLP, optimizer: MaskedAdam, pruning: GradualPruning, first: int, last: int, total: int) -> list:
    masks = [mlp.mask()]
    for done in range(first + 1, last + 1):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(done))
        optimizer.zero_grad()
        mlp(x).square().sum().backward()
        optimizer.step("task")
        pruning.after_batch(x, done, total)
        masks.append(mlp.mask())
    return masks


def new(**settings) -> tuple[MaskedMLP, MaskedAdam, GradualPruning]:
    torch.manual_seed(0)
    mlp = MaskedMLP(8, hidden=(6, 4))
    optimizer = MaskedAdam(mlp, 0.01)
    return mlp, optimizer, GradualPruning(mlp, optimizer, **settings)


@settings(max_examples=25)
@given(
    density=st.floats(0.02, 1),
    granularity=st.sampled_from(GRANULARITIES),
    scope=st.sampled_from(SCOPES),
    span=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    every=st.integers(1, 7),
    total=st.integers(1, 20),
)
def test_masks_shrink_to_the_density(density, granularity, scope, span, every, total):
    mlp, optimizer, pruning = new(
        density=density, granularity=granularity, scope=scope, begin=span[0], end=span[1], every=every
    )
    masks = train(mlp, optimizer, pruning, 0, total, total)
    assert all((before[name] | ~kept).all() for before, after in pairwise(masks) for name, kept in after.items())
    wanted = {"layers.0": round(48 * density), "layers.1": round(24 * density)}
    if granularity in ("weight", "2:4"):
        allowed = {"layers.0": 48, "layers.1": 24} if granularity == "weight" else {"layers.0": 24, "layers.1": 16}
        if scope == "layer":
            assert masks[-1].layer_nnz() == {name: min(nnz, allowed[name]) for name, nnz in wanted.items()}
        else:
            assert masks[-1].nnz == min(round(72 * density), sum(allowed.values()))
    # After the end nothing is pruned, and before the beginning nothing was.
    last = max(round(span[1] * total), 1)
    assert all(mask == masks[last] for mask in masks[last:])
    assert all(mask == masks[0] for mask in masks[: min(round(span[0] * total), last - 1) + 1])


def test_the_schedule_is_the_cubic_one():
    mlp, optimizer, pruning = new(density=0.2, begin=0.1, end=0.6, every=10)
    masks = train(mlp, optimizer, pruning, 0, 100, 100)
    for done, mask in enumerate(masks):
        n = min(max(done - 10, 0), 50) // 10
        assert mask.nnz == round(72 * (0.2 + 0.8 * (1 - n / 5) ** 3))


def test_an_interrupted_training_ends_bit_for_bit_where_a_whole_one_does():
    whole, optimizer, pruning = new(density=0.3, every=3)
    train(whole, optimizer, pruning, 0, 30, 30)
    for cut in (2, 12, 28):
        first, optimizer, pruning = new(density=0.3, every=3)
        train(first, optimizer, pruning, 0, cut, 30)
        second, other, pruning = new(density=0.3, every=3)
        second.load_state_dict(first.state_dict())
        other.load_state_dict(optimizer.state_dict())
        train(second, other, pruning, cut, 30, 30)
        assert all(
            torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, "density: got 0.0"),
        ({"density": 0.2, "begin": 0.5, "end": 0.4}, "begin and end: got 0.5 and 0.4"),
        ({"density": 0.2, "every": 0}, "every: got 0"),
        ({"density": 0.2, "granularity": "row"}, "granularity: got 'row'"),
        ({"density": 0.2, "scope": "row"}, "scope: got 'row'"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        new(**arguments)


def test_several_tasks_have_no_one_mask():
    mlp = MaskedMLP(8, hidden=(6, 4), tasks=("ctr", "cvr"))
    with pytest.raises(ValueError, match="task: got None"):
        GradualPruning(mlp, MaskedAdam(mlp), 0.2)


class Residual(nn.Module):
    """A model of somebody's own: a sum, functions between layers, a head."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(x + self.narrow(nn.functional.silu(self.wide(x))))


OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), 0.01),
    "MaskedAdam": lambda model: MaskedAdam(model, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("granularity", "density"), [("weight", 0.1), ("16x4", 0.25)])
def test_any_model_is_pruned_while_an_optimiser_of_its_own_trains_it(name, granularity, density):
    torch.manual_seed(0)
    model = Residual()
    masked = mask_linears(model, leave=["head"])
    optimizer = OPTIMIZERS[name](model)
    pruning = GradualPruning(model, optimizer, density, granularity, scope="layer", every=2)
    x = torch.randn(64, 8)
    masks = [{name: layer.mask() for name, layer in masked.items()}]
    for done in range(1, 41):
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        pruning.after_batch(x, done, 40)
        masks.append({name: layer.mask().clone() for name, layer in masked.items()})
        assert all((masks[-2][name] | ~kept).all() for name, kept in masks[-1].items())
    assert {name: int(kept.sum()) for name, kept in masks[-1].items()} == dict.fromkeys(
        ("wide", "narrow"), round(256 * density)
    )
    assert type(model.head) is nn.Linear
    layers = {name: layer.network for name, layer in freeze(model).named_modules() if name in masked}
    assert all(torch.equal(layers[name].mask(0, "task"), kept) for name, kept in masks[-1].items())


def test_a_pruned_weight_that_momentum_moves_is_not_read():
    layer = MaskedLinear(4, 2)
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruning = GradualPruning(model, optimizer, 0.5, begin=0, end=0.1)
    x = torch.randn(8, 4)
    for done in range(1, 11):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        pruning.after_batch(x, done, 10)
    pruned = ~layer.mask()
    y = model(x)
    with torch.no_grad():
        layer.weight[pruned] = torch.nan
    assert pruned.sum() == 4 and torch.equal(model(x), y)


def test_a_model_without_masks_and_an_optimiser_of_another_model_are_named():
    model = Residual()
    with pytest.raises(ValueError, match=r"model: got a Residual without masked layers, wanted .* mask_linears"):
        GradualPruning(model, torch.optim.SGD(model.parameters(), 0.1), 0.2)
    mask_linears(model)
    with pytest.raises(ValueError, match="optimizer: got one without the weight of wide"):
        GradualPruning(model, torch.optim.SGD(Residual().parameters(), 0.1), 0.2)
