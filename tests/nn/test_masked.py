import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_exact, assert_rounding, linear_reference, small_integers

from lt4rec_sparse import Mask, MaskedLinear, MaskedMLP


def random_mask(mlp: MaskedMLP, density: float, seed: int) -> Mask:
    shapes = {name: tuple(w.shape) for name, w in mlp.masked_weights().items()}
    nnz = {name: round(n * k * density) for name, (n, k) in shapes.items()}
    return Mask.random(shapes, nnz, torch.Generator().manual_seed(seed))


def test_with_a_full_mask_it_is_nn_linear():
    torch.manual_seed(0)
    ours = MaskedLinear(10, 4)
    theirs = torch.nn.Linear(10, 4)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "masks"})
    x = torch.randn(3, 10)
    assert_rounding(ours(x), linear_reference(x, theirs.weight, theirs.bias, torch.float32))


def test_each_task_sees_its_own_mask():
    layer = MaskedLinear(3, 2, bias=False, tasks=("ctr", "cvr"))
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    layer.set_mask(torch.tensor([[True, False, False], [False, False, True]]), "ctr")
    x = torch.ones(1, 3)
    assert_exact(layer(x, "ctr"), torch.tensor([[1.0, 6.0]]))
    assert_exact(layer(x, "cvr"), torch.tensor([[6.0, 15.0]]))


def test_only_kept_weights_receive_gradient():
    layer = MaskedLinear(5, 4, tasks=("a", "b"))
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    layer.set_mask(mask, "a")
    layer(torch.randn(8, 5), "a").square().sum().backward()
    assert not layer.weight.grad[~mask].any()
    assert layer.weight.grad[mask].any()


@pytest.mark.parametrize("task", ["like", None])
def test_an_unknown_or_missing_task_is_named(task):
    with pytest.raises(ValueError, match=f"task: got {task!r}, wanted one of ctr, cvr"):
        MaskedLinear(3, 2, tasks=("ctr", "cvr"))(torch.ones(1, 3), task)


@pytest.mark.parametrize("tasks", [(), ("a", "a"), "ctr"])
def test_bad_tasks(tasks):
    with pytest.raises(ValueError, match="wanted a sequence of different names"):
        MaskedLinear(3, 2, tasks=tasks)


def test_a_bad_mask_is_refused():
    with pytest.raises(ValueError, match=r"mask: got torch.float32 \(2, 3\), wanted torch.bool \(2, 3\)"):
        MaskedLinear(3, 2).set_mask(torch.ones(2, 3))


@given(seed=st.integers(0, 2**31), density=st.floats(0, 1), batch=st.integers(0, 9))
def test_a_task_runs_its_own_subnetwork(seed, density, batch):
    generator = torch.Generator().manual_seed(seed)
    mlp = MaskedMLP(7, hidden=(6, 5), tasks=("ctr", "cvr"))
    for parameter in mlp.parameters():
        parameter.data = small_integers(*parameter.shape, generator=generator)
    masks = {task: random_mask(mlp, density, seed + i) for i, task in enumerate(mlp.tasks)}
    for task, mask in masks.items():
        mlp.set_mask(mask, task)
    x = small_integers(batch, 7, generator=generator)
    every = mlp(x)
    for i, (task, mask) in enumerate(masks.items()):
        h = x
        for name, layer in mlp.named_children():
            if name == "layers":
                for j, linear in enumerate(layer):
                    h = torch.relu(h @ (linear.weight * mask[f"layers.{j}"]).T + linear.bias)
        wanted = h @ mlp.heads[task].weight.T + mlp.heads[task].bias
        assert_exact(mlp(x, task), wanted)
        assert_exact(every[:, i : i + 1], wanted)
        assert mlp.mask(task) == mask


def test_masks_travel_with_the_state():
    mlp = MaskedMLP(7, hidden=(6, 5), tasks=("ctr", "cvr"))
    mlp.set_mask(random_mask(mlp, 0.4, 0), "cvr")
    other = MaskedMLP(7, hidden=(6, 5), tasks=("ctr", "cvr"))
    other.load_state_dict(mlp.state_dict())
    assert other.mask("cvr") == mlp.mask("cvr")
    assert other.mask("ctr") == Mask.full(mlp.mask("ctr").shapes)


def test_a_mask_of_another_network_is_refused():
    with pytest.raises(ValueError, match="mask: got layers"):
        MaskedMLP(7, hidden=(6, 5)).set_mask(Mask.full({"layers.0": (6, 7)}))


def test_state_dict_round_trips_through_compile():
    layer = MaskedLinear(6, 4)
    layer.set_mask(torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5)
    x = small_integers(5, 6, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_exact(compiled(x), layer(x))
