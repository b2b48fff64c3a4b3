"""Masks: by pruning, by ticket search, at random, from one training run, and the controls to compare them with.

- Pruning: `prune_by_magnitude`, at each of `GRANULARITIES`, `project_to_2_4` and `project_to_blocks`; `wanted_nnz`
  turns a density into numbers of weights.
- Ticket search: `search_tickets` trains, prunes and rewinds; `best_ticket` chooses.
- Random masks: `random_masks` of a density; `random_like` for the densities of tickets. Initial weights behind a sparse
  mask are too small: `scale_to_density`.
- One training run: `GradualPruning` shrinks the masks of any model, `DropAndGrow` (RigL) exchanges its weights.
- Controls of sharing between tasks: `one_for_all`, `unanimous`, `separate`, `random_separate`.
"""

from lt4rec_sparse.lottery.controls import (
    one_for_all,
    random_like,
    random_masks,
    random_separate,
    separate,
    unanimous,
)
from lt4rec_sparse.lottery.gradual import GradualPruning
from lt4rec_sparse.lottery.pruning import (
    GRANULARITIES,
    SCOPES,
    project_to_2_4,
    project_to_blocks,
    prune_by_magnitude,
    wanted_nnz,
)
from lt4rec_sparse.lottery.rigl import DropAndGrow
from lt4rec_sparse.lottery.scaling import scale_to_density
from lt4rec_sparse.lottery.tickets import Ticket, best_ticket, search_tickets

__all__ = [
    "GRANULARITIES",
    "SCOPES",
    "DropAndGrow",
    "GradualPruning",
    "Ticket",
    "best_ticket",
    "one_for_all",
    "project_to_2_4",
    "project_to_blocks",
    "prune_by_magnitude",
    "random_like",
    "random_masks",
    "random_separate",
    "scale_to_density",
    "search_tickets",
    "separate",
    "unanimous",
    "wanted_nnz",
]
