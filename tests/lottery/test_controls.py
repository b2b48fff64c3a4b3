"""Controls: random masks like tickets, one mask that all tasks agree on, masks that share as much as is wanted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lt4rec_sparse.lottery import (
    one_for_all,
    prune_by_magnitude,
    random_like,
    random_masks,
    random_separate,
    separate,
    unanimous,
)
from lt4rec_sparse.masks import Mask

SHAPES = {"layers.0": (4, 6), "layers.1": (3, 4)}
TASKS = ("ctr", "cvr", "like")


def test_controls_keep_what_they_promise():
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0": (10, 20), "layers.1": (5, 10)}
    tickets = {
        "ctr": Mask.random(shapes, {"layers.0": 30, "layers.1": 40}, generator),
        "cvr": Mask.random(shapes, {"layers.0": 60, "layers.1": 20}, generator),
    }
    like = random_like(tickets, generator)
    assert {t: m.layer_nnz() for t, m in like.items()} == {t: m.layer_nnz() for t, m in tickets.items()}
    assert all(like[task] != tickets[task] for task in tickets)
    uniform = random_masks(shapes, 0.28, ("ctr", "cvr"), generator)
    assert [mask.layer_nnz() for mask in uniform.values()] == [{"layers.0": 56, "layers.1": 14}] * 2
    assert uniform["ctr"] != uniform["cvr"]
    assert one_for_all(tickets, "ctr") == {"ctr": tickets["ctr"], "cvr": tickets["ctr"]}


@pytest.mark.parametrize("granularity", ["weight", "16x4", "neuron"])
def test_a_task_keeps_the_same_random_weights_at_its_own_density(granularity):
    shapes = {"layers.0": (64, 40), "layers.1": (32, 64)}

    def drawn(density):
        return random_masks(shapes, density, ("ctr", "cvr"), torch.Generator().manual_seed(3), granularity)

    few, many, mixed = drawn(0.25), drawn(0.5), drawn({"ctr": 0.25, "cvr": 0.5})
    assert (mixed["ctr"], mixed["cvr"]) == (few["ctr"], many["cvr"])
    for task in few:
        assert abs(many[task].density - 0.5) < 0.02
        assert all((kept <= many[task][name]).all() for name, kept in few[task].items())


@pytest.mark.parametrize("granularity", ["block16", "neuron"])
def test_controls_of_blocks_are_blocks(granularity):
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0": (64, 80), "layers.1": (32, 64)}
    weights = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    tickets = {"ctr": prune_by_magnitude(weights, Mask.full(shapes), 2200, granularity)}
    (like,) = random_like(tickets, generator, granularity).values()
    (uniform,) = random_masks(shapes, tickets["ctr"].density, ["ctr"], generator, granularity).values()
    assert like.layer_nnz() == tickets["ctr"].layer_nnz()
    assert like != tickets["ctr"]
    for mask in (like, uniform):
        for kept in mask.values():
            rows, columns = (16, 16) if granularity == "block16" else (1, kept.shape[1])
            assert all(b.all() or not b.any() for row in kept.split(rows) for b in row.split(columns, dim=1))
    for name, kept in uniform.items():
        size = 256 if granularity == "block16" else kept.shape[1]
        assert 0 <= round(kept.numel() * tickets["ctr"].density) - uniform.layer_nnz()[name] < size


def test_controls_of_two_of_four_are_two_of_four():
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0": (16, 30), "layers.1": (9, 16)}
    weights = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    tickets = {"ctr": prune_by_magnitude(weights, Mask.full(shapes), 300, "2:4")}
    (like,) = random_like(tickets, generator, "2:4").values()
    (uniform,) = random_masks(shapes, tickets["ctr"].density, ["ctr"], generator, "2:4").values()
    assert like.layer_nnz() == tickets["ctr"].layer_nnz()
    assert uniform.layer_nnz() == {n: round(r * c * tickets["ctr"].density) for n, (r, c) in shapes.items()}
    assert like != tickets["ctr"]
    for mask in (like, uniform):
        for kept in mask.values():
            assert all(int(group.sum(1).max()) <= 2 for group in kept.split(4, dim=1))


def scores_of(seed: int, tasks: int, levels: int) -> dict[str, dict[str, torch.Tensor]]:
    """Scores from few different values, so that ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {
        task: {name: torch.randint(0, levels, shape, generator=generator) / 4 for name, shape in SHAPES.items()}
        for task in TASKS[:tasks]
    }


def best_first(layer: torch.Tensor) -> list[int]:
    values = layer.flatten().tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def naive_union(orders: list[list[int]], nnz: int) -> set[int]:
    union = set()
    for named in zip(*orders, strict=True):
        for weight in named:
            if len(union) < nnz:
                union.add(weight)
    return union


def places_of(kept: torch.Tensor) -> set[int]:
    return set(kept.flatten().nonzero().flatten().tolist())


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), tasks=st.integers(1, 3), levels=st.integers(1, 40), share=st.floats(0, 1))
def test_what_all_would_prune_is_pruned_and_nothing_else(seed, tasks, levels, share):
    scores = scores_of(seed, tasks, levels)
    nnz = {name: round(share * rows * columns) for name, (rows, columns) in SHAPES.items()}
    masks = unanimous(scores, nnz)
    assert set(masks) == set(scores)
    (mask,) = {id(mask): mask for mask in masks.values()}.values()
    assert mask.layer_nnz() == nnz
    for name, kept in mask.items():
        orders = [best_first(of_task[name]) for of_task in scores.values()]
        assert places_of(kept) == naive_union(orders, nnz[name])
        # Every task's quantile: what it keeps is its best, and the tasks keep the same number but for one.
        best = [next((i for i, weight in enumerate(o) if weight not in places_of(kept)), len(o)) for o in orders]
        assert {weight for order, n in zip(orders, best, strict=True) for weight in order[:n]} == places_of(kept)


def naive_separate(orders: list[list[int]], nnz: int, common: int) -> list[set[int]]:
    """The tasks name their best in turn; a free weight goes to the first task that names it and lacks weights."""
    ranks = [{weight: rank for rank, weight in enumerate(order)} for order in orders]
    wanted_by_all = set.intersection(*(set(order[:nnz]) for order in orders))
    worth = [(i not in wanted_by_all, sum(rank[i] for rank in ranks), i) for i in range(len(orders[0]))]
    owned = {i for *_, i in sorted(worth)[:common]}
    kept, taken = [set(owned) for _ in orders], set(owned)
    for named in zip(*orders, strict=True):
        for task, weight in enumerate(named):
            if len(kept[task]) < nnz and weight not in taken:
                kept[task].add(weight)
                taken.add(weight)
    return kept


@settings(max_examples=30)
@given(data=st.data(), seed=st.integers(0, 2**31), tasks=st.integers(1, 3), levels=st.integers(1, 40))
def test_masks_share_exactly_what_is_wanted(data, seed, tasks, levels):
    scores = scores_of(seed, tasks, levels)
    shared = data.draw(st.floats(0, 1))
    nnz = {}
    for name, (rows, columns) in SHAPES.items():
        n = data.draw(st.integers(0, rows * columns))
        fits = round(shared * n) + tasks * (n - round(shared * n)) <= rows * columns
        nnz[name] = n if fits else rows * columns // tasks
    masks = separate(scores, nnz, shared)
    assert all(mask.layer_nnz() == nnz for mask in masks.values())
    for name in SHAPES:
        owners = torch.stack([mask[name] for mask in masks.values()]).sum(0)
        if tasks > 1:
            assert int((owners == tasks).sum()) == int((owners > 1).sum()) == round(shared * nnz[name])
        orders = [best_first(of_task[name]) for of_task in scores.values()]
        wanted = naive_separate(orders, nnz[name], round(shared * nnz[name]))
        got = [places_of(mask[name]) for mask in masks.values()]
        assert got == wanted


def test_the_ends_of_sharing():
    generator = torch.Generator().manual_seed(0)
    nnz = {"layers.0": 12, "layers.1": 6}
    apart = random_separate(SHAPES, nnz, 0.0, generator, TASKS[:2])
    for name in SHAPES:
        assert torch.equal(apart["ctr"][name], ~apart["cvr"][name])
    alike = random_separate(SHAPES, nnz, 1.0, generator, TASKS)
    assert alike["ctr"] == alike["cvr"] == alike["like"]
    assert alike["ctr"].layer_nnz() == nnz
    again = random_separate(SHAPES, nnz, 0.5, torch.Generator().manual_seed(1), TASKS[:2])
    assert again == random_separate(SHAPES, nnz, 0.5, torch.Generator().manual_seed(1), TASKS[:2])


def test_what_a_task_would_keep_anyway_it_keeps():
    """Where the tasks' best already share what is wanted, nothing is moved."""
    scores = scores_of(3, 2, 1000)
    nnz = {"layers.0": 8, "layers.1": 4}
    alone = {task: prune_by_magnitude(layers, Mask.full(SHAPES), nnz) for task, layers in scores.items()}
    for name, n in nnz.items():
        natural = int((alone["ctr"][name] & alone["cvr"][name]).sum())
        masks = separate({task: {name: layers[name]} for task, layers in scores.items()}, {name: n}, natural / n)
        assert all(torch.equal(masks[task][name], alone[task][name]) for task in scores)


def test_bad_input_is_named():
    scores, nnz = scores_of(0, 2, 9), {"layers.0": 13, "layers.1": 4}
    with pytest.raises(
        ValueError, match=r"with which 2 tasks of 13 weights each own 26 in layers.0, wanted at most its 24"
    ):
        separate(scores, nnz, 0.0)
    with pytest.raises(ValueError, match=r"shared: got 1.5, wanted 0 to 1"):
        separate(scores, nnz, 1.5)
    with pytest.raises(ValueError, match=r"nnz: got layers \['layers.0'\], wanted \['layers.0', 'layers.1'\]"):
        separate(scores, {"layers.0": 1}, 0.5)
    with pytest.raises(ValueError, match=r"nnz of layers.1: got 13, wanted 0 to 12"):
        unanimous(scores, nnz | {"layers.1": 13})
    with pytest.raises(ValueError, match="scores: got no task"):
        unanimous({}, {})
    with pytest.raises(ValueError, match="scores of cvr: got layers"):
        unanimous(scores | {"cvr": {"layers.0": torch.ones(4, 6)}}, nnz)
    scores["cvr"]["layers.0"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="scores of cvr: got 1 NaN"):
        separate(scores, nnz, 0.5)
