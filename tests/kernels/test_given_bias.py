"""Biases that come with a call, in place of those of the layers that read x: the same sums, on every path."""

from __future__ import annotations

import pytest
import torch
from kernels.networks import BLOCK_KERNELS, KERNELS, Kernel, pack_together, random_block_mask, random_layer, random_mask
from oracle import assert_exact
from torch import Tensor

from lt4rec_sparse.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")

WIDTHS = (131, 70, 33)


def packed_tasks(kernel: Kernel, is_shared: bool, depth: int, integers: bool = True) -> list[list[cpu.PackLayer]]:
    """Two tasks; where their first layers are one weight, each keeps most of it."""
    draw = random_block_mask if kernel.path == "blocks" else random_mask
    tasks = []
    for t in range(2):
        layers = []
        for i, out_features in enumerate((*WIDTHS[1:], 3)[:depth]):
            seed = 10 * i + (0 if i == 0 and is_shared else 100 * t)
            mask = draw(out_features, WIDTHS[i], 0.4, seed)
            layer = random_layer(mask, "none" if i == depth - 1 else "relu", seed, integers=integers)
            if i == 0 and is_shared:
                kept = mask & draw(out_features, WIDTHS[i], 0.8, 1000 + t)
                layer = layer._replace(mask=kept, weight=layer.weight * kept)
                layer = layer._replace(bias=layer.bias + t)
            layers.append(layer)
        tasks.append(layers)
    together = [[] for _ in tasks]
    for i in range(depth):
        of_layer = [task[i] for task in tasks]
        alone = [pack_together([layer], kernel.path == "blocks")[0] for layer in of_layer]
        packs = pack_together(of_layer, kernel.path == "blocks") if i == 0 and is_shared else alone
        for task, pack in zip(together, packs, strict=True):
            task.append(pack)
    return together


def with_given(tasks: list[list[cpu.PackLayer]]) -> tuple[list[list[cpu.PackLayer]], Tensor]:
    given = torch.cat([task[0].bias for task in tasks])
    return [[task[0]._replace(bias=None, takes_bias=True), *task[1:]] for task in tasks], given[None]


def prepacked(kernel: Kernel, tasks: list[list[cpu.PackLayer]]) -> cpu.Prepacked:
    return cpu.Prepacked(cpu.prepack_layers(tasks, kernel.precision, (kernel.path,)))


def scores(kernel: Kernel, network: cpu.Prepacked, x: Tensor, bias: Tensor | None, threads: int = 1) -> Tensor:
    out = torch.full((len(x), network.facts.outputs), torch.nan)
    network.run(x, out, threads, kernel.path, bias)
    return out


@pytest.mark.parametrize("kernel", [*KERNELS, *BLOCK_KERNELS], ids=str, indirect=True)
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_given_bias_counts_as_the_layers_own(kernel: Kernel, is_shared: bool, depth: int) -> None:
    own = packed_tasks(kernel, is_shared, depth)
    given, bias = with_given(own)
    taking, holding = prepacked(kernel, given), prepacked(kernel, own)
    assert taking.facts.bias_features == bias.shape[1] and holding.facts.bias_features == 0
    for batch in (1, 5, 16, 67):
        x = torch.randint(-3, 4, (batch, WIDTHS[0]), generator=torch.Generator().manual_seed(batch)).float()
        wanted = scores(kernel, holding, x, None)
        for threads in (1, 2):
            assert_exact(scores(kernel, taking, x, bias, threads), wanted)
            apart = torch.full((batch, bias.shape[1] + 3), torch.nan)[:, : bias.shape[1]].copy_(bias)
            assert_exact(scores(kernel, taking, x, apart, threads), wanted)


@pytest.mark.parametrize("kernel", [*KERNELS, *BLOCK_KERNELS], ids=str, indirect=True)
def test_each_row_adds_its_own_bias(kernel: Kernel) -> None:
    given, bias = with_given(packed_tasks(kernel, True, 3, integers=False))
    network = prepacked(kernel, given)
    x, rows = torch.randn(35, WIDTHS[0]), bias + torch.randn(35, bias.shape[1])
    together = scores(kernel, network, x, rows)
    for row in range(35):
        assert_exact(scores(kernel, network, x[row : row + 1], rows[row : row + 1])[0], together[row])


@pytest.mark.parametrize("kernel", [*KERNELS, *BLOCK_KERNELS], ids=str, indirect=True)
def test_a_nan_in_a_given_bias_is_not_lost(kernel: Kernel) -> None:
    given, bias = with_given(packed_tasks(kernel, False, 1))
    rows = bias.repeat(20, 1)
    rows[7, 3] = torch.nan
    found = scores(kernel, prepacked(kernel, given), torch.ones(20, WIDTHS[0]), rows).isnan()
    assert found[7].any() and not found[:7].any() and not found[8:].any()


def test_a_wrong_bias_is_refused() -> None:
    kernel = Kernel("fp32", "tables", "scalar")
    own = packed_tasks(kernel, False, 3)
    given, bias = with_given(own)
    network, x = prepacked(kernel, given), torch.zeros(4, WIDTHS[0])
    for wrong in (None, bias[:, :-1], bias.repeat(3, 1), torch.zeros(0, bias.shape[1])):
        with pytest.raises(ValueError, match=r"bias: got shape .*, wanted \(4, 140\)"):
            scores(kernel, network, x, wrong)
    with pytest.raises(ValueError, match=r"bias: got torch\.float64"):
        scores(kernel, network, x, bias.double())
    with pytest.raises(ValueError, match=r"bias: got shape .*, wanted \(0, 0\)"):
        scores(kernel, prepacked(kernel, own), x, bias)
    with pytest.raises(ValueError, match="layer 0: takes_bias: got 1 and a bias"):
        prepacked(kernel, [[own[0][0]._replace(takes_bias=True), *own[0][1:]]])
    with pytest.raises(ValueError, match="takes_bias: got 0 and a bias, wanted 1"):
        prepacked(kernel, [given[0], own[1]])
    with pytest.raises(ValueError, match="layer 1: takes_bias: got 1"):
        prepacked(kernel, [[own[0][0], own[0][1]._replace(takes_bias=True), own[0][2]]])
