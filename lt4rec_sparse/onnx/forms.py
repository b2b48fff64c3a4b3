"""Activations that exporters write as several operators, recognised by what they compute, in whatever order.

A value that is computed from one `x` by sums and products is a sum of terms `coefficient * x**power * atom(argument)`,
where the atom is one of `ATOMS` or nothing, and its argument such a sum without atoms. GELU by erf is
`0.5 x + 0.5 x erf(x / sqrt(2))`, however its factors are arranged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from onnx import NodeProto
from torch import nn

from lt4rec_sparse.onnx.graph import Graph
from lt4rec_sparse.onnx.source import attribute

# Each constant of a file was rounded to float32, and a coefficient is the product of a few of them.
ROUNDING = 8 * 2.0**-24
MOST_NODES = 16  # of one activation; the longest that exporters write has 9
MOST_POWER = 8


class Term(NamedTuple):
    """`x**power * atom(argument)`; without an atom `x**power`."""

    power: int
    atom: str = ""
    argument: tuple[tuple[int, float], ...] = ()  # powers of x and their coefficients


Form = Mapping[Term, float]  # the sum of its terms, each times its coefficient

X: Form = {Term(1): 1.0}
ATOMS = ("Sigmoid", "Tanh", "Erf", "HardSigmoid", "Clip")
OPERATORS = ("Mul", "Add", "Sub", "Div", "Pow", "Identity")
ROOT = math.sqrt(2 / math.pi)

KNOWN: tuple[tuple[Form, Callable[[], nn.Module]], ...] = (
    ({Term(1, "Sigmoid", ((1, 1.0),)): 1.0}, nn.SiLU),
    ({Term(1): 0.5, Term(1, "Erf", ((1, math.sqrt(0.5)),)): 0.5}, nn.GELU),
    (
        {Term(1): 0.5, Term(1, "Tanh", ((1, ROOT), (3, 0.044715 * ROOT))): 0.5},
        lambda: nn.GELU(approximate="tanh"),
    ),
    ({Term(1, "HardSigmoid", ((0, 0.5), (1, 1 / 6))): 1.0}, nn.Hardswish),
    ({Term(1, "Clip", ((0, 3.0), (1, 1.0))): 1 / 6}, nn.Hardswish),  # to 0 to 6
)


def activation_of(graph: Graph, x: str) -> tuple[nn.Module, frozenset[int], str] | None:
    """Return the activation that every use of a value belongs to: its module, its nodes, and its output; or None."""
    forms: dict[str, Form] = {x: X}
    nodes: set[int] = set()
    waiting = set(graph.uses(x))
    while waiting and len(nodes) < MOST_NODES:
        ready = [i for i in sorted(waiting) if all(n in forms or graph.is_constant(n) for n in graph.reads(i))]
        if not ready:
            return None
        node = ready[0]
        form = _form(graph, graph.nodes[node], forms)
        if form is None:
            return None
        waiting.remove(node)
        nodes.add(node)
        output = graph.nodes[node].output[0]
        module = _known(form)
        if module is not None and not waiting:
            return module, frozenset(nodes), output
        if output in graph.outputs:
            return None
        forms[output] = form
        waiting |= set(graph.uses(output)) - nodes
    return None


def _known(form: Form) -> nn.Module | None:
    for known, make in KNOWN:
        if len(form) == len(known) and all(
            any(_is_close(value, wanted) and _is_alike(term, like) for term, value in form.items())
            for like, wanted in known.items()
        ):
            return make()
    return None


def _is_alike(term: Term, like: Term) -> bool:
    return (
        term[:2] == like[:2]
        and len(term.argument) == len(like.argument)
        and all(p == q and _is_close(a, b) for (p, a), (q, b) in zip(term.argument, like.argument, strict=True))
    )


def _is_close(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= ROUNDING * abs(wanted)


def _form(graph: Graph, node: NodeProto, forms: Mapping[str, Form]) -> Form | None:
    """Return what a node computes of `x`, or None if it is no sum of terms."""
    kind = node.op_type if node.domain in ("", "ai.onnx") else ""
    if kind in ATOMS:
        return _atom(graph, node, forms)
    if kind not in OPERATORS:  # before its constants are computed, which may be anything
        return None
    operands = [forms[name] if name in forms else _number(graph, name) for name in node.input]
    if any(operand is None for operand in operands):
        return None
    parts = [operand for operand in operands if operand is not None]
    if kind == "Mul":
        return _product(parts[0], parts[1])
    if kind in ("Add", "Sub"):
        sign = 1.0 if kind == "Add" else -1.0
        return _sum(parts[0], {term: sign * value for term, value in parts[1].items()})
    if kind == "Div" and set(parts[1]) == {Term(0)} and parts[1][Term(0)]:
        return _product(parts[0], {Term(0): 1 / parts[1][Term(0)]})
    if kind == "Pow" and set(parts[1]) == {Term(0)} and parts[1][Term(0)] in (1.0, 2.0, 3.0):
        result: Form | None = parts[0]
        for _ in range(int(parts[1][Term(0)]) - 1):
            result = None if result is None else _product(result, parts[0])
        return result
    return parts[0] if kind == "Identity" else None


def _atom(graph: Graph, node: NodeProto, forms: Mapping[str, Form]) -> Form | None:
    inner = forms.get(node.input[0])
    if inner is None or any(term.atom for term in inner):
        return None
    if node.op_type == "HardSigmoid":
        alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
        scaled = {term: alpha * value for term, value in inner.items()}
        inner = _sum(scaled, {Term(0): beta})
    if node.op_type == "Clip" and _limits(graph, node) != (0.0, 6.0):
        return None
    return {Term(0, node.op_type, tuple(sorted((term.power, value) for term, value in inner.items()))): 1.0}


def _limits(graph: Graph, node: NodeProto) -> tuple[float | None, ...]:
    if len(node.input) == 1:  # before operator set 11
        return attribute(node, "min", None), attribute(node, "max", None)
    found = [_number(graph, name) if name else None for name in node.input[1:]]
    return tuple(None if limit is None else limit.get(Term(0), 0.0) for limit in found)


def _number(graph: Graph, name: str) -> Form | None:
    """Return a constant of one element, which changes no shape but that of scalars."""
    value = graph.constant(name)
    if value is None or value.size != 1 or value.ndim > 1 or value.dtype.kind not in "fiu":
        return None
    return {Term(0): float(value.reshape(()))}


def _sum(a: Form, b: Form) -> Form:
    result = dict(a)
    for term, value in b.items():
        result[term] = result.get(term, 0.0) + value
    return {term: value for term, value in result.items() if value or term == Term(0)}


def _product(a: Form, b: Form) -> Form | None:
    result: dict[Term, float] = {}
    for s, left in a.items():
        for t, right in b.items():
            if (s.atom and t.atom) or s.power + t.power > MOST_POWER:
                return None
            term = Term(s.power + t.power, s.atom or t.atom, s.argument or t.argument)
            result[term] = result.get(term, 0.0) + left * right
    return result
