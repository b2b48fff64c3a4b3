"""A kernel launch as a value: made from tensors and run, or compiled ahead of time for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_SHARED_BYTES = 163 * 1024  # of a block on sm_80, which the tables keep within


class Launch(NamedTuple):
    """One launch of a Triton kernel, with everything that its compilation depends on.

    `arguments` holds tensors, integers, tuples of integers, and None for a pointer that the kernel does not read.
    """

    kernel: Any  # a triton.jit function
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]  # the kernel's tl.constexpr parameters
    warps: int
    stages: int

    def run(self) -> None:
        """Launch on the device of the tensors; nothing happens where the grid is empty."""
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


@cache
def has_room(device: torch.device) -> bool:
    """Tell whether every tile of the tables fits into a block's shared memory there: as on an A100, H100 or B200.

    The consumer chips of the same generations have 99 KB. Interpreted, everything fits.
    """
    if device.type != "cuda":
        return True
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks the field
    return bool(properties.shared_memory_per_block_optin >= MOST_SHARED_BYTES)
