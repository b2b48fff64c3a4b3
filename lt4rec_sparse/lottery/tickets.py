"""Ticket search: train, prune, rewind, level by level (Algorithm 1, lines 1 to 9)."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lt4rec_sparse.files import read_json, write_whole
from lt4rec_sparse.lottery.pruning import check_granularity, prune_by_magnitude, wanted_nnz
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.nn import MaskedMLP


@dataclass(frozen=True)
class Ticket:
    """A mask of one task at one level of pruning, with the metrics of the network that was trained through it."""

    task: str
    level: int  # rounds of pruning that made the mask; 0 is the full mask
    mask: Mask
    metrics: Mapping[str, float]  # on the validation split, after training through the mask from the saved start


def search_tickets(
    task: str,
    model: nn.Module,
    mlp: MaskedMLP,
    train_and_judge: Callable[[int], Mapping[str, float]],
    rounds: int,
    density: float,
    folder: Path,
    granularity: str = "weight",
    scope: str = "global",
    start: Mapping[str, Tensor] | None = None,
) -> list[Ticket]:
    """Find one task's tickets: `rounds` rounds of train, prune by magnitude, rewind everything to the start.

    The start is the state of the model when this is called, embeddings included, or the given one: a state after some
    batches, of this task (late rewinding) or of all tasks (a multi-task warm-up). Its masks are ignored.

    Level 0 is the single-task baseline: the full mask, from the start on. `train_and_judge` may load the weights of a
    baseline that was trained before, and return its metrics.

    A level that was finished before is read back from `folder`, so an interrupted search continues where it stopped.
    Each level leaves `level_<i>.mask.safetensors` and, once judged, `level_<i>.json`.

    Args:
        task: The task's name.
        model: The single-task model, which contains `mlp`.
        mlp: The part of the model whose one mask is searched.
        train_and_judge: Takes the level, trains the model as it is, through the mask that it has, and returns the
            task's validation metrics.
        rounds: How many rounds of pruning.
        density: The density of the last level; each round keeps the same share, `density ** (1 / rounds)`. Blocks and
            neurons are pruned whole, so their levels keep somewhat less; if a layer has few of them, its last one may
            keep more (`prune_by_magnitude`). With "2:4" every level keeps at most half, so that the first levels may
            be the same.
        folder: Where the tickets are written. It belongs to one search: it records none of these arguments.
        granularity: What is pruned as a unit, one of `GRANULARITIES`.
        scope: What a quantile is taken over, one of `SCOPES`: all layers together, as in the paper, or each layer.
        start: The state that each level is rewound to; None takes the model's present one.

    Returns:
        One ticket per level, from the full mask to `density`: `rounds + 1` of them, the points of Figure 4.

    Raises:
        ValueError: If there is no such granularity or scope, or the density is not in (0, 1].

    Source: LT4REC (arXiv 2008.09872), Algorithm 1, lines 1 to 9; late rewinding: Frankle et al. (arXiv 1912.05671).
    """
    mask = Mask.full({name: (w.shape[0], w.shape[1]) for name, w in mlp.masked_weights().items()})
    check_granularity(granularity)  # not only after the first training
    wanted_nnz(mask, density, scope)
    folder.mkdir(parents=True, exist_ok=True)
    start = copy.deepcopy(model.state_dict() if start is None else dict(start))  # the model's own follows the training
    tickets = []
    for level in range(rounds + 1):
        judged, saved = folder / f"level_{level}.json", folder / f"level_{level}.mask.safetensors"
        following = folder / f"level_{level + 1}.mask.safetensors"
        if saved.exists():
            mask = Mask.load(saved)
        else:
            mask.save(saved)
        # The last level of a search with fewer rounds was judged and not pruned.
        if not judged.exists() or (level < rounds and not following.exists()):
            model.load_state_dict(start)
            mlp.set_mask(mask)
            metrics = train_and_judge(level)
            if level < rounds:
                nnz = wanted_nnz(mask, density ** ((level + 1) / rounds), scope)
                prune_by_magnitude(mlp.masked_weights(), mask, nnz, granularity).save(following)
            record = {"task": task, "level": level, "density": mask.density, "metrics": dict(metrics)}
            write_whole(judged, json.dumps(record, indent=1))
        tickets.append(Ticket(task, level, mask, read_json(judged, "metrics")["metrics"]))
    return tickets


def best_ticket(tickets: Sequence[Ticket], metric: str, higher_is_better: bool) -> Ticket:
    """Return the pruned ticket with the best metric; ties go to the sparser one.

    The full mask is never chosen: the paper gives it up for computation and storage even where it is best.

    Raises:
        ValueError: If no ticket is pruned, or a metric is not a number.
    """
    pruned = [ticket for ticket in tickets if ticket.level > 0]
    if not pruned:
        raise ValueError("tickets: got no pruned one, wanted at least one round")
    if any(math.isnan(ticket.metrics[metric]) for ticket in pruned):
        raise ValueError(f"tickets: got {metric} = NaN, wanted validation rows that define it")
    sign = 1 if higher_is_better else -1
    return max(pruned, key=lambda ticket: (sign * ticket.metrics[metric], ticket.level))
