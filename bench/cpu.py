"""The sparse CPU engine against dense torch fp32: one task, MLP 1024-512-256-128-1 with a sigmoid, uniform masks.

Dense torch stands for the strongest dense opponent in fp32 here: weights with their zeros in place, `F.linear` and an
in-place ReLU under `inference_mode`. Both sides read row-major rows and write row-major scores, so the engine's
transposes are inside its time. A case is timed only after it passed the oracle's rounding bound.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import record
from lt4rec_sparse import Mask, MaskedMLP, freeze
from lt4rec_sparse.ops import cpu_engine
from lt4rec_sparse.stopwatch import interleaved
from tests.oracle import Layer, assert_rounding, mlp_reference

IN_FEATURES, HIDDEN = 1024, (512, 256, 128)
BATCHES = (1, 8, 32, 64, 256, 1024, 4096)
SPARSITIES = (0.5, 0.8, 0.9, 0.95)


def run(seed: int = 0) -> None:
    """Measure every batch, sparsity and thread count; print the table and write `results/cpu.json`."""
    cases = []
    threads_before = torch.get_num_threads()
    for threads in sorted({1, threads_before}):
        torch.set_num_threads(threads)
        for sparsity in SPARSITIES:
            mlp = masked_mlp(sparsity, seed)
            cases += [
                {"threads": threads, "sparsity": sparsity, "batch": batch, **_case(mlp, batch, seed)}
                for batch in BATCHES
            ]
    torch.set_num_threads(threads_before)
    net = f"{IN_FEATURES}-{'-'.join(map(str, HIDDEN))}-1"
    path = record.write(
        "cpu", {"machine": record.machine(), "engine": cpu_engine(), "mlp": net, "seed": seed, "cases": cases}
    )
    _print(cases, f"{net}, fp32, engine {cpu_engine()}: dense torch / sparse, medians of interleaved rounds")
    Console().print(path)


def masked_mlp(sparsity: float, seed: int) -> MaskedMLP:
    """Return the paper's MLP with a uniform random mask of exactly this sparsity in every layer."""
    torch.manual_seed(seed)
    mlp = MaskedMLP(IN_FEATURES, HIDDEN)
    shapes = mlp.mask().shapes
    nnz = {name: round(rows * columns * (1 - sparsity)) for name, (rows, columns) in shapes.items()}
    mlp.set_mask(Mask.random(shapes, nnz, torch.Generator().manual_seed(seed)))
    return mlp


def _case(mlp: MaskedMLP, batch: int, seed: int) -> dict[str, Any]:
    x = torch.randn(batch, IN_FEATURES, generator=torch.Generator().manual_seed(seed))
    hidden = ((layer.weight.detach() * layer.mask(), layer.bias.detach()) for layer in mlp.masked_layers())
    layers = [Layer(weight, bias, "relu") for weight, bias in hidden]
    head = mlp.heads["task"]
    layers.append(Layer(head.weight.detach(), head.bias.detach(), "sigmoid"))
    sparse = freeze(mlp, sigmoid=True)
    assert_rounding(sparse(x), mlp_reference(x, layers))
    with torch.inference_mode():
        timings = interleaved({"sparse": partial(sparse, x), "dense": partial(_dense, x, layers)})
    return {name: timing._asdict() for name, timing in timings.items()}


def _dense(x: Tensor, layers: list[Layer]) -> Tensor:
    for layer in layers[:-1]:
        x = torch.relu_(F.linear(x, layer.weight, layer.bias))
    return torch.sigmoid_(F.linear(x, layers[-1].weight, layers[-1].bias))


def _print(cases: list[dict[str, Any]], title: str) -> None:
    table = Table("threads", "sparsity", *(f"batch {batch}" for batch in BATCHES), title=title)
    for threads in sorted({case["threads"] for case in cases}):
        for sparsity in SPARSITIES:
            row = [c for c in cases if c["threads"] == threads and c["sparsity"] == sparsity]
            table.add_row(str(threads), f"{sparsity:.2f}", *(f"{ratio(case):.2f}" for case in row))
    Console(width=140).print(table)


def ratio(case: dict[str, Any]) -> float:
    """Return how many times faster sparse was than dense."""
    return float(case["dense"]["median_us"] / case["sparse"]["median_us"])
