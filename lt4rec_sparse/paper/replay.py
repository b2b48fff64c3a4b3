"""Table 3 offline: each pair of models ranks a log again, and the view time of the top judges the order.

Every request's rows are ranked by `pCTR * pCVR * length`, once for each arm of Table 3, and the top `k` are judged by
what the log says about them. This is a replay, not an online test. What it cannot say:

- Only items that were shown have an outcome. The arms reorder the lists of the policy that wrote the log, so a gain
  holds within those lists; how an arm would choose among all videos stays unknown.
- That policy chose what was shown, and in what place; it was not chance. An outcome counts as if its place had not
  mattered, and an arm is judged on the videos that the policy liked, not on those that the arm would have liked.
- A user stops when they have had enough. A list in another order might have been longer or shorter.
- A real log may have no requests. Then `sessions` makes them, and they are short. Requests of `k` rows or fewer do
  not count: their top `k` is the same list for every arm. The numbers compare arms; they do not predict the view
  time of a platform.
- A row that was not clicked may have play time (autoplay). Eq 3 speaks of what follows a click, so `view_time_s`
  counts clicked rows only; `play_time_s` counts all rows.

Where the log is simulated, the expected view time of every row is known, `truth_click * truth_watch * duration`. Its
sum over the top `k` judges an arm without the noise of the draw, and no order can exceed `best_expected` in it.

Source: LT4REC (arXiv 2008.09872), Table 3 and Eq 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lt4rec_sparse.recsys.harness.statistics import or_none, paired_difference, summary
from lt4rec_sparse.recsys.models.rankscore import rank_score

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Outcomes = dict[str, tuple[Floats, ...]]
"""Metric -> its numerator, and its denominator if it is not one per request, each `[rows]`."""

# Table 3, in its order: arm -> (row whose pCTR, row whose pCVR) its score multiplies.
TABLE_3 = {
    "base_ctr*base_cvr*length": ("base", "base"),
    "base_ctr*hard_cvr*length": ("base", "hard_sharing"),
    "base_ctr*s_weight_cvr*length": ("base", "s_weight"),
    "s_weight_ctr*s_weight_cvr*length": ("s_weight", "s_weight"),
}
# Reference orders that every arm can be compared with, where the log allows them.
REFERENCES = ("random", "longest", "logged", "best_logged", "best_expected")
SESSION_GAP_MS = 30 * 60 * 1000  # half an hour, the usual cut of a web session


@dataclass(frozen=True)
class LoggedRows:
    """Rows of a log with their outcomes; every array is `[rows]`.

    Attributes:
        requests: The request of each row: any integers, in any order.
        duration_s: Length of the video in seconds. A row without one (NaN or 0) is left out.
        play_s: Play time in seconds, which may exceed the duration. A row without one (NaN) is left out.
        clicked: Bool.
        expected_view_s: The true expected view time in seconds, where it is known.
        shown: Numbers that ascend in the order in which the log showed a request's rows (times, say), if known.
    """

    requests: Ints
    duration_s: Floats
    play_s: Floats
    clicked: NDArray[np.bool_]
    expected_view_s: Floats | None = None
    shown: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_shape(field.name, getattr(self, field.name), self.requests)
        for name in ("duration_s", "play_s", "expected_view_s"):
            column = getattr(self, name)
            if column is not None and (count := int(((column < 0) | np.isinf(column)).sum())):
                raise ValueError(f"{name}: got {count} values that are negative or infinite, wanted seconds")
        if self.expected_view_s is not None and np.isnan(self.expected_view_s).any():
            raise ValueError("expected_view_s: got NaN, wanted the truth of every row, or None")


@dataclass(frozen=True)
class _Quotient:
    """A metric over requests: the sum of the numerators over the sum of the denominators, each `[requests]`."""

    numerator: Floats
    denominator: Floats

    @property
    def value(self) -> float:
        """NaN if the denominators sum to 0."""
        total = float(self.denominator.sum())
        return float(self.numerator.sum()) / total if total else math.nan

    def influence(self) -> Floats:
        """How much each request moves the value, `[requests]`, with mean 0 (delta method).

        Source: Deng, Knoblich and Lu, Applying the Delta Method in Metric Analytics, KDD 2018, arXiv 1803.06336.
        """
        mean = self.denominator.mean() if self.denominator.any() else math.nan
        influence: Floats = (self.numerator - self.value * self.denominator) / mean
        return influence


def sessions(
    users: NDArray[Any], times_ms: NDArray[np.int64], gap_ms: int = SESSION_GAP_MS, days: NDArray[Any] | None = None
) -> Ints:
    """Number the sessions of a log: rows of one user, each at most `gap_ms` after the one before.

    They serve as requests where a log has none. This is a guess: a session may hold several requests.

    Args:
        users: `[rows]`, integers or strings, in any order.
        times_ms: `[rows]`, milliseconds.
        gap_ms: A longer pause begins a new session.
        days: `[rows]`; if given, another day begins a new session too.

    Returns:
        `[rows]` int64, from 0 on, in the order of users and times.

    Raises:
        ValueError: If lengths differ or the gap is negative.

    >>> sessions(np.array([7, 7, 3, 7]), np.array([0, 10, 0, 21]), gap_ms=10).tolist()
    [1, 1, 0, 2]
    """
    _check_shape("users", users, users)
    _check_shape("times_ms", times_ms, users)
    _check_shape("days", days, users)
    if gap_ms < 0:
        raise ValueError(f"gap_ms: got {gap_ms}, wanted at least 0")
    order = np.lexsort((times_ms, users))
    user, time = users[order], times_ms[order]
    new = (user[1:] != user[:-1]) | (np.diff(time) > gap_ms)
    if days is not None:
        new |= days[order][1:] != days[order][:-1]
    numbers = np.zeros(len(users), np.int64)
    numbers[order[1:]] = new.cumsum()
    return numbers


def table_3_scores(
    pctr: Mapping[str, Floats],
    pcvr: Mapping[str, Floats],
    duration_s: Floats,
    a: float = 1.0,
    b: float = 1.0,
    c: float = 1.0,
    arms: Mapping[str, tuple[str, str]] = TABLE_3,
) -> dict[str, Floats]:
    """Return each arm's rank scores (Eq 3); a row without a duration scores 0.

    Args:
        pctr: Row of the experiment ("base", "s_weight") -> probabilities of a click, `[rows]`.
        pcvr: Row of the experiment -> expected watch ratios given a click, `[rows]`.
        duration_s: `[rows]`, seconds; NaN where missing.
        a: Exponent of the pCTR.
        b: Exponent of the pCVR.
        c: Exponent of the duration.
        arms: Arm -> (row of its pCTR, row of its pCVR).

    Raises:
        ValueError: If an arm's row has no predictions, or for the reasons that `rank_score` gives.
    """
    length = torch.from_numpy(np.where(np.isnan(duration_s), 0.0, duration_s))
    scores = {}
    for arm, (ctr, cvr) in arms.items():
        for task, row, predicted in (("pctr", ctr, pctr), ("pcvr", cvr, pcvr)):
            if row not in predicted:
                raise ValueError(f"{task}: got {', '.join(predicted) or 'none'}, wanted {row}'s too, which {arm} needs")
        click, watch = (torch.from_numpy(np.asarray(x, np.float64)) for x in (pctr[ctr], pcvr[cvr]))
        scores[arm] = rank_score(click, watch, length, a, b, c).numpy()
    return scores


def replay(
    rows: LoggedRows, scores: Mapping[str, Floats], ks: Sequence[int] = (1, 3, 5), seed: int = 0
) -> dict[str, Any]:
    """Rank each request's rows by each arm's scores and judge the top `k` by the log.

    Rows with equal scores come in a random order, the same for all arms.

    Args:
        rows: The log.
        scores: Arm -> score of each row, `[rows]`; the larger comes first.
        ks: Lengths of the judged top.
        seed: Seed of the order of rows with equal scores.

    Returns:
        JSON-able; null where a number is not defined::

            {"rows": rows that count, "left_out": rows without a duration or play time, "requests": of any size,
             "k": {"1": {"requests": those of more than k rows, which alone count here,
                         "arms": {arm: {metric: value}}, "references": {order: {metric: value}},
                         "errors": {arm or order: {metric: standard error over the requests}},
                         "differences": {arm: {earlier arm: {metric: {"difference": d, "error": e}}}}}}}

        Metrics: `view_time_s`, the mean over requests of the play time of the clicked rows of the top k; `play_time_s`,
        of all its rows; `expected_view_time_s`, of their true expectation, where known; `ctr`, the clicked share of the
        top k; `cvr`, the mean watch ratio (at most 1) of its clicked rows.

        References: `random`, the expectation over all orders; `longest`, by duration alone; `logged`, as shown, where
        known; `best_logged`, by the view time that the log tells afterwards; `best_expected`, by the truth, where
        known.

        Differences are paired: request by request. Their errors take requests to be independent. They say what other
        requests would have changed; `over_seeds` says what another training would have changed.

    Raises:
        ValueError: If a score is NaN, a length differs, there is no arm, an arm has the name of a reference order, or a
            `k` is not positive or comes twice.

    >>> log = LoggedRows(np.zeros(2, int), np.array([60.0, 90.0]), np.array([30.0, 0.0]), np.array([True, False]))
    >>> replay(log, {"right": np.array([2.0, 1.0]), "wrong": np.array([1.0, 2.0])}, ks=[1])["k"]["1"]["arms"]["right"]
    {'view_time_s': 30.0, 'play_time_s': 30.0, 'cvr': 0.5, 'ctr': 1.0}
    """
    if not scores:
        raise ValueError("scores: got no arm, wanted at least one")
    for arm, score in scores.items():
        _check_shape(f"scores of {arm}", score, rows.requests)
        if arm in REFERENCES:
            raise ValueError(f"scores: got an arm named {arm}, a reference order, wanted another name")
        if count := int(np.isnan(score).sum()):
            raise ValueError(f"scores of {arm}: got {count} NaN of {len(score)}, wanted numbers")
    if not ks or min(ks) < 1 or len(set(ks)) < len(ks):
        raise ValueError(f"ks: got {list(ks)}, wanted different numbers of at least 1")
    usable = (rows.duration_s > 0) & ~np.isnan(rows.play_s)  # NaN > 0 is False
    # One shuffle, and only stable sorts after it: rows with equal scores keep a random order that favours no arm.
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(usable))
    codes = np.unique(rows.requests[chosen], return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(codes)
    requests = len(sizes)
    long = (sizes > min(ks))[codes]
    chosen, codes = chosen[long], codes[long]
    by_request = np.argsort(codes, kind="stable")
    chosen = chosen[by_request]
    starts = np.diff(codes[by_request], prepend=-1) != 0
    codes = starts.cumsum() - 1
    sizes = np.bincount(codes)
    position = np.arange(len(codes)) - np.flatnonzero(starts)[codes]

    outcomes = _outcomes(rows, chosen)
    means = {metric: tuple(_mean_within(part, codes, sizes) for part in parts) for metric, parts in outcomes.items()}
    keys = {arm: -np.asarray(score, np.float64)[chosen] for arm, score in scores.items()} | _references(rows, chosen)
    orders = {name: _sorted_within(key, sizes) for name, key in keys.items()}
    at = {}
    for k in ks:
        # Every order has a request's rows in the same places, so the same places are the top of each.
        top = np.ascontiguousarray(np.flatnonzero((position < k) & (sizes > k)[codes]).reshape(-1, k).T)
        judged = {name: _judged(outcomes, order[top]) for name, order in orders.items()}
        judged["random"] = _judged(means, top)
        at[str(k)] = _record(judged, list(scores), top.shape[1])
    return {"rows": int(usable.sum()), "left_out": int((~usable).sum()), "requests": requests, "k": at}


def over_seeds(results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Combine what `replay` gave for each seed's models: means, and paired differences, over the seeds.

    Args:
        results: Seed -> what `replay` returned for the same rows and arms.

    Returns:
        `{"seeds": [...], "k": {"1": {"requests": n, "arms": {arm: {metric: summary}}, "references": {...},
        "differences": {arm: {earlier arm: {metric: difference}}}}}}`, with the records of `statistics.Summary` and
        `statistics.Difference`.

    Raises:
        ValueError: If there is no result, or the results differ in their requests, arms or `ks`.
    """
    if not results:
        raise ValueError("results: got none, wanted those of at least one seed")
    seeds = sorted(results)
    first = results[seeds[0]]
    for seed in seeds[1:]:
        if _shape(results[seed]) != _shape(first):
            raise ValueError(f"results: got other requests, arms or ks at seed {seed} than at seed {seeds[0]}")

    def values(k: str, group: str, name: str, metric: str) -> dict[int, float | None]:
        return {seed: results[seed]["k"][k][group][name][metric] for seed in seeds}

    at: dict[str, Any] = {}
    for k, record in first["k"].items():
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
    one = np.ones(len(chosen))
    outcomes: Outcomes = {
        "view_time_s": (clicked * play,),
        "play_time_s": (play,),
        "cvr": (clicked * np.minimum(play / duration, 1), clicked),
        "ctr": (clicked, one),
    }
    if rows.expected_view_s is not None:
        outcomes["expected_view_time_s"] = (rows.expected_view_s[chosen],)
    return outcomes


def _references(rows: LoggedRows, chosen: Ints) -> dict[str, Floats]:
    """Return the keys of the reference orders, the smallest first."""
    keys = {"longest": -rows.duration_s[chosen], "best_logged": -(rows.play_s * rows.clicked)[chosen]}
    if rows.shown is not None:
        keys["logged"] = rows.shown[chosen].astype(np.float64)
    if rows.expected_view_s is not None:
        keys["best_expected"] = -rows.expected_view_s[chosen]
    return keys


def _sorted_within(key: Floats, sizes: Ints) -> Ints:
    """Return the places of the rows, request after request, the smallest key of each first; equal keys in their order.

    Requests of about one size are sorted as the rows of one matrix, which is six times as fast as `np.lexsort`.
    """
    order = np.empty(len(key), np.int64)
    ends = sizes.cumsum()
    width = 1 << np.ceil(np.log2(sizes)).astype(np.int64)  # at most half of a matrix is padding
    for columns in np.unique(width):
        here = width == columns
        places = (ends - sizes)[here, None] + np.arange(columns)
        real = places < ends[here, None]
        # The padding comes after a request's rows, and a stable sort keeps it there even if a key is infinite.
        line = np.where(real, key[np.minimum(places, len(key) - 1)], np.inf)
        order[places[real]] = np.take_along_axis(places, np.argsort(line, axis=1, kind="stable"), axis=1)[real]
    return order


def _mean_within(part: Floats, codes: Ints, sizes: Ints) -> Floats:
    """Return the mean of each row's request, `[rows]`: what a random order has in every place on average."""
    return (np.bincount(codes, part, len(sizes)) / sizes)[codes]


def _judged(outcomes: Outcomes, top: Ints) -> dict[str, _Quotient]:
    """Return the metrics of lists of rows, `top [k, requests]`: first places, then second ones."""
    requests = np.ones(top.shape[1])
    judged = {}
    for metric, (numerator, *denominator) in outcomes.items():
        below = denominator[0][top].sum(0) if denominator else requests
        judged[metric] = _Quotient(numerator[top].sum(0), below)
    return judged


def _record(judged: Mapping[str, Mapping[str, _Quotient]], arms: Sequence[str], requests: int) -> dict[str, Any]:
    values = {name: {m: or_none(quotient.value) for m, quotient in metrics.items()} for name, metrics in judged.items()}
    moves = {name: {m: quotient.influence() for m, quotient in metrics.items()} for name, metrics in judged.items()}
    differences: dict[str, dict[str, Any]] = {}
    for earlier, later in combinations(arms, 2):
        differences.setdefault(later, {})[earlier] = {
            metric: {
                "difference": or_none(quotient.value - judged[earlier][metric].value),
                "error": or_none(_standard_error(moves[later][metric] - moves[earlier][metric])),
            }
            for metric, quotient in judged[later].items()
        }
    return {
        "requests": requests,
        "arms": {arm: values[arm] for arm in arms},
        "references": {name: values[name] for name in REFERENCES if name in values},
        "errors": {
            name: {m: or_none(_standard_error(x)) for m, x in by_metric.items()} for name, by_metric in moves.items()
        },
        "differences": differences,
    }


def _standard_error(influence: Floats) -> float:
    return float(influence.std(ddof=1)) / math.sqrt(len(influence)) if len(influence) > 1 else math.nan


def _shape(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the results of all seeds have in common."""
    return {
        k: (
            record["requests"],
            {group: {name: list(x) for name, x in record[group].items()} for group in ("arms", "references")},
        )
        for k, record in result["k"].items()
    }


def _check_shape(name: str, column: NDArray[Any] | None, like: NDArray[Any]) -> None:
    if column is not None and (column.ndim != 1 or len(column) != len(like)):
        raise ValueError(f"{name}: got shape {list(column.shape)}, wanted [{len(like)}], one value per row")
