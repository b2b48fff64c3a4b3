import math
from itertools import groupby, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.recsys.metrics import AUC, GAUC, MSE, NDCG, Calibration, HitRate, LogLoss, metrics_of, probability


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
    whole, parts = metrics_of(kind, 3), metrics_of(kind, 3)
    for name in whole:
        whole[name].update(logits, labels, groups)
        parts[name].update(logits[:at], labels[:at], groups[:at])
        parts[name].update(logits[at:], labels[at:], groups[at:])
        assert same(parts[name].compute(), whole[name].compute())


def at_top(labels, k):
    """NDCG and hit rate at k of labels in their order, by their definitions."""
    dcg = sum(y / math.log2(i + 2) for i, y in enumerate(labels[:k]))
    ideal = sum(y / math.log2(i + 2) for i, y in enumerate(sorted(labels, reverse=True)[:k]))
    return np.array([dcg / ideal, float(any(labels[:k]))])


def orders(logits, labels):
    """Every order of the labels by descending logits, ties in every order of their own."""
    ranked = sorted(zip(logits, labels, strict=True), key=lambda row: -row[0])
    found = [[]]
    for _, tied in groupby(ranked, key=lambda row: row[0]):
        labels_of = [label for _, label in tied]
        found = [head + list(tail) for head in found for tail in permutations(labels_of)]
    return found


def computed(logits, labels, groups, k):
    metrics = NDCG(k), HitRate(k)
    for metric in metrics:
        metric.update(np.array(logits, float), np.array(labels, float), np.array(groups, np.int64))
    return np.array([metric.compute() for metric in metrics])


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 6),
)
def test_metrics_at_the_top_are_means_over_every_order_of_ties(table, k):
    """The plain reference: all orders, group by group; a group without a positive row does not count."""
    table = [row for row in table if sum(other[0] == row[0] for other in table) <= 5]  # 120 orders at most
    groups, logits, labels = ([row[i] for row in table] for i in range(3))
    wanted = []
    for group in sorted(set(groups)):
        of_group = [(x, float(y)) for g, x, y in zip(groups, logits, labels, strict=True) if g == group]
        if any(y for _, y in of_group):
            wanted.append(np.mean([at_top(order, k) for order in orders(*zip(*of_group, strict=True))], axis=0))
    got = computed(logits, labels, groups, k)
    expected = np.mean(wanted, axis=0) if wanted else [math.nan, math.nan]
    assert all(map(same, got, expected))


@given(seed=st.integers(0, 2**31), n=st.integers(1, 200), k=st.integers(1, 30))
def test_metrics_at_the_top_do_not_depend_on_the_order_of_rows(seed, n, k):
    logits, labels, groups = rows(seed, n, ties=True)
    order = np.random.default_rng(seed).permutation(n)
    assert np.array_equal(
        computed(logits, labels, groups, k), computed(logits[order], labels[order], groups[order], k), equal_nan=True
    )


@given(n=st.integers(1, 60), positive=st.integers(1, 60), k=st.integers(1, 80))
def test_a_constant_scores_what_chance_does(n, positive, k):
    positive = min(n, positive)
    labels = [1] * positive + [0] * (n - positive)
    ndcg, hit = computed([0] * n, labels, [7] * n, k)
    ideal = sum(1 / math.log2(i + 2) for i in range(min(k, positive)))
    assert same(ndcg, positive / n * sum(1 / math.log2(i + 2) for i in range(min(k, n))) / ideal)
    assert same(hit, 1 - math.comb(n - positive, min(k, n)) / math.comb(n, min(k, n)))


@given(seed=st.integers(0, 2**31), n=st.integers(1, 100), k=st.integers(1, 20))
def test_the_best_order_has_an_ndcg_and_a_hit_rate_of_one(seed, n, k):
    _, labels, groups = rows(seed, n)
    labels[0] = 1.0
    assert all(map(same, computed(labels, labels, groups, k), (1.0, 1.0)))


def test_metrics_at_the_top_have_names_and_a_range():
    assert list(metrics_of("binary", 5)) == ["auc", "gauc", "ndcg@5", "hit_rate@5", "log_loss", "calibration"]
    assert list(metrics_of("ratio", 5)) == list(metrics_of("ratio"))
    assert list(metrics_of("binary", 5, grouped=False)) == ["auc", "log_loss", "calibration"]
    with pytest.raises(ValueError, match="k: got 0, wanted at least 1"):
        NDCG(0)


def test_means_by_hand():
    logits, labels, groups = np.array([0.0, 0.0]), np.array([1.0, 0.0]), np.zeros(2, np.int64)
    for metric, wanted in ((LogLoss(), math.log(2)), (MSE(), 0.25), (Calibration(), 1.0)):
        metric.update(logits, labels, groups)
        assert same(metric.compute(), wanted)


@pytest.mark.parametrize("metric", [GAUC(), NDCG(3), HitRate(3)])
def test_metrics_within_groups_want_groups(metric):
    with pytest.raises(ValueError, match="groups: got none, wanted the group of each row"):
        metric.update(np.zeros(2), np.ones(2), None)


def test_nothing_seen_is_nan():
    assert all(math.isnan(m.compute()) for kind in ("binary", "ratio") for m in metrics_of(kind, 3).values())


def test_extreme_logits_do_not_overflow():
    metric = LogLoss()
    metric.update(np.array([1e4, -1e4]), np.array([1.0, 0.0]), np.zeros(2, np.int64))
    assert metric.compute() == 0.0
    assert probability(np.array([1e4, -1e4])).tolist() == [1.0, 0.0]


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind: got 'count'"):
        metrics_of("count")
