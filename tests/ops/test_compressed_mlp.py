"""The hidden layers of kept weights alone: against dense float64, on every instruction set, to the bit among them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Bounded, Layer, assert_exact, assert_rounding, linear_reference, mlp_reference, small_integers
from torch import Tensor

from lt4rec_sparse import ops
from lt4rec_sparse.kernels import cpu, reference
from lt4rec_sparse.kernels.training import Layer as TrainingLayer

ISAS: tuple[str, ...] = cpu.supported_isas() if cpu.is_available() else ("reference",)


class Problem(NamedTuple):
    """An MLP, what enters it, and the gradient of what it yields."""

    x: Tensor
    values: list[Tensor]
    biases: list[Tensor]
    patterns: list[ops.Pattern]
    dh: Tensor

    @property
    def dense(self) -> list[Tensor]:
        """The layers' weights."""
        widths = [self.x.shape[1], *map(len, self.biases)]
        parts = zip(self.patterns, self.values, self.biases, widths[:-1], strict=True)
        return [reference.dense_weight(TrainingLayer(*part)) for part in parts]

    def layer(self, i: int) -> TrainingLayer:
        width = len(self.biases[i - 1]) if i else self.x.shape[1]
        return TrainingLayer(self.patterns[i], self.values[i], self.biases[i], width)


def problem(
    widths: list[int], batch: int, is_blocks: bool, density: float = 0.3, seed: int = 0, integers: bool = False
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if integers:
            return small_integers(*shape, generator=generator).clamp(-1, 1)
        return torch.randn(*shape, generator=generator)

    values, biases, patterns = [], [], []
    for k, n in pairwise(widths):
        high, wide = (16, 4) if is_blocks else (1, 1)
        kept = torch.rand(-(-n // high), -(-k // wide), generator=generator) < density
        whole = draw(n, k)
        if is_blocks:
            padded = torch.nn.functional.pad(whole, (0, -k % wide, 0, -n % high))
            values.append(padded.view(len(kept), high, -1, wide).transpose(1, 2)[kept].contiguous())
        else:
            values.append(whole[kept])
        biases.append(draw(n))
        patterns.append(ops.pattern_of(kept, is_blocks=is_blocks))
    return Problem(draw(batch, widths[0]), values, biases, patterns, draw(batch, widths[-1]))


def gradients(case: Problem, x_too: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Return h, and the gradients of x, values and biases."""
    leaves = [case.x, *case.values, *case.biases]
    for leaf in leaves:
        leaf.requires_grad_()
    h = ops.compressed_mlp(case.x, case.values, case.biases, case.patterns)
    found = torch.autograd.grad(h, leaves if x_too else leaves[1:], case.dh)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return h.detach(), list(found)


def wanted_gradients(case: Problem) -> tuple[Tensor, list[Tensor]]:
    """Return the same in float64, by torch's autograd over dense layers."""
    x = case.x.double().requires_grad_()
    dense = [weight.double().requires_grad_() for weight in case.dense]
    biases = [bias.double().requires_grad_() for bias in case.biases]
    h = x
    for weight, bias in zip(dense, biases, strict=True):
        h = torch.nn.functional.linear(h, weight, bias).relu()
    dx, *rest = torch.autograd.grad(h, [x, *dense, *biases], case.dh.double())
    of_values = [reference.kept_of(case.layer(i), rest[i]) for i in range(len(dense))]
    return h.detach(), [dx, *of_values, *rest[len(dense) :]]


WIDTHS = [[7, 5], [64, 32, 16], [33, 17, 50, 3], [4, 16], [1, 1], [130, 65, 66]]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("is_blocks", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
def test_scores_and_gradients_are_exact_on_integers(isa: str, widths: list[int], is_blocks: bool) -> None:
    for batch, density in ((1, 1.0), (63, 0.3), (64, 0.0), (130, 0.3)):
        case = problem(widths, batch, is_blocks, density, integers=True)
        with forced(isa):
            h, found = gradients(case)
        wanted, exact = wanted_gradients(case)
        assert_exact(h, wanted.float())
        for got, of_reference in zip(found, exact, strict=True):
            assert_exact(got, of_reference.float())


@pytest.mark.parametrize("is_blocks", [False, True])
def test_scores_and_gradients_are_within_the_rounding_bound(is_blocks: bool) -> None:
    case = problem([100, 33, 18], 150, is_blocks)
    dense = [weight.double() for weight in case.dense]
    h, _ = gradients(case)
    layers = [Layer(weight, bias, "relu") for weight, bias in zip(dense, case.biases, strict=True)]
    assert_rounding(h, mlp_reference(case.x, layers))
    # Where a hidden value is next to 0 its gradient passes or not: the last layer is held alone, to those found.
    last = Problem(hidden(case), case.values[1:], case.biases[1:], case.patterns[1:], case.dh)
    h, (dx, of_values, of_bias) = gradients(last)
    dz = case.dh.masked_fill(h <= 0, 0)
    assert_rounding(dx, linear_reference(dz, dense[1].T, None, torch.float32))
    bounded = linear_reference(dz.T, last.x.T, None, torch.float32)
    kept = [reference.kept_of(last.layer(0), part) for part in bounded]
    assert_rounding(of_values, Bounded(*kept))
    sums = linear_reference(dz.T, torch.ones(1, len(dz)), None, torch.float32)
    assert_rounding(of_bias, Bounded(sums.value[:, 0], sums.bound[:, 0]))


def hidden(case: Problem) -> Tensor:
    return ops.compressed_mlp(case.x, case.values[:1], case.biases[:1], case.patterns[:1])


@pytest.mark.parametrize("is_blocks", [False, True])
@given(
    st.lists(st.integers(1, 70), min_size=2, max_size=4),
    st.integers(0, 140),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(
    is_blocks: bool, widths: list[int], batch: int, density: float, seed: int
) -> None:
    case = problem(widths, batch, is_blocks, density, seed)
    first: Any = None
    for isa in ISAS:
        for threads in (1, 3):
            with forced(isa):
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                h, found = gradients(case)
                torch.set_num_threads(before)
            first = first or [h, *found]
            for got, wanted in zip([h, *found], first, strict=True):
                assert_exact(got, wanted)


@pytest.mark.parametrize("is_blocks", [False, True])
def test_a_row_is_the_same_in_every_batch(is_blocks: bool) -> None:
    case = problem([50, 40, 20], 130, is_blocks)
    h, (dx, *_) = gradients(case)
    for rows in (slice(0, 1), slice(60, 70), slice(100, 130)):
        part = case._replace(x=case.x[rows], dh=case.dh[rows])
        of_part, (dx_of_part, *_) = gradients(part)
        assert_exact(of_part, h[rows])
        assert_exact(dx_of_part, dx[rows])


@pytest.mark.parametrize("is_blocks", [False, True])
def test_strided_operands_and_a_gradient_of_weights_alone(is_blocks: bool) -> None:
    case = problem([20, 16, 8], 70, is_blocks)
    h, (dx, *rest) = gradients(case)
    wide = torch.randn(70, 41)
    wide[:, 1:21] = case.x
    strided = case._replace(x=wide[:, 1:21], dh=case.dh.t().contiguous().t())
    for apart in (False, True):
        got, found = gradients(strided._replace(x=strided.x.detach()), x_too=apart)
        assert_exact(got, h)
        for one, wanted in zip(found, [dx, *rest] if apart else rest, strict=True):
            assert_exact(one, wanted)


def test_nan_passes_as_through_torch_relu() -> None:
    case = problem([6, 5, 4], 3, is_blocks=False, density=1.0)
    case.x[1, 2] = float("nan")
    h, found = gradients(case)
    wanted, exact = wanted_gradients(case)
    assert torch.equal(h.isnan(), wanted.isnan())
    for got, of_reference in zip(found, exact, strict=True):
        assert torch.equal(got.isnan(), of_reference.isnan())


def test_the_reference_is_what_autograd_makes_of_dense_layers() -> None:
    for is_blocks in (False, True):
        case = problem([33, 18, 7], 20, is_blocks, integers=True)
        layers = [case.layer(i) for i in range(2)]
        dx, values, biases = reference.compressed_mlp_backward(layers, case.x, case.dh)
        h, wanted = wanted_gradients(case)
        assert_exact(reference.compressed_mlp(layers, case.x)[-1], h.float())
        for got, of_autograd in zip([dx, *values, *biases], wanted, strict=True):
            assert_exact(got, of_autograd.float())


def test_a_call_without_the_engine_gives_the_same_on_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem([33, 18, 7], 20, is_blocks=True, integers=True)
    h, found = gradients(case)
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    without, others = gradients(case)
    for got, wanted in zip([without, *others], [h, *found], strict=True):
        assert_exact(got, wanted)


def test_the_operator_of_traced_graphs_gives_the_same_bits() -> None:
    case = problem([33, 18, 7], 20, is_blocks=True)
    h, found = gradients(case)
    flat = [part for pattern in case.patterns for part in pattern]
    leaves = [leaf.requires_grad_() for leaf in (case.x, *case.values, *case.biases)]
    of_operator, _ = torch.ops.lt4rec_sparse.compressed_mlp(case.x, case.values, case.biases, flat)
    assert_exact(of_operator, h)
    for got, wanted in zip(torch.autograd.grad(of_operator, leaves, case.dh), found, strict=True):
        assert_exact(got, wanted)


def test_gradients_of_gradients_are_refused() -> None:
    case = problem([6, 5], 3, is_blocks=False)
    x = case.x.requires_grad_()
    h = ops.compressed_mlp(x, case.values, case.biases, case.patterns)
    with pytest.raises(RuntimeError, match="got create_graph=True, wanted gradients of a MaskedMLP"):
        torch.autograd.grad(h, x, case.dh, create_graph=True)


def test_the_schema_holds() -> None:
    case = problem([20, 16, 8], 10, is_blocks=True)
    flat = [part for pattern in case.patterns for part in pattern]
    x, values, biases = case.x.requires_grad_(), case.values, case.biases
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.lt4rec_sparse.compressed_mlp.default, (x, values, biases, flat), test_utils=utilities
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, r"x: got shape \(3,\), wanted \[batch, in_features\]"),
        ({"x": torch.zeros(3, 20, dtype=torch.float64)}, r"x: got torch.float64 on cpu, wanted torch.float32"),
        ({"x": torch.zeros(3, 24)}, r"patterns\[0\]: got 5 columns for 24 inputs, wanted 6"),
        ({"values": []}, r"values: got 0 layers, 2 biases, 2 patterns, wanted 1 each"),
        ({"biases": [torch.zeros(17), torch.zeros(8)]}, r"biases\[0\]: got shape \(17,\), wanted one for each output"),
    ],
)
def test_bad_arguments_raise(change: dict[str, Any], message: str) -> None:
    case = problem([20, 16, 8], 10, is_blocks=True)._replace(**change)
    with pytest.raises(ValueError, match=message):
        ops.compressed_mlp(case.x, case.values, case.biases, case.patterns)


def test_values_of_another_pattern_raise() -> None:
    case = problem([20, 16, 8], 10, is_blocks=True)
    case.values[0] = case.values[0][1:]
    with pytest.raises(ValueError, match=r"values\[0\]: got shape .*, wanted .*, those of its pattern"):
        ops.compressed_mlp(case.x, case.values, case.biases, case.patterns)
    with pytest.raises(ValueError, match=r"kept: got torch.float32 \(3, 4\), wanted torch.bool \[rows, columns\]"):
        ops.pattern_of(torch.zeros(3, 4), is_blocks=False)


def forced(isa: str) -> AbstractContextManager[None]:
    """Hold the engine to an instruction set, where there is an engine."""
    return nullcontext() if isa == "reference" else cpu.forced_isa(isa)
