"""Pruning: which of the weights alive survive a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lt4rec_sparse.masks import Mask

# The units of pruning. Another block, such as "block8" or "8x2", needs only one more word here.
GRANULARITIES = ("weight", "2:4", "16x4", "block4", "block16", "block32", "block64", "neuron")
SCOPES = ("global", "layer")  # what a quantile is taken over: all layers together, as in the paper, or each layer


def prune_by_magnitude(
    weights: Mapping[str, Tensor], mask: Mask, nnz: int | Mapping[str, int], granularity: str = "weight"
) -> Mask:
    """Keep the tiles of largest magnitude, over all layers together, while they hold at most `nnz` weights.

    One global quantile, as in the paper; or one per layer, if `nnz` gives a number for each (`wanted_nnz` makes either
    from a density). Applied to the full mask of a trained network, this is one-shot pruning.

    A tile is a weight, a block or a neuron's row of a layer:

    - "weight": single weights by their magnitudes, the paper's S-Weight. Exactly `nnz` survive.
    - "2:4": single weights, of which at most 2 of 4 neighbouring columns survive: `project_to_2_4`, then the quantile
      over what it left, at most about half of a layer.
    - "16x4": blocks of 16 rows and 4 columns, counted from the layer's first weight; smaller at its last rows and
      columns. `formats.BlockWeight` stores them.
    - "block4", "block16", "block32", "block64": the same of that many rows and columns. A kernel can skip a dead block.
    - "neuron": whole rows, the paper's S-Neuron. What remains is a smaller dense network (`nn.compaction`).

    The score of a block or a neuron is the mean of its magnitudes, the L1 norm of Mao et al. over the size of the tile,
    divided by the mean over the weights alive in its layer, after Molchanov et al.: otherwise means over many weights,
    which hardly differ within a layer, would rank layers and not tiles. Weights pruned before stay pruned and count as
    zero in the mean, because a tile costs a kernel the same however few of its weights are alive. A tile with any
    weight alive is alive, and survives with the weights that it has.

    Tiles are taken by descending score; ties go to the earlier layer, row and column. The longest sequence of them that
    holds at most `nnz` weights is kept. Of blocks and neurons, the best of each layer comes before all others and is
    kept even beyond `nnz`, since a layer without any would cut the network.

    Example:
        >>> alive = Mask.full({"layers.0": (1, 4)})
        >>> prune_by_magnitude({"layers.0": torch.tensor([[0.5, -2.0, 0.5, 1.0]])}, alive, 3)["layers.0"].tolist()
        [[True, True, False, True]]
        >>> alive = Mask.full({"layers.0": (2, 2)})
        >>> prune_by_magnitude({"layers.0": torch.tensor([[4.0, 0.0], [3.0, 3.0]])}, alive, 3, "neuron")["layers.0"]
        tensor([[False, False],
                [ True,  True]])

    Args:
        weights: Layer name -> `[out_features, in_features]`, for each layer of the mask.
        mask: The weights alive.
        nnz: How many weights are to survive: over all layers together, or layer name -> number in that layer.
        granularity: One of `GRANULARITIES`.

    Returns:
        A subset of `mask`.

    Raises:
        ValueError: If there is no such granularity, `nnz` is negative or more than are alive, layers or shapes
            disagree, or a weight alive is NaN.

    Source: LT4REC (arXiv 2008.09872), Algorithm 1, line 5; the score of blocks and neurons: Mao et al. (arXiv
    1705.08922) and Molchanov et al. (arXiv 1611.06440).
    """
    check_granularity(granularity)
    if not isinstance(nnz, int):
        if set(nnz) != set(mask) or set(weights) != set(mask):
            raise ValueError(f"nnz and weights: got layers {list(nnz)} and {list(weights)}, wanted {list(mask)}")
        layers: dict[str, Tensor] = {}
        for name, kept in mask.items():
            layers |= prune_by_magnitude({name: weights[name]}, Mask({name: kept}), nnz[name], granularity)
        return Mask(layers)
    if not 0 <= nnz <= mask.nnz:
        raise ValueError(f"nnz: got {nnz}, wanted 0 to {mask.nnz}, the weights alive")
    if granularity == "2:4":
        allowed = project_to_2_4(weights, mask)
        return prune_by_magnitude(weights, allowed, min(nnz, allowed.nnz))
    magnitudes = _magnitudes(weights, mask)
    tiles = {name: tile_shape(granularity, shape) for name, shape in mask.shapes.items()}
    counts = [_tile_sums(kept, tiles[name]) for name, kept in mask.items()]
    scores = []
    for name, magnitude in magnitudes.items():
        mean = _tile_sums(magnitude, tiles[name]) / _tile_sums(torch.ones_like(magnitude), tiles[name])
        scores.append(mean if granularity == "weight" else mean / _mean(magnitude, mask[name]))
    sizes = [count.numel() for count in counts]
    score, count = (torch.cat([part.flatten() for part in parts]) for parts in (scores, counts))
    alive = count.nonzero().squeeze(1)
    order = alive[score[alive].sort(descending=True, stable=True).indices]
    order, n_best = (order, 0) if granularity == "weight" else _best_of_layers_first(order, sizes)
    n_kept = max(n_best, int((count[order].cumsum(0) <= nnz).sum()))
    survives = torch.zeros_like(count, dtype=torch.bool)
    survives[order[:n_kept]] = True
    kept_tiles = {}
    for (name, kept), part, of_tiles in zip(mask.items(), torch.split(survives, sizes), counts, strict=True):
        kept_tiles[name] = kept & spread_tiles(part.view(of_tiles.shape), tiles[name], mask.shapes[name])
    return Mask(kept_tiles)


def project_to_2_4(weights: Mapping[str, Tensor], mask: Mask) -> Mask:
    """Keep at most 2 of each 4 neighbouring columns of a row: those of largest magnitude among the alive.

    Sparse tensor cores compute such a layer at twice the dense rate. If `in_features` is not a multiple of 4, the last
    group of a row is shorter, and keeps at most 2 as well. Ties go to the earlier column.

    It changes the mask, so nothing here does it unless asked. It costs little where masks are sparse: of the groups of
    a random mask, 0.4 % at 90 % sparsity and 2.7 % at 80 % have more than 2 weights alive. It then prunes 1 to 4 % of
    the weights alive, the smallest of their groups.

    Example:
        >>> alive = Mask.full({"layers.0": (1, 5)})
        >>> project_to_2_4({"layers.0": torch.tensor([[0.5, -2.0, 0.5, 0.1, 0.1]])}, alive)["layers.0"].tolist()
        [[True, True, False, False, True]]

    Args:
        weights: Layer name -> `[out_features, in_features]`, for each layer of the mask.
        mask: The weights alive; the result is a subset of it.

    Raises:
        ValueError: If layers or shapes disagree, or a weight alive is NaN.

    Source: NVIDIA's 2:4 structured sparsity (arXiv 2104.08378).
    """
    layers = {}
    for name, magnitude in _magnitudes(weights, mask).items():
        rows, columns = magnitude.shape
        # Below every magnitude, so that neither dead weights nor padding take the place of a weight that is zero.
        padded = F.pad(magnitude.masked_fill(~mask[name], -1), (0, -columns % 4), value=-1)
        groups = padded.view(rows, (columns + 3) // 4, 4)
        best = groups.sort(dim=2, descending=True, stable=True).indices[:, :, :2]
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, best, True)
        layers[name] = kept.flatten(1)[:, :columns] & mask[name]
    return Mask(layers)


class BlockProjection(NamedTuple):
    """What `project_to_blocks` made of a mask, and what it costs."""

    mask: Mask  # of whole blocks
    magnitude: float  # of the weights that were alive: the sum of the magnitudes that are still kept, over that of all
    added: int  # weights that are kept now and were pruned before, because others of their block are kept


def project_to_blocks(
    weights: Mapping[str, Tensor], mask: Mask, density: float | None = None, block: str = "16x4"
) -> BlockProjection:
    """Cover a mask of single weights with whole blocks, such as kernels run at the speed of a dense product.

    Each layer keeps the blocks that hold the most magnitude of its alive weights for their size, while they have no
    more weights than the layer's share of the density, and at least one. Every layer's share is the same multiple of
    what it keeps now. Ties go to the earlier row, then the earlier column.

    A kept block keeps all of its weights, also those that the mask had pruned (`added`): set them to zero where the
    network must stay as it was, or train on.

    Example:
        >>> alive = torch.zeros(32, 8, dtype=torch.bool)
        >>> alive[16:, 0] = True
        >>> found = project_to_blocks({"layers.0": torch.ones(32, 8)}, Mask({"layers.0": alive}), 0.25)
        >>> found.mask.nnz, found.magnitude, found.added
        (64, 1.0, 48)

    Args:
        weights: Layer name -> `[out_features, in_features]`, for each layer of the mask.
        mask: The weights alive.
        density: Kept weights over all weights of the result, at most; None takes the mask's own.
        block: A granularity of blocks.

    Raises:
        ValueError: If layers or shapes disagree, a weight alive is NaN, the density is not in (0, 1], or the
            granularity is none of blocks.
    """
    check_granularity(block)
    if block in ("weight", "2:4", "neuron"):
        raise ValueError(f"block: got {block!r}, wanted a granularity of blocks")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density: got {density}, wanted more than 0 and at most 1")
    factor = 1.0 if density is None else density / max(mask.density, 1 / mask.size)
    layers, kept_magnitude, all_magnitude = {}, 0.0, 0.0
    for name, magnitude in _magnitudes(weights, mask).items():
        shape = mask.shapes[name]
        tile = tile_shape(block, shape)
        sums = _tile_sums(magnitude, tile)
        size = _tile_sums(torch.ones(shape, dtype=torch.bool), tile)
        order = (sums / size).flatten().sort(descending=True, stable=True).indices
        allowed = round(factor * int(mask[name].sum()))
        count = max(1, int((size.flatten()[order].cumsum(0) <= allowed).sum()))
        is_kept = torch.zeros(sums.numel(), dtype=torch.bool)
        is_kept[order[:count]] = True
        layers[name] = spread_tiles(is_kept.view(sums.shape), tile, shape)
        kept_magnitude += sums.flatten()[is_kept].sum().item()
        all_magnitude += sums.sum().item()
    result = Mask(layers)
    added = sum(int((kept & ~mask[name]).sum()) for name, kept in result.items())
    return BlockProjection(result, kept_magnitude / all_magnitude if all_magnitude else 1.0, added)


def check_granularity(granularity: str) -> None:
    """Raise a ValueError unless it is one of `GRANULARITIES`."""
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: got {granularity!r}, wanted one of {', '.join(GRANULARITIES)}")


def check_scope(scope: str) -> None:
    """Raise a ValueError unless it is one of `SCOPES`."""
    if scope not in SCOPES:
        raise ValueError(f"scope: got {scope!r}, wanted one of {', '.join(SCOPES)}")


def tile_shape(granularity: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of what is pruned as a unit in a layer of this shape."""
    if granularity in ("weight", "2:4"):
        return 1, 1
    if granularity == "neuron":
        return 1, shape[1]
    high, _, wide = granularity.removeprefix("block").partition("x")
    return int(high), int(wide or high)


def spread_tiles(values: Tensor, tile: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Give each weight of a layer the value of its tile: `[rows of tiles, columns of tiles]` -> `shape`."""
    return values.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)[: shape[0], : shape[1]]


def wanted_nnz(mask: Mask, density: float, scope: str = "global") -> int | dict[str, int]:
    """Return how many weights `prune_by_magnitude` is to keep for a density, over all layers together or per layer.

    The density is relative to all weights, not to those alive. The number is rounded, and at most those alive.

    Example:
        >>> mask = Mask.full({"layers.0": (2, 4), "layers.1": (1, 2)})
        >>> wanted_nnz(mask, 0.5), wanted_nnz(mask, 0.5, "layer")
        (5, {'layers.0': 4, 'layers.1': 1})

    Raises:
        ValueError: If the density is not in (0, 1], or there is no such scope.
    """
    check_scope(scope)
    if not 0 < density <= 1:
        raise ValueError(f"density: got {density}, wanted more than 0 and at most 1")
    if scope == "layer":
        return {name: min(round(kept.numel() * density), int(kept.sum())) for name, kept in mask.items()}
    return min(round(mask.size * density), mask.nnz)


def _magnitudes(weights: Mapping[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """Return each layer's magnitudes in float32, in the order of the mask; 0 where a weight is pruned."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != mask.shapes:
        raise ValueError(f"weights: got layers {shapes}, wanted the mask's, {mask.shapes}")
    magnitudes = {n: weights[n].detach().cpu().float().abs().masked_fill(~kept, 0) for n, kept in mask.items()}
    nans = sum(int(magnitude.isnan().sum()) for magnitude in magnitudes.values())
    if nans:
        raise ValueError(f"weights: got {nans} NaN among those alive, wanted numbers")
    return magnitudes


def _mean(magnitude: Tensor, kept: Tensor) -> float:
    """Average over the weights alive; 1 if this is no divisor: all are zero, none is alive, or one is infinite."""
    mean = magnitude.sum(dtype=torch.float64).item() / max(int(kept.sum()), 1)
    return mean if 0 < mean < math.inf else 1.0


def _best_of_layers_first(order: Tensor, sizes: list[int]) -> tuple[Tensor, int]:
    """Move the first tile of each layer to the front, and return how many they are. Layer `i` has `sizes[i]` tiles."""
    layer = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[order]
    is_best = torch.zeros_like(order, dtype=torch.bool)
    for i in range(len(sizes)):
        is_best[(layer == i).nonzero()[:1]] = True
    return torch.cat([order[is_best], order[~is_best]]), int(is_best.sum())


def _tile_sums(layer: Tensor, tile: tuple[int, int]) -> Tensor:
    """Sum each tile, `[rows of tiles, columns of tiles]`: counts as int64, magnitudes in float64."""
    # In float64 the sum of a tile is exact for float32 magnitudes within a factor of about 100,000 of each other, so
    # that tiles of equal weights tie in whatever order the weights are.
    exact = layer.to(torch.int64 if layer.dtype == torch.bool else torch.float64)
    padded = F.pad(exact, (0, -layer.shape[1] % tile[1], 0, -layer.shape[0] % tile[0]))
    return padded.view(padded.shape[0] // tile[0], tile[0], padded.shape[1] // tile[1], tile[1]).sum((1, 3))
