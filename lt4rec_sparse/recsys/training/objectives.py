"""What one batch does to a model: one step per task, or one step for all tasks together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn.optim import MaskedAdam
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.recsys.data import Batch
from lt4rec_sparse.recsys.models.losses import Loss

Factors = Callable[[Batch], Mapping[str, Tensor]]
"""Maps a batch to factors of its rows' losses: task -> `[batch]`. Factors scale the loss; weights distribute it."""

Losses = Callable[[nn.Module, Batch], dict[str, Tensor]]
"""Maps a model and a batch to the losses of one joint step, by name; a task without rows is left out."""

ROW_TILE = 64  # few distinct row counts, and few rows of padding


@dataclass(frozen=True)
class TaskLosses:
    """Each task's loss on its own rows: `scale * sum(factor w loss) / sum(w)`."""

    losses: Mapping[str, Loss]  # in the order of alternation
    scales: Mapping[str, float] = field(default_factory=dict)  # Eq 2's a and b; 1 for tasks not named
    factors: Factors | None = None  # more factors per row
    dtype: torch.dtype | None = None  # of matrix products (`torch.autocast`); None for that of the weights

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of all tasks that have rows; the model runs once, over the whole batch."""
        logits = forward(model, batch.features, None, self.dtype)
        return {
            task: self.of(task, batch, rows, logits[rows, place])
            for place, task in enumerate(self.losses)
            if len(rows := rows_of(batch, task))
        }

    def of(self, task: str, batch: Batch, rows: Tensor, logits: Tensor) -> Tensor:
        """Return one task's loss on its rows at positions `rows [n]`, at least one, with the logits `[n]`."""
        labels, weights = batch.labels[task][rows], batch.weights[task][rows]
        scale: float | Tensor = self.scales.get(task, 1.0)
        if self.factors is not None:
            factor = self.factors(batch)[task][rows].to(weights.dtype)
            tiny = torch.finfo(weights.dtype).tiny
            scale = scale * (weights * factor).sum() / weights.sum().clamp_min(tiny)
            weights = weights * factor
        return self.losses[task](logits, labels, weights) * scale


@dataclass(frozen=True)
class Alternating:
    """A step for each task in turn, on the rows that are the task's (LT4REC, Algorithm 1, lines 12 to 17).

    A step changes only what its task owns. A task without rows in a batch takes no step.
    """

    losses: TaskLosses

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks."""
        return tuple(self.losses.losses)

    def step(self, model: nn.Module, optimizer: MaskedAdam, batch: Batch) -> dict[str, Tensor]:
        result = {}
        for task in self.names:
            rows = rows_of(batch, task)
            if not len(rows):
                continue
            optimizer.zero_grad()
            loss = self.losses.of(task, batch, rows, logits_of(model, batch, rows, task, self.losses.dtype))
            torch.autograd.backward(loss)
            optimizer.step(task)
            result[task] = loss.detach()
        return result


@dataclass(frozen=True)
class Joint:
    """One step for all tasks: on the sum of their losses, or on what `combine` makes of them (Eq 2 of LT4REC)."""

    losses: Losses
    names: tuple[str, ...]
    combine: Callable[[Mapping[str, Tensor]], Tensor] | None = None

    def step(self, model: nn.Module, optimizer: MaskedAdam, batch: Batch) -> dict[str, Tensor]:
        losses = self.losses(model, batch)
        optimizer.zero_grad()
        whole = torch.stack(list(losses.values())).sum() if self.combine is None else self.combine(losses)
        torch.autograd.backward(whole)
        optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}


@dataclass(frozen=True)
class Projected:
    """One step along what `project` makes of the tasks' gradients, such as PCGrad.

    `project` makes one list of gradients, a tensor per parameter, from one such list per task.
    """

    losses: Losses
    names: tuple[str, ...]
    project: Callable[[Sequence[Sequence[Tensor]]], Iterable[Tensor]]

    def step(self, model: nn.Module, optimizer: MaskedAdam, batch: Batch) -> dict[str, Tensor]:
        losses = self.losses(model, batch)
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = []
        for loss in losses.values():
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            if any(g is not None and g.is_sparse for g in found):
                raise ValueError("gradients: got a sparse one, wanted dense ones to project")
            gradients.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
        optimizer.zero_grad()
        for parameter, gradient in zip(parameters, self.project(gradients), strict=True):
            parameter.grad = gradient
        optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}


Objective = Alternating | Joint | Projected
"""How a batch becomes optimiser steps; `step` returns losses of `names` as they were before it, without their graph."""


def rows_of(batch: Batch, task: str) -> Tensor:
    """Return the positions of the task's rows, int64 `[n]`."""
    return batch.rows[task].nonzero().squeeze(1)


def logits_of(model: nn.Module, batch: Batch, rows: Tensor, task: str, dtype: torch.dtype | None) -> Tensor:
    """Return one task's float32 logits of the rows at positions `rows [n]` of a batch, `[n]`.

    In a lower dtype the model runs on whole tiles of rows, the last one padded: oneDNN generates code for every new
    number of rows, which took longer than the matrix products (30 ms in a step of 17 ms).
    """
    n = len(rows)
    if n == batch.features.batch:
        return forward(model, batch.features, task, dtype).squeeze(1)
    filled = rows if dtype is None else torch.cat([rows, rows[-1:].expand(-n % ROW_TILE)])
    return forward(model, batch.features.take(filled), task, dtype).squeeze(1)[:n]


def forward(model: nn.Module, features: EncodedFeatures, task: str | None, dtype: torch.dtype | None) -> Tensor:
    """Return float32 logits; with `dtype`, matrix products run in it and sum in float32."""
    if dtype is None:
        logits: Tensor = model(features, task)
        return logits
    with torch.autocast(features.single.device.type, dtype):
        logits = model(features, task)
    return logits.float()
