"""What belongs to a step besides Adam: schedule, clipping, decay, and the average of weights."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import clip_grad_norm_

from lt4rec_sparse.nn import MaskedMLP
from lt4rec_sparse.recsys.training import SCHEDULES, Schedule, TaskAdam, averaged_model

RATES = {"a": 1e-2, "b": 1e-3}


def masked(seed=0, tasks=("a", "b"), pruned_to=None):
    """An MLP behind random masks; with `pruned_to`, weights that no task keeps have this value."""
    torch.manual_seed(seed)
    mlp = MaskedMLP(6, (5, 4), tasks=tasks)
    for task in tasks:
        mask = mlp.mask(task)
        nnz = {name: kept.numel() // 3 for name, kept in mask.items()}
        mlp.set_mask(type(mask).random(mask.shapes, nnz, torch.Generator().manual_seed(len(task) + ord(task))), task)
    if pruned_to is not None:
        for layer in mlp.masked_layers():
            layer.weight.data[~layer.masks.any(0)] = pruned_to
    return mlp


def gradients_of(model, task, seed):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(model(x, task).square().sum())


def states_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@given(st.sampled_from(SCHEDULES), st.integers(0, 50), st.integers(1, 60))
def test_a_rate_rises_then_falls_and_is_never_zero(decay, warm_up, total):
    factors = [Schedule(decay, warm_up).factor(done, total) for done in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = min(warm_up, total)
    assert factors[:peak] == [(i + 1) / warm_up for i in range(peak)]
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if warm_up < total:
        assert factors[warm_up] == 1


@pytest.mark.parametrize("warm_up", [0, 3])
def test_rates_fall_as_torchs_schedulers_do(warm_up):
    total, model = 12, nn.Linear(1, 1)
    left = total - warm_up
    for decay, make in {
        "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, left),
        "linear": lambda opt: torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, left),
    }.items():
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = make(optimizer)
        for done in range(warm_up, total):
            assert Schedule(decay, warm_up).factor(done, total) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
            optimizer.step()
            scheduler.step()


def test_the_factor_multiplies_every_tasks_rate():
    scaled, plain = (masked() for _ in range(2))
    first, second = TaskAdam(scaled, RATES), TaskAdam(plain, {task: rate / 4 for task, rate in RATES.items()})
    first.factor = 0.25
    for model, optimizer in ((scaled, first), (plain, second)):
        for seed, task in enumerate("abab"):
            gradients_of(model, task, seed)
            optimizer.step(task)
    assert states_equal(scaled, plain)


@pytest.mark.parametrize("norm", [1e-3, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(norm):
    ours, theirs = (masked() for _ in range(2))
    clipped, plain = TaskAdam(ours, RATES, clip_norm=norm), TaskAdam(theirs, RATES)
    for seed, task in enumerate("abba"):
        gradients_of(ours, task, seed)
        clipped.step(task)
        gradients_of(theirs, task, seed)
        clip_grad_norm_(theirs.parameters(), norm)
        plain.step(task)
    assert states_equal(ours, theirs)


def test_sparse_gradients_count_in_the_norm_as_dense_ones_do():
    rows, norms = torch.tensor([1, 3, 1]), {}
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Embedding(5, 4, sparse=sparse), nn.Linear(4, 1)])
        optimizer = TaskAdam(model, {"a": 1e-2}, clip_norm=0.1)
        torch.autograd.backward(model[1](model[0](rows)).square().sum())
        optimizer.step("a")
        clipped = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()]
        norms[sparse] = math.sqrt(sum(float(g.double().square().sum()) for g in clipped))
    # 1e-6 is torch's own, against a division by zero; sums of float32.
    assert norms[True] == pytest.approx(norms[False], rel=1e-5) == pytest.approx(0.1, rel=1e-4)


def test_decay_is_that_of_adamw_and_of_weights_alone():
    """In float64, a full network of one task: the weights decay as AdamW's group of them, all else as Adam's."""
    ours, theirs = (MaskedMLP(6, (5, 4), tasks=("a",)).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    named = dict(theirs.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n.endswith("weight")], "weight_decay": 0.3},
        {"params": [p for n, p in named.items() if not n.endswith("weight")], "weight_decay": 0.0},
    ]
    optimizer, wanted = TaskAdam(ours, RATES, weight_decay=0.3), torch.optim.AdamW(groups, RATES["a"])
    for seed in range(5):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for model in (ours, theirs):
            model.zero_grad(set_to_none=True)
            torch.autograd.backward(model(x, "a").square().sum())
        optimizer.step("a")
        wanted.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.flatten().tolist() == pytest.approx(b.flatten().tolist(), rel=1e-9)


@pytest.mark.parametrize("pruned_to", [None, 0.0])
@pytest.mark.parametrize("tasks", [("a",), ("a", "b")])
def test_pruned_weights_stay_what_they_are_to_the_bit(tasks, pruned_to):
    model = masked(tasks=tasks, pruned_to=pruned_to)
    start = copy.deepcopy(model)
    optimizer = TaskAdam(model, RATES, clip_norm=0.1, weight_decay=0.5)
    averaged = averaged_model(model, 0.99)
    for seed in range(6):
        gradients_of(model, "a", seed)
        optimizer.step("a")
        averaged.update_parameters(model)
    for after in (model, averaged.module):
        for old, new in zip(start.masked_layers(), after.masked_layers(), strict=True):
            kept = new.mask("a")
            assert torch.equal(old.weight[~kept], new.weight[~kept]), "what only another task keeps, and what none does"
            assert not torch.equal(old.weight[kept], new.weight[kept])
            if pruned_to is not None:
                assert not new.weight[~new.masks.any(0)].any()


def test_what_the_step_does_not_move_does_not_decay():
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2), "table": nn.Embedding(4, 3)})
    optimizer = TaskAdam(model, {"a": 1e-30}, weight_decay=1e29)  # Adam moves by nothing, decay by a tenth
    before = copy.deepcopy(model.state_dict())
    torch.autograd.backward(model["used"](model["table"](torch.arange(4))).sum())
    optimizer.step("a")
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"used.weight"}
    assert torch.equal(after["used.weight"], before["used.weight"] * (1 - 1e-30 * 1e29))


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_is_that_of_its_formula(decay):
    model = masked()
    averaged, weights = averaged_model(model, decay), []
    for seed in range(8):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        averaged.update_parameters(model)
        weights.append(model.layers[0].bias.detach().double())
    wanted = weights[0]
    for n, weight in enumerate(weights[1:], start=2):
        d = min(decay, n / (n + 9))
        wanted = d * wanted + (1 - d) * weight
    got = averaged.module.layers[0].bias
    assert got.tolist() == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-6)
    assert averaged.module.tasks == model.tasks


def test_masks_of_the_average_are_the_models():
    model = masked()
    averaged = averaged_model(model, 0.9)
    model.set_mask(model.mask("b"), "a")
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    assert averaged.module.mask("a") == model.mask("b")
