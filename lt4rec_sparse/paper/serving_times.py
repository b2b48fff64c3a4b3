"""How fast masked networks are served: every way there is, timed in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn import MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.nn.compaction import compact
from lt4rec_sparse.nn.dense import dense_kernels, packed_product
from lt4rec_sparse.recsys.frozen import premasked, score_mlp
from lt4rec_sparse.recsys.harness.jobs import laboratory
from lt4rec_sparse.recsys.models import HardSharing, SparseSharing
from lt4rec_sparse.stopwatch import interleaved

if TYPE_CHECKING:
    from lt4rec_sparse.paper.pages import Findings

CANDIDATES = (1, 32, 256)


def serving_times(findings: Findings, rows: list[str]) -> dict[str, Any]:
    """Time the MLPs of some rows at seed 0, all tasks, fp32, on rows of the test days.

    The ways of a masked network: "sparse", the engine on compressed weights; "compacted", smaller dense layers without
    what is dead; "dense" and "packed dense", masks multiplied in beforehand, by torch and by oneDNN. Networks without
    masks are dense.

    Returns:
        Row -> {"microseconds": {candidates: median of its fastest way}, "way": that way at the most candidates,
        "ways": {way: {candidates: median}}}.
    """
    lab = laboratory(findings.laboratory)
    models = {row: lab.model(findings.trials[row, 0][0]) for row in rows}
    features = next(lab.prepared.stream("test", max(CANDIDATES), shuffle=False).epoch(0)).features
    with torch.inference_mode():
        x = cast(SparseSharing, next(iter(models.values()))).inputs(features)
    ways = {(row, way): score for row, model in models.items() for way, score in _ways(model).items()}
    medians: dict[tuple[str, str], dict[str, float]] = {key: {} for key in ways}
    for size in CANDIDATES:
        timed = interleaved({f"{row}|{way}": partial(score, x[:size]) for (row, way), score in ways.items()})
        for key in ways:
            medians[key][str(size)] = timed["|".join(key)].median_us
    result = {}
    for row in rows:
        of_row = {way: times for (name, way), times in medians.items() if name == row}
        fastest = {size: min(of_row, key=lambda way: of_row[way][size]) for size in map(str, CANDIDATES)}
        result[row] = {
            "microseconds": {size: of_row[way][size] for size, way in fastest.items()},
            "way": fastest[str(max(CANDIDATES))],
            "ways": of_row,
        }
    return result


def _ways(model: nn.Module) -> Mapping[str, Callable[[Tensor], Tensor]]:
    if isinstance(model, HardSharing):
        mlps = [cast(MaskedMLP, model.mlps[task]) for task in model.tasks]
        return _dense(mlps)
    assert isinstance(model, SparseSharing)
    frozen = freeze(model.mlp, sigmoid=True)
    assert isinstance(frozen, SparseMLP)
    compacted = compact(frozen.network)
    return {
        "sparse": partial(score_mlp, frozen),
        "compacted": torch.inference_mode()(compacted.__call__),
        **_dense([model.mlp]),
    }


def _dense(mlps: Sequence[MaskedMLP]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the ways that need no sparse kernel: torch's `F.linear`, and weights that oneDNN packed."""
    ways = {"dense": [premasked(mlp) for mlp in mlps]}
    if "onednn" in dense_kernels("fp32"):
        ways["packed dense"] = [_packed(mlp) for mlp in mlps]
    return {way: (parts[0] if len(parts) == 1 else partial(_side_by_side, parts)) for way, parts in ways.items()}


def _side_by_side(parts: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    return torch.cat([part(x) for part in parts], dim=1)


def _packed(mlp: MaskedMLP) -> Callable[[Tensor], Tensor]:
    paths = []
    for task in mlp.tasks:
        mask, head = mlp.mask(task), mlp.heads[task]
        assert isinstance(head, nn.Linear)
        parts = [
            (weight.detach() * mask[name], layer.bias.detach(), "relu")
            for (name, weight), layer in zip(mlp.masked_weights().items(), mlp.masked_layers(), strict=True)
        ]
        parts.append((head.weight.detach(), head.bias.detach(), "sigmoid"))
        paths.append([packed_product(*part) for part in parts])

    @torch.inference_mode()
    def score(x: Tensor) -> Tensor:
        scores = []
        for products in paths:
            h = x
            for product in products:
                h = product(h)
            scores.append(h)
        return torch.cat(scores, dim=1)

    return score
