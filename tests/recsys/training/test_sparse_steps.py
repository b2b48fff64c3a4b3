"""Training through fixed masks with kept weights alone leaves the model that it was given."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.lottery import random_masks
from lt4rec_sparse.nn import CompressedMLP, MaskedMLP
from lt4rec_sparse.recsys.training import TaskAdam, sparse_steps

TASKS = ("ctr", "cvr")
RATES = {"ctr": 0.01, "cvr": 0.02}
pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="steps of kept weights need the engine")


class Model(nn.Module):
    """An MLP among other modules."""

    def __init__(self, density: float, granularity: str = "16x4") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inputs = nn.Linear(8, 64)
        self.mlp = MaskedMLP(64, (48, 32), tasks=TASKS)
        shapes = self.mlp.mask("ctr").shapes
        self.mlp.set_mask(random_masks(shapes, density, TASKS, torch.Generator().manual_seed(0), granularity))

    def forward(self, x: Tensor, task: str) -> Tensor:
        logits: Tensor = self.mlp(self.inputs(x), task)
        return logits


def step(model: Model, optimizer: TaskAdam, task: str) -> None:
    optimizer.zero_grad()
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    model(x, task).sub(1).square().mean().backward()
    optimizer.step(task)


@pytest.mark.parametrize("granularity", ["16x4", "weight"])
def test_kept_weights_train_and_all_others_keep_every_bit(granularity: str) -> None:
    model = Model(0.15, granularity)
    masked, before = model.mlp, copy.deepcopy(model)
    with sparse_steps(model):
        assert isinstance(model.mlp, CompressedMLP)
        optimizer = TaskAdam(model, RATES, clip_norm=1.0, weight_decay=0.1)
        for task in ("ctr", "cvr", "ctr"):
            step(model, optimizer, task)
        trained = copy.deepcopy(model.mlp)
    assert model.mlp is masked
    for layer, old, new in zip(
        masked.masked_layers(), before.mlp.masked_layers(), trained.to_masked().masked_layers(), strict=True
    ):
        kept = layer.masks.any(0)
        assert torch.equal(layer.weight[~kept], old.weight[~kept])
        assert torch.equal(layer.weight[kept], new.weight[kept])
        assert not torch.equal(layer.weight[kept], old.weight[kept])
    assert not torch.equal(model.inputs.weight, before.inputs.weight)


def test_decay_reaches_what_the_step_s_tasks_own_alone() -> None:
    model = Model(0.15)
    with sparse_steps(model):
        optimizer = TaskAdam(model, {"ctr": 0.5, "cvr": 0.5}, weight_decay=1.0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = copy.deepcopy(model)
        optimizer.step("cvr")
        for layer, old in zip(model.mlp.layers, before.mlp.layers, strict=True):
            for part, was, owners in zip(layer.parts, old.parts, layer.owners, strict=True):
                assert torch.equal(part, was * 0.5 if "cvr" in owners else was)


def test_weights_come_back_past_an_exception() -> None:
    model = Model(0.15)
    masked, before = model.mlp, copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt), sparse_steps(model):
        step(model, TaskAdam(model, RATES), "ctr")
        raise KeyboardInterrupt
    assert model.mlp is masked and not torch.equal(masked.heads["ctr"].weight, before.mlp.heads["ctr"].weight)


def test_what_would_not_be_faster_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for density, granularity in ((1.0, "16x4"), (0.6, "weight")):
        model = Model(density, granularity)
        with sparse_steps(model):
            assert isinstance(model.mlp, MaskedMLP)
    sparse = Model(0.1)
    assert CompressedMLP.is_faster_than(sparse.mlp)
    assert not CompressedMLP.is_faster_than(copy.deepcopy(sparse.mlp).bfloat16())
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    assert not CompressedMLP.is_faster_than(sparse.mlp)
