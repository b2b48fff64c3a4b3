"""ONNX graphs for tests, built node by node, and what ONNX Runtime makes of them as they are written."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def sparse_integers(rows: int, columns: int, seed: int = 0, density: float = 0.3) -> np.ndarray:
    """Return small integers, most of them 0."""
    generator = np.random.default_rng(seed)
    values = generator.integers(1, 4, (rows, columns)) * generator.choice((-1, 1), (rows, columns))
    return (values * (generator.random((rows, columns)) < density)).astype(np.float32)


def sparse_floats(rows: int, columns: int, seed: int = 0, density: float = 0.3) -> np.ndarray:
    """Return normal numbers, most of them 0."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, columns)) * (generator.random((rows, columns)) < density)
    return values.astype(np.float32)


def node(operator: str, inputs: str, outputs: str, **attributes) -> onnx.NodeProto:
    """Return a node; names are separated by blanks, and `-` is an input that is left out."""
    given = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(operator, given, outputs.split(), name=f"/{outputs.split()[0]}", **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, np.ndarray],
    inputs: Mapping[str, Sequence[str | int]],
    outputs: Sequence[str],
    opset: int = 20,
    sparse: Sequence[onnx.SparseTensorProto] = (),
) -> onnx.ModelProto:
    """Return a model of float32 inputs and outputs."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
        sparse_initializer=sparse,
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("own", 1)]
    made = helper.make_model(graph, opset_imports=imports, ir_version=10 if opset > 20 else 8)
    inferred = onnx.shape_inference.infer_shapes(made)
    for value, found in zip(made.graph.output, inferred.graph.output, strict=True):
        unknown = helper.make_tensor_value_info(value.name, FLOAT, ["a", "b"])  # the checker wants a shape
        value.CopyFrom(found if found.type.tensor_type.HasField("shape") else unknown)
    return made


def runtime(source: onnx.ModelProto | str, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return what ONNX Runtime computes, operator by operator as the graph says."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    data = source.SerializeToString() if isinstance(source, onnx.ModelProto) else str(source)
    session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = dict(zip(names, (x.numpy() for x in inputs), strict=True))
    return [torch.from_numpy(y) for y in session.run(None, feed)]
