"""Many jobs on few cores: each starts when the jobs it needs are done; several run side by side in processes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from multiprocessing.process import BaseProcess
from typing import Any

from lt4rec_sparse.errors import InputError

EXECUTORS = ("processes", "here")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


@dataclass(frozen=True)
class Job:
    """A call that a worker makes, `function(*arguments)`, and the keys of jobs that must end before it starts.

    The function stands in a module and leaves its result on disk; the arguments can be pickled.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: tuple[Hashable, ...] = ()


def run_jobs(
    jobs: Mapping[Any, Job],
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
        executor: "processes"; or "here", one after another in this process, with all its threads.
        progress: Called with the number of jobs done and of all jobs.
    """
    if executor not in EXECUTORS:
        raise InputError(f"executor: got {executor!r}, wanted one of {', '.join(EXECUTORS)}")
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A fresh interpreter: a forked one would inherit torch's threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or cores, context, initializer=prepare_worker) as pool:
        try:
            yield pool.submit
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
