"""The wide part of a model: each task's linear logit over the ids themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lt4rec_sparse.nn.masked import check_tasks
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings


class FirstOrder(nn.Module):
    """One weight per id and task: `logit_task = sum over fields of w_task[id]`, the mean if a field has many values.

    Weights start at zero, so that the model starts as its deep part alone. There is no bias: the deep part has one.
    Each task has its own tables, so that a step for one task moves no other's. Crossed ids are columns of the schema.

    Args:
        fields: The fields, in the order of the encoder.
        table_sizes: Table name -> number of rows.
        tasks: The tasks' names.

    Source: Cheng et al., Wide & Deep (arXiv 1606.07792), section 3.1.
    """

    def __init__(
        self, fields: Sequence[tuple[str, str, bool]], table_sizes: Mapping[str, int], tasks: Sequence[str]
    ) -> None:
        super().__init__()
        self.weights = nn.ModuleDict(
            {task: CrossedEmbeddings(fields, table_sizes, dim=1, std=0.0) for task in check_tasks(tasks)}
        )

    def forward(self, features: EncodedFeatures, task: str) -> Tensor:
        """Return one task's logits: `[batch, 1]`."""
        weights = self.weights[task]
        assert isinstance(weights, CrossedEmbeddings)
        return weights.embed(features).sum(1)  # [batch, n, 1] -> [batch, 1]
