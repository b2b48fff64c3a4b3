"""The frozen network: what `freeze` makes, artefacts carry and every backend prepacks from. A value, no module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lt4rec_sparse.formats import VALUE_DTYPES, BlockWeight, CompressedWeight

PRECISIONS = ("fp32", "bf16", "int8")

Slope = float | Tensor  # a tensor: numbers for each output, which its last dimension counts (`slopes_shape`)

# The one table of activations: the position of a name is its code in csrc/engine.h. Each takes z, which it may
# overwrite, and the layer's slope, which those in `SLOPED` use.
ACTIVATIONS: Mapping[str, Callable[[Tensor, Any], Tensor]] = {
    "none": lambda z, slope: z,
    "relu": lambda z, slope: torch.relu_(z),
    "sigmoid": lambda z, slope: torch.sigmoid_(z),
    "tanh": lambda z, slope: torch.tanh_(z),
    "silu": lambda z, slope: F.silu(z, inplace=True),
    "gelu": lambda z, slope: F.gelu(z),
    "gelu_tanh": lambda z, slope: F.gelu(z, approximate="tanh"),
    "hardswish": lambda z, slope: F.hardswish(z, inplace=True),
    "leaky_relu": lambda z, slope: (
        F.prelu(z, slope.to(z.dtype)) if isinstance(slope, Tensor) else F.leaky_relu_(z, slope)
    ),
    "elu": lambda z, slope: F.elu_(z, slope),
    "dice": lambda z, slope: _dice(z, *slope),
}
SLOPED = ("leaky_relu", "elu")  # a number, below 0: z * slope, and slope * (exp(z) - 1)
# A tensor: of leaky_relu, in place of the number, a slope for each output; of dice always, scale, shift and alpha.
SLOPES: Mapping[str, tuple[int, ...]] = {"leaky_relu": (), "dice": (3,)}


def slopes_shape(activation: str, out_features: int) -> tuple[int, ...] | None:
    """Return the shape of a slope that is a tensor, `[..., out_features]`; None if the activation has none."""
    return (*SLOPES[activation], out_features) if activation in SLOPES else None


def _dice(z: Tensor, scale: Tensor, shift: Tensor, alpha: Tensor) -> Tensor:
    # In float32 at least, as the constants are, and rounded once.
    return (z * (alpha + (1 - alpha) * torch.sigmoid(z * scale + shift))).to(z.dtype)


class QuantizationParameters(NamedTuple):
    """How int8 represents the activations that enter a layer: `q = round(x / scale) + zero_point`, within 0 to 255."""

    scale: float  # above 0
    zero_point: int  # 0 to 255


class SparseLayer(NamedTuple):
    """One layer for all tasks: `activation(x @ (weight * mask_task).T + bias)`."""

    weight: CompressedWeight
    bias: Tensor | None  # [out_features], float
    activation: str
    slope: Slope = 0.0  # of activations in SLOPED a number, of those in SLOPES a float32 tensor


class DenseLayer(NamedTuple):
    """One layer of one task: `activation(x @ weight.T + bias)`."""

    weight: Tensor  # [out_features, in_features], float
    bias: Tensor | None
    activation: str
    slope: Slope = 0.0

    def activate(self, z: Tensor) -> Tensor:
        """Apply the activation; `z` may be overwritten."""
        return ACTIVATIONS[self.activation](z, self.slope)


@dataclass(frozen=True, eq=False)
class FrozenNetwork:
    """Every task's MLP over one `x`: shared hidden layers, read through the task's mask, and a dense head per task.

    Task `t` computes `h = act(h @ (W_i * mask_i,t).T + b_i)` layer by layer from `x`, then its head. Without heads the
    last hidden layer is every task's output, as in a single masked linear layer. Layers are counted from 0; the heads
    are the last.

    Args:
        hidden: The shared layers, input first; all with the same tasks in the same order.
        heads: Task name -> its head, in the order of the outputs. Empty: the last hidden layer gives the outputs.
        quantization: Task name -> quantisation parameters of the input of each layer, the head's last; `x` has the
            same for all tasks. None where the network is not calibrated for int8.

    Raises:
        ValueError: If widths do not chain, tasks differ, heads differ in width, an activation is unknown, or the
            quantisation parameters do not fit.
    """

    hidden: tuple[SparseLayer, ...]
    heads: Mapping[str, DenseLayer] = field(default_factory=dict)
    quantization: Mapping[str, tuple[QuantizationParameters, ...]] | None = None

    def __post_init__(self) -> None:
        if not self.hidden and not self.heads:
            raise ValueError("network: got no layer, wanted at least one")
        width = self.in_features
        for i, layer in enumerate(self.hidden):
            if layer.weight.shape[1] != width:
                raise ValueError(f"layer {i}: got in_features {layer.weight.shape[1]}, wanted {width}")
            if layer.weight.tasks != self.tasks:
                raise ValueError(f"layer {i}: got tasks {layer.weight.tasks}, wanted {self.tasks}")
            _check_layer(f"layer {i}", layer.weight.shape[0], layer)
            width = layer.weight.shape[0]
        for task, head in self.heads.items():
            if head.weight.dim() != 2 or head.weight.shape[1] != width:
                got = tuple(head.weight.shape)
                raise ValueError(f"head of {task}: got a weight of shape {got}, wanted [out_features, {width}]")
            _check_layer(f"head of {task}", head.weight.shape[0], head)
        widths = sorted({head.weight.shape[0] for head in self.heads.values()})
        if len(widths) > 1:
            raise ValueError(f"heads: got out_features {widths}, wanted the same for every task")
        if self.quantization is not None:
            check_quantization(self.quantization, self.tasks, self.depth)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in the order of the outputs."""
        return tuple(self.heads) or self.hidden[0].weight.tasks

    @property
    def in_features(self) -> int:
        """Width of `x`."""
        return int(self.hidden[0].weight.shape[1] if self.hidden else next(iter(self.heads.values())).weight.shape[1])

    @property
    def depth(self) -> int:
        """How many layers a task runs, the head among them."""
        return len(self.hidden) + bool(self.heads)

    @property
    def widths(self) -> tuple[int, ...]:
        """`out_features` of each layer, the heads' last."""
        heads = [int(head.weight.shape[0]) for head in self.heads.values()][:1]
        return (*(layer.weight.shape[0] for layer in self.hidden), *heads)

    @property
    def activations(self) -> frozenset[str]:
        """Which activations its layers end in."""
        hidden, heads = self.hidden, self.heads.values()
        return frozenset([*(layer.activation for layer in hidden), *(head.activation for head in heads)])

    @property
    def is_in_blocks(self) -> bool:
        """Whether all hidden layers are kept in blocks of 16 x 4, which kernels take as they are."""
        return all(isinstance(layer.weight, BlockWeight) for layer in self.hidden) and bool(self.hidden)

    @property
    def outputs(self) -> int:
        """Width of the result: every task's outputs side by side."""
        return len(self.tasks) * self.widths[-1]

    def layer(self, index: int, task: str) -> DenseLayer:
        """Return layer `index` as `task` sees it: dense float32, exact zeros where its mask prunes.

        Raises:
            ValueError: If there is no such task.
        """
        if index == len(self.hidden) and self.heads:
            head = self.heads[self._known(task)]
            return head._replace(weight=head.weight.detach().float(), bias=_float(head.bias))
        layer = self.hidden[index]
        weight = layer.weight.to_dense(self._known(task)).float()
        return DenseLayer(weight, _float(layer.bias), layer.activation, layer.slope)

    def mask(self, index: int, task: str) -> Tensor:
        """Return what layer `index` keeps for `task`: bool `[out_features, in_features]`; a head keeps everything."""
        if index == len(self.hidden) and self.heads:
            return torch.ones_like(self.heads[self._known(task)].weight, dtype=torch.bool)
        return self.hidden[index].weight.mask(self._known(task))

    def span(self, first: int, last: int, tasks: Sequence[str] | None = None) -> FrozenNetwork:
        """Return layers `first` to `last`, both included, as a network of their own, for all tasks or some of them."""
        names = self.tasks if tasks is None else tuple(self._known(task) for task in tasks)
        layers = self.hidden[first : last + 1]
        if names != self.tasks:
            layers = tuple(layer._replace(weight=layer.weight.select(names)) for layer in layers)
        heads = {task: self.heads[task] for task in names} if self.heads and last == len(self.hidden) else {}
        quantization = self.quantization and {task: self.quantization[task][first : last + 1] for task in names}
        return FrozenNetwork(layers, heads, quantization)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are kept in."""
        return self.hidden[0].weight.values.dtype if self.hidden else next(iter(self.heads.values())).weight.dtype

    def to(self, dtype: torch.dtype) -> FrozenNetwork:
        """Return the network with weights and biases rounded to a dtype, float32, float16 or bfloat16.

        Raises:
            ValueError: If it is none of these, or a weight is larger than the dtype has numbers for.
        """
        if dtype not in VALUE_DTYPES:
            raise ValueError(f"dtype: got {dtype}, wanted one of {', '.join(map(str, VALUE_DTYPES))}")
        hidden = (
            layer._replace(
                weight=replace(layer.weight, values=_rounded(layer.weight.values, dtype)),
                bias=None if layer.bias is None else _rounded(layer.bias, dtype),
            )
            for layer in self.hidden
        )
        heads = {
            task: head._replace(
                weight=_rounded(head.weight, dtype), bias=None if head.bias is None else _rounded(head.bias, dtype)
            )
            for task, head in self.heads.items()
        }
        return replace(self, hidden=tuple(hidden), heads=heads)

    def with_quantization(self, quantization: Mapping[str, Sequence[QuantizationParameters]] | None) -> FrozenNetwork:
        """Return the same layers with other quantisation parameters."""
        copied = None if quantization is None else {task: tuple(q) for task, q in quantization.items()}
        return replace(self, quantization=copied)

    @property
    def nbytes(self) -> int:
        """Bytes of all compressed weights, dense heads and biases."""
        weights: list[CompressedWeight | Tensor] = [layer.weight for layer in self.hidden]
        weights += [head.weight for head in self.heads.values()]
        layers: list[SparseLayer | DenseLayer] = [*self.hidden, *self.heads.values()]
        others = [part for layer in layers for part in (layer.bias, layer.slope)]
        return sum(part.nbytes for part in weights) + sum(part.nbytes for part in others if isinstance(part, Tensor))

    @property
    def densities(self) -> tuple[float, ...]:
        """Kept weights over all weights of each hidden layer, mean over the tasks."""
        return tuple(
            sum(layer.weight.mask(task).float().mean().item() for task in self.tasks) / len(self.tasks)
            for layer in self.hidden
        )

    def _known(self, task: str) -> str:
        if task not in self.tasks:
            raise ValueError(f"task: got {task!r}, wanted one of {', '.join(self.tasks)}")
        return task


def check_quantization(
    quantization: Mapping[str, Sequence[QuantizationParameters]], tasks: Sequence[str], depth: int
) -> None:
    """Check that quantisation parameters are complete and can be computed with in float32.

    Raises:
        ValueError: If a task or a layer is missing or unknown, a scale or its inverse is no float32 above 0, a zero
            point is not within 0 to 255, or tasks quantise `x` differently.
    """
    if set(quantization) != set(tasks):
        raise ValueError(f"quantization: got tasks {list(quantization)}, wanted {list(tasks)}")
    for task, of_task in quantization.items():
        if len(of_task) != depth:
            raise ValueError(f"quantization of {task}: got {len(of_task)} layers, wanted {depth}")
        for i, parameters in enumerate(of_task):
            check_parameters(f"quantization of {task}, layer {i}", parameters)
    if len({of_task[0] for of_task in quantization.values()}) > 1:
        got = [of_task[0] for of_task in quantization.values()]
        raise ValueError(f"quantization: got {got} for x, wanted the same for all tasks")


def check_parameters(where: str, parameters: QuantizationParameters) -> None:
    """Check the quantisation parameters of one input; messages begin with `where`.

    Raises:
        ValueError: If the scale or its inverse is no float32 above 0, or the zero point is not within 0 to 255.
    """
    scale, zero_point = parameters
    if not isinstance(scale, (int, float)) or not 2.0**-126 <= scale <= 2.0**126 or math.isnan(scale):
        raise ValueError(f"{where}: got scale {scale}, wanted above 0 and finite in float32")
    if not isinstance(zero_point, int) or not 0 <= zero_point <= 255:
        raise ValueError(f"{where}: got zero point {zero_point}, wanted 0 to 255")


def _check_layer(name: str, out_features: int, layer: SparseLayer | DenseLayer) -> None:
    if layer.bias is not None and layer.bias.shape != (out_features,):
        raise ValueError(f"{name}: got a bias of shape {tuple(layer.bias.shape)}, wanted ({out_features},)")
    if layer.activation not in ACTIVATIONS:
        raise ValueError(f"{name}: got activation {layer.activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
    if isinstance(layer.slope, Tensor):
        _check_slopes(name, out_features, layer.activation, layer.slope)
    elif layer.activation in SLOPES and layer.activation not in SLOPED:
        wanted = f"torch.float32 {slopes_shape(layer.activation, out_features)} of {layer.activation}"
        raise ValueError(f"{name}: got slope {layer.slope}, wanted finite {wanted}")
    elif not math.isfinite(layer.slope) or (layer.slope and layer.activation not in SLOPED):
        wanted = "a finite one" if layer.activation in SLOPED else f"none for {layer.activation}"
        raise ValueError(f"{name}: got slope {layer.slope}, wanted {wanted}")


def _check_slopes(name: str, out_features: int, activation: str, slopes: Tensor) -> None:
    shape = slopes_shape(activation, out_features)
    if shape is None:
        raise ValueError(f"{name}: got a slope per output of {activation}, wanted one of {' or '.join(SLOPES)} alone")
    if slopes.dtype != torch.float32 or slopes.shape != shape or not slopes.isfinite().all():
        got = f"{slopes.dtype} {tuple(slopes.shape)}"
        raise ValueError(f"{name}: got slopes {got}, wanted finite torch.float32 {shape}")


def _rounded(part: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = part.detach().to(dtype)
    if (rounded.isinf() & ~part.isinf()).any():
        wanted = f"at most {torch.finfo(dtype).max:g}, the largest number of {dtype}"
        raise ValueError(f"dtype: got a weight of {part.abs().max().item():g}, wanted {wanted}")
    return rounded


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float()
