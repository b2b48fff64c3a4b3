"""How large the initial weights behind a sparse mask are."""

from __future__ import annotations

from math import sqrt

import torch

from lt4rec_sparse.nn import MaskedMLP


@torch.no_grad()
def scale_to_density(mlp: MaskedMLP) -> None:
    """Multiply each layer's weights by `1 / sqrt(density)`, so that sums of fewer terms are as large.

    For a network at its start. Initial weights are drawn for the number of inputs that a neuron has in the full
    network. Behind a mask that keeps a fifth of them, its sums have a fifth of the variance, and three such layers pass
    on less than a hundredth. The density is the mean over the tasks and over their neurons alive: a neuron that is
    pruned whole takes nothing from the sums of others. A layer in which no task keeps anything is left alone.

    Source: Evci et al. (arXiv 2010.03533), section 3.1, initialisation by a neuron's kept inputs; here by the layer's.
    """
    for layer in mlp.masked_layers():
        read_by = int(layer.masks.any(2).sum())  # neurons alive, summed over the tasks
        if read_by:
            layer.weight.div_(sqrt(int(layer.masks.sum()) / (read_by * layer.in_features)))
