import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lt4rec_sparse.paper.replay import REFERENCES, TABLE_3, LoggedRows, over_seeds, replay, sessions, table_3_scores

# Two requests of three rows, interleaved; a request of one row; a row without a duration.
BY_HAND = LoggedRows(
    requests=np.array([5, 9, 5, 9, 5, 9, 7, 5]),
    duration_s=np.array([10.0, 10, 20, 40, 40, 5, 10, 0]),
    play_s=np.array([5.0, 20, 0, 10, 4, 1, 9, 3]),
    clicked=np.array([True, True, False, True, False, False, True, True]),
    expected_view_s=np.array([4.0, 6, 2, 8, 1, 3, 9, 0]),
    shown=np.array([3, 1, 1, 2, 2, 3, 1, 4]),
)
FIRST, LAST = np.array([3.0, 3, 2, 2, 1, 1, 9, 9]), np.array([1.0, 1, 2, 2, 3, 3, 9, 9])


def simulated(seed, n=60, requests=12):
    """Whole numbers, for which every order of summation gives the same sum, and scores of which no two are the same."""
    rng = np.random.default_rng(seed)
    clicked = rng.random(n) < 0.5
    duration, play = rng.integers(0, 9, n).astype(float), rng.integers(0, 12, n).astype(float)
    play[rng.random(n) < 0.1] = math.nan
    rows = LoggedRows(
        rng.integers(0, requests, n), duration, play, clicked, rng.permutation(n), rng.integers(0, 9, n).astype(float)
    )
    return rows, {arm: rng.permutation(n).astype(float) for arm in ("one", "two", "three")}


def lists_of(rows, score, k):
    """The top `k` of each request of more than `k` rows, row by row."""
    for request in np.unique(rows.requests):
        mine = [i for i in np.flatnonzero(rows.requests == request) if rows.duration_s[i] > 0 and rows.play_s[i] >= 0]
        if len(mine) > k:
            yield sorted(mine, key=lambda i: -score[i])[:k]


def naive(rows, score, k):
    lists = list(lists_of(rows, score, k))
    top = [i for rows_of_list in lists for i in rows_of_list]
    clicked = [i for i in top if rows.clicked[i]]
    ratios = [min(rows.play_s[i] / rows.duration_s[i], 1) for i in clicked]
    return {
        "view_time_s": sum(rows.play_s[i] for i in clicked) / len(lists) if lists else None,
        "play_time_s": sum(rows.play_s[i] for i in top) / len(lists) if lists else None,
        "cvr": pytest.approx(sum(ratios) / len(ratios)) if ratios else None,
        "ctr": len(clicked) / len(top) if top else None,
        "expected_view_time_s": sum(rows.expected_view_s[i] for i in top) / len(lists) if lists else None,
    }


def test_lists_by_hand():
    result = replay(BY_HAND, {"first": FIRST, "last": LAST}, ks=(1, 2, 3))
    one, two, three = result.values()
    assert (one["requests"], two["requests"], three["requests"]) == (2, 2, 0)
    # Clicked, 5 s of 10, and clicked, 20 s of 10, against two rows without a click.
    assert one["arms"]["first"] == {
        "view_time_s": 12.5,
        "play_time_s": 12.5,
        "cvr": 0.75,
        "ctr": 1.0,
        "expected_view_time_s": 5.0,
    }
    assert one["arms"]["last"] == {
        "view_time_s": 0.0,
        "play_time_s": 2.5,
        "cvr": None,
        "ctr": 0.0,
        "expected_view_time_s": 2.0,
    }
    assert two["arms"]["first"]["view_time_s"] == (5 + 30) / 2
    assert two["arms"]["first"]["cvr"] == pytest.approx((0.5 + 1 + 0.25) / 3)
    assert two["arms"]["first"]["ctr"] == 3 / 4
    assert set(three["arms"]["first"].values()) == {None}


def test_references_by_hand():
    references = replay(BY_HAND, {"first": FIRST}, ks=[1])["1"]["references"]
    assert tuple(references) == REFERENCES
    view = {name: metrics["view_time_s"] for name, metrics in references.items()}
    assert view == {
        "random": pytest.approx((5 / 3 + 30 / 3) / 2),
        "longest": 10 / 2,
        "logged": 20 / 2,
        "best_logged": 25 / 2,
        "best_expected": (5 + 10) / 2,
    }


@given(seed=st.integers(0, 2**31), k=st.integers(1, 7))
@settings(max_examples=30)
def test_arms_are_what_they_are_list_by_list(seed, k):
    rows, scores = simulated(seed)
    record = replay(rows, scores, [k], seed)[str(k)]
    for arm, score in scores.items():
        assert record["arms"][arm] == naive(rows, score, k)
        assert record["requests"] == len(list(lists_of(rows, score, k)))


@given(seed=st.integers(0, 2**31), k=st.integers(1, 5))
@settings(max_examples=30)
def test_no_order_beats_the_best(seed, k):
    rows, scores = simulated(seed)
    record = replay(rows, scores, [k])[str(k)]
    best = record["references"]
    for metrics in [*record["arms"].values(), *best.values()]:
        if record["requests"]:
            assert metrics["view_time_s"] <= best["best_logged"]["view_time_s"]
            assert metrics["expected_view_time_s"] <= best["best_expected"]["expected_view_time_s"]


@given(seed=st.integers(0, 2**31), k=st.integers(1, 4))
@settings(max_examples=30)
def test_neither_the_order_of_rows_nor_the_scale_of_scores_counts(seed, k):
    rows, scores = simulated(seed)
    order = np.random.default_rng(seed + 1).permutation(len(rows.requests))
    other = LoggedRows(
        rows.requests[order] * 7 - 100,
        rows.duration_s[order],
        rows.play_s[order],
        rows.clicked[order],
        rows.shown[order],
        rows.expected_view_s[order],
    )
    one = replay(rows, scores, [k])[str(k)]
    two = replay(other, {arm: np.exp2(score[order]) for arm, score in scores.items()}, [k])[str(k)]
    assert one["requests"] == two["requests"]
    for arm in scores:
        for metric in ("view_time_s", "play_time_s", "ctr", "expected_view_time_s"):
            assert one["arms"][arm][metric] == two["arms"][arm][metric]


def test_random_is_the_mean_over_all_orders():
    clicked = np.array([True, False, True, False])
    rows = LoggedRows(np.zeros(4, np.int64), np.full(4, 8.0), np.array([8.0, 4, 2, 1]), clicked, np.arange(4))
    scores = {str(order): np.array(order, float) for order in itertools.permutations(range(4))}
    record = replay(rows, scores, [2])["2"]
    for metric in ("view_time_s", "play_time_s", "ctr"):
        mean = np.mean([metrics[metric] for metrics in record["arms"].values()])
        assert record["references"]["random"][metric] == pytest.approx(mean)


def test_ties_are_alike_for_all_arms_and_favour_no_row():
    rows = LoggedRows(np.zeros(3, np.int64), np.ones(3), np.array([3.0, 2, 1]), np.ones(3, bool), np.arange(3))
    seen = set()
    for seed in range(30):
        arms = replay(rows, {"a": np.zeros(3), "b": np.ones(3)}, [1], seed)["1"]["arms"]
        assert arms["a"] == arms["b"]
        assert replay(rows, {"a": np.zeros(3)}, [1], seed)["1"]["arms"]["a"] == arms["a"]
        seen.add(arms["a"]["view_time_s"])
    assert seen == {1.0, 2.0, 3.0}


def test_a_score_of_minus_infinity_comes_last():
    rows = LoggedRows(np.zeros(3, np.int64), np.ones(3), np.array([3.0, 2, 1]), np.ones(3, bool), np.arange(3))
    logs = replay(rows, {"logs": np.array([-math.inf, 0.5, -1.0])}, [2])["2"]
    assert logs["arms"]["logs"]["view_time_s"] == 3.0


def test_nothing_to_rank_is_null_throughout():
    nothing = LoggedRows(np.zeros(0, np.int64), np.zeros(0), np.zeros(0), np.zeros(0, bool), np.zeros(0))
    result = replay(nothing, {"a": np.zeros(0)})
    assert [record["requests"] for record in result.values()] == [0, 0, 0]
    assert set(result["1"]["arms"]["a"].values()) == {None}


@pytest.mark.parametrize("seed", range(3))
def test_results_are_json_without_nan(seed):
    rows, scores = simulated(seed)
    results = {s: replay(rows, scores, (1, 8), s) for s in (0, 1)}
    for result in (results[0], over_seeds(results)):
        assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_over_seeds_by_hand():
    results = {
        0: replay(BY_HAND, {"x": FIRST, "y": LAST}, ks=[1]),
        1: replay(BY_HAND, {"x": FIRST, "y": FIRST}, ks=[1]),
    }
    over = over_seeds(results)
    assert over["seeds"] == [0, 1]
    one = over["k"]["1"]
    assert one["requests"] == 2
    assert one["arms"]["x"]["view_time_s"] == {"mean": 12.5, "deviation": 0.0, "seeds": 2}
    assert one["arms"]["y"]["view_time_s"]["mean"] == 6.25
    assert one["arms"]["y"]["cvr"] == {"mean": None, "deviation": None, "seeds": 2}
    difference = one["differences"]["y"]["x"]["view_time_s"]  # -12.5 and 0
    assert (difference["difference"], difference["error"]) == (-6.25, 6.25)
    assert one["references"]["best_logged"]["view_time_s"]["mean"] == 12.5


def test_the_four_arms_of_table_3():
    pctr = {"base": np.array([0.5, 0.25]), "s_weight": np.array([1.0, 0.5])}
    pcvr = {"base": np.array([0.5, 0.5]), "hard_sharing": np.array([0.25, 1.0]), "s_weight": np.array([1.0, 0.0])}
    scores = table_3_scores(pctr, pcvr, np.array([8.0, 16.0]))
    assert list(scores) == list(TABLE_3)
    assert [score.tolist() for score in scores.values()] == [[2.0, 2.0], [1.0, 4.0], [4.0, 0.0], [8.0, 0.0]]
    without = table_3_scores(pctr, pcvr, np.array([math.nan, 16.0]))
    assert without["base_ctr*base_cvr*length"].tolist() == [0.0, 2.0]


def test_what_cannot_be_replayed_is_named():
    with pytest.raises(ValueError, match="scores of x: got 8 NaN of 8"):
        replay(BY_HAND, {"x": np.full(8, math.nan)})
    with pytest.raises(ValueError, match="play_s: got 2 values that are negative or infinite"):
        LoggedRows(np.arange(2), np.ones(2), -np.ones(2), np.ones(2, bool), np.arange(2))


def test_sessions_by_hand():
    users = np.array(["b", "a", "b", "b", "a", "b"])
    times = np.array([100, 0, 0, 111, 10, 10])
    assert sessions(users, times, gap_ms=10).tolist() == [2, 0, 1, 3, 0, 1]
    assert sessions(users[:0], times[:0]).tolist() == []


@given(seed=st.integers(0, 2**31), n=st.integers(1, 40), gap=st.integers(0, 20))
def test_sessions_part_at_longer_pauses_only(seed, n, gap):
    rng = np.random.default_rng(seed)
    users, times = rng.integers(0, 4, n), rng.integers(0, 200, n)
    numbers = sessions(users, times, gap)
    for user in np.unique(users):
        mine = np.flatnonzero(users == user)
        mine = mine[np.argsort(times[mine])]
        for before, after in itertools.pairwise(mine):
            assert (numbers[before] == numbers[after]) == (times[after] - times[before] <= gap)
    assert len({(user, number) for user, number in zip(users, numbers, strict=True)}) == len(set(numbers.tolist()))
