"""What a task's logits are trained against: losses by name, and the loss over the entire space of impressions."""

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


def focal(logits: Tensor, labels: Tensor, weights: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """`-(alpha y (1 - p)^gamma log p + (1 - alpha)(1 - y) p^gamma log(1 - p))`, `p = sigmoid(logit)`, weighted mean.

    A row that is right already counts little: by its `(1 - p)^gamma`. A label between 0 and 1 is a part of each side.

    Source: Lin et al. (arXiv 1708.02002), equation 5; alpha and gamma as LT4REC's CTR loss has them.
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


def loss_of(kind: str, name: str | None = None, **options: float) -> Loss:
    """Return the loss of a kind of task, or the one that is named.

    Args:
        kind: Of the task: "binary" (by default "bce") or "ratio" (by default "mse").
        name: "bce", "focal" or "mse"; any of them takes labels of either kind.
        options: Of "focal": `alpha`, between 0 and 1, and `gamma`, not below 0.

    Raises:
        ValueError: If there is no such kind, name or option, or an option is out of its range.
    """
    if kind not in _OF_KIND:
        raise ValueError(f"kind: got {kind!r}, wanted one of {', '.join(_OF_KIND)}")
    name = _OF_KIND[kind] if name is None else name
    if name not in LOSSES:
        raise ValueError(f"loss: got {name!r}, wanted one of {', '.join(LOSSES)}")
    if not options:
        return LOSSES[name]
    if name != "focal" or not options.keys() <= {"alpha", "gamma"}:
        wanted = "alpha and gamma" if name == "focal" else "none"
        raise ValueError(f"options of {name}: got {', '.join(options)}, wanted {wanted}")
    if not 0 <= options.get("alpha", 0) <= 1:
        raise ValueError(f"alpha: got {options['alpha']}, wanted 0 to 1")
    if not options.get("gamma", 0) >= 0:
        raise ValueError(f"gamma: got {options['gamma']}, wanted at least 0")
    return lambda logits, labels, weights: focal(logits, labels, weights, **options)


def joint_logits(first: Tensor, second: Tensor) -> Tensor:
    """Return the logit of a product of probabilities: `log(p / (1 - p))`, `p = sigmoid(first) sigmoid(second)`.

    Nothing underflows, since neither `p` nor `1 - p` is formed: `1 - p = sigmoid(-first) + sigmoid(first)
    sigmoid(-second)` is a sum of positive terms, and is summed as logarithms.

    Args:
        first: Logits of any shape, of a click, say.
        second: Logits of the same shape, of what comes after a click.
    """
    log_first = F.logsigmoid(first)
    log_not_p = torch.logaddexp(F.logsigmoid(-first), log_first + F.logsigmoid(-second))
    return log_first + F.logsigmoid(second) - log_not_p


def entire_space(
    click_logits: Tensor, conversion_logits: Tensor, labels: Tensor, weights: Tensor, loss: Loss = binary_cross_entropy
) -> Tensor:
    """Return the loss of `pCTCVR = pCTR pCVR` over all impressions, weighted mean.

    So pCVR learns from every impression, and not only from the clicked ones that it would be biased to.

    Args:
        click_logits: `[batch]`, of pCTR.
        conversion_logits: `[batch]`, of pCVR: given a click.
        labels: `[batch]`, click times ratio: zero where nobody clicked.
        weights: `[batch]`.
        loss: Of the product's logit against the label.

    Source: Ma et al., ESMM (arXiv 1804.07931), equations 1 and 3.
    """
    return loss(joint_logits(click_logits, conversion_logits), labels, weights)


def _mean(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
