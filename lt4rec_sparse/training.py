"""One plain loop for every model: alternate the tasks over the same batches, checkpoint, resume, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.features import EncodedFeatures
from lt4rec_sparse.files import whole_file
from lt4rec_sparse.metrics import Metric, metrics_of
from lt4rec_sparse.nn.optim import MaskedAdam

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Log = Callable[[dict[str, Any]], None]
Progress = Callable[[int, int], None]


class Batch(Protocol):
    """What the loop reads of a batch of rows (`data.batches.Batch`)."""

    @property
    def features(self) -> EncodedFeatures: ...  # noqa: D102
    @property
    def labels(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def rows(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def weights(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def groups(self) -> Tensor: ...  # noqa: D102
    @property
    def slices(self) -> Mapping[str, Tensor]: ...  # noqa: D102


class Stream(Protocol):
    """Where batches come from: epochs whose order depends on their number only, entered at any batch."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from batch `start` on."""


@dataclass(frozen=True)
class Cursor:
    """The next batch to train on."""

    epoch: int = 0
    batch: int = 0


def train(
    model: nn.Module,
    optimizer: MaskedAdam,
    stream: Stream,
    losses: Mapping[str, Loss],
    epochs: int,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    log: Log = lambda record: None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Train `model(features, task) -> logits [rows, 1]` on each task in turn, batch by batch.

    Every batch gives each task one step, on the rows that are the task's: tasks alternate, and over an epoch each has
    seen all of its rows once. A batch without rows of a task gives that task no step.

    With `checkpoint`, the loop writes model, optimiser and cursor there every `checkpoint_every` batches, continues
    from it if it exists, and removes it at the end; an interrupted run ends bit for bit where an uninterrupted does.

    Args:
        model: Trained in place.
        optimizer: Of the model's parameters.
        stream: Training batches.
        losses: Task name -> its loss; the order of the alternation.
        epochs: How many epochs in all.
        checkpoint: A file, or None.
        checkpoint_every: In batches.
        log: Called with {"task", "epoch", "batch", "train_loss"} once an epoch and task: the epoch's mean.
        progress: Called after each batch with batches done and batches in all.

    Raises:
        InputError: If a loss is NaN or infinite (the batch and task are named).
    """
    cursor, sums = Cursor(), _no_sums(losses)
    if checkpoint is not None and checkpoint.exists():
        cursor, sums = _load_checkpoint(checkpoint, model, optimizer)
    model.train()
    for epoch in range(cursor.epoch, epochs):
        first = cursor.batch if epoch == cursor.epoch else 0
        for index, batch in enumerate(stream.epoch(epoch, first), start=first):
            for task, loss_of_task in losses.items():
                loss = _step(model, optimizer, batch, task, loss_of_task)
                if loss is not None:
                    if not torch.isfinite(loss):
                        raise InputError(
                            f"loss of {task}: got {loss.item()} in epoch {epoch}, batch {index}, wanted a number"
                        )
                    sums[task] = (sums[task][0] + loss.item(), sums[task][1] + 1)
            progress(epoch * len(stream) + index + 1, epochs * len(stream))
            if checkpoint is not None and (index + 1) % checkpoint_every == 0 and index + 1 < len(stream):
                _save_checkpoint(checkpoint, model, optimizer, Cursor(epoch, index + 1), sums)
        for task, (total, count) in sums.items():
            log({"task": task, "epoch": epoch, "batches": count, "train_loss": total / count if count else None})
        sums = _no_sums(losses)
        if checkpoint is not None and epoch + 1 < epochs:
            _save_checkpoint(checkpoint, model, optimizer, Cursor(epoch + 1), sums)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


@torch.inference_mode()
def evaluate(
    model: nn.Module | Callable[[EncodedFeatures, str], Tensor], stream: Stream, kinds: Mapping[str, str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Judge a model on one epoch of `stream`.

    Args:
        model: `model(features, task) -> logits [rows, 1]`.
        stream: Batches of the split.
        kinds: Task name -> kind of its label, which names its metrics (`metrics_of`).

    Returns:
        Slice name ("all", and each slice of the data) -> task -> metric -> value.
    """
    if isinstance(model, nn.Module):
        model.eval()
    parts: dict[str, dict[str, dict[str, Metric]]] = {}
    for batch in stream.epoch(0):
        for task, kind in kinds.items():
            rows = batch.rows[task].nonzero().squeeze(1)
            logits = model(batch.features.take(rows), task).squeeze(1).double()
            labels, groups = batch.labels[task][rows].double(), batch.groups[rows]
            inside = {"all": None} | {name: chosen[rows] for name, chosen in batch.slices.items()}
            for name, chosen in inside.items():
                metrics = parts.setdefault(name, {}).setdefault(task, metrics_of(kind))
                pick = [t if chosen is None else t[chosen] for t in (logits, labels, groups)]
                for metric in metrics.values():
                    metric.update(*(t.numpy() for t in pick))
    return {
        name: {task: {key: metric.compute() for key, metric in metrics.items()} for task, metrics in tasks.items()}
        for name, tasks in parts.items()
    }


def _step(model: nn.Module, optimizer: MaskedAdam, batch: Batch, task: str, loss_of_task: Loss) -> Tensor | None:
    rows = batch.rows[task].nonzero().squeeze(1)
    if not len(rows):
        return None
    whole = len(rows) == len(batch.rows[task])
    features = batch.features if whole else batch.features.take(rows)
    labels, weights = (t if whole else t[rows] for t in (batch.labels[task], batch.weights[task]))
    optimizer.zero_grad()
    loss = loss_of_task(model(features, task).squeeze(1), labels, weights)
    torch.autograd.backward(loss)
    optimizer.step(task)
    return loss.detach()


def _no_sums(losses: Mapping[str, Loss]) -> dict[str, tuple[float, int]]:
    return dict.fromkeys(losses, (0.0, 0))


def _save_checkpoint(
    path: Path, model: nn.Module, optimizer: MaskedAdam, cursor: Cursor, sums: Mapping[str, tuple[float, int]]
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "cursor": (cursor.epoch, cursor.batch),
        "sums": dict(sums),
    }
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def _load_checkpoint(
    path: Path, model: nn.Module, optimizer: MaskedAdam
) -> tuple[Cursor, dict[str, tuple[float, int]]]:
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Cursor(*state["cursor"]), {task: (total, count) for task, (total, count) in state["sums"].items()}
