"""ONNX graphs under construction: what a frozen network is in operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from lt4rec_sparse.network import FrozenNetwork
from lt4rec_sparse.onnx.graph import Array

# The newest that all versions of ONNX Runtime which the extra admits can run; Gelu came with 20.
OPSET, IR_VERSION = 21, 10

# Activation -> operator and attributes, of the slope; SiLU takes two.
OPERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
    "hardswish": ("HardSwish", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": None}),
    "elu": ("Elu", {"alpha": None}),
}


class Writer:
    """A graph under construction.

    Args:
        is_sparse: Whether pruned weights are sparse initializers.
    """

    def __init__(self, is_sparse: bool = False) -> None:
        self.is_sparse = is_sparse
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.sparse: list[SparseTensorProto] = []

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node of one output, and return the output."""
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, values: Tensor | Array) -> str:
        """Add an initializer, and return its name."""
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def weight(self, name: str, weight: Tensor, mask: Tensor) -> str:
        """Add a weight, as what its mask keeps or with zeros, and return its name."""
        if not self.is_sparse or bool(mask.all()):
            return self.constant(name, weight)
        places = mask.flatten().nonzero()[:, 0]
        values = numpy_helper.from_array(weight.flatten()[places].numpy(), name)
        indices = numpy_helper.from_array(places.numpy(), f"{name}/places")
        self.sparse.append(helper.make_sparse_tensor(values, indices, list(weight.shape)))
        return name

    def mlp(self, network: FrozenNetwork, task: str, x: str, output: str) -> None:
        """Add one task's MLP: `output [batch, out_features]` of `x [batch, in_features]`."""
        for i in range(network.depth):
            layer, name = network.layer(i, task), f"{task}/layers.{i}"
            inputs = [x, self.weight(f"{name}.weight", layer.weight, network.mask(i, task))]
            if layer.bias is not None:
                inputs.append(self.constant(f"{name}.bias", layer.bias))
            last = output if i + 1 == network.depth else f"{name}/output"
            z = last if layer.activation == "none" else f"{name}/sum"
            self.node("Gemm", inputs, z, transB=1)
            if layer.activation == "silu":
                self.node("Mul", [z, self.node("Sigmoid", [z], f"{name}/sigmoid")], last)
            elif layer.activation == "dice":
                self._dice(name, z, layer.slope, last)
            elif isinstance(layer.slope, Tensor):
                self.node("PRelu", [z, self.constant(f"{name}.slope", layer.slope)], last)
            elif layer.activation != "none":
                operator, attributes = OPERATORS[layer.activation]
                filled = {key: layer.slope if value is None else value for key, value in attributes.items()}
                self.node(operator, [z], last, **filled)
            x = last

    def _dice(self, name: str, z: str, slope: Any, output: str) -> None:
        """Add `output = z (alpha + (1 - alpha) sigmoid(scale z + shift))`; `onnx.dice` reads these nodes."""
        scale, shift, alpha = slope
        value = self.node("Mul", [z, self.constant(f"{name}.scale", scale)], f"{name}/scaled")
        value = self.node("Add", [value, self.constant(f"{name}.shift", shift)], f"{name}/shifted")
        value = self.node("Sigmoid", [value], f"{name}/gate")
        value = self.node("Mul", [value, self.constant(f"{name}.rest", 1 - alpha)], f"{name}/of_rest")
        value = self.node("Add", [value, self.constant(f"{name}.alpha", alpha)], f"{name}/factor")
        self.node("Mul", [z, value], output)

    def model(self, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]) -> ModelProto:
        """Return the model, checked.

        Raises:
            ValueError: If a name is there twice, as where a column has the name of a task.
        """
        names = [value.name for value in inputs] + [name for node in self.nodes for name in node.output]
        names += [tensor.name for tensor in self.initializers] + [tensor.values.name for tensor in self.sparse]
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise ValueError(f"names: got {twice[0]!r} twice, wanted each task and column another name")
        graph = helper.make_graph(
            self.nodes, "lt4rec_sparse", inputs, outputs, self.initializers, sparse_initializer=self.sparse
        )
        imports = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="lt4rec_sparse")
        onnx.checker.check_model(model)
        return model


def floats(name: str, shape: Sequence[str | int]) -> ValueInfoProto:
    """Return a float32 input or output; a dimension with a name varies."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
