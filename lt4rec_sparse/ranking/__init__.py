"""The paper's ranking models and their losses."""

from lt4rec_sparse.ranking.losses import loss_of
from lt4rec_sparse.ranking.models import HardSharing, SparseSharing

__all__ = ["HardSharing", "SparseSharing", "loss_of"]
