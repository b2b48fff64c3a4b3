"""Masked matrix products in Triton, for all tasks of one weight in one launch: forward, and both gradients.

    y[t] = activation(x[t] @ (weight * mask_t).T + bias)            x [tasks, rows, in_features]

or `x[0]` for every task, where `x` is `[1, rows, in_features]`, as in a first layer that all tasks read. Sums are
float32, in one order whatever else is in the batch: two calls with the same input give the same bits.

By arithmetic, not yet timed, it is the L2 cache that bounds the product, as it bounds cuBLAS, and mask words add a
sixteenth to the weights' bytes. To expand them costs 4 to 5 instructions per weight and tile of rows: 640 cycles for a
step of 128 x 64 weights, where its product of 128 rows takes 490. So masks are decoded here to save memory and
launches; for large batches they are multiplied in once per step (`mask_and_cast`), and for serving beforehand.

Letters, in kernels only: M rows of a task, N out_features, K in_features, W mask words per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt4rec_sparse.kernels.gpu.epilogue import epilogue
from lt4rec_sparse.kernels.gpu.launch import MULTIPROCESSORS, Launch, Tile, arithmetic, choose_tile
from lt4rec_sparse.kernels.gpu.weights import weight_tile, where_kept

# By arithmetic (`launch.arithmetic`), largest first; the last tile is for few rows (`launch.choose_tile`).
FORWARD = {
    "16": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(16, 32, 128, 4, 4)),
    "tf32": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(16, 32, 64, 4, 3)),
    "fp32": (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2)),
}
# N is what the loop runs over.
DGRAD = {
    "16": (Tile(128, 64, 128, 8, 3), Tile(64, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
    "tf32": (Tile(64, 32, 64, 4, 3), Tile(32, 32, 64, 4, 3), Tile(16, 32, 64, 4, 3)),
    "fp32": (Tile(64, 32, 64, 8, 2), Tile(32, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2)),
}
# M is what the loop runs over. What does not fill the GPU is split over the rows.
WGRAD = {
    "16": (Tile(32, 128, 128, 8, 4), Tile(64, 64, 64, 4, 3)),
    "tf32": (Tile(32, 64, 64, 4, 3), Tile(32, 32, 64, 4, 3)),
    "fp32": (Tile(32, 64, 64, 8, 2), Tile(32, 32, 32, 4, 2)),
}


@triton.jit(do_not_specialize=["M"])
def masked_matmul_fwd_kernel(
    x_ptr,
    values_ptr,
    words_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    W,
    stride_xt,
    stride_xm,
    stride_wn,
    stride_bt,
    stride_ym,
    TOGETHER: tl.constexpr,  # tasks of one program: they read the same rows, so an x tile is loaded once for them
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A column of the tile is a neuron of a task: BLOCK_N / TOGETHER neurons of one task, then the same of the next.
    NEURONS: tl.constexpr = BLOCK_N // TOGETHER
    column = tl.arange(0, BLOCK_N)
    n = tl.program_id(0) * NEURONS + column % NEURONS
    first_task = tl.program_id(2) * TOGETHER
    task = first_task + column // NEURONS
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    has_row = (m < M)[:, None]
    x_rows = x_ptr + first_task.to(tl.int64) * stride_xt + m.to(tl.int64)[:, None] * stride_xm
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :], mask=has_row if EVEN_K else has_row & (k < K)[None, :], other=0.0)
        w = weight_tile(values_ptr, words_ptr, task, n, k0, N, K, W, stride_wn, FORMAT, EVEN_K, BLOCK_N, BLOCK_K)
        acc = tl.dot(x, w.to(x.dtype).T, acc, input_precision=PRECISION)
    acc = epilogue(acc, bias_ptr, task * stride_bt + n, n < N, ACTIVATION)
    y_rows = (task[None, :] * M + m[:, None]).to(tl.int64)
    tl.store(y_ptr + y_rows * stride_ym + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=has_row & (n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def masked_matmul_dgrad_kernel(
    dy_ptr,
    weight_ptr,
    words_ptr,
    dx_ptr,
    M,
    N,
    K,
    W,
    stride_ym,
    stride_wn,
    stride_xm,
    SUMMED: tl.constexpr,  # tasks that a program sums: all that read the same x, or one
    TOGETHER: tl.constexpr,  # of these, how many a weight tile is loaded once for; divides SUMMED
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    has_row = (m < M)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    # Only the loop inside it is pipelined.
    for first in tl.range(0, SUMMED, TOGETHER, num_stages=1):
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            inside = (n < N)[:, None] if EVEN_K else (n < N)[:, None] & (k < K)[None, :]
            w = tl.load(weight_ptr + n[:, None] * stride_wn + k[None, :], mask=inside, other=0.0)
            for t in tl.static_range(TOGETHER):
                task = tl.program_id(2) * SUMMED + first + t
                dy_rows = dy_ptr + (task * M + m).to(tl.int64)[:, None] * stride_ym
                dy = tl.load(dy_rows + n[None, :], mask=has_row if EVEN_N else has_row & (n < N)[None, :], other=0.0)
                masked = where_kept(w, words_ptr, task * N + n, k0, n < N, W, BLOCK_N, BLOCK_K).to(dy.dtype)
                acc = tl.dot(dy, masked, acc, input_precision=PRECISION)
    dx = dx_ptr + (tl.program_id(2) * M + m).to(tl.int64)[:, None] * stride_xm + k[None, :]
    tl.store(dx, acc.to(dx_ptr.dtype.element_ty), mask=has_row & (k < K)[None, :])


@triton.jit(do_not_specialize=["M", "SPLITS"])
def masked_matmul_wgrad_kernel(
    dy_ptr,
    x_ptr,
    words_ptr,
    dw_ptr,
    M,
    N,
    K,
    W,
    stride_ym,
    stride_xt,
    stride_xm,
    SPLITS,
    TOGETHER: tl.constexpr,  # tasks whose dy stand side by side in one product: an x tile is loaded once for them
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A program sums one share of the rows of TOGETHER tasks into dw[share]; the caller adds the shares, in their order.
    NEURONS: tl.constexpr = BLOCK_N // TOGETHER
    column = tl.arange(0, BLOCK_N)
    n = tl.program_id(1) * NEURONS + column % NEURONS
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    share = tl.program_id(2)
    first_task = share // SPLITS * TOGETHER
    task = first_task + column // NEURONS
    rows = tl.cdiv(tl.cdiv(M, SPLITS), BLOCK_M) * BLOCK_M
    start = share % SPLITS * rows
    end = tl.minimum(start + rows, M)
    dy_columns = dy_ptr + (task * M).to(tl.int64)[None, :] * stride_ym + n[None, :]
    x_columns = x_ptr + first_task.to(tl.int64) * stride_xt + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for m0 in range(start, end, BLOCK_M):
        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        has_row = (m < end)[:, None]
        x = tl.load(x_columns + m[:, None] * stride_xm, mask=has_row & (k < K)[None, :], other=0.0)
        dy = tl.load(dy_columns + m[:, None] * stride_ym, mask=has_row & (n < N)[None, :], other=0.0)
        acc = tl.dot(dy.T, x, acc, input_precision=PRECISION)
    acc = where_kept(acc, words_ptr, task * N + n, k0, n < N, W, BLOCK_N, BLOCK_K)
    if TOGETHER > 1:
        acc = tl.sum(acc.reshape(TOGETHER, NEURONS, BLOCK_K), axis=0)
    neuron = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    dw = dw_ptr + (share * N + neuron).to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=(neuron < N)[:, None] & (k < K)[None, :])


def forward(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None, activation: str, precision: str) -> Tensor:
    """Return `y [tasks, rows, out_features]`, in the dtype of `x`; the weight may be float32 beside a 16-bit `x`."""
    y = x.new_empty(len(words), x.shape[1], weight.shape[0])
    forward_launch(x, weight, words, bias, y, activation, precision).run()
    return y


def forward_launch(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    bias: Tensor | None,
    y: Tensor,
    activation: str,
    precision: str,
    tile: Tile | None = None,
) -> Launch:
    """Make the launch of `masked_matmul_fwd_kernel`, in the table's tile unless one is given.

    Args:
        x: `[tasks, rows, in_features]`, or `[1, rows, in_features]` for all tasks; neighbouring elements in its rows.
        weight: `[out_features, in_features]`, neighbouring elements in its rows.
        words: `[tasks, out_features, W]`.
        bias: `[out_features]`, or `[tasks, out_features]`.
        y: `[tasks, rows, out_features]`, contiguous: where the result goes.
        activation: "none" or "relu".
        precision: The arithmetic of float32 products: "ieee" or "tf32".
        tile: One of `FORWARD`.
    """
    (n, k), tasks, rows = weight.shape, len(words), x.shape[1]
    together = _together(tasks, x)
    tiles = FORWARD[arithmetic(x.dtype, precision)]
    tile = tile or choose_tile(tiles, rows, lambda t: triton.cdiv(rows, t.block_m) * triton.cdiv(n * tasks, t.block_n))
    return Launch(
        masked_matmul_fwd_kernel,
        (triton.cdiv(n, tile.block_n // together), triton.cdiv(rows, tile.block_m), tasks // together),
        {
            "x_ptr": x,
            "values_ptr": weight,
            "words_ptr": words,
            "bias_ptr": bias,
            "y_ptr": y,
            "M": rows,
            "N": n,
            "K": k,
            "W": words.shape[2],
            "stride_xt": x.stride(0) if len(x) > 1 else 0,
            "stride_xm": x.stride(1),
            "stride_wn": weight.stride(0),
            "stride_bt": bias.stride(0) if bias is not None and bias.dim() == 2 else 0,
            "stride_ym": y.stride(1),
        },
        {
            "TOGETHER": together,
            "FORMAT": "masked",
            "ACTIVATION": activation,
            "PRECISION": precision,
            "EVEN_K": k % tile.block_k == 0,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        },
        tile.warps,
        tile.stages,
    )


def dgrad(dy: Tensor, weight: Tensor, words: Tensor, is_shared: bool, precision: str) -> Tensor:
    """Return `dx[t] = dy[t] @ (weight * mask_t)`, or their sum `[1, rows, in_features]` if all tasks read one `x`."""
    tasks, rows, _ = dy.shape
    dx = dy.new_empty(1 if is_shared else tasks, rows, weight.shape[1])
    dgrad_launch(dy, weight, words, dx, precision).run()
    return dx


def dgrad_launch(
    dy: Tensor, weight: Tensor, words: Tensor, dx: Tensor, precision: str, tile: Tile | None = None
) -> Launch:
    """Make the launch of `masked_matmul_dgrad_kernel`, in the table's tile unless one is given.

    `dy [tasks, rows, out_features]` and `dx`, of all tasks or one for their sum, are contiguous.
    """
    (n, k), (tasks, rows, _) = weight.shape, dy.shape
    summed = tasks // len(dx)
    tiles = DGRAD[arithmetic(dy.dtype, precision)]
    # Every row of a result is a row of a task, or of all of them.
    tile = tile or choose_tile(
        tiles, rows, lambda t: triton.cdiv(rows, t.block_m) * triton.cdiv(k, t.block_k) * len(dx)
    )
    return Launch(
        masked_matmul_dgrad_kernel,
        (triton.cdiv(k, tile.block_k), triton.cdiv(rows, tile.block_m), len(dx)),
        {
            "dy_ptr": dy,
            "weight_ptr": weight,
            "words_ptr": words,
            "dx_ptr": dx,
            "M": rows,
            "N": n,
            "K": k,
            "W": words.shape[2],
            "stride_ym": dy.stride(1),
            "stride_wn": weight.stride(0),
            "stride_xm": dx.stride(1),
        },
        {
            "SUMMED": summed,
            "TOGETHER": next((size for size in (4, 3, 2) if summed % size == 0), 1),  # more do not fit in registers
            "PRECISION": precision,
            "EVEN_N": n % tile.block_n == 0,
            "EVEN_K": k % tile.block_k == 0,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        },
        tile.warps,
        tile.stages,
    )


def wgrad(dy: Tensor, x: Tensor, words: Tensor, dtype: torch.dtype, precision: str) -> Tensor:
    """Return `dW [out_features, in_features]` in `dtype`: the sum of `(dy[t].T @ x[t]) * mask_t` over the tasks."""
    n, k = dy.shape[2], x.shape[2]
    tile = wgrad_tile(n, k, x.dtype, precision)
    groups = len(dy) // _together(len(dy), x)
    programs = triton.cdiv(n, tile.block_n) * triton.cdiv(k, tile.block_k) * groups
    shares = groups * wgrad_splits(x.shape[1], programs, tile)
    dw = x.new_empty(shares, n, k, dtype=dtype if shares == 1 else torch.float32)
    wgrad_launch(dy, x, words, dw, precision, tile).run()
    return dw[0] if shares == 1 else dw.sum(0).to(dtype)


def wgrad_tile(out_features: int, in_features: int, dtype: torch.dtype, precision: str) -> Tile:
    """Choose for `dW [out_features, in_features]`: the larger tile if it fits inside."""
    large, small = WGRAD[arithmetic(dtype, precision)]
    return large if min(out_features, in_features) > small.block_n else small


def wgrad_splits(rows: int, programs: int, tile: Tile) -> int:
    """Choose into how many shares a task's rows are cut: enough to fill the GPU, none under 8 steps."""
    return max(1, min(MULTIPROCESSORS // max(programs, 1), rows // (8 * tile.block_m)))


def wgrad_launch(dy: Tensor, x: Tensor, words: Tensor, dw: Tensor, precision: str, tile: Tile) -> Launch:
    """Make the launch of `masked_matmul_wgrad_kernel` into `dw [shares, out_features, in_features]`, contiguous.

    There are as many shares for each group of tasks that a program serves; their sum is the result.
    """
    (shares, n, k), (tasks, rows, _) = dw.shape, dy.shape
    together = _together(tasks, x)
    return Launch(
        masked_matmul_wgrad_kernel,
        (triton.cdiv(k, tile.block_k), triton.cdiv(n, tile.block_n // together), shares),
        {
            "dy_ptr": dy,
            "x_ptr": x,
            "words_ptr": words,
            "dw_ptr": dw,
            "M": rows,
            "N": n,
            "K": k,
            "W": words.shape[2],
            "stride_ym": dy.stride(1),
            "stride_xt": x.stride(0) if len(x) > 1 else 0,
            "stride_xm": x.stride(1),
            "SPLITS": shares * together // tasks,
        },
        {
            "TOGETHER": together,
            "PRECISION": precision,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        },
        tile.warps,
        tile.stages,
    )


def _together(tasks: int, x: Tensor) -> int:
    """Return how many tasks one program serves: of those that read the same rows as many as fit in registers."""
    return next((size for size in (4, 2) if len(x) == 1 and tasks % size == 0), 1)
