"""From frozen networks and rankers to ONNX models: `to_onnx`, when its packages are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from google.protobuf.message import EncodeError
from onnx import ModelProto, TensorProto, helper
from torch import nn

from lt4rec_sparse.files import whole_file
from lt4rec_sparse.nn import SparseMLP
from lt4rec_sparse.onnx.writer import Writer, floats
from lt4rec_sparse.ranker import Ranker
from lt4rec_sparse.ranker.attention import AttentionUnit
from lt4rec_sparse.ranker.features import Field
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.ranker.module import PADDING, ordered_fields

X = "x"  # the input of an MLP
NUMBERS = "numbers"  # the input of a ranker that has no ids


def write(module: nn.Module | Ranker, path: str | Path | None, sparse: bool) -> ModelProto:
    """Return a module as `to_onnx` does, and write it."""
    mlp = module.mlp if isinstance(module, Ranker) else module
    if not isinstance(mlp, SparseMLP):
        wanted = "a SparseMLP, a SparseLinear or a Ranker"
        raise TypeError(f"module: got a {type(module).__name__}, wanted {wanted}: its sparse layers one by one")
    if mlp.precision != "fp32":
        raise ValueError(f"module: got precision {mlp.precision}, wanted fp32, as the file computes")
    try:
        model = _ranker(module, sparse) if isinstance(module, Ranker) else _mlp(mlp, sparse)
        data = b"" if path is None else model.SerializeToString()
    except (ValueError, EncodeError) as error:
        raise ValueError(f"module: {error}") from error
    if path is not None:
        with whole_file(path) as temporary:
            temporary.write_bytes(data)
    return model


def _mlp(mlp: SparseMLP, sparse: bool) -> ModelProto:
    network, writer = mlp.network, Writer(sparse)
    for task in mlp.tasks:
        writer.mlp(network, task, X, task)
    return writer.model(
        [floats(X, ["batch", network.in_features])],
        [floats(task, ["batch", network.widths[-1]]) for task in mlp.tasks],
    )


def _ranker(ranker: Ranker, sparse: bool) -> ModelProto:
    network, fields, writer = ranker.mlp.network, ordered_fields(ranker.inputs), Writer(sparse)
    x, axis = _crossed(writer, ranker.inputs, fields), "axis/1"
    for task in ranker.tasks:
        writer.mlp(network, task, x, f"{task}/scores")
        writer.node("Squeeze", [f"{task}/scores", axis], task)
    numbers = [floats(NUMBERS, ["batch", ranker.inputs.numbers])] if ranker.inputs.numbers else []
    ids = [
        helper.make_tensor_value_info(
            field.column, TensorProto.INT64, ["batch", f"values of {field.column}"] if field.multi else ["batch"]
        )
        for field in fields
    ]
    return writer.model([*ids, *numbers], [floats(task, ["batch"]) for task in ranker.tasks])


def _crossed(writer: Writer, inputs: CrossedEmbeddings, fields: Sequence[Field]) -> str:
    """Add `CrossedEmbeddings` of ids, one input per field, and return the value that enters the MLP."""
    tables, n = inputs.tables(), len(fields)
    for name in dict.fromkeys(field.table for field in fields):
        writer.constant(f"tables/{name}", tables[name])
        writer.constant(f"tables/{name}/size", np.array(len(tables[name])))
    for name, value in (("axis/1", [1]), ("axis/2", [2]), ("ids/0", 0), ("ids/padding", PADDING)):
        writer.constant(name, np.array(value))
    writer.constant("floats/0", np.array(0, np.float32))
    writer.constant("floats/1", np.array(1, np.float32))
    vectors: list[str] = []
    of_column = {field.column: i for i, field in enumerate(fields)}
    units = dict(zip(inputs.attention, inputs.units, strict=True))
    for field in fields:  # single-valued fields come first: the target is there
        if field.column in units:
            target = vectors[of_column[inputs.attention[field.column]]]
            vectors.append(_attended(writer, field, cast(AttentionUnit, units[field.column]), target))
        else:
            vectors.append((_pooled if field.multi else _single)(writer, field))
    embedded = writer.node("Concat", vectors, "embedded", axis=1)  # [batch, fields, dim]
    parts = [
        writer.node("Reshape", [embedded, writer.constant("flat", np.array([0, n * inputs.dim]))], "embedded/flat")
    ]
    if inputs.pairs.numel():
        across = writer.node("Transpose", [embedded], "embedded/across", perm=[0, 2, 1])
        dots = writer.node("MatMul", [embedded, across], "dots")
        flat = writer.node("Reshape", [dots, writer.constant("dots/shape", np.array([0, n * n]))], "dots/flat")
        parts.append(writer.node("Gather", [flat, writer.constant("pairs", inputs.pairs)], "crossed", axis=1))
    if inputs.numbers:
        parts.append(NUMBERS)
    return writer.node("Concat", parts, "inputs", axis=1)


def _single(writer: Writer, field: Field) -> str:
    """Add the embedding of one id per row: `[batch, 1, dim]`."""
    row = _rows(writer, field, field.column)
    return writer.node("Unsqueeze", [row, "axis/1"], f"{field.column}/vector")


def _attended(writer: Writer, field: Field, unit: AttentionUnit, target: str) -> str:
    """Add the sum of the embeddings of the ids of a row by attention to a target: `[batch, 1, dim]` both."""
    at = field.column
    held = unit.to_tensors()
    held |= {"weight": held["weight"].T, "out": held["out"].unsqueeze(1)}  # as `x @ weight` has them
    parts = {name: writer.constant(f"{at}/unit/{name}", values) for name, values in held.items()}
    is_padding = writer.node("Equal", [at, "ids/padding"], f"{at}/is_padding")
    rows = _rows(writer, field, writer.node("Where", [is_padding, "ids/0", at], f"{at}/unpadded"))
    product = writer.node("Mul", [rows, target], f"{at}/product")  # [batch, values, dim]
    shape = writer.node("Shape", [rows], f"{at}/shape")
    targets = writer.node("Expand", [target, shape], f"{at}/targets")
    joined = writer.node("Concat", [rows, targets, product], f"{at}/joined", axis=2)
    summed = writer.node("MatMul", [joined, parts["weight"]], f"{at}/products")
    biased = writer.node("Add", [summed, parts["bias"]], f"{at}/sums")
    hidden = writer.node("PRelu", [biased, parts["slope"]], f"{at}/hidden")
    scored = writer.node("MatMul", [hidden, parts["out"]], f"{at}/scored")
    weights = writer.node("Add", [scored, parts["out_bias"]], f"{at}/weights")  # [batch, values, 1]
    apart = writer.node("Unsqueeze", [is_padding, "axis/2"], f"{at}/is_padding/apart")
    kept = writer.node("Where", [apart, "floats/0", weights], f"{at}/kept")
    weighted = writer.node("Mul", [kept, rows], f"{at}/weighted")
    return writer.node("ReduceSum", [weighted, "axis/1"], f"{at}/vector")  # [batch, 1, dim]: it keeps the axis


def _pooled(writer: Writer, field: Field) -> str:
    """Add the mean embedding of the ids of a row that are no padding, zero if there is none: `[batch, 1, dim]`."""
    at = field.column
    is_padding = writer.node("Equal", [at, "ids/padding"], f"{at}/is_padding")
    rows = _rows(writer, field, writer.node("Where", [is_padding, "ids/0", at], f"{at}/unpadded"))
    apart = writer.node("Unsqueeze", [is_padding, "axis/2"], f"{at}/is_padding/apart")  # [batch, values, 1]
    kept = writer.node("Where", [apart, "floats/0", rows], f"{at}/kept")
    total = writer.node("ReduceSum", [kept, "axis/1"], f"{at}/total")
    ones = writer.node("Where", [apart, "floats/0", "floats/1"], f"{at}/ones")
    count = writer.node("ReduceSum", [ones, "axis/1"], f"{at}/count")
    return writer.node("Div", [total, writer.node("Max", [count, "floats/1"], f"{at}/least_1")], f"{at}/vector")


def _rows(writer: Writer, field: Field, ids: str) -> str:
    """Add the table's rows; an id below 0, for which Gather would count from the end, becomes one that it refuses."""
    is_below = writer.node("Less", [ids, "ids/0"], f"{field.column}/is_below")
    size = f"tables/{field.table}/size"
    refused = writer.node("Where", [is_below, size, ids], f"{field.column}/ids")
    return writer.node("Gather", [f"tables/{field.table}", refused], f"{field.column}/rows", axis=0)
