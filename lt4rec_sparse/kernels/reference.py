"""Every operation in eager torch: the specification that each kernel is held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lt4rec_sparse.kernels.autocast import without_autocast
from lt4rec_sparse.kernels.training import Layer as TrainingLayer
from lt4rec_sparse.masks import unpack_words
from lt4rec_sparse.network import ACTIVATIONS, DenseLayer, FrozenNetwork, QuantizationParameters

_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def masked_linear(x: Tensor, weight: Tensor, masks: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`y[t] = activation(x[t] @ (weight * mask_t).T + bias)`; of an `x` of one task, every task reads it.

    A pruned weight contributes nothing, even if it is NaN.
    """
    bias = None if bias is None else bias.to(x.dtype)
    x = x.expand(len(masks), -1, -1)
    sums = [F.linear(rows, _masked(weight, mask, x.dtype), bias) for rows, mask in zip(x, masks, strict=True)]
    return _stacked([ACTIVATIONS[activation](z, 0.0) for z in sums])


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


def dense_weight(layer: TrainingLayer) -> Tensor:
    """Return a training layer's weight as `[out_features, in_features]`, with zeros where it is pruned."""
    pattern, values = layer.pattern, layer.values
    shape = pattern.row_begins.shape[1], pattern.column_begins.shape[1]
    grid = values.new_zeros(*shape, *values.shape[1:])
    grid[_places(layer)] = values
    whole = grid if values.dim() == 1 else grid.transpose(1, 2).flatten(2).flatten(0, 1)
    return whole[: len(layer.bias), : layer.in_features]


def compressed_mlp(layers: Sequence[TrainingLayer], x: Tensor) -> list[Tensor]:
    """Return what enters each layer, `x` first, and at last what the last one yields: `relu(x @ weight.T + bias)`."""
    outputs = [x]
    for layer in layers:
        outputs.append(F.linear(outputs[-1], dense_weight(layer), layer.bias).relu())
    return outputs


def compressed_mlp_backward(
    layers: Sequence[TrainingLayer], x: Tensor, dh: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the gradients of x, of each layer's values, and of each layer's bias: those of `dz = dh where h > 0`."""
    *inputs, h = compressed_mlp(layers, x)
    values, biases = [], []
    for layer, x_of_layer in zip(reversed(layers), reversed(inputs), strict=True):
        dz = dh.masked_fill(h <= 0, 0)
        values.append(kept_of(layer, dz.T @ x_of_layer))
        biases.append(dz.sum(0))
        dh, h = dz @ dense_weight(layer), x_of_layer
    return dh, values[::-1], biases[::-1]


def _places(layer: TrainingLayer) -> tuple[Tensor, Tensor]:
    begins = layer.pattern.row_begins
    rows = torch.arange(begins.shape[1]).repeat_interleave(begins[-1] - begins[0])
    return rows, layer.pattern.columns.long()


def kept_of(layer: TrainingLayer, dense: Tensor) -> Tensor:
    """Return the elements of a dense `[out_features, in_features]` where a training layer has weights."""
    if layer.values.dim() == 1:
        return dense[_places(layer)]
    high, wide = layer.values.shape[1:]
    padded = F.pad(dense, (0, -dense.shape[1] % wide, 0, -dense.shape[0] % high))
    grid = padded.view(len(padded) // high, high, -1, wide).transpose(1, 2)
    return grid[_places(layer)].contiguous()


def linear_bf16(x: Tensor, layer: DenseLayer) -> Tensor:
    """`x @ weight.T + bias` of operands rounded to bfloat16, to nearest even; denormals are zeros; float32 sums."""
    x, weight = (t.masked_fill(t.abs() < 2.0**-126, 0).bfloat16().float() for t in (x, layer.weight))
    return F.linear(x, weight, layer.bias)


def linear_int8(x: Tensor, layer: DenseLayer, parameters: QuantizationParameters, row_scale: Tensor) -> Tensor:
    """The same of `x` quantised to 0 to 255 and weights quantised to -127 to 127; the sums are exact integers.

    Product and bias round once to float64 and once to float32, where a kernel's fused multiply-add rounds once: a
    last bit that differs where the first rounding makes a tie, one time in some 2^29.
    """
    scale, zero_point = parameters
    quantized = ((x * torch.tensor(1 / scale).to(x)).round() + zero_point).clamp(0, 255)
    weight = (layer.weight / row_scale[:, None]).round().clamp(-127, 127).masked_fill(row_scale[:, None] == 0, 0)
    sums = ((quantized.double() - zero_point) @ weight.double().T).float()
    product = sums.double() * (row_scale.double() * scale).float().double()
    return (product if layer.bias is None else product + layer.bias.double()).float()


class Executor:
    """A frozen network in dense eager torch, on any device: what every kernel is held against.

    It is as slow as dense torch, and serves where no kernel can.

    Args:
        network: The network.
        precision: "fp32", "bf16" or "int8".
        device: Where it computes: that of every `x`.
    """

    def __init__(self, network: FrozenNetwork, precision: str = "fp32", device: torch.device | str = "cpu") -> None:
        self.network, self.precision = network, precision
        self._layers = {
            task: [_moved(network.layer(i, task), device) for i in range(network.depth)] for task in network.tasks
        }

    def run(self, x: Tensor, out: Tensor) -> None:
        """Write every task's outputs for `x [rows, in_features]`, side by side, into `out [rows, outputs]`."""
        if x.dim() != 2 or x.shape[1] != self.network.in_features:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [batch, {self.network.in_features}]")
        if x.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"x: got {x.dtype} on {x.device}, wanted torch.float32 or torch.bfloat16")
        with without_autocast(x):
            y = torch.cat([self._task(x, task) for task in self.network.tasks], dim=1)
        if out.shape != y.shape or out.dtype != torch.float32:
            raise ValueError(f"out: got {out.dtype} {tuple(out.shape)}, wanted torch.float32 {tuple(y.shape)}")
        out.copy_(y)

    def inputs(self, x: Tensor, task: str) -> Iterator[Tensor]:
        """Yield what enters each layer of one task, in float32; `x` comes first."""
        h = x.float()
        for i, layer in enumerate(self._layers[task]):
            yield h
            with without_autocast(h):  # not over the yield, which would turn it off for who reads
                h = self._apply(h, layer, i, task)

    def kernel_for(self, rows: int) -> str:
        """Name what runs, whatever the number of rows."""
        return "dense torch"

    @property
    def prepacked_nbytes(self) -> dict[str, int]:
        """Layout -> bytes of what is held beside the network."""
        layers = [layer for of_task in self._layers.values() for layer in of_task]
        return {"dense": sum(part.nbytes for layer in layers for part in layer[:2] if part is not None)}

    def _task(self, x: Tensor, task: str) -> Tensor:
        h = x.float()
        for i, layer in enumerate(self._layers[task]):
            h = self._apply(h, layer, i, task)
        return h

    def _apply(self, h: Tensor, layer: DenseLayer, index: int, task: str) -> Tensor:
        if self.precision == "int8":
            assert self.network.quantization is not None
            # Tasks that share the first layer's weight have its row scales in common: the union's.
            shares = index == 0 and self.network.hidden
            tasks = self.network.tasks if shares else (task,)
            weights = [self._layers[name][index].weight for name in tasks]
            scales = row_scales(weights, self.network.is_in_blocks)
            z = linear_int8(h, layer, self.network.quantization[task][index], scales)
        else:
            z = linear_bf16(h, layer) if self.precision == "bf16" else F.linear(h, layer.weight, layer.bias)
        return layer.activate(z)


def _moved(layer: DenseLayer, device: torch.device | str) -> DenseLayer:
    weight, bias, _, slope = layer
    slope = slope.to(device) if isinstance(slope, Tensor) else slope
    return layer._replace(weight=weight.to(device), bias=None if bias is None else bias.to(device), slope=slope)


def row_scales(weights: Sequence[Tensor], in_blocks: bool = False) -> Tensor:
    """What one step of the quantised weights is worth in each row, `[out_features]`: `max |weight| / 127` over all.

    In blocks `max (|w| + |its neighbour|) / 127`, so that two neighbours add up to at most 128 steps: 255 times that
    fits 16 signed bits, in which kernels multiply pairs.
    """
    largest = torch.stack([weight.abs() for weight in weights])
    if not in_blocks:
        return largest.amax((0, 2)) / 127
    halves = F.pad(largest, (0, largest.shape[2] % 2)) / 2  # whose sums cannot overflow
    return (halves[..., ::2] + halves[..., 1::2]).amax((0, 2)) / 63.5
