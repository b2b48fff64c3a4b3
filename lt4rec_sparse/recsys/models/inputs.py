"""From ids to the input of each task's network, where it is more than one crossed vector for all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings, with_numbers

CROSSES = ("dlrm", "wide_deep", "deepfm")
Fields = Sequence[tuple[str, str, bool]]


class TaskInputs(nn.Module):
    """Embeddings, crossed before the network or beside it.

    With the fields' vectors `e_1, ..., e_n` (for a multi-valued field the mean over its values), the network's input
    `x` and the term `l` that is added to its logit are

    - "dlrm": `x = [e_1, ..., e_n, e_i . e_j for i < j]`, no `l`;
    - "wide_deep": `x = [e_1, ..., e_n]`, `l_task = FirstOrder`;
    - "deepfm": `x = [e_1, ..., e_n]`, `l_task = FirstOrder + sum over i < j of e_i . e_j`.

    With `exclusive_dim`, each task has its own vectors `[s_i; e_i]` (`MultiviewEmbeddings`). Raw numbers of a row, as
    many as `numbers`, follow at the end of `x`; they have no part in `l`. `attention` is that of `CrossedEmbeddings`;
    first orders have none.

    Source: DLRM (arXiv 1906.00091); Wide & Deep (Cheng et al., arXiv 1606.07792); DeepFM (Guo et al., 1703.04247).
    """

    def __init__(
        self,
        fields: Fields,
        table_sizes: Mapping[str, int],
        tasks: Sequence[str],
        dim: int,
        cross: str,
        exclusive_dim: int,
        sparse_gradients: bool = False,
        numbers: int = 0,
        attention: Mapping[str, str] = {},
    ) -> None:
        super().__init__()
        self.cross, self.numbers = cross, numbers
        self.embeddings = (
            MultiviewEmbeddings(fields, table_sizes, tasks, dim, exclusive_dim, sparse_gradients, attention)
            if exclusive_dim
            else CrossedEmbeddings(fields, table_sizes, dim, sparse_gradients=sparse_gradients, attention=attention)
        )
        self.first_order = None if cross == "dlrm" else FirstOrder(fields, table_sizes, tasks, sparse_gradients)
        self.fields = self.embeddings.fields

    @property
    def out_features(self) -> int:
        """Width of a task's view."""
        return self._width + self.numbers

    @property
    def _width(self) -> int:
        return self.embeddings.out_features if self.first_order is None else len(self.fields) * self.embeddings.dim

    def forward(self, features: EncodedFeatures, tasks: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Embed a batch for the named tasks.

        Returns:
            Task -> its network's input `x`, `[batch, out_features]`, the same tensor for tasks that share it; and
            task -> the term `l`, `[batch, 1]`, or nothing if there is none.
        """
        if isinstance(self.embeddings, MultiviewEmbeddings):
            whole = self.embeddings(features, tasks)
        elif self.cross == "wide_deep":  # it reads no dots
            whole = dict.fromkeys(tasks, self.embeddings.embed(features).flatten(1))
        else:
            whole = dict.fromkeys(tasks, self.embeddings.crossed(features))
        width = self._width
        # One tensor for tasks that share it: a model may ask whether they do.
        views = {id(x): with_numbers(x[:, :width], features, self.numbers) for x in whole.values()}
        x_of = {task: views[id(x)] for task, x in whole.items()}
        if self.first_order is None:
            return x_of, {}
        logits = {task: self.first_order(features, task) for task in tasks}
        if self.cross == "deepfm":
            logits = {task: logit + whole[task][:, width:].sum(1, keepdim=True) for task, logit in logits.items()}
        return x_of, logits


class FirstOrder(nn.Module):
    """One weight per id and task: `logit_task = sum over fields of w_task[id]`, the mean if a field has many values.

    Weights start at zero, so that the model starts as its deep part alone. There is no bias: the deep part has one.
    Each task has its own tables, so that a step for one task moves no other's. Crossed ids are columns of the schema.

    Source: Cheng et al., Wide & Deep (arXiv 1606.07792), section 3.1.
    """

    def __init__(
        self, fields: Fields, table_sizes: Mapping[str, int], tasks: Sequence[str], sparse_gradients: bool = False
    ) -> None:
        super().__init__()
        how: dict[str, Any] = {"dim": 1, "std": 0.0, "sparse_gradients": sparse_gradients}
        self.weights = nn.ModuleDict({task: CrossedEmbeddings(fields, table_sizes, **how) for task in tasks})

    def forward(self, features: EncodedFeatures, task: str) -> Tensor:
        """Return one task's logits: `[batch, 1]`."""
        weights: Any = self.weights[task]
        logits: Tensor = weights.embed(features).sum(1)  # [batch, n, 1] -> [batch, 1]
        return logits


class MultiviewEmbeddings(nn.Module):
    """Embed every field twice and cross all pairs, for each task: field i's vector is `[s_i; e_i]`.

    `x_task = [s_1, ..., s_n, e_1, ..., e_n, s_i . s_j + e_i . e_j for i < j]`, `s` shared and `e` the task's own: the
    cross of `CrossedEmbeddings` over the joined vectors, since their dot product is the sum of the parts'. A step for
    one task moves its own embeddings and the shared ones, and no others.

    Source: LT4REC (arXiv 2008.09872), sections 2.2 and 3.1, S-Weight-multiview: 32 shared and 8 exclusive.
    """

    def __init__(
        self,
        fields: Fields,
        table_sizes: Mapping[str, int],
        tasks: Sequence[str],
        dim: int,
        exclusive_dim: int,
        sparse_gradients: bool = False,
        attention: Mapping[str, str] = {},
    ) -> None:
        super().__init__()

        def tables(width: int) -> CrossedEmbeddings:
            return CrossedEmbeddings(fields, table_sizes, width, sparse_gradients=sparse_gradients, attention=attention)

        self.shared = tables(dim)
        self.exclusive = nn.ModuleDict({task: tables(exclusive_dim) for task in tasks})
        self.fields = self.shared.fields
        self.dim = dim + exclusive_dim

    @property
    def out_features(self) -> int:
        """Width of each task's result: `n (dim + exclusive_dim) + n (n - 1) / 2`."""
        return len(self.fields) * self.dim + self.shared.pairs.numel()

    def forward(self, features: EncodedFeatures, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return task -> `[batch, out_features]`; the shared part is computed once."""
        pairs = self.shared.pairs.numel()
        flat, dots = _flat_and_dots(self.shared.crossed(features), pairs)
        views = {}
        for task in tasks:
            own_flat, own_dots = _flat_and_dots(cast(CrossedEmbeddings, self.exclusive[task]).crossed(features), pairs)
            views[task] = torch.cat([flat, own_flat, dots + own_dots], dim=1)
        return views


def _flat_and_dots(crossed: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    return crossed[:, : crossed.shape[1] - pairs], crossed[:, crossed.shape[1] - pairs :]
