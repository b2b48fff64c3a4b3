"""A gate: the share of each expert in a mixture, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """`y = sum over i of softmax(x @ weight.T)_i expert_i`.

    Args:
        in_features: Width of `x`.
        experts: How many experts there are.

    Source: Ma et al., MMoE (KDD 2018, doi 10.1145/3219819.3220007), section 4.2.
    """

    def __init__(self, in_features: int, experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, experts, bias=False)

    def forward(self, x: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """Mix the experts' outputs.

        Args:
            x: `[batch, in_features]`.
            experts: The output of each expert, `[batch, width]`.

        Returns:
            `[batch, width]`.
        """
        share = self.linear(x).softmax(1).unsqueeze(1)  # [batch, 1, experts]
        return torch.bmm(share, torch.stack(list(experts), dim=1)).squeeze(1)
