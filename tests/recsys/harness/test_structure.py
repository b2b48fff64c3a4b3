"""Planted structure: perfect masks are judged perfect, random ones no better than chance."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.masks import Mask
from lt4rec_sparse.recsys.harness.structure import column_recovery, sharing_recovery


def naive_auc(kept, relevant):
    counts = kept.sum(0).tolist()
    pairs = [
        (a, b)
        for a, r in zip(counts, relevant.tolist(), strict=True)
        if r
        for b, q in zip(counts, relevant.tolist(), strict=True)
        if not q
    ]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


@given(rows=st.integers(1, 9), columns=st.integers(2, 12), seed=st.integers(0, 2**31), density=st.floats(0, 1))
def test_the_auc_is_over_all_pairs(rows, columns, seed, density):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    relevant = torch.randperm(columns, generator=generator) < max(columns // 3, 1)
    found = column_recovery(kept, relevant)
    assert found.auc == pytest.approx(naive_auc(kept, relevant), abs=1e-15)
    assert found.relevant == int(kept[:, relevant].sum()) / kept[:, relevant].numel()
    assert found.irrelevant == int(kept[:, ~relevant].sum()) / kept[:, ~relevant].numel()
    turned = column_recovery(kept, ~relevant)
    assert found.auc + turned.auc == pytest.approx(1, abs=1e-15)


@given(seed=st.integers(0, 2**31), density=st.floats(0.01, 0.99), share=st.floats(0.05, 0.95))
def test_a_random_mask_is_no_better_than_chance(seed, density, share):
    generator = torch.Generator().manual_seed(seed)
    kept = Mask.random({"w": (30, 400)}, {"w": round(12_000 * density)}, generator)["w"]
    n = round(400 * share)
    relevant = torch.randperm(400, generator=generator) < n
    deviation = math.sqrt(401 / (12 * n * (400 - n)))  # without ties; these make it less
    assert abs(column_recovery(kept, relevant).auc - 0.5) < 5 * deviation


@given(seed=st.integers(0, 2**31))
def test_a_perfect_mask_is_found_perfect(seed):
    generator = torch.Generator().manual_seed(seed)
    relevant = torch.randperm(20, generator=generator) < 7
    of_other = torch.randperm(20, generator=generator) < 9
    kept, others = relevant.repeat(5, 1), of_other.repeat(5, 1)
    found = column_recovery(kept, relevant)
    assert (found.relevant, found.irrelevant, found.auc) == (1.0, 0.0, 1.0)
    assert column_recovery(~kept, relevant).auc == 0.0
    sharing = sharing_recovery(kept, others, relevant, of_other)
    assert sharing.shared == (1.0 if (relevant & of_other).any() else None)
    assert sharing.private == 0.0
    assert sharing.neither is None
    for mask in (torch.ones(5, 20, dtype=torch.bool), torch.zeros(5, 20, dtype=torch.bool)):
        assert column_recovery(mask, relevant).auc == 0.5


def test_random_masks_share_alike_everywhere():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(200, 900, generator=generator) < 0.2 for _ in range(2))
    of_a, of_b = torch.arange(900) < 500, torch.arange(900) >= 300
    found = sharing_recovery(a, b, of_a, of_b)
    for share, weights in ((found.shared, 200 * 200), (found.private, 200 * 700)):
        p = 0.2 / (2 - 0.2)
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / (0.36 * weights))
    assert found.neither is None
    assert sharing_recovery(a, a, of_a, of_b).private == 1.0


def test_bad_input_is_named():
    kept, relevant = torch.ones(3, 4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="relevant: got 4 of 4 columns, wanted some and not all"):
        column_recovery(kept, relevant)
    with pytest.raises(ValueError, match=r"relevant: got torch.bool \(3,\), wanted torch.bool \(4,\)"):
        column_recovery(kept, relevant[:3])
    with pytest.raises(ValueError, match=r"mask: got torch.float32 \(3, 4\)"):
        column_recovery(kept.float(), relevant)
    with pytest.raises(ValueError, match=r"masks: got \(3, 4\) and \(2, 4\)"):
        sharing_recovery(kept, kept[:2], relevant, relevant)
