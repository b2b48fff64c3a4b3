"""Attention of a bag's values to a target, as in the Deep Interest Network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 36


class AttentionUnit(nn.Module):
    """Sum a bag's vectors by their attention to a target: `y = sum over i of a(h_i, t) h_i`, without a softmax.

    `a(h, t) = out(prelu(hidden([h, t, h * t])))` says how much a value of the bag matters for the target. What a bag
    holds more often weighs more, and an empty one is zero. PReLU has a slope per unit.

    Args:
        dim: Width of the vectors `h` and `t`.
        width: Hidden units.

    Source: Deep Interest Network (arXiv 1706.06978), section 4.3 and Figure 2; its Figure has 36 units.
    """

    TENSORS: ClassVar = ("weight", "bias", "slope", "out", "out_bias")  # their names in files

    def __init__(self, dim: int, width: int = WIDTH) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(3 * dim, width), nn.Linear(width, 1)
        self.slope = nn.Parameter(torch.full((width,), 0.25))  # torch's start of a PReLU

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        """Return the weights `a [..., 1]` of `h [..., dim]` for `t [..., dim]`."""
        z = self.hidden(torch.cat([h, t, h * t], dim=-1))
        # torch takes slopes of the second dimension, in one operation: three that spell it pass over z three times.
        activated = F.prelu(z.reshape(-1, z.shape[-1]), self.slope.to(z.dtype)).view_as(z)
        weights: Tensor = self.out(activated)
        return weights

    def to_tensors(self) -> dict[str, Tensor]:
        """Return `weight [width, 3 dim]`, `bias`, `slope` and `out [width]`, and `out_bias [1]`."""
        hidden, out = self.hidden, self.out
        tensors = (hidden.weight, hidden.bias, self.slope, out.weight.flatten(), out.bias)
        return {name: tensor.detach() for name, tensor in zip(self.TENSORS, tensors, strict=True)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], dim: int) -> AttentionUnit:
        """Read `to_tensors` back, float32.

        Raises:
            ValueError: If a tensor has another shape.
        """
        weight = tensors["weight"]
        width = len(weight) if weight.dim() else 0
        shapes = ((width, 3 * dim), (width,), (width,), (width,), (1,))
        for name, shape in zip(cls.TENSORS, shapes, strict=True):
            if tuple(tensors[name].shape) != shape or not width:
                raise ValueError(f"{name}: got shape {list(tensors[name].shape)}, wanted {list(shape)}, no side 0")
        with torch.device("meta"):
            unit = cls(dim, width)
        state = {
            "hidden.weight": weight,
            "hidden.bias": tensors["bias"],
            "slope": tensors["slope"],
            "out.weight": tensors["out"].view(1, width),
            "out.bias": tensors["out_bias"],
        }
        unit.load_state_dict(state, assign=True)
        return unit
