"""MMoE: experts that all tasks share, and a gate per task that mixes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models.gate import Gate
from lt4rec_sparse.recsys.models.inputs import TaskInputs
from lt4rec_sparse.recsys.models.mlp import MLP, half, lower_and_upper
from lt4rec_sparse.recsys.models.multitask import MultiTask


class MMoE(MultiTask):
    """`logit_t = tower_t(sum over i of g_t(x)_i f_i(x))`, `g_t(x) = softmax(x @ gate_t.T)`.

    Parameters of the MLP, two tasks, 1000 inputs, hidden 512-256-128: 1.20 million; hard sharing has 1.35 million.

    Args:
        inputs: Ids to the experts' and the gates' input.
        tasks: The tasks' names.
        hidden: Widths from which the defaults below are derived.
        experts: How many experts.
        expert: Widths of each expert's layers; by default half of all of `hidden` but the last.
        tower: Widths of each tower's hidden layers; by default the last of `hidden`.

    Raises:
        ValueError: If there is no expert, or an expert without a layer.

    Source: Ma et al. (KDD 2018, doi 10.1145/3219819.3220007), section 4.2.
    """

    def __init__(
        self,
        inputs: CrossedEmbeddings | TaskInputs,
        tasks: Sequence[str],
        hidden: Sequence[int] = (512, 256, 128),
        *,
        experts: int = 4,
        expert: Sequence[int] | None = None,
        tower: Sequence[int] | None = None,
    ) -> None:
        super().__init__(inputs, tasks)
        lower, upper = lower_and_upper(hidden)
        expert, tower = half(lower) if expert is None else expert, upper if tower is None else tower
        if experts < 1 or not expert:
            raise ValueError(f"experts: got {experts} of widths {tuple(expert)}, wanted at least one, with a layer")
        width = inputs.out_features
        self.experts = nn.ModuleList(MLP(width, expert) for _ in range(experts))
        self.gates = nn.ModuleDict({task: Gate(width, experts) for task in self.tasks})
        self.towers = nn.ModuleDict({task: MLP(expert[-1], tower, head=1) for task in self.tasks})

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """Run the experts once, and the gates and towers of `tasks`: `[batch, len(tasks)]`."""
        outputs = [expert(x) for expert in self.experts]
        return torch.cat([self.towers[task](self.gates[task](x, outputs)) for task in tasks], dim=1)
