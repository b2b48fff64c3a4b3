"""The metrics of ranking models, each computed over a stream of rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Groups = NDArray[np.int64] | None  # None: the log has none

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


class GAUC:
    """AUC within each group (user), averaged with the group's row count as weight; groups of one class do not count.

    Exact: it keeps 13 bytes per row.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]] = []

    def update(self, logits: Array, labels: Array, groups: Groups) -> None:
        """Add rows; without groups a ValueError."""
        if groups is None:
            raise ValueError("groups: got none, wanted the group of each row")
        self.parts.append((groups, logits.astype(np.float32), labels > 0.5))

    def compute(self) -> float:
        """Return the weighted mean over groups with both classes."""
        if not sum(len(part[0]) for part in self.parts):
            return float("nan")
        groups, logits, positive = (np.concatenate(part) for part in zip(*self.parts, strict=True))
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


def metrics_of(kind: str, grouped: bool = True) -> dict[str, Metric]:
    """Return fresh metrics for a task of this kind, its main metric first.

    "binary": auc, gauc (only of rows that are `grouped`), log_loss, calibration. "ratio" (a label in [0, 1]): mse,
    calibration.
    """
    if kind == "binary":
        of_groups: dict[str, Metric] = {"gauc": GAUC()} if grouped else {}
        return {"auc": AUC(), **of_groups, "log_loss": LogLoss(), "calibration": Calibration()}
    if kind == "ratio":
        return {"mse": MSE(), "calibration": Calibration()}
    raise ValueError(f"kind: got {kind!r}, wanted 'binary' or 'ratio'")


def probability(logits: Array) -> Array:
    """`1 / (1 + exp(-logit))`, without overflow for any logit."""
    return 0.5 * (1 + np.tanh(0.5 * logits))
