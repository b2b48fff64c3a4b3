"""Planted structure: perfect masks are judged perfect, random ones no better than chance."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.masks import Mask
from lt4rec_sparse.recsys.harness.recovery import co_owned, column_auc, column_kinds


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
    assert column_auc(kept, relevant) == pytest.approx(naive_auc(kept, relevant), abs=1e-15)
    assert column_auc(kept, relevant) + column_auc(kept, ~relevant) == pytest.approx(1, abs=1e-15)


@given(seed=st.integers(0, 2**31), density=st.floats(0.01, 0.99), share=st.floats(0.05, 0.95))
def test_a_random_mask_is_no_better_than_chance(seed, density, share):
    generator = torch.Generator().manual_seed(seed)
    kept = Mask.random({"w": (30, 400)}, {"w": round(12_000 * density)}, generator)["w"]
    n = round(400 * share)
    relevant = torch.randperm(400, generator=generator) < n
    deviation = math.sqrt(401 / (12 * n * (400 - n)))  # without ties; these make it less
    assert abs(column_auc(kept, relevant) - 0.5) < 5 * deviation


@given(seed=st.integers(0, 2**31))
def test_a_perfect_mask_is_found_perfect(seed):
    generator = torch.Generator().manual_seed(seed)
    relevant = torch.randperm(20, generator=generator) < 7
    of_other = torch.randperm(20, generator=generator) < 9
    kept, others = relevant.repeat(5, 1), of_other.repeat(5, 1)
    assert column_auc(kept, relevant) == 1.0
    assert column_auc(~kept, relevant) == 0.0
    assert co_owned(kept, others, relevant & of_other) == (1.0 if (relevant & of_other).any() else None)
    assert co_owned(kept, others, relevant ^ of_other) == 0.0
    assert co_owned(kept, others, ~(relevant | of_other)) is None
    for mask in (torch.ones(5, 20, dtype=torch.bool), torch.zeros(5, 20, dtype=torch.bool)):
        assert column_auc(mask, relevant) == 0.5


def test_random_masks_share_alike_everywhere():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(200, 900, generator=generator) < 0.2 for _ in range(2))
    p = 0.2 / (2 - 0.2)
    for columns in (torch.arange(900) < 200, torch.arange(900) >= 200):
        weights = 200 * int(columns.sum())
        assert abs(co_owned(a, b, columns) - p) < 5 * math.sqrt(p * (1 - p) / (0.36 * weights))
    assert co_owned(a, a, torch.ones(900, dtype=torch.bool)) == 1.0


def test_columns_of_pairs_matter_where_the_truth_multiplies_them():
    fields = [("user_shared_0", "a", False), ("video_shared_0", "b", False), ("user_click_0", "c", False)]
    fields += [("video_click_0", "d", False), ("user_click_1", "e", False), ("tags", "t", True)]
    truth = {name: name.split("_")[1] for name, _, multi in fields if not multi} | {"tags": "noise"}
    kinds = column_kinds(fields, truth, dim=2)
    assert kinds[:12] == ["shared"] * 4 + ["click"] * 6 + ["noise"] * 2
    pairs = dict(zip([(i, j) for i in range(6) for j in range(i + 1, 6)], kinds[12:], strict=True))
    assert {pair for pair, kind in pairs.items() if kind == "shared"} == {(0, 1)}
    assert {pair for pair, kind in pairs.items() if kind == "click"} == {(2, 3), (3, 4)}
