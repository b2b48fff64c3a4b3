"""torch's fast path through its transformers, which reads the weights of their layers instead of calling them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from lt4rec_sparse.nn.sparse import SparseMLP

_SWITCH = "activation_relu_or_gelu"  # 1 or 2 for the activations that the fast path has, 0 for no fast path


def leave_fast_path(model: nn.Module) -> None:
    """Have every `nn.TransformerEncoderLayer` with a sparse layer call its layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_sparse(module):
            vars(module)[_SWITCH] = 0


def restore_fast_path(model: nn.Module) -> None:
    """Undo `leave_fast_path` where no layer is sparse any more."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not _has_sparse(module):
            activation = module.activation
            is_relu = activation is F.relu or isinstance(activation, nn.ReLU)
            is_gelu = activation is F.gelu or isinstance(activation, nn.GELU)
            vars(module)[_SWITCH] = 1 if is_relu else 2 if is_gelu else 0


def _has_sparse(module: nn.Module) -> bool:
    return any(isinstance(child, SparseMLP) for child in module.children())
