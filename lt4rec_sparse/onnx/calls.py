"""Which nodes of an ONNX graph the engine takes, call by call: `freeze` decides, of the graph's units as modules."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import nn

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.nn import SparseMLP, freeze, plain
from lt4rec_sparse.nn.convert import LEAST_SPARSITY
from lt4rec_sparse.onnx.graph import Graph
from lt4rec_sparse.onnx.units import Unit, linears_at, unit_at

INTEGER = ("QLinearMatMul", "MatMulInteger", "QGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")


class Call(NamedTuple):
    """Nodes that the engine computes in one call, `output = module(input)`."""

    name: str  # of the first node
    module: SparseMLP
    input: str
    output: str
    nodes: frozenset[int]


def calls_of(graph: Graph) -> list[Call]:
    """Return the calls of a graph in topological order, by the rule of `freeze`.

    Raises:
        InputError: If no linear layer of the graph is pruned.
    """
    paths = _paths(graph)
    if not any(_is_pruned(unit.module) for _, units in paths for unit in units):
        raise _nothing(graph)
    frozen = freeze(nn.ModuleList(nn.Sequential(*(unit.module for unit in units)) for _, units in paths))
    calls = []
    for (begin, units), sequential in zip(paths, frozen.children(), strict=True):
        children = list(sequential.children())
        for first, child in enumerate(children):
            if isinstance(child, SparseMLP):
                # What a call takes in is replaced by Identity, and what was one is dropped.
                last = first
                while last + 1 < len(children) and isinstance(children[last + 1], nn.Identity):
                    last += 1
                nodes = frozenset().union(*(unit.nodes for unit in units[first : last + 1]))
                entering = units[first - 1].output if first else begin
                name = graph.nodes[min(nodes)].name or units[last].output
                calls.append(Call(name, child, entering, units[last].output, nodes))
    return sorted(calls, key=lambda call: min(call.nodes))


def _paths(graph: Graph) -> list[tuple[str, list[Unit]]]:
    """Return the longest rows of units, each reading what the one before it makes, and the value that enters each."""
    paths: list[tuple[str, list[Unit]]] = []
    taken: set[int] = set()
    for begin in (*graph.inputs, *(name for node in graph.nodes for name in node.output if name)):
        alone = None if graph.is_constant(begin) else unit_at(graph, begin)
        for unit in linears_at(graph, begin) if alone is None else [alone]:
            units: list[Unit] = []
            following: Unit | None = unit
            while following is not None and not following.nodes & taken:
                units.append(following)
                taken |= following.nodes
                following = unit_at(graph, following.output)
            if units:
                paths.append((begin, units))
    return paths


def _is_pruned(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    mask = plain.of_linear(module).mask
    return 1 - mask.sum().item() / mask.numel() >= LEAST_SPARSITY


def _nothing(graph: Graph) -> InputError:
    counts = Counter(node.op_type for node in graph.nodes if node.op_type in INTEGER)
    got = "a graph without pruned linear layers"
    if counts:
        got += f", and {', '.join(f'{kind} ({n})' for kind, n in counts.items())}, which multiply integers"
    wanted = f"a Gemm or MatMul by a constant float32 weight of which {LEAST_SPARSITY:.0%} is zero"
    return InputError(f"{graph.where}: got {got}, wanted {wanted}")
