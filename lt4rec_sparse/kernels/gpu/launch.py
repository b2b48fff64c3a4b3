"""A kernel launch as a value, the tile in which it runs, and the one rule that chooses the tile.

Each kernel lists its tiles in a table beside it, so that every entry can be compiled ahead of time for a GPU that is
absent (`tests/kernels/gpu/ahead_of_time.py`): without spills for two tasks on sm_80 and sm_90, and with wgmma on sm_90
where the tile has at least 64 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

MULTIPROCESSORS = 132  # of an H100 or H200; an A100 has 108
BUSY = 0.75  # of the multiprocessors: a smaller tile would occupy the rest, but reads its operands more often
FEW_ROWS = 32  # up to this number only the bytes of the weights count
MOST_SHARED_BYTES = 163 * 1024  # of a block on sm_80; the tables keep within it


class Tile(NamedTuple):
    """How a kernel cuts its work: M rows, N out_features, K in_features of one program, or of one step of its loop."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int  # of the software pipeline


class Launch(NamedTuple):
    """One launch of a Triton kernel, with everything that its compilation depends on.

    `arguments` holds tensors, integers, and None for a pointer that the kernel does not read.
    """

    kernel: Any  # a triton.jit function
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]  # the kernel's tl.constexpr parameters
    warps: int
    stages: int

    def run(self) -> None:
        """Launch on the device of the tensors; an empty grid launches nothing."""
        if 0 in self.grid:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run()
        else:
            self._run()

    def _run(self) -> None:
        # Fusing of multiplications and additions is on by default up to Triton 3.9 and off from 3.10.
        self.kernel[self.grid](
            **self.arguments,
            **self.constants,
            num_warps=self.warps,
            num_stages=self.stages,
            enable_fp_fusion=True,
        )


def choose_tile(tiles: Sequence[Tile], rows: int, programs: Callable[[Tile], int], busy: float = BUSY) -> Tile:
    """Choose from a kernel's table, which lists the largest tile first and, last, one for few rows alone.

    The choice is the largest tile whose `programs`, for the `rows` of one task, keep the share `busy` of the GPU's
    multiprocessors busy, since a large tile reads its operands from the L2 cache less often; if there is none, the
    smallest. Chosen by arithmetic, not yet by a clock.
    """
    if rows <= FEW_ROWS:
        return tiles[-1]
    return next((tile for tile in tiles[:-1] if programs(tile) >= MULTIPROCESSORS * busy), tiles[-2:][0])


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    """Name the row of a table for operands of `dtype`; `precision` ("ieee" or "tf32") matters only in float32.

    "16" is float16 and bfloat16, "fp32" is IEEE arithmetic on the ordinary cores, "tf32" is TF32 on the tensor cores.
    """
    if dtype != torch.float32:
        return "16"
    return "fp32" if precision == "ieee" else "tf32"


@cache
def has_room(device: torch.device) -> bool:
    """Tell whether every tile fits into a block's shared memory on a device, as on an A100, H100 or B200.

    The consumer chips of the same generations have 99 KB. Under the interpreter everything fits.
    """
    if device.type != "cuda":
        return True
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks the field
    return bool(properties.shared_memory_per_block_optin >= MOST_SHARED_BYTES)
