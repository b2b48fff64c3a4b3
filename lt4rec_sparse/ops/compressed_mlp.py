"""`compressed_mlp`: the hidden layers of one task, of which only kept weights exist; schema, checks, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lt4rec_sparse.kernels import cpu, reference, training
from lt4rec_sparse.kernels.autocast import without_autocast
from lt4rec_sparse.kernels.training import TILE, Layer, Pattern
from lt4rec_sparse.ops.tracing import is_traced

# `patterns` holds the five tensors of each layer's `Pattern`, one layer after the other. `panels` is what the engine
# keeps for the gradients, empty elsewhere: x and the outputs of every layer.
_library = torch.library.Library("lt4rec_sparse", "FRAGMENT")
_library.define(
    "compressed_mlp(Tensor x, Tensor[] values, Tensor[] biases, Tensor[] patterns) -> (Tensor h, Tensor panels)"
)
_library.define(
    "compressed_mlp_backward(Tensor dh, Tensor panels, Tensor x, Tensor[] values, Tensor[] biases, Tensor[] patterns, "
    "bool needs_x) -> Tensor[]"
)


def pattern_of(kept: Tensor, *, is_blocks: bool) -> Pattern:
    """Return the pattern of a mask over weights, or over a grid of blocks: bool `[rows, columns]`, True = kept.

    Raises:
        ValueError: If it is no such mask.
    """
    if kept.dtype != torch.bool or kept.dim() != 2 or not kept.numel():
        raise ValueError(f"kept: got {kept.dtype} {tuple(kept.shape)}, wanted torch.bool [rows, columns]")
    kept = kept.cpu()
    columns = kept.nonzero()[:, 1]
    by_column = kept.t().nonzero()
    places = (kept.flatten().cumsum(0) - 1).view_as(kept).t()[kept.t()]
    of_rows, of_columns = (_begins(lines, lines.shape[1] if is_blocks else TILE) for lines in (kept, kept.t()))
    found = (of_rows, columns, of_columns, places, by_column[:, 1])
    return Pattern(*(part.to(torch.int32).contiguous() for part in found))


def compressed_mlp(
    x: Tensor, values: Sequence[Tensor], biases: Sequence[Tensor], patterns: Sequence[Pattern]
) -> Tensor:
    """Apply hidden layers of which only kept weights exist: `h = relu(h @ weight.T + bias)`, layer by layer.

    All three products of a layer, forward, of the inputs' gradients and of the weights', skip what is pruned. They are
    sums of float32 in a fixed order: the same for every number of threads, and on every instruction set of the engine.

    Args:
        x: `[batch, in_features]`, float32, on the CPU.
        values: What the pattern of each layer keeps: float32 `[blocks, 16, 4]`, or `[count]` of single weights.
        biases: The bias of each layer, float32 `[out_features]`.
        patterns: `pattern_of` the mask of each layer.

    Returns:
        `[batch, out_features]` of the last layer, float32.

    Raises:
        ValueError: If a shape, a dtype or a device disagrees.

    Source: LT4REC (arXiv 2008.09872), section 2.2, `sNET * mask`.
    """
    _check(x, values, biases, patterns)
    if is_traced(x):
        flat = [part for pattern in patterns for part in pattern]
        h, _ = torch.ops.lt4rec_sparse.compressed_mlp(x, list(values), list(biases), flat)
    else:
        h, _ = _Eager.apply(patterns, x, *values, *biases)
    return cast(Tensor, h)


def _begins(kept: Tensor, tile: int) -> Tensor:
    """Return where each line's part of every tile begins, and at last ends, int64 `[tiles + 1, lines]`."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % tile))
    counts = padded.view(len(kept), -1, tile).sum(2)
    ends = counts.flatten().cumsum(0).view_as(counts)
    return torch.cat([ends - counts, ends[:, -1:]], 1).t()


def _check(x: Tensor, values: Sequence[Tensor], biases: Sequence[Tensor], patterns: Sequence[Pattern]) -> None:
    if not values or not len(values) == len(biases) == len(patterns):
        raise ValueError(
            f"values: got {len(values)} layers, {len(biases)} biases, {len(patterns)} patterns, wanted 1 each"
        )
    if x.dim() != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [batch, in_features]")
    width = x.shape[1]
    for i, (of_layer, bias, pattern) in enumerate(zip(values, biases, patterns, strict=True)):
        for name, part in (("x", x), (f"values[{i}]", of_layer), (f"biases[{i}]", bias)):
            if part.dtype != torch.float32 or part.device.type != "cpu":
                raise ValueError(f"{name}: got {part.dtype} on {part.device}, wanted torch.float32 on the CPU")
        rows, columns, count = pattern.row_begins.shape[1], pattern.column_begins.shape[1], len(pattern.columns)
        is_blocks = of_layer.dim() == 3
        wanted = (count, 16, 4) if is_blocks else (count,)
        if tuple(of_layer.shape) != wanted:
            raise ValueError(f"values[{i}]: got shape {tuple(of_layer.shape)}, wanted {wanted}, those of its pattern")
        high, wide = (16, 4) if is_blocks else (1, 1)
        if bias.dim() != 1 or -(-len(bias) // high) != rows:
            raise ValueError(f"biases[{i}]: got shape {tuple(bias.shape)}, wanted one for each output of {rows} rows")
        if -(-width // wide) != columns:
            raise ValueError(f"patterns[{i}]: got {columns} columns for {width} inputs, wanted {-(-width // wide)}")
        width = len(bias)


def _layers(x: Tensor, values: Sequence[Tensor], biases: Sequence[Tensor], patterns: Sequence[Pattern]) -> list[Layer]:
    widths = [x.shape[1], *(bias.shape[0] for bias in biases)]
    return [
        Layer(pattern, of_layer.contiguous(), bias.contiguous(), width)
        for pattern, of_layer, bias, width in zip(patterns, values, biases, widths[:-1], strict=True)
    ]


def _forward(x: Tensor, layers: list[Layer]) -> tuple[Tensor, Tensor]:
    if cpu.is_available():
        return training.forward(layers, x)
    with without_autocast(x):
        return reference.compressed_mlp(layers, x)[-1], x.new_empty(0)


def _gradients(
    dh: Tensor, panels: Tensor, x: Tensor, layers: list[Layer], needs_x: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    if len(panels):
        return training.backward(layers, panels, dh, needs_x)
    with without_autocast(x):
        return reference.compressed_mlp_backward(layers, x, dh)


class _Eager(torch.autograd.Function):
    """The same without the operator, whose registered gradient walks all its tensors in Python at every step."""

    @staticmethod
    def forward(patterns: Sequence[Pattern], x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        count = len(patterns)
        return _forward(x, _layers(x, weights[:count], weights[count:], patterns))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        patterns, *tensors = inputs
        _, panels = output
        ctx.mark_non_differentiable(panels)
        ctx.set_materialize_grads(False)  # zeros for the panels would be as many as they are
        ctx.patterns = patterns
        ctx.save_for_backward(panels, *tensors)

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("compressed_mlp: got create_graph=True, wanted gradients of a MaskedMLP for that")
        panels, x, *weights = ctx.saved_tensors
        if dh is None:
            return None, None, *[None] * len(weights)
        count, needs_x = len(ctx.patterns), ctx.needs_input_grad[1]
        layers = _layers(x, weights[:count], weights[count:], ctx.patterns)
        dx, of_values, of_biases = _gradients(dh, panels, x, layers, needs_x)
        return None, dx if needs_x else None, *of_values, *of_biases


def _patterns(flat: list[Tensor]) -> list[Pattern]:
    return [Pattern(*flat[i : i + len(Pattern._fields)]) for i in range(0, len(flat), len(Pattern._fields))]


def _forward_op(x: Tensor, values: list[Tensor], biases: list[Tensor], patterns: list[Tensor]) -> tuple[Tensor, Tensor]:
    return _forward(x, _layers(x, values, biases, _patterns(patterns)))


def _backward_op(
    dh: Tensor,
    panels: Tensor,
    x: Tensor,
    values: list[Tensor],
    biases: list[Tensor],
    patterns: list[Tensor],
    needs_x: bool,
) -> list[Tensor]:
    dx, *rest = _gradients(dh, panels, x, _layers(x, values, biases, _patterns(patterns)), needs_x)
    return [dx if dx is not None else x.new_empty(0), *rest[0], *rest[1]]


_library.impl("compressed_mlp", _forward_op, "CompositeExplicitAutograd")
_library.impl("compressed_mlp_backward", _backward_op, "CompositeExplicitAutograd")


@torch.library.register_fake("lt4rec_sparse::compressed_mlp")
def _fake(x: Tensor, values: list[Tensor], biases: list[Tensor], patterns: list[Tensor]) -> tuple[Tensor, Tensor]:
    panels = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(len(x), len(biases[-1])), x.new_empty(panels)


@torch.library.register_fake("lt4rec_sparse::compressed_mlp_backward")
def _backward_fake(
    dh: Tensor,
    panels: Tensor,
    x: Tensor,
    values: list[Tensor],
    biases: list[Tensor],
    patterns: list[Tensor],
    needs_x: bool,
) -> list[Tensor]:
    dx = torch.empty_like(x) if needs_x else x.new_empty(0)
    return [dx, *(torch.empty_like(part) for part in (*values, *biases))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, values, biases, patterns = inputs
    _, panels = output
    ctx.mark_non_differentiable(panels)
    ctx.set_materialize_grads(False)  # zeros for the panels would be as many as they are
    ctx.count = len(values)
    ctx.save_for_backward(panels, x, *values, *biases, *patterns)


def _backward(ctx: Any, dh: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    panels, x, *parts = ctx.saved_tensors
    n, needs_x = ctx.count, ctx.needs_input_grad[0]
    if dh is None:
        return None, [None] * n, [None] * n, [None] * len(parts[2 * n :])
    values, biases, patterns = parts[:n], parts[n : 2 * n], parts[2 * n :]
    dx, *rest = torch.ops.lt4rec_sparse.compressed_mlp_backward(dh, panels, x, values, biases, patterns, needs_x)
    return dx if needs_x else None, rest[:n], rest[n:], [None] * len(patterns)


torch.library.register_autograd("lt4rec_sparse::compressed_mlp", _backward, setup_context=_setup)
