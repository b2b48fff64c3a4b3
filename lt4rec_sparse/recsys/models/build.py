"""Build a model from its name, and count the multiply-adds of its network per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn import MaskedLinear, MaskedMLP
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models.inputs import CROSSES, TaskInputs
from lt4rec_sparse.recsys.models.networks import CLASSES, Inputs, MultiTask

MODELS = tuple(CLASSES)


def build(
    name: str,
    fields: Sequence[tuple[str, str, bool]],
    table_sizes: Mapping[str, int],
    tasks: Sequence[str],
    hidden: Sequence[int],
    embedding_dim: int,
    *,
    cross: str = "dlrm",
    exclusive_dim: int = 0,
    sparse_gradients: bool = False,
    numbers: int = 0,
    attention: Mapping[str, str] = {},
) -> MultiTask:
    """Return a new model by its name, its start drawn from torch's global generator.

    Args:
        name: One of `MODELS`; "single_task" is "sparse_sharing" with one task.
        fields: The fields, in the order of the encoder.
        table_sizes: Table name -> number of rows.
        tasks: The tasks' names, in order.
        hidden: Widths of the hidden layers; the model's class says of which layers.
        embedding_dim: Width of an embedding that tasks share.
        cross: One of `inputs.CROSSES`.
        exclusive_dim: Width of a task's own embedding; 0 for none.
        sparse_gradients: Whether gradients of embeddings are sparse tensors (`CrossedEmbeddings`).
        numbers: Raw numbers per row (`FeatureEncoder.n_numbers`).
        attention: Column of bags -> the column that they attend to (`FeatureEncoder.attention`).

    Raises:
        ValueError: If an argument is out of its range.
    """
    for kind, value, known in (("model", name, MODELS), ("cross", cross, CROSSES)):
        if value not in known:
            raise ValueError(f"{kind}: got {value!r}, wanted one of {', '.join(known)}")
    if name == "single_task" and len(tasks) != 1:
        raise ValueError(f"tasks of single_task: got {', '.join(tasks)}, wanted one")
    if not hidden or min(hidden) < 1:
        raise ValueError(f"hidden: got {tuple(hidden)}, wanted at least one width, each at least 1")
    for width, number, least in (("embedding_dim", embedding_dim, 1), ("exclusive_dim", exclusive_dim, 0)):
        if number < least:
            raise ValueError(f"{width}: got {number}, wanted at least {least}")
    how: dict[str, Any] = {"sparse_gradients": sparse_gradients, "numbers": numbers, "attention": attention}
    inputs: Inputs
    if cross == "dlrm" and not exclusive_dim:
        inputs = CrossedEmbeddings(fields, table_sizes, embedding_dim, **how)
    else:
        inputs = TaskInputs(fields, table_sizes, tasks, embedding_dim, cross, exclusive_dim, **how)
    model: MultiTask = CLASSES[name](inputs, tasks, hidden)
    return model


@torch.no_grad()
def mlp_multiply_adds(model: nn.Module) -> int:
    """Return the multiply-adds of all layers after the input, for one row and all tasks, of a model of `build`.

    In a masked layer each task's kept weights count, except those that read a neuron without weights: its value is a
    constant, and compaction removes it. In a plain layer, such as a gate, all weights count, as often as the layer
    runs, which is found by running the model on one row. Mixtures and dot products are not counted.
    """
    assert isinstance(model, MultiTask)
    plain = [m for m in model.modules() if isinstance(m, nn.Linear) and not isinstance(m, MaskedLinear)]
    # Each task runs the weights that its mask keeps, whatever the tasks share.
    total = sum(_kept(m) for m in model.modules() if isinstance(m, MaskedMLP))

    def count(layer: Any, args: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal total
        total += layer.weight.numel() * (result.numel() // layer.out_features)

    multi = sum(field.multi for field in model.inputs.fields)
    row = EncodedFeatures(
        torch.zeros(1, len(model.inputs.fields) - multi, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(multi + 1, dtype=torch.int64),
        torch.zeros(1, model.inputs.numbers),
    )
    hooks = [layer.register_forward_hook(count) for layer in plain]
    try:
        model(row.to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _kept(mlp: MaskedMLP) -> int:
    total = 0
    for task in mlp.tasks:
        alive: Tensor | None = None
        for layer in mlp.masked_layers():
            kept = layer.mask(task)
            total += int((kept if alive is None else kept & alive).sum())
            alive = kept.any(1)
    return total
