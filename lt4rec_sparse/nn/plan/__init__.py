"""The measured plan: which layers of a frozen network run sparse and which dense, batch size by batch size.

How many weights must be pruned before the engine beats a dense product depends on the CPU, the threads, the batch and
the layer. A `Plan` holds what a measurement said, and an executor serves by it:

    plan = frozen.measure_plan()
    print(plan)
    plan.save("plan.json")
    served = frozen.planned(plan)

That is a CPU's. `nn.gpu` measures a GPU's, and serves by it.
"""

from lt4rec_sparse.nn.plan.executor import PlannedExecutor
from lt4rec_sparse.nn.plan.measure import BATCH_SIZES, measure
from lt4rec_sparse.nn.plan.plan import Plan

__all__ = ["BATCH_SIZES", "Plan", "PlannedExecutor", "measure"]
