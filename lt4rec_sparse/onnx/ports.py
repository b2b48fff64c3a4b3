"""Inputs and outputs of a graph: what dtypes and shapes it declares."""

from __future__ import annotations

from typing import NamedTuple

import onnx
import torch
from onnx import TensorProto

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.onnx.graph import Array, Graph
from lt4rec_sparse.onnx.source import KINDS

# What ONNX, NumPy and torch have in common.
DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.BOOL: torch.bool,
}


class Port(NamedTuple):
    """An input of a graph, as it declares it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...] | None  # None: a size, or all, that varies


def inputs_of(graph: Graph) -> list[Port]:
    """Return the inputs of a graph.

    Raises:
        InputError: If an input or an output is no tensor of a dtype that NumPy and torch have, or nothing makes an
            output.
    """
    for name in graph.outputs:
        _dtype(graph, "output", name)
        if graph.maker(name) is None and name not in graph.inputs and not graph.is_constant(name):
            raise InputError(f"{graph.where}: output {name!r}: got one that nothing makes, wanted a node's output")
    return [Port(name, _dtype(graph, "input", name), _shape(graph.types[name])) for name in graph.inputs]


def constants_of(graph: Graph) -> dict[str, Array]:
    """Return the outputs of a graph that no input decides.

    Raises:
        InputError: If one is of another dtype than the graph declares.
    """
    found = {}
    for name in graph.outputs:
        if graph.is_constant(name):
            value, dtype = graph.constant(name), _dtype(graph, "output", name)
            if value is None or str(value.dtype) != str(dtype).removeprefix("torch."):
                got = "no tensor" if value is None else value.dtype
                raise InputError(f"{graph.where}: output {name!r}: got a constant of {got}, wanted {dtype}")
            found[name] = value
    return found


def _dtype(graph: Graph, kind: str, name: str) -> torch.dtype:
    element = graph.types[name].tensor_type.elem_type
    if element not in DTYPES:
        is_tensor = graph.types[name].HasField("tensor_type")
        got = f"elements of type {KINDS.get(element, element)}" if is_tensor else "no tensor"
        raise InputError(f"{graph.where}: {kind} {name!r}: got {got}, wanted a tensor of numbers that torch has")
    return DTYPES[element]


def _shape(declared: onnx.TypeProto) -> tuple[int | None, ...] | None:
    if not declared.tensor_type.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in declared.tensor_type.shape.dim)
