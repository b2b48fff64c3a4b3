"""Checks of a frozen model: whether it serves what was trained, its size, and the time it needs for a request."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt4rec_sparse import ops
from lt4rec_sparse.masks import overlap
from lt4rec_sparse.network import PRECISIONS
from lt4rec_sparse.nn import MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.nn.quantization import is_tolerable
from lt4rec_sparse.ranker import Ranker, load, save
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.recsys.data import Prepared
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.trials import Trial
from lt4rec_sparse.recsys.metrics import MAIN_METRIC, metrics_of
from lt4rec_sparse.recsys.models import SparseSharing
from lt4rec_sparse.stopwatch import interleaved

REQUESTS = (1, 32, 256, 1024)
ROUNDS, ROUND_US = 9, 10_000.0  # of the stopwatch: some 2 s per model
CALIBRATION_ROWS = 16_384  # of the training days; 4,096 of another split gave equally good quantisation parameters

Product = Callable[[Tensor], Tensor]


def freeze_trial(lab: Laboratory, trial: Trial, path: Path, embeddings: str = "fp32") -> SparseSharing:
    """Freeze a trained trial of sparse sharing to `path`, calibrated for int8 on training rows; return its model.

    `embeddings` is how the artefact holds them (`ranker.save`), whatever the precision.
    """
    model = cast(SparseSharing, lab.model(trial))
    frozen = calibrated(model, lab.prepared)
    save(Ranker(lab.prepared.encoder, copy.deepcopy(model.inputs), frozen), path, embeddings)
    return model


def freeze_and_compare(lab: Laboratory, trial: Trial, path: Path, embeddings: str = "fp32") -> dict[str, Any]:
    """Freeze a trial with `freeze_trial`, load the artefact back, and compare it with the trained model.

    Its precisions are accepted by their metrics on validation rows.

    Returns:
        Overlap of the masks per layer, bytes, the largest difference of scores over the test split, what each precision
        serves (`_precisions`), and request latencies against dense torch, timed in one interleaved run.
    """
    model = freeze_trial(lab, trial, path, embeddings)
    rankers = {precision: load(path, precision) for precision in PRECISIONS}
    trained = Ranker(lab.prepared.encoder, copy.deepcopy(model.inputs), rankers["fp32"].mlp)
    masks = {task: model.mlp.mask(task) for task in model.tasks}
    first, *others = masks
    return {
        "overlap": {f"{first} & {other}": overlap(masks[first], masks[other]) for other in others},
        "largest_difference": _largest_difference(lab, model, rankers["fp32"]),
        "precisions": _precisions(lab, {task: lab.kinds[task] for task in model.tasks}, rankers, trained),
        "bytes": _bytes(model, rankers["fp32"], path),
        "latency": _latency(lab, model, rankers),
        "engine": ops.cpu_engine(),
        "threads": torch.get_num_threads(),
    }


@torch.inference_mode()
def calibrated(model: SparseSharing, prepared: Prepared) -> SparseMLP:
    """Freeze a trained model's MLP and calibrate it for int8 on rows of the training days."""
    frozen = freeze(model.mlp, sigmoid=True)
    assert isinstance(frozen, SparseMLP)
    rows = prepared.stream("train", CALIBRATION_ROWS, seed=0, shuffle=True).epoch(0)
    return frozen.calibrated(model.inputs(next(rows).features))


@torch.inference_mode()
def _largest_difference(lab: Laboratory, model: SparseSharing, ranker: Ranker) -> dict[str, float]:
    largest = torch.zeros(len(model.tasks))
    for batch in lab.prepared.stream("test", 1024, seed=0, shuffle=False).epoch(0):
        served, trained = ranker.score_encoded(batch.features), torch.sigmoid(model(batch.features))
        largest = largest.maximum((served - trained).abs().amax(0))
    return dict(zip(model.tasks, largest.tolist(), strict=True))


def _precisions(
    lab: Laboratory, kinds: Mapping[str, str], rankers: Mapping[str, Ranker], trained: Ranker
) -> dict[str, dict[str, Any]]:
    """Judge each precision by the scores that it serves; `trained` has the embeddings as trained, and fp32.

    Returns:
        Precision -> the tasks' main metrics on validation and test, the largest difference of a test score from fp32's,
        the bytes of its prepacked MLP, and whether it is accepted: on validation no metric is worse than that of
        `trained` by more than `is_tolerable` allows.
    """
    validation, _ = _served(lab, kinds, rankers, "validation")
    is_rounded = rankers["fp32"].inputs.kind != "fp32"
    wanted = (_served(lab, kinds, {"fp32": trained}, "validation")[0] if is_rounded else validation)["fp32"]
    test, largest = _served(lab, kinds, rankers, "test")
    return {
        precision: {
            "validation": validation[precision],
            "test": test[precision],
            "largest_difference": largest[precision],
            "prepacked_bytes": ranker.prepacked_nbytes,
            "accepted": all(
                is_tolerable(metric, value, wanted[task][metric])
                for task, metrics in validation[precision].items()
                for metric, value in metrics.items()
            ),
        }
        for precision, ranker in rankers.items()
    }


@torch.inference_mode()
def _served(
    lab: Laboratory, kinds: Mapping[str, str], rankers: Mapping[str, Ranker], split: str
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, float]]]:
    """Return each precision's main metrics, and the largest differences of its scores from fp32's, over a split."""
    metrics = {p: {task: metrics_of(kind)[MAIN_METRIC[kind]] for task, kind in kinds.items()} for p in rankers}
    largest = {p: torch.zeros(len(kinds)) for p in rankers}
    for batch in lab.prepared.stream(split, 4096, seed=0, shuffle=False).epoch(0):
        scores = {p: ranker.score_encoded(batch.features) for p, ranker in rankers.items()}
        for p in rankers:
            largest[p] = largest[p].maximum((scores[p] - scores["fp32"]).abs().amax(0))
            # Metrics read logits. A float32 below 1 is at least 2^-24 away from it.
            logits = torch.logit(scores[p].double(), eps=2.0**-25)
            for i, (task, metric) in enumerate(metrics[p].items()):
                rows = batch.rows[task]
                groups = None if batch.groups is None else batch.groups[rows].numpy()
                metric.update(logits[rows, i].numpy(), batch.labels[task][rows].double().numpy(), groups)
    return (
        {p: {task: {MAIN_METRIC[kinds[task]]: m.compute()} for task, m in metrics[p].items()} for p in rankers},
        {p: dict(zip(kinds, largest[p].tolist(), strict=True)) for p in rankers},
    )


def _bytes(model: SparseSharing, ranker: Ranker, path: Path) -> dict[str, int]:
    embedding = model.inputs.embedding.numel() * 4
    mlp = sum(p.numel() * 4 for name, p in model.mlp.named_parameters() if name.startswith("layers."))
    head = sum(p.numel() * 4 for p in model.mlp.heads.parameters())
    tasks = len(model.tasks)
    return {
        "dense, one model per task: embeddings": tasks * embedding,
        "dense, one model per task: MLPs": tasks * mlp + head,
        "embeddings": ranker.inputs.nbytes,
        "sparse sharing: MLP, canonical": ranker.mlp.nbytes,
        "sparse sharing: MLP, prepacked in memory": ranker.prepacked_nbytes,
        "artefact on disk": path.stat().st_size,
    }


def _latency(lab: Laboratory, model: SparseSharing, rankers: Mapping[str, Ranker]) -> list[dict[str, Any]]:
    """Time requests through the loaded artefact and through dense torch with the masks multiplied in beforehand."""
    batch = next(lab.prepared.stream("test", max(REQUESTS), seed=0, shuffle=False).epoch(0)).features
    dense = dense_pass(model.mlp)

    @torch.inference_mode()
    def score_dense(features: EncodedFeatures) -> Tensor:
        return dense(model.inputs(features))

    ranker, others = rankers["fp32"], {name: ranker for name, ranker in rankers.items() if name != "fp32"}
    records = []
    for size in REQUESTS:
        features = batch.take(torch.arange(size) % batch.batch)
        x = ranker.inputs(features).detach()
        timings = interleaved(
            {
                "sparse": partial(ranker.score_encoded, features),
                "dense": partial(score_dense, features),
                "sparse, MLP alone": partial(score_mlp, ranker.mlp, x),
                "dense, MLP alone": partial(dense, x),
                **{f"sparse {name}, MLP alone": partial(score_mlp, other.mlp, x) for name, other in others.items()},
            },
            rounds=ROUNDS,
            round_us=ROUND_US,
        )
        records += [{"candidates": size, "path": name, **timing._asdict()} for name, timing in timings.items()]
    return records


def score_mlp(mlp: SparseMLP, x: Tensor) -> Tensor:
    """Score the way a `Ranker` does."""
    scores = x.new_empty(len(x), mlp.out_features)
    mlp.score_into(x, scores)
    return scores


def dense_pass(mlp: MaskedMLP, make: Callable[[Tensor, Tensor, str], Product] | None = None) -> Product:
    """Return dense torch at its best, `x [batch, in_features]` to probabilities `[batch, tasks]`.

    Masks are multiplied in once; there is no masking per call and no autograd. `make` makes a layer's function from a
    weight, a bias and the name of an activation; None for `F.linear`.
    """
    make, paths = make or _linear, []
    for task in mlp.tasks:
        mask, head = mlp.mask(task), cast(nn.Linear, mlp.heads[task])
        layers = zip(mlp.masked_weights().items(), mlp.masked_layers(), strict=True)
        path = [make(w.detach() * mask[name], layer.bias.detach(), "relu") for (name, w), layer in layers]
        paths.append([*path, make(head.weight.detach(), head.bias.detach(), "sigmoid")])

    @torch.inference_mode()
    def score(x: Tensor) -> Tensor:
        scores = []
        for path in paths:
            h = x
            for layer in path:
                h = layer(h)
            scores.append(h)
        return torch.cat(scores, dim=1)

    return score


def _linear(weight: Tensor, bias: Tensor, activation: str) -> Product:
    activate = {"relu": torch.relu_, "sigmoid": torch.sigmoid_}[activation]
    return lambda h: activate(F.linear(h, weight, bias))
