"""Table 3 offline: each pair of models ranks a log again, and the view time of the top judges the order.

Every request's rows are ranked by `pCTR * pCVR * length`, once for each arm of Table 3, and the top `k` are judged by
what the log says about them. This is a replay, not an online test. What it cannot say:

- Only items that were shown have an outcome, and the policy that wrote the log chose them and their places. A gain
  holds within its lists; how an arm would choose among all videos stays unknown.
- A user stops when they have had enough. A list in another order might have been longer or shorter.
- Requests of `k` rows or fewer do not count: their top `k` is the same list for every arm. The numbers compare arms;
  they do not predict the view time of a platform.

Source: LT4REC (arXiv 2008.09872), Table 3 and Eq 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lt4rec_sparse.recsys.harness.statistics import or_none, paired_difference, summary
from lt4rec_sparse.recsys.models.rankscore import rank_score

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# Metric -> its numerator, and its denominator, None for one per request, each `[rows]`.
Outcomes = dict[str, tuple[Floats, Floats | None]]

# Table 3, in its order: arm -> (row whose pCTR, row whose pCVR) its score multiplies.
TABLE_3 = {
    "base_ctr*base_cvr*length": ("base", "base"),
    "base_ctr*hard_cvr*length": ("base", "hard_sharing"),
    "base_ctr*s_weight_cvr*length": ("base", "s_weight"),
    "s_weight_ctr*s_weight_cvr*length": ("s_weight", "s_weight"),
}
# Reference orders that every arm can be compared with, where the log allows them.
REFERENCES = ("random", "longest", "logged", "best_logged", "best_expected")
# KuaiRand has few impressions per visit: with a gap of half an hour, one list in sixteen has more than three.
GAP_MS = 4 * 60 * 60 * 1000


@dataclass(frozen=True)
class LoggedRows:
    """Rows of a log with their outcomes; every array is `[rows]`.

    A row without a duration (NaN or 0 seconds) or a play time (NaN) is left out; play may exceed the duration.
    `requests` are any integers in any order; `shown` are numbers that ascend in the order in which the log showed a
    request's rows (times, say); `expected_view_s` is the true expectation, where it is known.
    """

    requests: Ints
    duration_s: Floats
    play_s: Floats
    clicked: NDArray[np.bool_]
    shown: NDArray[Any]
    expected_view_s: Floats | None = None

    def __post_init__(self) -> None:
        for name in ("duration_s", "play_s"):
            column = getattr(self, name)
            if count := int(((column < 0) | np.isinf(column)).sum()):
                raise ValueError(f"{name}: got {count} values that are negative or infinite, wanted seconds")


def sessions(users: NDArray[Any], times_ms: Ints, gap_ms: int = GAP_MS) -> Ints:
    """Number the sessions of a log, `[rows]`: rows of one user, each at most `gap_ms` after the one before.

    They serve as requests where a log has none. This is a guess: a session may hold several requests.

    >>> sessions(np.array([7, 7, 3, 7]), np.array([0, 10, 0, 21]), gap_ms=10).tolist()
    [1, 1, 0, 2]
    """
    order = np.lexsort((times_ms, users))
    user, time = users[order], times_ms[order]
    numbers = np.zeros(len(users), np.int64)
    numbers[order[1:]] = ((user[1:] != user[:-1]) | (np.diff(time) > gap_ms)).cumsum()
    return numbers


def table_3_scores(pctr: Mapping[str, Floats], pcvr: Mapping[str, Floats], duration_s: Floats) -> dict[str, Floats]:
    """Return each arm's rank scores (Eq 3) from predictions, row of the experiment -> `[rows]`.

    A row without a duration, NaN, scores 0.
    """
    length = torch.from_numpy(np.where(np.isnan(duration_s), 0.0, duration_s))
    return {
        arm: rank_score(torch.from_numpy(pctr[click]), torch.from_numpy(pcvr[watch]), length).numpy()
        for arm, (click, watch) in TABLE_3.items()
    }


def replay(
    rows: LoggedRows, scores: Mapping[str, Floats], ks: Sequence[int] = (1, 3, 5), seed: int = 0
) -> dict[str, Any]:
    """Rank each request's rows by each arm's scores, the larger first, and judge the top `k` by the log.

    Rows with equal scores come in a random order that `seed` draws, the same for all arms.

    Returns:
        `{"1": {"requests": those of more than k rows, which alone count here, "arms": {arm: {metric: value}},
        "references": {order: {metric: value}}}}` for each `k`; None where a number is not defined.

        Metrics: `view_time_s`, the mean over requests of the play time of the clicked rows of the top k, as Eq 3 speaks
        of what follows a click; `play_time_s`, of all its rows; `expected_view_time_s`, of their true expectation where
        known; `ctr`, the clicked share of the top k; `cvr`, the mean watch ratio (at most 1) of its clicked rows.

        References: `random`, the expectation over all orders; `longest`, by duration alone; `logged`, as shown;
        `best_logged`, by the view time that the log tells afterwards; `best_expected`, by the truth, where known.

    >>> clicked = np.array([True, False])
    >>> log = LoggedRows(np.zeros(2, int), np.array([60.0, 90.0]), np.array([30.0, 0.0]), clicked, np.arange(2))
    >>> replay(log, {"right": np.array([2.0, 1.0]), "wrong": np.array([1.0, 2.0])}, ks=[1])["1"]["arms"]["right"]
    {'view_time_s': 30.0, 'play_time_s': 30.0, 'cvr': 0.5, 'ctr': 1.0}
    """
    for arm, score in scores.items():
        if count := int(np.isnan(score).sum()):
            raise ValueError(f"scores of {arm}: got {count} NaN of {len(score)}, wanted numbers")
    usable = (rows.duration_s > 0) & ~np.isnan(rows.play_s)  # NaN > 0 is False
    # One shuffle, and only stable sorts after it: rows with equal scores keep a random order that favours no arm.
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(usable))
    codes = np.unique(rows.requests[chosen], return_inverse=True)[1].reshape(-1)
    by_request = np.argsort(codes, kind="stable")
    chosen, codes = chosen[by_request], codes[by_request]
    sizes = np.bincount(codes)
    position = np.arange(len(codes)) - (sizes.cumsum() - sizes)[codes]

    outcomes = _outcomes(rows, chosen)

    def mean(part: Floats | None) -> Floats | None:
        """What a random order has in every place of a request on average."""
        return None if part is None else (np.bincount(codes, part, len(sizes)) / sizes)[codes]

    means = {metric: tuple(map(mean, parts)) for metric, parts in outcomes.items()}
    keys = {arm: -score[chosen] for arm, score in scores.items()} | _references(rows, chosen)
    orders = {name: np.lexsort((key, codes)) for name, key in keys.items()}
    at = {}
    for k in ks:
        # Every order has a request's rows in the same places, so the same places are the top of each.
        top = np.flatnonzero((position < k) & (sizes > k)[codes]).reshape(-1, k).T
        judged = {name: _judged(outcomes, order[top]) for name, order in orders.items()}
        judged["random"] = _judged(means, top)
        at[str(k)] = {
            "requests": top.shape[1],
            "arms": {arm: judged[arm] for arm in scores},
            "references": {name: judged[name] for name in REFERENCES if name in judged},
        }
    return at


def over_seeds(results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Combine what `replay` gave for each seed's models, of the same rows and arms.

    Returns:
        `{"seeds": [...], "k": {"1": {"requests": n, "arms": {arm: {metric: summary}}, "references": {...},
        "differences": {arm: {earlier arm: {metric: difference}}}}}}`, with the records of `statistics.Summary` and
        `statistics.Difference`.
    """
    seeds = sorted(results)

    def values(k: str, group: str, name: str, metric: str) -> dict[int, float | None]:
        return {seed: results[seed][k][group][name][metric] for seed in seeds}

    at: dict[str, Any] = {}
    for k, record in results[seeds[0]].items():
        at[k] = {"requests": record["requests"], "arms": {}, "references": {}, "differences": {}}
        for group in ("arms", "references"):
            for name, metrics in record[group].items():
                over = {metric: list(values(k, group, name, metric).values()) for metric in metrics}
                at[k][group][name] = {metric: summary(numbers).record() for metric, numbers in over.items()}
        for earlier, later in combinations(record["arms"], 2):
            at[k]["differences"].setdefault(later, {})[earlier] = {
                metric: paired_difference(values(k, "arms", later, metric), values(k, "arms", earlier, metric)).record()
                for metric in record["arms"][later]
            }
    return {"seeds": seeds, "k": at}


def _outcomes(rows: LoggedRows, chosen: Ints) -> Outcomes:
    clicked = rows.clicked[chosen].astype(np.float64)
    play, duration = rows.play_s[chosen], rows.duration_s[chosen]
    outcomes: Outcomes = {
        "view_time_s": (clicked * play, None),
        "play_time_s": (play, None),
        "cvr": (clicked * np.minimum(play / duration, 1), clicked),
        "ctr": (clicked, np.ones(len(chosen))),
    }
    if rows.expected_view_s is not None:
        outcomes["expected_view_time_s"] = (rows.expected_view_s[chosen], None)
    return outcomes


def _references(rows: LoggedRows, chosen: Ints) -> dict[str, Floats]:
    """Return the keys of the reference orders, the smallest first."""
    keys = {
        "longest": -rows.duration_s[chosen],
        "best_logged": -(rows.play_s * rows.clicked)[chosen],
        "logged": rows.shown[chosen].astype(np.float64),
    }
    if rows.expected_view_s is not None:
        keys["best_expected"] = -rows.expected_view_s[chosen]
    return keys


def _judged(outcomes: Mapping[str, tuple[Floats | None, ...]], top: Ints) -> dict[str, float | None]:
    """Return the metrics of lists of rows, `top [k, requests]`: first places, then second ones."""
    judged: dict[str, float | None] = {}
    for metric, (numerator, denominator) in outcomes.items():
        assert numerator is not None
        below = top.shape[1] if denominator is None else float(denominator[top].sum(0).sum())
        judged[metric] = or_none(float(numerator[top].sum(0).sum()) / below) if below else None
    return judged
