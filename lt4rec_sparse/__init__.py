"""Sparse kernels, training and serving for LT4REC: one shared ranking network, one lottery-ticket mask per task."""

from lt4rec_sparse.masks import Mask
from lt4rec_sparse.nn import (
    GpuMLP,
    MaskedLinear,
    MaskedMLP,
    Plan,
    PlannedMLP,
    SparseLinear,
    SparseMLP,
    freeze,
    measure_plan,
)
from lt4rec_sparse.ranker import Ranker, load, save

__version__ = "0.1.0"

__all__ = [
    "GpuMLP",
    "Mask",
    "MaskedLinear",
    "MaskedMLP",
    "Plan",
    "PlannedMLP",
    "Ranker",
    "SparseLinear",
    "SparseMLP",
    "freeze",
    "load",
    "measure_plan",
    "save",
]
