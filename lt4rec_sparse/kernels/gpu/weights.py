"""How a tile of all tasks' weight is read, in one of two layouts, for a weight `[N, K]` and its tasks.

- "premasked", for serving: `values [tasks, N, K]`, one copy per task with zeros where nothing is kept.
- "masked", for training: `values [N, K]` once, and `words [tasks, N, W]` (`masks.pack_words`): bit `k % 32` of word
  `k // 32` says whether column `k` is kept. The weight may change.

A word is loaded once for 32 weights and expanded in registers. One load of a word for each weight would fill the shared
memory of a pipelined loop with copies of masks.
"""

import triton
import triton.language as tl


@triton.jit
def where_kept(values, words_ptr, row, k0, is_row, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return `values [ROWS, COLUMNS]` where the mask keeps them, zero elsewhere: the one reader of mask words.

    `row` are rows of words, a task's after another's; `k0` is the first column, a multiple of COLUMNS.
    """
    w = k0 // 32 + tl.arange(0, COLUMNS // 32)  # always inside: W is padded to 128 columns
    words = tl.load(words_ptr + row[:, None] * W + w[None, :], mask=is_row[:, None], other=0)
    shifts = tl.arange(0, 32)
    kept = ((words[:, :, None] >> shifts[None, None, :]) & 1).reshape(ROWS, COLUMNS) != 0
    # Chosen, not multiplied: a pruned weight may be NaN.
    return tl.where(kept, values, 0.0)


@triton.jit
def weight_tile(
    values_ptr,
    words_ptr,
    task,  # scalar, or int32 [BLOCK_N]
    n,  # int32 [BLOCK_N], rows of the weight
    k0,  # the first column, a multiple of BLOCK_K
    N,
    K,
    W,
    stride_wn,
    FORMAT: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a power of two, 32 to 128
):
    """Return weights `[BLOCK_N, BLOCK_K]` of the tasks, in the dtype of `values`; zeros where nothing is kept."""
    k = k0 + tl.arange(0, BLOCK_K)
    is_row = n < N
    rows = n if FORMAT == "masked" else task * N + n
    inside = is_row[:, None] if EVEN_K else is_row[:, None] & (k < K)[None, :]
    values = tl.load(values_ptr + rows[:, None] * stride_wn + k[None, :], mask=inside, other=0.0)
    if FORMAT == "masked":
        values = where_kept(values, words_ptr, task * N + n, k0, is_row, W, BLOCK_N, BLOCK_K).to(values.dtype)
    return values
