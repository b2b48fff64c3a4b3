import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_exact, assert_rounding, linear_reference, small_integers

from lt4rec_sparse import Mask, MaskedLinear, MaskedMLP
from lt4rec_sparse.masks import pack_words
from lt4rec_sparse.nn import masked


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


def integer_mlp(tasks=("ctr", "cvr"), density=0.5, seed=0) -> MaskedMLP:
    """An MLP of small integers, with a random mask a task."""
    generator = torch.Generator().manual_seed(seed)
    mlp = MaskedMLP(7, hidden=(6, 5), tasks=tasks)
    for parameter in mlp.parameters():
        parameter.data = small_integers(*parameter.shape, generator=generator)
    for i, task in enumerate(tasks):
        mlp.set_mask(random_mask(mlp, density, seed + i), task)
    return mlp


def dense(mlp: MaskedMLP, task: str, x: torch.Tensor) -> torch.Tensor:
    """What the task's subnetwork is, by its definition."""
    for layer in mlp.masked_layers():
        x = torch.relu(x @ (layer.weight * layer.mask(task)).T + layer.bias)
    return x @ mlp.heads[task].weight.T + mlp.heads[task].bias


def gradients(mlp: MaskedMLP, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of small integers times `y`, zeros where there is none."""
    dy = small_integers(*y.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((y * dy).sum(), [x, *mlp.parameters()], materialize_grads=True)


@given(
    seed=st.integers(0, 2**31),
    density=st.floats(0, 1),
    batch=st.integers(0, 9),
    tasks=st.sampled_from([("all",), ("ctr", "cvr"), ("a", "b", "c")]),
)
def test_a_task_runs_its_own_subnetwork(seed, density, batch, tasks):
    mlp = integer_mlp(tasks, density, seed)
    x = small_integers(batch, 7, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    wanted = torch.cat([dense(mlp, task, x) for task in tasks], dim=1)
    for i, task in enumerate(tasks):
        assert_exact(mlp(x, task), wanted[:, i : i + 1])
        assert mlp.mask(task) == random_mask(mlp, density, seed + i)
    assert_exact(mlp(x), wanted)
    for ours, theirs in zip(gradients(mlp, x, mlp(x)), gradients(mlp, x, wanted), strict=True):
        assert_exact(ours, theirs)


@given(
    cuts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_each_task_may_read_its_own_rows(cuts, seed):
    rows = {f"task{i}": (min(cut), max(cut)) for i, cut in enumerate(cuts)}
    mlp = integer_mlp(tuple(rows), seed=seed)
    x = small_integers(9, 7, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    scores = mlp(x, rows=dict(reversed(rows.items())))
    wanted = {task: dense(mlp, task, x[start:stop]) for task, (start, stop) in rows.items()}
    assert list(scores) == list(rows)
    for task in rows:
        assert_exact(scores[task], wanted[task])
    every, theirs = (gradients(mlp, x, torch.cat(list(parts.values()))) for parts in (scores, wanted))
    for mine, other in zip(every, theirs, strict=True):
        assert_exact(mine, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "ctr", "rows": {"ctr": (0, 2), "cvr": (0, 2)}}, r"task and rows: got both, 'ctr' and \{'ctr': "),
        ({"rows": {"ctr": (0, 2)}}, "rows: got tasks ctr, wanted ctr, cvr"),
        ({"rows": {"ctr": (0, 2), "like": (0, 2)}}, "rows: got tasks ctr, like, wanted ctr, cvr"),
        ({"rows": {"ctr": (0, 2), "cvr": (2, 5)}}, "rows of cvr: got 2 to 5, wanted some of the 4 rows of x"),
        ({"rows": {"ctr": (-1, 2), "cvr": (0, 4)}}, "rows of ctr: got -1 to 2"),
        ({"rows": {"ctr": (0, 4), "cvr": (3, 2)}}, "rows of cvr: got 3 to 2"),
        ({"task": "like"}, "task: got 'like', wanted one of ctr, cvr"),
    ],
)
def test_bad_rows(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedMLP(7, hidden=(6,), tasks=("ctr", "cvr"))(torch.ones(4, 7), **arguments)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7)])
def test_without_tasks_it_takes_what_an_mlp_takes(shape):
    mlp = integer_mlp(("task",))
    x = small_integers(*shape, generator=torch.Generator().manual_seed(1))
    assert_exact(mlp(x), dense(mlp, "task", x))


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


# Packed masks: `mask_words` is `pack_words(masks)` whatever happened to the masks


def random_layer() -> MaskedLinear:
    generator = torch.Generator().manual_seed(0)
    layer = MaskedLinear(130, 3, tasks=("a", "b"))
    for task in layer.tasks:
        layer.set_mask(torch.rand(3, 130, generator=generator) < 0.5, task)
    return layer


def reloaded(assign=False, device="cpu"):
    def load(layer):
        other = MaskedLinear(130, 3, tasks=("a", "b"), device=device)
        other.load_state_dict(layer.state_dict(), assign=assign)
        return other

    return load


def emptied_and_reloaded(layer):
    other = MaskedLinear(130, 3, tasks=("a", "b"), device="meta").to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    return other


REMADE = {
    "new": lambda layer: MaskedLinear(130, 3, tasks=("a", "b")),
    "set": lambda layer: layer,
    "loaded": reloaded(),
    "assigned": reloaded(assign=True),
    "assigned to meta": reloaded(assign=True, device="meta"),
    "emptied": emptied_and_reloaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "double": lambda layer: layer.double(),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
}


@pytest.mark.parametrize("remade", REMADE.values(), ids=REMADE)
def test_packed_masks_are_those_of_the_masks(remade):
    layer = remade(random_layer())
    assert layer.mask_words.device == layer.masks.device == layer.weight.device
    assert torch.equal(layer.mask_words, pack_words(layer.masks))


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))


def planes_elsewhere(layer: MaskedLinear, monkeypatch) -> torch.Tensor:
    """What the layer's kernels would read, were it not on the CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(masked, "pack_words", lambda masks: pack_words(masks.as_subclass(torch.Tensor)))
        patch.setitem(layer._buffers, "masks", layer.masks.as_subclass(Elsewhere))
        return layer._planes()


@pytest.mark.parametrize(
    "move",
    [lambda layer: layer, copy.deepcopy, lambda layer: layer._apply(torch.clone)],
    ids=["here", "deepcopy", "moved"],
)
@pytest.mark.parametrize("is_set_before", [False, True])
def test_masks_written_in_place_are_packed_again(move, is_set_before, monkeypatch):
    layer = MaskedLinear(130, 3, tasks=("a", "b"))
    if is_set_before:
        layer.set_mask(random_layer().mask("a"), "a")
    words = layer.mask_words
    assert planes_elsewhere(layer, monkeypatch) is words
    layer.masks[0, 1, 129] = ~layer.masks[0, 1, 129]
    assert not torch.equal(layer.mask_words, pack_words(layer.masks))
    assert layer._planes() is layer.masks  # the CPU reads them as they are
    layer = move(layer)
    assert torch.equal(planes_elsewhere(layer, monkeypatch), pack_words(layer.masks))
    if layer.mask_words is words:  # in place, where captured graphs read it
        version = words._version
        planes_elsewhere(layer, monkeypatch)
        assert words._version == version  # and once


def test_masks_that_are_replaced_are_packed_again(monkeypatch):
    layer = MaskedLinear(130, 3)
    layer.masks = torch.zeros(1, 3, 130, dtype=torch.bool)
    assert not planes_elsewhere(layer, monkeypatch).any()


def test_a_layer_can_be_made_in_inference_mode():
    with torch.inference_mode():
        layer = MaskedLinear(4, 2)
        layer.set_mask(torch.zeros(2, 4, dtype=torch.bool))
        assert_exact(layer(torch.ones(3, 4)), layer.bias.expand(3, 2))


def test_packed_masks_are_no_part_of_a_checkpoint():
    layer = random_layer()
    assert set(layer.state_dict()) == {"weight", "bias", "masks"}
    mlp = integer_mlp()
    assert not [name for name in mlp.state_dict() if "words" in name]
    assert MaskedMLP(7, hidden=(6, 5), tasks=mlp.tasks).load_state_dict(mlp.state_dict()) == ([], [])


# Compiled and exported


def test_compiled_it_takes_any_rows():
    mlp = integer_mlp()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, a, b in ((8, 5, 3), (9, 6, 2), (11, 4, 4)):
        x = small_integers(batch, 7, generator=torch.Generator().manual_seed(batch)).requires_grad_()
        rows = {"ctr": (0, a), "cvr": (b, batch)}
        for arguments in ({}, {"rows": rows}):
            with torch.compiler.set_stance("default" if batch == 8 else "fail_on_recompile"):
                ours, wanted = compiled(x, **arguments), mlp(x, **arguments)
            if "rows" in arguments:
                ours, wanted = (torch.cat(list(scores.values())) for scores in (ours, wanted))
            assert_exact(ours, wanted)
            for mine, theirs in zip(gradients(mlp, x, ours), gradients(mlp, x, wanted), strict=True):
                assert_exact(mine, theirs)


@pytest.mark.parametrize("is_strict", [False, True])
def test_exported_it_runs_on_any_batch(is_strict):
    mlp = integer_mlp()
    x = small_integers(9, 7, generator=torch.Generator().manual_seed(1))
    batch = torch.export.Dim("batch")
    program = torch.export.export(mlp, (x[:4],), dynamic_shapes=({0: batch},), strict=is_strict)
    assert sum("masked_linear" in str(node.target) for node in program.graph.nodes) == 2  # a layer, all its tasks
    assert_exact(program.module()(x), mlp(x))


def test_state_dict_round_trips_through_compile():
    mlp, other = integer_mlp(), integer_mlp(density=1.0, seed=3)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = small_integers(5, 7, generator=torch.Generator().manual_seed(1))
    compiled(x)
    other.load_state_dict(mlp.state_dict())
    assert_exact(compiled(x), mlp(x))
