import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_exact, assert_rounding, linear_reference, small_integers
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations, parametrize, prune

from lt4rec_sparse import Mask, MaskedAdam, MaskedLinear, MaskedMLP, freeze
from lt4rec_sparse.lottery import random_masks
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
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("mask")})
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
    with pytest.raises(TypeError, match=r"mask: got a list, wanted a bool tensor \(2, 3\)"):
        MaskedLinear(3, 2).set_mask([True])
    with pytest.raises(ValueError, match=r"task: got 'layers.0', wanted one of task"):
        MaskedLinear(3, 2).set_mask(Mask.full({"layers.0": (2, 3)}))
    with pytest.raises(TypeError, match=r"mask: got a Tensor, wanted a Mask of layers layers\.0, layers\.1"):
        MaskedMLP(7, hidden=(6, 5)).set_mask(torch.ones(6, 7, dtype=torch.bool))


def test_masks_of_several_tasks_are_set_by_name_or_none_is():
    layer, kept = MaskedLinear(3, 2, tasks=("a", "b")), torch.tensor([[True, False, False], [False, False, True]])
    layer.set_mask({"b": kept, "a": ~kept})
    assert torch.equal(layer.masks, torch.stack([~kept, kept]))
    for bad, error in (({"a": kept, "c": kept}, ValueError), ({"a": kept, "b": kept.float()}, ValueError)):
        with pytest.raises(error, match=r"task: got 'c'|mask: got torch.float32"):
            layer.set_mask(bad)
        assert torch.equal(layer.mask("a"), ~kept)
    with pytest.raises(ValueError, match="task: got 'a' beside masks of b, wanted masks by their names alone"):
        layer.set_mask({"b": kept}, "a")


def test_masks_of_an_mlp_are_set_by_name_or_none_is():
    mlp = MaskedMLP(7, hidden=(6, 5), tasks=("a", "b"))
    masks = random_masks(mlp.mask("a").shapes, 0.4, mlp.tasks, torch.Generator().manual_seed(0))
    mlp.set_mask(masks)
    assert {task: mlp.mask(task) for task in mlp.tasks} == masks
    mlp.set_mask({name: kept.clone() for name, kept in masks["a"].items()}, "b")  # as a mapping of tensors too
    assert mlp.mask("b") == masks["a"]
    for bad, message in (
        ({"a": masks["b"], "c": masks["b"]}, "task: got 'c', wanted one of a, b"),
        ({"a": masks["b"], "b": Mask.full({"layers.0": (6, 7)})}, "mask: got layers"),
    ):
        with pytest.raises(ValueError, match=message):
            mlp.set_mask(bad)
        assert mlp.mask("a") == masks["a"]
    with pytest.raises(ValueError, match="task: got 'a' beside masks of b"):
        mlp.set_mask({"b": masks["b"]}, "a")


def test_tasks_are_named_by_keyword():
    with pytest.raises(TypeError, match=r"bias: got \('a', 'b'\), wanted True or False"):
        MaskedLinear(16, 8, ("a", "b"))
    with pytest.raises(TypeError, match=r"out_features: got \('a', 'b'\), wanted the number of outputs per task"):
        MaskedMLP(16, (8,), ("a", "b"))
    assert MaskedLinear(16, 8, False, "meta").weight.is_meta  # as nn.Linear's arguments


def integer_mlp(tasks=("ctr", "cvr"), density=0.5, seed=0) -> MaskedMLP:
    """An MLP of small integers, with a random mask per task."""
    generator = torch.Generator().manual_seed(seed)
    mlp = MaskedMLP(7, hidden=(6, 5), tasks=tasks)
    for parameter in mlp.parameters():
        parameter.data = small_integers(*parameter.shape, generator=generator)
    for i, task in enumerate(tasks):
        mlp.set_mask(random_mask(mlp, density, seed + i), task)
    return mlp


def dense(mlp: MaskedMLP, task: str, x: torch.Tensor) -> torch.Tensor:
    """The task's subnetwork, by its definition."""
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


def test_each_task_has_its_outputs():
    mlp = MaskedMLP(7, hidden=(6,), out_features=3, tasks=("ctr", "cvr"))
    x = torch.randn(4, 7)
    assert_exact(mlp(x), torch.cat([mlp(x, "ctr"), mlp(x, "cvr")], dim=1))
    assert mlp(x, "cvr").shape == (4, 3)


def test_an_unknown_task_of_a_network_is_named():
    with pytest.raises(ValueError, match="task: got 'like', wanted one of ctr, cvr"):
        integer_mlp()(torch.ones(4, 7), task="like")


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7)])
@pytest.mark.parametrize("tasks", [("task",), ("ctr", "cvr")])
def test_it_takes_what_an_mlp_takes(shape, tasks):
    mlp = integer_mlp(tasks)
    x = small_integers(*shape, generator=torch.Generator().manual_seed(1))
    assert_exact(mlp(x), torch.cat([dense(mlp, task, x) for task in tasks], dim=-1))


def test_masks_travel_with_the_state():
    mlp = MaskedMLP(7, hidden=(6, 5), tasks=("ctr", "cvr"))
    mlp.set_mask(random_mask(mlp, 0.4, 0), "cvr")
    other = MaskedMLP(7, hidden=(6, 5), tasks=("ctr", "cvr"))
    other.load_state_dict(mlp.state_dict())
    assert other.mask("cvr") == mlp.mask("cvr")
    assert other.mask("ctr") == Mask.full(mlp.mask("ctr").shapes)


def test_masks_are_loaded_by_the_names_of_their_tasks():
    mlp = integer_mlp(("ctr", "cvr"))
    other = MaskedMLP(7, hidden=(6, 5), tasks=("cvr", "ctr"))
    other.load_state_dict(mlp.state_dict())
    assert {task: other.mask(task) for task in mlp.tasks} == {task: mlp.mask(task) for task in mlp.tasks}
    x = small_integers(3, 7, generator=torch.Generator().manual_seed(1))
    assert_exact(other(x, "cvr"), mlp(x, "cvr"))
    again = MaskedMLP(7, hidden=(6, 5), tasks=mlp.tasks)
    again.load_state_dict(other.state_dict(), assign=True)
    assert again.mask("ctr") == mlp.mask("ctr")
    assert all(torch.equal(layer.mask_words, pack_words(layer.masks)) for layer in again.masked_layers())


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("tasks", [("ctr", "like"), ("ctr",), ("ctr", "cvr", "like")])
def test_masks_of_other_tasks_are_refused(tasks, is_strict):
    state = {name: t for name, t in integer_mlp().state_dict().items() if name.startswith("layers")}
    mlp = MaskedMLP(7, hidden=(6, 5), tasks=tasks)
    before = {task: mlp.mask(task) for task in tasks}
    with pytest.raises(RuntimeError, match=r"layers\.1\.masks: got 2 of tasks ctr, cvr, wanted those of ctr"):
        mlp.load_state_dict(state, strict=is_strict)
    assert {task: mlp.mask(task) for task in tasks} == before


def nameless(module):
    return {name: t for name, t in module.state_dict().items() if not name.endswith("mask_tasks")}


def test_a_state_without_names_is_loaded_where_it_cannot_be_mistaken():
    single, other = integer_mlp(("ctr",)), integer_mlp(("task",), seed=5)
    other.load_state_dict(nameless(single), strict=False)  # heads are named too
    assert other.mask() == single.mask()
    joint, full = integer_mlp(), MaskedMLP(7, hidden=(6, 5), tasks=("ctr", "cvr"))
    with pytest.raises(RuntimeError, match="got several without the names of their tasks, wanted mask_tasks"):
        full.load_state_dict(nameless(joint))
    for task in joint.tasks:
        joint.set_mask(single.mask(), task)
    full.load_state_dict(nameless(joint))
    assert full.mask("cvr") == single.mask()


def test_a_state_without_masks_says_what_is_missing():
    layer = MaskedLinear(3, 2, tasks=("ctr", "cvr"))
    plain = torch.nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match=r'Missing key.* "masks"'):
        layer.load_state_dict(plain.state_dict())
    assert layer.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["masks"]
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize("names", [b"", b"{", b"[1, 2]", b"3", b"\xff"])
def test_damaged_names_are_refused(names):
    layer = MaskedLinear(3, 2, tasks=("ctr", "cvr"))
    damaged = torch.tensor(list(names), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="masks: "):
        layer.load_state_dict(layer.state_dict() | {"mask_tasks": damaged})


def test_a_state_goes_through_safetensors(tmp_path):
    mlp = integer_mlp()
    save_file(mlp.state_dict(), tmp_path / "state")
    other = MaskedMLP(7, hidden=(6, 5), tasks=("cvr", "ctr"))
    other.load_state_dict(load_file(tmp_path / "state"))
    assert other.mask("cvr") == mlp.mask("cvr")


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
    """What the layer's kernels would read if it were not on the CPU."""
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
    assert set(layer.state_dict()) == {"weight", "bias", "masks", "mask_tasks"}
    assert json.loads(bytes(layer.state_dict()["mask_tasks"].tolist())) == ["a", "b"]
    mlp = integer_mlp()
    assert not [name for name in mlp.state_dict() if "words" in name]
    assert MaskedMLP(7, hidden=(6, 5), tasks=mlp.tasks).load_state_dict(mlp.state_dict()) == ([], [])


# Compiled and exported


def test_compiled_it_takes_any_rows():
    mlp = integer_mlp()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (8, 9, 11):
        x = small_integers(batch, 7, generator=torch.Generator().manual_seed(batch)).requires_grad_()
        for arguments in ((), ("cvr",)):
            with torch.compiler.set_stance("default" if batch == 8 else "fail_on_recompile"):
                ours, wanted = compiled(x, *arguments), mlp(x, *arguments)
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


# torch's own pruning and parametrisations


def test_what_torch_prunes_is_pruned_from_every_mask_and_stays_so():
    layer = random_layer()
    before = {task: layer.mask(task).clone() for task in layer.tasks}
    prune.l1_unstructured(layer, "weight", 0.8)
    kept = layer.weight_mask != 0
    assert 0 < kept.sum() < kept.numel()
    x = torch.randn(5, 130)
    for task in layer.tasks:
        assert torch.equal(layer.mask(task), before[task] & kept)
        wanted = linear_reference(x, layer.weight_orig * layer.mask(task), layer.bias, torch.float32)
        assert_rounding(layer(x, task), wanted)
    assert torch.equal(layer.mask_words, pack_words(layer.masks))
    layer.set_mask(torch.ones(3, 130, dtype=torch.bool), "a")  # no mask brings back what torch prunes
    assert torch.equal(layer.mask("a"), kept)
    prune.random_unstructured(layer, "weight", 0.5)  # on top of the first
    twice = layer.weight_mask != 0
    assert torch.equal(layer.mask("a"), twice) and twice.sum() < kept.sum()
    prune.remove(layer, "weight")
    assert torch.equal(layer.mask("a"), twice)
    assert isinstance(layer.weight, torch.nn.Parameter) and not layer.weight[~twice].any()


def test_freeze_keeps_what_torch_prunes():
    layer = MaskedLinear(130, 3)
    prune.l1_unstructured(layer, "weight", 0.8)
    (frozen,) = freeze(layer).network.densities
    assert frozen == pytest.approx(0.2, abs=0.01)
    mlp = MaskedMLP(40, hidden=(30, 20), tasks=("ctr", "cvr"))
    prune.global_unstructured([(layer, "weight") for layer in mlp.layers], prune.L1Unstructured, amount=0.75)
    for task in mlp.tasks:
        assert mlp.mask(task).density == pytest.approx(0.25, abs=0.01)
    x = torch.randn(6, 40)
    wanted = mlp(x)
    for layer in mlp.layers:
        prune.remove(layer, "weight")
    for task in mlp.tasks:
        assert mlp.mask(task).density == pytest.approx(0.25, abs=0.01)
    assert_exact(mlp(x), wanted)


def test_the_state_of_a_pruned_layer_is_loaded_whole():
    layer, other = random_layer(), random_layer()
    for module in (layer, other):
        prune.random_unstructured(module, "weight", 0.5)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(other.masks, layer.masks)
    state["masks"].fill_(True)  # as of a layer that knows nothing of its pruning
    other.load_state_dict(state)
    assert torch.equal(other.mask("a"), layer.weight_mask != 0)


def test_a_pruned_layer_reads_the_weight_that_was_stepped():
    layer = MaskedLinear(8, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.l1_unstructured(layer, "bias", 0.5)
    with torch.no_grad():
        layer.weight_orig += 1
        layer.bias_orig += 1
    weight, bias = layer.weight_and_bias()
    assert torch.equal(weight, layer.weight_orig * layer.weight_mask)
    assert torch.equal(bias, layer.bias_orig * layer.bias_mask)
    layer(torch.ones(1, 8))  # torch computes the attributes now
    assert torch.equal(weight, layer.weight)
    plain = MaskedLinear(8, 4, bias=False)
    assert plain.weight_and_bias() == (plain.weight, None)


class Absolute(torch.nn.Module):
    def forward(self, weight):
        return weight.abs()


@pytest.mark.parametrize(
    "parametrised",
    [parametrizations.weight_norm, lambda layer: parametrize.register_parametrization(layer, "weight", Absolute())],
    ids=["weight_norm", "own"],
)
def test_a_parametrised_weight_is_masked_and_frozen(parametrised):
    layer = MaskedLinear(130, 3)
    layer.set_mask(random_layer().mask("a"))
    parametrised(layer)
    x = torch.randn(5, 130)
    wanted = linear_reference(x, layer.weight * layer.mask(), layer.bias, torch.float32)
    assert_rounding(layer(x), wanted)
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert_rounding(freeze(layer)(x), wanted)


@pytest.mark.parametrize("compute", [parametrizations.weight_norm, lambda m: prune.identity(m, "weight")])
def test_masked_adam_refuses_a_weight_that_is_computed(compute):
    mlp = MaskedMLP(7, hidden=(6, 5))
    optimizer = MaskedAdam(mlp)
    compute(mlp.layers[1])
    for call in (lambda: MaskedAdam(mlp), optimizer.remask, optimizer.step):
        with pytest.raises(ValueError, match=r"masked layer 1: got a computed weight, wanted a param"):
            call()
