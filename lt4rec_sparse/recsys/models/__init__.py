"""The ranking models by name, their losses, and ways to balance tasks."""

from lt4rec_sparse.recsys.models.balance import Conflict, UncertaintyWeights, pcgrad
from lt4rec_sparse.recsys.models.build import MODELS, build, mlp_multiply_adds
from lt4rec_sparse.recsys.models.inputs import CROSSES
from lt4rec_sparse.recsys.models.losses import LOSSES, entire_space, loss_of
from lt4rec_sparse.recsys.models.networks import HardSharing, SparseSharing

__all__ = [
    "CROSSES",
    "LOSSES",
    "MODELS",
    "Conflict",
    "HardSharing",
    "SparseSharing",
    "UncertaintyWeights",
    "build",
    "entire_space",
    "loss_of",
    "mlp_multiply_adds",
    "pcgrad",
]
