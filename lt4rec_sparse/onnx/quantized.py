"""Activations that a graph quantises and dequantises at once: the calibration that a file brings with it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from onnx import NodeProto

from lt4rec_sparse.network import QuantizationParameters
from lt4rec_sparse.onnx.graph import Graph
from lt4rec_sparse.onnx.source import attribute

LEAST = {np.dtype(np.uint8): 0, np.dtype(np.int8): -128}  # the value that ours, from 0 to 255, has as 0


class Quantized(NamedTuple):
    """A value that was quantised and dequantised by the same parameters."""

    of: str  # the value before
    parameters: QuantizationParameters
    nodes: frozenset[int]


def quantized(graph: Graph, value: str) -> Quantized | None:
    """Return how a value was quantised, to 8 bits and by one scale; or None if it was not, or otherwise."""
    after = graph.maker(value)
    if after is None or graph.nodes[after].op_type != "DequantizeLinear":
        return None
    before = graph.maker(graph.nodes[after].input[0])
    if before is None or graph.nodes[before].op_type != "QuantizeLinear":
        return None
    parameters = _parameters(graph, graph.nodes[after])
    # As text a scale of NaN is equal to itself, so that it is refused as what it is.
    if parameters is None or str(parameters) != str(_parameters(graph, graph.nodes[before])):
        return None
    return Quantized(graph.nodes[before].input[0], parameters, frozenset({before, after}))


def _parameters(graph: Graph, node: NodeProto) -> QuantizationParameters | None:
    scale = graph.constant(node.input[1])
    if len(node.input) > 2 and node.input[2]:
        zero = graph.constant(node.input[2])
    else:  # without a zero point and another dtype
        zero = None if attribute(node, "output_dtype", 0) else np.zeros((), np.uint8)
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or zero.dtype not in LEAST:
        return None
    return QuantizationParameters(float(scale.reshape(())), int(zero.reshape(())) - LEAST[zero.dtype])
