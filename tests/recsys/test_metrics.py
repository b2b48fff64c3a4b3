import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.recsys.metrics import AUC, GAUC, MSE, Calibration, LogLoss, metrics_of, probability


def exact_auc(logits, labels):
    positive, negative = logits[labels > 0.5], logits[labels <= 0.5]
    if not len(positive) or not len(negative):
        return math.nan
    wins = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
    return wins / (len(positive) * len(negative))


def rows(seed, n, groups=5, ties=False):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-3, 4, n).astype(float) if ties else rng.normal(0, 2, n)
    labels = (rng.random(n) < probability(logits)).astype(float)
    return logits, labels, rng.integers(0, groups, n)


def same(a, b):
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) <= 1e-12 * max(1, abs(b))


@given(seed=st.integers(0, 2**31), n=st.integers(0, 300))
def test_auc_with_ties_is_the_share_of_ordered_pairs(seed, n):
    logits, labels, groups = rows(seed, n, ties=True)
    metric = AUC()
    metric.update(logits, labels, groups)
    assert same(metric.compute(), exact_auc(logits, labels))


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.01, 0.1, 1.0, 10.0]))
def test_auc_errs_by_half_the_pairs_within_a_bin_at_most(seed, scale):
    logits, labels, groups = rows(seed, 500)
    logits *= scale
    metric = AUC()
    metric.update(logits, labels, groups)
    negative, positive = metric.counts.astype(float)
    bound = 0.5 * (negative * positive).sum() / (negative.sum() * positive.sum())
    assert abs(metric.compute() - exact_auc(logits, labels)) <= bound + 1e-12


def test_a_logit_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="logits: got 1 NaN of 2"):
        AUC().update(np.array([0.0, math.nan]), np.array([0.0, 1.0]), np.zeros(2, np.int64))


@given(seed=st.integers(0, 2**31), n=st.integers(0, 200), ties=st.booleans())
def test_gauc_is_the_weighted_mean_over_groups(seed, n, ties):
    logits, labels, groups = rows(seed, n, ties=ties)
    logits = logits.astype(np.float32).astype(float)
    parts = [(exact_auc(logits[groups == g], labels[groups == g]), (groups == g).sum()) for g in np.unique(groups)]
    parts = [(auc, weight) for auc, weight in parts if not math.isnan(auc)]
    wanted = sum(a * w for a, w in parts) / sum(w for _, w in parts) if parts else math.nan
    metric = GAUC()
    metric.update(logits, labels, groups)
    assert same(metric.compute(), wanted)


@pytest.mark.parametrize("kind", ["binary", "ratio"])
@given(seed=st.integers(0, 2**31), n=st.integers(2, 100), cut=st.floats(0, 1))
def test_two_updates_are_one_of_all_rows(kind, seed, n, cut):
    logits, labels, groups = rows(seed, n)
    at = int(n * cut)
    whole, parts = metrics_of(kind), metrics_of(kind)
    for name in whole:
        whole[name].update(logits, labels, groups)
        parts[name].update(logits[:at], labels[:at], groups[:at])
        parts[name].update(logits[at:], labels[at:], groups[at:])
        assert same(parts[name].compute(), whole[name].compute())


def test_means_by_hand():
    logits, labels, groups = np.array([0.0, 0.0]), np.array([1.0, 0.0]), np.zeros(2, np.int64)
    for metric, wanted in ((LogLoss(), math.log(2)), (MSE(), 0.25), (Calibration(), 1.0)):
        metric.update(logits, labels, groups)
        assert same(metric.compute(), wanted)


def test_nothing_seen_is_nan():
    assert all(math.isnan(m.compute()) for kind in ("binary", "ratio") for m in metrics_of(kind).values())


def test_extreme_logits_do_not_overflow():
    metric = LogLoss()
    metric.update(np.array([1e4, -1e4]), np.array([1.0, 0.0]), np.zeros(2, np.int64))
    assert metric.compute() == 0.0
    assert probability(np.array([1e4, -1e4])).tolist() == [1.0, 0.0]


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind: got 'count'"):
        metrics_of("count")
