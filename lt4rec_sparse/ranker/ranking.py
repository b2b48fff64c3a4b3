"""Candidates in order: the product of the tasks' scores and columns of the candidates, and the best of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lt4rec_sparse.errors import InputError, shown

LARGEST = sys.float_info.max  # an int may be larger, and less than infinity
Scores = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """Candidates from the best on; all arrays have one element for each of them.

    Attributes:
        rows: Where the candidate is among those that were given, int64.
        rank_scores: What they are ordered by, float64, descending; candidates that are level keep their order.
        scores: Task name -> probability (or expected ratio), float32.
    """

    rows: NDArray[np.int64]
    rank_scores: Doubles
    scores: dict[str, Scores]

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.rows)


def checked_powers(by: Mapping[str, float]) -> dict[str, float]:
    """Return the exponents of `Ranker.rank` as floats.

    Raises:
        InputError: If there is none, or one is no finite number of at least 0.
    """
    if not by:
        raise InputError("by: got nothing, wanted at least one task or column with its exponent")
    for name, power in by.items():
        if isinstance(power, bool) or not isinstance(power, int | float | np.number) or not 0 <= power <= LARGEST:
            raise InputError(f"by: got exponent {shown(power)} of {shown(name)}, wanted a finite one of at least 0")
    return {name: float(power) for name, power in by.items()}


def checked_factor(column: str, values: Doubles) -> Doubles:
    """Return a factor of the rank score.

    Raises:
        InputError: If a value is missing, negative or infinite.
    """
    wrong = ~((values >= 0) & (values < math.inf))
    if wrong.any():
        got = f"{values[wrong][0]:g} in row {int(wrong.argmax())}"
        raise InputError(f"column {column!r}: got {got}, wanted finite numbers of at least 0: rank scores are of it")
    return values


def rank_scores(factors: Mapping[str, Scores | Doubles], powers: Mapping[str, float]) -> Doubles:
    """Return `product over names of factors[name] ** powers[name]`, `[n]` float64, multiplied in the order of `powers`.

    `0 ** 0` is 1, so that an exponent of 0 removes its factor.

    Raises:
        InputError: If one is infinite, or NaN: a power beyond float64 times 0, or of a task's NaN.

    Source: LT4REC (arXiv 2008.09872), Eq 3.
    """
    product = np.ones(len(next(iter(factors.values()))))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # refused below; what underflows is 0
        for name, power in powers.items():
            factor = factors[name].astype(np.float64)
            product *= factor if power == 1 else factor**power
    finite = np.isfinite(product)
    if not finite.all():
        row = int(finite.argmin())
        raise InputError(f"rank score of row {row}: got {product[row]:g}, wanted a finite number")
    return product


def ranking(scores: Mapping[str, Scores], of_rows: Doubles, k: int | None) -> Ranking:
    """Return the `k` best candidates, or all."""
    order = np.argsort(-of_rows, kind="stable")[:k]
    return Ranking(order, of_rows[order], {task: of_task[order] for task, of_task in scores.items()})


def checked_k(k: int | None) -> int | None:
    """Return how many candidates are wanted.

    Raises:
        InputError: If it is no whole number from 1 on.
    """
    if k is not None and (isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1):
        raise InputError(f"k: got {shown(k)}, wanted a whole number from 1 on, or None for all")
    return None if k is None else int(k)
