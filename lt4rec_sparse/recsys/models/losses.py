"""The losses of a task's logits, by name, and the loss over the entire space of impressions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From `(logits, labels, weights)`, each `[batch]`, to the weighted mean loss."""


def binary_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """`-(y log p + (1 - y) log(1 - p))` with `p = sigmoid(logit)`, weighted mean."""
    return _mean(F.binary_cross_entropy_with_logits(logits, labels, reduction="none"), weights)


def focal(logits: Tensor, labels: Tensor, weights: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """`-(alpha y (1 - p)^gamma log p + (1 - alpha)(1 - y) p^gamma log(1 - p))`, `p = sigmoid(logit)`, weighted mean.

    A row that is predicted well counts little, by its `(1 - p)^gamma`. A label between 0 and 1 counts for both terms.

    Source: Lin et al. (arXiv 1708.02002), equation 5; alpha and gamma are those of LT4REC's CTR loss.
    """
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    # Powers as exponentials of logarithms: the derivative of 0^gamma would be infinite for gamma below 1.
    ones = alpha * labels * (gamma * log_not_p).exp() * log_p
    zeros = (1 - alpha) * (1 - labels) * (gamma * log_p).exp() * log_not_p
    return _mean(-(ones + zeros), weights)


def mean_squared_error(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """`(sigmoid(logit) - y)^2`, weighted mean: the paper's CVR loss and metric."""
    return _mean((torch.sigmoid(logits) - labels).square(), weights)


LOSSES: dict[str, Loss] = {"bce": binary_cross_entropy, "focal": focal, "mse": mean_squared_error}
_OF_KIND = {"binary": "bce", "ratio": "mse"}


def loss_of(kind: str, name: str | None = None) -> Loss:
    """Return the loss of a kind of task, "binary" ("bce") or "ratio" ("mse"), or the named one of `LOSSES`.

    Each loss accepts labels of either kind.
    """
    return LOSSES[_OF_KIND[kind] if name is None else name]


def joint_logits(first: Tensor, second: Tensor) -> Tensor:
    """Return the logit of a product of probabilities: `log(p / (1 - p))`, `p = sigmoid(first) sigmoid(second)`.

    Nothing underflows, since neither `p` nor `1 - p` is computed: `1 - p = sigmoid(-first) + sigmoid(first)
    sigmoid(-second)` is a sum of positive terms, and is added in logarithms.
    """
    log_first = F.logsigmoid(first)
    log_not_p = torch.logaddexp(F.logsigmoid(-first), log_first + F.logsigmoid(-second))
    return log_first + F.logsigmoid(second) - log_not_p


def entire_space(click_logits: Tensor, conversion_logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the cross entropy of `pCTCVR = pCTR pCVR` over all impressions, weighted mean.

    Thus pCVR learns from every impression; from clicked ones alone it would be biased towards them.
    Logits are those of pCTR and of pCVR, the conversion given a click; a label is click times ratio, zero without a
    click. All are `[batch]`.

    Source: Ma et al., ESMM (arXiv 1804.07931), equations 1 and 3.
    """
    return binary_cross_entropy(joint_logits(click_logits, conversion_logits), labels, weights)


def _mean(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
