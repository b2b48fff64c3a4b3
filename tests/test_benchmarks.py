"""Cases for pytest-benchmark, to compare two builds: `pytest tests/test_benchmarks.py --benchmark-enable`."""

import pytest
import torch

from bench.cpu import IN_FEATURES, masked_mlp
from lt4rec_sparse import freeze


@pytest.mark.parametrize("sparsity", [0.8, 0.9])
@pytest.mark.parametrize("batch", [1, 32, 256])
def test_sparse_mlp(benchmark, batch, sparsity):
    sparse = freeze(masked_mlp(sparsity, seed=0), sigmoid=True)
    x = torch.randn(batch, IN_FEATURES, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        y = benchmark(sparse, x)
    assert y.shape == (batch, 1)
