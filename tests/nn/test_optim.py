"""A step for one task moves only what the task owns, and moves it as a plain Adam would."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse import MaskedMLP
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.nn.optim import MaskedAdam

TASKS = ("ctr", "cvr")


def masked_mlp(seed: int, density: float = 0.5) -> MaskedMLP:
    torch.manual_seed(seed)
    mlp = MaskedMLP(5, hidden=(4, 3), tasks=TASKS)
    generator = torch.Generator().manual_seed(seed)
    for task in TASKS:
        shapes = mlp.mask(task).shapes
        mlp.set_mask(Mask.random(shapes, {n: round(r * c * density) for n, (r, c) in shapes.items()}, generator), task)
    return mlp


def step(mlp: MaskedMLP, optimizer: MaskedAdam, task: str, generator: torch.Generator) -> None:
    x = torch.randn(6, 5, generator=generator)
    optimizer.zero_grad()
    mlp(x, task).square().sum().backward()
    optimizer.step(task)


@given(
    seed=st.integers(0, 2**31),
    order=st.lists(st.sampled_from(TASKS), min_size=1, max_size=8),
    decay=st.sampled_from([0.0, 0.1]),
)
def test_weights_outside_the_mask_keep_every_bit(seed, order, decay):
    mlp = masked_mlp(seed)
    # -0.0 is the weight that a plain `w += 0` would change.
    mlp.layers[0].weight.data[0] = -0.0
    optimizer = MaskedAdam(mlp, learning_rate=0.1, weight_decay=decay)
    generator = torch.Generator().manual_seed(seed)
    for task in order:
        before = {name: w.detach().clone().view(torch.int32) for name, w in mlp.masked_weights().items()}
        heads = {t: head.weight.detach().clone() for t, head in mlp.heads.items()}
        step(mlp, optimizer, task, generator)
        kept = mlp.mask(task)
        for name, weight in mlp.masked_weights().items():
            assert torch.equal(weight.detach().view(torch.int32)[~kept[name]], before[name][~kept[name]])
        for other, head in heads.items():
            assert other == task or torch.equal(mlp.heads[other].weight, head)


class NaiveAdam:
    """Adam on one scalar, in Python, as the paper of Adam writes it."""

    def __init__(self, value, learning_rate, decay, betas=(0.9, 0.999), eps=1e-8):
        self.value, self.m, self.v, self.t = value, 0.0, 0.0, 0
        self.learning_rate, self.decay, self.betas, self.eps = learning_rate, decay, betas, eps

    def step(self, gradient):
        gradient += self.decay * self.value
        self.t += 1
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * gradient
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * gradient**2
        m, v = self.m / (1 - self.betas[0] ** self.t), self.v / (1 - self.betas[1] ** self.t)
        self.value -= self.learning_rate * m / (math.sqrt(v) + self.eps)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_each_weight_lives_in_its_own_time(decay):
    """Against one naive scalar Adam a weight, stepped only when a task that owns the weight is."""
    mlp = masked_mlp(0).double()
    rate = 0.01
    optimizer = MaskedAdam(mlp, learning_rate=rate, weight_decay=decay)
    naive = {
        name: [NaiveAdam(value, rate, decay) for value in weight.flatten().tolist()]
        for name, weight in mlp.masked_weights().items()
    }
    generator = torch.Generator().manual_seed(3)
    order = ["ctr", "cvr", "cvr", "ctr", "cvr", "ctr", "ctr", "cvr"] * 3
    for task in order:
        x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        mlp(x, task).square().sum().backward()
        for name, weight in mlp.masked_weights().items():
            gradients, kept = weight.grad.flatten().tolist(), mlp.mask(task)[name].flatten().tolist()
            for scalar, gradient, is_kept in zip(naive[name], gradients, kept, strict=True):
                if is_kept:
                    scalar.step(gradient)
        optimizer.step(task)
    for name, weight in mlp.masked_weights().items():
        wanted = torch.tensor([scalar.value for scalar in naive[name]], dtype=torch.float64).view_as(weight)
        # 24 steps of about 20 roundings each, on values near 1, in the dtype of the state (float64).
        assert ((weight - wanted).abs() <= 24 * 20 * 2.0**-53 * (1 + wanted.abs())).all()


def test_with_full_masks_it_is_torchs_adam():
    torch.manual_seed(1)
    ours, theirs = MaskedMLP(5, hidden=(4, 3)), MaskedMLP(5, hidden=(4, 3))
    theirs.load_state_dict(ours.state_dict())
    masked, plain = MaskedAdam(ours, 0.01), torch.optim.Adam(theirs.parameters(), 0.01, fused=True)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        x = torch.randn(6, 5, generator=generator)
        masked.zero_grad()
        plain.zero_grad()
        ours(x).square().sum().backward()
        theirs(x).square().sum().backward()
        masked.step("task")
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_task_that_no_layer_knows_is_named():
    with pytest.raises(ValueError, match="task: got 'crt', wanted one of ctr, cvr"):
        MaskedAdam(masked_mlp(0)).step("crt")


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_masks_set_later_want_a_new_optimiser(density):
    mlp = masked_mlp(0, density)
    optimizer, generator = MaskedAdam(mlp), torch.Generator().manual_seed(0)
    step(mlp, optimizer, "ctr", generator)
    mlp.set_mask(mlp.mask("ctr"), "ctr")  # the same again: nothing to refuse
    step(mlp, optimizer, "ctr", generator)
    mlp.set_mask(masked_mlp(1).mask("ctr"), "ctr")
    with pytest.raises(RuntimeError, match="wanted a new MaskedAdam"):
        step(mlp, optimizer, "ctr", generator)


def test_state_round_trip_continues_bit_for_bit():
    whole, resumed = masked_mlp(4), masked_mlp(4)
    first, second = MaskedAdam(whole), MaskedAdam(resumed)
    generator = torch.Generator().manual_seed(0)
    for task in ("ctr", "cvr", "ctr"):
        step(whole, first, task, generator)
    resumed.load_state_dict(whole.state_dict())
    second.load_state_dict(first.state_dict())
    for model, optimizer in ((whole, first), (resumed, second)):
        generator = torch.Generator().manual_seed(9)
        for task in ("cvr", "ctr"):
            step(model, optimizer, task, generator)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
