"""The report: every linear layer is in it, with its bytes, its time where an example is given, or why it is dense."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lt4rec_sparse import MaskedLinear, MaskedMLP, freeze, report
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.lottery import random_masks


def model() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Softmax(1), nn.Linear(64, 10), nn.Softmax(1)]
    for linear, amount in zip(parts[:3:2], (0.9, 0.8), strict=True):
        prune.l1_unstructured(linear, "weight", amount)
    own = nn.Linear(10, 10)
    own.register_forward_hook(lambda module, arguments, y: None)
    return nn.Sequential(*parts, own)


def test_every_linear_layer_is_told_of():
    found = report(freeze(model())).entries
    assert [(entry.name, entry.widths, entry.format) for entry in found] == [
        ("0", (64, 128, 64), "weights"),
        ("4", (64, 10), "dense"),
        ("6", (10, 10), "dense"),
    ]
    first = found[0]
    assert first.density == pytest.approx(0.15, abs=1e-3)
    assert first.dense_nbytes == 4 * (2 * 64 * 128 + 128 + 64)
    assert first.nbytes < 0.3 * first.dense_nbytes
    assert found[1].why_dense == "0% is zero, wanted 50%"
    assert found[2].why_dense == "got a hook, function, wanted none: nothing would call it"
    assert all(entry.microseconds is None for entry in found)


def test_a_model_that_is_not_frozen_is_told_what_would_be():
    found = report(model()).entries
    assert [entry.why_dense for entry in found[:2]] == ["not frozen", "not frozen"]
    assert [entry.density for entry in found[:2]] == pytest.approx([0.1, 0.2], abs=1e-3)


def test_a_masked_layer_that_is_not_frozen_is_told_of():
    layer = MaskedLinear(4, 2)
    layer.set_mask(torch.tensor([[True, False, False, False]] * 2))
    (entry,) = report(layer).entries
    assert (entry.why_dense, entry.density) == ("not frozen", 0.25)


def test_an_example_is_timed_on_what_enters_each_call():
    frozen = freeze(model())
    found = report(frozen, torch.randn(3, 64))
    assert found.entries[0].rows == 3
    assert found.entries[0].kernel in (*cpu.LAYOUTS, "dense torch")
    assert found.entries[0].kernel in str(found)
    assert found.entries[0].microseconds > 0 < found.entries[0].dense_microseconds
    assert found.entries[1].microseconds is None
    lines = str(found).splitlines()
    assert len(lines) == 4
    assert "64-128-64" in lines[1]
    assert "x (" in lines[1]
    assert lines[2].endswith("0% is zero, wanted 50%")
    assert not any(module._forward_pre_hooks for module in frozen.modules())


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


def test_nothing_runs_where_no_call_is_to_be_timed():
    counted = nn.Sequential(Counted(), nn.BatchNorm1d(64), model())
    before = counted[1].running_mean.clone()
    assert report(counted, torch.randn(3, 64)).entries == report(counted).entries
    assert counted[0].calls == 0 and torch.equal(counted[1].running_mean, before)


@pytest.mark.parametrize("raises", [False, True])
def test_a_model_in_training_is_left_as_it_was(raises):
    served = nn.Sequential(nn.BatchNorm1d(64), nn.Dropout(0.5), freeze(model()), nn.BatchNorm1d(3 if raises else 10))
    served.train()
    served[1].eval()
    state = {name: value.clone() for name, value in served.state_dict().items() if isinstance(value, torch.Tensor)}
    modes = [module.training for module in served.modules()]
    if raises:
        with pytest.raises(RuntimeError, match="running_mean"):
            report(served, torch.randn(3, 64))
    else:
        assert report(served, torch.randn(3, 64)).entries[0].microseconds is not None
    assert [module.training for module in served.modules()] == modes
    assert all(torch.equal(served.state_dict()[name], value) for name, value in state.items())


def test_tasks_and_blocks():
    mlp = MaskedMLP(64, hidden=(32, 16), tasks=("a", "b"))
    masks = random_masks(mlp.mask("a").shapes, 0.25, mlp.tasks, torch.Generator().manual_seed(0), granularity="16x4")
    for task, mask in masks.items():
        mlp.set_mask(mask, task)
    (entry,) = report(freeze(mlp), torch.randn(2, 5, 64)).entries
    assert (entry.format, entry.widths, entry.rows, entry.name) == ("blocks", (64, 32, 16, 1), 10, "")
    assert entry.dense_nbytes == 2 * 4 * (64 * 32 + 32 + 32 * 16 + 16 + 16 + 1)
    kept = sum(mask[name].sum().item() for mask in masks.values() for name in mask.shapes)
    assert entry.density == (kept + 2 * 16) / (2 * (64 * 32 + 32 * 16 + 16))
    assert "(the model)" in str(report(freeze(mlp)))


def test_a_plan_names_its_segments():
    x = torch.randn(3, 64)
    frozen = freeze(model(), example=x, batch_sizes=(3,))
    assert report(frozen, x).entries[0].kernel == str(frozen[0]._given.plan.batches[0].chains[0].chain[0]) or (
        "," in report(frozen, x).entries[0].kernel
    )
