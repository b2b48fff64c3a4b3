"""Whole training steps through fixed masks, of kept weights alone, against dense ones.

A step is forward, backward and Adam of an MLP 1024-512-256-128-1, of two tasks in turn, with a gradient of x. "Dense"
has no masks at all, which favours it: torch's layers in float32, and under autocast in bfloat16, with fused Adam; the
faster one counts. So has "dense, masked", which is how masks are usually trained through: our `MaskedMLP`. sparseprop
(`pip install sparseprop`) has layers of single weights; its users step them by Adam. All calls of a number of threads
and a batch size run in one interleaved run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import record
from bench.cpu import block_mask, masked_mlp, uniform_mask
from lt4rec_sparse import Mask, MaskedAdam, MaskedMLP
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.nn import CompressedMLP
from lt4rec_sparse.recsys.tables import table
from lt4rec_sparse.stopwatch import interleaved

WIDTHS = (1024, 512, 256, 128)
TASKS = ("ctr", "cvr")
KINDS: dict[str, Callable[..., Mask]] = {"blocks": block_mask, "single weights": uniform_mask}
SPARSITIES, BATCHES, THREADS = (0.5, 0.8, 0.9, 0.95), (1024, 4096), (1, 2)
DENSE = ("dense fp32", "dense bf16")


class Dense(nn.Module):
    """The same network without masks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(k, n) for k, n in zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTHS[-1], 1) for task in TASKS})

    def forward(self, x: Tensor, task: str) -> Tensor:
        """Return logits."""
        for layer in self.layers:
            x = layer(x).relu()
        logits: Tensor = self.heads[task](x)
        return logits


def run(is_short: bool = False) -> None:
    """Measure and write `results/sparse_training.json`, beside the records of other processors."""
    if is_short:
        print(table_of({"cases": measured((1,), (70,), (0.9,), rounds=1, round_us=1.0)}))
        return
    cases = measured(THREADS, BATCHES, SPARSITIES, rounds=9, round_us=60_000.0)
    machine = record.machine()
    records = record.read("sparse_training") if (record.RESULTS / "sparse_training.json").exists() else {}
    records[machine["processor"]] = {"machine": machine, "engine": cpu.isa(), "memory": memory(), "cases": cases}
    record.write("sparse_training", records)
    print(table_of(records[machine["processor"]]))


def measured(
    threads: tuple[int, ...], batches: tuple[int, ...], sparsities: tuple[float, ...], rounds: int, round_us: float
) -> list[dict[str, Any]]:
    """Return a case per number of threads and batch size: medians in microseconds of one step of each way."""
    cases, before = [], torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for batch in batches:
                calls = _calls(batch, sparsities)
                timed = interleaved(calls, rounds, round_us)
                medians = {way: timing.median_us / len(TASKS) for way, timing in timed.items()}
                cases.append({"threads": count, "batch": batch, "step_us": medians})
    finally:
        torch.set_num_threads(before)
    return cases


def memory() -> list[dict[str, Any]]:
    """Return bytes of values, gradients and moments of the hidden layers' weights, over those of dense ones."""
    found = []
    dense = 4 * 4 * sum(k * n for k, n in zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
    for kind, sparsity in ((kind, sparsity) for kind in KINDS for sparsity in SPARSITIES):
        mlp = CompressedMLP.from_masked(_masked(kind, sparsity, 1))
        optimizer = MaskedAdam(mlp)
        x = torch.randn(8, WIDTHS[0])
        _step(mlp, partial(optimizer.step, "ctr"), optimizer.zero_grad, x, torch.ones(8), nullcontext, "ctr")
        parts = [part for layer in mlp.layers for part in layer.parts]  # type: ignore[union-attr]
        state = optimizer.state_of(parts)
        held = sum(t.nbytes for part in parts for t in (part, part.grad, *state[part]) if t is not None)
        found.append({"kind": kind, "density": 1 - sparsity, "share_of_dense": held / dense})
    return found


def table_of(measured: dict[str, Any]) -> str:
    """Return how many times as fast as the faster dense step ours is: rows ways and sparsities, columns cases."""
    cases = measured["cases"]
    ways = [way for way in cases[0]["step_us"] if way not in DENSE]
    rows = [[way, *(_ratio(case, way) for case in cases)] for way in ways]
    header = [f"batch {case['batch']:,}, threads {case['threads']}" for case in cases]
    dense = ["dense, in ms", *(f"{_dense(case) / 1000:.1f}" for case in cases)]
    return table(["times as fast as dense", *header], [*rows, dense])


def _ratio(case: dict[str, Any], way: str) -> str:
    return f"{_dense(case) / case['step_us'][way]:.1f}" if way in case["step_us"] else ""


def _dense(case: dict[str, Any]) -> float:
    return min(case["step_us"][way] for way in DENSE)


def _masked(kind: str, sparsity: float, tasks: int = 2) -> MaskedMLP:
    return masked_mlp({task: KINDS[kind](sparsity, seed, WIDTHS) for seed, task in enumerate(TASKS[:tasks])}, 0)


def _calls(batch: int, sparsities: tuple[float, ...]) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, WIDTHS[0], generator=generator)
    labels = (torch.rand(batch, generator=generator) < 0.3).float()
    calls: dict[str, Callable[[], object]] = {}
    for way, autocast in zip(DENSE, (nullcontext, _bfloat16), strict=True):
        model = Dense()
        adam = torch.optim.Adam(model.parameters(), fused=True)
        calls[way] = partial(_steps, model, dict.fromkeys(TASKS, adam.step), adam.zero_grad, x, labels, autocast)
    for kind in KINDS:
        for sparsity in sparsities:
            masked = _masked(kind, sparsity)
            mlp = CompressedMLP.from_masked(masked)
            optimizer = MaskedAdam(mlp)
            steps: dict[str, Callable[[], object]] = {task: partial(optimizer.step, task) for task in TASKS}
            calls[f"{kind}, {sparsity:.0%}"] = partial(_steps, mlp, steps, optimizer.zero_grad, x, labels, nullcontext)
            if kind == "blocks" and sparsity == sparsities[0]:
                of_masked = MaskedAdam(masked)
                steps = {task: partial(of_masked.step, task) for task in TASKS}
                calls["dense, masked"] = partial(_steps, masked, steps, of_masked.zero_grad, x, labels, nullcontext)
            elif kind != "blocks" and (peer := _sparseprop(masked)) is not None:
                adam = torch.optim.Adam(peer.parameters(), fused=True)
                theirs: dict[str, Callable[[], object]] = dict.fromkeys(TASKS, adam.step)
                way = f"sparseprop, {sparsity:.0%}"
                calls[way] = partial(_steps, peer, theirs, adam.zero_grad, x, labels, nullcontext)
    return calls


def _bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def _steps(
    model: nn.Module,
    steps: dict[str, Callable[[], object]],
    zero_grad: Callable[[], object],
    x: Tensor,
    labels: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    for task, step in steps.items():
        _step(model, step, zero_grad, x, labels, autocast, task)


def _step(
    model: nn.Module,
    step: Callable[[], object],
    zero_grad: Callable[[], object],
    x: Tensor,
    labels: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
    task: str,
) -> None:
    zero_grad()
    inputs = x.detach().requires_grad_()
    with autocast():
        logits = model(inputs, task)[:, 0]
    torch.autograd.backward(F.binary_cross_entropy_with_logits(logits.float(), labels))
    step()


class Peer(nn.Module):
    """sparseprop's layers, one network per task: it has no tasks."""

    def __init__(self, masked: MaskedMLP, layer_of: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict()
        for task in TASKS:
            layers = []
            for layer in masked.masked_layers():
                plain = nn.Linear(layer.in_features, layer.out_features)
                plain.weight.data = layer.weight.detach() * layer.mask(task)
                layers += [layer_of(plain), nn.ReLU()]
            self.networks[task] = nn.Sequential(*layers, nn.Linear(WIDTHS[-1], 1))

    def forward(self, x: Tensor, task: str) -> Tensor:
        """Return logits."""
        logits: Tensor = self.networks[task](x)
        return logits


def _sparseprop(masked: MaskedMLP) -> Peer | None:
    try:
        layers = importlib.import_module("sparseprop.modules").SparseLinear
    except ImportError:
        return None
    return Peer(masked, layers.from_dense)
