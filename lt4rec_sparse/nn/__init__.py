"""Modules: masked ones are trained (`masked`), sparse ones are served (`sparse`, `gpu`), inputs are both."""

from lt4rec_sparse.nn.gpu import GpuMLP, measure_plan
from lt4rec_sparse.nn.masked import MaskedLinear, MaskedMLP
from lt4rec_sparse.nn.plan import Plan, PlannedMLP
from lt4rec_sparse.nn.sparse import SparseLinear, SparseMLP, freeze

__all__ = [
    "GpuMLP",
    "MaskedLinear",
    "MaskedMLP",
    "Plan",
    "PlannedMLP",
    "SparseLinear",
    "SparseMLP",
    "freeze",
    "measure_plan",
]
