"""The other way to a masked product: one kernel multiplies the masks in and casts, then cuBLAS multiplies.

It reads the weight once and writes a copy per task. A large batch repays that: its product expands no mask words.
The gradient of the weight is cuBLAS' product per task, masked and added up by one kernel. Same arguments and results
as `masked_matmul`.

Rows that do not start at multiples of 16 bytes are slow everywhere, also in cuBLAS: here the copies, and `x`, are
padded with columns of zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt4rec_sparse.kernels.gpu.launch import Launch
from lt4rec_sparse.kernels.gpu.weights import where_kept

BLOCK_N, BLOCK_K, WARPS = 16, 128, 4  # 16 rows of 256 to 512 bytes: bound by memory, in any shape
ALIGNMENT = 8  # columns: 16 bytes of 16-bit elements


@triton.jit
def mask_and_cast_kernel(
    weight_ptr, words_ptr, out_ptr, N, K, W, stride_wn, stride_on, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    # out[task, n, k] = weight[n, k] where the task keeps it, else zero; zero past the last column. Axis 2: tasks.
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    rows = tl.program_id(2).to(tl.int64) * N + n
    inside = (n < N)[:, None] & (k < K)[None, :]
    values = tl.load(weight_ptr + n[:, None] * stride_wn + k[None, :], mask=inside, other=0.0)
    values = where_kept(values, words_ptr, rows, k0, n < N, W, BLOCK_N, BLOCK_K)
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
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for task in range(0, TASKS):
        rows = (task * N + n).to(tl.int64)
        products = tl.load(products_ptr + rows[:, None] * stride_pn + k[None, :], mask=inside, other=0.0).to(tl.float32)
        total += where_kept(products, words_ptr, rows, k0, n < N, W, BLOCK_N, BLOCK_K)
    dw = dw_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dw, total.to(dw_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return `y [tasks, rows, out_features]` (`masked_matmul.forward`)."""
    masked, x = mask_and_cast(weight, words, x.dtype), _aligned(x).expand(len(words), -1, -1)
    bias = x.new_zeros(len(weight)) if bias is None else bias.to(x.dtype)
    y = x.new_empty(*x.shape[:2], len(weight))
    for x_of_task, w, rows in zip(x, masked, y, strict=True):
        torch.addmm(bias, x_of_task, w.T, out=rows)  # adds the bias in its epilogue, unlike batched products
    return y.relu_() if activation == "relu" else y  # cuBLAS' own ReLU makes no promise for NaN


def dgrad(dy: Tensor, weight: Tensor, words: Tensor, is_shared: bool) -> Tensor:
    """Return `dx [tasks, rows, in_features]`, or its sum (`masked_matmul.dgrad`)."""
    masked, k = mask_and_cast(weight, words, dy.dtype), weight.shape[1]
    if not is_shared or len(words) == 1:
        dx = torch.bmm(dy, masked)
    else:
        dx = matmul(dy, masked, torch.float32).sum(0, keepdim=True).to(dy.dtype)  # rounds once
    return dx[:, :, :k].contiguous()


def wgrad(dy: Tensor, x: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `dW [out_features, in_features]` in `dtype` (`masked_matmul.wgrad`)."""
    dw = x.new_empty(dy.shape[2], x.shape[2], dtype=dtype)
    products = matmul(dy.transpose(1, 2), _aligned(x).expand(len(words), -1, -1), dtype)
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
    columns = -x.shape[-1] % ALIGNMENT
    return torch.nn.functional.pad(x, (0, columns)) if columns else x


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `a @ b`, two matrices or two batches of them, not rounded to 16 bits on its way to `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if not a.is_cuda:
        return a.to(dtype) @ b.to(dtype)
    return torch.bmm(a, b, out_dtype=dtype) if a.dim() == 3 else torch.mm(a, b, out_dtype=dtype)
