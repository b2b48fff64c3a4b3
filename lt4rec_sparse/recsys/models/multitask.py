"""The base of every ranking model: inputs, and a network that computes the tasks' logits from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn.masked import check_tasks, task_index
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models.inputs import Seen, TaskInputs


class MultiTask(nn.Module, ABC):
    """A model of several tasks over one input, or over one view of it per task.

    A model defines `logits(x, tasks)`. If every task sees the same `x`, it runs once. If each sees its own, task t's
    logit is `logits(x_t, (t,))`: then the layers that tasks share run once per task.

    Args:
        inputs: Ids to the network's input: one for all tasks, or `TaskInputs`.
        tasks: The tasks' names, in order.

    Raises:
        ValueError: If there is no task, or a task is repeated.
    """

    inputs: Any  # CrossedEmbeddings, which can be served, or TaskInputs

    def __init__(self, inputs: CrossedEmbeddings | TaskInputs, tasks: Sequence[str]) -> None:
        super().__init__()
        self.inputs = inputs
        self.tasks = check_tasks(tasks)

    def forward(self, features: EncodedFeatures, task: str | None = None) -> Tensor:
        """Score a batch.

        Returns:
            Logits: `[batch, 1]` for one task, or `[batch, tasks]`.

        Raises:
            ValueError: If there is no such task.
        """
        names = self.tasks if task is None else (self.tasks[task_index(self.tasks, task)],)
        if isinstance(self.inputs, TaskInputs):
            seen: Seen = self.inputs(features, self.reads(names))
        else:
            seen = Seen(dict.fromkeys(self.reads(names), self.inputs(features)), {})
        logits = self.score(seen.views, names)
        if seen.logits:
            logits = logits + torch.cat([seen.logits[name] for name in names], dim=1)
        return logits

    def reads(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """Return the tasks whose views are needed to score `tasks`."""
        return tasks

    def score(self, views: Mapping[str, Tensor], tasks: tuple[str, ...]) -> Tensor:
        """Return the network's logits `[batch, len(tasks)]` if each task sees its own view."""
        first, *others = (views[task] for task in tasks)
        if all(view is first for view in others):
            return self.logits(first, tasks)
        return torch.cat([self.logits(views[task], (task,)) for task in tasks], dim=1)

    @abstractmethod
    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """Return the network's logits `[batch, len(tasks)]` if the tasks see the same `x [batch, in_features]`.

        Args:
            x: The network's input.
            tasks: All of the model's tasks in order, or one.
        """
