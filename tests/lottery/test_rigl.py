"""A sparse network that exchanges connections keeps their number, and exchanges the right ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lt4rec_sparse import MaskedMLP
from lt4rec_sparse.lottery import DropAndGrow
from lt4rec_sparse.lottery.rigl import dense_gradients
from lt4rec_sparse.nn.optim import MaskedAdam


def new(**settings) -> tuple[MaskedMLP, MaskedAdam, DropAndGrow]:
    torch.manual_seed(settings.pop("seed", 0))
    mlp = MaskedMLP(8, hidden=(6, 4))
    optimizer = MaskedAdam(mlp, 0.01)
    generator = torch.Generator().manual_seed(1)
    return mlp, optimizer, DropAndGrow(mlp, optimizer, lambda x: loss_of(mlp, x), generator=generator, **settings)


def loss_of(mlp: MaskedMLP, x: torch.Tensor) -> torch.Tensor:
    return (mlp(x) - x.sum(1, keepdim=True)).square().mean()


def batch_of(done: int) -> torch.Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(done))


def train(mlp, optimizer, rigl, first, last, total, see=lambda done, old, weights: None) -> None:
    for done in range(first + 1, last + 1):
        x = batch_of(done)
        optimizer.zero_grad()
        loss_of(mlp, x).backward()
        optimizer.step("task")
        old, weights = mlp.mask(), {name: weight.detach().clone() for name, weight in mlp.masked_weights().items()}
        rigl.after_batch(x, done, total)
        see(done, old, weights)


def naive_dense_gradients(mlp: MaskedMLP, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same network of plain torch, its weights times their masks."""
    dense = {name: (w.detach() * mlp.mask()[name]).requires_grad_() for name, w in mlp.masked_weights().items()}
    h = x
    for (_, weight), layer in zip(dense.items(), mlp.masked_layers(), strict=True):
        h = torch.relu(torch.nn.functional.linear(h, weight, layer.bias))
    (mlp.heads["task"](h) - x.sum(1, keepdim=True)).square().mean().backward()
    return {name: weight.grad for name, weight in dense.items()}


def test_dense_gradients_are_those_of_the_dense_weights_and_leave_no_trace():
    mlp, *_ = new(density=0.3)
    mlp.double()
    mlp.layers[0].weight.data[~mlp.layers[0].mask()] = float("nan")  # pruned, whatever the value
    x = batch_of(0).double()
    wanted = naive_dense_gradients(mlp_without_nan(mlp), x)
    before = {name: value.clone().view(torch.uint8) for name, value in mlp.state_dict().items()}
    got = dense_gradients(mlp, lambda: loss_of(mlp, x))
    for name, gradient in wanted.items():
        # Sums of at most 16 * 8 terms, each through three layers.
        assert ((got[name] - gradient).abs() <= 2.0**-53 * 400 * (1 + gradient.abs())).all()
        assert (got[name][~mlp.mask()[name]] != 0).any()
    assert all(torch.equal(value.view(torch.uint8), before[name]) for name, value in mlp.state_dict().items())
    assert all(parameter.grad is None for parameter in mlp.parameters())

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dense_gradients(mlp, fails)
    assert all(torch.equal(value.view(torch.uint8), before[name]) for name, value in mlp.state_dict().items())


def mlp_without_nan(mlp: MaskedMLP) -> MaskedMLP:
    clean = MaskedMLP(8, hidden=(6, 4)).double()
    clean.load_state_dict({name: value.nan_to_num() for name, value in mlp.state_dict().items()})
    return clean


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    density=st.floats(0.05, 1),
    every=st.integers(1, 4),
    drop=st.floats(0, 1),
    end=st.floats(0, 1),
)
def test_every_update_keeps_the_number_and_exchanges_the_right_weights(seed, density, every, drop, end):
    mlp, optimizer, rigl = new(seed=seed, density=density, every=every, drop=drop, end=end)
    counts = {"layers.0": round(48 * density), "layers.1": round(24 * density)}
    assert mlp.mask().layer_nnz() == counts

    def see(done, old, weights):
        new, share = mlp.mask(), 0.0
        assert new.layer_nnz() == counts
        if done % every == 0 and done < end * 12:
            share = drop / 2 * (1 + math.cos(math.pi * done / (end * 12)))
        assert rigl.share_after(done, 12) == share
        for name, weight in mlp.masked_weights().items():
            dropped, grown = old[name] & ~new[name], new[name] & ~old[name]
            assert int(dropped.sum()) == int(grown.sum()) <= round(share * counts[name])
            # New weights are zero; every other weight, pruned ones included, is unchanged.
            assert not weight[grown].any()
            assert torch.equal(weight[~grown], weights[name][~grown])
            magnitude = weights[name].abs()
            if dropped.any():
                n = round(share * counts[name])
                smallest = magnitude[old[name]].sort().values[:n]
                assert (magnitude[dropped] <= smallest[-1]).all()
        if share:
            # The gradients before the update: by the masks and weights as they were then.
            twin = MaskedMLP(8, hidden=(6, 4))
            twin.load_state_dict(mlp.state_dict())
            twin.set_mask(old)
            for name, weight in twin.masked_weights().items():
                weight.data.copy_(weights[name])
            gradients = dense_gradients(twin, lambda: loss_of(twin, batch_of(done)))
            for name, kept in new.items():
                assert torch.equal(kept, naive_exchange(weights[name], gradients[name], old[name], share))

    train(mlp, optimizer, rigl, 0, 12, 12, see)


def naive_exchange(weight, gradient, kept, share):
    """Drop and grow one by one; what was dropped may grow again."""
    places = [tuple(place) for place in kept.nonzero().tolist()]
    n = round(share * len(places))
    stays = sorted(places, key=lambda p: (-abs(weight[p].item()), p))[: len(places) - n]
    others = [(r, c) for r in range(kept.shape[0]) for c in range(kept.shape[1]) if (r, c) not in set(stays)]
    grown = sorted(others, key=lambda p: (-abs(gradient[p].item()), p))[:n]
    wanted = torch.zeros_like(kept)
    for place in (*stays, *grown):
        wanted[place] = True
    return wanted


def test_what_is_dropped_and_chosen_again_has_not_been_away():
    """With a full mask there is nothing else to grow: an update changes nothing at all."""
    runs = []
    for drop in (0.0, 1.0):
        mlp, optimizer, rigl = new(density=1.0, every=2, drop=drop, end=1.0)
        train(mlp, optimizer, rigl, 0, 8, 8)
        runs.append(mlp.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


def test_an_interrupted_training_ends_bit_for_bit_where_a_whole_one_does():
    whole, optimizer, rigl = new(density=0.3, every=3)
    train(whole, optimizer, rigl, 0, 20, 20)
    for cut in (2, 9, 17):
        first, optimizer, rigl = new(density=0.3, every=3)
        train(first, optimizer, rigl, 0, cut, 20)
        second, other, rigl = new(density=0.3, every=3)
        second.load_state_dict(first.state_dict())
        other.load_state_dict(optimizer.state_dict())
        train(second, other, rigl, cut, 20, 20)
        assert all(
            torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
        )


def test_it_finds_the_inputs_that_matter():
    """Of 8 inputs one matters; at the end it has more connections than the others have on average."""
    torch.manual_seed(0)
    mlp = MaskedMLP(8, hidden=(6, 4))
    optimizer = MaskedAdam(mlp, 0.01)

    def loss(x):
        return (mlp(x) - x[:, 3:4].abs()).square().mean()

    rigl = DropAndGrow(mlp, optimizer, loss, 0.25, torch.Generator().manual_seed(1), every=5)
    for done in range(1, 201):
        x = batch_of(done)
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step("task")
        rigl.after_batch(x, done, 200)
    counts = mlp.mask()["layers.0"].sum(0)
    assert counts[3] > counts.float().mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, "density: got 0.0"),
        ({"density": 0.2, "drop": 1.5}, "drop and end: got 1.5 and 0.75"),
        ({"density": 0.2, "every": 0}, "every: got 0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        new(**arguments)
