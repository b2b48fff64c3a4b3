"""Whether masks found a planted truth: what they keep of the fields that each task of a simulated log depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lt4rec_sparse.masks import Mask
from lt4rec_sparse.ranker.features import Field
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.structure import column_recovery, sharing_recovery
from lt4rec_sparse.recsys.harness.trials import Trial

# What is planted for each task, by the simulator's names of kinds.
PLANTED = {"ctr": ("shared", "click"), "cvr": ("shared", "watch")}


def recovery(lab: Laboratory, trial: Trial, truth: Mapping[str, str]) -> dict[str, Any]:
    """Compare a trial's first-layer masks with what was planted.

    Args:
        lab: The laboratory that trained it.
        trial: A trial with masks, of the tasks `PLANTED`.
        truth: Column -> its kind: "fields" of the simulator's `truth.json`.

    Returns:
        `density`: task -> kind of column (`column_kinds`) -> kept share of its weights; `planted` and `other`: task ->
        kept share of the weights on columns that the task depends on, and on all others; `auc`: task -> how well the
        weights that a column keeps tell whether the task depends on it, 0.5 by chance; `sharing`: the share of co-owned
        weights on columns that matter to both tasks, to one, to none.
    """
    kinds = column_kinds(lab.prepared.encoder.fields, truth, trial.training.embedding_dim)
    masks = lab.masks(trial)
    assert masks is not None
    layer = {task: _first_layer(masks[task]) for task in PLANTED}
    relevant = {task: torch.tensor([kind in planted for kind in kinds]) for task, planted in PLANTED.items()}
    density = {
        task: {
            kind: kept[:, torch.tensor([k == kind for k in kinds])].float().mean().item()
            for kind in ("shared", "click", "watch", "noise")
        }
        for task, kept in layer.items()
    }
    found = {task: column_recovery(layer[task], relevant[task]) for task in PLANTED}
    first, second = PLANTED
    return {
        "density": density,
        "planted": {task: of_task.relevant for task, of_task in found.items()},
        "other": {task: of_task.irrelevant for task, of_task in found.items()},
        "auc": {task: of_task.auc for task, of_task in found.items()},
        "sharing": asdict(sharing_recovery(layer[first], layer[second], relevant[first], relevant[second])),
    }


def column_kinds(fields: Sequence[tuple[str, str, bool]], truth: Mapping[str, str], dim: int) -> list[str]:
    """Return the kind of each column of a crossed input (`CrossedEmbeddings`): its field's, or its pair's.

    A pair has a kind if both its fields have it and one is a user's, the other a video's: the truth multiplies such
    pairs. Other pairs are noise.
    """
    named = [Field(*field) for field in fields]
    ordered = sorted(named, key=lambda field: field.multi)
    kinds = [truth[field.column] for field in ordered]
    sides = [field.column.partition("_")[0] for field in ordered]
    columns = [kind for kind in kinds for _ in range(dim)]
    for i in range(len(kinds)):
        columns += [
            kinds[i] if kinds[i] == kinds[j] and sides[i] != sides[j] else "noise" for j in range(i + 1, len(kinds))
        ]
    return columns


def _first_layer(mask: Mask) -> Tensor:
    return next(iter(mask.values()))
