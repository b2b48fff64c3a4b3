"""Pruning: which of the weights alive survive a round."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lt4rec_sparse.masks import Mask


def prune_by_magnitude(weights: Mapping[str, Tensor], mask: Mask, nnz: int) -> Mask:
    """Keep the `nnz` weights of largest magnitude among those alive, over all layers together.

    One global quantile, as in the paper; the count is exact under ties, where the earlier layer, row and column is
    kept. What was pruned before stays pruned, whatever its value.

    Example:
        >>> alive = Mask.full({"layers.0": (1, 4)})
        >>> prune_by_magnitude({"layers.0": torch.tensor([[0.5, -2.0, 0.5, 1.0]])}, alive, 3)["layers.0"].tolist()
        [[True, True, False, True]]

    Args:
        weights: Layer name -> `[out_features, in_features]`, for each layer of the mask.
        mask: The weights alive.
        nnz: How many are to survive.

    Returns:
        A subset of `mask` with `nnz` kept weights.

    Raises:
        ValueError: If `nnz` is negative or more than are alive, layers or shapes disagree, or a weight alive is NaN.

    Source: LT4REC (arXiv 2008.09872), Algorithm 1, line 5.
    """
    if not 0 <= nnz <= mask.nnz:
        raise ValueError(f"nnz: got {nnz}, wanted 0 to {mask.nnz}, the weights alive")
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != mask.shapes:
        raise ValueError(f"weights: got layers {shapes}, wanted {mask.shapes}, those of the mask")
    alive = torch.cat([mask[name].flatten() for name in mask])
    magnitude = torch.cat([weights[name].detach().cpu().float().abs().flatten() for name in mask])[alive]
    if magnitude.isnan().any():
        raise ValueError(f"weights: got {int(magnitude.isnan().sum())} NaN among those alive, wanted numbers")
    survivors = alive.nonzero().squeeze(1)[magnitude.sort(descending=True, stable=True).indices[:nnz]]
    kept = torch.zeros_like(alive)
    kept[survivors] = True
    sizes = [mask[name].numel() for name in mask]
    return Mask({name: part.view(mask[name].shape) for name, part in zip(mask, torch.split(kept, sizes), strict=True)})


def level_nnz(size: int, density: float, rounds: int, level: int) -> int:
    """Return how many weights are alive after `level` of `rounds` rounds that end at `density`.

    Each round keeps the same share, `density ** (1 / rounds)`: 4 rounds to 20 % keep 66.87, 44.72, 29.91 and 20 %.

    Raises:
        ValueError: If the density is not in (0, 1], or the level is not in [0, rounds].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density: got {density}, wanted more than 0 and at most 1")
    if rounds < 1 or not 0 <= level <= rounds:
        raise ValueError(f"level: got {level} of {rounds} rounds, wanted 0 to the number of rounds, at least one")
    return int(round(size * density ** (level / rounds)))  # noqa: RUF046  # a float power is Any to mypy
