"""An ONNX model as it is read: checked, and what says the same in several ways brought into one.

Functions are inlined, Constant nodes become initializers, nodes that decide no output are left out, and a Gemm that
transposes its input gets a Transpose before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
from google.protobuf.message import DecodeError, EncodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from lt4rec_sparse.errors import InputError, shown, told
from lt4rec_sparse.files import check_regular

LEAST_OPSET = 7  # of ONNX Runtime too
SMALL = 1024  # elements: initializers of fewer may be shapes, which shape inference reads
MOST_BYTES = 2**31  # of a sparse tensor once it is dense; a few bytes can say any shape
MOST_DIMS = 32  # of NumPy, in all its versions
# What onnx and protobuf raise of a damaged model: they look up dtypes, decode names and read arrays as they go.
DAMAGE = (
    DecodeError,
    EncodeError,
    KeyError,
    TypeError,
    ValueError,
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
)
KINDS = {number: name for name, number in TensorProto.DataType.items()}


class Source:
    """A model that ONNX's checker accepts.

    Attributes:
        where: What messages begin with.
        nodes: In topological order.
        dense, sparse: Initializers by name.
        inputs: The names of inputs that have no initializer; those that have one are constants here.
        outputs: The names of the outputs.
        types: Value -> its type, where shape inference knows it.
        imports, ir_version: What a model of these nodes needs to say.

    Args:
        source: A file, or a model with all its data.

    Raises:
        TypeError: If it is neither.
        FileNotFoundError: If there is no such file.
        InputError: If it is damaged, no ONNX model, or of an operator set older than `LEAST_OPSET`.
    """

    def __init__(self, source: str | Path | ModelProto) -> None:
        model, self.where = _read(source)
        self.imports, self.ir_version = list(model.opset_import), max(model.ir_version, 4)
        version = next((entry.version for entry in self.imports if entry.domain in ("", "ai.onnx")), LEAST_OPSET)
        if version < LEAST_OPSET:
            raise InputError(f"{self.where}: got operator set {version}, wanted {LEAST_OPSET} or a later one")
        try:
            self._take(model)
        except InputError:
            raise
        except DAMAGE as error:
            raise damaged(self.where, error) from error

    def _take(self, model: ModelProto) -> None:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        for node in model.graph.node:
            if not all(isinstance(name, str) for name in (node.name, *node.input, *node.output)):
                raise InputError(f"{self.where}: got a damaged model (a name is no UTF-8), wanted an ONNX model")
        self.dense = {tensor.name: tensor for tensor in model.graph.initializer}
        self.sparse = {tensor.values.name: tensor for tensor in model.graph.sparse_initializer}
        self.outputs = tuple(value.name for value in model.graph.output)
        self.nodes = _alive(self._normalised(model.graph), self.outputs)
        for name, tensor in self.dense.items():
            if tensor.data_location == TensorProto.EXTERNAL:
                raise InputError(
                    f"{self.where}: got initializer {name!r} in another file, wanted its values: give the path"
                )
        for name, sparse in self.sparse.items():
            _check_sparse(f"{self.where}: {name}", sparse)
        constants = self.dense.keys() | self.sparse.keys()
        self.inputs = tuple(value.name for value in model.graph.input if value.name not in constants)
        self.types = self._inferred(model)

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
            self.sparse[name] = SparseTensorProto()
            self.sparse[name].CopyFrom(attribute.sparse_tensor)
            self.sparse[name].values.name = name
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
        self.dense[name] = tensor

    def _inferred(self, model: ModelProto) -> dict[str, onnx.TypeProto]:
        """Check the graph without its large data, which protobuf may not hold at once, and return what types it has."""
        dense = {name: tensor for name, tensor in self.dense.items() if math.prod(tensor.dims) >= SMALL}
        large = [helper.make_tensor_value_info(name, t.data_type, list(t.dims)) for name, t in dense.items()]
        for name, sparse in self.sparse.items():
            large.append(helper.make_tensor_value_info(name, sparse.values.data_type, list(sparse.dims)))
        names = {value.name for value in large}
        stated = [v for v in model.graph.value_info if v.name not in names and _has_shape(v)]
        kept = [tensor for name, tensor in self.dense.items() if name not in dense]
        graph_inputs = [*(value for value in model.graph.input if value.name not in names), *large]
        types: dict[str, onnx.TypeProto] = {}
        # What the file states of values within the graph may be out of date: what is inferred without it goes first.
        for value_info in (stated, []) if stated else ([],):
            inferred = self._types_of(model.graph, graph_inputs, kept, value_info)
            types |= {name: kind for name, kind in inferred.items() if name not in types or _is_shaped(kind)}
        return types

    def _types_of(
        self,
        graph: GraphProto,
        inputs: Sequence[onnx.ValueInfoProto],
        initializers: Sequence[TensorProto],
        value_info: Sequence[onnx.ValueInfoProto],
    ) -> dict[str, onnx.TypeProto]:
        skeleton = helper.make_graph(
            self.nodes,
            graph.name or "graph",
            inputs,
            graph.output,
            initializers,
            value_info=value_info,
        )
        checked = helper.make_model(skeleton, opset_imports=self.imports, ir_version=self.ir_version)
        onnx.checker.check_model(checked)
        inferred = onnx.shape_inference.infer_shapes(checked)
        values = (inferred.graph.output, inferred.graph.value_info, inferred.graph.input)
        return {value.name: value.type for of_kind in values for value in of_kind}


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Return an attribute of a node, or its default."""
    found = _attribute(node, name)
    return default if found is None else helper.get_attribute_value(found)


def damaged(where: str, error: Exception) -> InputError:
    """Return the error that a model is damaged, as another library says."""
    return InputError(f"{where}: got a damaged model ({told(error)}), wanted one that ONNX's checker accepts")


def reads_of(node: NodeProto) -> tuple[str, ...]:
    """Return the values that a node reads, those that its subgraphs capture among them; each once."""
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
    read = [*(name for node in graph.node for name in reads_of(node)), *(value.name for value in graph.output)]
    return [name for name in read if name not in own]


def _attribute(node: NodeProto, name: str) -> AttributeProto | None:
    return next((a for a in node.attribute if a.name == name), None)


def _read(source: str | Path | ModelProto) -> tuple[ModelProto, str]:
    if isinstance(source, ModelProto):
        return source, "model"
    if not isinstance(source, str | Path):
        raise TypeError(f"source: got a {type(source).__name__}, wanted a path or an onnx.ModelProto")
    check_regular(source, "an ONNX model")
    if not Path(source).exists():
        raise FileNotFoundError(f"{source}: no such file, wanted an ONNX model")
    try:
        model = onnx.load(source)
    except DAMAGE as error:
        raise damaged(str(source), error) from error
    if not model.HasField("graph"):
        raise InputError(f"{source}: got a file without a graph, wanted an ONNX model")
    return model, str(source)


def _check_sparse(where: str, tensor: SparseTensorProto) -> None:
    """Refuse a sparse tensor that cannot be made dense; whether its places are right is seen when it is."""
    values, indices, dims = tensor.values, tensor.indices, tuple(tensor.dims)
    if TensorProto.EXTERNAL in (values.data_location, indices.data_location):
        raise InputError(f"{where}: got a sparse tensor in another file, wanted its values in the model")
    if len(values.dims) != 1:
        raise InputError(f"{where}: got values of shape {shown(tuple(values.dims))}, wanted [stored]")
    if indices.data_type != TensorProto.INT64 or len(indices.dims) not in (1, 2):
        kind = KINDS.get(indices.data_type, indices.data_type)
        wanted = "INT64 [stored] or [stored, dimensions]"
        raise InputError(f"{where}: got indices {kind} {shown(tuple(indices.dims))}, wanted {wanted}")
    itemsize = helper.tensor_dtype_to_np_dtype(values.data_type).itemsize
    is_shape = 1 <= len(dims) <= MOST_DIMS and min(dims) >= 0
    if not is_shape or math.prod(dims) * itemsize > MOST_BYTES:
        wanted = f"1 to {MOST_DIMS} sizes, at most {MOST_BYTES >> 30} GB in all"
        raise InputError(f"{where}: got a sparse tensor of shape {shown(dims)}, wanted {wanted}")


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    return not value.type.HasField("tensor_type") or value.type.tensor_type.HasField("shape")


def _is_shaped(kind: onnx.TypeProto) -> bool:
    return bool(kind.HasField("tensor_type") and kind.tensor_type.HasField("shape"))


def _alive(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """Return the nodes that decide the outputs."""
    needed, alive = set(outputs), []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            alive.append(node)
            needed.update(reads_of(node))
    return alive[::-1]
