"""Calibration of int8, and what a lower precision may cost and still serve.

Codes come from representative rows that run through the float32 reference: what enters a layer is counted from its
least to its greatest value, behind a ReLU therefore from 0 on. On KuaiRand-Pure (three seeds, best and last tickets,
test days) int8 with such codes changes CTR AUC by 0.00005 at most, CVR MSE by 0.024 %, a score by 0.0075; bf16 by
0.000005, 0.008 % and 0.0008. To clip the range where the mean squared error of the codes is least was tried and left:
of hidden activations it changed nothing, of inputs it raised AUC by 0.0001 and MSE by 0.004 % on average, and the
largest change of a score to 0.014.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lt4rec_sparse import ops
from lt4rec_sparse.ops import Codes

if TYPE_CHECKING:
    from lt4rec_sparse.nn.sparse import SparseMLP

# What a precision may lose against fp32: AUC absolutely, MSE relatively. On KuaiRand-Pure the standard deviation over
# seeds is 0.0005 to 0.0011 of the AUC and 0.3 to 0.5 % of the MSE, and int8 changes a tenth of the tolerance: what
# passes is lost in the noise of training, and what fails is broken rather than rounded.
TOLERANCE = {"auc": 0.0005, "mse": 0.002}


def is_tolerable(metric: str, value: float, fp32: float) -> bool:
    """Whether a metric in some precision is as good as in fp32, within `TOLERANCE`; a NaN never is.

    Example:
        >>> is_tolerable("auc", 0.7299, fp32=0.7302), is_tolerable("mse", 0.0972, fp32=0.0969)
        (True, False)

    Args:
        metric: "auc" or "mse".
        value: In the precision that is judged.
        fp32: Of the same model in fp32, over the same rows.
    """
    if metric == "auc":
        return value >= fp32 - TOLERANCE["auc"]
    return value <= fp32 * (1 + TOLERANCE[metric])


@torch.inference_mode()
def calibrate(mlp: SparseMLP, x: Tensor) -> dict[str, tuple[Codes, ...]]:
    """Find how int8 counts the activations that enter each layer: `code = round(x / scale) + zero_point`.

    The codes 0 to 255 span what enters the layer over all rows, and always 0. All tasks count `x` alike.

    Example:
        >>> from lt4rec_sparse.nn import MaskedMLP, freeze
        >>> mlp = freeze(MaskedMLP(2, hidden=(4,), tasks=("ctr", "cvr")))
        >>> calibrate(mlp, torch.tensor([[-0.5, 0.0], [3.484375, 1.0]]))["ctr"][0]
        Codes(scale=0.015625, zero_point=32)

    Args:
        mlp: The frozen MLP, in any precision.
        x: `[rows, in_features]`, representative inputs: some thousand rows of the training days, not of the test.

    Returns:
        Task name -> codes of each layer, the head's last.

    Raises:
        ValueError: If there is no row, or what enters a layer is not finite.
    """
    if x.dim() != 2 or x.shape[0] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [rows, {mlp.in_features}], at least one row")
    found = {}
    for task, path in zip(mlp.tasks, mlp._paths(), strict=True):
        inputs = ops.layer_inputs(x, path)
        found[task] = tuple(_span(h, f"layer {i} of {task}") for i, h in enumerate(inputs))
    return found


def check_codes(codes: Mapping[str, Sequence[Codes]], tasks: Sequence[str], layers: int) -> None:
    """Check that codes are whole and can be computed with in float32.

    Raises:
        ValueError: If a task or a layer is missing or unknown, a scale or its inverse is no float32 above 0, or a zero
            point is not within 0 to 255, or tasks count `x` differently.
    """
    if set(codes) != set(tasks):
        raise ValueError(f"codes: got tasks {list(codes)}, wanted {list(tasks)}")
    for task, of_task in codes.items():
        if len(of_task) != layers:
            raise ValueError(f"codes of {task}: got {len(of_task)} layers, wanted {layers}")
        for i, (scale, zero_point) in enumerate(of_task):
            if not 2.0**-126 <= scale <= 2.0**126:
                raise ValueError(f"codes of {task}, layer {i}: got scale {scale}, wanted above 0 and finite in float32")
            if not isinstance(zero_point, int) or not 0 <= zero_point <= 255:
                raise ValueError(f"codes of {task}, layer {i}: got zero point {zero_point}, wanted 0 to 255")
    if len({of_task[0] for of_task in codes.values()}) > 1:
        raise ValueError(f"codes: got {[x[0] for x in codes.values()]} for x, wanted the same for all tasks")


def _span(h: Tensor, where: str) -> Codes:
    """Return the codes that span `h` and 0."""
    low, high = min(h.min().item(), 0.0), max(h.max().item(), 0.0)
    if not math.isfinite(high - low):
        raise ValueError(f"x: got rows for which NaN or Inf enters {where}, wanted numbers")
    # What is as good as 0 for all rows may still be something for others, so it is not spread over all codes.
    scale = (high - low if high - low > 1e-30 else 1.0) / 255
    return Codes(scale, round(-low / scale))
