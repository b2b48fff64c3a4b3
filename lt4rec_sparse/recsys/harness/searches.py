"""The source of masks: the tickets of a search, task by task; each is found once and then read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lt4rec_sparse.files import read_json, write_whole
from lt4rec_sparse.lottery import DropAndGrow, GradualPruning, Ticket, prune_by_magnitude, search_tickets, wanted_nnz
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.nn import MaskedMLP
from lt4rec_sparse.recsys.data import Batch
from lt4rec_sparse.recsys.harness import objectives
from lt4rec_sparse.recsys.harness.starts import Starts, warm_name
from lt4rec_sparse.recsys.harness.trackers import flat
from lt4rec_sparse.recsys.harness.trials import SCORED, SEARCHED, Masks, Search
from lt4rec_sparse.recsys.stored import load_weights, read_seconds

EXCHANGE_EVERY = 10  # batches between two exchanges of RigL: an epoch has some 150 here, thousands in the paper


class Searches(Starts):
    """Finds tickets from the starts of a log, and leaves them in `searches/` of its folder."""

    def tickets(self, search: Search, task: str, tasks: tuple[str, ...], seed: int) -> list[Ticket]:
        """Return a task's tickets, from the full mask on; a search in one training gives a single, pruned one.

        `tasks` are those that the warm-up trains, if there is one.
        """
        folder = self._folder(search, task, tasks, seed)
        return (self._rounds if search.method == "rounds" else self._cheap)(search, task, tasks, seed, folder)

    def seconds(self, masks: Masks, tasks: tuple[str, ...], seed: int) -> float:
        """Return the seconds of every training that these masks need, baselines and warm-up included.

        A last ticket needs no training of its own; a best ticket does, since its metrics must be known.
        """
        search = masks.search
        total = self.warm(search.training, tasks, seed)[1] if search.training.warm_up else 0.0
        if masks.kind in SCORED:
            records = [self.single(search.training.of(task), task, seed) for task in tasks]
            return total + sum(float(record["seconds"]) for record in records)
        if masks.kind not in SEARCHED:
            return total
        for task in tasks[:1] if masks.kind == "one_for_all" else tasks:
            folder = self._folder(search, task, tasks, seed)
            levels = 2 if search.method != "rounds" else search.rounds + (masks.level == "best")
            files = [folder / f"level_{level}.seconds" for level in range(levels)]
            files.append(folder / "rewind.seconds")
            total += sum(read_seconds(file) for file in files if file.exists())
        return total

    def scores(self, search: Search, task: str, seed: int) -> dict[str, Tensor]:
        """Return the magnitudes of a trained single-task baseline: layer -> `[out_features, in_features]`."""
        self.single(search.training.of(task), task, seed)
        model = self.sparse_sharing(search.training, (task,), seed)
        load_weights(model, self.single_file(search.training.of(task), task, seed))
        return {name: weight.detach().abs() for name, weight in model.mlp.masked_weights().items()}

    def _rounds(self, search: Search, task: str, tasks: tuple[str, ...], seed: int, folder: Path) -> list[Ticket]:
        training = search.training.of(task)
        model = self.sparse_sharing(search.training, (task,), seed, warm=tasks)
        objective = objectives.plain(training, (task,), self.kinds)
        start, skip = None, round(search.rewind * self.batches(training))
        if skip:
            rewound = self.sparse_sharing(search.training, (task,), seed, warm=tasks)
            self.once(folder / "rewind.safetensors", rewound, objective, training, seed, batches=skip)
            start = rewound.state_dict()

        def train_and_judge(level: int) -> Mapping[str, float]:
            if level == 0 and not training.warm_up:
                # Late rewinding changes nothing here: the state to rewind to comes from this very training.
                record = self.single(training, task, seed)
                load_weights(model, self.single_file(training, task, seed))
                seconds, judged = record["seconds"], record["validation"]
            else:
                seconds = self.train(folder / f"level_{level}", model, objective, training, seed, skip=skip)
                judged = self.judge(folder / f"level_{level}", model, "validation", (task,))
                self.tracking.finish(self._stage(folder / f"level_{level}"), flat("final/validation", judged))
            write_whole(folder / f"level_{level}.seconds", json.dumps(seconds))
            metrics: dict[str, float] = judged["all"][task]
            return metrics

        return search_tickets(
            task,
            model,
            model.mlp,
            train_and_judge,
            search.rounds,
            search.density_of(task),
            folder,
            search.granularity,
            search.scope,
            start=start,
        )

    def _cheap(self, search: Search, task: str, tasks: tuple[str, ...], seed: int, folder: Path) -> list[Ticket]:
        """Find one pruned ticket in one training; for "one_shot" that training is the baseline's."""
        saved, judged = folder / "level_1.mask.safetensors", folder / "level_1.json"
        if not judged.exists():
            training, path = search.training.of(task), folder / "level_1"
            model = self.sparse_sharing(search.training, (task,), seed, warm=tasks)
            mlp: MaskedMLP = model.mlp
            metrics: Mapping[str, float] = {}  # one-shot pruning trains nothing through its mask
            if search.method == "one_shot":
                nnz = wanted_nnz(mlp.mask(), search.density_of(task), search.scope)
                mask = prune_by_magnitude(self.scores(search, task, seed), mlp.mask(), nnz, search.granularity)
                seconds = self.single(training, task, seed)["seconds"]
            else:
                objective, optimizer = (
                    objectives.plain(training, (task,), self.kinds),
                    self.optimizer(model, training),
                )
                moving: GradualPruning | DropAndGrow[Batch]
                if search.method == "gradual":
                    moving = GradualPruning(mlp, optimizer, search.density_of(task), search.granularity, search.scope)
                else:
                    # A generator per task: one seed for all would give every task the same random mask.
                    generator = torch.Generator().manual_seed(seed * len(self.kinds) + list(self.kinds).index(task))
                    loss = objectives.loss_on(objective, model, task)
                    moving = DropAndGrow(mlp, optimizer, loss, search.density_of(task), generator, every=EXCHANGE_EVERY)
                after_batch = moving.after_batch
                seconds = self.train(path, model, objective, training, seed, optimizer, after_batch=after_batch)
                found = self.judge(path, model, "validation", (task,))
                self.tracking.finish(self._stage(path), flat("final/validation", found))
                metrics = found["all"][task]
                mask = mlp.mask()
            write_whole(folder / "level_1.seconds", json.dumps(seconds))
            mask.save(saved)
            record = {"task": task, "level": 1, "density": mask.density, "metrics": dict(metrics)}
            write_whole(judged, json.dumps(record, indent=1))
        return [Ticket(task, 1, Mask.load(saved), read_json(judged, "metrics")["metrics"])]

    def _folder(self, search: Search, task: str, tasks: tuple[str, ...], seed: int) -> Path:
        warm = f"-after-{warm_name(search.training, tasks)}" if search.training.warm_up else ""
        folder = self.made("searches", f"{search.folder(task)}{warm}", f"seed_{seed}", task)
        folder.mkdir(exist_ok=True)
        return folder
