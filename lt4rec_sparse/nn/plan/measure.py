"""Measuring a plan on the CPU: every run of layers in every allowed precision, against dense torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lt4rec_sparse import ops
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.network import PRECISIONS, FrozenNetwork
from lt4rec_sparse.nn.dense import dense_kernels
from lt4rec_sparse.nn.plan.executor import Run, follow, make_run
from lt4rec_sparse.nn.plan.plan import (
    DENSE_KERNELS,
    BatchPlan,
    Chain,
    NetworkFacts,
    Plan,
    Segment,
    TimedChain,
    TimedSegment,
    check_asked,
    fastest_chain,
    ranked,
    this_machine,
)
from lt4rec_sparse.stopwatch import interleaved

BATCH_SIZES = (1, 8, 64, 256, 1024)


def measure(network: FrozenNetwork, batch_sizes: Sequence[int] = BATCH_SIZES, precision: str = "fp32") -> Plan:
    """Measure a frozen network on this machine, with torch's current thread count, weights warm in the cache.

    Every run of neighbouring layers is timed in the engine, the whole network in each layout of the engine, and every
    layer dense; from these comes the best mixture, and then all chains through the network are timed end to end in one
    interleaved run.

    Example:
        >>> from lt4rec_sparse.nn import MaskedMLP, freeze
        >>> plan = measure(freeze(MaskedMLP(8, hidden=(4, 2))).network, batch_sizes=(1,))
        >>> plan.batches[0].chains[0].timing.median_us > 0
        True

    Args:
        network: The frozen network; calibrated, if int8 is allowed.
        batch_sizes: Ascending; those that will be served, or near them.
        precision: The lowest allowed: "fp32" allows itself alone, "bf16" both, "int8" all three.

    Raises:
        ValueError: If the batch sizes do not ascend from 1, there is no such precision, or a network that is not
            calibrated is to run in int8.
    """
    check_asked(precision, PRECISIONS, batch_sizes)
    if precision == "int8" and network.quantization is None:
        raise ValueError("network: got one without quantisation parameters, wanted a calibrated one for int8")
    runs = {segment: make_run(network, segment) for segment in _candidates(network, precision)}
    batches = tuple(_measure_batch(network, runs, batch, precision) for batch in batch_sizes)
    return Plan(this_machine(), NetworkFacts.of(network), precision, batches)


def _candidates(network: FrozenNetwork, precision: str) -> Iterator[Segment]:
    """Yield what is timed alone: every run of layers in the engine, all layers in each layout, every layer dense.

    Neighbours in the engine are one call, and save the transposes between them; dense neighbours save nothing.
    """
    layers = network.depth
    for allowed in PRECISIONS[: PRECISIONS.index(precision) + 1]:
        layouts = ops.layouts(network, allowed)
        for layout in layouts if len(layouts) > 1 else ():  # of one layout there is nothing to choose
            yield Segment(layout, allowed, 0, layers - 1)
        if ops.cpu_engine() != "reference":
            for first in range(layers):
                for last in range(first, layers):
                    yield Segment("sparse", allowed, first, last)
        for kernel in dense_kernels(allowed):
            for layer in range(layers if allowed == "fp32" else layers - 1):
                yield Segment(kernel, allowed, layer, layer)


def _measure_batch(network: FrozenNetwork, runs: Mapping[Segment, Run], batch: int, precision: str) -> BatchPlan:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, network.in_features, generator=generator)
    inputs: list[Sequence[Tensor]] = [[x]]
    for width in network.widths[:-1]:
        h = torch.randn(batch, len(network.tasks) * width, generator=generator).relu_()
        inputs.append(h.chunk(len(network.tasks), dim=1))
    with torch.inference_mode(), ops.without_autocast(x):
        # These only propose a mixture: the verdict is the second measurement's, which takes longer.
        calls = {segment: partial(run, inputs[segment.first]) for segment, run in runs.items()}
        alone = interleaved(calls, rounds=5, round_us=2_000)
        chains = _chains({segment: timing.median_us for segment, timing in alone.items()}, precision)
        ends = interleaved(
            {
                name: partial(follow, [runs[segment] for segment in chain], len(network.tasks), x)
                for name, chain in chains.items()
            }
        )
    timed = [TimedChain(name, chain, ends[name]) for name, chain in chains.items()]
    return BatchPlan(batch, ranked(timed), tuple(map(TimedSegment, alone, alone.values())))


def _chains(us: Mapping[Segment, float], precision: str) -> dict[str, Chain]:
    """Choose the chains to time end to end, in the order that ties prefer; none appears twice."""
    subsets = {}
    for i, allowed in enumerate(PRECISIONS[: PRECISIONS.index(precision) + 1]):
        subsets[f"sparse {allowed}"] = [s for s in us if s[:2] == ("sparse", allowed)]
        if dense_kernels(allowed):
            is_allowed = PRECISIONS[: i + 1]
            subsets[f"dense {allowed}"] = [s for s in us if s.kernel in DENSE_KERNELS and s.precision in is_allowed]
        for layout in cpu.UNSTRUCTURED:
            subsets[f"{layout} {allowed}"] = [s for s in us if s[:2] == (layout, allowed)]
    subsets["mixed"] = list(us)
    chains: dict[str, Chain] = {}
    for name, subset in subsets.items():
        chain = fastest_chain({segment: us[segment] for segment in subset})
        if chain and chain not in chains.values():
            chains[name] = chain
    return chains
