"""Carries out trials: each leaves its trained weights and its record on disk, from which they are read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lt4rec_sparse.files import read_json, write_whole
from lt4rec_sparse.lottery import (
    Ticket,
    best_ticket,
    one_for_all,
    random_like,
    random_masks,
    random_separate,
    scale_to_density,
    separate,
    unanimous,
)
from lt4rec_sparse.masks import Mask, overlap, ownership
from lt4rec_sparse.nn import MaskedMLP
from lt4rec_sparse.recsys.harness import objectives
from lt4rec_sparse.recsys.harness.searches import Searches
from lt4rec_sparse.recsys.harness.starts import JUDGED_ROWS, warm_name
from lt4rec_sparse.recsys.harness.trackers import flat
from lt4rec_sparse.recsys.harness.trials import SEARCHED, Trial, digest
from lt4rec_sparse.recsys.metrics import HIGHER_IS_BETTER, MAIN_METRIC
from lt4rec_sparse.recsys.models import SparseSharing, UncertaintyWeights, mlp_multiply_adds
from lt4rec_sparse.recsys.stored import load_weights
from lt4rec_sparse.recsys.training import Predictions, predict

FRESH = 1_000_003  # added to a seed for a start that no search has seen


class Laboratory(Searches):
    """Trains what trials declare over one prepared log, and leaves the results in `trials/` of a folder."""

    def run(self, trial: Trial) -> dict[str, Any]:
        """Return a trial's record; train and judge it first if that is not done."""
        path = self.made("trials", f"{trial.key}.json")
        if not path.exists():
            write_whole(path, json.dumps(self._run(trial), indent=1, allow_nan=True))
        return read_json(path, "validation")

    def model(self, trial: Trial) -> nn.Module:
        """Return the trained model of a trial that was run, for judging."""
        model = self._new(trial)
        load_weights(model, self._state_file(trial, model))
        return model.eval()

    def predictions(self, trial: Trial, split: str) -> Predictions:
        """Score every row of a split with a trial that was run."""
        return predict(self.model(trial), self.stream(split, JUDGED_ROWS, None), trial.tasks)

    def masks(self, trial: Trial) -> dict[str, Mask] | None:
        """Return the mask of each task that a trial trains through; None if all are full."""
        asked, tasks = trial.masks, trial.tasks
        if asked is None:
            return None
        search, shared = asked.search, asked.shared
        full = cast(MaskedMLP, self.sparse_sharing(trial.training, tasks, trial.seed).mlp).mask(tasks[0])
        generator = torch.Generator().manual_seed(trial.seed)
        tickets = {
            task: (self._best(task, of_task) if asked.level == "best" else of_task[-1]).mask
            for task, of_task in self.found(trial).items()
        }
        densities = {task: search.density_of(task) for task in tasks}
        # Of masks that have one density for all tasks.
        nnz = {name: round(kept.numel() * densities[tasks[0]]) for name, kept in full.items()}
        match asked.kind:
            case "tickets":
                return tickets
            case "random_like":
                return random_like(tickets, generator, search.granularity)
            case "one_for_all":
                return one_for_all(tickets, tasks[0])
            case "random" | "one_random":
                masks = random_masks(full.shapes, densities, tasks, generator, search.granularity)
                return masks if asked.kind == "random" else one_for_all(masks, tasks[0])
            case "random_separate":
                assert shared is not None
                return random_separate(full.shapes, nnz, shared, generator, tasks)
        scores = {task: self.scores(search, task, trial.seed) for task in tasks}
        return unanimous(scores, nnz) if shared is None else separate(scores, nnz, shared)

    def found(self, trial: Trial) -> dict[str, list[Ticket]]:
        """Return the tickets that a trial's masks are made from, task by task."""
        masks = trial.masks
        if masks is None or masks.kind not in SEARCHED:
            return {}
        return {task: self.tickets(masks.search, task, trial.tasks, trial.seed) for task in trial.tasks}

    def _run(self, trial: Trial) -> dict[str, Any]:
        model = self._new(trial)
        state = self._state_file(trial, model)
        seconds = self._train(trial, model, state)
        found = self.found(trial)
        name = self.made("trials", trial.key)
        facts = None
        if trial.masks is not None:
            masks = _masks_of(model, trial)
            first, *others = masks.values()
            facts = {
                "density": {task: mask.density for task, mask in masks.items()},
                "layer_density": {task: mask.layer_density() for task, mask in masks.items()},
                "overlap": overlap(first, others[0]) if others else None,
                "ownership": ownership(masks),
            }
        tickets = {
            task: [
                {
                    "level": ticket.level,
                    "density": ticket.mask.density,
                    "layer_density": ticket.mask.layer_density(),
                    "validation": dict(ticket.metrics),
                }
                for ticket in of_task
            ]
            for task, of_task in found.items()
        }
        record: dict[str, Any] = {
            "key": trial.key,
            "seed": trial.seed,
            "trial": asdict(trial),
            "state": str(state.relative_to(self.folder)),
            "validation": self.judge(name, model, "validation", trial.tasks, trial.top_k),
            "seconds": {
                "train": seconds,
                "search": self.seconds(trial.masks, trial.tasks, trial.seed) if trial.masks else 0.0,
            },
            "parameters": sum(p.numel() for p in model.parameters()),
            "multiply_adds": mlp_multiply_adds(model),
            "masks": facts,
            "tickets": tickets or None,
            "best_level": {task: self._best(task, of_task).level for task, of_task in found.items()} or None,
        }
        if trial.is_tested:
            record["test"] = self.judge(name, model, "test", trial.tasks, trial.top_k)
        judged = {split: record[split] for split in ("validation", "test") if split in record}
        results = {key: value for split in judged for key, value in flat(f"final/{split}", judged[split]).items()}
        self.tracking.finish(self._stage(state), results)
        return record

    def _train(self, trial: Trial, model: nn.Module, state: Path) -> float:
        """Train a trial's model, or load what a trial with equal masks has trained; return the seconds it took."""
        if self._is_single(trial):
            seconds: float = self.single(trial.training, trial.tasks[0], trial.seed)["seconds"]
            load_weights(model, state)
            return seconds
        kinds = {task: self.kinds[task] for task in trial.tasks}
        balance = UncertaintyWeights(trial.tasks, kinds) if trial.objective == "uncertainty" else None
        objective = objectives.of_trial(trial, kinds, balance)
        # Without weights of its own beside the model `train` makes the optimiser.
        optimizer = None if balance is None else self.optimizer(nn.ModuleList([model, balance]), trial.training)
        has_state = trial.objective in ("uncertainty", "pcgrad")
        how: dict[str, Any] = {"optimizer": optimizer, "has_state": has_state, "described": {"trial": asdict(trial)}}
        return self.once(state, model, objective, trial.training, trial.seed, **how)

    def _new(self, trial: Trial) -> nn.Module:
        """Return the model of a trial as it starts: initial weights behind its masks."""
        if trial.model != "sparse_sharing":
            return self.network(trial.model, trial.training, trial.tasks, trial.seed, dict(trial.options))
        seed = trial.seed + (FRESH if trial.masks and trial.masks.fresh_start else 0)
        # The warm-up of the search, so that tickets train from the weights that they were found with.
        training = trial.masks.search.training if trial.masks else trial.training
        model: SparseSharing = self.sparse_sharing(training, trial.tasks, seed, warm=trial.tasks)
        mlp = model.mlp
        masks = self.masks(trial)
        if masks is not None:
            for task, mask in masks.items():
                mlp.set_mask(mask, task)
            if trial.masks and trial.masks.rescale:
                scale_to_density(mlp)
        return model

    def _best(self, task: str, tickets: Sequence[Ticket]) -> Ticket:
        """Return a task's best ticket on the validation days, or its only one."""
        if len(tickets) == 1:
            return tickets[0]
        metric = MAIN_METRIC[self.kinds[task]]
        return best_ticket(tickets, metric, HIGHER_IS_BETTER[metric])

    def _is_single(self, trial: Trial) -> bool:
        how: dict[str, Any] = {"is_tested": trial.is_tested, "top_k": trial.top_k}
        plain = Trial("sparse_sharing", trial.tasks, trial.seed, trial.training, **how)
        return len(trial.tasks) == 1 and trial == plain and not trial.training.warm_up

    def _state_file(self, trial: Trial, model: nn.Module) -> Path:
        """Return the path of the trained weights; trials whose masks are equal share one training."""
        if self._is_single(trial):
            return self.single_file(trial.training, trial.tasks[0], trial.seed)
        settings: dict[str, Any] = asdict(replace(trial, masks=None, is_tested=True, top_k=0))
        if trial.masks is not None:
            before = trial.masks.search.training
            warm = warm_name(before, trial.tasks) if before.warm_up else None
            kept = [plane.numpy().tobytes() for mask in _masks_of(model, trial).values() for plane in mask.values()]
            planes = hashlib.blake2b(b"".join(kept), digest_size=12).hexdigest()
            settings |= {"start": [trial.masks.fresh_start, trial.masks.rescale, warm], "masks": planes}
        return self.made("trials", f"{trial.model}-trained-{digest(settings)}-seed_{trial.seed}.safetensors")


def _masks_of(model: nn.Module, trial: Trial) -> dict[str, Mask]:
    return {task: cast(MaskedMLP, model.mlp).mask(task) for task in trial.tasks}
