"""The tail of an MLP in Triton, for all tasks in one launch: the hidden layers after the first, and the head.

    a      = relu(h[t, i] @ W1_t.T + b1_t)                 W1_t [D1, D0], "premasked" (`weights`)
    a      = relu(a @ W2_t.T + b2_t)                       W2_t [D2, D1]; or no such layer
    scores[i, t * out + j] = act(a @ head[t, j] + head_bias[t, j])

One program computes BLOCK_M rows of one task, and no activation leaves its SM. `h` is in 16 bits, and between layers
activations are rounded to its dtype; the head multiplies and adds in float32.

How it is cut, for 512-256-128-1, by arithmetic; nothing here has been timed:

- A program reads all weights of its task, 328 KB, and its rows of `h`, from the L2 cache.
- The first layer is cut into chunks of BLOCK_N neurons. A chunk is computed over all of D0, and multiplied into the
  second layer's sums at once: so registers hold `[BLOCK_M, BLOCK_N]` and `[BLOCK_M, D2]` float32, never all of D1. A
  chunk costs one more reading of the rows of `h`; up to 64 rows BLOCK_N is 256, and there is one chunk. At 128 rows
  that is too many registers: chunks of 128.
- Every further program reads the weights again. From a third of the multiprocessors on that takes all the bandwidth of
  the L2 cache, so smaller tiles are for batches that would leave more than two thirds of them idle.

Letters, in kernels only: M rows, D0 to D2 widths, W1 and W2 mask words per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt4rec_sparse.kernels.gpu.epilogue import epilogue
from lt4rec_sparse.kernels.gpu.launch import Launch, Tile, choose_tile
from lt4rec_sparse.kernels.gpu.weights import weight_tile

DTYPES = (torch.float16, torch.bfloat16)
MAX_HIDDEN = (256, 128)  # of the first and second hidden layer: more columns or sums than registers hold
MAX_OUT = 4  # the head is computed output by output, beside the tensor cores

# M rows of a program, N neurons of a chunk of the first hidden layer, K in_features of a step. Largest first.
# For widths that are multiples of 16: others run too, with loads of one element each, and the larger tiles spill.
TILES = (Tile(128, 128, 32, 8, 4), Tile(64, 256, 64, 8, 3), Tile(32, 256, 64, 8, 3), Tile(16, 256, 64, 8, 4))
BUSY = 1 / 3  # of the multiprocessors, from which on programs wait for the L2 cache (above)


@triton.jit
def relu_layer(
    x_ptr,  # [M, K]: of one task
    values_ptr,
    words_ptr,
    bias_ptr,
    task,
    m,
    n,
    M,
    W,
    stride_xm,
    stride_wn,
    stride_bt,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return `relu(x @ weight.T + bias)` at rows `m` and neurons `n`, in the dtype of `x`; zeros past neuron N."""
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    has_row = (m < M)[:, None]
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :], mask=has_row if EVEN_K else has_row & (k < K)[None, :], other=0.0)
        w = weight_tile(values_ptr, words_ptr, task, n, k0, N, K, W, stride_wn, FORMAT, EVEN_K, BLOCK_N, BLOCK_K)
        acc = tl.dot(x, w.to(x.dtype).T, acc, input_precision="ieee")
    return epilogue(acc, bias_ptr, task * stride_bt + n, n < N, "relu").to(x_ptr.dtype.element_ty)


@triton.jit
def head_sums(a, head_ptr, task, n, N, OUT: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """Return what activations `a` at neurons `n` add to the head: float32 `[rows, BLOCK_OUT]`."""
    out = tl.arange(0, BLOCK_OUT)
    total = tl.zeros((a.shape[0], BLOCK_OUT), dtype=tl.float32)
    for j in tl.static_range(OUT):
        row = tl.load(head_ptr + (task * OUT + j) * N + n, mask=n < N, other=0.0).to(tl.float32)
        total = tl.where((out == j)[None, :], tl.sum(a.to(tl.float32) * row[None, :], axis=1)[:, None], total)
    return total


@triton.jit(do_not_specialize=["M"])
def fused_tail_kernel(
    h_ptr,
    values1_ptr,
    words1_ptr,
    bias1_ptr,
    values2_ptr,
    words2_ptr,
    bias2_ptr,
    head_ptr,
    head_bias_ptr,
    scores_ptr,
    M,
    W1,
    W2,
    stride_ht,
    stride_hm,
    stride_w1n,
    stride_w2n,
    stride_b1t,
    stride_b2t,
    stride_sm,
    LAYERS: tl.constexpr,  # hidden ones, 1 or 2
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    OUT: tl.constexpr,
    FORMAT1: tl.constexpr,
    FORMAT2: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D1: tl.constexpr,  # a chunk of layer 1's neurons, which are layer 2's columns
    BLOCK_D2: tl.constexpr,  # all of D2
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    task = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h_of_task = h_ptr + task.to(tl.int64) * stride_ht
    n2 = tl.arange(0, BLOCK_D2)
    acc2 = tl.zeros((BLOCK_M, BLOCK_D2), dtype=tl.float32)
    scores = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=tl.float32)
    # Only the loop over K inside it is pipelined: stages of this one would need shared memory for whole weights.
    for n0 in tl.range(0, D1, BLOCK_D1, num_stages=1):
        n1 = n0 + tl.arange(0, BLOCK_D1)
        a = relu_layer(
            h_of_task,
            values1_ptr,
            words1_ptr,
            bias1_ptr,
            task,
            m,
            n1,
            M,
            W1,
            stride_hm,
            stride_w1n,
            stride_b1t,
            D1,
            D0,
            FORMAT1,
            BLOCK_M,
            BLOCK_D1,
            BLOCK_K,
        )
        if LAYERS == 1:
            scores += head_sums(a, head_ptr, task, n1, D1, OUT, BLOCK_OUT)
        else:
            is_even: tl.constexpr = D1 % BLOCK_D1 == 0
            w = weight_tile(
                values2_ptr, words2_ptr, task, n2, n0, D2, D1, W2, stride_w2n, FORMAT2, is_even, BLOCK_D2, BLOCK_D1
            )
            acc2 = tl.dot(a, w.to(a.dtype).T, acc2, input_precision="ieee")
    if LAYERS == 2:
        a = epilogue(acc2, bias2_ptr, task * stride_b2t + n2, n2 < D2, "relu").to(h_ptr.dtype.element_ty)
        scores = head_sums(a, head_ptr, task, n2, D2, OUT, BLOCK_OUT)
    out = tl.arange(0, BLOCK_OUT)
    scores = epilogue(scores, head_bias_ptr, task * OUT + out, out < OUT, ACTIVATION)
    scores_rows = scores_ptr + m.to(tl.int64)[:, None] * stride_sm + task * OUT
    tl.store(scores_rows + out[None, :], scores, mask=(m < M)[:, None] & (out < OUT)[None, :])


class Tail(NamedTuple):
    """What follows the first layer of an MLP, for all tasks: one or two hidden layers with ReLU, and a head."""

    hidden: tuple[Tensor, ...]  # premasked, [tasks, out_features, in_features], in the dtype of the activations
    biases: tuple[Tensor | None, ...]  # of the hidden layers: [out_features], or [tasks, out_features]
    head: Tensor  # [tasks, out, in_features], contiguous, in float32 or the dtype of the activations
    head_bias: Tensor | None  # [tasks, out], contiguous
    activation: str  # of the head: "none" or "sigmoid"


def fits(widths: Sequence[int], dtype: torch.dtype) -> bool:
    """Say whether a tail of these widths, from `in_features` to the head's outputs, can be fused in a dtype."""
    if dtype not in DTYPES or len(widths) not in (3, 4) or min(widths) < 1:
        return False
    _, *hidden, out = widths
    return all(width <= most for width, most in zip(hidden, MAX_HIDDEN, strict=False)) and out <= MAX_OUT


def fused_tail_launch(h: Tensor, tail: Tail, scores: Tensor, tile: Tile | None = None) -> Launch:
    """Make the launch of `fused_tail_kernel`, in the table's tile unless one is given.

    Args:
        h: `[tasks, rows, in_features]`, float16 or bfloat16; neighbouring elements in its rows.
        tail: One that `fits`, on the device of `h`.
        scores: float32 `[rows, tasks * out]`, task beside task: where the result goes.
        tile: One of `TILES`.
    """
    rows = h.shape[1]
    first, second = tail.hidden[0], tail.hidden[1] if len(tail.hidden) == 2 else None
    tasks, out, _ = tail.head.shape
    _, d1, d0 = first.shape
    d2 = second.shape[1] if second is not None else 1
    # The smallest twice: here no tile is for few rows alone.
    tile = tile or choose_tile((*TILES, TILES[-1]), rows, lambda t: triton.cdiv(rows, t.block_m) * tasks, BUSY)
    return Launch(
        fused_tail_kernel,
        (-(-rows // tile.block_m), tasks),
        {
            "h_ptr": h,
            "values1_ptr": first,
            "words1_ptr": None,
            "bias1_ptr": tail.biases[0],
            "values2_ptr": second,
            "words2_ptr": None,
            "bias2_ptr": None if second is None else tail.biases[1],
            "head_ptr": tail.head,
            "head_bias_ptr": tail.head_bias,
            "scores_ptr": scores,
            "M": rows,
            "W1": 0,
            "W2": 0,
            "stride_ht": h.stride(0),
            "stride_hm": h.stride(1),
            "stride_w1n": first.stride(1),
            "stride_w2n": 0 if second is None else second.stride(1),
            "stride_b1t": _task_stride(tail.biases[0]),
            "stride_b2t": 0 if second is None else _task_stride(tail.biases[1]),
            "stride_sm": scores.stride(0),
        },
        {
            "LAYERS": len(tail.hidden),
            "D0": d0,
            "D1": d1,
            "D2": d2,
            "OUT": out,
            "FORMAT1": "premasked",
            "FORMAT2": "" if second is None else "premasked",
            "ACTIVATION": tail.activation,
            "BLOCK_M": tile.block_m,
            # At least 32, the columns of a mask word, for they are the second layer's columns.
            "BLOCK_D1": min(tile.block_n, max(32, triton.next_power_of_2(d1))),
            "BLOCK_D2": max(16, triton.next_power_of_2(d2)),
            "BLOCK_OUT": triton.next_power_of_2(out),
            "BLOCK_K": tile.block_k,
        },
        tile.warps,
        tile.stages,
    )


def _task_stride(bias: Tensor | None) -> int:
    return bias.stride(0) if bias is not None and bias.dim() == 2 else 0
