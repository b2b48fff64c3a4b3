"""Controls: masks that a ticket must beat to have been worth its search."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lt4rec_sparse.lottery.pruning import prune_by_magnitude, spread_tiles, tile_shape
from lt4rec_sparse.masks import Mask, Shapes


def random_like(
    tickets: Mapping[str, Mask], generator: torch.Generator, granularity: str = "weight"
) -> dict[str, Mask]:
    """For each task a random mask with its ticket's number of kept weights in every layer.

    Random blocks or neurons for a ticket of these, so that the search alone makes the difference. They come as close
    to the number as `prune_by_magnitude` does: exactly, where all of a layer's are of one size.
    """
    return {
        task: _random(ticket.shapes, ticket.layer_nnz(), generator, granularity) for task, ticket in tickets.items()
    }


def random_uniform(
    tickets: Mapping[str, Mask], generator: torch.Generator, granularity: str = "weight"
) -> dict[str, Mask]:
    """For each task a random mask with its ticket's density, the same in every layer (`random_like` for blocks)."""
    result = {}
    for task, ticket in tickets.items():
        nnz = {name: round(kept.numel() * ticket.density) for name, kept in ticket.items()}
        result[task] = _random(ticket.shapes, nnz, generator, granularity)
    return result


def one_for_all(masks: Mapping[str, Mask], task: str) -> dict[str, Mask]:
    """Give every task the mask of `task`: as sparse as sparse sharing, with nothing private."""
    return dict.fromkeys(masks, masks[task])


def _random(shapes: Shapes, nnz: Mapping[str, int], generator: torch.Generator, granularity: str) -> Mask:
    if granularity == "weight":
        return Mask.random(shapes, nnz, generator)
    layers: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tile = tile_shape(granularity, shape)
        scores = torch.rand(-(-shape[0] // tile[0]), -(-shape[1] // tile[1]), generator=generator)
        weights = {name: spread_tiles(scores, tile, shape)}
        layers |= prune_by_magnitude(weights, Mask.full({name: shape}), nnz[name], granularity)
    return Mask(layers)
