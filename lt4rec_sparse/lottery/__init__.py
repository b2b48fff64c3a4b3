"""Mask search: pruning, tickets, and the controls that they are judged against."""

from lt4rec_sparse.lottery.controls import one_for_all, random_like, random_uniform
from lt4rec_sparse.lottery.pruning import (
    GRANULARITIES,
    check_granularity,
    level_nnz,
    project_to_2_4,
    prune_by_magnitude,
)
from lt4rec_sparse.lottery.tickets import Ticket, best_ticket, search_tickets

__all__ = [
    "GRANULARITIES",
    "Ticket",
    "best_ticket",
    "check_granularity",
    "level_nnz",
    "one_for_all",
    "project_to_2_4",
    "prune_by_magnitude",
    "random_like",
    "random_uniform",
    "search_tickets",
]
