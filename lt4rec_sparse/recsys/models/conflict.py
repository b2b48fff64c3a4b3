"""Rows on which the tasks conflict, clicked but hardly watched, and how much each task's loss weighs there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conflict:
    """The paper's answer to opposing gradients: a clicked and hardly watched row counts more for CVR, less for CTR.

    A video is long above `long_ms`, in milliseconds. A long one is hardly watched below the watch ratio `long_ratio`,
    any other below `short_ratio`. The last two are the factors of such a row in the CTR loss and in the CVR loss.

    Source: LT4REC (arXiv 2008.09872), section 2.2, "gradient conflict"; the figures are those of its published code.
    """

    long_ms: float = 60_000.0
    long_ratio: float = 0.1
    short_ratio: float = 0.2
    click_factor: float = 0.2
    watch_factor: float = 5.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"{name}: got {value}, wanted at least 0")

    def factors(self, ratio: Tensor, clicked: Tensor, duration_ms: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's factors in the CTR and in the CVR loss, `[batch]`, dtype of `ratio`: 1 without a conflict.

        A row without a duration (NaN, or not above 0) or without a ratio (NaN) is never in conflict.
        All are `[batch]`: the share of the video that was watched, bool, and the duration of the video.
        """
        hardly = torch.where(duration_ms > self.long_ms, ratio < self.long_ratio, ratio < self.short_ratio)
        rows, one = clicked & hardly & (duration_ms > 0), torch.ones_like(ratio)
        return torch.where(rows, self.click_factor * one, one), torch.where(rows, self.watch_factor * one, one)
