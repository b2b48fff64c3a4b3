"""Trials as jobs: what must be trained before what; and jobs on few cores, several side by side in processes."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from graphlib import TopologicalSorter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.recsys.data import Prepared, state_of
from lt4rec_sparse.recsys.data.memory import CACHE, cache_bytes
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.starts import warm_name
from lt4rec_sparse.recsys.harness.trackers import NONE, tracking
from lt4rec_sparse.recsys.harness.trials import SCORED, SEARCHED, Search, Training, Trial
from lt4rec_sparse.recsys.training import joined

DATA = "data"
EXECUTORS = ("processes", "ray", "here")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


@dataclass(frozen=True)
class Job:
    """A call that a worker makes, `function(*arguments)`, and the keys of jobs that must end before it starts.

    The function stands in a module and leaves its result on disk; the arguments can be pickled.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: tuple[Hashable, ...] = ()


def jobs_of(folder: Path, trials: Iterable[Trial], tracker: str = NONE) -> dict[Hashable, Job]:
    """Return the jobs that carry out trials: single-task baselines and warm-ups, the searches task by task, the trials.

    The folder holds the prepared log, `data/`, and what the laboratory leaves. Trials are keys; equal ones run once.
    The `tracker` is told of them.
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
        jobs.setdefault(key, Job(_train, (folder, tracker, *key)))
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
                jobs.setdefault(
                    key, Job(_train, (folder, tracker, "tickets", deepest[key], task, trial.tasks, seed), (before,))
                )
                needs.append(key)
            twin = replace(trial, masks=replace(masks, level="best"))
            if twin != trial and twin in known:
                needs.append(twin)  # if the best tickets are the last ones, only one of the two is trained
        elif masks.kind in SCORED:
            needs += [started(*key) for key in singles.values()]
        elif warm:
            needs.append(started(*warm))
        of_trials[trial] = Job(_train, (folder, tracker, "trial", trial), tuple(needs))
    return jobs | of_trials


def has_trained(folder: Path) -> bool:
    """Return whether anything was trained on the log of a folder; if so, the log may not change."""
    return any((folder / name).exists() for name in ("singles", "searches", "trials"))


def _search_key(trial: Trial, task: str) -> Hashable:
    """Return what tells a task's search from others; shallower searches are parts of the deepest one."""
    assert trial.masks is not None
    search = trial.masks.search
    warm = warm_name(search.training, trial.tasks) if search.training.warm_up else ""
    return (search.folder(task), task, warm, trial.seed)


def laboratory(folder: Path) -> Laboratory:
    """Return this process's laboratory over a folder with a prepared log."""
    return _laboratory(folder, folder.absolute(), state_of(folder / DATA))


def forget_laboratories() -> None:
    """Let go of this process's laboratories, and of the rows that they have decoded."""
    _laboratory.cache_clear()


@lru_cache(maxsize=2)  # an experiment over many logs goes through them in order
def _laboratory(folder: Path, place: Path, state: tuple[int, ...]) -> Laboratory:
    return Laboratory(Prepared.load(folder / DATA), folder)


def _train(folder: Path, tracker: str, what: str, *arguments: Any) -> Any:
    """Return a trial's record; what others need of a baseline, warm-up or search is on disk."""
    lab = laboratory(folder)
    lab.tracking = tracking(folder, tracker)
    if what == "trial":
        return lab.run(*arguments)
    getattr(lab, what)(*arguments)
    return None


def check_executor(workers: int | None, executor: str) -> None:
    """Check what is to carry out jobs; also before a log is prepared for them, which can take hours.

    Raises:
        InputError: If there is no such executor, or workers or Ray are asked for besides `torchrun`'s processes.
    """
    if executor not in EXECUTORS:
        raise InputError(f"executor: got {executor!r}, wanted one of {', '.join(EXECUTORS)}")
    if joined().size > 1 and (workers is not None or executor == "ray"):
        got = "ray" if executor == "ray" else f"{workers} workers"
        raise InputError(f"executor: got {got} under torchrun, wanted none: its processes share each training")


def run_jobs(
    jobs: Mapping[Any, Job],
    workers: int | None = None,
    executor: str = "processes",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Hashable, Any]:
    """Run jobs side by side, each after the jobs that it needs, and return their results.

    A worker is a process with one thread: two trainings with one thread each, side by side, end sooner than one after
    the other with two threads. If a job fails, running jobs finish, no other one starts, and its error is raised; the
    results so far are on disk. Jobs that are ready at the same time start in their order.

    There is a worker per core unless `workers` says otherwise. The executor "ray" takes Ray's workers, of the cluster
    that `RAY_ADDRESS` names, if any; "here" runs one job after another in this process, with all its threads.
    `progress` is told the number of jobs done and of all jobs. Where `torchrun` started several processes, jobs run one
    after another, since all processes share each training.

    Raises:
        InputError: As `check_executor`.
    """
    check_executor(workers, executor)
    if joined().size > 1:
        executor = "here"
    place = {key: i for i, key in enumerate(jobs)}
    order = TopologicalSorter({key: job.needs for key, job in jobs.items()})
    order.prepare()
    results: dict[Hashable, Any] = {}
    with _submitter(executor, workers) as submit:
        running: dict[Future[Any], Hashable] = {}
        while order.is_active():
            for key in sorted(order.get_ready(), key=place.__getitem__):
                running[submit(jobs[key].function, *jobs[key].arguments)] = key
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                results[key] = future.result()
                order.done(key)
                progress(len(results), len(jobs))
    return results


@contextmanager
def _submitter(executor: str, workers: int | None) -> Iterator[Callable[..., Future[Any]]]:
    if executor == "here":
        yield _at_once
        return
    if executor == "ray":
        with _ray(workers) as submit:
            yield submit
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A fresh interpreter: a forked one would inherit torch's threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    count = workers or cores or 1
    with ProcessPoolExecutor(count, context, initializer=prepare_worker, initargs=(count,)) as pool:
        try:
            yield pool.submit
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _ray(workers: int | None) -> Iterator[Callable[..., Future[Any]]]:
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise InputError(
            "executor: got 'ray', which is not installed, wanted `pip install ray`, or processes"
        ) from error
    address = os.environ.get("RAY_ADDRESS")
    ray.init(address=address, num_cpus=None if address else workers, include_dashboard=False, log_to_driver=False)
    try:
        remote = ray.remote(_in_worker)
        yield lambda function, /, *arguments: remote.remote(function, *arguments).future()
    finally:
        ray.shutdown()


def _in_worker(function: Callable[..., Any], *arguments: Any) -> Any:
    prepare_worker(os.cpu_count() or 1)  # of this machine, which Ray may fill with workers
    return function(*arguments)


def _at_once(function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:  # raised where the future's result is read
        future.set_exception(error)
    return future


def prepare_worker(workers: int) -> None:
    """Make this process, one of some workers, compute in one thread, keep freed memory, and end when its parent ends.

    Its caches may take its part of the memory.

    glibc returns large blocks to the system at once, and the next training step pages them in again, which takes a
    tenth of its time. Other allocators are left alone.
    """
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault(CACHE, str(cache_bytes(workers)))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    """End this process when its parent ends: workers of a killed pool would wait for ever."""
    parent.join()
    os._exit(1)
