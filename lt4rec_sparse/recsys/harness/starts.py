"""The start and the course of every training on a log: networks at a seed's start, baselines, warm-ups."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lt4rec_sparse.files import read_json, write_whole
from lt4rec_sparse.recsys.data import BatchStream, Prepared, state_of
from lt4rec_sparse.recsys.harness import objectives
from lt4rec_sparse.recsys.harness.base_rates import base_rates
from lt4rec_sparse.recsys.harness.trackers import Course, Tracking, flat
from lt4rec_sparse.recsys.harness.trials import Training, digest
from lt4rec_sparse.recsys.metrics import LOSS
from lt4rec_sparse.recsys.models import build
from lt4rec_sparse.recsys.stored import load_weights, read_seconds, save_weights
from lt4rec_sparse.recsys.training import (
    EarlyStopping,
    Objective,
    Schedule,
    TaskAdam,
    averaged_model,
    current,
    evaluate,
    sparse_steps,
    together,
    train,
)

Judged = dict[str, dict[str, dict[str, float]]]  # slice -> task -> metric -> value
JUDGED_ROWS = 4096  # rows per batch while judging


class Starts:
    """Makes and trains the networks of one prepared log, from starts that a seed decides.

    At one seed every network of sparse sharing starts from the same weights: the single-task baselines, every round of
    a search, and the network that all tasks share. Baselines and warm-ups are left in `singles/` of the folder; losses
    and metrics are appended to its `metrics.jsonl`, one line per epoch and task, and one per evaluation. An interrupted
    training may repeat a line. `tracking` is told of the same while a training goes on.
    """

    def __init__(self, prepared: Prepared, folder: Path) -> None:
        self.prepared, self.folder = prepared, folder
        self.tracking = Tracking(folder)
        self.kinds = {task.name: task.kind for task in prepared.schema.tasks}
        self._streams: dict[tuple[str, int, int], BatchStream] = {}
        self._rates: dict[tuple[tuple[str, ...], bool], dict[str, float]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Send to another process where the log is: it opens its own, and keeps the rows that it decodes."""
        return _open, (type(self), self.prepared.folder.absolute(), self.folder.absolute())

    def single(self, training: Training, task: str, seed: int) -> dict[str, Any]:
        """Return the record of a single-task baseline, `validation` and `seconds`; train it first if need be.

        It is level 0 of every search with the same training.
        """
        path = self.single_file(training, task, seed)
        judged = path.with_suffix(".json")
        if not judged.exists():
            model = self.sparse_sharing(training, (task,), seed)
            seconds = self.once(path, model, objectives.plain(training, (task,), self.kinds), training, seed)
            validation = self.judge(path, model, "validation", (task,))
            self.tracking.finish(self._stage(path), flat("final/validation", validation))
            write_whole(judged, json.dumps({"validation": validation, "seconds": seconds}, indent=1))
        return read_json(judged, "validation", "seconds")

    def single_file(self, training: Training, task: str, seed: int) -> Path:
        """Return the path of the trained weights of a single-task baseline."""
        return self.made("singles", f"{task}-{digest(asdict(training))}-seed_{seed}.safetensors")

    def warm(self, training: Training, tasks: tuple[str, ...], seed: int) -> tuple[dict[str, Tensor], float]:
        """Return the shared network after its warm-up, with all tasks and full masks, and the seconds that it took."""
        path = self.made("singles", f"{warm_name(training, tasks)}-seed_{seed}.safetensors")
        model = self.sparse_sharing(training, tasks, seed)
        batches = round(training.warm_up * self.batches(training))
        objective = objectives.plain(training, tasks, self.kinds)
        seconds = self.once(path, model, objective, training, seed, batches=batches)
        return model.state_dict(), seconds

    def network(
        self, name: str, training: Training, tasks: tuple[str, ...], seed: int, options: Mapping[str, Any]
    ) -> nn.Module:
        """Return a new network as its seed draws it; `options` are the model's own."""
        torch.manual_seed(seed)
        encoder = self.prepared.encoder
        model = build(
            name,
            encoder.fields,
            encoder.table_sizes,
            tasks,
            training.hidden,
            training.embedding_dim,
            cross=training.cross,
            exclusive_dim=training.exclusive_dim,
            sparse_gradients=training.sparse_gradients,
            numbers=encoder.n_numbers,
            attention=encoder.attention,
            **options,
        )
        if training.base_rates:
            model.start_at(self.base_rates(tasks, name == "esmm"))
        return model

    def base_rates(self, tasks: tuple[str, ...], entire_space: bool = False) -> dict[str, float]:
        """Return the tasks' rates on the training days; see `base_rates.base_rates`."""
        key = (tasks, entire_space)
        if key not in self._rates:
            self._rates[key] = base_rates(self.prepared, tasks, entire_space)
        return self._rates[key]

    def sparse_sharing(self, training: Training, tasks: tuple[str, ...], seed: int, warm: tuple[str, ...] = ()) -> Any:
        """Return the shared network, or a task's part of it, at the seed's start or after a warm-up of tasks `warm`."""
        model = self.network("sparse_sharing", training, tasks, seed, {})
        everything = tuple(self.kinds)
        if training.warm_up and warm:
            start = self.warm(training, warm, seed)[0]
        elif tasks == everything:
            return model
        else:
            start = self.network("sparse_sharing", training, everything, seed, {}).state_dict()
        own = model.state_dict()
        model.load_state_dict(
            {name: own[name] if name.endswith((".masks", ".mask_tasks")) else start[name] for name in own}
        )
        return model

    def batches(self, training: Training) -> int:
        """Return the batches of an epoch."""
        return len(self.prepared.stream("train", training.batch_size))  # not `stream`, whose cached rows would go

    def optimizer(self, model: nn.Module, training: Training) -> TaskAdam:
        """Return a training's optimiser: every task's steps have the task's learning rate."""
        rates = {task: training.rate(task) for task in self.kinds}
        return TaskAdam(model, rates, training.clip_norm, training.weight_decay)

    def once(
        self, path: Path, model: nn.Module, objective: Objective, training: Training, seed: int | None, **how: Any
    ) -> float:
        """Train a model as `train` does and leave it at `path`, or load what was left there; return the seconds."""
        took = path.with_suffix(".seconds")
        if not (path.exists() and took.exists()):
            seconds = self.train(path, model, objective, training, seed, **how)
            save_weights(model, path)
            if "batches" in how:  # a warm-up or what is rewound to: nobody judges it
                self.tracking.finish(self._stage(path), {})
            write_whole(took, json.dumps(seconds))
        load_weights(model, path)
        return read_seconds(took)

    def train(
        self,
        path: Path,
        model: nn.Module,
        objective: Objective,
        training: Training,
        seed: int | None,
        optimizer: TaskAdam | None = None,
        skip: int = 0,
        has_state: bool = False,
        described: Mapping[str, Any] | None = None,
        **how: Any,
    ) -> float:
        """Train a model in place; return the seconds of all cores together, whatever else the machine does.

        `seed` shuffles the rows, as in `stream`.
        `path` names the training in the log. An interrupted training continues from a checkpoint beside it, unless
        something besides model and optimiser has a state: the objective (`has_state`) or `after_batch`. `skip` batches
        are left out at the start; `described` is what a tracker is told of the training besides; `how` is for
        `training.train`.
        """
        how |= {"skip": skip}
        if not has_state and "after_batch" not in how:
            how["checkpoint"] = path.with_suffix(".checkpoint.pt")
        settings = None
        if self.tracking.is_on:
            settings = {"tasks": objective.names, "seed": seed, **asdict(training), **(described or {})}
        stays = optimizer is None and not has_state and "after_batch" not in how  # what has a state knows the model
        with sparse_steps(model) if training.sparse_steps and stays else nullcontext():
            stepping = optimizer or self.optimizer(model, training)
            return together(Starts._steps, self, path, model, objective, training, seed, stepping, settings, how)

    def _steps(
        self,
        path: Path,
        model: nn.Module,
        objective: Objective,
        training: Training,
        seed: int | None,
        optimizer: TaskAdam,
        settings: Mapping[str, Any] | None,
        how: Mapping[str, Any],
    ) -> float:
        """Train a model, all processes together; a tracker is told of the `settings` by the first one, if any."""
        latest: list[Judged] = []  # what patience has judged and the tracker was not told of

        def losses(model: nn.Module) -> dict[str, float]:
            latest[:] = [self.judge(path, model, "validation", objective.names)]
            return {task: latest[0]["all"][task][LOSS[self.kinds[task]]] for task in objective.names}

        def watched(course: Course | None, done: int, means: Mapping[str, float], judged: nn.Module | None) -> None:
            metrics = {f"train_loss/{name}": mean for name, mean in means.items()}
            if judged is not None:
                found = latest or [self.judge(path, judged, "validation", objective.names)]
                metrics |= flat("validation", found[0])
                latest.clear()
            if course is not None:
                course.log(done, metrics)

        schedule = Schedule(training.schedule, training.warm_up_steps)
        is_whole = not {"after_batch", "batches"} & how.keys()
        stream = self.stream("train", training.batch_size, seed)
        watch = None
        if settings is not None:  # every process judges, the first one tells
            watch = partial(watched, self.tracking.course(self._stage(path), settings) if current().leads else None)
        next(stream.epoch(0))  # the stream decodes its rows now, before the clock starts

        def before_batch(done: int, total: int) -> None:
            optimizer.factor = schedule.factor(done, total)

        return train(
            model,
            optimizer,
            stream,
            objective,
            training.epochs,
            log=lambda record: self._log(path, {"split": "train", **record}),
            stopping=EarlyStopping(losses, training.patience) if training.patience and is_whole else None,
            before_batch=before_batch,
            averaged=averaged_model(model, training.ema) if training.ema and is_whole else None,
            watch=watch,
            **how,
        )

    def judge(self, path: Path, model: nn.Module, split: str, tasks: tuple[str, ...], top_k: int = 0) -> Judged:
        """Return a model's metrics on a split; `path` names the model in the log, `top_k` is as in `metrics_of`."""
        judged = together(Starts._judged, self, model, split, tasks, top_k)
        self._log(path, {"split": split, "metrics": judged})
        return judged

    def _judged(self, model: nn.Module, split: str, tasks: tuple[str, ...], top_k: int) -> Judged:
        kinds = {task: self.kinds[task] for task in tasks}
        return evaluate(model, self.stream(split, JUDGED_ROWS, None), kinds, top_k)

    def stream(self, split: str, batch_size: int, seed: int | None) -> BatchStream:
        """Return a split's batches, shuffled by `seed` or in the order of the files; its rows are decoded once."""
        key = (split, batch_size, -1 if seed is None else seed)
        if key not in self._streams:
            self._streams = {k: v for k, v in self._streams.items() if k[0] != split}
            self._streams[key] = self.prepared.stream(split, batch_size, seed or 0, shuffle=seed is not None)
        return self._streams[key]

    def made(self, *parts: str) -> Path:
        """Return a path in the folder, after making the folder that contains it."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _stage(self, path: Path) -> str:
        """Return the name of a training, or of a judged model, in logs."""
        return str(path.relative_to(self.folder).with_suffix(""))

    def _log(self, path: Path, record: Mapping[str, Any]) -> None:
        if not current().leads:
            return
        line = json.dumps({"stage": self._stage(path), **record})
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")  # one short write, so that lines of several processes do not mix


def _open(kind: Any, prepared: Path, folder: Path) -> Starts:
    return _opened(kind, prepared, folder, state_of(prepared))


@lru_cache(maxsize=2)  # an experiment over many logs goes through them in order
def _opened(kind: type[Starts], prepared: Path, folder: Path, state: tuple[int, ...]) -> Starts:
    return kind(Prepared.load(prepared), folder)


def warm_name(training: Training, tasks: tuple[str, ...]) -> str:
    """Return what tells a warm-up from others."""
    return f"warm-{digest({**asdict(training), 'tasks': tasks})}"
