"""How a trained model is judged: metrics over a split, and the predictions themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lt4rec_sparse.recsys.data import Batch, BatchStream
from lt4rec_sparse.recsys.metrics import Metric, metrics_of
from lt4rec_sparse.recsys.training.distributed import current
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
    ("all", and each slice of the data) -> task -> metric -> value. Several processes share the work and have equal
    results: those of one, to the bit, if their models are.
    """
    model.eval()
    parts: dict[str, dict[str, dict[str, Metric]]] = {}
    for batch, of_tasks in _judged(model, stream, tuple(kinds)):
        for task, kind in kinds.items():
            rows, logits = rows_of(batch, task), of_tasks[task]
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


def _judged(model: nn.Module, stream: BatchStream, tasks: Sequence[str]) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Yield each batch with the logits of each task's rows, float64 `[rows of the task]`.

    Of several processes each computes whole batches in turn, as one process would, and gets the others' results.
    """
    ranks, epoch = current(), stream.epoch(0)
    while batches := list(islice(epoch, ranks.size)):
        found = []
        for place, batch in enumerate(batches):
            rows = {task: rows_of(batch, task) for task in tasks}
            if place == ranks.rank:
                found.append(
                    {task: model(batch.features.take(r), task).squeeze(1).double() for task, r in rows.items()}
                )
            else:
                found.append({task: torch.zeros(len(r), dtype=torch.float64) for task, r in rows.items()})
        ranks.sum_([logits for of_tasks in found for logits in of_tasks.values()])  # with zeros: gathers them
        yield from zip(batches, found, strict=True)


@torch.inference_mode()
def predict(model: nn.Module, stream: BatchStream, tasks: tuple[str, ...]) -> Predictions:
    """Score every row of one epoch of `stream` for every task, including rows that belong to no task.

    Of each batch only what is returned is kept: 9 bytes per row and task, 8 per carried column, and 8 for the group.
    """
    model.eval()
    parts = [_predicted(model, batch, tasks) for batch in stream.epoch(0)]
    groups = [part.groups for part in parts if part.groups is not None]
    return Predictions(
        {task: torch.cat([part.probabilities[task] for part in parts]) for task in tasks},
        {task: torch.cat([part.rows[task] for part in parts]) for task in tasks},
        {task: torch.cat([part.labels[task] for part in parts]) for task in tasks},
        torch.cat(groups) if groups else None,
        {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
    )


def _predicted(model: nn.Module, batch: Batch, tasks: tuple[str, ...]) -> Predictions:
    return Predictions(
        {task: torch.sigmoid(model(batch.features, task).squeeze(1)) for task in tasks},
        {task: batch.rows[task] for task in tasks},
        {task: batch.labels[task] for task in tasks},
        batch.groups,
        batch.values,
    )
