"""`masked_linear`: schema, checks, shape rule, gradients and dispatch; one task's mask, or all tasks' at once.

The device picks the kernel: eager torch on the CPU, Triton or cuBLAS on a GPU (`kernels.gpu`). Tests and benchmarks
force one of the two there through `kernels.gpu.masked_linear.forced_path`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lt4rec_sparse.kernels import reference
from lt4rec_sparse.kernels.autocast import is_autocast, without_autocast

# `x` is `[tasks, rows, in_features]`, or `[1, rows, in_features]` if all tasks read the same: then `is_shared`, and the
# gradient of `x` is the sum over the tasks. `y` and `dy` are `[tasks, rows, out_features]`.
_library = torch.library.Library("lt4rec_sparse", "FRAGMENT")
_library.define("masked_linear(Tensor x, Tensor weight, Tensor masks, Tensor? bias, str activation) -> Tensor")
_library.define("masked_linear_dgrad(Tensor dy, Tensor weight, Tensor masks, bool is_shared) -> Tensor")
_library.define("masked_linear_wgrad(Tensor dy, Tensor x, Tensor masks, ScalarType dtype) -> Tensor")


def masked_linear(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Apply a linear layer through a mask: `y = activation(x @ (weight * mask).T + bias)`; or through every task's.

    A pruned weight contributes nothing and receives no gradient, whatever its value: `dW = (dy.T @ x) * mask`. For
    several tasks the gradient of the weight, and of an `x` that all read, is the sum over the tasks, always in the same
    order. Under autocast `x` takes the lower dtype, and so does the product; the weight is cast where it is read, and
    its gradient keeps its dtype.

    Args:
        x: `[..., in_features]`; float64, float32, float16 or bfloat16. For every task `[tasks, rows, in_features]`, or
            `[rows, in_features]`, which all of them read.
        weight: `[out_features, in_features]`, dtype of `x`, or float32 beside float16 and bfloat16; device of `x`.
        mask: `[out_features, in_features]`, or `[tasks, out_features, in_features]`; bool, True keeps the weight, or
            its `masks.pack_words`, which a GPU reads without packing it first.
        bias: `[out_features]`, dtype and device of the weight.
        activation: "none" or "relu", in the same kernel.

    Returns:
        `[..., out_features]`, or `[tasks, rows, out_features]`; dtype of `x`.

    Raises:
        ValueError: If a shape, dtype or device disagrees, or there is no such activation.

    Source: LT4REC (arXiv 2008.09872), section 2.2, `sNET * mask`.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.ones(1, 3)
        >>> masked_linear(x, weight, torch.tensor([[True, False, True]])).tolist()
        [[2.0], [2.0]]
    """
    x = _autocast(x)
    if mask.dim() not in (2, 3):
        wanted = "[out_features, in_features] or [tasks, out_features, in_features]"
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, wanted {wanted}")
    masks = mask if mask.dim() == 3 else mask[None]
    if mask.dim() == 3 and (x.dim() not in (2, 3) or (x.dim() == 3 and len(x) != len(mask))):
        wanted = f"[rows, in_features] or [{len(mask)}, rows, in_features], for as many tasks as there are masks"
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted {wanted}")
    _check_masked_linear(x, weight, masks, bias, activation)
    rows = x if x.dim() == mask.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    y = cast(Tensor, torch.ops.lt4rec_sparse.masked_linear(rows, weight, masks, bias, activation))
    return y if mask.dim() == 3 else y.view(*x.shape[:-1], weight.shape[0])


def _autocast(x: Tensor) -> Tensor:
    """Return `x` as autocast wants the operands of a matrix product."""
    if x.dtype != torch.float64 and is_autocast(x):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


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
    specification = getattr(reference, name)

    def run(first: Tensor, *rest: Any) -> Tensor:
        if first.dtype == torch.float64:  # for checks of gradients: the kernels sum in float32
            return cast(Tensor, specification(first, *rest))
        # Imported when first called, and here alone: CPU builds of torch have no Triton.
        from lt4rec_sparse.kernels.gpu import masked_linear as kernels

        return cast(Tensor, getattr(kernels, name)(first, *rest))

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
def _masked_linear_fake(x: Tensor, weight: Tensor, masks: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(masks.shape[0], x.shape[1], weight.shape[0])


@torch.library.register_fake("lt4rec_sparse::masked_linear_dgrad")
def _masked_linear_dgrad_fake(dy: Tensor, weight: Tensor, masks: Tensor, is_shared: bool) -> Tensor:
    return dy.new_empty(1 if is_shared else masks.shape[0], dy.shape[1], weight.shape[1])


@torch.library.register_fake("lt4rec_sparse::masked_linear_wgrad")
def _masked_linear_wgrad_fake(dy: Tensor, x: Tensor, masks: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty(dy.shape[2], x.shape[2], dtype=dtype)


def _masked_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, masks, bias, activation = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    # The result of a ReLU tells where its gradient passes. weight * mask is formed again, and never kept.
    ctx.save_for_backward(x, weight, masks, *([output] if activation == "relu" else []))


def _masked_linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, masks, *outputs = ctx.saved_tensors
    if outputs:
        dy = torch.ops.aten.threshold_backward(dy, outputs[0], 0)
    needs_x, needs_weight, _, needs_bias, _ = ctx.needs_input_grad
    return (
        torch.ops.lt4rec_sparse.masked_linear_dgrad(dy, weight, masks, x.shape[0] == 1) if needs_x else None,
        torch.ops.lt4rec_sparse.masked_linear_wgrad(dy, x, masks, weight.dtype) if needs_weight else None,
        None,
        dy.sum((0, 1), dtype=ctx.bias_dtype) if needs_bias else None,
        None,
    )


torch.library.register_autograd(
    "lt4rec_sparse::masked_linear", _masked_linear_backward, setup_context=_masked_linear_setup
)


# Both gradients are bilinear, in each other's terms: so that gradients of gradients are right, not dropped.


def _dgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, weight, masks, _ = inputs
    ctx.save_for_backward(dy, weight, masks)


def _dgrad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight, masks = ctx.saved_tensors
    d_dy = torch.ops.lt4rec_sparse.masked_linear(g, weight, masks, None, "none")
    return d_dy, torch.ops.lt4rec_sparse.masked_linear_wgrad(dy, g, masks, weight.dtype), None, None


def _wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, masks, _ = inputs
    ctx.save_for_backward(dy, x, masks)


def _wgrad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, masks = ctx.saved_tensors
    d_dy = torch.ops.lt4rec_sparse.masked_linear(x, g, masks, None, "none")
    return d_dy, torch.ops.lt4rec_sparse.masked_linear_dgrad(dy, g, masks, x.shape[0] == 1), None, None


torch.library.register_autograd("lt4rec_sparse::masked_linear_dgrad", _dgrad_backward, setup_context=_dgrad_setup)
torch.library.register_autograd("lt4rec_sparse::masked_linear_wgrad", _wgrad_backward, setup_context=_wgrad_setup)
