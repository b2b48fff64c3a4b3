"""What a trial's batches do to its model: losses, scales, conflict factors and balance as one objective."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lt4rec_sparse.recsys.data import Batch
from lt4rec_sparse.recsys.harness.trials import Training, Trial
from lt4rec_sparse.recsys.models import Conflict, UncertaintyWeights, entire_space, loss_of, pcgrad
from lt4rec_sparse.recsys.training import Alternating, Joint, Objective, Projected, TaskLosses
from lt4rec_sparse.recsys.training.objectives import forward, logits_of, own_part, rows_of, share

PRODUCTS = {"float32": None, "bfloat16": torch.bfloat16}  # `Training.dtype` -> dtype of `torch.autocast`
DURATION = "duration_ms"  # the carried column by which conflicts are recognised


def plain(training: Training, tasks: tuple[str, ...], kinds: Mapping[str, str]) -> Objective:
    """Return the paper's objective: one step per task on the task's own rows, without scales or factors."""
    return of_trial(Trial("sparse_sharing", tasks, training=training), kinds)


def loss_on(objective: Objective, model: nn.Module, task: str) -> Callable[[Batch], Tensor]:
    """Return a function from a batch to a task's loss, with its graph, for an objective that `plain` made.

    It is the loss on all rows of the batch in every process.
    """
    assert isinstance(objective, Alternating)
    return partial(_loss, objective.losses, model, task)


def _loss(losses: TaskLosses, model: nn.Module, task: str, batch: Batch) -> Tensor:
    rows = rows_of(batch, task)
    return losses.of(task, batch, rows, logits_of(model, batch, rows, task, losses.dtype))


def obstacle(trial: Trial, kinds: Mapping[str, str], carried: Collection[str]) -> str | None:
    """Return why a trial cannot be trained on a log that carries these columns, or None if it can."""
    ratios = [task for task in trial.tasks if kinds[task] == "ratio"]
    if trial.conflict is not None and len(ratios) != 1:
        return f"conflict: got {len(ratios)} tasks of a ratio among {', '.join(trial.tasks)}, wanted one"
    if trial.conflict is not None and DURATION not in carried:
        return f"conflict: got a log that does not carry {DURATION}, wanted it in the schema's carried"
    if trial.model == "esmm" and (len(trial.tasks) != 2 or kinds[trial.tasks[0]] != "binary"):
        return f"esmm: got tasks {', '.join(trial.tasks)}, wanted two, a click and what follows it"
    if trial.objective == "pcgrad" and trial.training.sparse_gradients:
        return "pcgrad: got sparse gradients, wanted dense ones, which it projects"
    masks = trial.masks
    if masks is not None and masks.shared is not None:
        owned = masks.search.density_of(trial.tasks[0]) * (masks.shared + len(trial.tasks) * (1 - masks.shared))
        if owned > 1:
            return f"masks: got {len(trial.tasks)} tasks that own {owned:.0%} of each layer, wanted at most 100%"
    return None


def of_trial(trial: Trial, kinds: Mapping[str, str], balance: UncertaintyWeights | None = None) -> Objective:
    """Return a trial's objective; `balance` are the learned weights of an "uncertainty" objective."""
    of_trained = {task: kinds[task] for task in trial.tasks}
    factors = None if trial.conflict is None else _ConflictFactors(trial.conflict, of_trained)
    named = dict(trial.training.losses)
    of_tasks = {task: loss_of(kinds[task], named.get(task)) for task in trial.tasks}
    losses = TaskLosses(of_tasks, dict(trial.scales), factors, PRODUCTS[trial.training.dtype])
    if trial.model == "esmm":
        return Joint(_EntireSpace(losses, *trial.tasks), trial.tasks)
    match trial.objective:
        case "alternating":
            return Alternating(losses)
        case "joint":
            return Joint(losses, trial.tasks)
        case "uncertainty":
            return Joint(losses, trial.tasks, balance)
    return Projected(losses, trial.tasks, partial(pcgrad, generator=torch.Generator().manual_seed(trial.seed)))


@dataclass(frozen=True)
class _ConflictFactors:
    """The factors of `Conflict` in the loss of each task, of which one is a ratio."""

    conflict: Conflict
    kinds: Mapping[str, str]

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        (ratio,) = (task for task, kind in self.kinds.items() if kind == "ratio")
        # The ratio's rows are those that were clicked and have a duration.
        label, clicked = batch.labels[ratio], batch.rows[ratio]
        click, watch = self.conflict.factors(label, clicked, batch.values[DURATION])
        return {task: watch if kind == "ratio" else click for task, kind in self.kinds.items()}


@dataclass(frozen=True)
class _EntireSpace:
    """ESMM's losses: clicks, and clicks times conversions, over all impressions."""

    losses: TaskLosses
    click: str
    conversion: str

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        click, conversion = self.click, self.conversion
        part, features = own_part(batch)
        logits = forward(model, features, None, self.losses.dtype)
        own = batch.rows[click][part].nonzero().squeeze(1)
        result = {click: self.losses.of(click, batch, part[own], logits[own, 0])}
        # A clicked row without a duration has no known conversion; a row that nobody clicked has the conversion 0.
        known = batch.rows[click] & ((batch.labels[click] < 0.5) | batch.rows[conversion])
        if known.any():
            own = known[part].nonzero().squeeze(1)
            rows, weights = part[own], batch.weights[click]
            term = entire_space(logits[own, 0], logits[own, 1], batch.labels[conversion][rows], weights[rows])
            result[conversion] = term * share(weights, rows, known.nonzero().squeeze(1))
        return result
