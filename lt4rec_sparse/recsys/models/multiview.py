"""Two views of every field: an embedding that all tasks share, and a narrow one for each task alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn.masked import check_tasks
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings


class MultiviewEmbeddings(nn.Module):
    """Embed every field twice and cross all pairs, for each task: field i's vector is `[s_i; e_i]`.

    `x_task = [s_1, ..., s_n, e_1, ..., e_n, s_i . s_j + e_i . e_j for i < j]`, `s` shared and `e` the task's own: the
    cross of `CrossedEmbeddings` over the joined vectors, since their dot product is the sum of the parts'. A step for
    one task moves its own embeddings and the shared ones, and no others.

    Args:
        fields: The fields, in the order of the encoder.
        table_sizes: Table name -> number of rows.
        tasks: The tasks' names.
        dim: Width of a shared embedding.
        exclusive_dim: Width of a task's own embedding.
        std: Standard deviation of the initial embeddings.

    Raises:
        ValueError: If there is no field, a field's table has no size, or `exclusive_dim` is below 1.

    Source: LT4REC (arXiv 2008.09872), sections 2.2 and 3.1, S-Weight-multiview: 32 shared and 8 exclusive.
    """

    def __init__(
        self,
        fields: Sequence[tuple[str, str, bool]],
        table_sizes: Mapping[str, int],
        tasks: Sequence[str],
        dim: int = 16,
        exclusive_dim: int = 8,
        std: float = 0.05,
    ) -> None:
        super().__init__()
        if exclusive_dim < 1:
            raise ValueError(f"exclusive_dim: got {exclusive_dim}, wanted at least 1")
        self.tasks = check_tasks(tasks)
        self.shared = CrossedEmbeddings(fields, table_sizes, dim, std)
        self.exclusive = nn.ModuleDict(
            {task: CrossedEmbeddings(fields, table_sizes, exclusive_dim, std) for task in self.tasks}
        )
        self.fields = self.shared.fields
        self.dim = dim + exclusive_dim

    @property
    def out_features(self) -> int:
        """Width of each task's result: `n (dim + exclusive_dim) + n (n - 1) / 2`."""
        return len(self.fields) * self.dim + self.shared.pairs.numel()

    def forward(self, features: EncodedFeatures, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Embed and cross a batch for the named tasks; the shared part once.

        Returns:
            Task -> `[batch, out_features]`.
        """
        pairs = self.shared.pairs.numel()
        shared = self.shared(features)
        flat, dots = shared[:, : shared.shape[1] - pairs], shared[:, shared.shape[1] - pairs :]
        views = {}
        for task in tasks:
            own = self.exclusive[task](features)
            own_flat, own_dots = own[:, : own.shape[1] - pairs], own[:, own.shape[1] - pairs :]
            views[task] = torch.cat([flat, own_flat, dots + own_dots], dim=1)
        return views
