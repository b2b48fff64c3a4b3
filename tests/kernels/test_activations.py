"""Activations: each within the rounding of its operations, for every number, on every way through the engine."""

import itertools

import pytest
import torch
from kernels.networks import BLOCK_KERNELS, KERNELS, LEFT_ACTIVATIONS, Kernel, MaskedLayer, exact_reference, prepack
from oracle import ACTIVATIONS, UNIT_ROUNDOFF, Bounded, activated, assert_rounding, mlp_reference

from lt4rec_sparse import network
from lt4rec_sparse.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")

OPERANDS = {"fp32": None, "bf16": torch.bfloat16}


def numbers() -> torch.Tensor:
    """Return numbers of every size and sign, and many near 0, `[n, 1]`."""
    sizes = torch.logspace(-30, 30, 600, base=2)
    return torch.cat([torch.linspace(-120, 120, 4001), sizes, -sizes, torch.zeros(1), -torch.zeros(1)])[:, None]


def test_the_tables_of_activations_agree():
    assert tuple(network.ACTIVATIONS) == tuple(ACTIVATIONS)
    assert {name for name, _ in LEFT_ACTIVATIONS} == set(ACTIVATIONS) - {"none", "relu"}
    with_one = {name for name, slope in LEFT_ACTIVATIONS if isinstance(slope, torch.Tensor) or slope}
    assert with_one == set(network.SLOPED) | set(network.SLOPES)


@pytest.mark.parametrize("activation", LEFT_ACTIVATIONS, ids=str)
@pytest.mark.parametrize("way", [*KERNELS, *BLOCK_KERNELS], ids="-".join)
def test_every_activation_is_within_its_rounding(way: Kernel, activation: tuple[str, network.Slope]) -> None:
    name, slope = activation
    layer = MaskedLayer(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), None, name, 120 / 127, 128, slope)
    layouts = ("blocks",) if way.path == "blocks" else cpu.UNSTRUCTURED
    x = numbers()
    with cpu.forced_isa(way.isa):
        prepacked = prepack([[layer]], way.precision, layouts)
        y = way.run(x, prepacked)
        assert way.run(torch.tensor([[torch.nan]]), prepacked).isnan().all()
    if way.precision == "int8":
        exact = exact_reference(x, [[layer._replace(activation="none")]], "int8", way.path == "blocks").double()
        assert_rounding(
            y, activated(Bounded(exact, torch.zeros_like(exact)), name, slope, UNIT_ROUNDOFF[torch.float32])
        )
    else:
        assert_rounding(y, mlp_reference(x, [layer.dense()], operands=OPERANDS[way.precision]))


@pytest.mark.parametrize("activation", LEFT_ACTIVATIONS, ids=str)
def test_torchs_own_are_within_the_same_rounding(activation: tuple[str, network.Slope]) -> None:
    name, slope = activation
    z = numbers()
    y = network.ACTIVATIONS[name](z.clone(), slope)
    exact = Bounded(z.double(), torch.zeros_like(z, dtype=torch.float64))
    assert_rounding(y, activated(exact, name, slope, UNIT_ROUNDOFF[torch.float32]))


def test_every_isa_computes_the_same_bits() -> None:
    for (name, slope), precision in itertools.product(LEFT_ACTIVATIONS, cpu.PRECISIONS):
        layer = MaskedLayer(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), None, name, 120 / 127, 128, slope)
        results = []
        for isa in cpu.supported_isas():
            with cpu.forced_isa(isa):
                results.append(Kernel(precision, "auto", isa).run(numbers(), prepack([[layer]], precision)))
        for result in results[1:]:
            assert torch.equal(result.view(torch.int32), results[0].view(torch.int32)), (name, slope, precision)
