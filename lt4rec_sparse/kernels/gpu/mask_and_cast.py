"""The other way to a masked product: one kernel multiplies the masks in and casts, then cuBLAS.

Reads the weight once and writes a copy for each task, which a large batch pays back: its product has no words to
expand. The gradient of the weight is cuBLAS' product a task, masked and added up by one kernel. Same arguments and
results as `masked_matmul`.

Rows that do not start at multiples of 16 bytes are slow everywhere, in cuBLAS too: here the copies, and `x`, are padded
with columns of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt4rec_sparse.kernels.gpu.launch import Launch
from lt4rec_sparse.kernels.gpu.weight_tile import kept

BLOCK_N, BLOCK_K, WARPS = 16, 128, 4  # 16 rows of 256 to 512 bytes: bound by memory, in any shape
ALIGNMENT = 8  # columns: 16 bytes of 16-bit elements


@triton.jit
def mask_and_cast_kernel(
    weight_ptr, words_ptr, out_ptr, N, K, W, stride_wn, stride_on, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    # out[task, n, k] = weight[n, k] where task keeps it, else zero, as past the last column; axis 2 is the tasks.
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    rows = tl.program_id(2).to(tl.int64) * N + n
    inside = (n < N)[:, None] & (k < K)[None, :]
    values = tl.load(weight_ptr + n[:, None] * stride_wn + k[None, :], mask=inside, other=0.0)
    w = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    words = tl.load(words_ptr + rows[:, None] * W + w[None, :], mask=(n < N)[:, None], other=0)
    values = tl.where(kept(words, BLOCK_N, BLOCK_K), values, 0.0)
    is_out = (n < N)[:, None] & (k < stride_on)[None, :]
    tl.store(out_ptr + rows[:, None] * stride_on + k[None, :], values.to(out_ptr.dtype.element_ty), mask=is_out)


@triton.jit
def mask_and_sum_kernel(
    products_ptr, words_ptr, dw_ptr, TASKS, N, K, W, stride_pn, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    # dw[n, k] = sum of products[task, n, k] over the tasks that keep it, in their order.
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    inside = (n < N)[:, None] & (k < K)[None, :]
    w = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for task in range(0, TASKS):
        rows = (task * N + n).to(tl.int64)
        products = tl.load(products_ptr + rows[:, None] * stride_pn + k[None, :], mask=inside, other=0.0).to(tl.float32)
        words = tl.load(words_ptr + rows[:, None] * W + w[None, :], mask=(n < N)[:, None], other=0)
        total += tl.where(kept(words, BLOCK_N, BLOCK_K), products, 0.0)
    dw = dw_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dw, total.to(dw_ptr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    bias: Tensor | None,
    starts: Sequence[int],
    lengths: Sequence[int],
    activation: str,
) -> Tensor:
    """Return `y [sum(lengths), out_features]` (`masked_matmul.forward`)."""
    masked, x = mask_and_cast(weight, words, x.dtype), _aligned(x)
    y = x.new_empty(sum(lengths), weight.shape[0])
    bias = None if bias is None else bias.to(x.dtype)
    for task, start, length, rows in zip(masked, starts, lengths, torch.split(y, list(lengths)), strict=True):
        if bias is None:
            torch.mm(x[start : start + length], task.T, out=rows)
        else:
            torch.addmm(bias, x[start : start + length], task.T, out=rows)
    return y.relu_() if activation == "relu" else y


def dgrad(
    dy: Tensor, weight: Tensor, words: Tensor, starts: Sequence[int], lengths: Sequence[int], rows: int
) -> Tensor:
    """Return `dx [rows, in_features]` (`masked_matmul.dgrad`)."""
    masked, k = mask_and_cast(weight, words, dy.dtype), weight.shape[1]
    if len(masked) == 1 and lengths[0] == rows:
        return (dy @ masked[0])[:, :k].contiguous()
    dx = dy.new_zeros(rows, masked.shape[2], dtype=torch.float32)  # the sum over the tasks rounds once
    for task, start, length, part in zip(masked, starts, lengths, torch.split(dy, list(lengths)), strict=True):
        dx[start : start + length] += matmul(part, task, torch.float32)
    return dx[:, :k].to(dy.dtype).contiguous()


def wgrad(
    dy: Tensor, x: Tensor, words: Tensor, starts: Sequence[int], lengths: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Return `dW [out_features, in_features]` in `dtype` (`masked_matmul.wgrad`)."""
    dw = x.new_empty(dy.shape[1], x.shape[1], dtype=dtype)
    x = _aligned(x)
    parts = zip(torch.split(dy, list(lengths)), starts, lengths, strict=True)
    products = torch.stack([matmul(part.T, x[start : start + length], dtype) for part, start, length in parts])
    mask_and_sum_launch(products, words, dw).run()
    return dw


def mask_and_cast(weight: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `[tasks, out_features, columns]` in `dtype`: zeros where nothing is kept and past the last column."""
    n, k = weight.shape
    out = weight.new_empty(len(words), n, -(-k // ALIGNMENT) * ALIGNMENT, dtype=dtype)
    mask_and_cast_launch(weight if weight.stride(1) == 1 else weight.contiguous(), words, out).run()
    return out


def mask_and_cast_launch(weight: Tensor, words: Tensor, out: Tensor) -> Launch:
    """Make the launch of `mask_and_cast_kernel` into `out [tasks, N, columns]`, contiguous, of at least K columns."""
    n, k = weight.shape
    return Launch(
        mask_and_cast_kernel,
        (-(-out.shape[2] // BLOCK_K), -(-n // BLOCK_N), len(words)),
        {
            "weight_ptr": weight,
            "words_ptr": words,
            "out_ptr": out,
            "N": n,
            "K": k,
            "W": words.shape[2],
            "stride_wn": weight.stride(0),
            "stride_on": out.stride(1),
        },
        {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K},
        WARPS,
        1,
    )


def mask_and_sum_launch(products: Tensor, words: Tensor, dw: Tensor) -> Launch:
    """Make the launch of `mask_and_sum_kernel` into `dw [N, K]`; `products` may have more columns."""
    n, k = dw.shape
    return Launch(
        mask_and_sum_kernel,
        (-(-k // BLOCK_K), -(-n // BLOCK_N)),
        {
            "products_ptr": products,
            "words_ptr": words,
            "dw_ptr": dw,
            "TASKS": len(words),
            "N": n,
            "K": k,
            "W": words.shape[2],
            "stride_pn": products.stride(1),
        },
        {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K},
        WARPS,
        1,
    )


def _aligned(x: Tensor) -> Tensor:
    """Return `x` with as many columns as `mask_and_cast` makes."""
    columns = -x.shape[1] % ALIGNMENT
    return torch.nn.functional.pad(x, (0, columns)) if columns else x


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `a @ b`, two matrices or two batches of them, not rounded to 16 bits on its way to `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if not a.is_cuda:
        return a.to(dtype) @ b.to(dtype)
    return torch.bmm(a, b, out_dtype=dtype) if a.dim() == 3 else torch.mm(a, b, out_dtype=dtype)
