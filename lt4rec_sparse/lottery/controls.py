"""Controls: masks that a ticket must beat to have been worth its search."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lt4rec_sparse.masks import Mask


def random_like(tickets: Mapping[str, Mask], generator: torch.Generator) -> dict[str, Mask]:
    """For each task a random mask with its ticket's number of kept weights in every layer."""
    return {task: Mask.random(ticket.shapes, ticket.layer_nnz(), generator) for task, ticket in tickets.items()}


def random_uniform(tickets: Mapping[str, Mask], generator: torch.Generator) -> dict[str, Mask]:
    """For each task a random mask with its ticket's density, the same in every layer."""
    result = {}
    for task, ticket in tickets.items():
        nnz = {name: round(kept.numel() * ticket.density) for name, kept in ticket.items()}
        result[task] = Mask.random(ticket.shapes, nnz, generator)
    return result


def one_for_all(masks: Mapping[str, Mask], task: str) -> dict[str, Mask]:
    """Give every task the mask of `task`: as sparse as sparse sharing, with nothing private."""
    return dict.fromkeys(masks, masks[task])
