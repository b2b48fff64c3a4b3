"""Nodes of an ONNX graph as modules of torch: the vocabulary that `freeze` fuses, folds and drops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from onnx import NodeProto
from torch import nn
from torch.nn.utils import prune

from lt4rec_sparse.onnx.dice import dice_of
from lt4rec_sparse.onnx.forms import activation_of
from lt4rec_sparse.onnx.graph import Array, Graph
from lt4rec_sparse.onnx.source import attribute


class Unit(NamedTuple):
    """Nodes that compute what one module does, of one value, which nothing else reads."""

    module: nn.Module
    nodes: frozenset[int]
    output: str


# Operators of one input that are a module each.
ACTIVATIONS: dict[str, Callable[[NodeProto], nn.Module | None]] = {
    "Relu": lambda node: nn.ReLU(),
    "Sigmoid": lambda node: nn.Sigmoid(),
    "Tanh": lambda node: nn.Tanh(),
    "HardSwish": lambda node: nn.Hardswish(),
    "LeakyRelu": lambda node: nn.LeakyReLU(attribute(node, "alpha", 0.01)),
    "Elu": lambda node: nn.ELU(attribute(node, "alpha", 1.0)),
    "Gelu": lambda node: nn.GELU(attribute(node, "approximate", b"none").decode()),
    "Swish": lambda node: nn.SiLU() if attribute(node, "alpha", 1.0) == 1.0 else None,
    "Identity": lambda node: nn.Identity(),
}


def unit_at(graph: Graph, value: str) -> Unit | None:
    """Return the unit that reads a value, if all uses of the value are in it; else None."""
    uses = graph.uses(value)
    if value in graph.outputs or not uses:
        return None
    node = graph.nodes[uses[0]]
    if len(uses) == 1 and node.domain in ("", "ai.onnx") and node.input and node.input[0] == value:
        if node.op_type in ("Gemm", "MatMul"):
            return _linear(graph, uses[0])
        module = _module(graph, node)
        if module is not None and not any(graph.uses(name) or name in graph.outputs for name in node.output[1:]):
            return Unit(module, frozenset(uses), node.output[0])
    found = dice_of(graph, value) or activation_of(graph, value)
    return None if found is None else Unit(*found)


def linears_at(graph: Graph, value: str) -> list[Unit]:
    """Return the linear layers that read a value, which others may read too."""
    found = [
        _linear(graph, i)
        for i in graph.uses(value)
        if graph.nodes[i].op_type in ("Gemm", "MatMul") and graph.nodes[i].input[0] == value
    ]
    return [unit for unit in found if unit is not None]


def _module(graph: Graph, node: NodeProto) -> nn.Module | None:
    if node.op_type in ACTIVATIONS:
        return ACTIVATIONS[node.op_type](node)
    if node.op_type == "PRelu":
        slope = graph.constant(node.input[1])
        if slope is None or slope.shape[-1:] not in ((), (slope.size,)):  # one for all, or one per output
            return None
        if not _has_rank(graph, node.input[0], slope.ndim):
            return None
        prelu = nn.PReLU(slope.size)
        prelu.weight.data = torch.tensor(slope.reshape(-1), dtype=torch.float32)
        return prelu
    if node.op_type == "Dropout" and not _is_training(graph, node):
        return nn.Identity()
    return _norm(graph, node) if node.op_type == "BatchNormalization" else None


def _is_training(graph: Graph, node: NodeProto) -> bool:
    """Tell whether a Dropout drops; what its input says is known of constants alone."""
    if len(node.input) < 3 or not node.input[2]:
        return False
    flag = graph.constant(node.input[2])
    return flag is None or bool(flag)


def _norm(graph: Graph, node: NodeProto) -> nn.Module | None:
    """Return a BatchNormalization of `[batch, features]`; another rank has its features elsewhere than a layer has."""
    parts = [_floats(graph, name) for name in node.input[1:5]]
    if graph.rank(node.input[0]) != 2 or attribute(node, "training_mode", 0) or any(part is None for part in parts):
        return None
    scale, shift, mean, variance = (torch.tensor(part) for part in parts)
    norm = nn.BatchNorm1d(len(scale), eps=attribute(node, "epsilon", 1e-5))
    norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var = scale, shift, mean, variance
    return norm.eval()


def _linear(graph: Graph, index: int) -> Unit | None:
    """Return a linear layer by a constant float32 weight, with the sum of a constant bias behind it."""
    node, output, nodes = graph.nodes[index], graph.nodes[index].output[0], {index}
    if node.domain not in ("", "ai.onnx") or graph.is_constant(node.input[0]):
        return None
    weight = _floats(graph, node.input[1])
    if weight is None or weight.ndim != 2 or not weight.size:
        return None
    # ONNX has `[in_features, out_features]`, unless Gemm transposes it.
    is_transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
    kept = graph.stored(node.input[1])
    weight, kept = (part if part is None or is_transposed else part.T for part in (weight, kept))
    assert weight is not None
    weight = _scaled(weight, attribute(node, "alpha", 1.0))
    bias: Array | None = None
    if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
        bias = _bias(graph, node.input[2], len(weight), 2)
        if bias is None:
            return None
        bias = _scaled(bias, attribute(node, "beta", 1.0))
    elif (added := _added(graph, output, len(weight))) is not None:
        bias, after = added
        nodes.add(after)
        output = graph.nodes[after].output[0]
    return Unit(_module_of(weight, bias, kept), frozenset(nodes), output)


def _added(graph: Graph, value: str, out_features: int) -> tuple[Array, int] | None:
    """Return the bias that the one node that reads a value adds, and the node."""
    uses = graph.uses(value)
    if len(uses) != 1 or value in graph.outputs:
        return None
    node = graph.nodes[uses[0]]
    if node.op_type != "Add" or node.domain not in ("", "ai.onnx") or node.input[0] == node.input[1]:
        return None
    other = node.input[1] if node.input[0] == value else node.input[0]
    bias = _bias(graph, other, out_features, graph.rank(value))
    return None if bias is None else (bias, uses[0])


def _bias(graph: Graph, name: str, out_features: int, rank: int | None) -> Array | None:
    """Return a constant `[out_features]` that is added to what has some rank, unless the sum has another shape."""
    bias = _floats(graph, name)
    if bias is None or bias.size not in (1, out_features) or (bias.ndim and bias.shape[-1] != bias.size):
        return None
    if bias.ndim > 1 and (rank is None or bias.ndim > rank):
        return None
    return np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), (out_features,)))


def _module_of(weight: Array, bias: Array | None, kept: Array | None) -> nn.Module:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(torch.tensor(np.ascontiguousarray(weight)), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(torch.tensor(bias), requires_grad=False)
    if kept is not None:  # what is stored is kept, though it is zero
        mask = torch.tensor(np.ascontiguousarray(kept))
        prune.custom_from_mask(linear, "weight", mask)  # type: ignore[no-untyped-call]
    return linear


def _floats(graph: Graph, name: str) -> Array | None:
    value = graph.constant(name) if name else None
    return value if value is not None and value.dtype == np.float32 else None


def _scaled(values: Array, factor: float) -> Array:
    return values if factor == 1.0 else (values.astype(np.float64) * factor).astype(np.float32)


def _has_rank(graph: Graph, value: str, rank: int) -> bool:
    """Tell whether a value has at least some rank, so that an operand of that rank adds no dimension."""
    known: Any = graph.rank(value)
    return rank <= 1 or (known is not None and known >= rank)
