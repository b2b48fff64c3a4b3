"""Which nodes of an ONNX graph the engine takes, call by call: `freeze` decides, of the graph's units as modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.network import check_parameters
from lt4rec_sparse.nn import SparseMLP, freeze, plain
from lt4rec_sparse.nn.convert import LEAST_SPARSITY
from lt4rec_sparse.onnx.graph import Graph
from lt4rec_sparse.onnx.quantized import quantized
from lt4rec_sparse.onnx.units import Unit, linears_at, unit_at

INTEGER = ("QLinearMatMul", "MatMulInteger", "QGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")


class Requantized(nn.Identity):
    """What quantises and dequantises a value that enters a layer."""


class Call(NamedTuple):
    """Nodes that the engine computes in one call, `output = module(input)`."""

    name: str  # of the first node
    module: SparseMLP
    input: str
    output: str
    nodes: frozenset[int]


def calls_of(graph: Graph, precision: str = "fp32") -> list[Call]:
    """Return the calls of a graph in topological order, by the rule of `freeze`.

    Raises:
        InputError: If no linear layer of the graph is pruned.
    """
    paths = _paths(graph, precision == "int8")
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
                entering = units[first - 1].output if first else begin
                calls.append(_call(graph, child, entering, units[first : last + 1], precision))
    return sorted(calls, key=lambda call: min(call.nodes))


def _call(graph: Graph, module: SparseMLP, entering: str, units: Sequence[Unit], precision: str) -> Call:
    if precision == "int8":
        while isinstance(units[-1].module, Requantized):  # a call ends in float32
            units = units[:-1]
        values = [entering, *(unit.output for unit in units)]
        found = []
        for value, unit in zip(values, units, strict=False):
            if isinstance(unit.module, nn.Linear):
                where = f"{graph.where}: {graph.named(min(unit.nodes))}"
                if (of_layer := quantized(graph, value)) is None:
                    wanted = "one that is quantised to 8 bits by one scale and dequantised"
                    raise InputError(f"{where}: got an input in float32, wanted {wanted}, for int8")
                try:
                    check_parameters(where, of_layer.parameters)
                except ValueError as error:
                    raise InputError(str(error)) from error
                found.append(of_layer.parameters)
        module = type(module)(module.network.with_quantization({module.tasks[0]: found})).eval()
        if isinstance(units[0].module, nn.Linear) and (first := quantized(graph, entering)) is not None:
            entering = first.of  # the call quantises its input itself
    nodes = frozenset().union(*(unit.nodes for unit in units))
    name = graph.nodes[min(nodes)].name or units[-1].output
    return Call(name, module.to_precision(precision), entering, units[-1].output, nodes)


def _paths(graph: Graph, with_quantized: bool) -> list[tuple[str, list[Unit]]]:
    """Return the longest rows of units, each reading what the one before it makes, and the value that enters each.

    For int8 a norm is in them where it is folded into the layer before it. Into the one behind it would be folded too,
    but what enters that is quantised as the norm leaves it.
    """
    paths: list[tuple[str, list[Unit]]] = []
    taken: set[int] = set()
    for begin in (*graph.inputs, *(name for node in graph.nodes for name in node.output if name)):
        alone = None if graph.is_constant(begin) else _unit_at(graph, begin, with_quantized)
        for unit in linears_at(graph, begin) if alone is None else [alone]:
            units: list[Unit] = []
            following: Unit | None = unit
            while following is not None and not following.nodes & taken:
                if with_quantized and isinstance(following.module, nn.BatchNorm1d) and not _ends_linear(units):
                    break
                units.append(following)
                taken |= following.nodes
                following = _unit_at(graph, following.output, with_quantized)
            if units:
                paths.append((begin, units))
    return paths


def _ends_linear(units: Sequence[Unit]) -> bool:
    """Tell whether units end in a linear layer, but for what is dropped and what is folded into it."""
    modules = [unit.module for unit in units if type(unit.module) not in (nn.Identity, nn.BatchNorm1d)]
    return bool(modules) and isinstance(modules[-1], nn.Linear)


def _unit_at(graph: Graph, value: str, with_quantized: bool) -> Unit | None:
    """Return the unit that reads a value; for int8 also what quantises it for the linear layer behind."""
    unit = unit_at(graph, value)
    if unit is not None or not with_quantized or len(graph.uses(value)) != 1 or value in graph.outputs:
        return unit
    for name in graph.nodes[graph.uses(value)[0]].output:
        for i in graph.uses(name):
            output = graph.nodes[i].output[0]
            pair = quantized(graph, output)
            if pair is not None and pair.of == value and len(graph.uses(name)) == 1 and name not in graph.outputs:
                behind = unit_at(graph, output)
                if behind is not None and isinstance(behind.module, nn.Linear):
                    return Unit(Requantized(), pair.nodes, output)
    return None


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
