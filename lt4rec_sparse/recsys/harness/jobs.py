"""Trials as jobs: what must be trained before what, so that nothing is trained twice or waits needlessly."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lt4rec_sparse.recsys.data import Prepared
from lt4rec_sparse.recsys.harness.grid import Job
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.starts import warm_name
from lt4rec_sparse.recsys.harness.trials import Search, Training, Trial

DATA = "data"
TRAINED = ("singles", "searches", "trials")  # the folders of what the laboratory trained


def jobs_of(folder: Path, trials: Iterable[Trial]) -> dict[Hashable, Job]:
    """Return the jobs that carry out trials: single-task baselines and warm-ups, the searches task by task, the trials.

    Args:
        folder: Holds the prepared log, `data/`, and what the laboratory leaves.
        trials: The trials; equal ones are run once.
    """
    trials = list(dict.fromkeys(trials))
    known = set(trials)
    jobs: dict[Hashable, Job] = {}
    of_trials: dict[Hashable, Job] = {}  # after all searches, which begin the longest chains
    deepest: dict[Hashable, Search] = {}
    for trial in trials:
        if trial.masks is not None and trial.masks.searches:
            for task in trial.tasks:
                key = _search_key(trial, task)
                deepest[key] = max(deepest.get(key, trial.masks.search), trial.masks.search, key=lambda s: s.rounds)

    def started(search: Search, trial: Trial, task: str) -> Hashable:
        """Return the job that a task's search starts from."""
        if search.training.warm_up:
            key: Hashable = ("warm", search.training, trial.tasks, trial.seed)
            jobs.setdefault(key, Job(_warm, (folder, search.training, trial.tasks, trial.seed)))
            return key
        return single(search.training.of(task), task, trial.seed)

    def single(training: Training, task: str, seed: int) -> Hashable:
        key = ("single", training, task, seed)
        jobs.setdefault(key, Job(_single, (folder, training, task, seed)))
        return key

    for trial in trials:
        needs: list[Hashable] = []
        masks = trial.masks
        if masks is None:
            if trial.model == "sparse_sharing" and len(trial.tasks) == 1:
                needs.append(single(trial.training, trial.tasks[0], trial.seed))
        elif masks.searches:
            for task in trial.tasks:
                key = _search_key(trial, task)
                search = deepest[key]
                before = started(search, trial, task)
                jobs.setdefault(key, Job(_tickets, (folder, search, task, trial.tasks, trial.seed), (before,)))
                needs.append(key)
            twin = replace(trial, masks=replace(masks, level="best"))
            if twin != trial and twin in known:
                needs.append(twin)  # if the best tickets are the last ones, only one of the two is trained
        elif masks.scores:
            needs += [single(masks.search.training.of(task), task, trial.seed) for task in trial.tasks]
        elif masks.search.training.warm_up:
            needs.append(started(masks.search, trial, trial.tasks[0]))
        of_trials[trial] = Job(_trial, (folder, trial), tuple(needs))
    return jobs | of_trials


def has_trained(folder: Path) -> bool:
    """Return whether anything was trained on the log of a folder; if so, the log may not change."""
    return any((folder / name).exists() for name in TRAINED)


def _search_key(trial: Trial, task: str) -> Hashable:
    """Return what tells a task's search from others; shallower searches are parts of the deepest one."""
    assert trial.masks is not None
    search = trial.masks.search
    warm = warm_name(search.training, trial.tasks) if search.training.warm_up else ""
    return ("tickets", search.folder(task), task, warm, trial.seed)


@lru_cache(maxsize=2)  # an experiment over many logs goes through them in order
def laboratory(folder: Path) -> Laboratory:
    """Return this process's laboratory over a folder with a prepared log."""
    return Laboratory(Prepared.load(folder / DATA), folder)


def _single(folder: Path, training: Training, task: str, seed: int) -> None:
    laboratory(folder).starts.single(training, task, seed)


def _warm(folder: Path, training: Training, tasks: tuple[str, ...], seed: int) -> None:
    laboratory(folder).starts.warm(training, tasks, seed)


def _tickets(folder: Path, search: Search, task: str, tasks: tuple[str, ...], seed: int) -> None:
    laboratory(folder).searches.tickets(search, task, tasks, seed)


def _trial(folder: Path, trial: Trial) -> dict[str, Any]:
    return laboratory(folder).run(trial)
