import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lt4rec_sparse.formats import BlockWeight
from lt4rec_sparse.lottery import GRANULARITIES, project_to_2_4, project_to_blocks, prune_by_magnitude, wanted_nnz
from lt4rec_sparse.masks import Mask

SHAPES = {"layers.0": (6, 8), "layers.1": (4, 6)}
# No side is a multiple of 16, and two layers are smaller than a block of 32: ragged blocks are everywhere.
COARSE_SHAPES = {"layers.0": (70, 37), "layers.1": (21, 70), "layers.2": (5, 21)}
TILED = GRANULARITIES[2:]  # blocks and neurons


def is_subset(part, whole):
    return all((whole[name] | ~kept).all() for name, kept in part.items())


def weights_of(seed: int, levels: int, shapes=SHAPES) -> dict[str, torch.Tensor]:
    """Weights from few different magnitudes, so that ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randint(-levels, levels + 1, s, generator=generator) / 4 for n, s in shapes.items()}


def naive(weights, mask, nnz):
    entries = [
        (-abs(weights[name][r, c].item()), i, r, c, name)
        for i, name in enumerate(mask)
        for r in range(mask[name].shape[0])
        for c in range(mask[name].shape[1])
        if mask[name][r, c]
    ]
    kept = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    for _, _, r, c, name in sorted(entries)[:nnz]:
        kept[name][r, c] = True
    return Mask(kept)


@given(
    seed=st.integers(0, 2**31), levels=st.integers(1, 30), fractions=st.lists(st.floats(0, 1), min_size=1, max_size=4)
)
def test_rounds_are_exact_and_pruned_once_is_pruned_for_ever(seed, levels, fractions):
    mask = Mask.full(SHAPES)
    for i, fraction in enumerate(fractions):
        weights, nnz = weights_of(seed + i, levels), int(mask.nnz * fraction)
        pruned = prune_by_magnitude(weights, mask, nnz)
        assert pruned.nnz == nnz
        assert is_subset(pruned, mask)
        assert pruned == naive(weights, mask, nnz)
        mask = pruned


def test_the_quantile_is_global():
    weights = {"layers.0": torch.full((6, 8), 0.1), "layers.1": torch.full((4, 6), -5.0)}
    pruned = prune_by_magnitude(weights, Mask.full(SHAPES), 24)
    assert pruned.layer_nnz() == {"layers.0": 0, "layers.1": 24}


def test_a_dead_weight_never_revives_however_large():
    dead = torch.ones(6, 8, dtype=torch.bool)
    dead[2, 3] = False
    mask = Mask({"layers.0": dead, "layers.1": torch.ones(4, 6, dtype=torch.bool)})
    weights = {"layers.0": torch.zeros(6, 8), "layers.1": torch.zeros(4, 6)}
    weights["layers.0"][2, 3] = float("inf")
    assert not prune_by_magnitude(weights, mask, 20)["layers.0"][2, 3]


def tiles_of(granularity, shape):
    """Return the rows and columns of each tile, in order."""
    sides = {"weight": (1, 1), "neuron": (1, shape[1]), "16x4": (16, 4)}
    rows, columns = sides.get(granularity) or [int(granularity.removeprefix("block"))] * 2
    return [
        (slice(r, r + rows), slice(c, c + columns))
        for r in range(0, shape[0], rows)
        for c in range(0, shape[1], columns)
    ]


def naive_tiles(weights, mask, nnz, granularity):
    entries = []
    for i, name in enumerate(mask):
        layer = weights[name].abs().double()[mask[name]]
        of_layer = (layer.sum().item() / max(len(layer), 1)) or 1.0
        for j, tile in enumerate(tiles_of(granularity, mask.shapes[name])):
            alive = weights[name][tile].abs().double()[mask[name][tile]]
            if len(alive):
                score = alive.sum().item() / weights[name][tile].numel() / of_layer
                entries.append((-score, i, j, name, tile, len(alive)))
    entries.sort(key=lambda entry: entry[:3])
    first = [next(e for e in entries if e[3] == name) for name in mask if mask[name].any()]
    kept, count = {name: torch.zeros_like(layer) for name, layer in mask.items()}, 0
    for k, (*_, name, tile, size) in enumerate([*first, *(e for e in entries if e not in first)]):
        count += size
        if count > nnz and k >= len(first):
            break
        kept[name][tile] = mask[name][tile]
    return Mask(kept)


@settings(max_examples=25)
@given(
    granularity=st.sampled_from(TILED),
    seed=st.integers(0, 2**31),
    levels=st.integers(0, 3),
    fractions=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    is_full=st.booleans(),
)
def test_tiles_survive_whole_and_pruned_once_is_pruned_for_ever(granularity, seed, levels, fractions, is_full):
    counts = {name: rows * columns // (1 if is_full else 3) for name, (rows, columns) in COARSE_SHAPES.items()}
    mask = Mask.random(COARSE_SHAPES, counts, torch.Generator().manual_seed(seed))
    for i, fraction in enumerate(fractions):
        weights, nnz = weights_of(seed + i, levels, COARSE_SHAPES), int(mask.nnz * fraction)
        pruned = prune_by_magnitude(weights, mask, nnz, granularity)
        assert pruned == naive_tiles(weights, mask, nnz, granularity)
        assert is_subset(pruned, mask)
        survivors = 0
        for name, shape in COARSE_SHAPES.items():
            for tile in tiles_of(granularity, shape):
                assert not pruned[name][tile].any() or torch.equal(pruned[name][tile], mask[name][tile])
                survivors += bool(pruned[name][tile].any())
        assert all(pruned[name].any() for name in COARSE_SHAPES)
        assert pruned.nnz <= nnz or survivors == len(COARSE_SHAPES)
        mask = pruned


def test_single_weights_are_the_finest_tiles():
    weights = weights_of(3, 2)
    pruned = [prune_by_magnitude(weights, Mask.full(SHAPES), 30, *g) for g in ((), ("weight",))]
    assert pruned[0] == pruned[1] == naive(weights, Mask.full(SHAPES), 30)


@pytest.mark.parametrize("granularity", TILED)
@pytest.mark.parametrize("value", [0.1, 0.0, float("inf")])
def test_of_equal_tiles_the_earlier_survives_and_a_ragged_one_is_no_worse(granularity, value):
    weights = {name: torch.full(shape, value) for name, shape in COARSE_SHAPES.items()}
    nnz = Mask.full(COARSE_SHAPES).nnz // 2
    pruned = prune_by_magnitude(weights, Mask.full(COARSE_SHAPES), nnz, granularity)
    order = [(name, tile) for name, shape in COARSE_SHAPES.items() for tile in tiles_of(granularity, shape)]
    best = {name: tiles_of(granularity, shape)[0] for name, shape in COARSE_SHAPES.items()}
    survives = [bool(pruned[name][tile].any()) for name, tile in order if tile != best[name]]
    assert survives == sorted(survives, reverse=True)
    assert all(pruned[name][tile].all() for name, tile in best.items())


def test_a_block_is_judged_by_all_of_its_weights():
    weight = torch.ones(16, 64)
    weight[0, 0] = 200.0  # the largest weight, in a block whose others are small
    weight[:, 1:16] = 0.0
    weight[:, 16:32] = 1.5
    pruned = prune_by_magnitude({"w": weight}, Mask.full({"w": (16, 64)}), 512, "block16")["w"]
    assert pruned.any(0).tolist() == [False] * 16 + [True] * 32 + [False] * 16


def test_what_was_pruned_makes_no_block_larger():
    weight, alive = torch.ones(32, 16), torch.ones(32, 16, dtype=torch.bool)
    weight[0, 0], alive[0, 0] = float("nan"), False  # a dead weight, whatever its value
    pruned = prune_by_magnitude({"w": weight}, Mask({"w": alive}), 256, "block16")["w"]
    assert pruned.any(1).tolist() == [False] * 16 + [True] * 16


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_how_large_a_layer_is_matters_to_single_weights_alone(granularity):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in COARSE_SHAPES.items()}
    scaled = {name: weight * 2.0**i for i, (name, weight) in enumerate(weights.items())}
    full = Mask.full(COARSE_SHAPES)
    pruned, of_scaled = (prune_by_magnitude(w, full, full.nnz // 3, granularity) for w in (weights, scaled))
    assert (pruned == of_scaled) == (granularity in TILED)


def test_every_layer_keeps_its_best_neuron():
    weights = {"layers.0": torch.full((6, 8), 0.1), "layers.1": torch.full((4, 6), -5.0)}
    weights["layers.0"][4] = 0.2
    pruned = prune_by_magnitude(weights, Mask.full(SHAPES), 20, "neuron")
    assert pruned["layers.0"].all(1).tolist() == [False] * 4 + [True, False]
    assert pruned["layers.1"].all(1).tolist() == [True, True, False, False]
    assert prune_by_magnitude(weights, Mask.full(SHAPES), 0, "neuron").layer_nnz() == {"layers.0": 8, "layers.1": 6}
    dead = Mask({"layers.0": torch.zeros(6, 8, dtype=torch.bool), "layers.1": torch.ones(4, 6, dtype=torch.bool)})
    assert prune_by_magnitude(weights, dead, 12, "neuron").layer_nnz() == {"layers.0": 0, "layers.1": 12}
    # The best is one alive, even if all of them are zeros.
    dead = Mask({"layers.0": torch.arange(6)[:, None].expand(6, 8) > 2, "layers.1": torch.ones(4, 6, dtype=torch.bool)})
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    pruned = prune_by_magnitude(zeros, dead, 0, "neuron")
    assert pruned["layers.0"].all(1).tolist() == [False] * 3 + [True] + [False] * 2


@given(
    columns=st.integers(1, 13),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([0, 1, 2, 9]),
)
def test_two_of_four_keeps_the_largest_of_each_group(columns, density, seed, levels):
    generator = torch.Generator().manual_seed(seed)
    mask = Mask({"w": torch.rand(5, columns, generator=generator) < density})
    weight = torch.randint(-levels, levels + 1, (5, columns), generator=generator).float()
    weight[~mask["w"]] = float("nan")  # dead, whatever the value
    kept = project_to_2_4({"w": weight}, mask)
    assert is_subset(kept, mask)
    for row in range(5):
        for start in range(0, columns, 4):
            alive = [c for c in range(start, min(start + 4, columns)) if mask["w"][row, c]]
            wanted = sorted(alive, key=lambda c: (-abs(weight[row, c].item()), c))[:2]
            assert [c for c in range(start, min(start + 4, columns)) if kept["w"][row, c]] == sorted(wanted)
    assert project_to_2_4({"w": weight}, kept) == kept


@pytest.mark.parametrize(("density", "broken", "lost"), [(0.1, 0.004, 0.01), (0.2, 0.027, 0.036)])
def test_two_of_four_costs_a_sparse_random_mask_little(density, broken, lost):
    generator = torch.Generator().manual_seed(0)
    mask = Mask.random({"w": (1024, 1024)}, {"w": round(density * 2**20)}, generator)
    kept = project_to_2_4({"w": torch.randn(1024, 1024, generator=generator)}, mask)
    groups = mask["w"].view(-1, 4).sum(1)
    assert abs((groups > 2).float().mean().item() - broken) < 0.0005
    assert abs(1 - kept.nnz / mask.nnz - lost) < 0.001


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31), levels=st.integers(1, 30), fractions=st.lists(st.floats(0, 1), min_size=1, max_size=3)
)
def test_two_of_four_is_the_quantile_over_what_the_projection_leaves(seed, levels, fractions):
    mask = Mask.full(SHAPES)
    for i, fraction in enumerate(fractions):
        weights, nnz = weights_of(seed + i, levels), int(mask.nnz * fraction)
        pruned = prune_by_magnitude(weights, mask, nnz, "2:4")
        allowed = project_to_2_4(weights, mask)
        assert pruned.nnz == min(nnz, allowed.nnz)
        assert pruned == naive(weights, allowed, pruned.nnz)
        for kept in pruned.values():
            assert all(int(group.sum(1).max()) <= 2 for group in kept.split(4, dim=1))
        mask = pruned
    assert (
        prune_by_magnitude(weights_of(seed, levels), Mask.full(SHAPES), 72, "2:4").nnz == 24 + 16
    )  # 2 of the last 2 of 6


@settings(max_examples=25)
@given(
    granularity=st.sampled_from(GRANULARITIES),
    seed=st.integers(0, 2**31),
    levels=st.integers(1, 9),
    densities=st.lists(st.floats(0.01, 1), min_size=1, max_size=3),
)
def test_by_layers_is_each_layer_alone(granularity, seed, levels, densities):
    mask = Mask.full(SHAPES)
    for i, density in enumerate(sorted(densities, reverse=True)):
        weights, nnz = weights_of(seed + i, levels), wanted_nnz(mask, density, "layer")
        pruned = prune_by_magnitude(weights, mask, nnz, granularity)
        assert is_subset(pruned, mask)
        for name, kept in mask.items():
            alone = prune_by_magnitude({name: weights[name]}, Mask({name: kept}), nnz[name], granularity)
            assert torch.equal(pruned[name], alone[name])
            if granularity == "weight":
                assert int(pruned[name].sum()) == nnz[name] == round(kept.numel() * density)
        mask = pruned


def test_what_is_wanted_is_never_more_than_is_alive():
    mask = Mask.random(SHAPES, {"layers.0": 48, "layers.1": 3}, torch.Generator().manual_seed(0))
    assert wanted_nnz(mask, 0.5) == 36
    assert wanted_nnz(mask, 0.9) == 51
    assert wanted_nnz(mask, 0.5, "layer") == {"layers.0": 24, "layers.1": 3}
    with pytest.raises(ValueError, match="scope: got 'row', wanted one of global, layer"):
        wanted_nnz(mask, 0.5, "row")
    with pytest.raises(ValueError, match=r"density: got 0.0, wanted more than 0 and at most 1"):
        wanted_nnz(mask, 0.0)
    with pytest.raises(ValueError, match=r"density: got 0.0, wanted more than 0"):
        wanted_nnz(mask, 0.0)


def test_bad_input_is_named():
    weights = weights_of(0, 4)
    with pytest.raises(ValueError, match="nnz: got 73, wanted 0 to 72"):
        prune_by_magnitude(weights, Mask.full(SHAPES), 73)
    with pytest.raises(ValueError, match="nnz: got 25, wanted 0 to 24"):
        prune_by_magnitude(weights, Mask.full(SHAPES), {"layers.0": 1, "layers.1": 25})
    with pytest.raises(ValueError, match=r"nnz and weights: got layers \['layers.1'\] and"):
        prune_by_magnitude(weights, Mask.full(SHAPES), {"layers.1": 1})
    with pytest.raises(ValueError, match="weights: got layers"):
        prune_by_magnitude({"layers.0": weights["layers.0"]}, Mask.full(SHAPES), 1)
    with pytest.raises(ValueError, match="weights: got layers"):
        project_to_2_4({"layers.0": weights["layers.0"]}, Mask.full(SHAPES))
    with pytest.raises(
        ValueError, match="granularity: got 'block8', wanted one of weight, 2:4, 16x4, block4, block16, "
    ):
        prune_by_magnitude(weights, Mask.full(SHAPES), 1, "block8")
    weights["layers.0"][0, 0] = float("nan")
    for granularity in GRANULARITIES:
        with pytest.raises(ValueError, match="got 1 NaN"):
            prune_by_magnitude(weights, Mask.full(SHAPES), 1, granularity)
    with pytest.raises(ValueError, match="got 1 NaN"):
        project_to_2_4(weights, Mask.full(SHAPES))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    alive=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    density=st.one_of(st.none(), st.floats(0.01, 1)),
)
def test_a_projection_keeps_whole_blocks_of_most_magnitude(seed, alive, density):
    weights, generator = weights_of(seed, 9, COARSE_SHAPES), torch.Generator().manual_seed(seed)
    mask = Mask({name: torch.rand(shape, generator=generator) < alive for name, shape in COARSE_SHAPES.items()})
    mask_and_cost = project_to_blocks(weights, mask, density)
    factor = 1 if density is None or not mask.nnz else density / mask.density
    kept_magnitude = all_magnitude = 0.0
    for name, kept in mask_and_cost.mask.items():
        blocks = BlockWeight.from_dense(weights[name], {"task": kept})  # refuses a part of a block
        assert torch.equal(blocks.mask("task"), kept)
        magnitude = weights[name].abs() * mask[name]
        means = [block.mean().item() for rows in magnitude.split(16) for block in rows.split(4, dim=1)]
        is_kept = [bool(block.all()) for rows in kept.split(16) for block in rows.split(4, dim=1)]
        worst = min(m for m, k in zip(means, is_kept, strict=True) if k)
        assert all(m <= worst + 1e-6 for m, k in zip(means, is_kept, strict=True) if not k)
        assert sum(is_kept) == 1 or kept.sum() <= round(factor * int(mask[name].sum()))
        kept_magnitude += (magnitude * kept).sum().item()
        all_magnitude += magnitude.sum().item()
    assert mask_and_cost.magnitude == pytest.approx(kept_magnitude / all_magnitude if all_magnitude else 1.0)
    assert mask_and_cost.added == sum(int((kept & ~mask[n]).sum()) for n, kept in mask_and_cost.mask.items())


def test_a_projection_of_blocks_changes_nothing():
    weights = weights_of(0, 9, COARSE_SHAPES)
    blocks = prune_by_magnitude(weights, Mask.full(COARSE_SHAPES), 1000, "16x4")
    full = {name: torch.where(kept, 1.0, 0.0) for name, kept in blocks.items()}
    assert project_to_blocks(full, blocks) == (blocks, 1.0, 0)


def test_a_projection_that_cannot_be_is_refused():
    mask, weights = Mask.full(SHAPES), weights_of(0, 9)
    for density in (0, 1.5):
        with pytest.raises(ValueError, match=f"density: got {density}, wanted more than 0 and at most 1"):
            project_to_blocks(weights, mask, density)
    with pytest.raises(ValueError, match="block: got 'neuron', wanted a granularity of blocks"):
        project_to_blocks(weights, mask, block="neuron")
