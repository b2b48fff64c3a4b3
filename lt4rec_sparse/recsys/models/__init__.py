"""The ranking models by name, their losses, and ways to balance tasks."""

from lt4rec_sparse.recsys.models.aitm import AITM
from lt4rec_sparse.recsys.models.balance import UncertaintyWeights, pcgrad
from lt4rec_sparse.recsys.models.build import MODELS, build, mlp_multiply_adds
from lt4rec_sparse.recsys.models.conflict import Conflict
from lt4rec_sparse.recsys.models.esmm import ESMM
from lt4rec_sparse.recsys.models.inputs import CROSSES, TaskInputs
from lt4rec_sparse.recsys.models.losses import LOSSES, entire_space, joint_logits, loss_of
from lt4rec_sparse.recsys.models.mmoe import MMoE
from lt4rec_sparse.recsys.models.models import HardSharing, SparseSharing
from lt4rec_sparse.recsys.models.multitask import MultiTask
from lt4rec_sparse.recsys.models.ple import PLE
from lt4rec_sparse.recsys.models.shared_bottom import SharedBottom

__all__ = [
    "AITM",
    "CROSSES",
    "ESMM",
    "LOSSES",
    "MODELS",
    "PLE",
    "Conflict",
    "HardSharing",
    "MMoE",
    "MultiTask",
    "SharedBottom",
    "SparseSharing",
    "TaskInputs",
    "UncertaintyWeights",
    "build",
    "entire_space",
    "joint_logits",
    "loss_of",
    "mlp_multiply_adds",
    "pcgrad",
]
