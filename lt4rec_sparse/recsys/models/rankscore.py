"""The score that a list is ranked by: the product of the tasks' predictions and the video's length (Eq 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rank_score(
    pctr: Tensor, pcvr: Tensor, video_length: Tensor, a: float = 1.0, b: float = 1.0, c: float = 1.0
) -> Tensor:
    """Score candidates by `pctr**a * pcvr**b * video_length**c`, larger first.

    With `a = b = c = 1`, as in the paper's online test, it is the expected view time, in the unit of the length.
    `0**0` is 1, so that an exponent of 0 removes its factor.

    `pctr` is the probability of a click, `pcvr` the expected watch ratio given one, `video_length` has any real dtype
    and unit; all have one shape, which is that of the scores.

    Raises:
        ValueError: If shapes differ, a probability is NaN or outside [0, 1], a length is negative, infinite or NaN, or
            an exponent is negative, infinite or NaN.

    Source: LT4REC (arXiv 2008.09872), Eq 3.

    >>> rank_score(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.25]), torch.tensor([60.0, 300.0])).tolist()
    [15.0, 37.5]
    """
    for name, tensor in {"pcvr": pcvr, "video_length": video_length}.items():
        # No broadcasting: a `[batch, 1]` with a `[batch]` would silently give a `[batch, batch]`.
        if tensor.shape != pctr.shape:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, wanted {list(pctr.shape)}, that of pctr")
    # NaN is within no bounds.
    fine = {"pctr": (pctr >= 0) & (pctr <= 1), "pcvr": (pcvr >= 0) & (pcvr <= 1)}
    fine["video_length"] = (video_length >= 0) & torch.isfinite(video_length)
    for name, rows in fine.items():
        wrong = rows.numel() - int(rows.sum())
        if wrong:
            wanted = "outside [0, 1], wanted probabilities"
            if name == "video_length":
                wanted = "negative or infinite, wanted lengths of at least 0"
            raise ValueError(f"{name}: got {wrong} values of {rows.numel()} that are NaN or {wanted}")
    for name, exponent in {"a": a, "b": b, "c": c}.items():
        if not (math.isfinite(exponent) and exponent >= 0):
            raise ValueError(f"{name}: got {exponent}, wanted a finite exponent of at least 0")
    return pctr**a * pcvr**b * video_length**c
