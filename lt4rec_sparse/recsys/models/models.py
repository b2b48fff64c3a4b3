"""The paper's models over one input: single-task, hard sharing, sparse sharing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn import MaskedMLP
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models.inputs import TaskInputs
from lt4rec_sparse.recsys.models.multitask import MultiTask


class SparseSharing(MultiTask):
    """One embedding, one cross and one MLP for all tasks; each task sees the MLP through its own mask.

    With one task and a full mask this is the paper's single-task baseline of the same size.

    Args:
        inputs: Ids to the MLP's input.
        tasks: The tasks' names.
        hidden: Widths of the hidden layers.

    Source: LT4REC (arXiv 2008.09872), Figure 3 (S-Weight) and Figure 1 (single task).
    """

    def __init__(
        self, inputs: CrossedEmbeddings | TaskInputs, tasks: Sequence[str], hidden: Sequence[int] = (512, 256, 128)
    ) -> None:
        super().__init__(inputs, tasks)
        self.mlp = MaskedMLP(inputs.out_features, hidden, tasks=self.tasks)

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """Run the MLP through the masks of `tasks`: `[batch, len(tasks)]`."""
        logits: Tensor = self.mlp(x, tasks[0] if len(tasks) == 1 else None)
        return logits


class HardSharing(MultiTask):
    """Embedding and cross are shared; each task has its own MLP.

    Args:
        inputs: Ids to the MLPs' input.
        tasks: The tasks' names.
        hidden: Widths of each MLP's hidden layers.

    Source: LT4REC (arXiv 2008.09872), Figure 2.
    """

    def __init__(
        self, inputs: CrossedEmbeddings | TaskInputs, tasks: Sequence[str], hidden: Sequence[int] = (512, 256, 128)
    ) -> None:
        super().__init__(inputs, tasks)
        self.mlps = nn.ModuleDict({task: MaskedMLP(inputs.out_features, hidden, tasks=(task,)) for task in self.tasks})

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """Run the MLPs of `tasks`: `[batch, len(tasks)]`."""
        return torch.cat([self.mlps[task](x, task) for task in tasks], dim=1)
