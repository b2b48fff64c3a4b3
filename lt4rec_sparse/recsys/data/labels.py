"""Labels, row filters and weights as numbers: as they are, or texts through the mapping of a task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lt4rec_sparse.ranker.features import Schema, Task
from lt4rec_sparse.recsys.data.casts import floats

Floats = NDArray[np.float64]


def label_of(task: Task, column: Any) -> Floats:
    """Return the labels of a task as float64, NaN where missing."""
    if not task.positive:
        return floats(column)
    positive = pc.is_in(column, pa.array(task.positive)).cast(pa.float64())
    return floats(pc.if_else(column.is_valid(), positive, pa.scalar(None, pa.float64())))


def number_of(schema: Schema, name: str, column: Any) -> Floats:
    """Return a column of numbers, or a label of texts as its task reads it, as float64, NaN where missing."""
    task = next((task for task in schema.tasks if task.label == name and task.positive), None)
    return floats(column) if task is None else label_of(task, column)


def stray_label(task: Task, column: Any) -> Any:
    """Return the first label that is neither positive nor negative, or None; without `negative` all others are."""
    if not task.negative:
        return None
    known = pc.is_in(column, pa.array((*task.positive, *task.negative)))
    strays = column.filter(pc.and_(column.is_valid(), pc.invert(known)))
    return strays[0].as_py() if len(strays) else None
