"""Where trials are carried out: every stage leaves its result on disk, and is read back where it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lt4rec_sparse.data import BatchStream, Prepared
from lt4rec_sparse.experiments import objectives
from lt4rec_sparse.experiments.arms import HIGHER_IS_BETTER, MAIN_METRIC
from lt4rec_sparse.experiments.trials import Search, Training, Trial, digest
from lt4rec_sparse.files import whole_file, write_whole
from lt4rec_sparse.lottery import (
    DropAndGrow,
    GradualPruning,
    Ticket,
    best_ticket,
    one_for_all,
    prune_by_magnitude,
    random_like,
    random_separate,
    random_uniform,
    search_tickets,
    separate,
    unanimous,
    wanted_nnz,
)
from lt4rec_sparse.masks import Mask, overlap, ownership
from lt4rec_sparse.nn import MaskedMLP
from lt4rec_sparse.nn.optim import MaskedAdam
from lt4rec_sparse.ranking import SparseSharing, UncertaintyWeights, build, mlp_multiply_adds
from lt4rec_sparse.training import Batch, Objective, Predictions, evaluate, predict, train
from lt4rec_sparse.training.loop import AfterBatch

Log = Callable[[dict[str, Any]], None]

JUDGED_ROWS = 4096  # a batch while judging
FRESH = 1_000_003  # what is added to a seed for a start that no search has seen
EXCHANGE_EVERY = 10  # batches between two exchanges of RigL: an epoch here is some 150, where its own are thousands


class Laboratory:
    """Trains what trials declare over one prepared log, from starts that a seed decides.

    Whatever the seed, every network of sparse sharing starts from the same weights: the single-task baselines, every
    round of a search, and the network that all tasks share.

    Args:
        prepared: The data.
        folder: Where everything is left: `singles/`, `searches/`, `trials/`.
        log: Takes a record for each training loss.
    """

    def __init__(self, prepared: Prepared, folder: Path, log: Log = lambda record: None) -> None:
        self.prepared, self.folder, self._log = prepared, folder, log
        self.kinds = {task.name: task.kind for task in prepared.schema.tasks}
        self._streams: dict[tuple[str, int, int], BatchStream] = {}

    # -- single tasks ------------------------------------------------------------------------------------------------

    def single(self, training: Training, task: str, seed: int) -> dict[str, Any]:
        """Return the record of a single-task baseline: `key`, `validation`, `seconds`.

        It is level 0 of every search with the same training.
        """
        path = self._single_file(training, task, seed)
        if not path.with_suffix(".json").exists():
            model = self._sparse_sharing(training, (task,), seed)
            seconds = self._train(path, model, objectives.plain(training, (task,), self.kinds), training, seed)
            with whole_file(path) as temporary:
                save_file(model.state_dict(), temporary)
            record = {"validation": self._judge(model, "validation", (task,)), "seconds": seconds}
            write_whole(path.with_suffix(".json"), json.dumps(record, indent=1))
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return cast(dict[str, Any], record)

    def _single_file(self, training: Training, task: str, seed: int) -> Path:
        key = digest(asdict(training))
        return self._made("singles", f"{task}-{key}-seed_{seed}.safetensors")

    # -- tickets -----------------------------------------------------------------------------------------------------

    def tickets(self, search: Search, task: str, tasks: tuple[str, ...], seed: int) -> list[Ticket]:
        """Return a task's tickets by a search, from the full mask on; a search in one training gives one pruned one.

        Args:
            search: How.
            task: The task.
            tasks: Those that the warm-up trains, if there is one.
            seed: Of the start and the order of the rows.
        """
        folder = self._ticket_folder(search, task, tasks, seed)
        model = self._sparse_sharing(search.training, (task,), seed, warm=tasks)
        metric = MAIN_METRIC[self.kinds[task]]

        def train_and_judge(level: int) -> Mapping[str, float]:
            if level == 0 and not search.training.warm_up:
                record = self.single(search.training, task, seed)
                model.load_state_dict(load_file(self._single_file(search.training, task, seed)))
                seconds = record["seconds"]
                judged = record["validation"]
            else:
                objective = objectives.plain(search.training, (task,), self.kinds)
                seconds = self._train(folder / f"level_{level}", model, objective, search.training, seed)
                judged = self._judge(model, "validation", (task,))
            write_whole(folder / f"level_{level}.seconds", json.dumps(seconds))
            metrics: dict[str, float] = judged["all"][task]
            assert metric in metrics
            return metrics

        if search.method == "rounds":
            rewound = self._rewound(search, task, tasks, seed)
            return search_tickets(
                task,
                model,
                model.mlp,
                train_and_judge,
                search.rounds,
                search.density,
                folder,
                search.granularity,
                scope=search.scope,
                start=rewound,
            )
        return self._cheap(search, task, model, train_and_judge, folder, seed)

    def search_seconds(self, search: Search, tasks: tuple[str, ...], seed: int) -> float:
        """Return what the search of all tasks took, its level 0 included; of rounds only those that were asked for."""
        total = 0.0
        for task in tasks:
            folder = self._ticket_folder(search, task, tasks, seed)
            levels = search.rounds + 1 if search.method == "rounds" else 2
            files = [folder / f"level_{level}.seconds" for level in range(levels)]
            total += sum(float(json.loads(file.read_text(encoding="utf-8"))) for file in files if file.exists())
        return total

    def _cheap(
        self,
        search: Search,
        task: str,
        model: nn.Module,
        train_and_judge: Callable[[int], Mapping[str, float]],
        folder: Path,
        seed: int,
    ) -> list[Ticket]:
        """Find one pruned ticket in one training, which for "one_shot" is the baseline's."""
        mlp = cast(MaskedMLP, model.mlp)
        full = mlp.mask()
        saved, judged = folder / "level_1.mask.safetensors", folder / "level_1.json"
        if not judged.exists():
            folder.mkdir(parents=True, exist_ok=True)
            if search.method == "one_shot":
                metrics = train_and_judge(0)
                nnz = wanted_nnz(full, search.density, search.scope)
                mask = prune_by_magnitude(mlp.masked_weights(), full, nnz, search.granularity)
            else:
                metrics = self._train_moving(search, task, model, folder, seed)
                mask = mlp.mask()
            mask.save(saved)
            record = {"task": task, "level": 1, "density": mask.density, "metrics": dict(metrics)}
            write_whole(judged, json.dumps(record, indent=1))
        record = json.loads(judged.read_text(encoding="utf-8"))
        return [Ticket(task, 1, Mask.load(saved), record["metrics"])]

    def _train_moving(
        self, search: Search, task: str, model: nn.Module, folder: Path, seed: int
    ) -> Mapping[str, float]:
        """Train a model whose mask moves meanwhile; return its metrics."""
        mlp = cast(MaskedMLP, model.mlp)
        objective = objectives.plain(search.training, (task,), self.kinds)
        optimizer = MaskedAdam(model, search.training.learning_rate)
        moving: GradualPruning | DropAndGrow[Batch]
        if search.method == "gradual":
            moving = GradualPruning(mlp, optimizer, search.density, search.granularity, search.scope)
        else:
            generator = torch.Generator().manual_seed(seed)
            loss = objectives.loss_on(objective, model, task)
            moving = DropAndGrow(mlp, optimizer, loss, search.density, generator, every=EXCHANGE_EVERY)
        path = folder / "level_1"
        seconds = self._train(path, model, objective, search.training, seed, None, optimizer, moving.after_batch)
        write_whole(folder / "level_1.seconds", json.dumps(seconds))
        return self._judge(model, "validation", (task,))["all"][task]

    def _rewound(self, search: Search, task: str, tasks: tuple[str, ...], seed: int) -> dict[str, Tensor] | None:
        """Return the state after `search.rewind` epochs of the task's own training, or None for the start."""
        if not search.rewind:
            return None
        model = self._sparse_sharing(search.training, (task,), seed, warm=tasks)
        batches = round(search.rewind * len(self._stream("train", search.training.batch_size, seed)))
        path = self._ticket_folder(search, task, tasks, seed) / "rewind"
        self._train(path, model, objectives.plain(search.training, (task,), self.kinds), search.training, seed, batches)
        state: dict[str, Tensor] = model.state_dict()
        return state

    def _ticket_folder(self, search: Search, task: str, tasks: tuple[str, ...], seed: int) -> Path:
        warm = f"-after-{'-'.join(tasks)}" if search.training.warm_up else ""
        return self._made("searches", f"{search.folder}{warm}", f"seed_{seed}", task)

    # -- trials ------------------------------------------------------------------------------------------------------

    def run(self, trial: Trial) -> dict[str, Any]:
        """Return a trial's record; train and judge it first, if that was not done."""
        path = self._made("trials", f"{trial.key}.json")
        if not path.exists():
            record = self._run(trial)
            write_whole(path, json.dumps(record, indent=1, allow_nan=True))
        record = json.loads(path.read_text(encoding="utf-8"))
        return cast(dict[str, Any], record)

    def model(self, trial: Trial) -> nn.Module:
        """Return the trained model of a trial that was run, for judging."""
        model = self._new(trial)
        model.load_state_dict(load_file(self._state_file(trial)))
        return model.eval()

    def predictions(self, trial: Trial, split: str) -> Predictions:
        """Score every row of a split with a trial that was run."""
        return predict(self.model(trial), self._stream(split, JUDGED_ROWS, None), trial.tasks)

    def masks(self, trial: Trial) -> dict[str, Mask] | None:
        """Return the mask of each task that a trial trains through; None if all are full."""
        if trial.masks is None:
            return None
        found = self.found(trial)
        model = self._sparse_sharing(trial.training, trial.tasks, trial.seed)
        return self._chosen(trial, found, cast(MaskedMLP, model.mlp).mask(trial.tasks[0]))

    def found(self, trial: Trial) -> dict[str, list[Ticket]]:
        """Return the tickets that a trial's masks are made from, task by task."""
        masks = trial.masks
        if masks is None or not masks.searches:
            return {}
        return {task: self.tickets(masks.search, task, trial.tasks, trial.seed) for task in trial.tasks}

    def _run(self, trial: Trial) -> dict[str, Any]:
        model, seconds = self._new(trial), 0.0
        if self._is_single(trial):
            seconds = self.single(trial.training, trial.tasks[0], trial.seed)["seconds"]
            model.load_state_dict(load_file(self._state_file(trial)))
        else:
            kinds = {task: self.kinds[task] for task in trial.tasks}
            balance = UncertaintyWeights(trial.tasks, kinds) if trial.objective == "uncertainty" else None
            objective = objectives.of_trial(trial, kinds, balance)
            trained = model if balance is None else nn.ModuleList([model, balance])
            path = self._state_file(trial)
            optimizer = MaskedAdam(trained, trial.training.learning_rate)
            seconds = self._train(path, model, objective, trial.training, trial.seed, None, optimizer)
            with whole_file(path) as temporary:
                save_file(model.state_dict(), temporary)
        found = self.found(trial)
        masks = None if trial.masks is None else {task: cast(MaskedMLP, model.mlp).mask(task) for task in trial.tasks}
        searched = trial.masks.search if trial.masks and trial.masks.searches else None
        record = {
            "key": trial.key,
            "seed": trial.seed,
            "trial": trial.to_plain(),
            "validation": self._judge(model, "validation", trial.tasks),
            "seconds": {
                "train": seconds,
                "search": self.search_seconds(searched, trial.tasks, trial.seed) if searched else 0.0,
            },
            "parameters": sum(p.numel() for p in model.parameters()),
            "multiply_adds": mlp_multiply_adds(model),
            "masks": None if masks is None else _facts(masks),
            "tickets": {task: [_ticket(x) for x in tickets] for task, tickets in found.items()} or None,
            "best_level": {task: self._best(task, tickets).level for task, tickets in found.items()} or None,
        }
        if trial.is_tested:
            record["test"] = self._judge(model, "test", trial.tasks)
        return record

    def _new(self, trial: Trial) -> nn.Module:
        """Return the model of a trial as it starts: its weights, behind its masks."""
        if trial.model != "sparse_sharing":
            return self._network(trial.model, trial.training, trial.tasks, trial.seed, dict(trial.options))
        seed = trial.seed + (FRESH if trial.masks and trial.masks.fresh_start else 0)
        model: SparseSharing = self._sparse_sharing(trial.training, trial.tasks, seed, warm=trial.tasks)
        mlp = model.mlp
        masks = self.masks(trial)
        if masks is not None:
            for task, mask in masks.items():
                mlp.set_mask(mask, task)
            if trial.masks and trial.masks.rescale:
                for layer in mlp.masked_layers():
                    layer.weight.data /= sqrt(layer.masks.float().mean().item())
        return model

    def _chosen(self, trial: Trial, found: Mapping[str, Sequence[Ticket]], full: Mask) -> dict[str, Mask]:
        asked = trial.masks
        assert asked is not None
        search, tasks = asked.search, trial.tasks
        generator = torch.Generator().manual_seed(trial.seed)
        tickets = {
            task: (self._best(task, of_task) if asked.level == "best" else of_task[-1]).mask
            for task, of_task in found.items()
        }
        nnz = {name: round(kept.numel() * search.density) for name, kept in full.items()}  # the same share of each
        match asked.kind:
            case "tickets":
                return tickets
            case "random_like":
                return random_like(tickets, generator, search.granularity)
            case "one_for_all":
                return one_for_all(tickets, tasks[0])
            case "random" | "one_random":
                dense_as = Mask.random(full.shapes, nnz, generator)
                masks = random_uniform(dict.fromkeys(tasks, dense_as), generator, search.granularity)
                return masks if asked.kind == "random" else one_for_all(masks, tasks[0])
            case "random_separate":
                assert asked.shared is not None
                return random_separate(full.shapes, nnz, asked.shared, generator, tasks)
        scores = {task: self._scores(search.training, task, trial.seed) for task in tasks}
        if asked.kind == "separate":
            assert asked.shared is not None
            return separate(scores, nnz, asked.shared)
        return unanimous(scores, nnz)

    def _scores(self, training: Training, task: str, seed: int) -> dict[str, Tensor]:
        self.single(training, task, seed)
        model = self._sparse_sharing(training, (task,), seed)
        model.load_state_dict(load_file(self._single_file(training, task, seed)))
        return {name: w.detach().abs() for name, w in cast(MaskedMLP, model.mlp).masked_weights().items()}

    def _best(self, task: str, tickets: Sequence[Ticket]) -> Ticket:
        metric = MAIN_METRIC[self.kinds[task]]
        return best_ticket(tickets, metric, HIGHER_IS_BETTER[metric])

    def _is_single(self, trial: Trial) -> bool:
        plain = Trial("sparse_sharing", trial.tasks, trial.seed, trial.training, is_tested=trial.is_tested)
        return len(trial.tasks) == 1 and trial == plain and not trial.training.warm_up

    def _state_file(self, trial: Trial) -> Path:
        if self._is_single(trial):
            return self._single_file(trial.training, trial.tasks[0], trial.seed)
        return self._made("trials", f"{trial.key}.safetensors")

    # -- networks ----------------------------------------------------------------------------------------------------

    def _network(
        self, name: str, training: Training, tasks: tuple[str, ...], seed: int, options: Mapping[str, Any]
    ) -> nn.Module:
        torch.manual_seed(seed)
        encoder = self.prepared.encoder
        return build(
            name,
            encoder.fields,
            encoder.table_sizes,
            tasks,
            training.hidden,
            training.embedding_dim,
            cross=training.cross,
            exclusive_dim=training.exclusive_dim,
            **options,
        )

    def _sparse_sharing(self, training: Training, tasks: tuple[str, ...], seed: int, warm: tuple[str, ...] = ()) -> Any:
        """Return the shared network, or a task's part of it, at the seed's start or after the warm-up of `warm`."""
        model = self._network("sparse_sharing", training, tasks, seed, {})
        everything = tuple(self.kinds)
        if training.warm_up and warm:
            start = self.warm(training, warm, seed)
        elif tasks == everything:
            return model
        else:
            start = self._network("sparse_sharing", training, everything, seed, {}).state_dict()
        own = model.state_dict()
        model.load_state_dict({name: own[name] if name.endswith(".masks") else start[name] for name in own})
        return model

    def warm(self, training: Training, tasks: tuple[str, ...], seed: int) -> dict[str, Tensor]:
        """Return the state of the shared network after its warm-up: all tasks, full masks."""
        key = digest({**asdict(training), "tasks": tasks})
        path = self._made("singles", f"warm-{key}-seed_{seed}.safetensors")
        if not path.exists():
            model = self._sparse_sharing(training, tasks, seed)
            batches = round(training.warm_up * len(self._stream("train", training.batch_size, seed)))
            self._train(path, model, objectives.plain(training, tasks, self.kinds), training, seed, batches)
            with whole_file(path) as temporary:
                save_file(model.state_dict(), temporary)
        return load_file(path)

    # -- training and judging ----------------------------------------------------------------------------------------

    def _train(
        self,
        path: Path,
        model: nn.Module,
        objective: Objective,
        training: Training,
        seed: int,
        batches: int | None = None,
        optimizer: MaskedAdam | None = None,
        after_batch: AfterBatch = lambda batch, done, total: None,
    ) -> float:
        """Train a model where it stands; return the seconds. `path` names it in the log."""
        started = perf_counter()
        name = str(path.relative_to(self.folder).with_suffix(""))
        train(
            model,
            optimizer or MaskedAdam(model, training.learning_rate),
            self._stream("train", training.batch_size, seed),
            objective,
            training.epochs,
            batches,
            log=lambda record: self._log({"stage": name, "seed": seed, "split": "train", **record}),
            after_batch=after_batch,
        )
        return perf_counter() - started

    def _judge(self, model: nn.Module, split: str, tasks: tuple[str, ...]) -> dict[str, dict[str, dict[str, float]]]:
        return evaluate(model, self._stream(split, JUDGED_ROWS, None), {task: self.kinds[task] for task in tasks})

    def _stream(self, split: str, batch_size: int, seed: int | None) -> BatchStream:
        """Return a split's batches, shuffled by `seed` or in the order of the files; its rows are decoded once."""
        key = (split, batch_size, -1 if seed is None else seed)
        if key not in self._streams:
            self._streams = {k: v for k, v in self._streams.items() if k[0] != split}
            self._streams[key] = self.prepared.stream(split, batch_size, seed or 0, shuffle=seed is not None)
        return self._streams[key]

    def _made(self, *parts: str) -> Path:
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _facts(masks: Mapping[str, Mask]) -> dict[str, Any]:
    first, *others = masks.values()
    return {
        "density": {task: mask.density for task, mask in masks.items()},
        "layer_density": {task: mask.layer_density() for task, mask in masks.items()},
        "overlap": overlap(first, others[0]) if others else None,
        "ownership": ownership(masks),
    }


def _ticket(ticket: Ticket) -> dict[str, Any]:
    return {
        "level": ticket.level,
        "density": ticket.mask.density,
        "layer_density": ticket.mask.layer_density(),
        "validation": dict(ticket.metrics),
    }
