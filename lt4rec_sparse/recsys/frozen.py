"""What freezing gave: is the served model the trained one, how large is it, how fast does it answer a request."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lt4rec_sparse import ops
from lt4rec_sparse.masks import overlap, ownership
from lt4rec_sparse.network import PRECISIONS
from lt4rec_sparse.nn import MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.nn.quantization import is_tolerable
from lt4rec_sparse.ranker import Ranker, load, save
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.recsys.harness.arms import MAIN_METRIC, SeedRun
from lt4rec_sparse.recsys.metrics import metrics_of
from lt4rec_sparse.recsys.models import SparseSharing
from lt4rec_sparse.stopwatch import interleaved

REQUESTS = (1, 32, 256, 1024)
CALIBRATION_ROWS = 16_384  # of the training days; 4,096 of another split gave codes as good


def freeze_and_compare(seed_run: SeedRun, arm: str, path: Path) -> dict[str, Any]:
    """Freeze an arm of sparse sharing to `path`, load it back, and hold it against the model that was trained.

    The artefact is calibrated on training rows, and its precisions are accepted on validation rows.

    Returns:
        Overlap and ownership of the masks per layer, bytes, the largest difference of scores over the test split,
        what each precision serves (`_precisions`), and request latencies against dense torch, timed in one interleaved
        run.
    """
    model = seed_run.trained_sparse_sharing(arm)
    frozen = freeze(model.mlp, sigmoid=True)
    assert isinstance(frozen, SparseMLP)
    frozen = frozen.calibrated(_calibration_inputs(seed_run, model))
    save(Ranker(seed_run.prepared.encoder, copy.deepcopy(model.inputs), frozen), path)
    rankers = {precision: load(path, precision) for precision in PRECISIONS}
    ranker = rankers["fp32"]
    masks = {task: model.mlp.mask(task) for task in model.tasks}
    first, *others = masks
    return {
        "overlap": {f"{first} & {other}": overlap(masks[first], masks[other]) for other in others},
        "ownership": ownership(masks),
        "largest_difference": _largest_difference(seed_run, model, ranker),
        "precisions": _precisions(seed_run, rankers),
        "bytes": _bytes(model, ranker, path),
        "latency": _latency(seed_run, model, rankers),
        "engine": ops.cpu_engine(),
        "threads": torch.get_num_threads(),
    }


@torch.inference_mode()
def _calibration_inputs(seed_run: SeedRun, model: SparseSharing) -> Tensor:
    stream = seed_run.prepared.stream("train", CALIBRATION_ROWS, seed=0, shuffle=True)
    inputs: Tensor = model.inputs(next(stream.epoch(0)).features)
    return inputs


@torch.inference_mode()
def _largest_difference(seed_run: SeedRun, model: SparseSharing, ranker: Ranker) -> dict[str, float]:
    largest = dict.fromkeys(model.tasks, 0.0)
    for batch in seed_run.prepared.stream("test", 1024, seed=0, shuffle=False).epoch(0):
        served, trained = ranker.score_encoded(batch.features), torch.sigmoid(model(batch.features))
        for i, task in enumerate(model.tasks):
            largest[task] = max(largest[task], (served[:, i] - trained[:, i]).abs().max().item())
    return largest


def _precisions(seed_run: SeedRun, rankers: Mapping[str, Ranker]) -> dict[str, dict[str, Any]]:
    """Judge each precision by the scores that it serves.

    Returns:
        Precision -> the tasks' main metrics on validation and test, the largest difference of a test score to fp32's,
        the bytes of its prepacked MLP, and whether it is accepted: on validation no metric is worse than fp32's by more
        than is tolerable.
    """
    judged: dict[str, dict[str, Any]] = {precision: {} for precision in rankers}
    for split in ("validation", "test"):
        metrics, largest = _served(seed_run, rankers, split)
        for precision in rankers:  # the difference that stays is the test split's
            judged[precision] |= {split: metrics[precision], "largest_difference": largest[precision]}
    fp32 = judged["fp32"]["validation"]
    for precision, ranker in rankers.items():
        validation = judged[precision]["validation"]
        tolerable = [
            is_tolerable(metric, value, fp32[task][metric])
            for task, metrics_of_task in validation.items()
            for metric, value in metrics_of_task.items()
        ]
        judged[precision] |= {"prepacked_bytes": sum(ranker.mlp.prepacked_nbytes.values()), "accepted": all(tolerable)}
    return judged


@torch.inference_mode()
def _served(
    seed_run: SeedRun, rankers: Mapping[str, Ranker], split: str
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, float]]]:
    """Return each precision's main metrics, and the largest differences of its scores to fp32's, over a split."""
    mains = {task: MAIN_METRIC[kind] for task, kind in seed_run.kinds.items()}
    metrics = {p: {task: metrics_of(kind)[mains[task]] for task, kind in seed_run.kinds.items()} for p in rankers}
    largest = {p: torch.zeros(len(mains)) for p in rankers}
    for batch in seed_run.prepared.stream(split, 4096, seed=0, shuffle=False).epoch(0):
        x = rankers["fp32"].inputs(batch.features)
        scores = {p: ranker.mlp(x) for p, ranker in rankers.items()}
        for p in rankers:
            largest[p] = largest[p].maximum((scores[p] - scores["fp32"]).abs().amax(0))
            # Metrics read logits. A float32 below 1 is 2^-24 away from it, or more.
            logits = torch.logit(scores[p].double(), eps=2.0**-25)
            for i, task in enumerate(mains):
                rows = batch.rows[task]
                labels, groups = batch.labels[task][rows].double(), batch.groups[rows]
                metrics[p][task].update(logits[rows, i].numpy(), labels.numpy(), groups.numpy())
    return (
        {p: {task: {mains[task]: metric.compute()} for task, metric in metrics[p].items()} for p in rankers},
        {p: dict(zip(mains, largest[p].tolist(), strict=True)) for p in rankers},
    )


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
        "sparse sharing: MLP, prepacked in memory": sum(ranker.mlp.prepacked_nbytes.values()),
        "artefact on disk": path.stat().st_size,
    }


def _latency(seed_run: SeedRun, model: SparseSharing, rankers: Mapping[str, Ranker]) -> list[dict[str, Any]]:
    """Time requests through the loaded artefact and through dense torch with the masks multiplied in beforehand."""
    batch = next(seed_run.prepared.stream("test", max(REQUESTS), seed=0, shuffle=False).epoch(0)).features
    dense = premasked(model.mlp)
    ranker, others = rankers["fp32"], {name: ranker for name, ranker in rankers.items() if name != "fp32"}
    records = []
    for size in REQUESTS:
        features = batch.take(torch.arange(size) % batch.batch)
        x = ranker.inputs(features).detach()
        timings = interleaved(
            {
                "sparse": partial(ranker.score_encoded, features),
                "dense": partial(_score_dense, model, dense, features),
                "sparse, MLP alone": partial(score_mlp, ranker.mlp, x),
                "dense, MLP alone": partial(dense, x),
                **{f"sparse {name}, MLP alone": partial(score_mlp, other.mlp, x) for name, other in others.items()},
            }
        )
        records += [{"candidates": size, "path": name, **timing._asdict()} for name, timing in timings.items()]
    return records


def score_mlp(mlp: SparseMLP, x: Tensor) -> Tensor:
    """Score as a `Ranker` does."""
    scores = x.new_empty(len(x), mlp.out_features)
    mlp.score_into(x, scores)
    return scores


def premasked(mlp: MaskedMLP) -> Callable[[Tensor], Tensor]:
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
