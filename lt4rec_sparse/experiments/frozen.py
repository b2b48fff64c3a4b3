"""What freezing gave: is the served model the trained one, how large is it, how fast does it answer a request."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lt4rec_sparse import ops
from lt4rec_sparse.experiments.arms import SeedRun
from lt4rec_sparse.features import EncodedFeatures
from lt4rec_sparse.masks import overlap, ownership
from lt4rec_sparse.nn import MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.ranking import SparseSharing
from lt4rec_sparse.serving import Ranker, load, save
from lt4rec_sparse.stopwatch import interleaved

REQUESTS = (1, 32, 256, 1024)


def freeze_and_compare(seed_run: SeedRun, arm: str, path: Path) -> dict[str, Any]:
    """Freeze an arm of sparse sharing to `path`, load it back, and hold it against the model that was trained.

    Returns:
        Overlap and ownership of the masks per layer, bytes, the largest difference of scores over the test split,
        and request latencies against dense torch, timed in one interleaved run.
    """
    model = seed_run.trained_sparse_sharing(arm)
    frozen = freeze(model.mlp, sigmoid=True)
    assert isinstance(frozen, SparseMLP)
    save(Ranker(seed_run.prepared.encoder, copy.deepcopy(model.inputs), frozen), path)
    ranker = load(path)
    masks = {task: model.mlp.mask(task) for task in model.tasks}
    first, *others = masks
    return {
        "overlap": {f"{first} & {other}": overlap(masks[first], masks[other]) for other in others},
        "ownership": ownership(masks),
        "largest_difference": _largest_difference(seed_run, model, ranker),
        "bytes": _bytes(model, ranker, path),
        "latency": _latency(seed_run, model, ranker),
        "engine": ops.cpu_engine(),
        "threads": torch.get_num_threads(),
    }


@torch.inference_mode()
def _largest_difference(seed_run: SeedRun, model: SparseSharing, ranker: Ranker) -> dict[str, float]:
    largest = dict.fromkeys(model.tasks, 0.0)
    for batch in seed_run.prepared.stream("test", 1024, seed=0, shuffle=False).epoch(0):
        served, trained = ranker.score_encoded(batch.features), torch.sigmoid(model(batch.features))
        for i, task in enumerate(model.tasks):
            largest[task] = max(largest[task], (served[:, i] - trained[:, i]).abs().max().item())
    return largest


def _bytes(model: SparseSharing, ranker: Ranker, path: Path) -> dict[str, int]:
    embedding = model.inputs.embedding.numel() * 4
    mlp = sum(p.numel() * 4 for name, p in model.mlp.named_parameters() if name.startswith("layers."))
    head = sum(p.numel() * 4 for p in model.mlp.heads.parameters())
    tasks = len(model.tasks)
    return {
        "dense, one model a task: embeddings": tasks * embedding,
        "dense, one model a task: MLPs": tasks * mlp + head,
        "embeddings": embedding,
        "sparse sharing: MLP, canonical": ranker.mlp.nbytes,
        "sparse sharing: MLP, prepacked in memory": ranker.mlp.prepacked_nbytes,
        "artefact on disk": path.stat().st_size,
    }


def _latency(seed_run: SeedRun, model: SparseSharing, ranker: Ranker) -> list[dict[str, Any]]:
    """Time requests through the loaded artefact and through dense torch with the masks multiplied in beforehand."""
    batch = next(seed_run.prepared.stream("test", max(REQUESTS), seed=0, shuffle=False).epoch(0)).features
    dense = _premasked(model.mlp)
    records = []
    for size in REQUESTS:
        features = batch.take(torch.arange(size) % batch.batch)
        x = ranker.inputs(features).detach()
        timings = interleaved(
            {
                "sparse": partial(ranker.score_encoded, features),
                "dense": partial(_score_dense, model, dense, features),
                "sparse, MLP alone": partial(ranker.mlp, x),
                "dense, MLP alone": partial(dense, x),
            }
        )
        records += [{"candidates": size, "path": name, **timing._asdict()} for name, timing in timings.items()]
    return records


def _premasked(mlp: MaskedMLP) -> Callable[[Tensor], Tensor]:
    """Dense torch at its best: masks multiplied in once, no masking per call, no autograd."""
    paths = []
    for task in mlp.tasks:
        mask = mlp.mask(task)
        weights = (w.detach() * mask[name] for name, w in mlp.masked_weights().items())
        layers = [(w, layer.bias.detach()) for w, layer in zip(weights, mlp.masked_layers(), strict=True)]
        paths.append((layers, mlp.heads[task]))

    @torch.inference_mode()
    def score(x: Tensor) -> Tensor:
        scores = []
        for layers, head in paths:
            h = x
            for weight, bias in layers:
                h = torch.relu_(F.linear(h, weight, bias))
            scores.append(torch.sigmoid_(head(h)))
        return torch.cat(scores, dim=1)

    return score


@torch.inference_mode()
def _score_dense(model: SparseSharing, dense: Callable[[Tensor], Tensor], features: EncodedFeatures) -> Tensor:
    return dense(model.inputs(features))
