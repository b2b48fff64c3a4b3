"""From a frozen network to its first scores: time until it is ready, bytes that it holds, and what a call costs.

The MLP is the paper's shape, 1024-512-256-128-1, with uniform random masks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import record
from bench.cpu import IN_FEATURES, masked_mlp, uniform_mask
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.network import PRECISIONS
from lt4rec_sparse.nn import MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.stopwatch import interleaved, one_thread

TASKS = (1, 2)
SPARSITIES = (0.8, 0.9)
BATCHES = (1, 256)


def run() -> Path:
    """Measure everything and write `results/frozen.json`, beside the records of other processors."""
    machine = record.machine()
    path = record.RESULTS / "frozen.json"
    records = record.read("frozen") if path.exists() else {}
    with torch.inference_mode():
        records[machine["processor"]] = {"machine": machine, "engine": cpu.isa(), **measured()}
    return record.write("frozen", records)


def measured(**settings: Any) -> dict[str, Any]:
    """Return all figures; `settings` are the stopwatch's."""
    with one_thread():
        ready = [_ready(*case, **settings) for case in product(TASKS, SPARSITIES, PRECISIONS, BATCHES)]
        return {"ready": ready, "call": _call(**settings)}


def _ready(tasks: int, sparsity: float, precision: str, batch: int, **settings: Any) -> dict[str, Any]:
    """Time prepacking the one layout that a batch size needs, and compare its bytes with the canonical ones."""
    masks = {f"task{t}": uniform_mask(sparsity, t) for t in range(tasks)}
    frozen = freeze(masked_mlp(masks, 0))
    assert isinstance(frozen, SparseMLP)
    network = frozen.calibrated(torch.randn(256, IN_FEATURES, generator=torch.Generator().manual_seed(0))).network
    prepack = partial(cpu.prepack, network, precision, batch=batch)
    (layout,) = cpu.describe(prepack()).layouts
    timing = interleaved({"prepack": prepack}, **settings)["prepack"]
    return {
        "tasks": tasks,
        "sparsity": sparsity,
        "precision": precision,
        "batch": batch,
        "layout": layout,
        "canonical_bytes": network.nbytes,
        "prepacked_bytes": prepack().numel(),
        **timing._asdict(),
    }


def _call(**settings: Any) -> dict[str, Any]:
    """Time one row through a small MLP: the module, its executor, the engine alone, and torch's share of the time."""
    frozen = freeze(MaskedMLP(16, (8,))).eval()
    assert isinstance(frozen, SparseMLP)
    x, out = torch.randn(1, 16), torch.empty(1, 1)
    prepacked = cpu.Prepacked(cpu.prepack(frozen.network, "fp32", ("tables",)))
    calls: dict[str, Callable[[], object]] = {
        "module": partial(frozen, x),
        "score_into": partial(frozen.score_into, x, out),
        "engine": partial(prepacked.run_plain, x, out, 1, 0),
        "torch.empty": partial(torch.empty, 1, 1),
        "an empty module": partial(_Empty(), x),
    }
    timings = interleaved(calls, **settings)
    return {name: timing._asdict() for name, timing in timings.items()}


class _Empty(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x
