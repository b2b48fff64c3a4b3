"""How many bytes a pruned MLP takes on disk and in memory: counted, not timed, so equal on every machine.

The case is the MLP of two KuaiRand tasks that the granularity experiment timed: random masks that keep as many weights
in every layer as its tickets, and overlap like these.
"""

from __future__ import annotations

from typing import Any

import torch

from bench import experiments, record
from lt4rec_sparse import FrozenNetwork, Mask, MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.network import PRECISIONS

EXPERIMENT, ROW = "kuairand_pure_granularity", "weight_last"
LAYOUTS = dict.fromkeys(PRECISIONS, cpu.UNSTRUCTURED) | {"int8": ("tables", "slices")}
IN_FEATURES = 1258  # 37 fields of 16, and their 666 dot products


def run() -> str:
    """Count, write `results/memory.json` and return its path."""
    return str(record.write("memory", measured()))


def measured() -> dict[str, Any]:
    """Return the bytes of the network in files, and in each layout that the engine makes of it."""
    results = experiments.read(EXPERIMENT)
    masks = next(r["masks"] for r in results["records"] if r["row"] == ROW and r["seed"] == 0)
    network = _network(masks, results["training"]["hidden"])
    return {
        "experiment": EXPERIMENT,
        "row": ROW,
        "in_features": network.in_features,
        "widths": list(network.widths),
        "tasks": list(network.tasks),
        "canonical_bytes": network.nbytes,
        "layout_bytes": {
            precision: {layout: cpu.prepack(network, precision, (layout,)).numel() for layout in layouts}
            for precision, layouts in LAYOUTS.items()
        },
    }


def _network(masks: dict[str, Any], hidden: list[int]) -> FrozenNetwork:
    generator = torch.Generator().manual_seed(0)
    first, second = masks["layer_density"]
    mlp = MaskedMLP(IN_FEATURES, hidden, tasks=(first, second))
    kept: dict[str, dict[str, torch.Tensor]] = {first: {}, second: {}}
    for layer, (rows, columns) in mlp.mask(first).shapes.items():
        size = rows * columns
        one, other = (round(masks["layer_density"][task][layer] * size) for task in (first, second))
        overlap = masks["overlap"][layer]
        common = round((one + other) * overlap / (1 + overlap))
        order = torch.randperm(size, generator=generator)
        for task, start, stop in ((first, 0, one), (second, one - common, one - common + other)):
            kept[task][layer] = torch.zeros(size, dtype=torch.bool)
            kept[task][layer][order[start:stop]] = True
            kept[task][layer] = kept[task][layer].view(rows, columns)
    for task, layers in kept.items():
        mlp.set_mask(Mask(layers), task)
    frozen = freeze(mlp, sigmoid=True)
    assert isinstance(frozen, SparseMLP)
    return frozen.calibrated(torch.rand(16, IN_FEATURES, generator=generator)).network
