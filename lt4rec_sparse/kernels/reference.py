"""Every operation in eager torch: the specification that each kernel is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lt4rec_sparse.masks import unpack_words


class DenseLayer(NamedTuple):
    """One layer of an MLP with its pruned weights as zeros: `activation(x @ weight.T + bias)`."""

    weight: Tensor  # float32
    bias: Tensor | None
    activation: str
    codes: tuple[float, int] = (0.0, 0)  # in int8: scale and zero point of the activations that enter


_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
ACTIVATIONS = {"none": lambda z: z, "relu": torch.relu, "sigmoid": torch.sigmoid}


def masked_linear(
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    bias: Tensor | None,
    starts: Sequence[int],
    lengths: Sequence[int],
    activation: str,
) -> Tensor:
    """`y_t = activation(x_t @ (weight * mask_t).T + bias)`, the tasks' rows one after another.

    `x_t` is `x[starts[t] : starts[t] + lengths[t]]`. A pruned weight contributes nothing, were it NaN.
    """
    bias = None if bias is None else bias.to(x.dtype)
    activate = ACTIVATIONS[activation]
    parts = [
        activate(F.linear(x[start : start + length], _masked(weight, mask, x.dtype), bias))
        for mask, start, length in zip(masks, starts, lengths, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def masked_linear_dgrad(
    dy: Tensor, weight: Tensor, masks: Tensor, starts: Sequence[int], lengths: Sequence[int], rows: int
) -> Tensor:
    """`dx = sum over the tasks of dy_t @ (weight * mask_t)`, each in its rows of `dx [rows, in_features]`."""
    if len(masks) == 1 and lengths[0] == rows:
        return dy @ _masked(weight, masks[0], dy.dtype)
    dx = dy.new_zeros(rows, weight.shape[1])
    for part, mask, start, length in zip(torch.split(dy, list(lengths)), masks, starts, lengths, strict=True):
        dx[start : start + length] += part @ _masked(weight, mask, dy.dtype)
    return dx


def masked_linear_wgrad(
    dy: Tensor, x: Tensor, masks: Tensor, starts: Sequence[int], lengths: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """`dW = sum over the tasks of (dy_t.T @ x_t) * mask_t`: a pruned weight receives no gradient."""
    parts = [
        _masked((part.T @ x[start : start + length]).to(dtype), mask, dtype)
        for part, mask, start, length in zip(torch.split(dy, list(lengths)), masks, starts, lengths, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _masked(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    kept = mask if mask.dtype == torch.bool else unpack_words(mask, weight.shape[1])
    # As integers: times 1 keeps every bit, times 0 clears every bit, NaN's too; a fifth of masked_fill's time on a CPU.
    weight = weight.to(dtype)
    return (weight.view(_INTEGERS[dtype]) * kept.view(torch.int8)).view(dtype)


def linear(x: Tensor, layer: DenseLayer) -> Tensor:
    """`x @ weight.T + bias` in float32."""
    return F.linear(x, layer.weight, layer.bias)


def linear_bf16(x: Tensor, layer: DenseLayer) -> Tensor:
    """The same of `x` and weights rounded to bfloat16, to nearest even; denormals are zeros; summed in float32."""
    x, weight = (t.masked_fill(t.abs() < 2.0**-126, 0).bfloat16().float() for t in (x, layer.weight))
    return F.linear(x, weight, layer.bias)


def linear_int8(x: Tensor, layer: DenseLayer, row_scale: Tensor) -> Tensor:
    """The same of `x` as codes of 0 to 255 and weights as codes of -127 to 127; the sums are exact integers.

    Product and bias round once to float64 and once to float32, where a kernel's fused multiply-add rounds once: a
    last bit that differs where the first rounding makes a tie, one time in some 2^29.
    """
    scale, zero_point = layer.codes
    codes = ((x * torch.tensor(1 / scale).to(x)).round() + zero_point).clamp(0, 255)
    weight = (layer.weight / row_scale[:, None]).round().clamp(-127, 127).masked_fill(row_scale[:, None] == 0, 0)
    sums = ((codes.double() - zero_point) @ weight.double().T).float()
    product = sums.double() * (row_scale.double() * scale).float().double()
    return (product if layer.bias is None else product + layer.bias.double()).float()


def row_scales(layers: Sequence[DenseLayer]) -> Tensor:
    """What one step of the weights' int8 codes is worth in each row, `[out_features]`: `max |weight| / 127`."""
    return torch.stack([layer.weight.abs().amax(1) for layer in layers]).amax(0) / 127


def sparse_mlp(x: Tensor, tasks: Sequence[Sequence[DenseLayer]], precision: str = "fp32") -> Tensor:
    """Each task's MLP over the same `x`, outputs side by side: `[batch, sum of out_features]`.

    In int8 the tasks count `x` alike, and their first layers, where these are of one width, share their row scales.
    """
    firsts = [layers[0] for layers in tasks]
    is_shared = len({len(layer.weight) for layer in firsts}) == 1
    outputs = []
    for layers in tasks:
        h = x
        for i, layer in enumerate(layers):
            if precision == "int8":
                z = linear_int8(h, layer, row_scales(firsts if i == 0 and is_shared else [layer]))
            else:
                z = linear_bf16(h, layer) if precision == "bf16" else linear(h, layer)
            h = ACTIVATIONS[layer.activation](z)
        outputs.append(h)
    return torch.cat(outputs, dim=1)
