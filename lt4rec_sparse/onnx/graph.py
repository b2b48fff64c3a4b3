"""The values of an ONNX model: which nodes make and read them, which are constant; nodes as a model of their own."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_errors

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.onnx.source import DAMAGE, Source, damaged, reads_of

Array = NDArray[Any]

# What ONNX Runtime raises when it reads or runs a graph; they share no base class but Exception.
RUNTIME_ERRORS = tuple(
    getattr(runtime_errors, name)
    for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
)


class Graph:
    """The values of a model: which nodes make and read them, and which are constant.

    Attributes:
        where: What messages begin with.
        nodes: In topological order; all else here counts them from 0.
        inputs, outputs: The names of those of the graph.
        types: Value -> its type, where shape inference knows it.

    Args:
        source: The model.
    """

    def __init__(self, source: Source) -> None:
        self.where, self.nodes, self.types = source.where, source.nodes, source.types
        self.inputs, self.outputs = source.inputs, source.outputs
        self._source, self._dense, self._sparse = source, source.dense, source.sparse
        self._reads = [reads_of(node) for node in self.nodes]
        self._makers = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self._uses: dict[str, list[int]] = {}
        for i, names in enumerate(self._reads):
            for name in names:
                self._uses.setdefault(name, []).append(i)
        self._constants: dict[str, Array | None] = {}
        self._is_constant = [False] * len(self.nodes)
        for i, node in enumerate(self.nodes):
            self._is_constant[i] = _may_fold(node) and all(map(self.is_constant, self._reads[i]))

    def reads(self, node: int) -> Sequence[str]:
        """Return the values that a node reads, those that its subgraphs capture among them; each once."""
        return self._reads[node]

    def uses(self, value: str) -> Sequence[int]:
        """Return the nodes that read a value, each once, in order."""
        return self._uses.get(value, ())

    def maker(self, value: str) -> int | None:
        """Return the node that makes a value; None for inputs and initializers."""
        return self._makers.get(value)

    def is_constant(self, value: str) -> bool:
        """Tell whether a value is an initializer, or computed from initializers alone."""
        maker = self.maker(value)
        if maker is None:
            return value in self._dense or value in self._sparse
        return self._is_constant[maker]

    def constant(self, value: str) -> Array | None:
        """Return a constant as ONNX Runtime computes it, or None if it is no tensor, or of a dtype that NumPy lacks."""
        if value not in self._constants:
            self._constants[value] = self._evaluated(value) if self.is_constant(value) else None
        return self._constants[value]

    def stored(self, value: str) -> Array | None:
        """Return which entries a `sparse_initializer` stores, zeros among them; None of any other value."""
        return None if value not in self._sparse else self._unpacked(self._sparse[value])[1]

    def rank(self, value: str) -> int | None:
        """Return the number of dimensions of a value, where it is known."""
        tensor = self.types[value].tensor_type if value in self.types else None
        return len(tensor.shape.dim) if tensor is not None and tensor.HasField("shape") else None

    def part(self, nodes: Iterable[int], inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[str]) -> ModelProto:
        """Return nodes as a model of their own, with the constants that they need, and none of what they do not."""
        chosen = self._with_constants(set(nodes), {value.name for value in inputs}, outputs)
        names = dict.fromkeys(name for i in chosen for name in self._reads[i])
        graph = helper.make_graph(
            [self.nodes[i] for i in chosen],
            "part",
            inputs,
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [self._dense[name] for name in names if name in self._dense],
            sparse_initializer=[self._sparse[name] for name in names if name in self._sparse],
        )
        return helper.make_model(graph, opset_imports=self._source.imports, ir_version=self._source.ir_version)

    def named(self, node: int) -> str:
        """Name a node in a message: its operator, and its name or its output."""
        proto = self.nodes[node]
        return f"{proto.op_type} {proto.name or next(iter(proto.output), '')!r}"

    def _evaluated(self, value: str) -> Array | None:
        if value in self._sparse:
            return self._unpacked(self._sparse[value])[0]
        try:
            if value in self._dense:
                return _array(self._dense[value])
            maker = self.maker(value)
            assert maker is not None
            model = self.part([maker], [], [value])
            session = onnxruntime.InferenceSession(model.SerializeToString(), quiet(), ["CPUExecutionProvider"])
            if _lacks(session.get_outputs()[0].type):
                return None
            result = session.run([value], {})[0]
        except (*DAMAGE, *RUNTIME_ERRORS) as error:
            raise damaged(f"{self.where}: {value}", error) from error
        return result if isinstance(result, np.ndarray) else None

    def _unpacked(self, tensor: SparseTensorProto) -> tuple[Array, Array]:
        """Return a sparse tensor dense, and which entries it stores."""
        name, shape = tensor.values.name, tuple(tensor.dims)
        try:
            values, indices = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
        except DAMAGE as error:
            raise damaged(f"{self.where}: {name}", error) from error
        places: tuple[Array, ...] = (indices,)
        if indices.ndim == 2:
            places = tuple(indices.T)
        elif indices.ndim == 1 and (not indices.size or (indices.min() >= 0 and indices.max() < math.prod(shape))):
            places = np.unravel_index(indices, shape)
        is_inside = len(places) == len(shape) and all(
            len(place) == len(values) and (not len(place) or (place.min() >= 0 and place.max() < size))
            for place, size in zip(places, shape, strict=False)
        )
        kept = np.zeros(shape, bool)
        if is_inside:
            kept[places] = True
        if not is_inside or int(kept.sum()) != len(values):
            got = f"indices {indices.shape} of {len(values)} values"
            raise InputError(f"{self.where}: {name}: got {got}, wanted one place within {shape} for each, none twice")
        dense = np.zeros(shape, values.dtype)
        dense[places] = values
        return dense, kept

    def _with_constants(self, nodes: set[int], given: Collection[str], outputs: Sequence[str]) -> list[int]:
        """Return the nodes and those that compute the constants that they read, in order."""
        waiting = [*outputs, *(name for i in nodes for name in self._reads[i])]
        while waiting:
            name = waiting.pop()
            maker = self.maker(name)
            if maker is not None and maker not in nodes and name not in given and self._is_constant[maker]:
                nodes.add(maker)
                waiting += self._reads[maker]
        return sorted(nodes)


def quiet() -> onnxruntime.SessionOptions:
    """Return session options that report errors alone."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def _array(tensor: TensorProto) -> Array | None:
    """Return the values of a tensor, or None of a dtype that NumPy lacks; a view where it can be."""
    array = numpy_helper.to_array(tensor)
    return array if array.dtype.isbuiltin == 1 else None


def _lacks(said: str) -> bool:
    """Tell whether NumPy has no arrays of a type of ONNX Runtime, such as `tensor(bfloat16)` or a sequence."""
    return not said.startswith("tensor(") or any(name in said for name in ("bfloat16", "float8", "float4", "int4"))


def _may_fold(node: NodeProto) -> bool:
    """Tell whether a node of constants is one: it has inputs, no subgraph, and no random numbers."""
    has_graph = any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute)
    is_random = node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial", "Dropout")
    return node.domain in ("", "ai.onnx") and any(node.input) and not has_graph and not is_random
