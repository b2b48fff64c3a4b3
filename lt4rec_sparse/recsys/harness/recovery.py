"""Whether masks found a planted truth: what they keep of the fields that each task of a simulated log depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lt4rec_sparse.ranker.features import Field
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.trials import Trial

# What is planted for each task, by the simulator's names of kinds.
PLANTED = {"ctr": ("shared", "click"), "cvr": ("shared", "watch")}


def recovery(lab: Laboratory, trial: Trial, truth: Mapping[str, str]) -> dict[str, Any]:
    """Compare the first-layer masks of a trial of the tasks `PLANTED` with what was planted.

    `truth` is "fields" of the simulator's `truth.json`: column -> its kind.

    Returns:
        `density`: task -> kind of column (`column_kinds`) -> kept share of its weights; `planted` and `other`: task ->
        kept share of the weights on columns that the task depends on, and on all others; `auc`: see `column_auc`;
        `sharing`: the share of co-owned weights on columns that matter to both tasks, to one, to none.
    """
    kinds = column_kinds(lab.prepared.encoder.fields, truth, trial.training.embedding_dim)
    masks = lab.masks(trial)
    assert masks is not None
    layer = {task: next(iter(masks[task].values())) for task in PLANTED}  # the first one
    relevant = {task: torch.tensor([kind in planted for kind in kinds]) for task, planted in PLANTED.items()}
    of_kind = {kind: torch.tensor([k == kind for k in kinds]) for kind in ("shared", "click", "watch", "noise")}
    (a, b), (of_a, of_b) = layer.values(), relevant.values()
    return {
        "density": {
            task: {kind: kept[:, columns].float().mean().item() for kind, columns in of_kind.items()}
            for task, kept in layer.items()
        },
        "planted": {task: kept[:, relevant[task]].double().mean().item() for task, kept in layer.items()},
        "other": {task: kept[:, ~relevant[task]].double().mean().item() for task, kept in layer.items()},
        "auc": {task: column_auc(kept, relevant[task]) for task, kept in layer.items()},
        "sharing": {
            "shared": co_owned(a, b, of_a & of_b),
            "private": co_owned(a, b, of_a ^ of_b),
            "neither": co_owned(a, b, ~(of_a | of_b)),
        },
    }


def column_auc(kept: Tensor, relevant: Tensor) -> float:
    """Return how often a relevant column keeps more weights than an irrelevant one, over all pairs, a tie as half.

    1 is perfect; a random mask's expectation is 0.5, with a variance of at most `(n + m + 1) / (12 n m)` for `n`
    relevant and `m` irrelevant columns (Mann and Whitney, Annals of Mathematical Statistics 18, 1947). `kept` is
    `[out_features, in_features]`, `relevant` `[in_features]`, bool, some and not all of it True.

    >>> column_auc(torch.tensor([[True, False, True], [True, False, False]]), torch.tensor([True, False, False]))
    1.0
    """
    counts = kept.sum(0)
    of_relevant, of_others = counts[relevant], counts[~relevant].sort().values
    below = torch.searchsorted(of_others, of_relevant)
    not_above = torch.searchsorted(of_others, of_relevant, right=True)
    return int((below + not_above).sum()) / (2 * len(of_relevant) * len(of_others))


def co_owned(a: Tensor, b: Tensor, columns: Tensor) -> float | None:
    """Return `|a & b| / |a | b|` of two masks on some columns; None where neither keeps anything.

    Two random masks of density d share `d / (2 - d)` everywhere.
    """
    kept = int((a | b)[:, columns].sum())
    return int((a & b)[:, columns].sum()) / kept if kept else None


def column_kinds(fields: Sequence[tuple[str, str, bool]], truth: Mapping[str, str], dim: int) -> list[str]:
    """Return the kind of each column of a crossed input (`CrossedEmbeddings`): its field's, or its pair's.

    A pair has a kind if both its fields have it and one is a user's, the other a video's: the truth multiplies such
    pairs. Other pairs are noise.
    """
    ordered = sorted((Field(*field) for field in fields), key=lambda field: field.multi)
    kinds = [truth[field.column] for field in ordered]
    sides = [field.column.partition("_")[0] for field in ordered]
    columns = [kind for kind in kinds for _ in range(dim)]
    for i in range(len(kinds)):
        columns += [
            kinds[i] if kinds[i] == kinds[j] and sides[i] != sides[j] else "noise" for j in range(i + 1, len(kinds))
        ]
    return columns
