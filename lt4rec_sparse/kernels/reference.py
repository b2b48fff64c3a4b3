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


def masked_linear(x: Tensor, weight: Tensor, masks: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`y[t] = activation(x[t] @ (weight * mask_t).T + bias)`; of an `x` of one task, every task reads it.

    A pruned weight contributes nothing, even if it is NaN.
    """
    bias = None if bias is None else bias.to(x.dtype)
    x = x.expand(len(masks), -1, -1)
    sums = [F.linear(rows, _masked(weight, mask, x.dtype), bias) for rows, mask in zip(x, masks, strict=True)]
    return _stacked([ACTIVATIONS[activation](z) for z in sums])


def masked_linear_dgrad(dy: Tensor, weight: Tensor, masks: Tensor, is_shared: bool) -> Tensor:
    """`dx[t] = dy[t] @ (weight * mask_t)`; their sum, of one task's shape, if all tasks read the same `x`."""
    dx = [rows @ _masked(weight, mask, dy.dtype) for rows, mask in zip(dy, masks, strict=True)]
    return sum(dx[1:], dx[0])[None] if is_shared else _stacked(dx)


def masked_linear_wgrad(dy: Tensor, x: Tensor, masks: Tensor, dtype: torch.dtype) -> Tensor:
    """`dW = sum over the tasks of (dy[t].T @ x[t]) * mask_t`: a pruned weight receives no gradient."""
    tasks = zip(dy, x.expand(len(masks), -1, -1), masks, strict=True)
    dw = [_masked((of_task.T @ rows).to(dtype), mask, dtype) for of_task, rows, mask in tasks]
    return torch.stack(dw).sum(0) if len(dw) > 1 else dw[0]


def _stacked(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts) if len(parts) > 1 else parts[0][None]  # without a copy


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
