"""PLE: levels of experts, some of which belong to one task and some to all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models.gate import Gate
from lt4rec_sparse.recsys.models.inputs import TaskInputs
from lt4rec_sparse.recsys.models.mlp import MLP, half, lower_and_upper
from lt4rec_sparse.recsys.models.multitask import MultiTask


class Extraction(nn.Module):
    """One level: task t's gate mixes its own experts of `x_t` and the shared ones of `x_shared`.

    Below the last level a further gate, over `x_shared`, mixes all experts of all tasks: the next level's `x_shared`.

    Args:
        in_features: Width of the level's inputs.
        expert: Widths of each expert's layers.
        tasks: The tasks' names.
        task_experts: Number of experts that belong to each task.
        shared_experts: Number of shared experts.
        last: Whether this is the last level.

    Source: Tang et al. (RecSys 2020, doi 10.1145/3383313.3412236), sections 4.1 (CGC) and 4.2.
    """

    def __init__(
        self,
        in_features: int,
        expert: Sequence[int],
        tasks: Sequence[str],
        task_experts: int,
        shared_experts: int,
        last: bool,
    ) -> None:
        super().__init__()
        self.own = nn.ModuleDict(
            {task: nn.ModuleList(MLP(in_features, expert) for _ in range(task_experts)) for task in tasks}
        )
        self.shared = nn.ModuleList(MLP(in_features, expert) for _ in range(shared_experts))
        self.gates = nn.ModuleDict({task: Gate(in_features, task_experts + shared_experts) for task in tasks})
        self.shared_gate = None if last else Gate(in_features, task_experts * len(tasks) + shared_experts)

    def forward(self, x: Mapping[str, Tensor], x_shared: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Mix the experts for each task of `x`.

        Args:
            x: Task -> `[batch, in_features]`: every task; at the last level some may be left out.
            x_shared: `[batch, in_features]`.

        Returns:
            Task -> `[batch, expert width]`, and the shared vector of that shape, which the last level leaves as it is.
        """
        shared = [expert(x_shared) for expert in self.shared]
        own = {task: [expert(x_t) for expert in self._experts(task)] for task, x_t in x.items()}
        mixed = {task: self.gates[task](x_t, [*own[task], *shared]) for task, x_t in x.items()}
        if self.shared_gate is None:
            return mixed, x_shared
        everything = [output for outputs in own.values() for output in outputs] + shared
        return mixed, self.shared_gate(x_shared, everything)

    def _experts(self, task: str) -> nn.ModuleList:
        experts = self.own[task]
        assert isinstance(experts, nn.ModuleList)
        return experts


class PLE(MultiTask):
    """`logit_t = tower_t(x_t)` of the last level, `(x_t, x_shared) = level(x_t, x_shared)` from `x` on.

    One level is CGC. At the last level a task's own experts learn from that task alone; below it, through the shared
    gate, from all.

    Parameters of the MLP, two tasks, 1000 inputs, hidden 512-256-128: 1.46 million; hard sharing has 1.35 million.

    Args:
        inputs: Ids to the first level's input.
        tasks: The tasks' names.
        hidden: Widths from which the defaults below are derived.
        levels: Number of levels.
        task_experts: Number of experts that belong to each task, per level.
        shared_experts: Number of shared experts, per level.
        expert: Widths of each expert's layers; by default half of all of `hidden` but the last.
        tower: Widths of each tower's hidden layers; by default the last of `hidden`.

    Raises:
        ValueError: If there is no level, no expert of one kind, or an expert without a layer.

    Source: Tang et al. (RecSys 2020, doi 10.1145/3383313.3412236).
    """

    def __init__(
        self,
        inputs: CrossedEmbeddings | TaskInputs,
        tasks: Sequence[str],
        hidden: Sequence[int] = (512, 256, 128),
        *,
        levels: int = 2,
        task_experts: int = 1,
        shared_experts: int = 2,
        expert: Sequence[int] | None = None,
        tower: Sequence[int] | None = None,
    ) -> None:
        super().__init__(inputs, tasks)
        lower, upper = lower_and_upper(hidden)
        expert, tower = half(lower) if expert is None else expert, upper if tower is None else tower
        for name, count in (("levels", levels), ("task_experts", task_experts), ("shared_experts", shared_experts)):
            if count < 1:
                raise ValueError(f"{name}: got {count}, wanted at least 1")
        if not expert:
            raise ValueError("expert: got no layer, wanted at least one width")
        widths = (inputs.out_features, *(expert[-1] for _ in range(levels - 1)))
        self.levels = nn.ModuleList(
            Extraction(width, expert, self.tasks, task_experts, shared_experts, last=i == levels - 1)
            for i, width in enumerate(widths)
        )
        self.towers = nn.ModuleDict({task: MLP(expert[-1], tower, head=1) for task in self.tasks})

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """Run the levels, and the towers of `tasks`: `[batch, len(tasks)]`."""
        of_task, shared = dict.fromkeys(self.tasks, x), x
        for level in self.levels:
            last = level is self.levels[-1]
            of_task, shared = level({task: of_task[task] for task in (tasks if last else self.tasks)}, shared)
        return torch.cat([self.towers[task](of_task[task]) for task in tasks], dim=1)
