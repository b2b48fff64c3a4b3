"""What is left of a graph around the engine's calls, cut into as few parts as possible, in the order they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import onnx
from google.protobuf.message import EncodeError
from onnx import TensorProto, helper
from onnxruntime import InferenceSession

from lt4rec_sparse.errors import InputError, told
from lt4rec_sparse.onnx.calls import Call
from lt4rec_sparse.onnx.graph import RUNTIME_ERRORS, Graph
from lt4rec_sparse.onnx.ports import DTYPES
from lt4rec_sparse.onnx.session import session_of

ELEMENTS = TensorProto.DataType.keys()


class Part(NamedTuple):
    """Nodes that ONNX Runtime computes in one run."""

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def steps_of(graph: Graph, calls: Sequence[Call]) -> tuple[list[Part | Call], list[InferenceSession]]:
    """Return parts and calls in an order in which each finds its inputs, and the session of each part.

    A node is in part `p` if on the way to it parts and calls alternate `p` times; no order has fewer parts.

    Raises:
        InputError: If ONNX Runtime refuses a part, or a value between two of them has a type that NumPy lacks.
    """
    part_of, part_before = _placed(graph, calls)
    steps: list[Part | Call] = [call for call in calls if part_before[call.output] < 0]
    sessions = []
    known: dict[str, onnx.TypeProto] = dict(graph.types)
    for call in calls:
        known.setdefault(call.output, helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    for p in range(max(part_of.values(), default=-1) + 1):
        members = [i for i in sorted(part_of) if part_of[i] == p]
        part, session = _part(graph, members, _read_elsewhere(graph, members, part_of, calls), known)
        steps.append(part)
        sessions.append(session)
        steps += [call for call in calls if part_before[call.output] == p]
    return steps, sessions


def _placed(graph: Graph, calls: Sequence[Call]) -> tuple[dict[int, int], dict[str, int]]:
    """Return the part of each node that is left, and of each call, by its output, the part after which it runs."""
    inside = {i: call for call in calls for i in call.nodes}
    needed = _needed(graph, calls)
    made: dict[str, tuple[int, bool]] = {}  # of a value: the part that it is made in or after, and whether by a call
    part_of: dict[int, int] = {}
    part_before: dict[str, int] = {}
    for i, node in enumerate(graph.nodes):
        call = inside.get(i)
        if call is None and i in needed:
            found = [made[name] for name in graph.reads(i) if name in made]
            part_of[i] = max((part + is_call for part, is_call in found), default=0)
            made.update(dict.fromkeys(node.output, (part_of[i], False)))
        elif call is not None and i == max(call.nodes):
            part = made[call.input][0] if call.input in made else -1
            part_before[call.output] = part
            made[call.output] = (part, True)
    return part_of, part_before


def _needed(graph: Graph, calls: Sequence[Call]) -> set[int]:
    """Return the nodes that decide the outputs or enter a call, without constants."""
    by_output = {call.output for call in calls}
    needed: set[int] = set()
    waiting = [*graph.outputs, *(call.input for call in calls)]
    while waiting:
        name = waiting.pop()
        maker = graph.maker(name)
        if maker is not None and maker not in needed and name not in by_output and not graph.is_constant(name):
            needed.add(maker)
            waiting += graph.reads(maker)
    return needed


def _read_elsewhere(
    graph: Graph, members: Sequence[int], part_of: Mapping[int, int], calls: Sequence[Call]
) -> list[str]:
    """Return what a part makes that others read."""
    read = {name for i in part_of.keys() - set(members) for name in graph.reads(i)}
    read |= {call.input for call in calls} | set(graph.outputs)
    return [name for i in members for name in graph.nodes[i].output if name in read]


def _part(
    graph: Graph, members: Sequence[int], outputs: Sequence[str], known: dict[str, onnx.TypeProto]
) -> tuple[Part, InferenceSession]:
    """Return nodes as a part, with its session, and enter the types of what it makes into `known`."""
    made = {name for i in members for name in graph.nodes[i].output}
    read = dict.fromkeys(name for i in members for name in graph.reads(i))
    inputs = [name for name in read if name not in made and not graph.is_constant(name)]
    # What the module checks has its shape. Of other values only the element type is sure: shapes in files may be wrong.
    infos = [
        helper.make_value_info(name, known[name] if name in graph.inputs else _without_shape(known[name]))
        for name in inputs
    ]
    model = graph.part(members, infos, outputs)
    first = graph.named(members[0])
    try:
        data = model.SerializeToString()
        session = session_of(data)
    except (ValueError, EncodeError, *RUNTIME_ERRORS) as error:
        raise InputError(f"{graph.where}: got a part that does not run, from {first} on: {told(error)}") from error
    for value in session.get_outputs():
        if value.name not in known:
            known[value.name] = _type_of(graph, value.name, value.type)
        element = known[value.name].tensor_type.elem_type
        if element not in (*DTYPES, TensorProto.STRING, TensorProto.UNDEFINED):  # undefined: a sequence or a map
            got = TensorProto.DataType.Name(element)
            raise InputError(f"{graph.where}: value {value.name!r}: got {got} between two parts, wanted what NumPy has")
    return Part(data, tuple(inputs), tuple(outputs)), session


def _without_shape(known: onnx.TypeProto) -> onnx.TypeProto:
    is_tensor = known.HasField("tensor_type")
    return helper.make_tensor_type_proto(known.tensor_type.elem_type, None) if is_tensor else known


def _type_of(graph: Graph, name: str, said: str) -> onnx.TypeProto:
    """Return the type that ONNX Runtime says a value has, such as `tensor(float)`; its shape is not said."""
    element = said.removeprefix("tensor(").removesuffix(")").upper()
    if element not in ELEMENTS:
        raise InputError(f"{graph.where}: value {name!r}: got a {said} between two parts, wanted a tensor")
    return helper.make_tensor_type_proto(TensorProto.DataType.Value(element), None)
