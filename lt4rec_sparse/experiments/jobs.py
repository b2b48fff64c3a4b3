"""Rows of trials as jobs: what trains what first, so that nothing is trained twice and nothing waits without need."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from lt4rec_sparse.data import Prepared
from lt4rec_sparse.experiments.grid import Job
from lt4rec_sparse.experiments.laboratory import Laboratory
from lt4rec_sparse.experiments.trials import Search, Training, Trial

DATA = "data"


def jobs_of(folder: Path, trials: Iterable[Trial]) -> dict[Hashable, Job]:
    """Return the jobs that carry out trials: single-task baselines and warm-ups, the searches task by task, the trials.

    Args:
        folder: Holds the prepared log, `data/`, and what the laboratory leaves.
        trials: Which; of equal ones one is run.
    """
    jobs: dict[Hashable, Job] = {}

    def baseline(training: Training, task: str, tasks: tuple[str, ...], seed: int) -> Hashable:
        if training.warm_up:
            key: Hashable = ("warm", training, tasks, seed)
            jobs.setdefault(key, Job(_warm, (folder, training, tasks, seed)))
        else:
            key = ("single", training, task, seed)
            jobs.setdefault(key, Job(_single, (folder, training, task, seed)))
        return key

    for trial in trials:
        needs: list[Hashable] = []
        masks = trial.masks
        if masks is not None and (masks.searches or masks.scores):
            for task in trial.tasks:
                search = masks.search
                before = baseline(search.training, task, trial.tasks, trial.seed)
                if masks.searches:
                    key = ("tickets", search, task, trial.tasks, trial.seed)
                    jobs.setdefault(key, Job(_tickets, (folder, search, task, trial.tasks, trial.seed), (before,)))
                    needs.append(key)
                else:
                    needs.append(before)
        if trial.training.warm_up:
            needs.append(baseline(trial.training, trial.tasks[0], trial.tasks, trial.seed))
        if trial.model == "sparse_sharing" and masks is None and len(trial.tasks) == 1:
            needs.append(baseline(trial.training, trial.tasks[0], trial.tasks, trial.seed))
        jobs.setdefault(trial, Job(_trial, (folder, trial), tuple(needs)))
    return jobs


@lru_cache(maxsize=2)  # two folders at a time: an experiment over many logs goes through them in order
def laboratory(folder: Path) -> Laboratory:
    """Return this process's laboratory over a folder with a prepared log."""
    return Laboratory(Prepared.load(folder / DATA), folder)


def _single(folder: Path, training: Training, task: str, seed: int) -> None:
    laboratory(folder).single(training, task, seed)


def _warm(folder: Path, training: Training, tasks: tuple[str, ...], seed: int) -> None:
    laboratory(folder).warm(training, tasks, seed)


def _tickets(folder: Path, search: Search, task: str, tasks: tuple[str, ...], seed: int) -> None:
    laboratory(folder).tickets(search, task, tasks, seed)


def _trial(folder: Path, trial: Trial) -> dict[str, Any]:
    return laboratory(folder).run(trial)
