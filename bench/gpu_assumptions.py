"""What the design of the GPU kernels assumes of the machine, measured: nodes, launches, small products, bandwidths."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.gpu_setting import Case, Setting, float32_precision

GEMM_ROWS, DRY_GEMM_ROWS = (256, 2048, 8192), (4,)
GEMMS = ((1024, 512), (1024, 1024), (512, 256), (256, 128))  # in_features, out_features; 1024 are two tasks stacked
DRY_GEMMS = ((16, 8),)
L2_BYTES = 20_000_000  # less than half of an H200's L2, so that it stays there
L2_PASSES = 20  # of one launch, so that its start and end do not count
HBM_BYTES = 4 << 30
PEAK_SIDE = 8192
DRY_BYTES, DRY_SIDE = 4096, 16
BLOCK = 4096


@triton.jit
def nothing_kernel(x_ptr):
    """Do next to nothing."""
    tl.store(x_ptr, 0.0)


@triton.jit
def read_kernel(x_ptr, sums_ptr, length, passes, programs: tl.constexpr, block: tl.constexpr):
    """Read all of x several times and write one float per program, so that reading takes the time."""
    total = tl.zeros((block,), dtype=tl.float32)
    for p in range(0, passes):
        # Every pass reads a different part, and past the L1 cache, which could hold a program's own.
        offsets = (tl.program_id(0) + p) % programs * block + tl.arange(0, block)
        for start in range(0, length, programs * block):
            total += tl.load(x_ptr + start + offsets, mask=start + offsets < length, other=0.0, cache_modifier=".cg")
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))


def suite(setting: Setting) -> Iterator[Case]:
    """Yield the cases, in order of importance."""
    yield "device", partial(facts, setting)
    yield "graph node and launches", partial(_launches, setting)
    yield "L2 read", partial(_l2, setting)
    yield "memory copy", partial(_copy, setting)
    yield "peak bf16", partial(_peak, setting, setting.dtype, "highest")
    for rows in DRY_GEMM_ROWS if setting.is_dry else GEMM_ROWS:
        yield f"products of {rows} rows", partial(_products, setting, rows)
    yield "peak tf32", partial(_peak, setting, torch.float32, "high")
    yield "peak fp32", partial(_peak, setting, torch.float32, "highest")


def facts(setting: Setting) -> dict[str, Any]:
    """Return the machine and its software."""
    versions = {"torch": str(torch.__version__), "triton": triton.__version__, "cuda": torch.version.cuda}
    if setting.is_dry:
        return {"name": "none, a rehearsal", **versions}
    properties = torch.cuda.get_device_properties(setting.device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        **_driver(),
        **versions,
    }


def _driver() -> dict[str, str]:
    """Ask nvidia-smi for what torch does not know; return nothing without it."""
    asked = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    first = done.stdout.splitlines()[0] if done.stdout else ""
    return dict(zip(asked, (answer.strip() for answer in first.split(",")), strict=False))


def _launches(setting: Setting) -> dict[str, Any]:
    """Time graphs of 100 and of 200 kernels, whose difference is 100 nodes, and a launch of Triton and of torch."""
    x = torch.zeros(1, device=setting.device)
    counts = (1, 2) if setting.is_dry else (100, 200)

    def triton_launch() -> None:
        nothing_kernel[(1,)](x)

    def many(launch: Callable[[], object], count: int) -> None:
        for _ in range(count):
            launch()

    launches = {"triton": triton_launch, "torch": x.zero_, "fill": partial(x.fill_, 1.0)}
    chains = {f"{n} {c}": partial(many, launch, c) for n, launch in launches.items() for c in counts}
    graphs = setting.stopwatch.replayed(chains)
    fewer, more = counts
    node_us = {n: (graphs[f"{n} {more}"][0] - graphs[f"{n} {fewer}"][0]) / (more - fewer) for n in launches}
    called = setting.stopwatch.called(launches)
    return {
        "node_us": node_us,
        "launch_us": {name: timing._asdict() for name, timing in called.items()},
        "graphs": {name: timing._asdict() for name, timing in graphs.items()},
    }


def _l2(setting: Setting) -> dict[str, Any]:
    """Read a buffer that stays in the L2 cache."""
    length = (DRY_BYTES if setting.is_dry else L2_BYTES) // 4
    x = torch.ones(length, device=setting.device)
    programs = 2 if setting.is_dry else 4 * torch.cuda.get_device_properties(setting.device).multi_processor_count
    sums = torch.empty(programs, device=setting.device)
    block = 64 if setting.is_dry else BLOCK

    passes = 2 if setting.is_dry else L2_PASSES

    def read() -> None:
        read_kernel[(programs,)](x, sums, length, passes, programs=programs, block=block)

    read()
    counted = sums.double().sum().item()
    if counted != passes * length:
        raise ValueError(f"sum: got {counted}, wanted {passes * length}")
    timing = setting.stopwatch.replayed({"read": read})["read"]
    return {"bytes": x.nbytes, "gbps": passes * x.nbytes / timing.median_us / 1e3, **timing._asdict()}


def _copy(setting: Setting) -> dict[str, Any]:
    """Copy more than any cache holds; counted are the bytes read and those written."""
    x = torch.ones((DRY_BYTES if setting.is_dry else HBM_BYTES) // 4, device=setting.device)
    y = torch.empty_like(x)
    timing = setting.stopwatch.replayed({"copy": partial(y.copy_, x)})["copy"]
    return {"bytes": 2 * x.nbytes, "gbps": 2 * x.nbytes / timing.median_us / 1e3, **timing._asdict()}


def _peak(setting: Setting, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """Multiply large random matrices: zeros would draw less power, and so run faster."""
    side = DRY_SIDE if setting.is_dry else PEAK_SIDE
    a, b = (_random(setting, side, side, dtype=dtype) for _ in range(2))
    with float32_precision(precision):
        timing = setting.stopwatch.replayed({"product": partial(torch.mm, a, b)})["product"]
    return {"tflops": 2 * side**3 / timing.median_us / 1e6, **timing._asdict()}


def _products(setting: Setting, rows: int) -> dict[str, Any]:
    """Time cuBLAS on one layer's product: bare, with bias and ReLU in its epilogue, and two tasks' as one batch."""
    calls: dict[str, Callable[[], object]] = {}
    for k, n in DRY_GEMMS if setting.is_dry else GEMMS:
        x, weight = _random(setting, 2, rows, k), _random(setting, 2, n, k)
        bias = _random(setting, n)
        calls[f"{k}->{n}"] = partial(torch.mm, x[0], weight[0].T)
        calls[f"{k}->{n} bias, relu"] = partial(torch._addmm_activation, bias, x[0], weight[0].T)
        calls[f"{k}->{n} twice"] = partial(torch.bmm, x, weight.transpose(1, 2))
    timings = setting.stopwatch.replayed(calls)
    return {"products": {name: timing._asdict() for name, timing in timings.items()}}


def _random(setting: Setting, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*shape, device=setting.device, dtype=dtype or setting.dtype)
