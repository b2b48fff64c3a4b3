"""One seed of the whole method: every model over the same rows, batches and epochs, and the start that they share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lt4rec_sparse.files import whole_file, write_whole
from lt4rec_sparse.lottery import (
    Ticket,
    best_ticket,
    one_for_all,
    random_like,
    random_masks,
    random_uniform,
    scale_to_density,
    search_tickets,
)
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.nn.optim import MaskedAdam
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.data import Prepared
from lt4rec_sparse.recsys.harness.settings import RunSettings, tasks_of
from lt4rec_sparse.recsys.harness.statistics import best_of
from lt4rec_sparse.recsys.models import HardSharing, SparseSharing, loss_of
from lt4rec_sparse.recsys.training import Alternating, TaskLosses, evaluate, train

Progress = Callable[[str, int, int], None]
Log = Callable[[dict[str, Any]], None]

# The arms, by the name of their files; `TITLES` is what a report calls them.
SINGLE, HARD, SPARSE, SPARSE_LAST = "single_task", "hard_sharing", "sparse_sharing", "sparse_sharing_last"
RANDOM_LIKE, RANDOM_UNIFORM, RANDOM_LAST = "random_like", "random_uniform", "random_last"
ONE_TICKET, ONE_RANDOM = "one_mask_ticket", "one_mask_random"
TITLES = {
    SINGLE: "single-task",
    HARD: "hard sharing",
    SPARSE: "sparse sharing: best tickets",
    RANDOM_LIKE: "random masks: densities of the best tickets' layers",
    RANDOM_UNIFORM: "random masks: uniform density of the best tickets",
    ONE_TICKET: "one mask for all: the first task's best ticket",
    ONE_RANDOM: "one mask for all: random, uniform density",
    SPARSE_LAST: "sparse sharing: last tickets",
    RANDOM_LAST: "sparse sharing: random masks, no search, scaled up",
}
MAIN_METRIC = {"binary": "auc", "ratio": "mse"}
LOSS = {"binary": "log_loss", "ratio": "mse"}
HIGHER_IS_BETTER = {"auc": True, "mse": False}


class SeedRun:
    """Trains, or reads back what was trained before, all arms of one seed.

    Args:
        prepared: The data.
        settings: Of the run.
        seed: Of the initial weights, the order of the batches and the random masks.
        folder: Where this seed's tickets and trained states stand.
        log: Takes a record for each training loss and metric.
        progress: Called with a stage's name, batches done and batches in all.
    """

    def __init__(
        self, prepared: Prepared, settings: RunSettings, seed: int, folder: Path, log: Log, progress: Progress
    ) -> None:
        self.prepared, self.settings, self.seed, self.folder = prepared, settings, seed, folder
        self._log, self._progress = log, progress
        self.tasks = {task.name: task for task in tasks_of(prepared.schema, settings.tasks)}
        self.kinds = {name: task.kind for name, task in self.tasks.items()}
        folder.mkdir(parents=True, exist_ok=True)
        self._train_rows = prepared.stream("train", settings.batch_size, seed=seed, shuffle=True)
        self._validation = prepared.stream("validation", 4096, seed=0, shuffle=False)
        self._start = self._new(SparseSharing, tuple(self.tasks)).state_dict()

    def run(self) -> dict[str, Any]:
        """Return the seed's result: test metrics of each arm, the tickets' curves, seconds of each stage."""
        done = self.folder / "result.json"
        if done.exists():
            result: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
            return result
        tickets = {task: self.search(task) for task in self.tasks}
        masks = self._random(tickets) if self.settings.masks == "random" else self._tickets(tickets)
        arms = {HARD: self._train_arm(HARD, self._new(HardSharing, tuple(self.tasks)))}
        for arm, chosen in masks.items():
            model = self.sparse_sharing(chosen)
            if arm == RANDOM_LAST or self.settings.masks == "random":
                scale_to_density(model.mlp)
            arms[arm] = self._train_arm(arm, model)
        test = self.prepared.stream("test", 4096, seed=0, shuffle=False)
        metrics = {SINGLE: evaluate(self._single_tasks(), test, self.kinds)}
        metrics |= {arm: evaluate(model, test, self.kinds) for arm, model in arms.items()}
        for arm, by_slice in metrics.items():
            self._log({"seed": self.seed, "stage": arm, "split": "test", "metrics": by_slice})
        result = {
            "seed": self.seed,
            "test": metrics,
            "tickets": {t: [ticket_record(x) for x in found] for t, found in tickets.items()},
            "best_level": {t: self.best(found, t).level for t, found in tickets.items() if len(found) > 1},
            "seconds": self._seconds(),
        }
        write_whole(done, json.dumps(result, indent=1))
        return result

    def _random(self, tickets: Mapping[str, list[Ticket]]) -> dict[str, dict[str, Mask]]:
        """Return the masks of each arm where nothing is searched; the only tickets are the full masks."""
        generator, settings = torch.Generator().manual_seed(self.seed), self.settings
        shapes = next(iter(tickets.values()))[0].mask.shapes
        masks = random_masks(shapes, settings.density, tuple(tickets), generator, settings.granularity)
        return {RANDOM_LAST: masks, ONE_RANDOM: one_for_all(masks, next(iter(masks)))}

    def _tickets(self, tickets: Mapping[str, list[Ticket]]) -> dict[str, dict[str, Mask]]:
        """Return the masks of each arm: tickets, and the controls that they must beat."""
        best = {task: self.best(found, task).mask for task, found in tickets.items()}
        last = {task: found[-1].mask for task, found in tickets.items()}
        generator = torch.Generator().manual_seed(self.seed)
        first = next(iter(best))
        granularity = self.settings.granularity
        uniform = random_uniform(best, generator, granularity)
        return {
            SPARSE: best,
            RANDOM_LIKE: random_like(best, generator, granularity),
            RANDOM_UNIFORM: uniform,
            ONE_TICKET: one_for_all(best, first),
            ONE_RANDOM: one_for_all(uniform, first),
            SPARSE_LAST: last,
            RANDOM_LAST: random_uniform(last, generator, granularity),
        }

    def search(self, task: str) -> list[Ticket]:
        """Search the tickets of one task (Algorithm 1, lines 1 to 9); level 0 is the single-task baseline.

        Without a search there is that level alone.
        """
        model = self._new(SparseSharing, (task,))

        def train_and_judge(level: int) -> dict[str, float]:
            stage = f"search.{task}.level_{level}"
            self._train(stage, model, (task,))
            if level == 0:
                _save_state(model, self._state_file(f"{SINGLE}.{task}"))
            return self._judge(stage, model, (task,))[task]

        s = self.settings
        folder = self.folder / "tickets" / task
        rounds = 0 if s.masks == "random" else s.rounds
        return search_tickets(task, model, model.mlp, train_and_judge, rounds, s.density, folder, s.granularity)

    def best(self, tickets: list[Ticket], task: str) -> Ticket:
        """Return the task's best pruned ticket by its main metric on the validation split."""
        metric = MAIN_METRIC[self.tasks[task].kind]
        return best_ticket(tickets, metric, HIGHER_IS_BETTER[metric])

    def best_arm(self, arms: Sequence[str]) -> str:
        """Return which arm of shared networks is best on the validation days, by all its tasks' losses (`best_of`)."""
        judged = {arm: evaluate(self.trained_sparse_sharing(arm), self._validation, self.kinds)["all"] for arm in arms}
        return best_of({arm: {t: judged[arm][t][LOSS[kind]] for t, kind in self.kinds.items()} for arm in arms})

    def sparse_sharing(self, masks: Mapping[str, Mask]) -> SparseSharing:
        """Return the shared network at its start, each task behind its mask."""
        model: SparseSharing = self._new(SparseSharing, tuple(self.tasks))
        for task, mask in masks.items():
            model.mlp.set_mask(mask, task)
        return model

    def trained_sparse_sharing(self, arm: str) -> SparseSharing:
        """Return the trained model of an arm that is one shared network behind masks."""
        model: SparseSharing = self._new(SparseSharing, tuple(self.tasks))
        model.load_state_dict(load_file(self._state_file(arm)))
        return model.eval()

    def _new(self, kind: Callable[..., Any], tasks: tuple[str, ...]) -> Any:
        torch.manual_seed(self.seed)
        encoder = self.prepared.encoder
        inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, self.settings.embedding_dim)
        model = kind(inputs, tasks, self.settings.hidden)
        if kind is SparseSharing and tasks != tuple(self.tasks):
            # Every task searches its mask in the network that all of them will share: same start, its own head.
            own = model.state_dict()
            model.load_state_dict(
                {name: own[name] if name.endswith((".masks", ".mask_tasks")) else self._start[name] for name in own}
            )
        return model

    def _single_tasks(self) -> Callable[[EncodedFeatures, str], Tensor]:
        models = {}
        for task in self.tasks:
            models[task] = self._new(SparseSharing, (task,)).eval()
            models[task].load_state_dict(load_file(self._state_file(f"{SINGLE}.{task}")))
        return lambda features, task: models[task](features, task)

    def _train_arm(self, arm: str, model: nn.Module) -> nn.Module:
        state = self._state_file(arm)
        if not state.exists():
            self._train(arm, model, tuple(self.tasks))
            self._judge(arm, model, tuple(self.tasks))
            _save_state(model, state)
        model.load_state_dict(load_file(state))
        return model

    def _train(self, stage: str, model: nn.Module, tasks: tuple[str, ...]) -> None:
        started = perf_counter()
        name = f"seed {self.seed}: {stage}"
        train(
            model,
            MaskedAdam(model, self.settings.learning_rate),
            self._train_rows,
            Alternating(TaskLosses({task: loss_of(self.tasks[task].kind) for task in tasks})),
            self.settings.epochs,
            checkpoint=self.folder / f"{stage}.checkpoint.pt",
            log=lambda record: self._log({"seed": self.seed, "stage": stage, "split": "train", **record}),
            progress=lambda done, total: self._progress(name, done, total),
        )
        seconds = self._seconds() | {stage: perf_counter() - started}
        write_whole(self.folder / "seconds.json", json.dumps(seconds, indent=1))

    def _judge(self, stage: str, model: nn.Module, tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
        by_slice = evaluate(model, self._validation, {task: self.kinds[task] for task in tasks})
        self._log({"seed": self.seed, "stage": stage, "split": "validation", "metrics": by_slice})
        return by_slice["all"]

    def _state_file(self, arm: str) -> Path:
        return self.folder / f"{arm}.state.safetensors"

    def _seconds(self) -> dict[str, float]:
        path = self.folder / "seconds.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def ticket_record(ticket: Ticket) -> dict[str, Any]:
    """Return what a result says of a ticket."""
    return {
        "level": ticket.level,
        "density": ticket.mask.density,
        "layer_density": ticket.mask.layer_density(),
        "validation": dict(ticket.metrics),
    }


def _save_state(model: nn.Module, path: Path) -> None:
    with whole_file(path) as temporary:
        save_file(model.state_dict(), temporary)
