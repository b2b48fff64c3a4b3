"""The metrics of ranking models, each computed over a stream of rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Groups = NDArray[np.int64] | None  # None: the log has none
Ints = NDArray[np.int64]

MAIN_METRIC = {"binary": "auc", "ratio": "mse"}  # kind of a task -> the metric that compares its models
LOSS = {"binary": "log_loss", "ratio": "mse"}  # kind -> the loss that choices on the validation days minimise
HIGHER_IS_BETTER = {"auc": True, "mse": False}


class Metric(Protocol):
    """A metric over a stream of rows."""

    def update(self, logits: Array, labels: Array, groups: Groups) -> None:
        """Add rows: logits, labels and the group (user) of each, `[n]`; a binary label over 0.5 is positive."""

    def compute(self) -> float:
        """Return the value so far; NaN where it is not defined."""


class AUC:
    """Area under the ROC curve, from a histogram of 65,536 logit bins per class; a tie counts as one half.

    Bins are 0.0005 wide over logits in [-16, 16]; scores beyond share the outermost bins. The error is at most half the
    share of (positive, negative) pairs that fall into the same bin. NaN without both classes.
    """

    BINS = 1 << 16
    RANGE = 16.0

    def __init__(self) -> None:
        self.counts = np.zeros((2, self.BINS), np.int64)

    def update(self, logits: Array, labels: Array, groups: Groups) -> None:
        """Add rows; a NaN logit is a ValueError."""
        if np.isnan(logits).any():
            raise ValueError(f"logits: got {int(np.isnan(logits).sum())} NaN of {len(logits)}, wanted numbers")
        scaled = (np.clip(logits, -self.RANGE, self.RANGE) + self.RANGE) * ((self.BINS - 1) / (2 * self.RANGE))
        bins = scaled.astype(np.int64)
        positive = labels > 0.5
        self.counts[1] += np.bincount(bins[positive], minlength=self.BINS)
        self.counts[0] += np.bincount(bins[~positive], minlength=self.BINS)

    def compute(self) -> float:
        """Return the share of (positive, negative) pairs in the right order."""
        negative, positive = self.counts.astype(np.float64)
        pairs = positive.sum() * negative.sum()
        below = negative.cumsum() - negative / 2
        return float((positive * below).sum() / pairs) if pairs else float("nan")


class _OfGroups:
    """The rows of all groups, 13 bytes per row."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]] = []

    def update(self, logits: Array, labels: Array, groups: Groups) -> None:
        """Add rows; without groups a ValueError."""
        if groups is None:
            raise ValueError("groups: got none, wanted the group of each row")
        self._parts.append((groups, logits.astype(np.float32), labels > 0.5))

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]] | None:
        """Return the groups, logits and labels of all rows; None if there is none."""
        if not sum(len(groups) for groups, *_ in self._parts):
            return None
        groups, logits, positive = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        return groups, logits, positive


class GAUC(_OfGroups):
    """AUC within each group (user), averaged with the group's row count as weight; groups of one class do not count.

    Exact.
    """

    def compute(self) -> float:
        """Return the weighted mean over groups with both classes."""
        rows_of_groups = self.rows()
        if rows_of_groups is None:
            return float("nan")
        groups, logits, positive = rows_of_groups
        order = np.lexsort((logits, groups))
        groups, logits, positive = groups[order], logits[order], positive[order]
        starts = np.r_[True, groups[1:] != groups[:-1]]
        group = starts.cumsum() - 1
        # Ties within a group share the mean of their ranks, so that a tied pair counts as one half.
        ties = (starts | np.r_[True, logits[1:] != logits[:-1]]).cumsum() - 1
        rank = np.arange(1, len(groups) + 1) - np.flatnonzero(starts)[group]
        rank = (np.bincount(ties, rank) / np.bincount(ties))[ties]
        rows = np.bincount(group).astype(np.float64)
        n_positive = np.bincount(group, positive)
        pairs = n_positive * (rows - n_positive)
        wins = np.bincount(group, rank * positive) - n_positive * (n_positive + 1) / 2
        both = pairs > 0
        return float(np.average(wins[both] / pairs[both], weights=rows[both])) if both.any() else float("nan")


class _AtTop(_OfGroups):
    """The rows of each group in descending order of their logits; a mean over the groups with a positive row.

    Rows of one logit stand in a random order: a metric is its expected value over all of them, so that a constant
    scores what chance does.
    """

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"k: got {k}, wanted at least 1")
        super().__init__()
        self.k = k

    def compute(self) -> float:
        """Return the mean over groups; NaN if none has a positive row."""
        rows_of_groups = self.rows()
        if rows_of_groups is None:
            return float("nan")
        groups, logits, positive = rows_of_groups
        order = np.lexsort((-logits, groups))
        groups, logits, positive = groups[order], logits[order], positive[order]
        is_first = np.r_[True, groups[1:] != groups[:-1]]
        firsts = np.flatnonzero(is_first)
        counts = np.add.reduceat(positive.astype(np.int64), firsts)
        place = np.arange(len(groups)) - firsts[is_first.cumsum() - 1]  # in its group, from 0
        runs = np.flatnonzero(is_first | np.r_[True, logits[1:] != logits[:-1]])  # of rows of one logit
        found = self._of_groups(positive, place, firsts, runs, counts)[counts > 0]
        return float(found.mean()) if len(found) else float("nan")

    def _of_groups(self, positive: NDArray[np.bool_], place: Ints, firsts: Ints, runs: Ints, counts: Ints) -> Array:
        """Return the metric of each group.

        `positive` and `place` are of rows; `firsts` are the first rows of groups, `runs` those of rows of one logit;
        `counts` are the positive rows of each group.
        """
        raise NotImplementedError


class NDCG(_AtTop):
    """Normalised discounted cumulative gain of the first `k` rows of each group (user), the mean over groups.

    `DCG / ideal DCG`, `DCG = sum over places i < k of y_i / log2(i + 2)`, `y` the binary label; a group without a
    positive row does not count. For ties see `_AtTop`.

    Source: Jarvelin and Kekalainen, "Cumulated gain-based evaluation of IR techniques" (TOIS 20, 2002); with ties
    McSherry and Najork, "Computing information retrieval performance measures efficiently" (ECIR 2008).
    """

    def _of_groups(self, positive: NDArray[np.bool_], place: Ints, firsts: Ints, runs: Ints, counts: Ints) -> Array:
        lengths = np.diff(runs, append=len(place))
        gain = np.repeat(np.add.reduceat(positive.astype(np.float64), runs) / lengths, lengths)
        discount = np.where(place < self.k, 1 / np.log2(place + 2.0), 0)
        best = np.r_[0, np.cumsum(1 / np.log2(np.arange(min(self.k, len(place))) + 2.0))]
        ideal: Array = best[np.minimum(counts, self.k)]
        return np.add.reduceat(gain * discount, firsts) / np.where(ideal, ideal, 1)


class HitRate(_AtTop):
    """The share of groups (users) with a positive row among their first `k`, of the groups that have one at all.

    For ties see `_AtTop`: of `n` rows of one logit, `p` of them positive, `m` are among the first `k`; none of these is
    positive with the probability `C(n - p, m) / C(n, m)`.
    """

    def _of_groups(self, positive: NDArray[np.bool_], place: Ints, firsts: Ints, runs: Ints, counts: Ints) -> Array:
        lengths = np.diff(runs, append=len(place))
        negative = lengths - np.add.reduceat(positive.astype(np.int64), runs)
        inside = np.clip(self.k - place[runs], 0, lengths)
        miss = np.ones(len(runs))
        for i in range(int(inside.max())):
            drawn = inside > i
            miss[drawn] *= np.maximum(negative[drawn] - i, 0) / (lengths[drawn] - i)
        return 1 - np.multiply.reduceat(miss, np.searchsorted(runs, firsts))


class Quotient:
    """A quotient of two running sums, to which `terms` of logits and labels in [0, 1] add; NaN if nothing was added."""

    def __init__(self, terms: Callable[[Array, Array], tuple[float, float]]) -> None:
        self.terms = terms
        self.total = self.count = 0.0

    def update(self, logits: Array, labels: Array, groups: Groups) -> None:
        """Add rows."""
        total, count = self.terms(logits, labels)
        self.total += float(total)
        self.count += float(count)

    def compute(self) -> float:
        """Return the quotient."""
        return self.total / self.count if self.count else float("nan")


# The mean of `-log p(label)` in nats; the mean squared error of `sigmoid(logit)`; and predicted over observed, the sum
# of `sigmoid(logit)` over that of the labels: 1 is calibrated.
LogLoss = partial(Quotient, lambda logits, labels: ((np.logaddexp(0, logits) - labels * logits).sum(), len(labels)))
MSE = partial(Quotient, lambda logits, labels: (((probability(logits) - labels) ** 2).sum(), len(labels)))
Calibration = partial(Quotient, lambda logits, labels: (probability(logits).sum(), labels.sum()))


def metrics_of(kind: str, top_k: int = 0, grouped: bool = True) -> dict[str, Metric]:
    """Return fresh metrics for a task of this kind, its main metric first.

    "binary": auc, gauc, log_loss, calibration, and with a `top_k` above 0 ndcg@k and hit_rate@k; gauc and those at the
    top only of rows that are `grouped`. "ratio" (a label in [0, 1]): mse, calibration.
    """
    if kind == "binary":
        of_groups: dict[str, Metric] = {"gauc": GAUC()} if grouped else {}
        if grouped and top_k:
            of_groups |= {f"ndcg@{top_k}": NDCG(top_k), f"hit_rate@{top_k}": HitRate(top_k)}
        return {"auc": AUC(), **of_groups, "log_loss": LogLoss(), "calibration": Calibration()}
    if kind == "ratio":
        return {"mse": MSE(), "calibration": Calibration()}
    raise ValueError(f"kind: got {kind!r}, wanted 'binary' or 'ratio'")


def probability(logits: Array) -> Array:
    """`1 / (1 + exp(-logit))`, without overflow for any logit."""
    return 0.5 * (1 + np.tanh(0.5 * logits))
