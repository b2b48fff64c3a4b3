"""Serving on a GPU: a measured plan for each batch size, and a CUDA graph that replays it.

A launch costs the host some microseconds, and the kernels of a small batch take no longer than that. So each bucket of
batch sizes is captured once, over buffers that stay, and a request is one copy, one replay and one copy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lt4rec_sparse.network import FrozenNetwork
from lt4rec_sparse.nn.plan.plan import (
    GPU_PRECISIONS,
    BatchPlan,
    Chain,
    NetworkFacts,
    Plan,
    Segment,
    TimedChain,
    TimedSegment,
    check_asked,
    check_fits,
    fastest_chain,
    ranked,
)
from lt4rec_sparse.nn.ways import GpuNetwork, Ways
from lt4rec_sparse.stopwatch import Timing, interleaved

BUCKETS = (1, 64, 256, 1024, 2048, 8192)
REPEATS = 10  # of a chain in one timed graph, so that waiting for the GPU is a tenth of what it would be

ROUNDS_ALONE, ROUNDS = 5, 15  # of timing; the former only propose what the latter compare

# Whole networks by the ways that they are named after, and those that may help them out; and the best mixture of all.
# Where two are as fast, the first is chosen: it takes the least memory.
_DENSE = ("dense", "tail dense", "tail branches")
_NETWORKS = {
    "tail premasked": (("tail premasked",), ()),
    "compact": (("compact",), ()),
    "2:4": (("2:4",), (*_DENSE, "tail premasked")),
    "block": (("block16", "block32", "block64"), (*_DENSE, "tail premasked")),
    "dense": (_DENSE, ()),
}


class GraphExecutor:
    """Runs a frozen network on a GPU, from CUDA graphs.

    Autograd and `torch.compile` do not see the graphs. Requests may come from several threads and streams, and run one
    after another. A request goes to the smallest bucket that holds it, and is cut where it is larger than all.

    In 16 bits weights and the activations between layers are rounded; sums are float32 (as far as
    `torch.backends.cuda.matmul` lets cuBLAS), and so are logits.

    Args:
        network: The frozen network, on the CPU.
        plan: What `measure_plan` found for it, or for one like it, on such a GPU; its batch sizes are the buckets. None
            takes the chain that is predicted to be fastest.
        precision: Without a plan: "bf16", "fp16" or "fp32".
        batch_sizes: Without a plan: the buckets, ascending.
        device: The GPU.

    Raises:
        InputError: If the plan is of another network, GPU, torch or Triton.
        ValueError: If there is no such precision, the batch sizes do not ascend from 1, or the plan or the heads ask
            for what the kernels cannot do.
    """

    def __init__(
        self,
        network: FrozenNetwork,
        plan: Plan | None = None,
        precision: str = "bf16",
        batch_sizes: Sequence[int] = BUCKETS,
        device: torch.device | str = "cuda",
    ) -> None:
        device = torch.device(device)
        if plan is not None:
            precision, batch_sizes = plan.precision, [batch.batch for batch in plan.batches]
        check_asked(precision, GPU_PRECISIONS, batch_sizes)
        ways = Ways(network, precision, device)
        if plan is not None:
            check_fits(network, plan, ways.machine)
        self.network, self.plan, self.precision = network, plan, precision
        self.batch_sizes = tuple(batch_sizes)
        chains = [ways.default] * len(batch_sizes) if plan is None else [x.chains[0].chain for x in plan.batches]
        networks = {chain: ways.network(chain) for chain in chains}
        self._nbytes = ways.nbytes(chains)
        self._lock = Lock()
        # Graphs of one stream share cuBLAS' workspace: those of one executor run one after another, and each executor
        # has a stream of its own.
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._done = None if stream is None else torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._buckets = [_Graphed(networks[c], b, stream) for b, c in zip(batch_sizes, chains, strict=True)]
        self.device = self._buckets[0].x.device

    def __reduce__(self) -> tuple[type[GraphExecutor], tuple[Any, ...]]:
        """Copy the arguments: a copy captures graphs of its own."""
        return type(self), (self.network, self.plan, self.precision, self.batch_sizes, self.device)

    @torch.inference_mode()
    def run(self, x: Tensor, out: Tensor) -> None:
        """Write every task's outputs, side by side (`ops.Executor.run`).

        `x [rows, in_features]`, of any floating dtype, and `out` may be on the GPU or off it.

        Raises:
            TypeError: If `x` is of no floating dtype.
            ValueError: If a shape or dtype is wrong.
        """
        if x.dim() != 2 or x.shape[1] != self.network.in_features:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [rows, {self.network.in_features}]")
        if not x.is_floating_point():
            raise TypeError(f"x: got {x.dtype}, wanted a floating dtype")
        wanted = (len(x), self.network.outputs)
        if out.shape != wanted or out.dtype != torch.float32:
            raise ValueError(f"out: got {out.dtype} {tuple(out.shape)}, wanted torch.float32 {wanted}")
        largest = self.batch_sizes[-1]
        with self._lock:
            if self._done is not None:  # a request on another stream may still read the buffers
                self._done.wait(torch.cuda.current_stream(self.device))
            for start in range(0, len(x), largest):
                part = x[start : start + largest]
                bucket = self._buckets[bisect_left(self.batch_sizes, len(part))]
                bucket.run(part, out[start : start + largest])
            if self._done is not None:
                self._done.record(torch.cuda.current_stream(self.device))

    def kernel_for(self, rows: int) -> str:
        """Name what runs, whatever the number of rows."""
        return "CUDA graphs"

    @property
    def prepacked_nbytes(self) -> dict[str, int]:
        """Kernel -> bytes of the weights that it reads on the GPU."""
        return dict(self._nbytes)


def measure_plan(
    network: FrozenNetwork,
    batch_sizes: Sequence[int] = BUCKETS,
    precision: str = "bf16",
    device: torch.device | str = "cuda",
) -> Plan:
    """Measure the ways (`nn.ways`) to run a frozen network on this GPU, weights warm in its L2 cache.

    Every way to run a layer, or a tail of layers, is timed alone; from these comes the fastest chain of each kind and
    of all kinds together, and these chains are timed end to end in one interleaved run. One of them is "dense", the
    opponent that all must beat: the winner is slower than that by noise at most. A way whose kernel does not fit on
    this GPU is left out.

    Args:
        network: The frozen network.
        batch_sizes: Ascending; the buckets of the `GraphExecutor` that serves by it.
        precision: "bf16", "fp16" or "fp32".
        device: The GPU.

    Raises:
        ValueError: If there is no such precision, or the batch sizes do not ascend from 1.
    """
    device = torch.device(device)
    check_asked(precision, GPU_PRECISIONS, batch_sizes)
    ways = Ways(network, precision, device)
    batches = tuple(_measure_batch(ways, batch) for batch in batch_sizes)
    return Plan(ways.machine, NetworkFacts.of(network), precision, batches)


class _Graphed:
    """One network at one batch size, as a CUDA graph over its own buffers; without a GPU the network itself.

    The rows beyond a request's are those of an earlier request: no row reads another.
    """

    def __init__(self, network: GpuNetwork, batch: int, stream: torch.cuda.Stream | None) -> None:
        self.batch = batch
        self.x = torch.zeros(batch, network.padded, dtype=network.dtype, device=network.device)
        self._replay, self._scores = _captured(partial(network, self.x), stream)

    def run(self, x: Tensor, out: Tensor) -> None:
        """Score up to `batch` rows."""
        self.x[: len(x), : x.shape[1]].copy_(x)
        self._replay()
        out.copy_(self._scores[: len(x)])


@cache
def _timing_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of all timing: torch hands out 32, in turn, and those of executors must not be among it."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _captured(
    call: Callable[[], Tensor], stream: torch.cuda.Stream | None, repeats: int = 1
) -> tuple[Callable[[], object], Tensor]:
    """Return what runs `call` again, and where its result then stands; without a stream there is no graph."""
    with torch.inference_mode():
        if stream is None:
            result = call()
            return lambda: result.copy_(call()), result
        with torch.cuda.device(stream.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # compiles, and makes cuBLAS' handle and workspace of this stream
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads of a live server may allocate meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(repeats):
                    result = call()
        return graph.replay, result


def _measure_batch(ways: Ways, batch: int) -> BatchPlan:
    examples = ways.examples(batch)
    segments = [segment for segment in ways.segments if ways.fits(segment, examples[segment.first])]
    # Alone they only propose chains: the verdict is the second measurement's, which takes longer.
    alone = _timed({s: partial(ways.run(s), examples[s.first]) for s in segments}, ways.device, ROUNDS_ALONE)
    chains = _chains({segment: timing.median_us for segment, timing in alone.items()})
    x = examples[0][0]
    ends = _timed({name: partial(ways.network(chain), x) for name, chain in chains.items()}, ways.device, ROUNDS)
    timed = [TimedChain(name, chain, ends[name]) for name, chain in chains.items()]
    return BatchPlan(batch, ranked(timed), tuple(map(TimedSegment, alone, alone.values())))


def _timed(calls: Mapping[Any, Callable[[], Tensor]], device: torch.device, rounds: int) -> dict[Any, Timing]:
    """Time calls in interleaved rounds, on a GPU as graphs of several repetitions each."""
    if device.type != "cuda":
        return interleaved(calls, rounds, round_us=1.0)
    stream = _timing_stream(device)
    graphs = {key: _captured(call, stream, REPEATS)[0] for key, call in calls.items()}

    def waited(replay: Callable[[], object]) -> None:
        replay()
        torch.cuda.synchronize(device)

    timings = interleaved({key: partial(waited, replay) for key, replay in graphs.items()}, rounds, 2_000.0)
    return {key: Timing(*(us / REPEATS for us in timing)) for key, timing in timings.items()}


def _chains(us: Mapping[Segment, float]) -> dict[str, Chain]:
    """Choose the ways through the network to time end to end, in the order that ties prefer, each once."""
    layers = range(1 + max(segment.last for segment in us))
    chains: dict[str, Chain] = {}
    for name, (own, others) in _NETWORKS.items():
        allowed = {segment for segment in us if segment.kernel in (*own, *others)}
        covered = {layer for segment in allowed for layer in range(segment.first, segment.last + 1)}
        # A layer that nothing of the kind runs, such as the heads, is dense.
        allowed |= {s for s in us if s.kernel == "dense" and s.first in set(layers) - covered}
        chain = fastest_chain({segment: us[segment] for segment in allowed})
        if any(segment.kernel in own for segment in chain):
            chains[name] = chain
    mixed = fastest_chain(us)
    return chains if mixed in chains.values() else {**chains, "mixed": mixed}
