"""What a task's logits are trained against: one loss a kind of label."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(logits, labels, weights)`, each `[batch]`, to the weighted mean loss."""


def binary_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """`-(y log p + (1 - y) log(1 - p))` with `p = sigmoid(logit)`, weighted mean."""
    return _mean(F.binary_cross_entropy_with_logits(logits, labels, reduction="none"), weights)


def mean_squared_error(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """`(sigmoid(logit) - y)^2`, weighted mean: the paper's CVR loss and metric."""
    return _mean((torch.sigmoid(logits) - labels).square(), weights)


def loss_of(kind: str) -> Loss:
    """Return the loss of a kind of task: "binary" or "ratio".

    Raises:
        ValueError: If the kind is neither.
    """
    losses = {"binary": binary_cross_entropy, "ratio": mean_squared_error}
    if kind not in losses:
        raise ValueError(f"kind: got {kind!r}, wanted one of {', '.join(losses)}")
    return losses[kind]


def _mean(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
