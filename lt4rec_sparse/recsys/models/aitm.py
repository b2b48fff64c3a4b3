"""AITM: each task's tower attends to the output of the task before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models.inputs import TaskInputs
from lt4rec_sparse.recsys.models.mlp import MLP
from lt4rec_sparse.recsys.models.multitask import MultiTask


class Transfer(nn.Module):
    """Attend to two vectors: `z = sum over u of w_u value(u)`, `w = softmax over u of query(u) . key(u) / sqrt(k)`.

    `u` is `p`, the vector handed on by the earlier task, and `q`, the task's own.

    Args:
        width: `k`, the width of the vectors.

    Source: Xi et al., AITM (arXiv 2105.08489), the adaptive information transfer module.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        """Return `z [batch, width]` of `p` and `q`, `[batch, width]` each."""
        u = torch.stack([p, q], dim=1)  # [batch, 2, width]
        weight = ((self.query(u) * self.key(u)).sum(2) / u.shape[2] ** 0.5).softmax(1)  # [batch, 2]
        return torch.bmm(weight.unsqueeze(1), self.value(u)).squeeze(1)


class AITM(MultiTask):
    """`logit_t = head_t(z_t)`, `z_1 = tower_1(x)`, `z_t = transfer_t(handed_{t-1}(z_{t-1}), tower_t(x))`.

    Tasks are in the order in which users reach them: impression, click, purchase. A later task's loss trains the towers
    before it, an earlier task's loss never those after it. In the paper each probability is end to end, over all
    impressions; trained on clicked rows only, a later probability is conditional on the click.

    Parameters of the MLP, two tasks, 1000 inputs, hidden 512-256-128: 1.42 million; hard sharing has 1.35 million.

    Args:
        inputs: Ids to the towers' input.
        tasks: The tasks' names, in their order in time.
        hidden: Widths of each tower's hidden layers.

    Raises:
        ValueError: If there is no hidden layer.

    Source: Xi et al. (arXiv 2105.08489).
    """

    def __init__(
        self, inputs: CrossedEmbeddings | TaskInputs, tasks: Sequence[str], hidden: Sequence[int] = (512, 256, 128)
    ) -> None:
        super().__init__(inputs, tasks)
        if not hidden:
            raise ValueError("hidden: got no layer, wanted at least one width")
        width = hidden[-1]
        self.towers = nn.ModuleDict({task: MLP(inputs.out_features, hidden) for task in self.tasks})
        self.handed = nn.ModuleDict({task: MLP(width, (width,)) for task in self.tasks[:-1]})
        self.transfers = nn.ModuleDict({task: Transfer(width) for task in self.tasks[1:]})
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in self.tasks})

    def reads(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """Return every task up to the last of `tasks`: its tower needs theirs."""
        return self.tasks[: self.tasks.index(tasks[-1]) + 1]

    def score(self, views: Mapping[str, Tensor], tasks: tuple[str, ...]) -> Tensor:
        """Run the towers in order, each on its own view: `[batch, len(tasks)]`."""
        logits = {}
        before, z = "", torch.empty(0)
        for task in self.reads(tasks):
            q = self.towers[task](views[task])
            z = self.transfers[task](self.handed[before](z), q) if before else q
            logits[task] = self.heads[task](z)
            before = task
        return torch.cat([logits[task] for task in tasks], dim=1)

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """Run the towers in order, all on `x`: `[batch, len(tasks)]`."""
        return self.score(dict.fromkeys(self.tasks, x), tasks)
