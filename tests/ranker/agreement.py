"""What the second reader says a file scores, with the bound that float32 may differ from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.oracle import UNIT_ROUNDOFF, Bounded, Layer, assert_rounding, mlp_reference
from tests.ranker.reader import Reader


def bounded_scores(
    reader: Reader,
    columns: dict[str, Any],
    given: dict[str, np.ndarray] | None = None,
    operands: torch.dtype | None = None,
) -> dict[str, Bounded]:
    """Return each task's scores in float64, `[candidates, 1]`, with the bound of the same in float32.

    With `operands`, that of layers whose weights and inputs are rounded to it first.
    A field's vector is a mean of rows, each a scale times values: a sum of `terms` products. The dot product of two of
    them is a sum of `dim` products, and carries the errors of both: three sums of at most as many terms.
    """
    x, magnitudes, terms = reader.inputs(columns, given)
    rounding = 6 * (terms + 1) ** 0.5 * UNIT_ROUNDOFF[torch.float32] * magnitudes
    rounding[:, len(reader.fields) * reader.meta["dim"] :] *= 3
    rounding[:, x.shape[1] - reader.raw_numbers(columns, len(x)).shape[1] :] = 0  # numbers are exact
    inputs = Bounded(torch.from_numpy(x), torch.from_numpy(rounding))
    scores = {}
    for task, of_task in reader.score(columns, given).items():
        layers = [
            Layer(torch.from_numpy(weight), torch.from_numpy(bias), activation, torch.as_tensor(slope))
            if activation in ("leaky_relu", "dice")
            else Layer(torch.from_numpy(weight), torch.from_numpy(bias), activation, float(slope))
            for weight, bias, activation, slope in reader.layers(task)
        ]
        reference = mlp_reference(inputs, layers, operands=operands)
        scores[task] = Bounded(
            torch.from_numpy(of_task)[:, None] if operands is None else reference.value, reference.bound
        )
    return scores


def assert_agrees(scores: dict[str, np.ndarray], wanted: dict[str, Bounded]) -> None:
    """Fail unless a ranker's scores are those of the second reader, within rounding."""
    assert scores.keys() == wanted.keys()
    for task, of_task in scores.items():
        assert_rounding(torch.from_numpy(of_task)[:, None], wanted[task])
