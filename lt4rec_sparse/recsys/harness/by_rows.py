"""Batch size, epochs and patience of a run by the rows of its training days, where nobody says."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

BATCHES = 150  # of an epoch
SMALLEST, LARGEST = 64, 1024  # batch sizes
STEPS = 800  # of all epochs together
PATIENCE = 2
FEW_STEPS = 300  # fewer deserve a warning


class Sizes(NamedTuple):
    """How long a model trains; see `Training`."""

    batch_size: int
    epochs: int
    patience: int


def by_rows(rows: int, batch_size: int | None = None, epochs: int | None = None, patience: int | None = None) -> Sizes:
    """Return the sizes for so many training rows; what is given stays.

    The batch size is the largest power of two, of 64 to 1,024, that gives 150 batches per epoch. There are as many
    epochs as give 800 steps. Several that nobody asked for end early, after two without a gain.

    >>> by_rows(66_610), by_rows(1_000_000)
    (Sizes(batch_size=256, epochs=4, patience=2), Sizes(batch_size=1024, epochs=1, patience=0))

    Measured on simulated logs (of 4,000, 20,000 and 100,000 impressions, of which these are the training rows) and
    Census-Income, with hard sharing of 512-256-128 at rate 0.001, patience 2, at most 4 epochs (6 at 13,306 rows, 8 at
    2,676): log loss of the first task and the loss of the second on the test days, and the best epoch. One seed; at
    2,676 rows the mean of two.

    ```text
    batch      2,676 rows        13,306 rows       66,610 rows       Census, 59,857
       64   0.6123 0.0660  2   0.5944 0.0592  2         -                   -
      128   0.6218 0.0676  3   0.5925 0.0587  2         -            0.1248 0.0901  2
      256   0.6229 0.0750  3   0.5930 0.0586  2   0.5773 0.0489  4   0.1227 0.0900  3
      512         -            0.6006 0.0598  3   0.5801 0.0518  4   0.1213 0.0904  3
    1,024   0.6160 0.0714  7   0.6016 0.0597  4   0.5841 0.0534  4   0.1220 0.0901  4
    ```
    """
    if batch_size is None:
        fitting = [size for size in _powers(SMALLEST, LARGEST) if BATCHES * size <= rows]
        batch_size = max(fitting, default=SMALLEST)
    several = max(1, ceil(STEPS / ceil(max(rows, 1) / batch_size)))
    if patience is None:
        patience = PATIENCE if epochs is None and several > 1 else 0
    return Sizes(batch_size, several if epochs is None else epochs, patience)


def few_steps(steps: int) -> str | None:
    """Return a warning, in one line, if every model takes so few steps per task at most; None if they are enough."""
    if steps >= FEW_STEPS:
        return None
    return (
        f"every model takes {steps} steps per task at most. With fewer than about {FEW_STEPS} it is hardly trained: "
        "use smaller batches (`--batch-size`) or more epochs (`--epochs`)."
    )


def _powers(least: int, most: int) -> list[int]:
    return [1 << i for i in range(least.bit_length() - 1, most.bit_length())]
