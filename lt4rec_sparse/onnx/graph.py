"""An ONNX model, read and checked: who makes a value, who reads it, what is constant, and how a part of it runs alone.

What says the same in several ways is brought into one first: functions are inlined, Constant nodes become initializers,
and a Gemm that transposes its input gets a Transpose before it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import onnxruntime
from google.protobuf.message import DecodeError, EncodeError
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_errors

from lt4rec_sparse.errors import InputError

Array = NDArray[Any]

LEAST_OPSET = 7  # of ONNX Runtime too
SMALL = 1024  # elements: initializers of fewer may be shapes, which shape inference reads
# What ONNX Runtime raises when it reads or runs a graph; they share no base class but Exception.
RUNTIME_ERRORS = tuple(
    getattr(runtime_errors, name)
    for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
)


class Graph:
    """The graph of a model, checked.

    Attributes:
        nodes: In topological order, without Constant nodes and those that decide no output.
        inputs: The names of inputs that have no initializer; those that have one are constants here.
        outputs: The names of the outputs.

    Args:
        source: A file, or a model with all its data.

    Raises:
        FileNotFoundError: If there is no such file, or one that it refers to is absent.
        InputError: If it is damaged, no ONNX model, or of an operator set older than `LEAST_OPSET`.
    """

    def __init__(self, source: str | Path | ModelProto) -> None:
        model, self.where = _read(source)
        self.opsets = {entry.domain or "": entry.version for entry in model.opset_import}
        self.ir_version = model.ir_version
        if (version := self.opsets.get("", self.opsets.get("ai.onnx", LEAST_OPSET))) < LEAST_OPSET:
            raise InputError(f"{self.where}: got operator set {version}, wanted {LEAST_OPSET} or a later one")
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        self._imports = list(model.opset_import)
        self._dense = {tensor.name: tensor for tensor in model.graph.initializer}
        self._sparse = {tensor.values.name: tensor for tensor in model.graph.sparse_initializer}
        for tensor in self._dense.values():
            if tensor.data_location == TensorProto.EXTERNAL:
                raise InputError(
                    f"{self.where}: got initializer {tensor.name!r} in another file, wanted its values: give the path"
                )
        self.outputs = tuple(value.name for value in model.graph.output)
        self.nodes = _alive(self._normalised(model.graph), self.outputs)
        constants = self._dense.keys() | self._sparse.keys()
        self.inputs = tuple(value.name for value in model.graph.input if value.name not in constants)
        self.types = self._inferred(model)
        self._reads = [_reads(node) for node in self.nodes]
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
        """Return a constant as ONNX Runtime computes it, or None if it is none, or of a dtype that NumPy lacks."""
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
        return helper.make_model(graph, opset_imports=self._imports, ir_version=max(self.ir_version, 4))

    def named(self, node: int) -> str:
        """Name a node in a message: its operator, and its name or its output."""
        proto = self.nodes[node]
        return f"{proto.op_type} {proto.name or next(iter(proto.output), '')!r}"

    def _normalised(self, graph: GraphProto) -> list[NodeProto]:
        nodes = []
        for node in graph.node:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                self._take_constant(node)
                continue
            if node.op_type == "Gemm" and (flag := _attribute(node, "transA")) is not None and flag.i:
                name = f"{node.output[0]}/transposed"
                nodes.append(helper.make_node("Transpose", [node.input[0]], [name], perm=[1, 0]))
                copied = NodeProto()
                copied.CopyFrom(node)
                copied.input[0] = name
                next(a for a in copied.attribute if a.name == "transA").i = 0
                node = copied
            nodes.append(node)
        return nodes

    def _take_constant(self, node: NodeProto) -> None:
        (attribute,), (name,) = node.attribute, node.output
        if attribute.type == AttributeProto.SPARSE_TENSOR:
            self._sparse[name] = SparseTensorProto()
            self._sparse[name].CopyFrom(attribute.sparse_tensor)
            self._sparse[name].values.name = name
            return
        tensor = TensorProto()
        value = helper.get_attribute_value(attribute)
        if attribute.type == AttributeProto.TENSOR:
            tensor.CopyFrom(value)
        elif attribute.type in (AttributeProto.STRING, AttributeProto.STRINGS):
            tensor.CopyFrom(numpy_helper.from_array(np.array(value, object)))
        else:
            is_float = attribute.type in (AttributeProto.FLOAT, AttributeProto.FLOATS)
            tensor.CopyFrom(numpy_helper.from_array(np.array(value, np.float32 if is_float else np.int64)))
        tensor.name = name
        self._dense[name] = tensor

    def _inferred(self, model: ModelProto) -> dict[str, onnx.TypeProto]:
        """Check the graph without its large data, which protobuf may not hold at once, and return what types it has."""
        dense = {name: tensor for name, tensor in self._dense.items() if math.prod(tensor.dims) >= SMALL}
        large = [helper.make_tensor_value_info(name, t.data_type, list(t.dims)) for name, t in dense.items()]
        for name, sparse in self._sparse.items():
            large.append(helper.make_tensor_value_info(name, sparse.values.data_type, list(sparse.dims)))
        names = {value.name for value in large}
        skeleton = helper.make_graph(
            self.nodes,
            model.graph.name or "graph",
            [*(value for value in model.graph.input if value.name not in names), *large],
            model.graph.output,
            [tensor for name, tensor in self._dense.items() if name not in dense],
            value_info=[v for v in model.graph.value_info if v.name not in names and _has_shape(v)],
        )
        try:
            checked = helper.make_model(skeleton, opset_imports=self._imports, ir_version=max(self.ir_version, 4))
            onnx.checker.check_model(checked)
            inferred = onnx.shape_inference.infer_shapes(checked)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, EncodeError) as error:
            raise self._damaged(error) from error
        values = (inferred.graph.output, inferred.graph.value_info, inferred.graph.input)
        return {value.name: value.type for of_kind in values for value in of_kind}

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
            result: Array = session.run([value], {})[0]
        except (ValueError, TypeError, EncodeError, *RUNTIME_ERRORS) as error:
            raise self._damaged(error, value) from error
        return result

    def _unpacked(self, tensor: SparseTensorProto) -> tuple[Array, Array]:
        """Return a sparse tensor dense, and which entries it stores."""
        name, shape = tensor.values.name, tuple(tensor.dims)
        values, indices = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
        places: tuple[Array, ...] = (indices,)
        if indices.ndim == 2:
            places = tuple(indices.T)
        elif indices.ndim == 1 and (not indices.size or (indices.min() >= 0 and indices.max() < math.prod(shape))):
            places = np.unravel_index(indices, shape)
        kept = np.zeros(shape, bool)
        is_inside = len(places) == len(shape) and all(
            len(place) == len(values) and (not len(place) or (place.min() >= 0 and place.max() < size))
            for place, size in zip(places, shape, strict=False)
        )
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

    def _damaged(self, error: Exception, value: str | None = None) -> InputError:
        return _damaged(self.where if value is None else f"{self.where}: {value}", error)


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Return an attribute of a node, or its default."""
    found = _attribute(node, name)
    return default if found is None else helper.get_attribute_value(found)


def quiet() -> onnxruntime.SessionOptions:
    """Return session options that report errors alone."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def one_line(error: Exception) -> str:
    """Return the message of an error of another library, as one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def _attribute(node: NodeProto, name: str) -> AttributeProto | None:
    return next((a for a in node.attribute if a.name == name), None)


def _read(source: str | Path | ModelProto) -> tuple[ModelProto, str]:
    if isinstance(source, ModelProto):
        return source, "model"
    if not isinstance(source, str | Path):
        raise TypeError(f"source: got a {type(source).__name__}, wanted a path or an onnx.ModelProto")
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such file, wanted an ONNX model")
    try:
        model = onnx.load(source)
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise _damaged(str(source), error) from error
    if not model.HasField("graph"):
        raise InputError(f"{source}: got a file without a graph, wanted an ONNX model")
    return model, str(source)


def _array(tensor: TensorProto) -> Array | None:
    """Return the values of a tensor, or None of a dtype that NumPy lacks; a view where it can be."""
    array = numpy_helper.to_array(tensor)
    return array if array.dtype.isbuiltin == 1 else None


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    return not value.type.HasField("tensor_type") or value.type.tensor_type.HasField("shape")


def _alive(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """Return the nodes that decide the outputs."""
    needed, alive = set(outputs), []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            alive.append(node)
            needed.update(_reads(node))
    return alive[::-1]


def _may_fold(node: NodeProto) -> bool:
    """Tell whether a node of constants is one: it has inputs, no subgraph, and no random numbers."""
    has_graph = any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute)
    is_random = node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial", "Dropout")
    return node.domain in ("", "ai.onnx") and any(node.input) and not has_graph and not is_random


def _reads(node: NodeProto) -> tuple[str, ...]:
    names = [name for name in node.input if name]
    for a in node.attribute:
        for graph in [a.g] if a.type == AttributeProto.GRAPH else a.graphs:
            names += _captured(graph)
    return tuple(dict.fromkeys(names))


def _captured(graph: GraphProto) -> list[str]:
    """Return what a subgraph reads of the graphs around it."""
    own = {value.name for value in (*graph.input, *graph.initializer)}
    own |= {tensor.values.name for tensor in graph.sparse_initializer}
    own |= {name for node in graph.node for name in node.output}
    read = [*(name for node in graph.node for name in _reads(node)), *(value.name for value in graph.output)]
    return [name for name in read if name not in own]


def _damaged(where: str, error: Exception) -> InputError:
    return InputError(f"{where}: got a damaged model ({one_line(error)}), wanted one that ONNX's checker accepts")
