"""The only two numerical assertions of this test suite, and nothing to tune in them.

1. `assert_exact`: small-integer inputs, for which every order of summation gives the same float32 sum.
2. `assert_rounding`: the elementwise bound `|y - ref64| <= 6 sqrt(k) u_acc (|x| @ |W|.T) + u_out |ref64|`
   (Ipsen & Zhou, arXiv:1906.10465). A wrong index breaks it, where a mean, an RMS or a cosine sees nothing.

`mlp_reference` carries the second bound through the layers of an MLP: an error `e` that enters a layer leaves it
as at most `e @ |W|.T`, and an activation as at most its Lipschitz constant times it; an activation's own operations
round, each within an ulp (`2 u`) of what bounds it. Where operands are rounded before they are
multiplied, `x` and the weights are known, and the reference rounds them too; what a hidden layer yields is known to
its bound only, and rounding it adds `u_operand |h|`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Bounded(NamedTuple):
    """A float64 reference and, elementwise, how far a correct result may lie from it."""

    value: Tensor
    bound: Tensor


class Layer(NamedTuple):
    """One layer of a dense reference MLP: `activation(x @ weight.T + bias)`."""

    weight: Tensor
    bias: Tensor | None
    activation: str  # a name of `ACTIVATIONS`
    slope: float | Tensor = 0.0


class Activation(NamedTuple):
    """An activation in float64, and how its result may round."""

    function: Callable[[Tensor, Any], Tensor]  # of z and the slope: a number, one per output, or what dice has
    lipschitz: Callable[[Any], float | Tensor]  # of the slope
    operations: int = 0  # each rounds within an ulp of `scale`
    scale: Callable[[Tensor, Tensor, Any], Tensor] = lambda z, value, slope: value.abs()


def _of_z(z: Tensor, value: Tensor, slope: Any) -> Tensor:
    return z.abs()


def _dice(z: Tensor, slope: Tensor) -> Tensor:
    """`p z + (1 - p) alpha z` with `p = sigmoid(scale z + shift)`."""
    scale, shift, alpha = slope.double()
    p = (scale * z + shift).sigmoid()
    return p * z + (1 - p) * alpha * z


def _dice_lipschitz(slope: Tensor) -> Tensor:
    """Of `alpha + (1 - alpha) p`, between alpha and 1, and `z (1 - alpha) p'` with `scale z = t - shift`.

    Nowhere is `|t| sigmoid'(t)` above 0.224, nor `sigmoid'` above 1 / 4.
    """
    _, shift, alpha = slope.double()
    return alpha.abs().clamp(min=1) + (1 - alpha).abs() * (0.224 + shift.abs() / 4)


def _dice_scale(z: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """Bound each operation: the gate's by 1, its argument's by what an error of an ulp of its terms moves the gate.

    Of the argument `t` the terms are at most `|t| + 2 |shift|`: by them, times `sigmoid'` near t, the gate moves.
    """
    _, shift, alpha = slope.double()
    return z.abs() * (alpha.abs() + (1 - alpha).abs() * (1.25 + shift.abs() / 2))


ACTIVATIONS = {
    "none": Activation(lambda z, slope: z, lambda slope: 1),
    "relu": Activation(lambda z, slope: z.relu(), lambda slope: 1),
    # exp, the sum and the quotient.
    "sigmoid": Activation(
        lambda z, slope: z.sigmoid(), lambda slope: 1 / 4, 3, lambda z, value, slope: torch.ones_like(z)
    ),
    "tanh": Activation(lambda z, slope: z.tanh(), lambda slope: 1, 3),
    "silu": Activation(lambda z, slope: F.silu(z), lambda slope: 1.1, 3, _of_z),
    # z times a probability, which takes a square, a difference, exp, a product or two, and a sum.
    "gelu": Activation(lambda z, slope: F.gelu(z), lambda slope: 1.13, 6, _of_z),
    "gelu_tanh": Activation(lambda z, slope: F.gelu(z, approximate="tanh"), lambda slope: 1.13, 6, _of_z),
    "hardswish": Activation(lambda z, slope: F.hardswish(z), lambda slope: 1.5, 3, _of_z),
    "leaky_relu": Activation(
        lambda z, slope: torch.where(z > 0, z, z * slope), lambda slope: torch.as_tensor(slope).abs().clamp(min=1), 1
    ),
    # The slope's own rounding, exp - 1 and the product.
    "elu": Activation(lambda z, slope: F.elu(z, slope), lambda slope: max(1, abs(slope)), 3),
    # Two of the argument, three of the sigmoid, 1 - alpha, two products and a sum.
    "dice": Activation(_dice, _dice_lipschitz, 9, _dice_scale),
}


def small_integers(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Integers in [-3, 3]: products and sums of them are exact in float32 up to 1.8 million terms."""
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def assert_exact(y: Tensor, reference: Tensor) -> None:
    """Fail unless `y` equals `reference` in shape, dtype and every element; NaN equals nothing."""
    assert y.shape == reference.shape, f"shape: got {tuple(y.shape)}, wanted {tuple(reference.shape)}"
    assert y.dtype == reference.dtype, f"dtype: got {y.dtype}, wanted {reference.dtype}"
    wrong = ~(y == reference)
    assert not wrong.any(), _where("exact", y, reference, wrong)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, accumulate: torch.dtype) -> Bounded:
    """`x @ weight.T + bias` in float64, with the bound of a sum accumulated in `accumulate`."""
    return _linear(Bounded(x.double(), torch.zeros_like(x, dtype=torch.float64)), weight, bias, accumulate)


def mlp_reference(
    x: Tensor | Bounded,
    layers: Sequence[Layer],
    accumulate: torch.dtype = torch.float32,
    operands: torch.dtype | None = None,
) -> Bounded:
    """A whole MLP in float64, with the rounding bound carried from layer to layer.

    Args:
        x: `[batch, in_features]`; with a bound if it was computed itself, which the layers then carry on.
        layers: In order.
        accumulate: In which products are formed and added.
        operands: To which weights and the activations that enter a layer are rounded first; None leaves them.
    """
    u = UNIT_ROUNDOFF[accumulate]
    is_known = isinstance(x, Tensor)
    h = Bounded(_rounded(x, operands).double(), torch.zeros_like(x, dtype=torch.float64)) if is_known else x
    for i, layer in enumerate(layers):
        if operands is not None and not (is_known and i == 0):
            h = Bounded(h.value, h.bound + UNIT_ROUNDOFF[operands] * (h.value.abs() + h.bound))
        h = _linear(h, _rounded(layer.weight, operands), layer.bias, accumulate)
        h = activated(h, layer.activation, layer.slope, u)
    return h


def activated(z: Bounded, activation: str, slope: float | Tensor, u: float) -> Bounded:
    """Apply an activation to a bounded value, in arithmetic of unit roundoff `u`."""
    function, lipschitz, operations, scale = ACTIVATIONS[activation]
    value = function(z.value, slope)
    return Bounded(value, lipschitz(slope) * z.bound + operations * 2 * u * scale(z.value, value, slope))


def assert_rounding(y: Tensor, reference: Bounded) -> None:
    """Fail unless every element of `y` lies within its bound plus the rounding of its own dtype."""
    value, bound = reference
    assert y.shape == value.shape, f"shape: got {tuple(y.shape)}, wanted {tuple(value.shape)}"
    limit = bound + UNIT_ROUNDOFF[y.dtype] * value.abs()
    wrong = ~((y.double() - value).abs() <= limit)
    assert not wrong.any(), _where("rounding bound", y, value, wrong)


def _rounded(v: Tensor, dtype: torch.dtype | None) -> Tensor:
    return v if dtype is None else v.to(dtype)


def _linear(x: Bounded, weight: Tensor, bias: Tensor | None, accumulate: torch.dtype) -> Bounded:
    w = weight.double()
    terms = w.shape[1] + (bias is not None)
    value, magnitude = x.value @ w.T, (x.value.abs() + x.bound) @ w.abs().T
    if bias is not None:
        value, magnitude = value + bias.double(), magnitude + bias.double().abs()
    return Bounded(value, x.bound @ w.abs().T + 6 * terms**0.5 * UNIT_ROUNDOFF[accumulate] * magnitude)


def _where(rule: str, y: Tensor, reference: Tensor, wrong: Tensor) -> str:
    first = tuple(int(i) for i in wrong.nonzero()[0])
    return (
        f"{rule}: {int(wrong.sum())} of {wrong.numel()} elements wrong; "
        f"first at {first}: got {y[first].item()!r}, wanted {reference[first].item()!r}"
    )
