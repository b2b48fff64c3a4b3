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
from lt4rec_sparse.recsys.harness.trials import SCORED, SEARCHED, Search, Training, Trial

DATA = "data"
TRAINED = ("singles", "searches", "trials")  # the folders of what the laboratory trained


def jobs_of(folder: Path, trials: Iterable[Trial]) -> dict[Hashable, Job]:
    """Return the jobs that carry out trials: single-task baselines and warm-ups, the searches task by task, the trials.

    The folder holds the prepared log, `data/`, and what the laboratory leaves. Trials are keys; equal ones run once.
    """
    trials = list(dict.fromkeys(trials))
    known = set(trials)
    jobs: dict[Hashable, Job] = {}
    of_trials: dict[Hashable, Job] = {}  # after all searches, which begin the longest chains
    deepest: dict[Hashable, Search] = {}
    for trial in trials:
        if trial.masks is not None and trial.masks.kind in SEARCHED:
            for task in trial.tasks:
                key = _search_key(trial, task)
                deepest[key] = max(deepest.get(key, trial.masks.search), trial.masks.search, key=lambda s: s.rounds)

    def started(what: str, training: Training, *rest: Any) -> Hashable:
        """Return the job that trains a baseline or a warm-up."""
        key = (what, training, *rest)
        jobs.setdefault(key, Job(_train, (folder, *key)))
        return key

    for trial in trials:
        needs: list[Hashable] = []
        masks, seed = trial.masks, trial.seed
        of_search = masks.search.training if masks else trial.training
        singles = {task: ("single", of_search.of(task), task, seed) for task in trial.tasks}
        warm = ("warm", of_search, trial.tasks, seed) if masks and of_search.warm_up else None
        if masks is None:
            if trial.model == "sparse_sharing" and len(trial.tasks) == 1:
                needs += [started(*key) for key in singles.values()]
        elif masks.kind in SEARCHED:
            for task in trial.tasks:
                key = _search_key(trial, task)
                before = started(*(warm or singles[task]))
                jobs.setdefault(key, Job(_train, (folder, "tickets", deepest[key], task, trial.tasks, seed), (before,)))
                needs.append(key)
            twin = replace(trial, masks=replace(masks, level="best"))
            if twin != trial and twin in known:
                needs.append(twin)  # if the best tickets are the last ones, only one of the two is trained
        elif masks.kind in SCORED:
            needs += [started(*key) for key in singles.values()]
        elif warm:
            needs.append(started(*warm))
        of_trials[trial] = Job(_train, (folder, "trial", trial), tuple(needs))
    return jobs | of_trials


def has_trained(folder: Path) -> bool:
    """Return whether anything was trained on the log of a folder; if so, the log may not change."""
    return any((folder / name).exists() for name in TRAINED)


def _search_key(trial: Trial, task: str) -> Hashable:
    """Return what tells a task's search from others; shallower searches are parts of the deepest one."""
    assert trial.masks is not None
    search = trial.masks.search
    warm = warm_name(search.training, trial.tasks) if search.training.warm_up else ""
    return (search.folder(task), task, warm, trial.seed)


@lru_cache(maxsize=2)  # an experiment over many logs goes through them in order
def laboratory(folder: Path) -> Laboratory:
    """Return this process's laboratory over a folder with a prepared log."""
    return Laboratory(Prepared.load(folder / DATA), folder)


def _train(folder: Path, what: str, *arguments: Any) -> Any:
    """Return a trial's record; what others need of a baseline, warm-up or search is on disk."""
    lab = laboratory(folder)
    if what == "trial":
        return lab.run(*arguments)
    part = lab.searches if what == "tickets" else lab.starts
    getattr(part, what)(*arguments)
    return None
