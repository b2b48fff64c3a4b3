"""Serving on a GPU: a measured plan for each batch size, and a CUDA graph that replays it.

    plan = measure_plan(frozen)
    print(plan)
    served = GpuMLP(frozen, plan)
    scores = served(x)

A launch costs the host some microseconds, and the kernels of a small batch take no longer than that. So each bucket of
batch sizes is captured once, over buffers that stay, and a request is one copy, one replay and one copy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property, partial
from itertools import pairwise
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from lt4rec_sparse.formats import SharedWeight
from lt4rec_sparse.network import DenseLayer, FrozenNetwork, SparseLayer
from lt4rec_sparse.nn.compaction import Compacted, compact
from lt4rec_sparse.nn.masked import task_index
from lt4rec_sparse.nn.plan import (
    GPU_PRECISIONS,
    BatchPlan,
    Chain,
    Contestant,
    Machine,
    Plan,
    Segment,
    check_fits,
    fastest_chain,
    network_of,
    ranked,
)
from lt4rec_sparse.nn.sparse import ALL, SparseMLP
from lt4rec_sparse.stopwatch import Timing, interleaved

BUCKETS = (1, 64, 256, 1024, 2048, 8192)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORTH_COMPACTING = 0.95  # of the multiply-adds left; what drops less than a twentieth is the dense network again
REPEATS = 10  # of a chain in one timed graph, so that waiting for the GPU is a tenth of what it would be

ROUNDS_ALONE, ROUNDS = 5, 15  # of timing; the former only propose what the latter compare

# Whole networks by the ways that they are named after, and those that may help them out; and the best mixture of all.
# Where two are as fast, the first is chosen: it takes the least memory.
_DENSE = ("dense", "apart", "tail dense", "tail branches")
_NETWORKS = {
    "masked": (("masked", "tail masked"), ()),
    "premasked": (("premasked", "tail premasked"), ()),
    "compact": (("compact",), ()),
    "2:4": (("2:4",), (*_DENSE, "tail premasked")),
    "block": (("block16", "block32", "block64"), (*_DENSE, "tail premasked")),
    "dense": (_DENSE, ()),
}


class GraphExecutor:
    """Runs a frozen network on a GPU, from CUDA graphs.

    For inference alone: autograd and `torch.compile` do not see the graphs. Requests may come from several threads and
    streams, and run one after another. A request goes to the smallest bucket that holds it, and is cut where it is
    larger than all.

    In 16 bits weights and the activations between layers are rounded; sums are float32 (as far as
    `torch.backends.cuda.matmul` lets cuBLAS), and so are logits.

    Args:
        network: The frozen network, on the CPU.
        plan: What `measure_plan` found for it, or for one like it, on such a GPU; its batch sizes are the buckets. None
            takes the chain that is predicted to be fastest.
        precision: Without a plan: "bf16", "fp16" or "fp32".
        batch_sizes: Without a plan: the buckets, ascending.
        device: The GPU.

    Attributes:
        network: The frozen network.
        precision: The dtype of weights and activations: "bf16", "fp16" or "fp32".
        batch_sizes: The buckets.
        device: The GPU, with its index.

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
        _check(precision, batch_sizes)
        ways = Ways(network, precision, device)
        if plan is not None:
            check_fits(ways.paths, plan, ways.machine)
        self.network = network
        self.precision = precision
        self.batch_sizes = tuple(batch_sizes)
        self._lock = Lock()
        chains = [ways.default] * len(batch_sizes) if plan is None else [_winner(batch) for batch in plan.batches]
        networks = {chain: ways.network(chain) for chain in chains}
        self.prepacked_nbytes = ways.nbytes(networks)
        # Graphs of one stream share cuBLAS' workspace: those of one executor run one after another, others have another.
        self._stream = _stream(device)
        self._done = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buckets = [_Graphed(networks[c], b, self._stream) for b, c in zip(batch_sizes, chains, strict=True)]
        self.device = self._buckets[0].x.device

    @torch.inference_mode()
    def run(self, x: Tensor, out: Tensor) -> None:
        """Write every task's outputs side by side into `out`.

        Args:
            x: `[rows, in_features]`, of any floating dtype, on the GPU or off it.
            out: `[rows, outputs]`, float32, on the GPU or off it.
        """
        largest = self.batch_sizes[-1]
        with self._lock:
            if self._done is not None:  # a request on another stream may still read the buffers
                self._done.wait(torch.cuda.current_stream(self.device))
            for start in range(0, x.shape[0], largest):
                part = x[start : start + largest]
                bucket = self._buckets[bisect_left(self.batch_sizes, part.shape[0])]
                bucket.run(part, out[start : start + largest])
            if self._done is not None:
                self._done.record(torch.cuda.current_stream(self.device))


class GpuMLP(nn.Module):
    """A frozen MLP that serves from a GPU by a `GraphExecutor`: takes the place of the `SparseMLP` it is made from.

    Args:
        mlp: The frozen MLP. It is left as it is.
        plan: As of `GraphExecutor`, as are the others.
        precision: Without a plan: "bf16", "fp16" or "fp32".
        batch_sizes: Without a plan: the buckets, ascending.
        device: The GPU.

    Raises:
        InputError: As `GraphExecutor`.
        ValueError: As `GraphExecutor`.
    """

    def __init__(
        self,
        mlp: SparseMLP,
        plan: Plan | None = None,
        precision: str = "bf16",
        batch_sizes: Sequence[int] = BUCKETS,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        self.executor = GraphExecutor(frozen_network(mlp), plan, precision, batch_sizes, device)
        self.plan = plan
        self.in_features = mlp.in_features
        self.out_features = mlp.out_features
        self.tasks = mlp.tasks
        self.hidden = mlp.hidden
        self.heads = mlp.heads
        self.codes = mlp.codes
        self.nbytes = mlp.nbytes
        self.precision = self.executor.precision

    @torch.inference_mode()
    def forward(self, x: Tensor, task: str | None = None) -> Tensor:
        """Score every task, or return one task's part of it.

        Args:
            x: `[..., in_features]`, of any floating dtype, on the GPU or off it.
            task: The task's name; None returns every task. All are computed in any case.

        Returns:
            `[..., tasks * out_features]`, float32, on the GPU, or `[..., out_features]` of the task.

        Raises:
            ValueError: If the last dimension is another, or there is no such task.
        """
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., {self.in_features}]")
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        scores = torch.empty(rows.shape[0], self.out_features, device=self.executor.device)
        self.executor.run(rows, scores)
        y = scores if x.dim() == 2 else scores.reshape(*x.shape[:-1], self.out_features)
        return y if task is None else y.chunk(len(self.tasks), dim=-1)[task_index(self.tasks, task)]

    def score_into(self, x: Tensor, out: Tensor) -> None:
        """Write every task's scores into `out`.

        Args:
            x: `[batch, in_features]`.
            out: `[batch, tasks * out_features]`, float32, on any device.

        Raises:
            ValueError: If a shape or dtype is another.
        """
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [batch, {self.in_features}]")
        wanted = (len(x), self.out_features)
        if out.shape != wanted or out.dtype != torch.float32:
            raise ValueError(f"out: got {out.dtype} {tuple(out.shape)}, wanted torch.float32 {wanted}")
        self.executor.run(x, out)

    @property
    def prepacked_nbytes(self) -> int:
        """Bytes of the weights as the buckets' chains read them."""
        return sum(self.executor.prepacked_nbytes.values())

    def extra_repr(self) -> str:
        """Show tasks, precision and buckets."""
        return (
            f"tasks={', '.join(self.tasks)}, {self.precision}, batch {', '.join(map(str, self.executor.batch_sizes))}"
        )


def frozen_network(mlp: SparseMLP) -> FrozenNetwork:
    """Return what a frozen module computes, as a value."""
    if not mlp.hidden:  # a `SparseLinear`, whose tasks read one weight
        return FrozenNetwork((SparseLayer(*next(iter(mlp.heads.values()))),))
    heads = {task: DenseLayer(head.weight.to_dense(ALL), *head[1:]) for task, head in mlp.heads.items()}
    return FrozenNetwork(tuple(SparseLayer(*layer) for layer in mlp.hidden), heads)


def measure_plan(
    mlp: SparseMLP,
    batch_sizes: Sequence[int] = BUCKETS,
    precision: str = "bf16",
    device: torch.device | str = "cuda",
) -> Plan:
    """Measure the ways to run a frozen MLP on this GPU, weights warm in its L2 cache.

    Every way to run a layer, or a tail of layers, is timed alone; from these comes the fastest chain of each kind and
    of all kinds together, and these chains are timed end to end in one interleaved run: the Triton kernels from each
    layout, block-sparse, 2:4 and compacted where the masks allow them, and "dense", the opponent that all must beat:
    masks multiplied in beforehand, the first layers of all tasks in one product, then batched products, or each task's
    in turn, or in branches of the graph; heads padded; CUDA graphs. The winner is slower than that by noise at most.
    A way whose kernel does not fit on this GPU is left out.

    Args:
        mlp: The frozen MLP.
        batch_sizes: Ascending; the buckets of the `GpuMLP` that serves by it.
        precision: "bf16", "fp16" or "fp32".
        device: The GPU.

    Returns:
        The plan: printable, `save`d and `load`ed like a CPU's.

    Raises:
        ValueError: If there is no such precision, or the batch sizes do not ascend from 1.
    """
    device = torch.device(device)
    _check(precision, batch_sizes)
    ways = Ways(frozen_network(mlp), precision, device)
    batches = tuple(_measure_batch(ways, batch) for batch in batch_sizes)
    return Plan(ways.machine, network_of(ways.paths), precision, batches)


class Ways:
    """The runs and chains that a frozen network can be prepacked for, each prepacked once.

    Args:
        network: The frozen network.
        precision: The dtype of weights and activations: "bf16", "fp16" or "fp32".
        device: Where they run.

    Raises:
        ValueError: If heads end in different activations.
    """

    def __init__(self, network: FrozenNetwork, precision: str, device: torch.device) -> None:
        # Imported when first needed, and here alone: CPU builds of torch have no Triton.
        from lt4rec_sparse.kernels.gpu import network as kernels

        self._kernels: Any = kernels
        self.layers = kernels.layers_of(network)
        self.precision = precision
        self.dtype = DTYPES[precision]
        self.device = device
        self.paths: Any = _Paths(network)
        self._runs: dict[Segment, Any] = {}

    @property
    def machine(self) -> Machine:
        """What a plan's timings depend on, besides the network."""
        return Machine(self._kernels.engine(self.device, self.dtype), 0, str(torch.__version__))

    @cached_property
    def compacted(self) -> Compacted:
        """The network without what is dead in it."""
        return compact(self.paths)

    @property
    def default(self) -> Chain:
        """The chain that is predicted to be fastest."""
        return self._chain(self._kernels.default_chain(self.layers, self.dtype, self.device))

    @cached_property
    def segments(self) -> Chain:
        """Every run that the layers allow."""
        is_smaller = self.compacted.multiply_adds <= WORTH_COMPACTING * self.compacted.multiply_adds_before
        return self._chain(self._kernels.spans(self.layers, self.dtype, self.device, is_smaller))

    def run(self, segment: Segment) -> Callable[[Tensor], Tensor]:
        """Return one run, prepacked."""
        if segment not in self._runs:
            span = (segment.kernel, segment.first, segment.last)
            compacted = self.compacted if segment.kernel == "compact" else None
            parts = (self.layers, span, self.dtype, self.device, compacted)
            self._runs[segment] = self._kernels.prepack_run(*parts)
        run: Callable[[Tensor], Tensor] = self._runs[segment]
        return run

    def network(self, chain: Chain) -> Any:
        """Return the runs of a chain as one network."""
        runs = tuple(self.run(segment) for segment in chain)
        return self._kernels.GpuNetwork(runs, self.layers[0].masked.shape[2], self.dtype)

    def nbytes(self, chains: Iterable[Chain]) -> dict[str, int]:
        """Bytes of the weights that chains read, by the kernel that reads them; a run of several chains counts once."""
        total: dict[str, int] = {}
        for segment in dict.fromkeys(segment for chain in chains for segment in chain):
            total[segment.kernel] = total.get(segment.kernel, 0) + self._kernels.nbytes(self.run(segment))
        return total

    def examples(self, batch: int) -> list[Tensor]:
        """Draw activations as they enter each layer: `[tasks, batch, in_features]`, or those of x."""
        generator = torch.Generator().manual_seed(0)
        examples = []
        for i, layer in enumerate(self.layers):
            tasks, _, k = layer.masked.shape
            h = torch.randn(1 if i == 0 else tasks, batch, k, generator=generator).to(self.device, self.dtype)
            examples.append(h if i == 0 else h.relu_())
        return examples

    def fits(self, segment: Segment, h: Tensor) -> bool:
        """Tell whether a run's kernel can be launched on this GPU, by launching it."""
        return bool(self._kernels.fits(self.run(segment), h))

    def _chain(self, spans: Any) -> Chain:
        return tuple(Segment(kernel, self.precision, first, last) for kernel, first, last in spans)


class _Paths:
    """A frozen network as `compact`, `check_fits` and `network_of` read it: each task's layers, input first."""

    def __init__(self, network: FrozenNetwork) -> None:
        self.tasks, self.in_features = network.tasks, network.in_features
        heads = {}
        for task, head in network.heads.items():
            kept = torch.ones_like(head.weight, dtype=torch.bool)
            heads[task] = [(SparseLayer(SharedWeight.from_dense(head.weight, {ALL: kept}), *head[1:]), ALL)]
        self._layers = [[*((layer, task) for layer in network.hidden), *heads.get(task, [])] for task in network.tasks]

    def _paths(self) -> list[list[tuple[SparseLayer, str]]]:
        return self._layers


class _Graphed:
    """One network at one batch size, as a CUDA graph over its own buffers; without a GPU the network itself.

    The rows beyond a request's are those of an earlier request: no row reads another.
    """

    def __init__(self, network: Any, batch: int, stream: torch.cuda.Stream | None) -> None:
        self.batch = batch
        self.x = torch.zeros(batch, network.padded, dtype=network.dtype, device=network.device)
        self._replay, self._scores = _captured(partial(network, self.x), stream)

    def run(self, x: Tensor, out: Tensor) -> None:
        """Score up to `batch` rows."""
        self.x[: len(x), : x.shape[1]].copy_(x)
        self._replay()
        out.copy_(self._scores[: len(x)])


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


@cache
def _timing_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of all timing: torch hands out 32, in turn, and those of executors must not be among it."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _captured(
    call: Callable[[], Tensor], stream: torch.cuda.Stream | None, repeats: int = 1
) -> tuple[Callable[[], None], Tensor]:
    """Return what runs `call` again, and where its result then stands; without a stream there is no graph."""
    with torch.inference_mode():
        if stream is None:
            result = call()
            return partial(_again, call, result), result
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


def _again(call: Callable[[], Tensor], result: Tensor) -> None:
    result.copy_(call())


def _measure_batch(ways: Ways, batch: int) -> BatchPlan:
    examples = ways.examples(batch)
    segments = [segment for segment in ways.segments if ways.fits(segment, examples[segment.first])]
    # Alone they only propose chains: the verdict is the second measurement's, which takes longer.
    alone = _timed({s: partial(ways.run(s), examples[s.first]) for s in segments}, ways.device, ROUNDS_ALONE)
    chains = _chains({segment: timing.median_us for segment, timing in alone.items()})
    x = examples[0][0]
    ends = _timed({name: partial(ways.network(chain), x) for name, chain in chains.items()}, ways.device, ROUNDS)
    contestants = [Contestant(name, chain, ends[name]) for name, chain in chains.items()]
    return BatchPlan(batch, ranked(contestants), tuple(alone.items()))


def _timed(calls: Mapping[Any, Callable[[], Tensor]], device: torch.device, rounds: int) -> dict[Any, Timing]:
    """Time calls in interleaved rounds, on a GPU as graphs of several repetitions each."""
    if device.type != "cuda":
        return dict(zip(calls, interleaved(_named(calls), rounds=rounds, round_us=1.0).values(), strict=True))
    stream = _timing_stream(device)
    graphs = {key: _captured(call, stream, REPEATS)[0] for key, call in calls.items()}

    def waited(replay: Callable[[], None]) -> None:
        replay()
        torch.cuda.synchronize(device)

    timings = interleaved(_named({key: partial(waited, replay) for key, replay in graphs.items()}), rounds, 2_000.0)
    return {key: Timing(*(us / REPEATS for us in timing)) for key, timing in zip(calls, timings.values(), strict=True)}


def _named(calls: Mapping[Any, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    return {str(key): call for key, call in calls.items()}


def _chains(us: Mapping[Segment, float]) -> dict[str, Chain]:
    """Choose the ways through the network to time end to end, in the order that ties prefer; none stands twice."""
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


def _winner(batch: BatchPlan) -> Chain:
    return batch.contestants[0].chain


def _check(precision: str, batch_sizes: Sequence[int]) -> None:
    if precision not in GPU_PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, wanted one of {', '.join(GPU_PRECISIONS)}")
    if not batch_sizes or batch_sizes[0] < 1 or any(a >= b for a, b in pairwise(batch_sizes)):
        raise ValueError(f"batch_sizes: got {tuple(batch_sizes)}, wanted at least one, ascending from 1")
