"""What a list is ranked by: the product of what the tasks predict and the video's length (Eq 1 and Eq 3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pctcvr(pctr: Tensor, pcvr: Tensor) -> Tensor:
    """Multiply click by conversion given a click: `p(z | x) = p(y = 1 | x) * p(z | y = 1)`.

    Args:
        pctr: Probabilities of a click, any shape, a floating dtype.
        pcvr: Probabilities of a conversion (or expected watch ratios) given a click, shaped as `pctr`.

    Returns:
        The expected conversion (watch ratio) of an impression, shaped as `pctr`.

    Raises:
        ValueError: If the shapes differ, or a value is NaN or outside [0, 1].

    Source: LT4REC (arXiv 2008.09872), Eq 1.

    >>> pctcvr(torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.0])).tolist()
    [0.125, 0.0]
    """
    _check_shapes(pctr=pctr, pcvr=pcvr)
    _check_probabilities(pctr=pctr, pcvr=pcvr)
    return pctr * pcvr


def rank_score(
    pctr: Tensor, pcvr: Tensor, video_length: Tensor, a: float = 1.0, b: float = 1.0, c: float = 1.0
) -> Tensor:
    """Score candidates by `pctr**a * pcvr**b * video_length**c`, larger first.

    With `a = b = c = 1`, as in the paper's online test, it is the expected view time in the unit of the length.
    `0**0` is 1: an exponent of 0 takes its factor out.

    Args:
        pctr: Probabilities of a click, any shape, a floating dtype.
        pcvr: Expected watch ratios given a click, shaped as `pctr`.
        video_length: Lengths, shaped as `pctr`, any real dtype and unit.
        a: Exponent of `pctr`, at least 0.
        b: Exponent of `pcvr`, at least 0.
        c: Exponent of the length, at least 0.

    Returns:
        Scores, shaped as `pctr`, in the dtype to which torch promotes the three.

    Raises:
        ValueError: If shapes differ, a probability is NaN or outside [0, 1], a length is negative, infinite or NaN, or
            an exponent is negative, infinite or NaN.

    Source: LT4REC (arXiv 2008.09872), Eq 3.

    >>> rank_score(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.25]), torch.tensor([60.0, 300.0])).tolist()
    [15.0, 37.5]
    """
    _check_shapes(pctr=pctr, pcvr=pcvr, video_length=video_length)
    _check_probabilities(pctr=pctr, pcvr=pcvr)
    _check_length(video_length)
    _check_exponents(a=a, b=b, c=c)
    return pctr**a * pcvr**b * video_length**c


def log_rank_score(
    ctr_logits: Tensor, cvr_logits: Tensor, video_length: Tensor, a: float = 1.0, b: float = 1.0, c: float = 1.0
) -> Tensor:
    """Score candidates by `a * log sigmoid(ctr) + b * log sigmoid(cvr) + c * log(video_length)`, larger first.

    The logarithm of `rank_score`, and so the same order, from logits: the product of small probabilities underflows to
    ties at 0, their sum of logarithms does not. A length of 0 scores `-inf` (or 0 if `c` is 0).

    Args:
        ctr_logits: Any shape, a floating dtype.
        cvr_logits: Shaped as `ctr_logits`.
        video_length: Lengths, shaped as `ctr_logits`, any real dtype and unit.
        a: Exponent of `pctr`, at least 0.
        b: Exponent of `pcvr`, at least 0.
        c: Exponent of the length, at least 0.

    Returns:
        Logarithms of the scores, shaped as `ctr_logits`.

    Raises:
        ValueError: If shapes differ, a logit is not finite, a length is negative, infinite or NaN, or an exponent is
            negative, infinite or NaN.

    Source: LT4REC (arXiv 2008.09872), the logarithm of Eq 3.

    >>> log_rank_score(torch.tensor([-200.0]), torch.tensor([0.0]), torch.tensor([2.0])).tolist()
    [-200.0]
    """
    _check_shapes(ctr_logits=ctr_logits, cvr_logits=cvr_logits, video_length=video_length)
    for name, logits in (("ctr_logits", ctr_logits), ("cvr_logits", cvr_logits)):
        _refuse(name, ~torch.isfinite(logits), "are NaN or infinite", "finite logits")
    _check_length(video_length)
    _check_exponents(a=a, b=b, c=c)
    # xlogy(0, 0) is 0, where 0 * log(0) would be NaN.
    return a * F.logsigmoid(ctr_logits) + b * F.logsigmoid(cvr_logits) + torch.xlogy(c, video_length)


def _check_shapes(**tensors: Tensor) -> None:
    (first, wanted), *others = tensors.items()
    for name, tensor in others:
        # No broadcasting: a `[batch, 1]` beside a `[batch]` would make a `[batch, batch]` without a word.
        if tensor.shape != wanted.shape:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, wanted {list(wanted.shape)}, that of {first}")


def _check_probabilities(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        # A NaN is not inside either.
        _refuse(name, ~((tensor >= 0) & (tensor <= 1)), "are NaN or outside [0, 1]", "probabilities")


def _check_length(video_length: Tensor) -> None:
    outside = ~((video_length >= 0) & torch.isfinite(video_length))
    _refuse("video_length", outside, "are NaN, negative or infinite", "lengths of at least 0")


def _check_exponents(**exponents: float) -> None:
    for name, exponent in exponents.items():
        if not (math.isfinite(exponent) and exponent >= 0):
            raise ValueError(f"{name}: got {exponent}, wanted a finite exponent of at least 0")


def _refuse(name: str, wrong: Tensor, what: str, wanted: str) -> None:
    count = int(wrong.sum())
    if count:
        raise ValueError(f"{name}: got {count} values of {wrong.numel()} that {what}, wanted {wanted}")
