"""The CPU engine against the dense masked model: every instruction set, lane count and thread count."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Layer, assert_exact, assert_rounding, mlp_reference, small_integers
from torch import Tensor

from lt4rec_sparse.kernels import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason=f"no native engine: {native.absence_reason()}")

ISAS = ("scalar", "avx2", "avx512")
LANE_EDGES = (0, 1, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65, 257)
BLOCK_EDGES = (1, 127, 128, 129, 256, 257)  # BLOCK_FEATURES of csrc/engine.h is 128


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in native.supported_isas():
        pytest.skip(f"this machine does not run {request.param}")
    with native.forced_isa(request.param):
        yield request.param


def compress(layer: Layer, mask: Tensor) -> native.PackLayer:
    """Canonical CSR of the kept weights, by mask and never by `!= 0`: a kept weight may be 0."""
    crow_indices = torch.nn.functional.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)).int()
    col_indices = mask.nonzero()[:, 1].int()
    return native.PackLayer(
        crow_indices, col_indices, layer.weight[mask], layer.bias, mask.shape[1], activation=layer.activation
    )


def random_layer(mask: Tensor, activation: str, seed: int, *, integers: bool = True, bias: bool = True) -> Layer:
    """A dense layer whose pruned weights are 0."""
    generator = torch.Generator().manual_seed(seed)
    draw = small_integers if integers else torch.randn
    weight, offset = draw(*mask.shape, generator=generator), draw(mask.shape[0], generator=generator)
    scale = 1 if integers else (2 / max(1, mask.sum() / len(mask))) ** 0.5
    return Layer(weight * mask * scale, offset if bias else None, activation)


def random_mask(out_features: int, in_features: int, density: float, seed: int) -> Tensor:
    return torch.rand(out_features, in_features, generator=torch.Generator().manual_seed(seed)) < density


def random_task(features: Sequence[int], density: float, seed: int, head: str = "none", *, integers: bool = True):
    """An MLP with ReLU between its layers, dense and compressed; a head of one output keeps every weight."""
    dense, packed = [], []
    for i, (in_features, out_features) in enumerate(itertools.pairwise(features)):
        mask = random_mask(out_features, in_features, 1 if out_features == 1 else density, seed + i)
        activation = head if i == len(features) - 2 else "relu"
        dense.append(random_layer(mask, activation, seed + i, integers=integers))
        packed.append(compress(dense[-1], mask))
    return dense, packed


def run(x: Tensor, prepacked: Tensor, threads: int = 1) -> Tensor:
    out = torch.full((len(x), native.describe(prepacked)["outputs"]), float("nan"))
    native.sparse_mlp(x, prepacked, out, threads)
    return out


def exact_reference(x: Tensor, tasks: Sequence[Sequence[Layer]]) -> Tensor:
    return torch.cat([mlp_reference(x, layers).value for layers in tasks], dim=1).float()


def assert_layer_exact(x: Tensor, layer: Layer, mask: Tensor) -> None:
    assert_exact(run(x, native.prepack([[compress(layer, mask)]])), exact_reference(x, [[layer]]))


def integers_like(*shape: int, seed: int = 0) -> Tensor:
    return small_integers(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_small_shape_is_exact(isa: str) -> None:
    for in_features, out_features in itertools.product(range(1, 34), repeat=2):
        mask = random_mask(out_features, in_features, 0.4, seed=in_features)
        layer = random_layer(mask, "relu", seed=out_features, bias=out_features % 2 == 0)
        assert_layer_exact(integers_like(1 + (in_features + out_features) % 20, in_features), layer, mask)


@pytest.mark.parametrize("out_features", BLOCK_EDGES)
@pytest.mark.parametrize("in_features", BLOCK_EDGES)
def test_shapes_around_a_block_are_exact(isa: str, in_features: int, out_features: int) -> None:
    dense, packed = random_task((in_features, out_features, 5), density=0.2, seed=1)
    x = integers_like(19, in_features)
    assert_exact(run(x, native.prepack([packed])), exact_reference(x, [dense]))


@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("batch", LANE_EDGES)
def test_every_lane_count_serves_all_tasks_exactly(isa: str, batch: int, threads: int) -> None:
    shapes = ((140, 40, 131, 3), (140, 5), (140, 9, 1))
    tasks = [random_task(shape, density=0.3, seed=10 * t) for t, shape in enumerate(shapes)]
    x = integers_like(batch, 140)
    prepacked = native.prepack([packed for _, packed in tasks])
    assert_exact(run(x, prepacked, threads), exact_reference(x, [dense for dense, _ in tasks]))


@pytest.mark.parametrize("density", (0.2, 0.1))
def test_a_ranking_mlp_stays_within_the_rounding_bound(isa: str, density: float) -> None:
    features = (1024, 512, 256, 128, 1)
    tasks = [random_task(features, density, seed, "sigmoid", integers=False) for seed in (20, 30)]
    x = torch.randn(70, 1024, generator=torch.Generator().manual_seed(2))
    out = run(x, native.prepack([packed for _, packed in tasks]), threads=2)
    for column, (dense, _) in enumerate(tasks):
        assert_rounding(out[:, column : column + 1], mlp_reference(x, dense))


def test_a_sigmoid_between_layers_keeps_the_zeros_of_the_tile(isa: str) -> None:
    first, second = random_mask(131, 20, 0.5, seed=3), random_mask(6, 131, 0.3, seed=4)
    dense = [
        random_layer(first, "sigmoid", seed=5, integers=False),
        random_layer(second, "none", seed=6, integers=False),
    ]
    x = torch.randn(9, 20, generator=torch.Generator().manual_seed(7))
    prepacked = native.prepack([[compress(dense[0], first), compress(dense[1], second)]])
    assert_rounding(run(x, prepacked), mlp_reference(x, dense))


def masks_that_hurt(out_features: int = 21, in_features: int = 300) -> dict[str, Tensor]:
    empty = torch.zeros(out_features, in_features, dtype=torch.bool)
    last, first, skewed, middle = empty.clone(), empty.clone(), empty.clone(), empty.clone()
    last[:, -1] = True
    first[:, 0] = True
    skewed[3] = True  # one full row among empty ones
    middle[:, 128:256] = True  # nothing in the first block, which brings the bias, nor in the last, which has the ReLU
    return {"all dead": empty, "full": ~empty, "last": last, "first": first, "skewed": skewed, "middle": middle}


@pytest.mark.parametrize("name", masks_that_hurt())
def test_masks_that_hurt_are_exact(isa: str, name: str) -> None:
    mask = masks_that_hurt()[name]
    assert_layer_exact(integers_like(11, mask.shape[1]), random_layer(mask, "relu", seed=8), mask)


@pytest.mark.parametrize("poison", (float("inf"), float("-inf"), float("nan")))
@pytest.mark.parametrize("activation", ("none", "relu"))
def test_a_poisoned_activation_reaches_exactly_the_rows_that_keep_it(isa: str, activation: str, poison: float) -> None:
    mask = random_mask(38, 130, 0.1, seed=9)
    layer = random_layer(mask, activation, seed=10)
    x = integers_like(130, 130)
    x.fill_diagonal_(poison)  # each column in a row of the batch of its own
    assert layer.bias is not None
    # The masked model over kept weights only: a pruned weight never touches the activation, a kept 0 does.
    rows = [x[:, kept].double() @ weight[kept].double() for weight, kept in zip(layer.weight, mask, strict=True)]
    wanted = torch.stack(rows, dim=1) + layer.bias
    wanted = (wanted.relu() if activation == "relu" else wanted).float()
    out = run(x, native.prepack([[compress(layer, mask)]]))
    assert torch.equal(out.isnan(), wanted.isnan())
    assert_exact(out.nan_to_num(nan=0.5), wanted.nan_to_num(nan=0.5))


def test_denormals_are_not_flushed(isa: str) -> None:
    mask = random_mask(16, 40, 0.5, seed=11)
    layer = random_layer(mask, "relu", seed=12, bias=False)
    assert_layer_exact(integers_like(8, 40) * 2.0**-149, layer, mask)


def test_sigmoid_is_within_its_bound_and_saturates(isa: str) -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    layer = Layer(torch.ones(1, 1), None, "sigmoid")
    prepacked = native.prepack([[compress(layer, mask)]])
    x = torch.linspace(-120, 120, 4001)[:, None]
    assert_rounding(run(x, prepacked), mlp_reference(x, [layer]))
    assert run(torch.tensor([[float("-inf")], [-1e30], [1e30], [float("inf")]]), prepacked).tolist() == [
        [0],
        [0],
        [1],
        [1],
    ]
    assert run(torch.tensor([[float("nan")]]), prepacked).isnan().all()


def test_a_score_does_not_depend_on_who_else_is_in_the_request(isa: str) -> None:
    _, packed = random_task((300, 140, 60, 1), density=0.2, seed=13, head="sigmoid", integers=False)
    prepacked = native.prepack([packed])
    x = torch.randn(257, 300, generator=torch.Generator().manual_seed(14))
    together = run(x, prepacked)
    for batch, threads in itertools.product(LANE_EDGES, (1, 2, 5)):
        assert_exact(run(x[:batch], prepacked, threads), together[:batch])
    for row in (0, 100, 256):
        assert_exact(run(x[row : row + 1], prepacked), together[row : row + 1])
    with native.forced_isa("scalar"):
        assert_exact(run(x, prepacked), together)


def test_rows_may_be_strided(isa: str) -> None:
    mask = random_mask(19, 33, 0.4, seed=15)
    layer = random_layer(mask, "relu", seed=16)
    prepacked = native.prepack([[compress(layer, mask)]])
    wide = integers_like(40, 50)
    for x in (wide[:, 7:40], wide[::3, :33], wide[3:4, :33].expand(20, 33)):
        buffer = torch.full((len(x), 30), float("nan"))
        native.sparse_mlp(x, prepacked, buffer[:, 5:24], threads=2)
        assert_exact(buffer[:, 5:24], exact_reference(x, [[layer]]))
        assert buffer[:, :5].isnan().all()
        assert buffer[:, 24:].isnan().all()


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 140),
    widths=st.lists(st.integers(1, 150), min_size=2, max_size=4),
    density=st.sampled_from((0.0, 0.05, 0.3, 1.0)),
    threads=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_any_mlp_is_exact_and_the_same_on_every_isa(
    batch: int, widths: list[int], density: float, threads: int, seed: int
) -> None:
    # Values in {-1, 0, 1} keep four layers of sums below 2^24, where float32 is exact.
    dense, packed = random_task(widths, density, seed)
    dense = [layer._replace(weight=layer.weight.sign()) for layer in dense]
    packed = [layer._replace(values=layer.values.sign()) for layer in packed]
    x = integers_like(batch, widths[0], seed=seed).sign()
    prepacked = native.prepack([packed])
    for name in native.supported_isas():
        with native.forced_isa(name):
            assert_exact(run(x, prepacked, threads), exact_reference(x, [dense]))
