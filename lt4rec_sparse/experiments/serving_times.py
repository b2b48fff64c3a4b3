"""How fast masked networks are served: every way there is, timed in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lt4rec_sparse.experiments.frozen import premasked, score_mlp
from lt4rec_sparse.experiments.jobs import laboratory
from lt4rec_sparse.nn import MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.nn.compaction import compact
from lt4rec_sparse.ranking import HardSharing, SparseSharing
from lt4rec_sparse.stopwatch import interleaved

if TYPE_CHECKING:
    from lt4rec_sparse.experiments.pages import Findings

CANDIDATES = (1, 32, 256)


def serving_times(findings: Findings, rows: list[str]) -> dict[str, Any]:
    """Time the MLPs of some rows at seed 0, all tasks, fp32, on rows of the test days.

    The ways of a masked network: "sparse", the engine on compressed weights; "compacted", smaller dense layers without
    what is dead; "dense", masks multiplied in beforehand. Networks without masks are dense.

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
        parts = [premasked(mlp) for mlp in mlps]
        return {"dense": lambda x: torch.cat([part(x) for part in parts], dim=1)}
    assert isinstance(model, SparseSharing)
    frozen = freeze(model.mlp, sigmoid=True)
    assert isinstance(frozen, SparseMLP)
    compacted = compact(frozen)
    return {
        "sparse": partial(score_mlp, frozen),
        "compacted": torch.inference_mode()(compacted.__call__),
        "dense": premasked(model.mlp),
    }
