"""Controls: random masks, which a ticket must beat to be worth its search, and masks that share a chosen amount."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lt4rec_sparse.lottery.pruning import prune_by_magnitude, spread_tiles, tile_shape
from lt4rec_sparse.masks import Mask, Shapes


def random_like(
    tickets: Mapping[str, Mask], generator: torch.Generator, granularity: str = "weight"
) -> dict[str, Mask]:
    """Draw for each task a random mask with its ticket's number of kept weights in every layer.

    For tickets of blocks or neurons it draws blocks or neurons, and for "2:4" at most 2 of 4, so that only the search
    makes the difference: these masks are what `prune_by_magnitude` makes of random magnitudes, with its deviations from
    the number (none for "2:4", and none if all tiles of a layer have the same size).
    """
    return {
        task: _random(ticket.shapes, ticket.layer_nnz(), generator, granularity) for task, ticket in tickets.items()
    }


def random_masks(
    shapes: Shapes,
    density: float | Mapping[str, float],
    tasks: Sequence[str],
    generator: torch.Generator,
    granularity: str = "weight",
) -> dict[str, Mask]:
    """Draw a random mask for each task, with the same density in every layer: sparse sharing without a search.

    `density` is one for all tasks, or a task's own by its name. With equal generators a task's weights at a lower
    density are among those at a higher one.
    """
    of_tasks = density if isinstance(density, Mapping) else dict.fromkeys(tasks, density)
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    Mask.random(shapes, dict.fromkeys(shapes, 0), generator)  # seeds keep the masks that they had with this draw
    masks = {}
    for task in tasks:
        overall = sum(round(size * of_tasks[task]) for size in sizes.values()) / sum(sizes.values())
        nnz = {name: round(size * overall) for name, size in sizes.items()}
        masks[task] = _random(shapes, nnz, generator, granularity)
    return masks


def one_for_all(masks: Mapping[str, Mask], task: str) -> dict[str, Mask]:
    """Give every task the mask of `task`: as sparse as sparse sharing, but with no private weights."""
    return dict.fromkeys(masks, masks[task])


Scores = Mapping[str, Mapping[str, Tensor]]  # task -> layer name -> [out_features, in_features], larger is better


def unanimous(scores: Scores, nnz: Mapping[str, int]) -> dict[str, Mask]:
    """Give every task one mask, which prunes a weight only if every task would prune it.

    In each layer every task keeps the same number of weights, those that it scores best, and the mask is their union.
    The number is chosen so that the union has exactly `nnz` weights; if one more per task would be too many, the
    earlier tasks keep one more.

    Example:
        >>> scores = {"ctr": {"w": torch.tensor([[4.0, 3, 2, 1]])}, "cvr": {"w": torch.tensor([[4.0, 1, 2, 3]])}}
        >>> unanimous(scores, {"w": 3})["cvr"]["w"].tolist()
        [[True, True, False, True]]

    Args:
        scores: Task -> layer name -> `[out_features, in_features]`, such as the magnitudes after the task's training.
        nnz: Layer name -> size of its union.

    Returns:
        Task -> the mask, the same for all.

    Raises:
        ValueError: If there is no task, layers or shapes disagree, a score is NaN, or `nnz` does not fit.

    Source: Sun et al. (arXiv 2206.04662), DiSparse, unanimous decisions; the scores come from the caller.
    """
    shapes = _check_scores(scores)
    kept = {name: _union(_ranks(scores, name), n).view(shapes[name]) for name, n in _check_counts(nnz, shapes).items()}
    return dict.fromkeys(scores, Mask(kept))


def separate(scores: Scores, nnz: Mapping[str, int], shared: float) -> dict[str, Mask]:
    """Give each task a mask that shares exactly the wanted part of its weights with all others, and no other weight.

    In each layer every task keeps `nnz` weights. `round(shared * nnz)` of them are owned by all tasks, and every other
    weight by at most one task. The weights that all tasks own are first those among the `nnz` best of every task, then
    any others, by the sum of their ranks over the tasks. Of the rest, a weight that several tasks want goes to the one
    that ranks it higher (ties to the earlier task) and does not have enough yet; the others take their next best.

    `shared` = 0 makes disjoint masks, 1 one mask for all. The masks of tickets overlap in part.

    Example:
        >>> scores = {"ctr": {"w": torch.tensor([[4.0, 3, 2, 1]])}, "cvr": {"w": torch.tensor([[4.0, 2, 3, 1]])}}
        >>> {task: mask["w"].int().tolist() for task, mask in separate(scores, {"w": 2}, 0.5).items()}
        {'ctr': [[1, 1, 0, 0]], 'cvr': [[1, 0, 1, 0]]}

    Args:
        scores: As in `unanimous`.
        nnz: Layer name -> how many of its weights each task keeps.
        shared: The part of these weights that all tasks own, from 0 to 1.

    Returns:
        Task -> its mask.

    Raises:
        ValueError: If `shared` is out of its range, a layer has fewer weights than the tasks would own together, or for
            the reasons of `unanimous`.
    """
    shapes = _check_scores(scores)
    if not 0 <= shared <= 1:
        raise ValueError(f"shared: got {shared}, wanted 0 to 1")
    layers: list[dict[str, Tensor]] = [{} for _ in scores]
    for name, count in _check_counts(nnz, shapes).items():
        common = round(shared * count)
        rows, columns = shapes[name]
        owned = common + len(scores) * (count - common)
        if owned > rows * columns:
            raise ValueError(
                f"shared: got {shared}, with which {len(scores)} tasks of {count} weights each own {owned} in {name}, "
                f"wanted at most its {rows * columns}"
            )
        for of_task, kept in zip(layers, _separate(_ranks(scores, name), count, common), strict=True):
            of_task[name] = kept.view(rows, columns)
    return {task: Mask(of_task) for task, of_task in zip(scores, layers, strict=True)}


def random_separate(
    shapes: Shapes, nnz: Mapping[str, int], shared: float, generator: torch.Generator, tasks: Sequence[str]
) -> dict[str, Mask]:
    """Draw random masks that share like those of `separate`, and raise what it raises: what sharing alone does."""
    scores = {
        task: {name: torch.rand(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for task in tasks
    }
    return separate(scores, nnz, shared)


def _random(shapes: Shapes, nnz: Mapping[str, int], generator: torch.Generator, granularity: str) -> Mask:
    if granularity == "weight":
        return Mask.random(shapes, nnz, generator)
    weights = {}
    for name, shape in shapes.items():
        tile = tile_shape(granularity, shape)
        scores = torch.rand(-(-shape[0] // tile[0]), -(-shape[1] // tile[1]), generator=generator)
        weights[name] = spread_tiles(scores, tile, shape)
    return prune_by_magnitude(weights, Mask.full(shapes), nnz, granularity)


def _check_scores(scores: Scores) -> dict[str, tuple[int, int]]:
    """Return the layers' shapes, the same for every task."""
    if not scores:
        raise ValueError("scores: got no task, wanted at least one")
    by_task = {task: {n: tuple(layer.shape) for n, layer in of_task.items()} for task, of_task in scores.items()}
    first = next(iter(scores))
    for task, of_task in scores.items():
        if by_task[task] != by_task[first] or list(of_task) != list(scores[first]):
            raise ValueError(f"scores of {task}: got layers {by_task[task]}, wanted {by_task[first]}, like {first}")
        nans = sum(int(layer.isnan().sum()) for layer in of_task.values())
        if nans:
            raise ValueError(f"scores of {task}: got {nans} NaN, wanted numbers")
    return {name: (layer.shape[0], layer.shape[1]) for name, layer in scores[first].items()}


def _check_counts(nnz: Mapping[str, int], shapes: Shapes) -> dict[str, int]:
    if set(nnz) != set(shapes):
        raise ValueError(f"nnz: got layers {list(nnz)}, wanted {list(shapes)}")
    for name, (rows, columns) in shapes.items():
        if not 0 <= nnz[name] <= rows * columns:
            raise ValueError(f"nnz of {name}: got {nnz[name]}, wanted 0 to {rows * columns}")
    return {name: nnz[name] for name in shapes}


def _ranks(scores: Scores, name: str) -> Tensor:
    """Rank each task's scores of one layer, `[tasks, n]`: 0 is the best; ties go to the earlier weight."""
    of_layer = torch.stack([of_task[name].detach().cpu().flatten() for of_task in scores.values()])
    order = of_layer.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1]).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _union(ranks: Tensor, nnz: int) -> Tensor:
    """Return bool `[n]`: the first `nnz` weights if the tasks name their best in turn, by ranks `[tasks, n]`."""
    tasks, n = ranks.shape
    # The rank at which each weight is first named, made distinct over the weights.
    named = (ranks * tasks + torch.arange(tasks)[:, None]).min(0).values
    kept = torch.zeros(n, dtype=torch.bool)
    kept[named.sort().indices[:nnz]] = True
    return kept


def _separate(ranks: Tensor, nnz: int, common: int) -> Tensor:
    """Return bool `[tasks, n]` from ranks `[tasks, n]`."""
    tasks, n = ranks.shape
    # Weights that all tasks want come first: their ranks sum to less than tasks * n.
    worth = ranks.sum(0) + (~(ranks < nnz).all(0)) * (tasks * n)
    is_common = torch.zeros(n, dtype=torch.bool)
    is_common[worth.sort(stable=True).indices[:common]] = True
    kept = is_common.repeat(tasks, 1)
    wanted = nnz - common
    # The tasks name their best in turn, rank by rank. Until the first of them has enough, each gets what it ranks
    # higher than the others do. Then the others continue without that task and its weights.
    left = list(range(tasks)) if wanted else []
    free = ~is_common
    while left:
        winner = ranks[left].min(0).indices
        winner = torch.tensor(left)[winner]
        best = {}
        for task in left:
            won = (free & (winner == task)).nonzero().squeeze(1)
            if len(won) >= wanted:
                best[task] = won[ranks[task][won].sort().indices[:wanted]]
        first = min(best, key=lambda task: (int(ranks[task][best[task][-1]]), task))
        kept[first, best[first]] = True
        free[best[first]] = False
        left.remove(first)
    return kept
