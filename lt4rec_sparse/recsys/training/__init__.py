"""One plain loop for every model: what a step is (objectives), the loop itself, and how a model is judged."""

from lt4rec_sparse.recsys.training.evaluation import Predictions, evaluate, predict
from lt4rec_sparse.recsys.training.loop import Cursor, train
from lt4rec_sparse.recsys.training.objectives import (
    Alternating,
    Factors,
    Joint,
    Loss,
    Losses,
    Objective,
    Projected,
    TaskLosses,
)
from lt4rec_sparse.recsys.training.precision import fastest_dtype
from lt4rec_sparse.recsys.training.rates import TaskAdam
from lt4rec_sparse.recsys.training.stream import Batch, Stream

__all__ = [
    "Alternating",
    "Batch",
    "Cursor",
    "Factors",
    "Joint",
    "Loss",
    "Losses",
    "Objective",
    "Predictions",
    "Projected",
    "Stream",
    "TaskAdam",
    "TaskLosses",
    "evaluate",
    "fastest_dtype",
    "predict",
    "train",
]
