import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.lottery import level_nnz, prune_by_magnitude
from lt4rec_sparse.masks import Mask

SHAPES = {"layers.0": (6, 8), "layers.1": (4, 6)}


def weights_of(seed: int, levels: int) -> dict[str, torch.Tensor]:
    """Weights from few different magnitudes, so that ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randint(-levels, levels + 1, s, generator=generator) / 4 for n, s in SHAPES.items()}


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
        assert pruned.is_subset(mask)
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


def test_the_papers_levels():
    assert [round(level_nnz(1_000_000, 0.2, 4, level) / 1e4, 2) for level in range(5)] == [100, 66.87, 44.72, 29.91, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0.0, 4, 1), "density: got 0.0"),
        ((10, 0.5, 0, 0), "level: got 0 of 0"),
        ((10, 0.5, 4, 5), "level: got 5 of 4"),
    ],
)
def test_bad_levels(arguments, message):
    with pytest.raises(ValueError, match=message):
        level_nnz(*arguments)


def test_bad_input_is_named():
    weights = weights_of(0, 4)
    with pytest.raises(ValueError, match="nnz: got 73, wanted 0 to 72"):
        prune_by_magnitude(weights, Mask.full(SHAPES), 73)
    with pytest.raises(ValueError, match="weights: got layers"):
        prune_by_magnitude({"layers.0": weights["layers.0"]}, Mask.full(SHAPES), 1)
    weights["layers.0"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="got 1 NaN"):
        prune_by_magnitude(weights, Mask.full(SHAPES), 1)
