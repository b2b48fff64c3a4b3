"""The one stopwatch: calls timed in interleaved rounds, so that a drifting machine drifts for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import torch

Name = TypeVar("Name")


class Timing(NamedTuple):
    """Time of one call, in microseconds, over the rounds of a measurement."""

    median_us: float
    p20_us: float
    p80_us: float


@contextmanager
def one_thread() -> Iterator[None]:
    """Give torch and the engine a single thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    calls: Mapping[Name, Callable[[], object]],
    rounds: int = 15,
    round_us: float = 20_000.0,
    before: Callable[[], object] | None = None,
) -> dict[Name, Timing]:
    """Time each call in every one of `rounds` rounds, in the order given; compare only within one result.

    Within a round it is repeated often enough to fill `round_us` (found in a first round that does not count), and the
    round's time is the mean of its repetitions. `before` is called before every timed call, outside its time, for
    example to empty the caches; a round is one call then.
    """
    repetitions = {}
    for name, call in calls.items():
        call()  # warm: first touches of memory, lazy set-up
        start = time.perf_counter()
        call()
        once_us = (time.perf_counter() - start) * 1e6
        repetitions[name] = 1 if before else max(1, int(round_us / max(once_us, 0.1)))
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if before:
                before()
            start = time.perf_counter()
            for _ in range(repetitions[name]):
                call()
            samples[name].append((time.perf_counter() - start) * 1e6 / repetitions[name])
    return {name: Timing(*np.percentile(times, [50, 20, 80]).tolist()) for name, times in samples.items()}
