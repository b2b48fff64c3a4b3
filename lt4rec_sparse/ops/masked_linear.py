"""`masked_linear`: schema, checks, shape rule, gradients and dispatch; one task's mask, or all tasks' at once.

The device picks the kernel: eager torch on the CPU, Triton or cuBLAS on a GPU (`kernels.gpu`). Tests and benchmarks
force one of the two there through `kernels.gpu.masked_linear.forced_path`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from lt4rec_sparse.kernels import reference

_library = torch.library.Library("lt4rec_sparse", "FRAGMENT")
_library.define(
    "masked_linear(Tensor x, Tensor weight, Tensor masks, Tensor? bias, SymInt[] starts, SymInt[] lengths,"
    " str activation) -> Tensor"
)
_library.define(
    "masked_linear_dgrad(Tensor dy, Tensor weight, Tensor masks, SymInt[] starts, SymInt[] lengths, SymInt rows)"
    " -> Tensor"
)
_library.define(
    "masked_linear_wgrad(Tensor dy, Tensor x, Tensor masks, SymInt[] starts, SymInt[] lengths, ScalarType dtype)"
    " -> Tensor"
)


def masked_linear(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Apply a linear layer through a mask: `y = activation(x @ (weight * mask).T + bias)`.

    A pruned weight contributes nothing and receives no gradient, whatever its value:
    `dW = (dy.T @ x) * mask`. Under autocast `x` takes the lower dtype, and so does the product; the weight is cast
    where it is read, and its gradient keeps its dtype.

    Args:
        x: `[..., in_features]`; float64, float32, float16 or bfloat16.
        weight: `[out_features, in_features]`, dtype of `x`, or float32 beside float16 and bfloat16; device of `x`.
        mask: `[out_features, in_features]`, bool, True keeps the weight; or its `masks.pack_words`, which a GPU reads
            without packing it first.
        bias: `[out_features]`, dtype and device of the weight.
        activation: "none" or "relu", in the same kernel.

    Returns:
        `[..., out_features]`, dtype of `x`.

    Raises:
        ValueError: If a shape, dtype or device disagrees, or there is no such activation.

    Source: LT4REC (arXiv 2008.09872), section 2.2, `sNET * mask`.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.ones(1, 3)
        >>> masked_linear(x, weight, torch.tensor([[True, False, True]])).tolist()
        [[2.0], [2.0]]
    """
    x = _autocast(x)
    if mask.dim() != 2:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, wanted [out_features, in_features]")
    _check_masked_linear(x, weight, mask[None], bias, activation)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = torch.ops.lt4rec_sparse.masked_linear(rows, weight, mask[None], bias, [0], [rows.shape[0]], activation)
    return cast(Tensor, y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0]))


def masked_linear_tasks(
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    bias: Tensor | None,
    starts: Sequence[int],
    lengths: Sequence[int],
    activation: str = "none",
) -> Tensor:
    """Apply a linear layer through every task's mask, each to its own range of rows: `masked_linear`, tasks at once.

    The ranges may overlap, as where all tasks read the same `x`. Of a batch with rows of one task alone, order it
    [only a | both | only b], and each task has one range. The gradients of `x` and of the weight are the sums over the
    tasks, always in the same order.

    Args:
        x: `[rows, in_features]`, as in `masked_linear`.
        weight: As in `masked_linear`.
        masks: `[tasks, out_features, in_features]`, bool, or their `pack_words`.
        bias: As in `masked_linear`; one for all tasks.
        starts: Where each task's rows start in `x`.
        lengths: How many they are.
        activation: As in `masked_linear`.

    Returns:
        `[sum of lengths, out_features]`, dtype of `x`: the tasks' rows one after another.

    Raises:
        ValueError: As `masked_linear`, or if a range is not inside `x`.

    Example:
        >>> x, weight, masks = torch.ones(3, 2), torch.ones(1, 2), torch.tensor([[[True, False]], [[True, True]]])
        >>> masked_linear_tasks(x, weight, masks, None, starts=(0, 1), lengths=(2, 2)).flatten().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    x = _autocast(x)
    if x.dim() != 2 or masks.dim() != 3:
        raise ValueError(
            f"x and masks: got shapes {tuple(x.shape)} and {tuple(masks.shape)}, wanted [rows, in_features] and "
            "[tasks, out_features, in_features]"
        )
    _check_masked_linear(x, weight, masks, bias, activation)
    if not len(masks) == len(starts) == len(lengths):
        raise ValueError(f"starts, lengths: got {len(starts)} and {len(lengths)}, wanted {len(masks)}, one a task")
    for start, length in zip(starts, lengths, strict=True):
        if start < 0 or length < 0 or start + length > x.shape[0]:
            raise ValueError(f"range: got {length} rows from {start} on, wanted some of the {x.shape[0]} rows of x")
    y = torch.ops.lt4rec_sparse.masked_linear(x, weight, masks, bias, list(starts), list(lengths), activation)
    return cast(Tensor, y)


def _autocast(x: Tensor) -> Tensor:
    """Return `x` as autocast wants the operands of a matrix product."""
    if x.dtype != torch.float64 and _is_autocast(x):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _is_autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which operations on the device of `x` take the dtypes that they are given."""
    return torch.autocast(x.device.type, enabled=False) if _is_autocast(x) else nullcontext()


def _check_masked_linear(x: Tensor, weight: Tensor, masks: Tensor, bias: Tensor | None, activation: str) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted [out_features, in_features]")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., {weight.shape[1]}], the weight's in_features")
    if masks.dtype not in (torch.bool, torch.int32):
        raise ValueError(f"mask: got {masks.dtype}, wanted torch.bool, True = kept, or the int32 of pack_words")
    n, k = weight.shape
    wanted = (n, k) if masks.dtype == torch.bool else (n, 4 * -(-k // 128))
    if masks.shape[1:] != wanted:
        raise ValueError(f"mask: got shape {tuple(masks.shape[1:])}, wanted {tuple(wanted)}, that of the weight")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, wanted ({weight.shape[0]},), the weight's out_features")
    is_mixed = weight.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)
    if weight.dtype != x.dtype and not is_mixed:
        raise ValueError(f"weight: got {weight.dtype}, wanted {x.dtype}, that of x")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias: got {bias.dtype}, wanted {weight.dtype}, that of the weight")
    for name, other in (("weight", weight), ("mask", masks), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: got device {other.device}, wanted {x.device}, that of x")
    if activation not in ("none", "relu"):
        raise ValueError(f"activation: got {activation!r}, wanted none or relu")


def _on_gpu(name: str) -> Callable[..., Tensor]:
    """Return the GPU's kernel; it is imported when it is first called, since CPU builds of torch have no Triton."""
    specification = getattr(reference, name)

    def run(first: Tensor, *rest: Any) -> Tensor:
        if first.dtype == torch.float64:  # for checks of gradients: the kernels sum in float32
            return cast(Tensor, specification(first, *rest))
        kernel = getattr(importlib.import_module("lt4rec_sparse.kernels.gpu.masked_linear"), name)
        return cast(Tensor, kernel(first, *rest))

    return run


def _as_it_is(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the kernel without autocast: the dtypes were chosen at the door, and a gradient's are its forward's."""

    def run(first: Tensor, *rest: Any) -> Tensor:
        with without_autocast(first):
            return kernel(first, *rest)

    return run


for _name in ("masked_linear", "masked_linear_dgrad", "masked_linear_wgrad"):
    _library.impl(_name, _as_it_is(getattr(reference, _name)), "CompositeExplicitAutograd")
    _library.impl(_name, _as_it_is(_on_gpu(_name)), "CUDA")


@torch.library.register_fake("lt4rec_sparse::masked_linear")
def _masked_linear_fake(
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    bias: Tensor | None,
    starts: Sequence[int],
    lengths: Sequence[int],
    activation: str,
) -> Tensor:
    return x.new_empty(sum(lengths), weight.shape[0])


@torch.library.register_fake("lt4rec_sparse::masked_linear_dgrad")
def _masked_linear_dgrad_fake(
    dy: Tensor, weight: Tensor, masks: Tensor, starts: Sequence[int], lengths: Sequence[int], rows: int
) -> Tensor:
    return dy.new_empty(rows, weight.shape[1])


@torch.library.register_fake("lt4rec_sparse::masked_linear_wgrad")
def _masked_linear_wgrad_fake(
    dy: Tensor, x: Tensor, masks: Tensor, starts: Sequence[int], lengths: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype)


def _masked_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, masks, bias, ctx.starts, ctx.lengths, activation = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    # Of a ReLU the result tells where its gradient passes. weight * mask is formed again, and never kept.
    ctx.save_for_backward(x, weight, masks, *([output] if activation == "relu" else []))


def _masked_linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, masks, *outputs = ctx.saved_tensors
    if outputs:
        dy = torch.ops.aten.threshold_backward(dy, outputs[0], 0)
    needs_x, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
    rows, ranges = x.shape[0], (ctx.starts, ctx.lengths)
    return (
        torch.ops.lt4rec_sparse.masked_linear_dgrad(dy, weight, masks, *ranges, rows) if needs_x else None,
        torch.ops.lt4rec_sparse.masked_linear_wgrad(dy, x, masks, *ranges, weight.dtype) if needs_weight else None,
        None,
        dy.sum(0, dtype=ctx.bias_dtype) if needs_bias else None,
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "lt4rec_sparse::masked_linear", _masked_linear_backward, setup_context=_masked_linear_setup
)


# Both gradients are bilinear, in each other's terms: so that gradients of gradients are right, not dropped.


def _dgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, weight, masks, ctx.starts, ctx.lengths, _ = inputs
    ctx.save_for_backward(dy, weight, masks)


def _dgrad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight, masks = ctx.saved_tensors
    ranges = (ctx.starts, ctx.lengths)
    d_dy = torch.ops.lt4rec_sparse.masked_linear(g, weight, masks, None, *ranges, "none")
    return (
        d_dy,
        torch.ops.lt4rec_sparse.masked_linear_wgrad(dy, g, masks, *ranges, weight.dtype),
        None,
        None,
        None,
        None,
    )


def _wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, masks, ctx.starts, ctx.lengths, _ = inputs
    ctx.save_for_backward(dy, x, masks)


def _wgrad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, masks = ctx.saved_tensors
    ranges = (ctx.starts, ctx.lengths)
    d_dy = torch.ops.lt4rec_sparse.masked_linear(x, g, masks, None, *ranges, "none")
    return d_dy, torch.ops.lt4rec_sparse.masked_linear_dgrad(dy, g, masks, *ranges, x.shape[0]), None, None, None, None


torch.library.register_autograd("lt4rec_sparse::masked_linear_dgrad", _dgrad_backward, setup_context=_dgrad_setup)
torch.library.register_autograd("lt4rec_sparse::masked_linear_wgrad", _wgrad_backward, setup_context=_wgrad_setup)
