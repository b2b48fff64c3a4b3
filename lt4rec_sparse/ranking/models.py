"""The paper's models over one input: single-task, hard sharing, sparse sharing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lt4rec_sparse.features import EncodedFeatures
from lt4rec_sparse.nn import CrossedEmbeddings, MaskedMLP


class SparseSharing(nn.Module):
    """One embedding, one cross and one MLP for all tasks; each task sees the MLP through its own mask.

    With one task and its mask still full this is the paper's single-task baseline of the same size.

    Args:
        inputs: Ids to the MLP's input.
        tasks: The tasks' names.
        hidden: Widths of the hidden layers.

    Source: LT4REC (arXiv 2008.09872), Figure 3 (S-Weight) and Figure 1 (single task).
    """

    def __init__(
        self, inputs: CrossedEmbeddings, tasks: Sequence[str], hidden: Sequence[int] = (512, 256, 128)
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.mlp = MaskedMLP(inputs.out_features, hidden, tasks=tasks)
        self.tasks = self.mlp.tasks

    def forward(self, features: EncodedFeatures, task: str | None = None) -> Tensor:
        """Score a batch.

        Returns:
            Logits: `[batch, 1]` of one task, or `[batch, tasks]`.
        """
        logits: Tensor = self.mlp(self.inputs(features), task)
        return logits


class HardSharing(nn.Module):
    """Embedding and cross shared, an MLP of its own for each task.

    Args:
        inputs: Ids to the MLPs' input.
        tasks: The tasks' names.
        hidden: Widths of each MLP's hidden layers.

    Source: LT4REC (arXiv 2008.09872), Figure 2.
    """

    def __init__(
        self, inputs: CrossedEmbeddings, tasks: Sequence[str], hidden: Sequence[int] = (512, 256, 128)
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.mlps = nn.ModuleDict({task: MaskedMLP(inputs.out_features, hidden, tasks=(task,)) for task in tasks})
        self.tasks = tuple(tasks)

    def forward(self, features: EncodedFeatures, task: str | None = None) -> Tensor:
        """Score a batch.

        Returns:
            Logits: `[batch, 1]` of one task, or `[batch, tasks]`.
        """
        x = self.inputs(features)
        return torch.cat([self.mlps[name](x, name) for name in ([task] if task else self.tasks)], dim=1)
