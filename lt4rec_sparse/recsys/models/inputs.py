"""From ids to the input of each task's network, where it is more than one crossed vector for all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lt4rec_sparse.nn.masked import check_tasks
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models.first_order import FirstOrder
from lt4rec_sparse.recsys.models.multiview import MultiviewEmbeddings

CROSSES = ("dlrm", "wide_deep", "deepfm")


class Seen(NamedTuple):
    """A batch as the tasks' networks see it.

    Attributes:
        views: Task -> its network's input, `[batch, out_features]`; the same tensor for tasks that share it.
        logits: Task -> a term to add to its network's logit, `[batch, 1]`; empty if there is none.
    """

    views: Mapping[str, Tensor]
    logits: Mapping[str, Tensor]


class TaskInputs(nn.Module):
    """Embeddings, crossed before the network or beside it.

    With the fields' vectors `e_1, ..., e_n` (for a multi-valued field the mean over its values), the network's input
    `x` and the term `l` that is added to its logit are

    - "dlrm": `x = [e_1, ..., e_n, e_i . e_j for i < j]`, no `l`;
    - "wide_deep": `x = [e_1, ..., e_n]`, `l_task = FirstOrder`;
    - "deepfm": `x = [e_1, ..., e_n]`, `l_task = FirstOrder + sum over i < j of e_i . e_j`.

    With `exclusive_dim`, each task has its own vectors `[s_i; e_i]` (`MultiviewEmbeddings`).

    Args:
        fields: The fields, in the order of the encoder.
        table_sizes: Table name -> number of rows.
        tasks: The tasks' names.
        dim: Width of an embedding that tasks share.
        cross: One of `CROSSES`.
        exclusive_dim: Width of a task's own embedding; 0 for none.

    Raises:
        ValueError: If there is no such cross, no field, no size of a field's table, or a width is out of range.

    Source: DLRM (arXiv 1906.00091); Wide & Deep (Cheng et al., arXiv 1606.07792); DeepFM (Guo et al., 1703.04247).
    """

    def __init__(
        self,
        fields: Sequence[tuple[str, str, bool]],
        table_sizes: Mapping[str, int],
        tasks: Sequence[str],
        dim: int = 16,
        cross: str = "dlrm",
        exclusive_dim: int = 0,
    ) -> None:
        super().__init__()
        if cross not in CROSSES:
            raise ValueError(f"cross: got {cross!r}, wanted one of {', '.join(CROSSES)}")
        self.cross = cross
        self.tasks = check_tasks(tasks)
        self.embeddings = (
            MultiviewEmbeddings(fields, table_sizes, tasks, dim, exclusive_dim)
            if exclusive_dim
            else CrossedEmbeddings(fields, table_sizes, dim)
        )
        self.first_order = None if cross == "dlrm" else FirstOrder(fields, table_sizes, tasks)
        self.fields = self.embeddings.fields

    @property
    def out_features(self) -> int:
        """Width of a task's view."""
        return self.embeddings.out_features if self.first_order is None else len(self.fields) * self.embeddings.dim

    def forward(self, features: EncodedFeatures, tasks: Sequence[str]) -> Seen:
        """Embed a batch for the named tasks."""
        if isinstance(self.embeddings, MultiviewEmbeddings):
            whole = self.embeddings(features, tasks)
        elif self.cross == "wide_deep":  # it reads no dots
            whole = dict.fromkeys(tasks, self.embeddings.embed(features).flatten(1))
        else:
            whole = dict.fromkeys(tasks, self.embeddings(features))
        if self.first_order is None:
            return Seen(whole, {})
        width = self.out_features
        logits = {task: self.first_order(features, task) for task in tasks}
        if self.cross == "deepfm":
            logits = {task: logit + whole[task][:, width:].sum(1, keepdim=True) for task, logit in logits.items()}
        # One tensor for tasks that share it: a model may ask whether they do.
        flat = {id(x): x[:, :width] for x in whole.values()}
        return Seen({task: flat[id(x)] for task, x in whole.items()}, logits)
