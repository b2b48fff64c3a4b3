"""Modules: masked ones are trained, sparse ones are served, `freeze` makes the latter from the former."""

from lt4rec_sparse.nn.convert import freeze, unfreeze
from lt4rec_sparse.nn.dice import Dice
from lt4rec_sparse.nn.layer_report import Report, report
from lt4rec_sparse.nn.masked import MaskedLinear, MaskedMLP
from lt4rec_sparse.nn.masking import mask_linears
from lt4rec_sparse.nn.module_file import load_module, save_module
from lt4rec_sparse.nn.optim import MaskedAdam
from lt4rec_sparse.nn.plan import Plan
from lt4rec_sparse.nn.sparse import SparseLinear, SparseMLP

__all__ = [
    "Dice",
    "MaskedAdam",
    "MaskedLinear",
    "MaskedMLP",
    "Plan",
    "Report",
    "SparseLinear",
    "SparseMLP",
    "freeze",
    "load_module",
    "mask_linears",
    "report",
    "save_module",
    "unfreeze",
]
