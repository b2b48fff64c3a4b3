"""The training loop: epochs of batches, each given to an objective; checkpoint, resume, stop early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import whole_file
from lt4rec_sparse.nn.optim import MaskedAdam
from lt4rec_sparse.recsys.data import Batch, BatchStream
from lt4rec_sparse.recsys.stored import load_checkpoint
from lt4rec_sparse.recsys.training.distributed import current
from lt4rec_sparse.recsys.training.objectives import Objective
from lt4rec_sparse.recsys.training.stopping import EarlyStopping

WATCHED = 50  # batches of an epoch between two calls of `watch`

AfterBatch = Callable[[Batch, int, int], None]
Losses = dict[str, tuple[float, int]]  # loss -> its sum and count
Watch = Callable[[int, dict[str, float], nn.Module | None], None]


def train(
    model: nn.Module,
    optimizer: MaskedAdam,
    stream: BatchStream,
    objective: Objective,
    epochs: int,
    batches: int | None = None,
    skip: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    log: Callable[[dict[str, Any]], None] = lambda record: None,
    after_batch: AfterBatch = lambda batch, done, total: None,
    stopping: EarlyStopping | None = None,
    before_batch: Callable[[int, int], None] = lambda done, total: None,
    averaged: AveragedModel | None = None,
    watch: Watch | None = None,
) -> float:
    """Train a model in place, batch by batch, as the objective says.

    With `checkpoint`, the loop writes model, optimiser and cursor there every `checkpoint_every` batches, continues
    from it if it exists, and removes it at the end; an interrupted training ends bit for bit where an uninterrupted
    one does. An objective with a state of its own (a generator, learned weights) must not be given a checkpoint.

    Training stops after `epochs` in all, or after `batches`, if this comes first; `skip` batches count as done before
    the first. `stopping` may end it at the end of an earlier epoch, and leaves the weights of the best one. `log` is
    called once per epoch and task with {"task", "epoch", "batches", "train_loss"}, a mean; `after_batch` after each
    batch with the batch, batches done and batches in all. It may prune while the model trains; checkpoints do not hold
    its state. `before_batch` is called before each batch with batches done and the batches of all epochs: it must
    depend on these two numbers alone.

    `averaged`, of `averaged_model`, follows the model batch by batch; it is what `stopping` judges, and its weights are
    the model's in the end.

    `watch` is called every `WATCHED` batches of an epoch, and at its end, with the batches done, each loss's mean since
    the call before, and at the end with the model as `stopping` judges it, after that, else None. Its time does not
    count, and it must leave the model as it is, but for `train` and `eval`.

    Several processes that call it `together` take the steps of one, each on its part of every batch; the first one
    alone reads and writes the checkpoint.

    Returns:
        Seconds of processor time, of all cores and processes together, including those before an interruption.

    Raises:
        InputError: If a loss is NaN or infinite; the message names the batch and the task.
        RuntimeError: If the processes have different weights at the end of an epoch.
    """
    ranks = current()
    total = epochs * len(stream) if batches is None else min(batches, epochs * len(stream))
    nothing: Losses = dict.fromkeys(objective.names, (0.0, 0))  # of the epoch so far
    (first_epoch, first_batch), sums, before = divmod(skip, len(stream)), dict(nothing), 0.0
    state = ranks.first(lambda: load_checkpoint(checkpoint) if checkpoint is not None and checkpoint.exists() else None)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        (first_epoch, first_batch), sums, before = state["cursor"], state["sums"], state["seconds"]
        if stopping is not None:
            stopping.load_state_dict(state["stopping"])
        if averaged is not None:
            averaged.load_state_dict(state["averaged"])
    started, marked = process_time(), dict(sums)

    def watched(done: int, judged: nn.Module | None) -> None:
        nonlocal started, marked
        began, (means, marked) = process_time(), (_since(marked, sums), dict(sums))
        if watch is not None:
            watch(done, means, judged)
        started += process_time() - began

    def seconds() -> float:
        return before + ranks.add(process_time() - started)

    def save(path: Path, following: tuple[int, int]) -> None:
        took = seconds()
        if not ranks.leads:
            return
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "cursor": following,
            "sums": sums,
            "seconds": took,
            "stopping": None if stopping is None else stopping.state_dict(),
            "averaged": None if averaged is None else averaged.state_dict(),
        }
        with whole_file(path) as temporary:
            torch.save(state, temporary)

    for epoch in range(first_epoch, epochs):
        model.train()
        first = first_batch if epoch == first_epoch else 0
        done = epoch * len(stream) + first
        if done >= total:
            break
        for index, batch in enumerate(stream.epoch(epoch, first), start=first):
            before_batch(done, epochs * len(stream))
            for name, loss in objective.step(model, optimizer, batch).items():
                if not torch.isfinite(loss):
                    raise InputError(
                        f"loss of {name}: got {loss.item()} in epoch {epoch}, batch {index}, wanted a number"
                    )
                sums[name] = (sums[name][0] + loss.item(), sums[name][1] + 1)
            if averaged is not None:
                averaged.update_parameters(model)
            done += 1
            after_batch(batch, done, total)
            if done == total:
                break
            if (index + 1) % WATCHED == 0 and index + 1 < len(stream):
                watched(done, None)
            if checkpoint is not None and (index + 1) % checkpoint_every == 0 and index + 1 < len(stream):
                save(checkpoint, (epoch, index + 1))
        for name, (whole, count) in sums.items():
            log({"task": name, "epoch": epoch, "batches": count, "train_loss": whole / count if count else None})
        ranks.check_equal(model)
        judged = model if averaged is None else averaged.module
        is_over = stopping is not None and stopping.is_over(judged)
        watched(done, judged)
        sums, marked = dict(nothing), dict(nothing)
        if is_over:
            break
        if checkpoint is not None and done < total:
            save(checkpoint, (epoch + 1, 0))
    if averaged is not None:
        model.load_state_dict(averaged.module.state_dict())
    if stopping is not None:
        stopping.restore(model)
    if checkpoint is not None and ranks.leads:
        checkpoint.unlink(missing_ok=True)
    return seconds()


def _since(before: Losses, now: Losses) -> dict[str, float]:
    """Return the mean of each loss over the batches in which `now` went beyond `before`."""
    added = {name: (whole - before[name][0], count - before[name][1]) for name, (whole, count) in now.items()}
    return {name: whole / count for name, (whole, count) in added.items() if count}
