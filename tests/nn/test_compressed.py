"""An MLP of kept weights alone is the masked one: its scores, its gradients, its steps, its state."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from oracle import Bounded, Layer, assert_exact, assert_rounding, mlp_reference, small_integers
from torch import Tensor, nn

from lt4rec_sparse import MaskedMLP
from lt4rec_sparse.lottery import random_masks
from lt4rec_sparse.nn import CompressedMLP, MaskedAdam

TASKS = ("ctr", "cvr", "like")
GRANULARITIES = ["16x4", "weight"]


def masked_mlp(granularity: str, tasks: tuple[str, ...] = TASKS, seed: int = 0, density: float = 0.4) -> MaskedMLP:
    torch.manual_seed(seed)
    mlp = MaskedMLP(70, hidden=(48, 34, 17), out_features=2, tasks=tasks)
    generator = torch.Generator().manual_seed(seed)
    mlp.set_mask(random_masks(mlp.mask(tasks[0]).shapes, density, tasks, generator, granularity))
    return mlp


def dense_layers(mlp: MaskedMLP, task: str) -> list[Layer]:
    hidden = [
        Layer(layer.weight.detach() * layer.mask(task), layer.bias.detach(), "relu") for layer in mlp.masked_layers()
    ]
    head = mlp.heads[task]
    assert isinstance(head, nn.Linear)
    return [*hidden, Layer(head.weight.detach(), head.bias.detach(), "none")]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scores_are_those_of_the_masked_mlp(granularity: str) -> None:
    masked = masked_mlp(granularity)
    mlp, x = CompressedMLP.from_masked(masked), torch.randn(2, 35, 70)
    of_tasks = [mlp_reference(x.view(70, 70), dense_layers(masked, task)) for task in TASKS]
    for task, wanted in zip(TASKS, of_tasks, strict=True):
        assert_rounding(mlp(x, task).detach().view(70, 2), wanted)
    every = Bounded(*(torch.cat(parts, 1) for parts in zip(*of_tasks, strict=True)))
    assert_rounding(mlp(x).detach().view(70, 6), every)
    assert mlp(x).shape == (2, 35, 6) and mlp(x[0, 0], "cvr").shape == (2,)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_task_s_gradient_reaches_what_the_task_owns_alone(granularity: str) -> None:
    masked, generator = masked_mlp(granularity), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in masked.parameters():  # whole numbers, whose sums are exact in any order
            parameter.copy_(small_integers(*parameter.shape, generator=generator).clamp(-1, 1))
    mlp, x = CompressedMLP.from_masked(masked), small_integers(90, 70, generator=generator).clamp(-1, 1)
    mlp(x, "cvr").sum().backward()
    masked(x, "cvr").sum().backward()
    for layer, of_masked in zip(mlp.layers, masked.masked_layers(), strict=True):
        assert_exact(layer.bias.grad, of_masked.bias.grad)
        for part, owners, places in zip(layer.parts, layer.owners, layer.places(), strict=True):
            assert (part.grad is not None) == ("cvr" in owners)
            if part.grad is not None:
                assert_exact(part.grad.flatten(), there(of_masked.weight.grad, places))


def there(dense: Tensor, places: Tensor) -> Tensor:
    """Return the elements of a weight at places; 0 beyond its edges."""
    return torch.where(places >= 0, dense.flatten()[places.clamp(min=0)], 0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_parameters_are_what_some_task_keeps(granularity: str) -> None:
    masked = masked_mlp(granularity)
    mlp = CompressedMLP.from_masked(masked)
    for layer, of_masked in zip(mlp.layers, masked.masked_layers(), strict=True):
        kept = of_masked.masks.any(0)
        places = torch.cat(layer.places())
        assert sorted(places[places >= 0].tolist()) == kept.flatten().nonzero().flatten().tolist()
        assert all(torch.equal(layer.mask(task), of_masked.mask(task)) for task in TASKS)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_there_and_back_keeps_every_bit(granularity: str) -> None:
    masked = masked_mlp(granularity)
    back = CompressedMLP.from_masked(masked).to_masked()
    for layer, wanted in zip(back.masked_layers(), masked.masked_layers(), strict=True):
        kept = wanted.masks.any(0)
        assert_exact(layer.weight[kept], wanted.weight[kept])
        assert not layer.weight[~kept].any() and torch.equal(layer.masks, wanted.masks)
        assert_exact(layer.bias, wanted.bias)
    for task in TASKS:
        assert_exact(back.heads[task].weight, masked.heads[task].weight)


def step(mlp: nn.Module, optimizer: MaskedAdam, task: str, x: Tensor) -> None:
    optimizer.zero_grad()
    mlp(x, task).sub(1).square().mean().backward()
    optimizer.step(task)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_optimiser_goes_on_where_that_of_the_other_kind_stopped(granularity: str, decay: float) -> None:
    masked, x = masked_mlp(granularity), torch.randn(40, 70)
    first = MaskedAdam(masked, weight_decay=decay)
    for task in ("ctr", "cvr", "ctr", "like"):
        step(masked, first, task, x)
    mlp = CompressedMLP.from_masked(masked)
    optimizer = MaskedAdam(mlp, weight_decay=decay)
    optimizer.load_state_dict(first.state_dict())
    assert_same_state(optimizer.state_dict(), first.state_dict())
    back = mlp.to_masked()
    last = MaskedAdam(back, weight_decay=decay)
    last.load_state_dict(optimizer.state_dict())
    assert_same_state(last.state_dict(), first.state_dict())
    step(back, last, "cvr", x)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_part_steps_as_torch_s_adam_steps_it(granularity: str, decay: float) -> None:
    mlp, x = CompressedMLP.from_masked(masked_mlp(granularity)), torch.randn(40, 70)
    optimizer = MaskedAdam(mlp, learning_rate=0.1, weight_decay=decay)
    plain = {part: nn.Parameter(part.detach().clone()) for layer in mlp.layers for part in layer.parts}
    theirs = {part: torch.optim.Adam([same], 0.1, weight_decay=decay, fused=True) for part, same in plain.items()}
    for task in ("ctr", "cvr", "ctr", "like"):
        step(mlp, optimizer, task, x)
        for layer in mlp.layers:
            for part, owners in zip(layer.parts, layer.owners, strict=True):
                if task in owners:
                    plain[part].grad = part.grad
                    theirs[part].step()
                assert_exact(part, plain[part])


def assert_same_state(got: dict, wanted: dict) -> None:
    assert got["settings"] == wanted["settings"]
    for kind in ("free", "masked"):
        for mine, theirs in zip(got[kind], wanted[kind], strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_step_moves_what_the_task_owns_alone_even_where_others_have_gradients() -> None:
    mlp = CompressedMLP.from_masked(masked_mlp("16x4"))
    optimizer = MaskedAdam(mlp, learning_rate=0.1)
    for parameter in mlp.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(mlp)
    optimizer.step("like")
    for layer, old in zip(mlp.layers, before.layers, strict=True):
        for part, same, owners in zip(layer.parts, old.parts, layer.owners, strict=True):
            assert torch.equal(part, same) == ("like" not in owners)


def test_weights_of_one_owner_with_different_steps_are_refused() -> None:
    masked = masked_mlp("weight", ("ctr",))
    mask = masked.mask()
    optimizer = MaskedAdam(masked)
    fewer = {name: kept & (torch.rand(kept.shape) < 0.5) for name, kept in mask.items()}
    masked.set_mask(fewer)
    optimizer.remask()
    step(masked, optimizer, "ctr", torch.randn(9, 70))
    masked.set_mask(mask)
    optimizer.remask()
    other = MaskedAdam(CompressedMLP.from_masked(masked))
    with pytest.raises(ValueError, match="got 0 to 1 steps of weights with the same owners, wanted one number"):
        other.load_state_dict(optimizer.state_dict())


def test_a_copy_a_pickle_and_a_state_are_the_same_network() -> None:
    mlp, x = CompressedMLP.from_masked(masked_mlp("16x4")), torch.randn(5, 70)
    state = io.BytesIO()
    torch.save(mlp.state_dict(), state)
    state.seek(0)
    other = CompressedMLP.from_masked(masked_mlp("16x4"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(state, weights_only=True))
    for same in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp)), other):
        assert_exact(same(x), mlp(x))
    with pytest.raises(RuntimeError, match="mask_bits: got other masks, wanted those that the layer was made with"):
        CompressedMLP.from_masked(masked_mlp("16x4", seed=1)).load_state_dict(mlp.state_dict())


def test_what_is_kept_is_copied_into_a_masked_mlp_and_the_rest_stays() -> None:
    masked = masked_mlp("weight")
    before, mlp = copy.deepcopy(masked), CompressedMLP.from_masked(masked)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.add_(1)
    mlp.copy_to(masked)
    for layer, old in zip(masked.masked_layers(), before.masked_layers(), strict=True):
        kept = old.masks.any(0)
        assert_exact(layer.weight[kept], old.weight[kept] + 1)
        assert_exact(layer.weight[~kept], old.weight[~kept])
    with pytest.raises(ValueError, match="masked: got a layer of other masks"):
        mlp.copy_to(masked_mlp("weight", seed=1))
    with pytest.raises(ValueError, match="masked: got 3 layers of ctr, wanted 3 layers of ctr, cvr, like"):
        mlp.copy_to(masked_mlp("weight", ("ctr",)))


@pytest.mark.parametrize("density", [1e-9, 1.0])
def test_a_layer_of_nothing_and_one_of_everything_train(density: float) -> None:
    mlp = CompressedMLP.from_masked(masked_mlp("weight", ("ctr", "cvr"), density=density))
    optimizer = MaskedAdam(mlp)
    step(mlp, optimizer, "ctr", torch.randn(9, 70))
    assert all(torch.isfinite(parameter).all() for parameter in mlp.parameters())


def test_bad_input_raises() -> None:
    mlp = CompressedMLP.from_masked(masked_mlp("16x4"))
    with pytest.raises(ValueError, match=r"x: got shape \(3, 4\), wanted \[\.\.\., 70\]"):
        mlp(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="task: got 'x', wanted one of ctr, cvr, like"):
        mlp(torch.zeros(3, 70), "x")
    with pytest.raises(ValueError, match=r"x: got torch.float64 on cpu, wanted torch.float32 on the CPU"):
        mlp(torch.zeros(3, 70, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"weight: got torch.bfloat16 on cpu, wanted torch.float32 on the CPU"):
        CompressedMLP.from_masked(masked_mlp("16x4").bfloat16())
