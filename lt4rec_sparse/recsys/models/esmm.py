"""ESMM: a click tower and a conversion tower over one embedding, trained over all impressions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models.inputs import TaskInputs
from lt4rec_sparse.recsys.models.mlp import MLP
from lt4rec_sparse.recsys.models.multitask import MultiTask


class ESMM(MultiTask):
    """`logit_t = tower_t(x)`: pCTR for the first task, and pCVR given a click for each later one.

    ESMM is defined by its objective: the loss of pCTR for the first task and `losses.entire_space` of `pCTR pCVR` for
    each later one, both over all impressions. A pCVR is never trained on clicked rows alone, and is served as it is.

    Parameters of the MLP, two tasks, 1000 inputs, hidden 512-256-128: 1.35 million, as in hard sharing.

    Args:
        inputs: Ids to the towers' input.
        tasks: The tasks' names, the click first.
        hidden: Widths of each tower's hidden layers.

    Source: Ma et al. (arXiv 1804.07931), section 2.2 and Figure 2.
    """

    def __init__(
        self, inputs: CrossedEmbeddings | TaskInputs, tasks: Sequence[str], hidden: Sequence[int] = (512, 256, 128)
    ) -> None:
        super().__init__(inputs, tasks)
        self.towers = nn.ModuleDict({task: MLP(inputs.out_features, hidden, head=1) for task in self.tasks})

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """Run the towers of `tasks`: `[batch, len(tasks)]`."""
        return torch.cat([self.towers[task](x) for task in tasks], dim=1)
