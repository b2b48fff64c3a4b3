"""How learning rates change while a model trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The factor of every task's learning rate, batch by batch: a linear warm-up, then the decay.

    In batch `i` of `n`, both from 0, after `w` batches of warm-up and with `p = (i - w) / (n - w)`:

    ```text
    i < w      (i + 1) / w
    constant   1
    linear     1 - p
    cosine     (1 + cos(pi p)) / 2
    ```

    It depends on nothing else: an interrupted training goes on with the same factors. With early stopping `n` is what
    all epochs would take. It is more than 0 in every batch.

    Attributes:
        decay: One of `SCHEDULES`.
        warm_up_steps: Batches of the warm-up.
    """

    decay: str = "constant"
    warm_up_steps: int = 0

    def factor(self, done: int, total: int) -> float:
        """Return the factor of the batch that follows `done` batches, of `total`.

        >>> [Schedule("linear", 2).factor(done, 6) for done in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        warm_up = self.warm_up_steps
        if done < warm_up:
            return (done + 1) / warm_up
        progress = (done - warm_up) / (total - warm_up)
        if self.decay == "linear":
            return 1 - progress
        return 0.5 + 0.5 * math.cos(math.pi * progress) if self.decay == "cosine" else 1.0
