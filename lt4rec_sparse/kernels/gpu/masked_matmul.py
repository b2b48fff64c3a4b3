"""Masked matrix products in Triton, for all tasks of one weight in one launch: forward, and both gradients.

Task `t` reads its range of rows of `x` and writes its own rows of `y`:

    y[y_starts[t] + i] = activation(x[x_starts[t] + i] @ (weight * mask_t).T + bias),    0 <= i < lengths[t]

Ranges of `x` may overlap, as in a first layer that all tasks read; the rows of `y` stand task after task. Sums are
float32, in one order whatever else is in the batch: two calls with the same input give the same bits.

Counted for an H200 (790 TFLOP/s in bfloat16, 5.5 TB/s from the L2 cache), not yet timed. A first layer of 1024-512 for
two tasks and 2048 rows takes 5.4 us of arithmetic. Tiles of 128 x 128 read x 8 times and the weights 16 times, 65 MB or
12 us: it is the L2 cache that bounds it, as it bounds cuBLAS. Words add a sixteenth to the weights' bytes. To expand
them costs 4 to 5 instructions a weight and tile of rows: 640 cycles a step of 128 x 64 weights, where its product of
128 rows takes 490. So masks are decoded here to save memory and launches; where weights do not change, they are
multiplied in beforehand ("premasked"), and for large batches once a step (`mask_and_cast`).

Letters, in kernels only: M rows, N out_features, K in_features, W mask words a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt4rec_sparse.kernels.gpu.device_weight import Weight
from lt4rec_sparse.kernels.gpu.launch import Launch
from lt4rec_sparse.kernels.gpu.tiles import Tile, dgrad_tile, forward_tile, wgrad_splits, wgrad_tile
from lt4rec_sparse.kernels.gpu.weight_tile import kept, weight_tile

MAX_TASKS = 4  # of one launch: more unrolled products do not fit in registers, and are launched by fours


def coded(rows: Sequence[int]) -> tuple[int, ...]:
    """Return row numbers, each below 2^26, as kernels take them: `32 row + 17`.

    A kernel is compiled anew for integers that 16 divides, for 1, and for others, each element of a tuple by itself.
    Ranges change with every batch, and in dozens of such ways. Coded, all numbers are others.
    """
    return tuple(32 * row + 17 for row in rows)


@triton.jit
def at(values, index: tl.constexpr):
    """Return the `index`-th of row numbers that are `coded`."""
    return values[index] >> 5


@triton.jit
def pick(values, index, TASKS: tl.constexpr):
    """Return `at(values, index)` for an index, or a tensor of them, that only the device knows."""
    picked = index * 0 + values[0]
    for i in tl.static_range(1, TASKS):
        picked = tl.where(index == i, values[i], picked)
    return picked >> 5


@triton.jit
def masked_matmul_fwd_kernel(
    x_ptr,
    values_ptr,
    words_ptr,
    offsets_ptr,
    bias_ptr,
    y_ptr,
    x_starts,
    y_starts,
    lengths,
    N,
    K,
    W,
    stride_xt,
    stride_xm,
    stride_wn,
    stride_bt,
    stride_ym,
    TASKS: tl.constexpr,
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
    length = pick(lengths, first_task, TASKS)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(1) * BLOCK_M >= length:
        return
    has_row = (m < length)[:, None]
    x_rows = (
        x_ptr
        + first_task.to(tl.int64) * stride_xt
        + (pick(x_starts, first_task, TASKS) + m).to(tl.int64)[:, None] * stride_xm
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :], mask=has_row if EVEN_K else has_row & (k < K)[None, :], other=0.0)
        w = weight_tile(
            values_ptr, words_ptr, offsets_ptr, task, n, k0, N, K, W, stride_wn, TASKS, FORMAT, EVEN_K, BLOCK_N, BLOCK_K
        )
        acc = tl.dot(x, w.to(x.dtype).T, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + task * stride_bt + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0, 0.0, acc)  # NaN stays NaN
    elif ACTIVATION == "sigmoid":
        acc = tl.sigmoid(acc)
    y_rows = (pick(y_starts, task, TASKS)[None, :] + m[:, None]).to(tl.int64)
    tl.store(y_ptr + y_rows * stride_ym + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=has_row & (n < N)[None, :])


@triton.jit
def weight_of_columns(weight_ptr, n, k, N, K, stride_wn, EVEN_K: tl.constexpr):
    """Return weights of neurons `n` and columns `k`, the masks not applied."""
    inside = (n < N)[:, None] if EVEN_K else (n < N)[:, None] & (k < K)[None, :]
    return tl.load(weight_ptr + n[:, None] * stride_wn + k[None, :], mask=inside, other=0.0)


@triton.jit
def under_words(values, words_ptr, task, n, k0, N, W, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return `values [BLOCK_N, BLOCK_K]` where the task keeps the weight, zero elsewhere."""
    w = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    words = tl.load(words_ptr + (task * N + n)[:, None] * W + w[None, :], mask=(n < N)[:, None], other=0)
    # Chosen, not multiplied: a pruned weight may be NaN.
    return tl.where(kept(words, BLOCK_N, BLOCK_K), values, 0.0)


@triton.jit(do_not_specialize=["M"])
def masked_matmul_dgrad_kernel(
    dy_ptr,
    weight_ptr,
    words_ptr,
    dx_ptr,
    x_starts,
    y_starts,
    lengths,
    M,
    N,
    K,
    W,
    stride_ym,
    stride_wn,
    stride_xm,
    TASKS: tl.constexpr,
    TOGETHER: tl.constexpr,  # all tasks read the same rows: a weight tile is loaded once for them
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    m0 = tl.program_id(1) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    if TOGETHER:
        inside = ((m >= at(x_starts, 0)) & (m < at(x_starts, 0) + at(lengths, 0)))[:, None]
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            w = weight_of_columns(weight_ptr, n, k, N, K, stride_wn, EVEN_K)
            for t in tl.static_range(TASKS):
                dy_rows = dy_ptr + (at(y_starts, t) - at(x_starts, t) + m).to(tl.int64)[:, None] * stride_ym
                dy = tl.load(dy_rows + n[None, :], mask=inside if EVEN_N else inside & (n < N)[None, :], other=0.0)
                masked = under_words(w, words_ptr, t, n, k0, N, W, BLOCK_N, BLOCK_K).to(dy.dtype)
                acc = tl.dot(dy, masked, acc, input_precision=PRECISION)
    else:
        for t in tl.static_range(TASKS):
            start, end = at(x_starts, t), at(x_starts, t) + at(lengths, t)
            inside = ((m >= start) & (m < end))[:, None]
            dy_rows = dy_ptr + (at(y_starts, t) - start + m).to(tl.int64)[:, None] * stride_ym
            meets = (m0 < end) & (m0 + BLOCK_M > start)
            for n0 in range(0, tl.where(meets, N, 0), BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N)
                w = weight_of_columns(weight_ptr, n, k, N, K, stride_wn, EVEN_K)
                dy = tl.load(dy_rows + n[None, :], mask=inside if EVEN_N else inside & (n < N)[None, :], other=0.0)
                masked = under_words(w, words_ptr, t, n, k0, N, W, BLOCK_N, BLOCK_K).to(dy.dtype)
                acc = tl.dot(dy, masked, acc, input_precision=PRECISION)
    dx = dx_ptr + m.to(tl.int64)[:, None] * stride_xm + k[None, :]
    tl.store(dx, acc.to(dx_ptr.dtype.element_ty), mask=(m < M)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["SPLITS"])
def masked_matmul_wgrad_kernel(
    dy_ptr,
    x_ptr,
    words_ptr,
    dw_ptr,
    x_starts,
    y_starts,
    lengths,
    N,
    K,
    W,
    stride_ym,
    stride_xm,
    SPLITS,
    TASKS: tl.constexpr,
    TOGETHER: tl.constexpr,  # tasks whose dy stand side by side in one product, 1 or all: an x tile is loaded once
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Split s sums its share of each task's rows into dw[s]; who called adds the shares, in their order.
    NEURONS: tl.constexpr = BLOCK_N // TOGETHER
    column = tl.arange(0, BLOCK_N)
    n = tl.program_id(1) * NEURONS + column % NEURONS
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    total = tl.zeros((NEURONS, BLOCK_K), dtype=tl.float32)
    for first_task in tl.static_range(0, TASKS, TOGETHER):
        task = first_task + column // NEURONS
        share = tl.cdiv(tl.cdiv(at(lengths, first_task), SPLITS), BLOCK_M) * BLOCK_M
        end = tl.minimum((split + 1) * share, at(lengths, first_task))
        dy_columns = dy_ptr + pick(y_starts, task, TASKS).to(tl.int64)[None, :] * stride_ym + n[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for m0 in range(split * share, end, BLOCK_M):
            m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
            has_row = (m < end)[:, None]
            x = tl.load(
                x_ptr + (at(x_starts, first_task) + m)[:, None] * stride_xm + k[None, :],
                mask=has_row & (k < K)[None, :],
                other=0.0,
            )
            dy = tl.load(dy_columns + m[:, None] * stride_ym, mask=has_row & (n < N)[None, :], other=0.0)
            acc = tl.dot(dy.T, x, acc, input_precision=PRECISION)
        acc = under_words(acc, words_ptr, task, n, k0, N, W, BLOCK_N, BLOCK_K)
        if TOGETHER == 1:
            total += acc
        else:
            total += tl.sum(acc.reshape(TOGETHER, NEURONS, BLOCK_K), axis=0)
    rows = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    dw = dw_ptr + (split * N + rows).to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dw, total.to(dw_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (k < K)[None, :])


def forward(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    bias: Tensor | None,
    starts: Sequence[int],
    lengths: Sequence[int],
    activation: str,
    precision: str,
) -> Tensor:
    """Return `y [sum(lengths), out_features]`, in the dtype of `x`; the weight may be float32 beside a 16-bit `x`."""
    y = x.new_empty(sum(lengths), weight.shape[0])
    masked = Weight("masked", (weight.shape[0], weight.shape[1]), weight, words, None, len(starts))
    forward_into(x, masked, bias, y, starts, lengths, activation, precision)
    return y


def forward_into(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    y: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    activation: str,
    precision: str,
) -> None:
    """Write `y [sum(lengths), out_features]`.

    `x` is `[rows, in_features]`, or `[tasks, rows, in_features]` where each task has its own; `bias` is
    `[out_features]`, or `[tasks, out_features]`.
    """
    for first in range(0, len(starts), MAX_TASKS):
        tasks = slice(first, first + MAX_TASKS)
        part = weight
        if weight.tasks > MAX_TASKS:
            part = weight.of_tasks(tasks)
        part_x = x[tasks] if x.dim() == 3 else x
        part_bias = bias[tasks] if bias is not None and bias.dim() == 2 else bias
        y_starts = _y_starts(lengths)[tasks]
        forward_launch(part_x, part, part_bias, y, starts[tasks], y_starts, lengths[tasks], activation, precision).run()


def forward_launch(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    y: Tensor,
    x_starts: Sequence[int],
    y_starts: Sequence[int],
    lengths: Sequence[int],
    activation: str,
    precision: str,
    tile: Tile | None = None,
) -> Launch:
    """Make the launch of `masked_matmul_fwd_kernel`, in the table's tile unless one is given."""
    (n, k), tasks = weight.shape, weight.tasks
    compressed = weight.format == "shared"
    together = 1 if x.dim() == 3 else _together(x_starts, lengths)
    tile = tile or forward_tile(max(lengths), n * tasks, x.dtype, precision, compressed)
    return Launch(
        masked_matmul_fwd_kernel,
        (triton.cdiv(n, tile.block_n // together), triton.cdiv(max(lengths), tile.block_m), tasks // together),
        {
            "x_ptr": x,
            "values_ptr": weight.values,
            "words_ptr": weight.words,
            "offsets_ptr": weight.offsets,
            "bias_ptr": bias,
            "y_ptr": y,
            "x_starts": coded(x_starts),
            "y_starts": coded(y_starts),
            "lengths": coded(lengths),
            "N": n,
            "K": k,
            "W": 0 if weight.words is None else weight.words.shape[2],
            "stride_xt": x.stride(0) if x.dim() == 3 else 0,
            "stride_xm": x.stride(-2),
            "stride_wn": 0 if compressed else weight.values.stride(-2),
            "stride_bt": bias.stride(0) if bias is not None and bias.dim() == 2 else 0,
            "stride_ym": y.stride(0),
        },
        {
            "TASKS": tasks,
            "TOGETHER": together,
            "FORMAT": weight.format,
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


def dgrad(
    dy: Tensor, weight: Tensor, words: Tensor, starts: Sequence[int], lengths: Sequence[int], rows: int, precision: str
) -> Tensor:
    """Return `dx [rows, in_features]`, in the dtype of `dy`: the sum of `dy_t @ (weight * mask_t)` over the tasks."""
    parts = []
    dtype = dy.dtype if len(starts) <= MAX_TASKS else torch.float32  # the sum over all tasks rounds once
    for first in range(0, len(starts), MAX_TASKS):
        tasks = slice(first, first + MAX_TASKS)
        dx = dy.new_empty(rows, weight.shape[1], dtype=dtype)
        ranges = (starts[tasks], _y_starts(lengths)[tasks], lengths[tasks])
        dgrad_launch(dy, weight, words[tasks], dx, *ranges, precision).run()
        parts.append(dx)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0).to(dy.dtype)


def dgrad_launch(
    dy: Tensor,
    weight: Tensor,
    words: Tensor,
    dx: Tensor,
    x_starts: Sequence[int],
    y_starts: Sequence[int],
    lengths: Sequence[int],
    precision: str,
    tile: Tile | None = None,
) -> Launch:
    """Make the launch of `masked_matmul_dgrad_kernel`, in the table's tile unless one is given."""
    n, k = weight.shape
    tile = tile or dgrad_tile(len(dx), k, dy.dtype, precision)
    return Launch(
        masked_matmul_dgrad_kernel,
        (triton.cdiv(k, tile.block_k), triton.cdiv(len(dx), tile.block_m)),
        {
            "dy_ptr": dy,
            "weight_ptr": weight,
            "words_ptr": words,
            "dx_ptr": dx,
            "x_starts": coded(x_starts),
            "y_starts": coded(y_starts),
            "lengths": coded(lengths),
            "M": len(dx),
            "N": n,
            "K": k,
            "W": words.shape[2],
            "stride_ym": dy.stride(0),
            "stride_wn": weight.stride(0),
            "stride_xm": dx.stride(0),
        },
        {
            "TASKS": len(x_starts),
            "TOGETHER": len(x_starts) > 1 and len(set(zip(x_starts, lengths, strict=True))) == 1,
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


def wgrad(
    dy: Tensor,
    x: Tensor,
    words: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    dtype: torch.dtype,
    precision: str,
) -> Tensor:
    """Return `dW [out_features, in_features]` in `dtype`: the sum of `(dy_t.T @ x_t) * mask_t` over the tasks."""
    n, k = dy.shape[1], x.shape[1]
    shares = []
    for first in range(0, len(starts), MAX_TASKS):
        tasks = slice(first, first + MAX_TASKS)
        tile = wgrad_tile(n, k, x.dtype, precision)
        splits = wgrad_splits(max(lengths[tasks]), triton.cdiv(n, tile.block_n) * triton.cdiv(k, tile.block_k), tile)
        is_whole = splits == 1 and len(starts) <= MAX_TASKS
        share = x.new_empty(splits, n, k, dtype=dtype if is_whole else torch.float32)
        ranges = (starts[tasks], _y_starts(lengths)[tasks], lengths[tasks])
        wgrad_launch(dy, x, words[tasks], share, *ranges, precision, tile).run()
        shares.append(share)
    dw = shares[0] if len(shares) == 1 else torch.cat(shares)
    return dw[0] if len(dw) == 1 else dw.sum(0).to(dtype)


def wgrad_launch(
    dy: Tensor,
    x: Tensor,
    words: Tensor,
    dw: Tensor,
    x_starts: Sequence[int],
    y_starts: Sequence[int],
    lengths: Sequence[int],
    precision: str,
    tile: Tile | None = None,
) -> Launch:
    """Make the launch of `masked_matmul_wgrad_kernel` into `dw [splits, N, K]`; in the table's tile unless given."""
    splits, n, k = dw.shape
    tile = tile or wgrad_tile(n, k, x.dtype, precision)
    together = _together(x_starts, lengths)
    return Launch(
        masked_matmul_wgrad_kernel,
        (triton.cdiv(k, tile.block_k), triton.cdiv(n, tile.block_n // together), splits),
        {
            "dy_ptr": dy,
            "x_ptr": x,
            "words_ptr": words,
            "dw_ptr": dw,
            "x_starts": coded(x_starts),
            "y_starts": coded(y_starts),
            "lengths": coded(lengths),
            "N": n,
            "K": k,
            "W": words.shape[2],
            "stride_ym": dy.stride(0),
            "stride_xm": x.stride(0),
            "SPLITS": splits,
        },
        {
            "TASKS": len(x_starts),
            "TOGETHER": together,
            "PRECISION": precision,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        },
        tile.warps,
        tile.stages,
    )


def _together(x_starts: Sequence[int], lengths: Sequence[int]) -> int:
    """Return how many tasks one program may serve: all that read the same rows, if they divide a tile."""
    tasks = len(x_starts)
    is_same = len(set(zip(x_starts, lengths, strict=True))) == 1
    return tasks if is_same and tasks in (2, 4) else 1


def _y_starts(lengths: Sequence[int]) -> list[int]:
    """Let the tasks' rows stand in `y` one after another."""
    return [sum(lengths[:t]) for t in range(len(lengths))]
