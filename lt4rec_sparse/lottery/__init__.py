"""Mask search: pruning, tickets, and the controls that they are judged against."""

from lt4rec_sparse.lottery.controls import one_for_all, random_like, random_uniform
from lt4rec_sparse.lottery.pruning import level_nnz, prune_by_magnitude
from lt4rec_sparse.lottery.tickets import Ticket, best_ticket, search_tickets

__all__ = [
    "Ticket",
    "best_ticket",
    "level_nnz",
    "one_for_all",
    "prune_by_magnitude",
    "random_like",
    "random_uniform",
    "search_tickets",
]
