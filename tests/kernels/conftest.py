"""Every test of the engine's results runs once for each of its kernels; cuBLAS sums in float32."""

from collections.abc import Iterator

import pytest
import torch
from kernels.networks import KERNELS, Kernel

from lt4rec_sparse.kernels import cpu


@pytest.fixture(autouse=True)
def sums_in_float32() -> Iterator[None]:
    """Keep cuBLAS from adding the parts of a sum in 16 bits, torch's default, which exceeds every bound."""
    matmul = torch.backends.cuda.matmul
    settings = [f"allow_{name}_reduced_precision_reduction" for name in ("bf16", "fp16")]
    before = [getattr(matmul, setting) for setting in settings]
    for setting in settings:
        setattr(matmul, setting, False)
    yield
    for setting, value in zip(settings, before, strict=True):
        setattr(matmul, setting, value)


@pytest.fixture(params=KERNELS, ids="-".join)
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    with cpu.forced_isa(request.param.isa):
        yield request.param
