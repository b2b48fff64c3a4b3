"""Every operation in eager torch: the specification that each kernel is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DenseLayer(NamedTuple):
    """One layer of an MLP with its pruned weights as zeros: `activation(x @ weight.T + bias)`."""

    weight: Tensor
    bias: Tensor | None
    activation: str


ACTIVATIONS = {"none": lambda z: z, "relu": torch.relu, "sigmoid": torch.sigmoid}


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y = x @ (weight * mask).T + bias`; a pruned weight contributes nothing, were it NaN."""
    return F.linear(x, weight.masked_fill(~mask, 0), bias)


def masked_linear_dgrad(dy: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """`dx = dy @ (weight * mask)`."""
    return dy @ weight.masked_fill(~mask, 0)


def masked_linear_wgrad(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """`dW = (dy.T @ x) * mask`: a pruned weight receives no gradient."""
    return (dy.T @ x).masked_fill(~mask, 0)


def sparse_mlp(x: Tensor, tasks: Sequence[Sequence[DenseLayer]]) -> Tensor:
    """Each task's MLP over the same `x`, outputs side by side: `[batch, sum of out_features]`."""
    outputs = []
    for layers in tasks:
        h = x
        for layer in layers:
            h = ACTIVATIONS[layer.activation](F.linear(h, layer.weight, layer.bias))
        outputs.append(h)
    return torch.cat(outputs, dim=1)
