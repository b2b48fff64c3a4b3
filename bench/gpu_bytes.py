"""The bytes of two tasks' weights on a GPU in each layout, against a dense bfloat16 copy per task; needs no GPU."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench import record
from lt4rec_sparse.kernels.gpu.block_sparse import BlockWeight

WIDTHS = (1024, 512, 256, 128)
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
OVERLAP = 0.6  # intersection over union


def run() -> Path:
    """Count the bytes of the hidden layers of the benchmark MLP and write the record."""
    cases = [_case(sparsity) for sparsity in SPARSITIES]
    mlp = "-".join(str(width) for width in WIDTHS)
    return record.write("gpu_bytes", {"machine": record.machine(), "mlp": mlp, "overlap": OVERLAP, "cases": cases})


def _case(sparsity: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    sizes = dict.fromkeys(("premasked", "block32"), 0)
    for k, n in pairwise(WIDTHS):
        weight = torch.randn(n, k, generator=generator)
        sizes["premasked"] += 2 * n * k * torch.bfloat16.itemsize
        coarse = _overlapping((n // 32, k // 32), 1 - sparsity, OVERLAP, generator)
        masks = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)
        packed = BlockWeight.from_dense(weight, masks, 32, torch.bfloat16)
        sizes["block32"] += sum(part.nbytes for part in packed if isinstance(part, torch.Tensor))
    return {"sparsity": sparsity, "bytes": sizes}


def _overlapping(shape: tuple[int, int], density: float, overlap: float, generator: torch.Generator) -> torch.Tensor:
    """Draw two masks `[2, *shape]` of a density, whose intersection over union is `overlap`."""
    both = 2 * density * overlap / (1 + overlap)
    draw = torch.rand(shape, generator=generator)
    alone = density - both
    return torch.stack([draw < density, (draw < both) | ((draw >= density) & (draw < density + alone))])
