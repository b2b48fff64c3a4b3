"""Dice as `writer.py` writes it, read back: six nodes with a constant per output."""

from __future__ import annotations

import torch
from onnx import NodeProto
from torch import nn

from lt4rec_sparse.nn import dice
from lt4rec_sparse.onnx.graph import Array, Graph

STEPS = ("Mul", "Add", "Sigmoid", "Mul", "Add")  # from z to the factor that it is multiplied by


def dice_of(graph: Graph, z: str) -> tuple[nn.Module, frozenset[int], str] | None:
    """Return the Dice that every use of a value `[batch, features]` belongs to: its module, nodes, output; or None."""
    if len(graph.uses(z)) != 2 or graph.rank(z) != 2:
        return None
    last = graph.uses(z)[1]
    nodes, constants, value = [last], [], z
    for step in STEPS:
        uses = graph.uses(value)
        node = graph.nodes[uses[0]]
        if not _is(node, step) or node.input[0] != value:
            return None
        if step != "Sigmoid":
            constants.append(_row(graph, node.input[1]))
        nodes.append(uses[0])
        value = node.output[0]
        if len(graph.uses(value)) != 1 or value in graph.outputs:
            return None
    end = graph.nodes[last]
    if not _is(end, "Mul") or list(end.input) != [z, value]:
        return None
    rows = [torch.tensor(row) for row in constants if row is not None]
    if len(rows) < 4 or len({len(row) for row in rows}) > 1:
        return None
    scale, shift, rest, alpha = rows
    slope = torch.stack([scale, shift, alpha])
    if not torch.equal(1 - alpha, rest) or not slope.isfinite().all():
        return None
    return dice.of_constants(slope).eval(), frozenset(nodes), end.output[0]


def _is(node: NodeProto, operator: str) -> bool:
    return node.op_type == operator and node.domain in ("", "ai.onnx")


def _row(graph: Graph, name: str) -> Array | None:
    value = graph.constant(name)
    is_row = value is not None and value.dtype == "float32" and value.ndim == 1
    return value if is_row else None
