"""Every test of the engine's results runs once for each of its kernels."""

from collections.abc import Iterator

import pytest
from kernels.networks import KERNELS, Kernel

from lt4rec_sparse.kernels import native


@pytest.fixture(params=KERNELS, ids="-".join)
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    if request.param.isa not in native.supported_isas():
        pytest.skip(f"this machine does not run {request.param.isa}")
    with native.forced_isa(request.param.isa):
        yield request.param
