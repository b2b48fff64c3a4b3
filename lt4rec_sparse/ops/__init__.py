"""The only door to the kernels: every operation's schema, checks, shape rule and gradient, written once."""

from lt4rec_sparse.ops.masked_linear import masked_linear, masked_linear_tasks, without_autocast
from lt4rec_sparse.ops.sparse_mlp import (
    PRECISIONS,
    X_DTYPES,
    Codes,
    GpuParts,
    Network,
    SparseLayer,
    cpu_engine,
    layer_inputs,
    prepack,
    prepack_gpu,
    sparse_mlp,
    sparse_mlp_dense,
    sparse_mlp_gpu,
    sparse_mlp_out,
)

__all__ = [
    "PRECISIONS",
    "X_DTYPES",
    "Codes",
    "GpuParts",
    "Network",
    "SparseLayer",
    "cpu_engine",
    "layer_inputs",
    "masked_linear",
    "masked_linear_tasks",
    "prepack",
    "prepack_gpu",
    "sparse_mlp",
    "sparse_mlp_dense",
    "sparse_mlp_gpu",
    "sparse_mlp_out",
    "without_autocast",
]
