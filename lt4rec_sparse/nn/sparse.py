"""Layers that are served from compressed weights, and `freeze`, where the type changes once.

A `MaskedMLP` is trained and never served; a `SparseMLP` is served and never trained.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from lt4rec_sparse import ops
from lt4rec_sparse.formats import SharedWeight
from lt4rec_sparse.nn.masked import MaskedLinear, MaskedMLP
from lt4rec_sparse.ops import SparseLayer

Module = TypeVar("Module", bound=nn.Module)

ALL = "all"  # the one plane of a head, which belongs to its task alone and keeps every weight


class SparseMLP(nn.Module):
    """All tasks' sparse MLPs in one call of the CPU engine, from compressed weights.

    The hidden weights are one `SharedWeight` a layer: the union of the tasks' masks once, a bit plane a task. The
    engine's own layout is prepacked from them when the module is made, and lives only in memory.

    Args:
        hidden: The hidden layers, input first, all with the same tasks.
        heads: Task name -> its last layer, `[out_features, hidden[-1]]`, of one plane; in the order of the outputs.

    Raises:
        ValueError: If widths do not chain or tasks differ between layers.
    """

    def __init__(self, hidden: Sequence[SparseLayer], heads: dict[str, SparseLayer]) -> None:
        super().__init__()
        width = hidden[0].weight.shape[1] if hidden else next(iter(heads.values())).weight.shape[1]
        self.in_features = width
        for i, layer in enumerate(hidden):
            if layer.weight.shape[1] != width:
                raise ValueError(f"layer {i}: got in_features {layer.weight.shape[1]}, wanted {width}")
            if layer.weight.tasks != tuple(heads):
                raise ValueError(
                    f"layer {i}: got tasks {layer.weight.tasks}, wanted {tuple(heads)}, those of the heads"
                )
            width = layer.weight.shape[0]
        for task, head in heads.items():
            if head.weight.shape[1] != width:
                raise ValueError(f"head of {task}: got in_features {head.weight.shape[1]}, wanted {width}")
        self.hidden = tuple(hidden)
        self.heads = dict(heads)
        self.tasks = tuple(heads)
        self.out_features = sum(head.weight.shape[0] for head in heads.values())
        self.prepacked = ops.prepack(self._paths())

    def forward(self, x: Tensor) -> Tensor:
        """Score every task.

        Args:
            x: `[batch, in_features]`, float32.

        Returns:
            `[batch, tasks * out_features]`, float32: the tasks side by side, as `MaskedMLP.forward` without a task.
        """
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [batch, {self.in_features}]")
        if self.prepacked is None or x.device.type != "cpu":
            return ops.sparse_mlp_dense(x, self._paths())
        return ops.sparse_mlp(x, self.prepacked, self.out_features)

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical weights and biases."""
        return sum(layer_nbytes(layer) for layer in (*self.hidden, *self.heads.values()))

    @property
    def prepacked_nbytes(self) -> int:
        """Bytes of what the engine of this machine made from them; 0 without the engine."""
        return 0 if self.prepacked is None else self.prepacked.numel()

    def extra_repr(self) -> str:
        """Show widths, tasks and densities."""
        shapes = " -> ".join(str(layer.weight.shape[0]) for layer in self.hidden)
        union = [f"{layer.weight.nnz / (layer.weight.shape[0] * layer.weight.shape[1]):.1%}" for layer in self.hidden]
        return f"{self.in_features} -> {shapes}, tasks={', '.join(self.tasks)}, union density: {', '.join(union)}"

    def _paths(self) -> list[list[tuple[SparseLayer, str]]]:
        return [[*((layer, task) for layer in self.hidden), (head, ALL)] for task, head in self.heads.items()]


class SparseLinear(SparseMLP):
    """A linear layer served from a compressed weight: what `freeze` makes of a `MaskedLinear`.

    Args:
        weight: `[out_features, in_features]` for all its tasks; their outputs stand side by side.
        bias: `[out_features]`, or None.
    """

    def __init__(self, weight: SharedWeight, bias: Tensor | None) -> None:
        super().__init__((), {task: SparseLayer(weight, bias, "none") for task in weight.tasks})

    def _paths(self) -> list[list[tuple[SparseLayer, str]]]:
        return [[(layer, task)] for task, layer in self.heads.items()]

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical weight and bias; all tasks read the same."""
        return layer_nbytes(next(iter(self.heads.values())))

    def extra_repr(self) -> str:
        """Show widths, tasks and density."""
        weight = next(iter(self.heads.values())).weight
        return f"{weight.shape[1]} -> {weight.shape[0]}, tasks={', '.join(self.tasks)}, union nnz={weight.nnz}"


def freeze(model: Module, sigmoid: bool = False) -> nn.Module:
    """Return a copy of `model` for serving, every masked layer in it replaced by its compressed form.

    `freeze(mlp)(x)` equals `mlp(x)` within rounding, for every task; the copy cannot be trained.

    Example:
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
    frozen = _freeze_masked(model, sigmoid)
    if frozen is not None:
        return frozen
    result = _copy_without_masked(model)
    replaced = _freeze_children(model, result, sigmoid)
    if not replaced:
        raise ValueError(
            f"model: got a {type(model).__name__} without masked layers, wanted a MaskedMLP or MaskedLinear"
        )
    return result.eval().requires_grad_(False)


def freeze_layer(layer: nn.Linear, masks: dict[str, Tensor], activation: str) -> SparseLayer:
    """Compress one linear layer through the tasks' masks."""
    weight = SharedWeight.from_dense(layer.weight.detach().cpu(), {task: mask.cpu() for task, mask in masks.items()})
    return SparseLayer(weight, None if layer.bias is None else layer.bias.detach().cpu().clone(), activation)


def layer_nbytes(layer: SparseLayer) -> int:
    """Bytes of a layer's canonical weight and bias."""
    return layer.weight.nbytes + (0 if layer.bias is None else layer.bias.numel() * layer.bias.element_size())


def _freeze_masked(module: nn.Module, sigmoid: bool) -> nn.Module | None:
    if isinstance(module, MaskedLinear):
        layer = freeze_layer(module, {task: module.mask(task) for task in module.tasks}, "none")
        return SparseLinear(layer.weight, layer.bias)
    if isinstance(module, MaskedMLP):
        hidden = [
            freeze_layer(layer, {task: layer.mask(task) for task in module.tasks}, "relu")
            for layer in module.masked_layers()
        ]
        heads = {}
        for task, head in module.heads.items():
            assert isinstance(head, nn.Linear)
            kept = torch.ones_like(head.weight, dtype=torch.bool)
            heads[task] = freeze_layer(head, {ALL: kept}, "sigmoid" if sigmoid else "none")
        return SparseMLP(hidden, heads)
    return None


def _copy_without_masked(model: Module) -> Module:
    # The masked layers are replaced right after, so they are shared here instead of copied.
    masked = [module for module in model.modules() if isinstance(module, MaskedLinear | MaskedMLP)]
    return copy.deepcopy(model, {id(module): module for module in masked})


def _freeze_children(source: nn.Module, target: nn.Module, sigmoid: bool) -> int:
    replaced = 0
    for name, child in source.named_children():
        frozen = _freeze_masked(child, sigmoid)
        if frozen is not None:
            setattr(target, name, frozen)
            replaced += 1
        else:
            replaced += _freeze_children(child, target.get_submodule(name), sigmoid)
    return replaced
