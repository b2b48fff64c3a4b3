"""Cases for pytest-benchmark, one layer at a time, to compare two builds or two machines.

`pytest tests/test_benchmarks.py --benchmark-enable --benchmark-save=before`, then with `--benchmark-compare`. No
verdict: that is in the interleaved ratios of `python -m bench cpu`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Layer, assert_rounding, mlp_reference

from lt4rec_sparse import ops
from lt4rec_sparse.kernels import cpu

IN_FEATURES, OUT_FEATURES = 1024, 512
CODES = {"input_scale": 8 / 255, "input_zero_point": 128}  # of standard normal activations

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")


def sparse_layer(density: float) -> tuple[Layer, cpu.PackLayer]:
    """Return one random layer, dense and compressed."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(OUT_FEATURES, IN_FEATURES, generator=generator) < density
    weight = torch.randn(OUT_FEATURES, IN_FEATURES, generator=generator) * mask / IN_FEATURES**0.5
    bias = torch.randn(OUT_FEATURES, generator=generator)
    crow_indices = torch.nn.functional.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)).int()
    packed = cpu.PackLayer(crow_indices, mask.nonzero()[:, 1].int(), weight[mask], bias, IN_FEATURES, "relu", **CODES)
    return Layer(weight, bias, "relu"), packed


@pytest.mark.parametrize("density", [0.2, 0.1, 0.05])
@pytest.mark.parametrize("batch", [1, 8, 64, 256])
@pytest.mark.parametrize(
    ("precision", "path"),
    [("fp32", "tables"), ("fp32", "slices"), ("bf16", "tables"), ("bf16", "slices"), ("int8", "tables")],
)
def test_one_sparse_layer(benchmark: Any, precision: str, path: Any, batch: int, density: float) -> None:
    """One layer of the engine, one thread."""
    layer, packed = sparse_layer(density)
    prepacked = cpu.prepack([[packed]], precision)
    x = torch.randn(batch, IN_FEATURES, generator=torch.Generator().manual_seed(1))
    out = torch.empty(batch, OUT_FEATURES)
    benchmark.extra_info |= {"isa": cpu.isa(), "density": density}
    benchmark(cpu.sparse_mlp, x, prepacked, out, 1, path)
    if precision == "fp32":
        assert_rounding(out, mlp_reference(x, [layer]))


@pytest.mark.parametrize("batch", [256, 1024])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_masked_linear(benchmark: Any, direction: str, batch: int) -> None:
    """A layer in training, or both of its gradients."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT_FEATURES, IN_FEATURES, generator=generator, requires_grad=True)
    mask = torch.rand(OUT_FEATURES, IN_FEATURES, generator=generator) < 0.2
    x = torch.randn(batch, IN_FEATURES, generator=generator)
    if direction == "forward":
        benchmark(ops.masked_linear, x, weight.detach(), mask)
        return
    y = ops.masked_linear(x, weight, mask)
    dy = torch.randn_like(y)
    benchmark(torch.autograd.grad, y, weight, dy, retain_graph=True)
