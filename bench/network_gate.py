"""What a correct opponent may return for any network: its float64 result, and how far rounding may take one from it.

`peers.reference` derives that from the layers of an MLP. Here the network is whatever torch runs, so its errors are
drawn: the network runs in float64 several times, and each operation adds to its result errors that are uniform in
[-d, d] and independent, with the d of `peers.reference`:

- a matrix product of k terms: `sqrt(k) u (|a| @ |b|)`, and `u |v|` for the result, u the unit roundoff of float32;
- an activation, softmax or norm: an ulp, 2 u, for each of its operations, as `tests/oracle.py` counts them;
- anything else that computes: `u |v|`;
- in int8 also, for linear layers alone, half a step of 8 bits for what enters, for each weight that is not zero and for
  the result; a step is 1/255 of the range, which comes from representative inputs.

The bound is six times the root mean square of the deviations, over all of the result. So the gate asks whether an
opponent computes this network in this precision, as `peers.reference` does; of one element it knows less.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracle import ACTIVATIONS, UNIT_ROUNDOFF, Bounded

ROWS = 8  # of a batch are checked: rows do not depend on each other
U = UNIT_ROUNDOFF[torch.float32]
NORMS = {"_softmax": 3, "native_layer_norm": 6}  # operations on a row: exp, sum, quotient; two sums, root, four more
LINEAR, PRODUCTS = ("mm", "addmm"), ("mm", "addmm", "bmm", "baddbmm")
Inputs = tuple[Tensor, ...]


def references(model: nn.Module, inputs: Inputs, seen: Sequence[Inputs], seed: int = 0) -> dict[str, Bounded]:
    """Return, for fp32 and int8, the network's result for the first `ROWS` rows and the bound of the precision.

    Args:
        model: The network in float32, in `eval()`; pruned weights are zeros.
        inputs: What it is called with.
        seen: Representative inputs of the same shapes, `inputs` among them, which give int8 its ranges.
        seed: Seeds the errors.
    """
    exact, spans = copy.deepcopy(model).double(), list[_Span]()
    first = tuple(part[:ROWS] for part in inputs)
    # Of scaled_dot_product_attention this way alone is made of operations that errors can be added to.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for some in seen:
            with _Watched(spans):
                model(*some)
        doubled = tuple(part.double() if part.is_floating_point() else part for part in first)
        value: Tensor = exact(*doubled)
        return {
            "fp32": _bounded(value, lambda: exact(*doubled), [], seed),
            "int8": _bounded(value, lambda: model(*first), spans, seed),  # float32's own errors do not count here
        }


def _bounded(value: Tensor, call: Callable[[], Tensor], spans: Sequence[_Span], seed: int) -> Bounded:
    generator = torch.Generator().manual_seed(seed)
    runs = min(max(1024 // value.numel(), 2), 64)
    squares = torch.zeros((), dtype=torch.float64)
    for _ in range(runs):
        with _Rounded(generator, spans):
            squares += (call() - value).square().mean()
    return Bounded(value, (6 * (squares / runs).sqrt()).expand(value.shape))


class _Span:
    """The range of what enters a linear layer and of its result, over all calls; zero is in it."""

    def __init__(self) -> None:
        self.ends = torch.zeros(2, 2, dtype=torch.float64)  # of x and y: least, greatest

    def widen(self, *values: Tensor) -> None:
        for i, value in enumerate(values):
            self.ends[i, 0] = min(self.ends[i, 0].item(), value.min().item())
            self.ends[i, 1] = max(self.ends[i, 1].item(), value.max().item())

    @property
    def steps(self) -> list[float]:
        return [float(step) for step in (self.ends[:, 1] - self.ends[:, 0]) / 255]


class _Watched(TorchDispatchMode):
    """Widens the spans of the linear layers, in the order of their calls."""

    def __init__(self, spans: list[_Span]) -> None:
        super().__init__()
        self._spans, self._calls = spans, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if _name(func) in LINEAR:
            if self._calls == len(self._spans):
                self._spans.append(_Span())
            self._spans[self._calls].widen(args[-2], y)
            self._calls += 1
        return y


class _Rounded(TorchDispatchMode):
    """Adds an error to the result of each operation; with spans, those of int8."""

    def __init__(self, generator: torch.Generator, spans: Sequence[_Span]) -> None:
        super().__init__()
        self._generator, self._spans, self._calls = generator, spans, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, _name(func)
        if func.is_view:
            return func(*args, **kwargs)
        off = None
        if name in PRODUCTS:
            terms = args[-1].shape[-2] + (len(args) == 3)
            off = terms**0.5 * U * func(*(arg.abs() for arg in args), **kwargs)
            if self._spans and name in LINEAR:
                x_step, y_step = self._spans[self._calls].steps
                self._calls += 1
                *bias, x, weight = args
                w_step = (max(weight.max().item(), 0.0) - min(weight.min().item(), 0.0)) / 255
                args = (*bias, self._quantised(x, x_step), self._quantised(weight, w_step))
                off = off + y_step / 2
        z = args[0].clone() if name in ACTIVATIONS else None  # in-place ones overwrite it
        result = func(*args, **kwargs)
        y = result[0] if isinstance(result, tuple) else result
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return result
        off = U * y.abs() if off is None else off + U * y.abs()
        if z is not None:
            activation = ACTIVATIONS[name]
            off = off + activation.operations * 2 * U * activation.scale(z, y, 0.0)
        if name in NORMS:
            off = off + NORMS[name] * 2 * U * y.abs().amax(-1, keepdim=True)
        y.add_(self._uniform(y) * off)
        return result

    def _quantised(self, values: Tensor, step: float) -> Tensor:
        return self._uniform(values).mul_(step / 2).mul_(values != 0).add_(values)

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self._generator, dtype=like.dtype).mul_(2).sub_(1)


def _name(func: Any) -> str:
    """Return the name of an operation; that of one in place is the same."""
    return str(func.overloadpacket.__name__).rstrip("_")
