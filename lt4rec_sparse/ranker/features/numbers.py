"""From raw numbers and vectors of them to inputs of a network: standardised by what the training days held.

All of it is sums, products and quotients of float64, each rounded once as IEEE 754 says, then one rounding to float32:
training and serving agree to the bit on every machine. A library's logarithm would differ in its last bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features.schema import Column
from lt4rec_sparse.ranker.features.tables import Array, checked_array

Floats = NDArray[np.float64]
LARGEST = float(np.finfo(np.float32).max)
LN2 = math.log(2)
# In [sqrt(1/2), sqrt(2)) the first term that is left out is below 2^-60 of the sum.
TERMS = 11


class Scale:
    """Standardise each place of a column: `z = (f(v) - mean) / std`, computed in float64 and rounded to float32.

    `f(v)` is `v`, or of a column with `encoding = "log"` `signed_log(v)`. A missing value has z = 0 in every place;
    where training days have missing ones, one more input says whether it is missing: 1 or 0.

    Args:
        column: A dense or a vector column; its name, size and encoding count.
        mean: `[size]`, float64, finite.
        std: `[size]`, float64, finite and above 0.
        has_indicator: Whether there is an input for missing values.
    """

    def __init__(self, column: Column, mean: Floats, std: Floats, has_indicator: bool) -> None:
        self.column, self.mean, self.std, self.has_indicator = column, mean, std, has_indicator

    @property
    def width(self) -> int:
        """Number of inputs."""
        return len(self.mean) + self.has_indicator

    def inputs(self, values: Floats, present: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return `[batch, width]` of the values that are present, `[n, size]`, and which rows have one, `[batch]`.

        Raises:
            InputError: If a value, or what it becomes, is beyond float32.
        """
        found = np.zeros((len(present), self.width), np.float32)
        with np.errstate(over="ignore"):  # refused below
            scaled = ((_checked(self.column, values) - self.mean) / self.std).astype(np.float32)
        far = ~np.isfinite(scaled)
        if far.any():
            got = f"{values[far][0]:g}, which is too far from the values of the training days"
            raise InputError(f"column {self.column.name!r}: got {got}, wanted one that float32 holds once standardised")
        found[present, : len(self.mean)] = scaled
        if self.has_indicator:
            found[:, -1] = ~present
        return found

    def to_arrays(self) -> dict[str, Array]:
        """Return `mean` and `std`, float64 `[size]`, and `missing`, uint8 `[1]`: 1 if there is an indicator."""
        return {"mean": self.mean, "std": self.std, "missing": np.array([self.has_indicator], np.uint8)}

    @classmethod
    def from_arrays(cls, column: Column, arrays: Mapping[str, Array]) -> Scale:
        """Read `to_arrays` back.

        Raises:
            ValueError: If an array is absent or malformed.
        """
        mean, std = checked_array(arrays, "mean", np.float64), checked_array(arrays, "std", np.float64)
        missing, size = checked_array(arrays, "missing", np.uint8), column.places
        if len(mean) != size or len(std) != size:
            raise ValueError(f"mean and std: got {len(mean)} and {len(std)} numbers, wanted {size} each")
        if not np.isfinite(mean).all() or not (np.isfinite(std) & (std > 0)).all():
            raise ValueError("mean and std: got a number out of range, wanted finite ones, of std above 0")
        if missing.tolist() not in ([0], [1]):
            raise ValueError(f"missing: got {missing.tolist()[:4]}, wanted [0] or [1]")
        return cls(column, mean, std, bool(missing[0]))


class ScaleFit:
    """Mean and standard deviation (of all values: divided by n) of a stream; those of one value are it and 1.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self, column: Column) -> None:
        size = column.places
        self._column, self._count, self._has_gaps = column, 0, False
        self._mean, self._squares = np.zeros(size), np.zeros(size)
        self._low, self._high = np.full(size, np.inf), np.full(size, -np.inf)

    def add(self, values: Floats, present: NDArray[np.bool_]) -> None:
        """Count one chunk, in the form of `Scale.inputs`.

        Raises:
            InputError: If a value is beyond float32.
        """
        self._has_gaps |= not present.all()
        if not len(values):
            return
        found = _checked(self._column, values)
        self._low, self._high = np.minimum(self._low, found.min(0)), np.maximum(self._high, found.max(0))
        mean, count, before = found.mean(0), len(found), self._count
        self._count += count
        step = mean - self._mean
        self._squares += ((found - mean) ** 2).sum(0) + step**2 * (before * count / self._count)
        self._mean = self._mean + step * (count / self._count)

    def scale(self) -> Scale:
        """Return what standardises as the stream so far says."""
        if not self._count:
            return Scale(self._column, self._mean, np.ones_like(self._mean), self._has_gaps)
        std = np.sqrt(self._squares / self._count)
        # The mean of equal values is rounded: their deviation is not 0 but noise, which a quotient would blow up.
        is_one = (self._low == self._high) | (std == 0)
        return Scale(self._column, np.where(is_one, self._low, self._mean), np.where(is_one, 1.0, std), self._has_gaps)


def signed_log(values: Floats) -> Floats:
    """Return `sign(v) ln(1 + |v|)`, float64, within a few roundings, and the same bits everywhere.

    With `u = 1 + |v|` and `c = (|v| - (u - 1)) / u`, what rounding took from it, `u = 2^e m`, m from sqrt(1/2) on and
    below sqrt(2), and `s = (m - 1) / (m + 1)`: `ln = e ln2 + (2 s (1 + s^2/3 + s^4/5 + ... + s^20/21) + c)`, the series
    summed from its last term on (Horner).

    Args:
        values: Finite, of any shape.
    """
    size = np.abs(values)
    u = 1.0 + size
    c = (size - (u - 1.0)) / u
    m, e = np.frexp(u)
    below = m < math.sqrt(0.5)
    m, e = np.where(below, 2.0 * m, m), e - below
    s = (m - 1.0) / (m + 1.0)
    square, series = s * s, np.zeros_like(s)
    for term in reversed(range(TERMS)):
        series = series * square + 1.0 / (2 * term + 1)
    logarithm: Floats = np.copysign(e * LN2 + (2.0 * s * series + c), values)
    return logarithm


def _checked(column: Column, values: Floats) -> Floats:
    """Return `f` of values that float32 holds."""
    far = ~(np.abs(values) <= LARGEST)
    if far.any():
        got = f"{values[far][0]:g}"
        raise InputError(f"column {column.name!r}: got {got}, wanted a finite number that float32 holds")
    return signed_log(values) if column.encoding == "log" else values
