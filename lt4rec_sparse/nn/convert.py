"""`freeze`: where the type changes once, from what is trained to what is served."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn

from lt4rec_sparse.formats import BlockWeight, CompressedWeight, SharedWeight
from lt4rec_sparse.network import DenseLayer, FrozenNetwork, SparseLayer
from lt4rec_sparse.nn.masked import MaskedLinear, MaskedMLP
from lt4rec_sparse.nn.sparse import SparseLinear, SparseMLP


def freeze(model: nn.Module, sigmoid: bool = False) -> nn.Module:
    """Return a copy of `model` for serving, every masked layer in it replaced by its compressed form.

    `freeze(mlp)(x)` equals `mlp(x)` within rounding, for every task; the copy cannot be trained. Where all masks of an
    MLP keep whole blocks of 16 outputs x 4 inputs (or everything), its weights are compressed in blocks, which kernels
    run fastest.

    Example:
        >>> import torch
        >>> mlp = MaskedMLP(8, hidden=(4, 2), tasks=("ctr", "cvr"))
        >>> x = torch.ones(3, 8)
        >>> torch.allclose(freeze(mlp)(x), mlp(x), atol=1e-6)
        True

    Args:
        model: A `MaskedMLP`, a `MaskedLinear`, or any module that contains them.
        sigmoid: Whether the heads of the MLPs end in a sigmoid: probabilities instead of logits.

    Raises:
        ValueError: If the model contains no masked layer.
    """
    frozen: dict[int, nn.Module] = {}
    inner: set[int] = set()
    for module in model.modules():
        sparse = None if id(module) in inner else _freeze_masked(module, sigmoid)
        if sparse is not None:
            frozen[id(module)] = sparse
            inner |= {id(part) for part in module.modules()}
    if not frozen:
        raise ValueError(
            f"model: got a {type(model).__name__} without masked layers, wanted a MaskedMLP or MaskedLinear"
        )
    # As the memo of the copy, the frozen layers take the masked ones' place wherever they are referred to. Tensors that
    # are computed, such as the `weight` that torch.nn.utils.prune leaves beside its parts, do not copy themselves.
    memo: dict[int, object] = dict(frozen)
    for module in model.modules():
        for value in () if id(module) in inner else vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    result: nn.Module = copy.deepcopy(model, memo)
    return result.eval().requires_grad_(False)


def _freeze_masked(module: nn.Module, sigmoid: bool) -> nn.Module | None:
    if isinstance(module, MaskedLinear):
        return SparseLinear(FrozenNetwork(_sparse([module], "none")))
    if isinstance(module, MaskedMLP):
        hidden = _sparse(module.masked_layers(), "relu")
        heads = {}
        for task, head in module.heads.items():
            assert isinstance(head, nn.Linear)
            heads[task] = DenseLayer(_kept(head.weight), _kept(head.bias), "sigmoid" if sigmoid else "none")
        return SparseMLP(FrozenNetwork(hidden, heads))
    return None


def _sparse(layers: Iterable[MaskedLinear], activation: str) -> tuple[SparseLayer, ...]:
    layers = list(layers)
    masks = [{task: layer.mask(task).cpu() for task in layer.tasks} for layer in layers]
    in_blocks = all(BlockWeight.keeps_blocks(mask) for of_layer in masks for mask in of_layer.values())
    kind: type[CompressedWeight] = BlockWeight if in_blocks else SharedWeight
    sparse = []
    for layer, of_layer in zip(layers, masks, strict=True):
        weight, bias = layer.weight_and_bias()  # as pruning and parametrisations make them now
        compressed = kind.from_dense(weight.detach().cpu(), of_layer)
        sparse.append(SparseLayer(compressed, None if bias is None else _kept(bias), activation))
    return tuple(sparse)


def _kept(parameter: Tensor) -> Tensor:
    return parameter.detach().cpu().clone()
