"""The GPU's stopwatch: calls as CUDA graphs, timed by events in interleaved rounds; and a stand-in without a GPU.

Four figures, because the GPU's time and the caller's waiting time differ widely if a kernel takes microseconds:

- `replayed`: GPU time of a call. A graph holds the call many times over, so that its launch does not count, and is
  replayed twice in a row, the second time between two events: the first keeps the GPU busy while the host gets ahead.
- `cold`: the same with a buffer larger than the L2 cache overwritten before every call. The sweep is in the graph too;
  the time of a graph of sweeps alone, from the same round, is subtracted.
- `called`: calls one after another as Python makes them; this is the host's time if that is longer.
- `waited`: one call, and waiting for its result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lt4rec_sparse.stopwatch import Timing, interleaved

ROUNDS = 11
GRAPH_US = 400.0  # of one replay: an event's resolution is half a microsecond
REPEATS = 40  # of a call in one graph, at most
SWEEPS = 8  # in one graph
SWEEP_OVER_L2 = 1.2
STREAM_US = 3_000.0  # of calls in a row
PRIORITY = -1  # of all streams of the benchmark: equal, so that no branch of a graph goes first

Calls = Mapping[str, Callable[[], object]]


class Stopwatch(Protocol):
    """What the suites ask of a stopwatch; timings compare within one result only."""

    def replayed(self, calls: Calls) -> dict[str, Timing]:
        """Time the GPU, weights warm in its cache."""

    def cold(self, calls: Calls) -> dict[str, Timing]:
        """Time the GPU, its cache overwritten before each call."""

    def called(self, calls: Calls) -> dict[str, Timing]:
        """Time calls in a row."""

    def waited(self, calls: Calls) -> dict[str, Timing]:
        """Time calls that wait for their result."""

    def graphed(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return `call` as a graph over buffers of its own, with a copy of its argument into them."""

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Return how far the peak memory of a call is above the memory in use before it."""

    def clear(self) -> None:
        """Forget all graphs, between cases: what `graphed` returned must not be called again."""


class GraphStopwatch:
    """The stopwatch of a GPU.

    Graphs of one stream read the same cuBLAS workspace, and the first to be destroyed may free it under the others
    (github.com/pytorch/pytorch/issues/193402). So all graphs stay until `clear` destroys them together.
    """

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._sweep = torch.empty(int(SWEEP_OVER_L2 * l2_bytes) // 4, device=device)
        self._device = device
        # Torch hands out 32 streams per priority, over and over. This priority is the benchmark's alone, so that no
        # graph of the library shares this stream.
        self._stream = torch.cuda.Stream(device, priority=PRIORITY)
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def replayed(self, calls: Calls) -> dict[str, Timing]:
        """Time the GPU, weights warm in its cache."""
        graphs = {}
        for name, call in calls.items():
            once_us = self._replay_us(self._capture(call, 1))
            repeats = max(1, min(REPEATS, round(GRAPH_US / once_us)))
            graphs[name] = (self._capture(call, repeats), repeats)
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(ROUNDS):
            for name, (graph, repeats) in graphs.items():
                samples[name].append(self._replay_us(graph) / repeats)
        return _timings(samples)

    def cold(self, calls: Calls) -> dict[str, Timing]:
        """Time the GPU, its cache overwritten before each call."""
        sweeps = self._capture(self._overwrite, SWEEPS)
        graphs = {name: self._capture(partial(self._after_sweep, call), SWEEPS) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(ROUNDS):
            sweeps_us = self._replay_us(sweeps)
            for name, graph in graphs.items():
                samples[name].append((self._replay_us(graph) - sweeps_us) / SWEEPS)
        return _timings(samples)

    def called(self, calls: Calls) -> dict[str, Timing]:
        """Time calls in a row."""
        counts = {}
        for name, call in calls.items():
            call()
            counts[name] = max(4, min(200, round(STREAM_US / self._between_us(partial(_repeat, call, 3)) * 3)))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                samples[name].append(self._between_us(partial(_repeat, call, counts[name])) / counts[name])
        return _timings(samples)

    def waited(self, calls: Calls) -> dict[str, Timing]:
        """Time calls that wait for their result."""
        waiting = {name: partial(self._wait, call) for name, call in calls.items()}
        return interleaved(waiting, rounds=ROUNDS, round_us=1_500.0)

    def graphed(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return `call` as a graph over buffers of its own, with a copy of its argument into them."""
        buffer, results = x.clone(), []

        def run() -> None:
            results[:] = [call(buffer)]

        graph = self._capture(run, 1)

        def replay(x: Tensor) -> Tensor:
            buffer.copy_(x)
            graph.replay()
            return results[0]

        return replay

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Return how far the peak memory of a call is above the memory in use before it."""
        call()
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        call()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before

    def clear(self) -> None:
        """Forget all graphs, between cases: what `graphed` returned must not be called again."""
        torch.cuda.synchronize(self._device)
        self._graphs.clear()

    def _capture(self, call: Callable[[], object], repeats: int) -> torch.cuda.CUDAGraph:
        """Return a graph of `repeats` calls, one after another."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # keeps what a first call compiles or allocates out of the graph
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        # On the stream of the calls above, where cuBLAS has its workspace. On a new stream it would come from
        # this graph's own memory, and end with it.
        with torch.cuda.graph(graph, stream=self._stream):
            for _ in range(repeats):
                call()
        graph.replay()  # the first one uploads it
        torch.cuda.synchronize()
        return graph

    def _replay_us(self, graph: torch.cuda.CUDAGraph) -> float:
        graph.replay()
        return self._between_us(graph.replay)

    def _between_us(self, call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3  # ms

    def _overwrite(self) -> None:
        self._sweep.fill_(1.0)

    def _after_sweep(self, call: Callable[[], object]) -> None:
        self._overwrite()
        call()

    def _wait(self, call: Callable[[], object]) -> None:
        call()
        torch.cuda.synchronize(self._device)


class WallStopwatch:
    """The same figures by a wall clock, one call each: they show that the code runs, and say nothing about a GPU."""

    def replayed(self, calls: Calls) -> dict[str, Timing]:
        """Time a call."""
        timings = {}
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            timings[name] = Timing(*[(time.perf_counter() - start) * 1e6] * 3)
        return timings

    cold = called = waited = replayed

    def graphed(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return `call`."""
        return call

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Call, and return no bytes."""
        call()
        return 0

    def clear(self) -> None:
        """Do nothing: there are no graphs."""


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _timings(samples: Mapping[str, list[float]]) -> dict[str, Timing]:
    return {name: Timing(*np.percentile(us, [50, 20, 80]).tolist()) for name, us in samples.items()}
