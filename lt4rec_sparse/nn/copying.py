"""A copy of a model that computes as the model does, where `copy.deepcopy` alone fails or changes it."""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any

from torch import Tensor, nn


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None, inner: Container[int] = ()) -> nn.Module:
    """Return a copy of a model.

    Tensors that are computed do not copy themselves: such as the `weight` that `torch.nn.utils.prune` leaves beside its
    parts. And a `nn.TransformerDecoderLayer` whose activation is a module has a ReLU instead after it was copied.

    Args:
        model: Any module.
        memo: id -> what takes the place of a module, wherever it is referred to; gets the copies of all others.
        inner: Ids of the modules that are replaced, and of all their parts.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in () if id(module) in inner else vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    result: nn.Module = copy.deepcopy(model, memo)
    for module in result.modules():
        if isinstance(module, nn.TransformerDecoderLayer) and "activation" in module._modules:
            vars(module).pop("activation", None)
    return result
