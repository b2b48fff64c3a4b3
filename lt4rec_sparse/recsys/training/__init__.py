"""One plain loop for every model: what a step is (objectives), the loop itself, and how a model is judged."""

from lt4rec_sparse.recsys.training.averages import averaged_model
from lt4rec_sparse.recsys.training.distributed import current, joined, led, together
from lt4rec_sparse.recsys.training.evaluation import Predictions, evaluate, predict
from lt4rec_sparse.recsys.training.loop import train
from lt4rec_sparse.recsys.training.objectives import Alternating, Factors, Joint, Objective, Projected, TaskLosses
from lt4rec_sparse.recsys.training.precision import fastest_dtype
from lt4rec_sparse.recsys.training.rates import TaskAdam
from lt4rec_sparse.recsys.training.schedule import SCHEDULES, Schedule
from lt4rec_sparse.recsys.training.sparse_steps import sparse_steps
from lt4rec_sparse.recsys.training.stopping import EarlyStopping

__all__ = [
    "SCHEDULES",
    "Alternating",
    "EarlyStopping",
    "Factors",
    "Joint",
    "Objective",
    "Predictions",
    "Projected",
    "Schedule",
    "TaskAdam",
    "TaskLosses",
    "averaged_model",
    "current",
    "evaluate",
    "fastest_dtype",
    "joined",
    "led",
    "predict",
    "sparse_steps",
    "together",
    "train",
]
