"""A ranker as one call of the engine: what candidates have in common is computed once per request.

The inputs of `CrossedEmbeddings` fall into two groups: those that only fields in common make (`Schema.in_common`),
their vectors and their dot products with each other, and all others. So the first layer's sum has two parts,

    y = activation(x_own @ W_own.T + (x_common @ W_common.T + bias)),

the one in brackets formed once where a request gives each field in common once, and else for each candidate. Every
request is summed in that order, so that a candidate's scores depend neither on how its columns were given nor on who
else is in the request. In int8 both parts are sums of integers, each with scales of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lt4rec_sparse import ops
from lt4rec_sparse.formats import BlockWeight
from lt4rec_sparse.network import FrozenNetwork
from lt4rec_sparse.nn import SparseMLP
from lt4rec_sparse.ranker.features import FeatureEncoder
from lt4rec_sparse.ranker.features import tables as id_tables
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.ranker.rows import RoundedRows


class Parts(NamedTuple):
    """What a ranker is made of from raw values to scores, as the engine takes it."""

    tables: list[ops.IdTable]
    fields: list[ops.IdField]  # those with a single value first
    embedding: Tensor  # [rows, dim]
    scales: Tensor | None  # float32 [rows], of int8
    split: ops.Split


def request_engine(encoder: FeatureEncoder, inputs: CrossedEmbeddings, mlp: SparseMLP) -> ops.RequestEngine | None:
    """Return the engine's request of a ranker, or of its inputs where another executor runs the MLP (`has_engine`).

    None without an engine, where the embeddings are on another device, or where there are columns that it does not
    read: raw numbers, bags with attention or of which the last values count.
    """
    if ops.cpu_engine() == "reference" or inputs.device.type != "cpu" or beyond_engine(encoder):
        return None
    parts = request_parts(encoder, inputs, mlp.network, is_split=mlp.has_engine)
    if not parts.embedding.is_contiguous() or parts.embedding.dtype not in ops.ROW_KINDS:
        return None
    return ops.RequestEngine(*parts, mlp.precision)


def beyond_engine(encoder: FeatureEncoder) -> tuple[str, str] | None:
    """Return the first column that the engine does not read, and what it is of; None where it reads them all."""
    for column in encoder.schema.features:
        if column.is_number:
            return column.name, "raw numbers"
        if column.last or column.target is not None:
            return column.name, "the last values of a bag" if column.last else "attention"
    return None


def request_parts(
    encoder: FeatureEncoder, inputs: CrossedEmbeddings, network: FrozenNetwork, is_split: bool = True
) -> Parts:
    """Return a ranker's parts; without `is_split` nothing counts as in common."""
    common = {field.column for field in inputs.fields} & encoder.schema.in_common
    if not is_split or not network.hidden or len(common) == len(inputs.fields):
        common = set()  # where all is in common every request is of its own
    held = inputs.embedding
    columns = {column.name: column for column in encoder.schema.features}
    names = list(encoder.table_sizes)
    fields = [
        ops.IdField(
            field.column, names.index(field.table), field.multi, field.column in common, columns[field.column].separator
        )
        for field in encoder.fields
    ]
    split = split_network(network, common_inputs([field.is_common for field in fields], inputs.dim))
    tables = [_id_table(encoder, name, inputs.first_row(name)) for name in names]
    embedding = held.values if isinstance(held, RoundedRows) else held.detach()
    return Parts(tables, fields, embedding, held.scales if isinstance(held, RoundedRows) else None, split)


def common_inputs(is_common: list[bool], dim: int) -> Tensor:
    """Return which of the `n dim + n (n - 1) / 2` inputs only fields in common make, bool."""
    fields = torch.tensor(is_common)
    first, second = torch.triu_indices(len(fields), len(fields), offset=1)
    return torch.cat([fields.repeat_interleave(dim), fields[first] & fields[second]])


def split_network(network: FrozenNetwork, is_common: Tensor) -> ops.Split:
    """Split a network's first layer by its inputs, bool `[in_features]`; blocks of mixed inputs are not common."""
    columns = torch.arange(len(is_common))
    if not is_common.any():
        return ops.Split(None, network, columns[:0], columns)
    first, *others = network.hidden
    if isinstance(first.weight, BlockWeight):
        wide = BlockWeight.BLOCK[1]
        quads = torch.nn.functional.pad(is_common, (0, -len(is_common) % wide), value=True).view(-1, wide).all(1)
        is_common = quads.repeat_interleave(wide)[: len(is_common)]
    common, own = columns[is_common], columns[~is_common]
    if not len(common):  # no block is
        return ops.Split(None, network, common, own)
    quantization = network.quantization
    # An activation's slope goes with it.
    sums = first._replace(weight=first.weight.select_columns(common), activation="none", slope=0.0)
    of_first = None if quantization is None else {task: steps[:1] for task, steps in quantization.items()}
    rest = first._replace(weight=first.weight.select_columns(own), bias=None)
    return ops.Split(FrozenNetwork((sums,), {}, of_first), replace(network, hidden=(rest, *others)), common, own)


def _id_table(encoder: FeatureEncoder, name: str, first_row: int) -> ops.IdTable:
    table, size = encoder.table(name), encoder.table_sizes[name]
    if isinstance(table, id_tables.IntVocabulary):
        return ops.IdTable("ints", size, first_row, np.ascontiguousarray(table.keys))
    if isinstance(table, id_tables.QuantileTable):
        return ops.IdTable("cuts", size, first_row, np.ascontiguousarray(table.cuts))
    if isinstance(table, id_tables.StringVocabulary):
        arrays = table.to_arrays()
        return ops.IdTable("strings", size, first_row, arrays["bytes"], arrays["offsets"])
    is_int = next(column.type for column in encoder.schema.features if column.table == name) == "int"
    return ops.IdTable("hashed_ints" if is_int else "hashed_strings", size, first_row)
