"""A step for a task has the task's own rate, and is otherwise `MaskedAdam`'s."""

import pytest
import torch

from lt4rec_sparse.masks import Mask
from lt4rec_sparse.nn import MaskedMLP
from lt4rec_sparse.nn.optim import MaskedAdam
from lt4rec_sparse.recsys.training import TaskAdam

RATES = {"a": 1e-3, "b": 4e-3}


def new_mlp() -> MaskedMLP:
    torch.manual_seed(0)
    mlp = MaskedMLP(6, (5, 4), tasks=tuple(RATES))
    generator = torch.Generator().manual_seed(1)
    for task in RATES:
        shapes = mlp.mask(task).shapes
        mlp.set_mask(Mask.random(shapes, {name: n * k // 2 for name, (n, k) in shapes.items()}, generator), task)
    return mlp


def step(mlp: MaskedMLP, optimizer: MaskedAdam, task: str) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(mlp(torch.ones(3, 6), task).square().sum())
    optimizer.step(task)


@pytest.mark.parametrize("task", RATES)
def test_a_task_s_steps_are_those_of_masked_adam_at_its_rate(task):
    mine, other = new_mlp(), new_mlp()
    optimizers = TaskAdam(mine, RATES), MaskedAdam(other, RATES[task])
    for _ in range(3):
        step(mine, optimizers[0], task)
        step(other, optimizers[1], task)
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True))
    assert not torch.equal(mine.heads[task].weight, new_mlp().heads[task].weight)


def test_rates_alternate_with_the_tasks_and_survive_a_checkpoint():
    whole, resumed = new_mlp(), new_mlp()
    optimizer, before = TaskAdam(whole, RATES), TaskAdam(resumed, RATES)
    for task in ("a", "b", "a"):
        step(whole, optimizer, task)
        step(resumed, before, task)
    after = TaskAdam(resumed, RATES)
    after.load_state_dict(before.state_dict())
    for task in ("b", "a"):
        step(whole, optimizer, task)
        step(resumed, after, task)
    states = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_one_step_for_tasks_of_different_rates_is_refused():
    with pytest.raises(ValueError, match="for one step of several tasks, wanted one rate"):
        TaskAdam(new_mlp(), RATES).step()
    TaskAdam(new_mlp(), dict.fromkeys(RATES, 1e-3)).step()
