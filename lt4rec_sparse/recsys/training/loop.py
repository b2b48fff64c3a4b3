"""The training loop: epochs of batches, each given to an objective; checkpoint, resume, stop early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import nn

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import whole_file
from lt4rec_sparse.nn.optim import MaskedAdam
from lt4rec_sparse.recsys.training.objectives import Objective
from lt4rec_sparse.recsys.training.stream import Batch, Stream

Log = Callable[[dict[str, Any]], None]
Progress = Callable[[int, int], None]
AfterBatch = Callable[[Batch, int, int], None]


@dataclass(frozen=True)
class Cursor:
    """The next batch to train on."""

    epoch: int = 0
    batch: int = 0


class _Progress(NamedTuple):
    """How far a training is: where it continues, losses of the epoch so far (sum and count), seconds so far."""

    cursor: Cursor
    sums: dict[str, tuple[float, int]]
    seconds: float


def train(
    model: nn.Module,
    optimizer: MaskedAdam,
    stream: Stream,
    objective: Objective,
    epochs: int,
    batches: int | None = None,
    start: Cursor = Cursor(),  # frozen
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    log: Log = lambda record: None,
    progress: Progress = lambda done, total: None,
    after_batch: AfterBatch = lambda batch, done, total: None,
) -> float:
    """Train a model batch by batch, as the objective says.

    With `checkpoint`, the loop writes model, optimiser and cursor there every `checkpoint_every` batches, continues
    from it if it exists, and removes it at the end; an interrupted training ends bit for bit where an uninterrupted
    one does. An objective with a state of its own (a generator, learned weights) must not be given a checkpoint.

    Args:
        model: Trained in place.
        optimizer: The optimiser of the model's parameters.
        stream: Training batches.
        objective: What a batch does to the model.
        epochs: How many epochs in all.
        batches: Stop after this many batches, if this comes before the last epoch's end.
        start: The first batch to train on; those before it count as done.
        checkpoint: A file, or None.
        checkpoint_every: Batches between two checkpoints.
        log: Called once per epoch and task with {"task", "epoch", "batch", "train_loss"}, the epoch's mean.
        progress: Called after each batch with batches done and batches in all.
        after_batch: Called after each batch with the batch and the same two numbers; it may prune while the model
            trains. Checkpoints do not hold its state.

    Returns:
        Seconds of processor time, of all cores together, including those before an interruption.

    Raises:
        InputError: If a loss is NaN or infinite; the message names the batch and the task.
    """
    total = epochs * len(stream) if batches is None else min(batches, epochs * len(stream))
    cursor, sums, before = _Progress(start, _no_sums(objective), 0.0)
    if checkpoint is not None and checkpoint.exists():
        cursor, sums, before = _load_checkpoint(checkpoint, model, optimizer)
    started = process_time()

    def save(path: Path, following: Cursor) -> None:
        seconds = before + process_time() - started
        _save_checkpoint(path, model, optimizer, _Progress(following, sums, seconds))

    model.train()
    for epoch in range(cursor.epoch, epochs):
        first = cursor.batch if epoch == cursor.epoch else 0
        done = epoch * len(stream) + first
        if done >= total:
            break
        for index, batch in enumerate(stream.epoch(epoch, first), start=first):
            for name, loss in objective.step(model, optimizer, batch).items():
                if not torch.isfinite(loss):
                    raise InputError(
                        f"loss of {name}: got {loss.item()} in epoch {epoch}, batch {index}, wanted a number"
                    )
                sums[name] = (sums[name][0] + loss.item(), sums[name][1] + 1)
            done += 1
            after_batch(batch, done, total)
            progress(done, total)
            if done == total:
                break
            if checkpoint is not None and (index + 1) % checkpoint_every == 0 and index + 1 < len(stream):
                save(checkpoint, Cursor(epoch, index + 1))
        for name, (whole, count) in sums.items():
            log({"task": name, "epoch": epoch, "batches": count, "train_loss": whole / count if count else None})
        sums = _no_sums(objective)
        if checkpoint is not None and done < total:
            save(checkpoint, Cursor(epoch + 1))
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return before + process_time() - started


def _no_sums(objective: Objective) -> dict[str, tuple[float, int]]:
    return dict.fromkeys(objective.names, (0.0, 0))


def _save_checkpoint(path: Path, model: nn.Module, optimizer: MaskedAdam, progress: _Progress) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "cursor": (progress.cursor.epoch, progress.cursor.batch),
        "sums": progress.sums,
        "seconds": progress.seconds,
    }
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def _load_checkpoint(path: Path, model: nn.Module, optimizer: MaskedAdam) -> _Progress:
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    sums = {task: (total, count) for task, (total, count) in state["sums"].items()}
    return _Progress(Cursor(*state["cursor"]), sums, state["seconds"])
