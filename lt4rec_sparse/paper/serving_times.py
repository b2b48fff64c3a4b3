"""How fast masked networks are served in every way, timed in one interleaved run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn import MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.nn.compaction import compact
from lt4rec_sparse.nn.dense import dense_kernels, packed_product
from lt4rec_sparse.recsys.frozen import Product, dense_pass, score_mlp
from lt4rec_sparse.recsys.harness.jobs import laboratory
from lt4rec_sparse.recsys.harness.trials import Trial
from lt4rec_sparse.recsys.models import HardSharing, SparseSharing
from lt4rec_sparse.stopwatch import interleaved

CANDIDATES = (1, 32, 256)


def serving_times(folder: Path, trials: Mapping[str, Trial]) -> dict[str, Any]:
    """Time the MLPs of trained trials, row -> trial, all tasks, fp32, on rows of the test days.

    The ways of a masked network: "sparse", the engine on compressed weights; "compacted", smaller dense layers without
    dead inputs and neurons; "dense" and "packed dense", masks multiplied in beforehand, by torch and by oneDNN.
    Networks without masks are dense.

    Returns:
        Row -> {"microseconds": {candidates: median of its fastest way}, "way": that way for the most candidates,
        "ways": {way: {candidates: median}}}.
    """
    lab = laboratory(folder)
    models = {row: lab.model(trial) for row, trial in trials.items()}
    features = next(lab.prepared.stream("test", max(CANDIDATES), shuffle=False).epoch(0)).features
    with torch.inference_mode():
        x = cast(SparseSharing, next(iter(models.values()))).inputs(features)
    calls = {f"{row}|{way}": score for row, model in models.items() for way, score in _ways(model).items()}
    medians: dict[str, dict[str, dict[str, float]]] = {row: {} for row in trials}
    for size in CANDIDATES:
        for name, timing in interleaved({name: partial(score, x[:size]) for name, score in calls.items()}).items():
            row, way = name.split("|")
            medians[row].setdefault(way, {})[str(size)] = timing.median_us
    result = {}
    for row, ways in medians.items():
        fastest = {str(size): min(ways, key=lambda way: ways[way][str(size)]) for size in CANDIDATES}
        result[row] = {
            "microseconds": {size: ways[way][size] for size, way in fastest.items()},
            "way": fastest[str(max(CANDIDATES))],
            "ways": ways,
        }
    return result


def _ways(model: nn.Module) -> dict[str, Product]:
    if isinstance(model, HardSharing):
        return _dense([cast(MaskedMLP, model.mlps[task]) for task in model.tasks])
    assert isinstance(model, SparseSharing)
    frozen = freeze(model.mlp, sigmoid=True)
    assert isinstance(frozen, SparseMLP)
    compacted = compact(frozen.network)
    return {
        "sparse": partial(score_mlp, frozen),
        "compacted": torch.inference_mode()(compacted.__call__),
        **_dense([model.mlp]),
    }


def _dense(mlps: Sequence[MaskedMLP]) -> dict[str, Product]:
    """Return the ways that need no sparse kernel: torch's `F.linear`, and weights that oneDNN packed."""
    makers = {"dense": None, **({"packed dense": packed_product} if "onednn" in dense_kernels("fp32") else {})}
    return {way: partial(_side_by_side, [dense_pass(mlp, make) for mlp in mlps]) for way, make in makers.items()}


def _side_by_side(parts: Sequence[Product], x: Tensor) -> Tensor:
    return parts[0](x) if len(parts) == 1 else torch.cat([part(x) for part in parts], dim=1)
