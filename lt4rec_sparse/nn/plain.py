"""Plain torch layers and matrices that somebody else pruned: the weight and bias they compute with, what they keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from lt4rec_sparse.formats import VALUE_DTYPES, format_for
from lt4rec_sparse.network import SLOPED, SLOPES, FrozenNetwork, Slope, SparseLayer
from lt4rec_sparse.nn import dice
from lt4rec_sparse.nn.reading import computes_as, hook_of, pruned

# What the engine computes in the call of the layer before it.
FUSED: dict[type[nn.Module], Callable[[Any], tuple[str, Slope]]] = {
    nn.ReLU: lambda module: ("relu", 0.0),
    nn.Sigmoid: lambda module: ("sigmoid", 0.0),
    nn.Tanh: lambda module: ("tanh", 0.0),
    nn.SiLU: lambda module: ("silu", 0.0),
    nn.GELU: lambda module: ("gelu" if module.approximate == "none" else "gelu_tanh", 0.0),
    nn.Hardswish: lambda module: ("hardswish", 0.0),
    nn.LeakyReLU: lambda module: ("leaky_relu", float(module.negative_slope)),
    nn.ELU: lambda module: ("elu", float(module.alpha)),
    nn.PReLU: lambda module: ("leaky_relu", _slopes_of(module)),
    dice.Dice: lambda module: ("dice", dice.constants_of(module)),
}
# And back: a module that computes the same.
MODULES: dict[str, Callable[[Any], nn.Module]] = {
    "relu": lambda slope: nn.ReLU(),
    "sigmoid": lambda slope: nn.Sigmoid(),
    "tanh": lambda slope: nn.Tanh(),
    "silu": lambda slope: nn.SiLU(),
    "gelu": lambda slope: nn.GELU(),
    "gelu_tanh": lambda slope: nn.GELU(approximate="tanh"),
    "hardswish": lambda slope: nn.Hardswish(),
    "leaky_relu": lambda slope: _prelu(slope) if isinstance(slope, Tensor) else nn.LeakyReLU(slope),
    "elu": nn.ELU,
    "dice": lambda slope: dice.of_constants(slope),
}
COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class PlainLayer(NamedTuple):
    """`activation(x @ weight.T + bias)`, and what of the weight is kept; all on the CPU, without a graph."""

    weight: Tensor  # [out_features, in_features], zeros where the mask prunes
    mask: Tensor  # bool, of the same shape
    bias: Tensor | None  # [out_features]
    activation: str = "none"
    slope: Slope = 0.0  # as a layer of FrozenNetwork has it


def of_tensors(weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> PlainLayer:
    """Return a layer of a dense weight; without a mask what is zero is pruned.

    Raises:
        TypeError: If something is not a tensor.
        ValueError: If a shape, a dtype or a device is not what a layer can have.
    """
    for name, part in (("weight", weight), ("bias", bias), ("mask", mask)):
        if part is not None:
            _check_tensor(name, part)
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted [out_features, in_features]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, wanted ({weight.shape[0]},)")
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and part.dtype not in VALUE_DTYPES:
            raise ValueError(f"{name}: got {part.dtype}, wanted float32, float16 or bfloat16")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
        got = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"mask: got {got}, wanted torch.bool {tuple(weight.shape)}, True = kept")
    values, kept = weight.detach().cpu(), None if mask is None else mask.detach().cpu()
    if kept is None:
        kept = values != 0
    own = None if bias is None else bias.detach().cpu().clone()
    return PlainLayer(torch.where(kept, values, torch.zeros((), dtype=values.dtype)), kept, own)


def of_matrix(matrix: Any, bias: Tensor | None = None) -> PlainLayer:
    """Return a layer of a sparse matrix: every entry that it stores is kept, zeros among them.

    Args:
        matrix: `[out_features, in_features]`: a torch CSR, CSC, BSR, BSC or COO tensor, or scipy's (anything with
            `tocoo()`). Entries of one place are added, as both libraries read them.
        bias: `[out_features]`, or None.

    Raises:
        TypeError: If it is no sparse matrix.
        ValueError: If a shape or a dtype is not what a layer can have.
    """
    if isinstance(matrix, Tensor) and matrix.layout in (torch.sparse_coo, *COMPRESSED):
        kept = torch.zeros(matrix.shape, dtype=torch.bool)
        if matrix.layout == torch.sparse_coo:
            coo = matrix.detach().cpu().coalesce()
            kept[tuple(coo.indices())] = True
            return of_tensors(coo.to_dense(), bias, kept)
        stored = matrix.detach().cpu()
        ones = torch.ones_like(stored.values(), dtype=torch.float32)
        made = torch.sparse_compressed_tensor(
            *_indices(stored), ones, stored.shape, layout=stored.layout, check_invariants=True
        )
        kept = made.to_dense() != 0
        return of_tensors(stored.to_dense(), bias, kept)
    if hasattr(matrix, "tocoo") and len(getattr(matrix, "shape", ())) == 2:
        coo = matrix.tocoo()
        places = torch.stack([torch.as_tensor(part).long() for part in (coo.row, coo.col)])
        return of_matrix(
            torch.sparse_coo_tensor(places, torch.as_tensor(coo.data), coo.shape, check_invariants=True), bias
        )
    kind = matrix.layout if isinstance(matrix, Tensor) else type(matrix).__name__
    raise TypeError(f"matrix: got {kind}, wanted a sparse tensor of torch or a sparse matrix of scipy")


def obstacle(linear: nn.Module) -> str | None:
    """Return why a layer cannot be compressed, or None if it is a plain `nn.Linear` that can."""
    if not computes_as(linear, nn.Linear):
        return f"got a {type(linear).__name__}, wanted an nn.Linear without a forward of its own"
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return "got the output of an nn.MultiheadAttention, which reads its weight, wanted a layer that is called"
    if isinstance(linear.weight, UninitializedParameter):
        return f"got a {type(linear).__name__} that has no weight yet, wanted one that has run"
    if reason := hook_of(linear):
        return reason
    weight, bias = (pruned(linear, part) for part in ("weight", "bias"))
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and (part.is_meta or part.is_quantized or part.dtype not in VALUE_DTYPES):
            return f"got a {name} of {part.dtype} on {part.device}, wanted float32, float16 or bfloat16 with values"
        if part is not None and (part.layout != torch.strided or not part.numel()):
            return f"got a {name} of {part.layout}, shape {tuple(part.shape)}, wanted a dense one with values"
    return None


def of_linear(linear: nn.Module, name: str = "linear") -> PlainLayer:
    """Return what an `nn.Linear` computes with.

    What `torch.nn.utils.prune` pruned is pruned, and all else is kept; without it, what is zero is pruned.
    Parametrisations are computed.

    Raises:
        ValueError: If it is no `nn.Linear` with the forward of one, has hooks, which nothing would call, or its weight
            is not there yet, or on no device.
    """
    if reason := obstacle(linear):
        raise ValueError(f"{name}: {reason}")
    mask = linear._buffers.get("weight_mask")  # of torch.nn.utils.prune
    weight, bias = (pruned(linear, part) for part in ("weight", "bias"))
    assert weight is not None
    try:
        return of_tensors(weight, bias, None if mask is None else mask != 0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def is_activation(module: nn.Module) -> bool:
    """Tell whether a module computes as one of `FUSED`, or is called Dice, of which every library has one."""
    return dice.is_called_so(module) or (type(module) in FUSED and computes_as(module, type(module)))


def with_activation(layer: PlainLayer, activation: str | nn.Module, name: str = "activation") -> PlainLayer:
    """Return the layer with an activation: one of `network.ACTIVATIONS` without a slope, or a module (`is_activation`).

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(activation, str):
        if activation in (*SLOPED, *SLOPES):
            wanted = "nn.LeakyReLU, nn.ELU or a Dice, which have one"
            raise ValueError(f"{name}: got {activation!r} without a slope, wanted {wanted}")
        return layer._replace(activation=activation)
    if not is_activation(activation):
        wanted = ", ".join(kind.__name__ for kind in FUSED)
        raise ValueError(f"{name}: got a {type(activation).__name__}, wanted one of {wanted}")
    if dice.is_called_so(activation) and (reason := dice.obstacle(activation)):
        raise ValueError(f"{name}: {reason}")
    kind, slope = FUSED[dice.Dice if dice.is_called_so(activation) else type(activation)](activation)
    if isinstance(slope, Tensor) and slope.shape[-1] != len(layer.weight):
        got = f"a {type(activation).__name__} with {slope.shape[-1]} slopes"
        least = "1 or " if isinstance(activation, nn.PReLU) else ""
        raise ValueError(f"{name}: got {got}, wanted {least}{len(layer.weight)}")
    if not torch.as_tensor(slope).isfinite().all():
        raise ValueError(f"{name}: got a {type(activation).__name__} with NaN or infinity in it, wanted finite numbers")
    return layer._replace(activation=kind, slope=slope)


def network_of(layers: Sequence[PlainLayer], task: str = "task") -> FrozenNetwork:
    """Return layers one after the other as a frozen network of one task, in the format that all masks allow."""
    kind = format_for(layer.mask for layer in layers)
    return FrozenNetwork(
        tuple(
            SparseLayer(kind.from_dense(layer.weight, {task: layer.mask}), layer.bias, layer.activation, layer.slope)
            for layer in layers
        )
    )


def modules_of(network: FrozenNetwork, task: str) -> list[nn.Module]:
    """Return the plain modules of one task, one after the other: linear layers with exactly its weights, activations.

    Parameters are copies, in the dtype that the network keeps its weights in; those of Dice in float32.

    Raises:
        ValueError: If there is no such task.
    """
    modules: list[nn.Module] = []
    for i in range(network.depth):
        layer = network.layer(i, task)
        n, k = layer.weight.shape
        linear = nn.Linear(k, n, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.weight.to(network.dtype, copy=True))
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.to(network.dtype, copy=True))
        modules.append(linear)
        if layer.activation != "none":
            activation = MODULES[layer.activation](layer.slope)
            # torch takes PReLU's slopes in the dtype of x alone, and a norm's statistics in float32 too.
            modules.append(activation if isinstance(activation, dice.Dice) else activation.to(network.dtype))
    return modules


def _slopes_of(prelu: nn.PReLU) -> Slope:
    weight = pruned(prelu, "weight")
    assert weight is not None
    weight = weight.detach().cpu()
    return float(weight) if weight.numel() == 1 else weight.float().clone()


def _prelu(slopes: Tensor) -> nn.PReLU:
    module = nn.PReLU(len(slopes))
    module.weight = nn.Parameter(slopes.clone())
    return module


def _check_tensor(name: str, part: Any) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(f"{name}: got a {type(part).__name__}, wanted a tensor")
    if part.layout != torch.strided or part.is_quantized or part.is_meta:
        got = "on the meta device" if part.is_meta else f"quantised {part.dtype}" if part.is_quantized else part.layout
        raise ValueError(f"{name}: got a tensor that is {got}, wanted a dense one with values")


def _indices(matrix: Tensor) -> tuple[Tensor, Tensor]:
    by_rows = matrix.layout in (torch.sparse_csr, torch.sparse_bsr)
    return (matrix.crow_indices(), matrix.col_indices()) if by_rows else (matrix.ccol_indices(), matrix.row_indices())
