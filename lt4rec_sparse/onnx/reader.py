"""From an ONNX model to a module: `from_onnx`, when its packages are there."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto
from torch import nn

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.network import PRECISIONS
from lt4rec_sparse.onnx.calls import calls_of
from lt4rec_sparse.onnx.graph import Graph
from lt4rec_sparse.onnx.module import OnnxModule
from lt4rec_sparse.onnx.ports import constants_of, inputs_of
from lt4rec_sparse.onnx.source import Source
from lt4rec_sparse.onnx.steps import Part, steps_of


def read(source: str | Path | ModelProto, precision: str = "fp32") -> nn.Module:
    """Return a model as `from_onnx` does."""
    if precision not in PRECISIONS:
        raise InputError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    graph = Graph(Source(source))
    inputs = inputs_of(graph)
    constants = constants_of(graph)
    steps, sessions = steps_of(graph, calls_of(graph, precision))
    first = steps[0]
    if len(steps) == len(graph.outputs) == 1 and not isinstance(first, Part) and (first.input,) == graph.inputs:
        return first.module
    return OnnxModule(inputs, graph.outputs, steps, sessions, constants)
