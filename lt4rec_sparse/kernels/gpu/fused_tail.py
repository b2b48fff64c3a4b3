"""The tail of an MLP in Triton, for all tasks in one launch: the hidden layers after the first, and the head.

    a      = relu(h[t, i] @ W1_t.T + b1_t)                 W1_t [D1, D0], of any format of `weight_tile`
    a      = relu(a @ W2_t.T + b2_t)                        W2_t [D2, D1]; or no such layer
    scores[i, t * out + j] = act(a @ head[t, j] + head_bias[t, j])

One program computes BLOCK_M rows of one task, and no activation leaves its SM. Between layers activations are rounded
to the dtype of `h`; the head multiplies and adds in float32.

The plan, for 512-256-128-1 in 16 bits; predictions, nothing here has seen a clock:

- A program reads all weights of its task, 328 KB, and its rows of `h`, 1 KB each: from the L2 cache, at about 64 bytes
  a clock for one SM, and 25 where all of them read. Alone that is 3 us; the arithmetic of 64 rows is 3.5 us of wgmma.
- The first layer is cut into chunks of BLOCK_N neurons. A chunk is computed over all of D0, and multiplied into the
  second layer's sums at once: so registers hold `[BLOCK_M, BLOCK_N]` and `[BLOCK_M, D2]` float32, never all of D1. A
  chunk costs one more reading of the rows of `h`; up to 64 rows BLOCK_N is 256, and there is one chunk.
- 64 rows: 8 warps, 96 registers a thread of sums, 120 KB of shared memory: three stages of 40 KB, which the second
  layer's operands, 96 KB, use again after the loop. At 128 rows that is too many registers: chunks of 128.
- Every further program reads the weights again. From a third of the multiprocessors on that takes all the bandwidth of
  the L2 cache, so smaller tiles are for batches that would leave more than two thirds of them idle.
- So 5, 6 and 14 us for two tasks and batches of 256, 2048 and 8192.

Letters, in kernels only: M rows, D0 to D2 widths, W1 and W2 mask words a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt4rec_sparse.kernels.gpu.device_weight import Weight
from lt4rec_sparse.kernels.gpu.launch import Launch
from lt4rec_sparse.kernels.gpu.tiles import MULTIPROCESSORS, Tile, arithmetic
from lt4rec_sparse.kernels.gpu.weight_tile import weight_tile

MAX_HIDDEN = (256, 128)  # of the first and second hidden layer: more columns or sums than registers hold
MAX_OUT = 4  # the head is computed output by output, beside the tensor cores

# M rows of a program, N neurons of a chunk of the first hidden layer, K in_features of a step. Largest first.
# For widths that are multiples of 16: others run too, with loads of one element each, and the larger tiles spill.
TILES = {
    "16": (Tile(128, 128, 32, 8, 4), Tile(64, 256, 64, 8, 3), Tile(32, 256, 64, 8, 3), Tile(16, 256, 64, 8, 4)),
    "tf32": (Tile(64, 128, 32, 8, 3), Tile(32, 128, 32, 8, 3), Tile(16, 128, 32, 8, 3)),
    "fp32": (Tile(32, 32, 32, 8, 3), Tile(16, 32, 32, 8, 3)),
}
# Of compressed values: offsets stand for 128 columns, and what is a neuron of one layer is a column of the next.
COMPRESSED = {
    "16": (Tile(64, 128, 128, 8, 1), Tile(32, 128, 128, 8, 1), Tile(16, 128, 128, 8, 1)),
    "tf32": (Tile(32, 128, 128, 8, 1), Tile(16, 128, 128, 8, 1)),
}  # none for IEEE float32: 128 columns of both operands, which are registers there, spill
# Programs that make a tile worth its size: those of 16-bit and TF32 tiles wait for the L2 cache (above), those of IEEE
# float32 for the cores, which only more programs bring in.
PROGRAMS = {"16": MULTIPROCESSORS // 3, "tf32": MULTIPROCESSORS // 3, "fp32": MULTIPROCESSORS * 3 // 4}


@triton.jit
def relu_layer(
    x_ptr,  # [M, K]: of one task
    values_ptr,
    words_ptr,
    offsets_ptr,
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
    TASKS: tl.constexpr,
    FORMAT: tl.constexpr,
    PRECISION: tl.constexpr,
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
        w = weight_tile(
            values_ptr, words_ptr, offsets_ptr, task, n, k0, N, K, W, stride_wn, TASKS, FORMAT, EVEN_K, BLOCK_N, BLOCK_K
        )
        acc = tl.dot(x, w.to(x.dtype).T, acc, input_precision=PRECISION)
    return relu(acc, bias_ptr, task, n, N, stride_bt).to(x_ptr.dtype.element_ty)


@triton.jit
def relu(acc, bias_ptr, task, n, N, stride_bt):
    """Add the neurons' biases and cut below zero; NaN stays NaN."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + task * stride_bt + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return tl.where(acc < 0, 0.0, acc)


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
    offsets1_ptr,
    bias1_ptr,
    values2_ptr,
    words2_ptr,
    offsets2_ptr,
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
    TASKS: tl.constexpr,
    FORMAT1: tl.constexpr,
    FORMAT2: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
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
            offsets1_ptr,
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
            TASKS,
            FORMAT1,
            PRECISION,
            BLOCK_M,
            BLOCK_D1,
            BLOCK_K,
        )
        if LAYERS == 1:
            scores += head_sums(a, head_ptr, task, n1, D1, OUT, BLOCK_OUT)
        else:
            w = weight_tile(
                values2_ptr,
                words2_ptr,
                offsets2_ptr,
                task,
                n2,
                n0,
                D2,
                D1,
                W2,
                stride_w2n,
                TASKS,
                FORMAT2,
                D1 % BLOCK_D1 == 0,
                BLOCK_D2,
                BLOCK_D1,
            )
            acc2 = tl.dot(a, w.to(a.dtype).T, acc2, input_precision=PRECISION)
    if LAYERS == 2:
        a = relu(acc2, bias2_ptr, task, n2, D2, stride_b2t).to(h_ptr.dtype.element_ty)
        scores = head_sums(a, head_ptr, task, n2, D2, OUT, BLOCK_OUT)
    out = tl.arange(0, BLOCK_OUT)
    if head_bias_ptr is not None:
        scores += tl.load(head_bias_ptr + task * OUT + out, mask=out < OUT, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "sigmoid":
        scores = tl.sigmoid(scores)
    scores_rows = scores_ptr + m.to(tl.int64)[:, None] * stride_sm + task * OUT
    tl.store(scores_rows + out[None, :], scores, mask=(m < M)[:, None] & (out < OUT)[None, :])


class Tail(NamedTuple):
    """What follows the first layer of an MLP, for all tasks: one or two hidden layers with ReLU, and a head."""

    hidden: tuple[Weight, ...]
    biases: tuple[Tensor | None, ...]  # of the hidden layers: [out_features], or [tasks, out_features]
    head: Tensor  # [tasks, out, in_features], contiguous, in float32 or the dtype of the activations
    head_bias: Tensor | None  # [tasks, out], contiguous
    activation: str  # of the head: "none" or "sigmoid"


def fits(
    widths: Sequence[int], dtype: torch.dtype = torch.float16, precision: str = "ieee", is_compressed: bool = False
) -> bool:
    """Say whether a tail can be fused.

    Args:
        widths: `in_features`, each hidden layer's, and the head's outputs.
        dtype: Of `h` and the weights.
        precision: Of float32 products: "ieee" or "tf32".
        is_compressed: Whether a hidden layer's format is "shared".
    """
    if len(widths) not in (3, 4) or min(widths) < 1:
        return False
    _, *hidden, out = widths
    if is_compressed and arithmetic(dtype, precision) not in COMPRESSED:
        return False
    return all(width <= most for width, most in zip(hidden, MAX_HIDDEN, strict=False)) and out <= MAX_OUT


def fused_tail_into(h: Tensor, tail: Tail, scores: Tensor, precision: str) -> None:
    """Write every task's scores.

    Args:
        h: `[tasks, rows, in_features]`, neighbouring elements in its rows.
        tail: Whose widths `fits`, on the device of `h`.
        scores: float32 `[rows, tasks * out]`, task beside task.
        precision: Of float32 products: "ieee" or "tf32".
    """
    fused_tail_launch(h, tail, scores, precision).run()


def fused_tail_launch(h: Tensor, tail: Tail, scores: Tensor, precision: str, tile: Tile | None = None) -> Launch:
    """Make the launch of `fused_tail_kernel`, in the table's tile unless one is given."""
    rows = h.shape[1]
    first, second = tail.hidden[0], tail.hidden[1] if len(tail.hidden) == 2 else None
    tasks, out, _ = tail.head.shape
    d1, d0 = first.shape
    d2 = second.shape[0] if second is not None else 1
    is_compressed = any(weight.format == "shared" for weight in tail.hidden)
    tile = tile or tail_tile(rows, tasks, h.dtype, precision, is_compressed)
    return Launch(
        fused_tail_kernel,
        (-(-rows // tile.block_m), tasks),
        {
            "h_ptr": h,
            "values1_ptr": first.values,
            "words1_ptr": first.words,
            "offsets1_ptr": first.offsets,
            "bias1_ptr": tail.biases[0],
            "values2_ptr": second.values if second else None,
            "words2_ptr": second.words if second else None,
            "offsets2_ptr": second.offsets if second else None,
            "bias2_ptr": tail.biases[1] if second else None,
            "head_ptr": tail.head,
            "head_bias_ptr": tail.head_bias,
            "scores_ptr": scores,
            "M": rows,
            "W1": _words_a_row(first),
            "W2": _words_a_row(second) if second else 0,
            "stride_ht": h.stride(0),
            "stride_hm": h.stride(1),
            "stride_w1n": _row_stride(first),
            "stride_w2n": _row_stride(second) if second else 0,
            "stride_b1t": _task_stride(tail.biases[0]),
            "stride_b2t": _task_stride(tail.biases[1]) if second else 0,
            "stride_sm": scores.stride(0),
        },
        {
            "LAYERS": len(tail.hidden),
            "D0": d0,
            "D1": d1,
            "D2": d2,
            "OUT": out,
            "TASKS": tasks,
            "FORMAT1": first.format,
            "FORMAT2": second.format if second else "",
            "ACTIVATION": tail.activation,
            "PRECISION": precision,
            "BLOCK_M": tile.block_m,
            # Not under 128, which is what compressed values need: so the same sums, bit by bit, in every format.
            "BLOCK_D1": min(tile.block_n, max(128, triton.next_power_of_2(d1))),
            "BLOCK_D2": max(16, triton.next_power_of_2(d2)),
            "BLOCK_OUT": triton.next_power_of_2(out),
            "BLOCK_K": tile.block_k,
        },
        tile.warps,
        tile.stages,
    )


def tail_tile(rows: int, tasks: int, dtype: torch.dtype, precision: str, is_compressed: bool = False) -> Tile:
    """Choose the largest tile that is worth its size, else the smallest."""
    kind = arithmetic(dtype, precision)
    tiles = (COMPRESSED if is_compressed else TILES)[kind]
    for tile in tiles:
        if -(-rows // tile.block_m) * tasks >= PROGRAMS[kind]:
            return tile
    return tiles[-1]


def _words_a_row(weight: Weight) -> int:
    return 0 if weight.words is None else weight.words.shape[2]


def _row_stride(weight: Weight) -> int:
    return 0 if weight.format == "shared" else weight.values.stride(-2)


def _task_stride(bias: Tensor | None) -> int:
    return bias.stride(0) if bias is not None and bias.dim() == 2 else 0
