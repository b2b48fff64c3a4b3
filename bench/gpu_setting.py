"""Where the GPU suites run: on a GPU, or dry, on the CPU with tiny shapes, so that every line of them is executed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.errors import TritonError

from bench.gpu_stopwatch import GraphStopwatch, Stopwatch, WallStopwatch
from bench.peers import WrongError

# These errors end a case and not its suite, because a GPU is lent for minutes and nobody can restart a suite. All of
# them are recorded, and a suite with a failed case ends with an error.
FAILURES = (
    WrongError,
    TritonError,
    RuntimeError,  # CUDA's and torch.compile's too
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    subprocess.SubprocessError,  # of compilers
    TypeError,
    ValueError,
)


def named(error: BaseException) -> str:
    """Return an error as one line for a record."""
    return f"{type(error).__name__}: {error}"[:500]


class Setting(NamedTuple):
    """What all suites share."""

    device: torch.device
    dtype: torch.dtype  # of serving and of the kernels
    precision: str  # its name
    half: torch.dtype  # of the kernels that take 16 bits alone
    compiler: str  # torch.compile's backend
    stopwatch: Stopwatch
    is_dry: bool


# One case of a suite: its name, and what measures it. A suite yields them in order of importance.
Case = tuple[str, Callable[[], dict[str, Any]]]
Suite = Callable[[Setting], Iterator[Case]]


def on_gpu() -> Setting:
    """Return the setting of a measurement."""
    device = torch.device("cuda", torch.cuda.current_device())
    import torch._dynamo.config as compiler  # slow to import

    compiler.recompile_limit = 64  # one function meets every network and batch
    return Setting(device, torch.bfloat16, "bf16", torch.bfloat16, "inductor", GraphStopwatch(device), False)


def dry() -> Setting:
    """Return the setting of a rehearsal, in float32 and float16: Triton's interpreter multiplies bfloat16 wrongly.

    Raises:
        RuntimeError: If Triton would compile.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET: wanted 1 before the start, to interpret the kernels")
    return Setting(torch.device("cpu"), torch.float32, "fp32", torch.float16, "aot_eager", WallStopwatch(), True)


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Set torch's precision of float32 products, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
