"""The only door to the kernels: every operation's schema, checks, shape rule and gradient, written once."""

from lt4rec_sparse.kernels.autocast import is_autocast, without_autocast
from lt4rec_sparse.kernels.cpu import PackLayer, pack_layers
from lt4rec_sparse.kernels.request import ROW_KINDS, TABLE_KINDS, IdField, IdTable, RequestEngine, Split
from lt4rec_sparse.kernels.training import Pattern
from lt4rec_sparse.ops.compressed_mlp import compressed_mlp, pattern_of
from lt4rec_sparse.ops.masked_linear import masked_linear
from lt4rec_sparse.ops.sparse_mlp import (
    X_DTYPES,
    Executor,
    cpu_engine,
    executor,
    layer_inputs,
    layout_nbytes,
    layouts,
    name_executor,
    prepack,
    sparse_mlp,
    sparse_mlp_of,
)
from lt4rec_sparse.ops.tracing import is_traced

__all__ = [
    "ROW_KINDS",
    "TABLE_KINDS",
    "X_DTYPES",
    "Executor",
    "IdField",
    "IdTable",
    "PackLayer",
    "Pattern",
    "RequestEngine",
    "Split",
    "compressed_mlp",
    "cpu_engine",
    "executor",
    "is_autocast",
    "is_traced",
    "layer_inputs",
    "layout_nbytes",
    "layouts",
    "masked_linear",
    "name_executor",
    "pack_layers",
    "pattern_of",
    "prepack",
    "sparse_mlp",
    "sparse_mlp_of",
    "without_autocast",
]
