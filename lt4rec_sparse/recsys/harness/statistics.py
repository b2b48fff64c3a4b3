"""What a few seeds can say: means, deviations, and differences paired seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Choice = TypeVar("Choice")
UNLIKELY = 0.05


@dataclass(frozen=True)
class Summary:
    """A value over seeds: mean and standard deviation with `n - 1` in the divisor; NaN where it is not defined."""

    mean: float
    deviation: float
    seeds: int

    def record(self) -> dict[str, float | None]:
        """Return it for JSON."""
        return {"mean": or_none(self.mean), "deviation": or_none(self.deviation), "seeds": self.seeds}


@dataclass(frozen=True)
class Difference:
    """How far a value is from a base's, seed by seed; it prints as "+0.0005 ± 0.0002", or "-0.23 ± 0.15 %".

    Mean over the seeds, NaN if one is no finite number, and its standard error, NaN with one seed; in percent of the
    base's value at the same seed if it is relative.
    """

    mean: float
    error: float
    seeds: int
    relative: bool

    def __str__(self) -> str:
        digits = 2 if self.relative else 4
        error = f" ± {self.error:.{digits}f}" if self.seeds > 1 else ""
        return f"{self.mean:+.{digits}f}{error}{' %' if self.relative else ''}"

    def record(self) -> dict[str, float | bool | None]:
        """Return it for JSON."""
        numbers = {"difference": or_none(self.mean), "error": or_none(self.error)}
        return {**numbers, "seeds": self.seeds, "relative": self.relative}


def summary(values: Sequence[float | None]) -> Summary:
    """Return mean and standard deviation of one value per seed; None is NaN.

    >>> summary([1.0, 2.0, 3.0])
    Summary(mean=2.0, deviation=1.0, seeds=3)
    """
    return Summary(*_moments(_numbers(values)), len(values))


def paired_difference(
    values: Mapping[int, float | None], base: Mapping[int, float | None], relative: bool = False
) -> Difference:
    """Return the mean over seeds of `value - base`, or of `100 * (value - base) / base`, and its standard error.

    Pairing removes what a seed does to both: the order of the batches, and the start. None is NaN; a base of 0 makes a
    relative difference NaN. Other seeds than the base's are a ValueError.

    >>> paired_difference({0: 3.0, 1: 6.0}, {0: 2.0, 1: 4.0}, relative=True).mean
    50.0
    """
    if set(values) != set(base):
        raise ValueError(f"seeds: got {sorted(values)}, wanted the base's, {sorted(base)}")
    seeds = sorted(values)
    mine, other = _numbers([values[seed] for seed in seeds]), _numbers([base[seed] for seed in seeds])
    differences = mine - other
    if relative:
        differences = 100 * differences / np.where(other == 0, np.nan, other)
    mean, deviation = _moments(differences)
    return Difference(mean, deviation / math.sqrt(len(seeds)), len(seeds), relative)


def is_better(difference: Difference, higher_is_better: bool) -> bool:
    """Return whether the difference is in the good direction and exceeds its standard error.

    A low bar: over five seeds, something no better than the base passes it in one case of five (`P(T > 1)` of Student's
    distribution). One seed or a NaN never passes.
    """
    gain = difference.mean if higher_is_better else -difference.mean
    return gain > difference.error


def is_clear(difference: Difference) -> bool:
    """Return whether a difference is not 0 and exceeds the noise of its seeds: `chance` below 0.05. One seed: never."""
    return chance(difference) < UNLIKELY


def chance(difference: Difference) -> float:
    """Return how probable a difference so far from 0, or further, is if only the noise of the seeds made it.

    Two-sided: `P(|T| >= |mean| / error)` of Student's distribution with `seeds - 1` degrees of freedom. NaN with one
    seed, or without a mean.

    >>> round(chance(Difference(2.0, 1.0, seeds=3, relative=False)), 3)
    0.184

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 26.7.3 and 26.7.4.
    """
    freedom = difference.seeds - 1
    if freedom < 1 or not math.isfinite(difference.mean):
        return math.nan
    if not difference.error:
        return 0.0 if difference.mean else 1.0
    angle = math.atan2(abs(difference.mean), difference.error * math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = 1.0, 0.0
    for i in range(freedom // 2):
        total += term
        term *= cosine**2 * (2 * i + 1 + odd) / (2 * i + 2 + odd)
    within = math.sin(angle) * total * (cosine if odd else 1)
    return max(0.0, 1 - (2 / math.pi * (angle + within) if odd else within))


def best_of(losses: Mapping[Choice, Mapping[str, float]]) -> Choice:
    """Return the choice with the least sum over tasks of `loss / least loss of the task`; of equal ones the first.

    >>> best_of({0.1: {"ctr": 0.6, "cvr": 0.10}, 0.2: {"ctr": 0.6, "cvr": 0.09}})
    0.2
    """
    tasks = next(iter(losses.values()))
    least = {task: min(of_choice[task] for of_choice in losses.values()) for task in tasks}
    return min(losses, key=lambda choice: sum(losses[choice][task] / least[task] for task in tasks))


def or_none(value: float) -> float | None:
    """Return the number, or None, JSON's null, if it is NaN or infinite: JSON knows neither."""
    return float(value) if math.isfinite(value) else None


def _numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    """Return the values with NaN for None and infinities, which have no mean."""
    numbers = np.array(values, np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _moments(numbers: NDArray[np.float64]) -> tuple[float, float]:
    return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan
