"""Rows on which the tasks conflict, clicked but hardly watched, and how much each task's loss weighs there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Factors of each row's weight, `[batch]` each."""

    click: Tensor
    watch: Tensor


@dataclass(frozen=True)
class Conflict:
    """The paper's answer to opposing gradients: a clicked and hardly watched row counts more for CVR, less for CTR.

    Attributes:
        long_ms: A video is long above this duration, in milliseconds.
        long_ratio: A long video is hardly watched below this watch ratio.
        short_ratio: The same for any other video.
        click_factor: Factor of such a row in the CTR loss.
        watch_factor: Factor of such a row in the CVR loss.

    Raises:
        ValueError: If a threshold or factor is below 0.

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

    def rows(self, ratio: Tensor, clicked: Tensor, duration_ms: Tensor) -> Tensor:
        """Return the rows in conflict: bool `[batch]`.

        A row without a duration (NaN, or not above 0) or without a ratio (NaN) is never in conflict.

        Args:
            ratio: `[batch]` float, the share of the video that was watched.
            clicked: `[batch]` bool.
            duration_ms: `[batch]` float, the duration of the video.

        Raises:
            ValueError: If the shapes differ, or `clicked` is not bool.
        """
        if not ratio.shape == clicked.shape == duration_ms.shape or clicked.dtype != torch.bool:
            got = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in (ratio, clicked, duration_ms))
            raise ValueError(f"ratio, clicked, duration_ms: got {got}, wanted one shape, and clicked torch.bool")
        hardly = torch.where(duration_ms > self.long_ms, ratio < self.long_ratio, ratio < self.short_ratio)
        return clicked & hardly & (duration_ms > 0)

    def factors(self, ratio: Tensor, clicked: Tensor, duration_ms: Tensor) -> Factors:
        """Return each row's factors, with the dtype of `ratio`: 1 without a conflict. Arguments as in `rows`."""
        rows, one = self.rows(ratio, clicked, duration_ms), torch.ones_like(ratio)
        return Factors(
            torch.where(rows, self.click_factor * one, one),
            torch.where(rows, self.watch_factor * one, one),
        )
