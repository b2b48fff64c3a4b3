"""torch's transformer layers, whose forwards show nothing: their feed-forward part, and their fast path."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lt4rec_sparse.nn.reading import computes_as
from lt4rec_sparse.nn.sparse import SparseMLP
from lt4rec_sparse.nn.traced import FUNCTIONS

LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_SWITCH = "activation_relu_or_gelu"  # 1 or 2 for the activations that the fast path has, 0 for no fast path


def feed_forward(module: nn.Module) -> dict[str, nn.Module]:
    """Return name -> the parts that such a layer runs one after the other; nothing of another module.

    Its dropout and second linear layer are children next to the first; its activation is an attribute.
    """
    for kind in LAYERS:
        if computes_as(module, kind) and vars(kind)["_ff_block"] is getattr(type(module), "_ff_block", None):
            activation: Any = module.activation
            if not isinstance(activation, nn.Module):
                if activation not in FUNCTIONS:
                    return {}
                activation = FUNCTIONS[activation]()
            first, dropout, second = (getattr(module, name) for name in ("linear1", "dropout", "linear2"))
            return {"linear1": first, "activation": activation, "dropout": dropout, "linear2": second}
    return {}


def call_sparse_parts(model: nn.Module) -> None:
    """Have torch's transformer layers call their sparse parts: off the fast path, which reads weights instead.

    Where one call computes the whole feed-forward part, in the place of `linear1`, nothing else does.
    """
    for module in model.modules():
        if isinstance(module, LAYERS) and _has_sparse(module):
            leave_fast_path(module)
            first = module.linear1
            if isinstance(first, SparseMLP) and first.network.depth > 1:
                module.dropout, module.linear2 = nn.Identity(), nn.Identity()  # type: ignore[assignment]
                module._modules.pop("activation", None)
                vars(module)["activation"] = _unchanged
    leave_nested_tensors(model, SparseMLP)


def leave_nested_tensors(model: nn.Module, *kinds: type[nn.Module]) -> None:
    """Let torch's encoders with a layer of some kinds within keep padded tensors as they are.

    In eval and without gradients an encoder makes nested tensors of them, for the fast path: it reads the weights of
    its first layer for that, and these kinds do not read nested tensors.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(part, kinds) for part in module.modules()):
            module.use_nested_tensor = False


def leave_fast_path(module: nn.Module) -> None:
    """Let a layer of torch's transformers call its parts, at inference too; another module stays as it is."""
    if isinstance(module, nn.TransformerEncoderLayer):
        vars(module)[_SWITCH] = 0


def restore_fast_path(model: nn.Module) -> None:
    """Let torch's transformer layers take their fast path again where no part is sparse any more."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not _has_sparse(module):
            activation = module.activation
            is_relu = activation is F.relu or isinstance(activation, nn.ReLU)
            is_gelu = activation is F.gelu or isinstance(activation, nn.GELU)
            vars(module)[_SWITCH] = 1 if is_relu else 2 if is_gelu else 0


def _unchanged(z: Tensor) -> Tensor:
    return z


def _has_sparse(module: nn.Module) -> bool:
    return any(isinstance(child, SparseMLP) for child in module.children())
