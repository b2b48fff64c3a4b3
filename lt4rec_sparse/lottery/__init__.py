"""Mask search: pruning, tickets, cheap tickets, and the controls and planted truths that they are judged against."""

from lt4rec_sparse.lottery.controls import (
    one_for_all,
    random_like,
    random_masks,
    random_separate,
    random_uniform,
    separate,
    unanimous,
)
from lt4rec_sparse.lottery.gradual import GradualPruning
from lt4rec_sparse.lottery.pruning import (
    GRANULARITIES,
    SCOPES,
    check_granularity,
    check_scope,
    level_density,
    level_nnz,
    project_to_2_4,
    prune_by_magnitude,
    wanted_nnz,
)
from lt4rec_sparse.lottery.rigl import DISTRIBUTIONS, DropAndGrow, dense_gradients, layer_counts
from lt4rec_sparse.lottery.scaling import scale_to_density
from lt4rec_sparse.lottery.structure import ColumnRecovery, SharingRecovery, column_recovery, sharing_recovery
from lt4rec_sparse.lottery.tickets import Ticket, best_ticket, search_tickets

__all__ = [
    "DISTRIBUTIONS",
    "GRANULARITIES",
    "SCOPES",
    "ColumnRecovery",
    "DropAndGrow",
    "GradualPruning",
    "SharingRecovery",
    "Ticket",
    "best_ticket",
    "check_granularity",
    "check_scope",
    "column_recovery",
    "dense_gradients",
    "layer_counts",
    "level_density",
    "level_nnz",
    "one_for_all",
    "project_to_2_4",
    "prune_by_magnitude",
    "random_like",
    "random_masks",
    "random_separate",
    "random_uniform",
    "scale_to_density",
    "search_tickets",
    "separate",
    "sharing_recovery",
    "unanimous",
    "wanted_nnz",
]
