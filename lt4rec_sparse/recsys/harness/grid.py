"""Many jobs on few cores: each starts when the jobs it needs are done; several run side by side in processes."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from lt4rec_sparse.errors import InputError

EXECUTORS = ("processes", "ray", "here")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


@dataclass(frozen=True)
class Job:
    """A call that a worker makes: `function(*arguments)`.

    Attributes:
        function: A module-level function, which leaves its result on disk.
        arguments: Plain data that can be pickled.
        needs: Keys of jobs that must end before it starts.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: tuple[Hashable, ...] = ()


class Submit(Protocol):
    """How an executor accepts a job."""

    def __call__(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]: ...  # noqa: D102


def run_jobs(
    jobs: Mapping[Hashable, Job],
    workers: int | None = None,
    executor: str = "processes",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Hashable, Any]:
    """Run jobs side by side, each after the jobs that it needs, and return their results.

    A worker is a process with one thread: two trainings with one thread each, side by side, end sooner than one after
    the other with two threads. If a job fails, running jobs finish, no other one starts, and its error is raised; the
    results so far are on disk.

    Args:
        jobs: Key -> job. Jobs that are ready at the same time start in this order.
        workers: Processes; None for one per core.
        executor: "processes"; "ray", where Ray is installed (a cluster, if `RAY_ADDRESS` names one); or "here", one
            after another in this process, with all its threads.
        progress: Called with the number of jobs done and of all jobs.

    Raises:
        InputError: If there is no such executor, or Ray is not installed.
        ValueError: If a job needs a key that has no job, or two jobs need each other.
    """
    if executor not in EXECUTORS:
        raise InputError(f"executor: got {executor!r}, wanted one of {', '.join(EXECUTORS)}")
    _check_needs(jobs)
    results: dict[Hashable, Any] = {}
    waiting = dict(jobs)
    if not jobs:
        return results
    with _submitter(executor, workers or _cores()) as submit:
        running: dict[Future[Any], Hashable] = {}
        while waiting or running:
            for key, job in list(waiting.items()):
                if all(need in results for need in job.needs):
                    running[submit(job.function, *job.arguments)] = key
                    del waiting[key]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                results[running.pop(future)] = future.result()
                progress(len(results), len(jobs))
    return results


def _check_needs(jobs: Mapping[Hashable, Job]) -> None:
    done: set[Hashable] = set()
    left = dict(jobs)
    while left:
        ready = [key for key, job in left.items() if done.issuperset(job.needs)]
        if not ready:
            key, job = next(iter(left.items()))
            raise ValueError(f"job {key!r}: needs {job.needs}, wanted existing jobs that do not need it")
        done.update(ready)
        for key in ready:
            del left[key]


@contextmanager
def _submitter(executor: str, workers: int) -> Iterator[Submit]:
    if executor == "here":
        yield _at_once
    elif executor == "ray":
        with _ray(workers) as submit:
            yield submit
    else:
        # A fresh interpreter: a forked one would inherit torch's threads, which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=prepare_worker) as pool:
            try:
                yield pool.submit
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@contextmanager
def _ray(workers: int) -> Iterator[Submit]:
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
    prepare_worker()
    return function(*arguments)


def _at_once(function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:  # raised where the future's result is read
        future.set_exception(error)
    return future


def prepare_worker() -> None:
    """Make this process compute in one thread, keep freed memory, and end when its parent ends.

    glibc returns large blocks to the system at once, and the next training step pages them in again, which takes a
    tenth of its time. Other allocators are left alone.
    """
    import torch

    torch.set_num_threads(1)
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
