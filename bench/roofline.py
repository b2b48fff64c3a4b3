"""What one core of this machine reaches, to compare a kernel's time with: bytes read and operations done per second.

Every figure is the best round of a library call that comes close to the machine's limit, because a disturbance can
only make a round slower. The limit itself is a little higher.

- Read bandwidth: BLAS's dot product over two vectors, ascending, again and again: two 64-byte loads for every fused
  multiply-add, and nothing stored. A call reads 8 KB of each, so that it stays in one thread; the cost of the call is
  part of the figure, which matters for L1 alone. A cache is read over a third of its size, because it also holds other
  data and that of the core's other hardware thread; the last cache over four times the size of the one before it,
  because other tenants of a rented machine fill the rest. DRAM is read over four times the last cache.
- Floating point: `torch.mm` of two square matrices. fp32 is what vector multiply-adds reach; bf16 uses AMX where there
  is one. The two hardware threads of a core share both limits, so the figure includes what the other thread does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lt4rec_sparse.stopwatch import one_thread

DOT = 2048  # floats of a vector in one call: two of 8 KB fit a third of L1, and BLAS needs more to start threads
READ_BYTES = 400_000_000  # in one timed call, about 2 ms in L1
SIZES = (256, 512, 1024, 2048)  # of the square matrices
PRODUCT_S = 0.01  # a product that takes this long is large enough; bf16 at 2048 takes minutes without SIMD
ROUNDS = 7  # on a shared machine, some of them are undisturbed


class Roofline(NamedTuple):
    """One core; gbps is 1e9 bytes per second, gflops 1e9 multiplications and additions per second."""

    read_gbps: dict[str, float]  # "L1", "L2", "L3" and so on, then "DRAM"
    working_set_bytes: dict[str, int]  # over which each was read
    fp32_gflops: float
    bf16_gflops: float


def roofline() -> Roofline:
    """Measure this machine with one thread; takes some seconds, and four times the last cache in memory."""
    caches = cache_bytes()
    sets = {name: size // 3 for name, size in caches.items()}
    *_, before, last = caches
    sets |= {last: min(sets[last], 4 * caches[before]), "DRAM": 4 * caches[last]}
    with one_thread():
        return Roofline(
            {name: read_gbps(size) for name, size in sets.items()}, sets, gflops(torch.float32), gflops(torch.bfloat16)
        )


def cache_bytes() -> dict[str, int]:
    """Return the size of every data cache of the first core, as Linux reports it: `{"L1": 49152, ...}`."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            sizes[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return sizes


def read_gbps(working_set: int) -> float:
    """Return the bandwidth of reading `working_set` bytes over and over; 16 KB at least."""
    dots = max(1, working_set // (2 * 4 * DOT))
    passes = max(1, READ_BYTES // (2 * 4 * DOT * dots))
    a, b = np.ones((dots, 1, DOT), np.float32), np.ones((dots, DOT, 1), np.float32)
    # A broadcast axis has stride 0: the same bytes again, without a call from Python.
    again = np.broadcast_to(a, (passes, *a.shape)), np.broadcast_to(b, (passes, *b.shape))
    y = np.empty((passes, dots, 1, 1), np.float32)
    return (a.nbytes + b.nbytes) * passes / _best_s(lambda: np.matmul(*again, out=y)) / 1e9


def gflops(dtype: torch.dtype) -> float:
    """Return what `torch.mm` reaches with torch's threads, on the smallest of `SIZES` that takes `PRODUCT_S`."""
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        a, b = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
        torch.mm(a, b)  # oneDNN generates code in the first call
        start = time.perf_counter()
        torch.mm(a, b)
        if time.perf_counter() - start >= PRODUCT_S:
            break
    return 2 * size**3 / _best_s(lambda: torch.mm(a, b)) / 1e9


def _best_s(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
