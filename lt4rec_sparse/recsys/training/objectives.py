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
from lt4rec_sparse.recsys.training.distributed import current

Factors = Callable[[Batch], Mapping[str, Tensor]]
"""Maps a batch to factors of its rows' losses: task -> `[batch]`. Factors scale the loss; weights distribute it."""

Losses = Callable[[nn.Module, Batch], dict[str, Tensor]]
"""Maps a model and a batch to the losses of one joint step, by name; a task without rows is left out.

Of several processes each returns its part's term of every loss; see `share`.
"""

ROW_TILE = 64  # few distinct row counts, and few rows of padding


@dataclass(frozen=True)
class TaskLosses:
    """Each task's loss on its own rows: `scale * sum(factor w loss) / sum(w)`.

    Of a part of the batch it is the part's term of that quotient: the sum below is over all rows of the task.
    """

    losses: Mapping[str, Loss]  # in the order of alternation
    scales: Mapping[str, float] = field(default_factory=dict)  # Eq 2's a and b; 1 for tasks not named
    factors: Factors | None = None  # more factors per row
    dtype: torch.dtype | None = None  # of matrix products (`torch.autocast`); None for that of the weights

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of all tasks that have rows; the model runs once, over this process's part of the batch."""
        part, features = own_part(batch)
        logits = forward(model, features, None, self.dtype)
        found = {}
        for place, task in enumerate(self.losses):
            if batch.rows[task].any():
                own = batch.rows[task][part].nonzero().squeeze(1)
                found[task] = self.of(task, batch, part[own], logits[own, place])
        return found

    def of(self, task: str, batch: Batch, rows: Tensor, logits: Tensor) -> Tensor:
        """Return one task's loss on its rows at positions `rows [n]`, all or a part, with the logits `[n]`."""
        labels, weights = batch.labels[task][rows], batch.weights[task][rows]
        scale: float | Tensor = self.scales.get(task, 1.0) * share(batch.weights[task], rows, rows_of(batch, task))
        if self.factors is not None:
            factor = self.factors(batch)[task][rows].to(weights.dtype)
            tiny = torch.finfo(weights.dtype).tiny
            scale = scale * (weights * factor).sum() / weights.sum().clamp_min(tiny)
            weights = weights * factor
        return self.losses[task](logits, labels, weights) * scale


@dataclass(frozen=True)
class Alternating:
    """A step for each task in turn, on the rows that are the task's (LT4REC, Algorithm 1, lines 12 to 17).

    A step changes only what its task owns. A task without rows in a batch takes no step. Of several processes each
    takes an equal part of the task's rows.
    """

    losses: TaskLosses

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks."""
        return tuple(self.losses.losses)

    def step(self, model: nn.Module, optimizer: MaskedAdam, batch: Batch) -> dict[str, Tensor]:
        result, ranks = {}, current()
        for task in self.names:
            everything = rows_of(batch, task)
            if not len(everything):
                continue
            rows = ranks.part(everything)
            optimizer.zero_grad()
            term = self.losses.of(task, batch, rows, logits_of(model, batch, rows, task, self.losses.dtype))
            loss = ranks.total({task: term})[task]
            torch.autograd.backward(loss)
            ranks.sum_gradients(model)
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
        ranks = current()
        losses = ranks.total(self.losses(model, batch))
        optimizer.zero_grad()
        whole = torch.stack(list(losses.values())).sum() if self.combine is None else self.combine(losses)
        torch.autograd.backward(whole)
        ranks.sum_gradients(model)  # what `combine` learns is no part of the model: its gradient is whole already
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
        ranks = current()
        losses = ranks.total(self.losses(model, batch))
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = []
        for loss in losses.values():
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            if any(g is not None and g.is_sparse for g in found):
                raise ValueError("gradients: got a sparse one, wanted dense ones to project")
            gradients.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
            ranks.sum_(gradients[-1])
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


def own_part(batch: Batch) -> tuple[Tensor, EncodedFeatures]:
    """Return the positions of the rows that this process computes, int64 `[n]`, and their features."""
    everything = torch.arange(batch.batch, device=batch.features.single.device)
    part = current().part(everything)
    return part, batch.features if len(part) == batch.batch else batch.features.take(part)


def share(weights: Tensor, part: Tensor, whole: Tensor) -> float:
    """Return `sum(w) of part / sum(w) of whole`, positions `[n]` each: what a mean over a part counts in the whole's.

    Of all rows it is 1, also where no row has weight.
    """
    if len(part) == len(whole):
        return 1.0
    of_whole = weights[whole].double().sum().item()
    return weights[part].double().sum().item() / of_whole if of_whole else 0.0


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
