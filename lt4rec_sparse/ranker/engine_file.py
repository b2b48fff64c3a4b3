"""The engine file: a ranker in one precision for csrc/lt4rec.h, which serves it without Python.

csrc/engine_file.h specifies it byte by byte; the dtypes below are its structures. It is no format to keep models in:
readers refuse every version but their own, and it is exported again from the artefact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lt4rec_sparse import checked_file, ops
from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.files import whole_file
from lt4rec_sparse.network import ACTIVATIONS, PRECISIONS, FrozenNetwork
from lt4rec_sparse.ranker.features import FeatureEncoder
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.ranker.request import beyond_engine, request_parts

MAGIC, VERSION = b"LT4RECEF", 2
ALIGNMENT = 64  # of arrays, as cache lines have it

ARRAY = np.dtype([("offset", "<u8"), ("count", "<u8")])
HEADER = np.dtype(
    [("magic", "S8"), ("version", "<u4"), ("precision", "<u4"), ("bytes", "<u8"), ("sha256", "u1", 32)]
    + [("dim", "<u4"), ("rows_kind", "<u4")]
    + [(name, ARRAY) for name in ("fields", "tables", "tasks", "common_layers", "own_layers")]
    + [(name, ARRAY) for name in ("embedding", "scales", "common_columns", "own_columns")]
)
FIELD = np.dtype(
    [("name", ARRAY), ("separator", ARRAY), ("table", "<u4"), ("is_bag", "<u4"), ("is_common", "<u4"), ("zero", "<u4")]
)
TABLE = np.dtype(
    [("kind", "<u4"), ("zero", "<u4"), ("size", "<u8"), ("first_row", "<i8"), ("keys", ARRAY), ("offsets", ARRAY)]
)
TASK = np.dtype([("name", ARRAY)])
LAYER = np.dtype(
    [(name, "<u4") for name in ("is_blocks", "in_features", "out_features", "activation")]
    + [(name, "<u4") for name in ("is_head", "takes_bias", "tasks", "task")]
    + [("input_zero_point", "<i8"), ("input_scale", "<f8"), ("slope", "<f8")]
    + [(name, ARRAY) for name in ("values", "planes", "bias", "slopes")]
)
NOTHING = (0, 0)
Bytes = NDArray[np.uint8]


def write_engine_file(
    encoder: FeatureEncoder, inputs: CrossedEmbeddings, network: FrozenNetwork, path: str | Path, precision: str
) -> None:
    """Write a ranker's parts as one engine file, completely or not at all.

    Args:
        encoder: Raw values to ids.
        inputs: Ids to the network's input; embeddings stay in the precision that they are held in. Of absent tables
            each request brings the vectors.
        network: The network, with at least one hidden layer.
        path: The file.
        precision: How the network computes: "fp32", "bf16" or "int8".

    Raises:
        InputError: If there is no such precision, the network is not calibrated for int8 or has no hidden layer, a
            weight or an embedding is NaN or infinite, embeddings are neither float32, float16 nor int8, the name of a
            column or task is no text for C, or a column is one that the file does not hold: raw numbers, attention, the
            last values of a bag.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision: got {shown(precision)}, wanted one of {', '.join(PRECISIONS)}")
    if precision == "int8" and network.quantization is None:
        raise InputError("precision: got int8 of a network that is not calibrated for it, wanted fp32 or bf16")
    if not network.hidden:
        raise InputError("network: got no hidden layer, wanted at least one")
    if (beyond := beyond_engine(encoder)) is not None:
        name, kind = beyond
        wanted = "ids, means of bags, or numbers in buckets: an engine file holds no others"
        raise InputError(f"column {name!r}: got {kind}, wanted {wanted}")
    parts = request_parts(encoder, inputs, network)
    if parts.embedding.dtype not in ops.ROW_KINDS:
        wanted = ", ".join(map(str, ops.ROW_KINDS))
        raise InputError(f"embeddings: got {parts.embedding.dtype}, wanted one of {wanted}")
    file = _Arrays()
    header = np.zeros((), HEADER)
    header["magic"], header["version"], header["precision"] = MAGIC, VERSION, PRECISIONS.index(precision)
    header["dim"], header["rows_kind"] = inputs.dim, ops.ROW_KINDS[parts.embedding.dtype]
    header["embedding"] = file.add_tensor("embeddings", parts.embedding)
    header["scales"] = NOTHING if parts.scales is None else file.add_tensor("embeddings", parts.scales)
    header["tables"] = file.add_records(TABLE, [_table(file, table) for table in parts.tables])
    header["fields"] = file.add_records(FIELD, [_field(file, field) for field in parts.fields])
    header["tasks"] = file.add_records(TASK, [(file.add_text("task", task),) for task in network.tasks])
    split = parts.split
    header["common_columns"] = file.add_tensor("columns", split.common_columns)
    header["own_columns"] = file.add_tensor("columns", split.own_columns)
    if split.common is not None:
        header["common_layers"] = file.add_records(LAYER, _layers(file, split.common, takes_bias=False))
    header["own_layers"] = file.add_records(LAYER, _layers(file, split.own, takes_bias=split.common is not None))
    file.write(path, header)


class _Arrays:
    """The arrays of a file, one after the other behind its header."""

    def __init__(self) -> None:
        self._arrays: list[tuple[int, Bytes]] = []  # where each begins
        self._end = HEADER.itemsize
        self._places: dict[tuple[int, int], tuple[int, int]] = {}  # of tensors, by their memory
        self._kept: list[Tensor] = []

    def add(self, array: NDArray[Any]) -> tuple[int, int]:
        """Append an array; return the Array that names it."""
        if not array.size:
            return NOTHING
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        self._arrays.append((offset, np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
        self._end = offset + array.nbytes
        return offset, array.size

    def add_tensor(self, name: str, tensor: Tensor) -> tuple[int, int]:
        """Append a tensor, unless it is there already; floats must be finite."""
        key = tensor.data_ptr(), tensor.nbytes
        if key not in self._places:
            if tensor.is_floating_point():
                checked_file.check_finite(name, tensor)
            self._kept.append(tensor)  # no other one gets its memory
            self._places[key] = self.add(tensor.cpu().contiguous().numpy())
        return self._places[key]

    def add_text(self, name: str, text: str) -> tuple[int, int]:
        """Append text as C has it."""
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name}: got {shown(text)}, wanted text that UTF-8 can write") from error
        if b"\0" in encoded or not encoded:
            raise InputError(f"{name}: got {shown(text)}, wanted text that is not empty, without a character 0")
        return self.add(np.frombuffer(encoded + b"\0", np.uint8))

    def add_records(self, dtype: np.dtype[Any], records: list[tuple[Any, ...]]) -> tuple[int, int]:
        """Append structures."""
        return self.add(np.array(records, dtype))

    def write(self, path: str | Path, header: NDArray[Any]) -> None:
        """Write the file; `header` gets its size and checksum."""
        header["bytes"] = self._end
        sha256 = hashlib.sha256()
        for part in self._parts(header):
            sha256.update(part)
        header["sha256"] = np.frombuffer(sha256.digest(), np.uint8)
        with whole_file(path) as temporary, temporary.open("wb") as file:
            for part in self._parts(header):
                file.write(part)

    def _parts(self, header: NDArray[Any]) -> Iterator[memoryview | bytes]:
        yield header.tobytes()
        end = HEADER.itemsize
        for offset, array in self._arrays:
            yield bytes(offset - end)
            yield array.data
            end = offset + array.nbytes


def _table(file: _Arrays, table: ops.IdTable) -> tuple[Any, ...]:
    keys = NOTHING if table.keys is None else file.add(table.keys)
    offsets = NOTHING if table.offsets is None else file.add(table.offsets)
    return ops.TABLE_KINDS.index(table.kind), 0, table.size, table.first_row, keys, offsets


def _field(file: _Arrays, field: ops.IdField) -> tuple[Any, ...]:
    name = file.add_text("column", field.column)
    separator = file.add_text(f"separator of {shown(field.column)}", field.separator)
    return name, separator, field.table, field.is_bag, field.is_common, 0


def _layers(file: _Arrays, network: FrozenNetwork, takes_bias: bool) -> list[tuple[Any, ...]]:
    tasks = ops.pack_layers(network, network.is_in_blocks, takes_bias)
    return [_layer(file, layer, layer is layers[-1]) for layers in tasks for layer in layers]


def _layer(file: _Arrays, layer: ops.PackLayer, is_head: bool) -> tuple[Any, ...]:
    slopes = layer.slope if isinstance(layer.slope, torch.Tensor) else None
    return (
        layer.values.dim() == 3,
        layer.in_features,
        layer.out_features,
        list(ACTIVATIONS).index(layer.activation),
        is_head,
        layer.takes_bias,
        1 if layer.planes is None else len(layer.planes),
        layer.task,
        layer.input_zero_point,
        layer.input_scale,
        0.0 if isinstance(layer.slope, torch.Tensor) else layer.slope,
        file.add_tensor("weights", layer.values),
        NOTHING if layer.planes is None else file.add_tensor("masks", layer.planes),
        NOTHING if layer.bias is None else file.add_tensor("biases", layer.bias),
        NOTHING if slopes is None else file.add_tensor("slopes", slopes),
    )
