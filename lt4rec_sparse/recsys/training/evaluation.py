"""How a trained model is judged: metrics over a split, and the predictions themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lt4rec_sparse.recsys.data import BatchStream
from lt4rec_sparse.recsys.metrics import Metric, metrics_of
from lt4rec_sparse.recsys.training.objectives import rows_of


class Predictions(NamedTuple):
    """A model's predictions for every row of a split, `[rows]`, in the order of the files; the rest as in `Batch`."""

    probabilities: dict[str, Tensor]  # per task float32, also for rows of other tasks
    rows: dict[str, Tensor]
    labels: dict[str, Tensor]
    groups: Tensor | None
    values: dict[str, Tensor]


@torch.inference_mode()
def evaluate(
    model: nn.Module, stream: BatchStream, kinds: Mapping[str, str], top_k: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """Judge a model, `model(features, task) -> logits [rows, 1]`, on one epoch of `stream`.

    `kinds` is task -> kind of its label, which with `top_k` names its metrics (`metrics_of`). The result is slice name
    ("all", and each slice of the data) -> task -> metric -> value.
    """
    model.eval()
    parts: dict[str, dict[str, dict[str, Metric]]] = {}
    for batch in stream.epoch(0):
        for task, kind in kinds.items():
            rows = rows_of(batch, task)
            logits = model(batch.features.take(rows), task).squeeze(1).double()
            labels, groups = batch.labels[task][rows].double(), None if batch.groups is None else batch.groups[rows]
            inside = {"all": None} | {name: chosen[rows] for name, chosen in batch.slices.items()}
            for name, chosen in inside.items():
                metrics = parts.setdefault(name, {}).setdefault(task, metrics_of(kind, top_k, groups is not None))
                pick = slice(None) if chosen is None else chosen
                of_groups = None if groups is None else groups[pick].numpy()
                for metric in metrics.values():
                    metric.update(logits[pick].numpy(), labels[pick].numpy(), of_groups)
    return {
        name: {task: {key: metric.compute() for key, metric in metrics.items()} for task, metrics in tasks.items()}
        for name, tasks in parts.items()
    }


@torch.inference_mode()
def predict(model: nn.Module, stream: BatchStream, tasks: tuple[str, ...]) -> Predictions:
    """Score every row of one epoch of `stream` for every task, including rows that belong to no task."""
    model.eval()
    batches = list(stream.epoch(0))
    groups = [batch.groups for batch in batches if batch.groups is not None]
    scores = {
        task: torch.cat([torch.sigmoid(model(batch.features, task).squeeze(1)) for batch in batches]) for task in tasks
    }
    return Predictions(
        scores,
        {task: torch.cat([batch.rows[task] for batch in batches]) for task in tasks},
        {task: torch.cat([batch.labels[task] for batch in batches]) for task in tasks},
        torch.cat(groups) if groups else None,
        {name: torch.cat([batch.values[name] for batch in batches]) for name in batches[0].values},
    )
