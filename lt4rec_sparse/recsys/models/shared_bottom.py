"""Shared bottom: the lower layers once for all tasks, and a tower per task above them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models.inputs import TaskInputs
from lt4rec_sparse.recsys.models.mlp import MLP, lower_and_upper
from lt4rec_sparse.recsys.models.multitask import MultiTask


class SharedBottom(MultiTask):
    """`logit_t = tower_t(bottom(x))`: which layers are shared is chosen by hand.

    Parameters of the MLP, two tasks, 1000 inputs, hidden 512-256-128: 0.71 million; hard sharing has 1.35 million.

    Args:
        inputs: Ids to the bottom's input.
        tasks: The tasks' names.
        hidden: Widths of a task's hidden layers: the bottom's and then its tower's.
        shared_layers: How many of them belong to the bottom; by default all but the last.

    Raises:
        ValueError: If `shared_layers` is not 1 to the number of hidden layers.

    Source: Caruana, "Multitask learning" (Machine Learning 28, 1997); the baseline of MMoE (KDD 2018), Figure 1a.
    """

    def __init__(
        self,
        inputs: CrossedEmbeddings | TaskInputs,
        tasks: Sequence[str],
        hidden: Sequence[int] = (512, 256, 128),
        *,
        shared_layers: int | None = None,
    ) -> None:
        super().__init__(inputs, tasks)
        lower, upper = lower_and_upper(hidden)
        if shared_layers is not None:
            if not 1 <= shared_layers <= len(hidden):
                raise ValueError(f"shared_layers: got {shared_layers}, wanted 1 to {len(hidden)}, the hidden layers")
            lower, upper = tuple(hidden[:shared_layers]), tuple(hidden[shared_layers:])
        self.bottom = MLP(inputs.out_features, lower)
        self.towers = nn.ModuleDict({task: MLP(lower[-1], upper, head=1) for task in self.tasks})

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """Run the bottom once, and the towers of `tasks`: `[batch, len(tasks)]`."""
        h = self.bottom(x)
        return torch.cat([self.towers[task](h) for task in tasks], dim=1)
