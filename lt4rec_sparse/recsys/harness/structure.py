"""Recovery of planted structure: do first-layer masks keep the inputs that a task depends on, and share common ones?

Where the truth is known, as in simulated data, a mask can be judged by itself, not only by the metrics of the network
behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ColumnRecovery:
    """How well a first-layer mask tells the inputs that matter to its task from the others.

    Attributes:
        relevant: Density over the columns of relevant inputs.
        irrelevant: Density over the other columns.
        auc: How often a relevant column keeps more weights than an irrelevant one, over all pairs, with a tie as half:
            1 is perfect, 0.5 is chance.
    """

    relevant: float
    irrelevant: float
    auc: float


@dataclass(frozen=True)
class SharingRecovery:
    """Share of co-owned weights in what two tasks keep, by whether the input matters to both, one or none of them.

    A share is None where neither task keeps anything.

    Attributes:
        shared: On columns of inputs that are relevant to both.
        private: On columns of inputs that are relevant to one of them.
        neither: On the other columns.
    """

    shared: float | None
    private: float | None
    neither: float | None


def column_recovery(kept: Tensor, relevant: Tensor) -> ColumnRecovery:
    """Judge a first-layer mask by which of its inputs are relevant.

    The AUC compares how many weights columns keep. For a random mask of any density its expectation is 0.5, with a
    variance of at most `(n + m + 1) / (12 n m)` for `n` relevant and `m` irrelevant columns.

    Example:
        >>> kept = torch.tensor([[True, False, True], [True, False, False]])
        >>> column_recovery(kept, torch.tensor([True, False, False]))
        ColumnRecovery(relevant=1.0, irrelevant=0.25, auc=1.0)

    Args:
        kept: `[out_features, in_features]`, bool, True = kept.
        relevant: `[in_features]`, bool, True where the task depends on the input.

    Raises:
        ValueError: If shapes or dtypes disagree, or if all inputs are relevant, or none.

    Source: the variance: Mann and Whitney, Annals of Mathematical Statistics 18 (1947).
    """
    _check(kept, relevant)
    counts = kept.sum(0)
    of_relevant, of_irrelevant = counts[relevant], counts[~relevant]
    n, m = len(of_relevant), len(of_irrelevant)
    if not n or not m:
        raise ValueError(f"relevant: got {n} of {n + m} columns, wanted some and not all")
    ordered = of_irrelevant.sort().values
    below = torch.searchsorted(ordered, of_relevant)
    not_above = torch.searchsorted(ordered, of_relevant, right=True)
    wins_twice = int((below + not_above).sum())
    return ColumnRecovery(
        int(of_relevant.sum()) / (n * len(kept)), int(of_irrelevant.sum()) / (m * len(kept)), wins_twice / (2 * n * m)
    )


def sharing_recovery(a: Tensor, b: Tensor, relevant_to_a: Tensor, relevant_to_b: Tensor) -> SharingRecovery:
    """Judge whether two tasks' first-layer masks share weights where the tasks share inputs: `|a & b| / |a | b|`.

    Masks that found the structure share more on the columns of inputs that matter to both tasks than on those that
    matter to one. Two random masks of density d share `d / (2 - d)` everywhere.

    Args:
        a: A task's mask, `[out_features, in_features]`, bool, True = kept.
        b: The other task's mask, of the same shape.
        relevant_to_a: `[in_features]`, bool, True where the first task depends on the input.
        relevant_to_b: The same for the other.

    Raises:
        ValueError: If shapes or dtypes disagree.
    """
    _check(a, relevant_to_a)
    _check(b, relevant_to_b)
    if a.shape != b.shape:
        raise ValueError(f"masks: got {tuple(a.shape)} and {tuple(b.shape)}, wanted the same shape")

    def co_owned(columns: Tensor) -> float | None:
        kept = int((a | b)[:, columns].sum())
        return int((a & b)[:, columns].sum()) / kept if kept else None

    return SharingRecovery(
        co_owned(relevant_to_a & relevant_to_b),
        co_owned(relevant_to_a ^ relevant_to_b),
        co_owned(~(relevant_to_a | relevant_to_b)),
    )


def _check(kept: Tensor, relevant: Tensor) -> None:
    if kept.dim() != 2 or kept.dtype != torch.bool or not len(kept):
        raise ValueError(f"mask: got {kept.dtype} {tuple(kept.shape)}, wanted torch.bool [out_features, in_features]")
    if relevant.shape != kept.shape[1:] or relevant.dtype != torch.bool:
        raise ValueError(
            f"relevant: got {relevant.dtype} {tuple(relevant.shape)}, wanted torch.bool ({kept.shape[1]},), the columns"
        )
