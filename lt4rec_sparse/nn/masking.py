"""Any model, made trainable through masks: its linear layers become masked ones, in place."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from lt4rec_sparse.nn import plain
from lt4rec_sparse.nn.convert import LEAST_SPARSITY
from lt4rec_sparse.nn.masked import MaskedLinear
from lt4rec_sparse.nn.transformer import leave_fast_path, leave_nested_tensors


def mask_linears(model: nn.Module, leave: Collection[str] = ()) -> dict[str, MaskedLinear]:
    """Put a `MaskedLinear` in the place of every `nn.Linear` of a model: `y = x @ (weight * mask).T + bias`.

    The model computes what it did until a mask changes. Parameters stay the same objects, so that ties between layers
    and an optimiser that has them hold; only a weight that is computed (pruned by `torch.nn.utils.prune`, parametrised)
    becomes a new one. Masks keep what `torch.nn.utils.prune` kept. Without it they keep what is not zero of a layer of
    which at least half is zero but not all, as of one that was pruned before; any other layer they keep whole: zeros
    that it was initialised with are trained.

    Left as they are: layers with a forward or hooks of their own, of the forward or the backward pass, and the output
    of an `nn.MultiheadAttention`, whose weight is read instead of called. An `nn.TransformerEncoderLayer` leaves its
    fast path, which would not see masks.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> list(mask_linears(model, leave=["2"])), type(model[0]).__name__, type(model[2]).__name__
        (['0'], 'MaskedLinear', 'Linear')

    Args:
        model: Any module that contains linear layers.
        leave: Names of layers that stay dense, as `named_modules` has them: a head, for example.

    Returns:
        Name -> masked layer, of all that the model has now.

    Raises:
        ValueError: If a name is none of a linear layer, nothing can be masked, or the model itself is the layer.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if unknown := [name for name in leave if name not in linears]:
        raise ValueError(f"leave: got {', '.join(map(repr, unknown))}, wanted names of linear layers")
    if "" in linears:
        raise ValueError("model: got a linear layer, wanted a model that contains it; MaskedLinear.from_linear")
    left = [linears[name] for name in leave]
    masked: dict[nn.Module, MaskedLinear] = {}
    for linear in linears.values():
        if isinstance(linear, MaskedLinear):
            masked[linear] = linear
        elif not any(linear is one for one in left) and not _is_watched(linear) and plain.obstacle(linear) is None:
            masked[linear] = _masked(linear)
    if not masked:
        raise ValueError(f"model: got a {type(model).__name__} without linear layers to mask, wanted at least one")
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in masked:
                parent._modules[name] = masked[child]
        if MaskedLinear in map(type, parent.children()):
            leave_fast_path(parent)
    leave_nested_tensors(model, MaskedLinear)
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def _is_watched(linear: nn.Linear) -> bool:
    """Tell whether a layer has hooks of the backward pass; `plain.obstacle` knows those of the forward pass."""
    return bool(linear._backward_hooks or linear._backward_pre_hooks)


def _masked(linear: nn.Linear) -> MaskedLinear:
    made = MaskedLinear.from_linear(linear).train(linear.training)
    is_pruned = "weight_mask" in linear._buffers  # by torch.nn.utils.prune
    if not is_pruned and not 0 < made.mask().float().mean().item() <= 1 - LEAST_SPARSITY:
        made.set_mask(torch.ones_like(made.mask()))
    for name in ("weight", "bias"):
        if (own := linear._parameters.get(name)) is not None:  # not while it is computed from others
            made._parameters[name] = own
    return made
