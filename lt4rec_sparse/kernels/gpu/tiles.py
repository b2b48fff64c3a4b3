"""Which tiles the Triton kernels run in, by shape and dtype: a table, so that each can be compiled ahead of time.

Chosen by counting, not yet by a clock: the largest tile whose programs still fill the GPU, for a large one reads x and
the weights from the L2 cache less often; and 16 rows for a batch so small that the weights' bytes are all that counts.
Every entry compiles without spills for two tasks on sm_80 and sm_90 (`tests/kernels/gpu/ahead_of_time.py`); on sm_90
the entries of at least 64 rows run on wgmma.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MULTIPROCESSORS = 132  # of an H100 or H200; an A100 has 108
# From here on one kernel that masks and casts, then cuBLAS: decoding costs 4 to 5 instructions a weight and row tile,
# and cuBLAS has the better main loop. Predicted, to be measured.
CUBLAS_ROWS = 4096


class Tile(NamedTuple):
    """How a kernel cuts its work: M rows, N out_features, K in_features of one program, or of one step of its loop."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int  # of the software pipeline


# Largest first. "fp32" is IEEE arithmetic on the ordinary cores, "16" is float16 and bfloat16, "tf32" as it says.
FORWARD = {
    "16": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(16, 32, 128, 4, 4)),
    "tf32": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(16, 32, 64, 4, 3)),
    "fp32": (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2)),
}
# Of compressed values: offsets stand for 128 columns, and values come through registers, not through the pipeline. No
# more threads than a tile has mask words, 4 BLOCK_N: of fewer, Triton repeats loads and popcounts for a second layout.
COMPRESSED = {
    "16": (Tile(128, 64, 128, 8, 2), Tile(64, 32, 128, 4, 2), Tile(16, 16, 128, 2, 2)),
    "tf32": (Tile(64, 64, 128, 8, 1), Tile(32, 32, 128, 4, 1), Tile(16, 16, 128, 2, 1)),
    # A product in IEEE arithmetic holds 128 columns of its operands in registers: one output a thread, or it spills.
    "fp32": (Tile(16, 16, 128, 8, 1),),
}
# N is what the loop runs over.
DGRAD = {
    "16": (Tile(128, 64, 128, 8, 3), Tile(64, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
    "tf32": (Tile(64, 32, 64, 4, 3), Tile(32, 32, 64, 4, 3), Tile(16, 32, 64, 4, 3)),
    "fp32": (Tile(64, 32, 64, 8, 2), Tile(32, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2)),
}
# M is what the loop runs over.
WGRAD = {
    "16": (Tile(32, 128, 128, 8, 4), Tile(64, 64, 64, 4, 3)),
    "tf32": (Tile(32, 64, 64, 4, 3), Tile(32, 32, 64, 4, 3)),
    "fp32": (Tile(32, 64, 64, 8, 2), Tile(32, 32, 32, 4, 2)),
}


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    """Name the rows of the tables for operands of `dtype`; `precision` is "ieee" or "tf32", and counts in float32."""
    if dtype != torch.float32:
        return "16"
    return "fp32" if precision == "ieee" else "tf32"


def forward_tile(rows: int, columns: int, dtype: torch.dtype, precision: str, compressed: bool = False) -> Tile:
    """Choose for `rows` of one task, and `columns` output features of all tasks together."""
    tiles = (COMPRESSED if compressed else FORWARD)[arithmetic(dtype, precision)]
    return _filling(tiles, rows, columns, "block_n")


def dgrad_tile(rows: int, columns: int, dtype: torch.dtype, precision: str) -> Tile:
    """Choose for `dx [rows, columns]`."""
    tiles = DGRAD[arithmetic(dtype, precision)]
    return _filling(tiles, rows, columns, "block_k")


def wgrad_tile(out_features: int, in_features: int, dtype: torch.dtype, precision: str) -> Tile:
    """Choose for `dW [out_features, in_features]`; what does not fill the GPU is split over the rows."""
    tiles = WGRAD[arithmetic(dtype, precision)]
    return tiles[0] if min(out_features, in_features) > tiles[1].block_n else tiles[1]


def wgrad_splits(rows: int, programs: int, tile: Tile) -> int:
    """Choose into how many shares a weight gradient's rows are cut: enough to fill the GPU, none under 8 steps."""
    return max(1, min(MULTIPROCESSORS // max(programs, 1), rows // (8 * tile.block_m)))


def _filling(tiles: tuple[Tile, ...], rows: int, columns: int, side: str) -> Tile:
    """Return the largest tile, `side` of it columns, whose programs fill the GPU; the last is for few rows alone."""
    if rows <= 32:
        return tiles[-1]
    for tile in tiles[:-1]:
        # Three quarters of the GPU at least: a smaller tile would fill it and read twice as much.
        if -(-rows // tile.block_m) * -(-columns // getattr(tile, side)) >= MULTIPROCESSORS * 3 // 4:
            return tile
    return tiles[-2:][0]
