"""How a kernel reads a tile of weights: dense with the masks multiplied in, dense under bit planes, or compressed.

The formats, all for a weight `[N, K]` and its tasks:

- "premasked": `values [tasks, N, K]`, each task's copy with zeros where nothing is kept.
- "masked": `values [N, K]` once, and `words [tasks, N, W]`, int32: bit `k % 32` of word `k // 32` says whether column
  `k` is kept. `W` is a multiple of 4, so that a row of words starts at 16 bytes; padding bits are zero.
- "shared": `values [nnz]`, those of the union of the masks row by row; `words` likewise; and `offsets [N, W / 4]`,
  int32: where each group of 128 columns of a row starts in `values`. Bits a weight, values of 16 bits:
  `tasks + 1/4 + 16 (density of the union)`.

A word is loaded once for 32 weights and expanded in registers. One load of a word for each weight would fill the shared
memory of a pipelined loop with copies of masks.
"""

import triton
import triton.language as tl


@triton.jit
def kept(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Expand mask words `[ROWS, COLUMNS / 32]` to bool `[ROWS, COLUMNS]`."""
    shifts = tl.arange(0, 32)
    return ((words[:, :, None] >> shifts[None, None, :]) & 1).reshape(ROWS, COLUMNS) != 0


@triton.jit
def count_bits(words):
    """Count the set bits of each uint32; the compiler knows the pattern from 3.7 on as one instruction."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def weight_tile(
    values_ptr,
    words_ptr,
    offsets_ptr,
    task,  # scalar, or int32 [BLOCK_N]
    n,  # int32 [BLOCK_N], rows of the weight
    k0,  # the first column, a multiple of BLOCK_K
    N,
    K,
    W,
    stride_wn,
    TASKS: tl.constexpr,
    FORMAT: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a power of two, 32 to 128
):
    """Return weights `[BLOCK_N, BLOCK_K]` of the tasks, in the dtype of `values`; zeros where nothing is kept."""
    k = k0 + tl.arange(0, BLOCK_K)
    inside = (n < N)[:, None]
    if FORMAT == "shared":
        tl.static_assert(BLOCK_K == 128, "offsets stand for groups of 128 columns")
        w = k0 // 32 + tl.arange(0, 4)
        union = tl.zeros((BLOCK_N, 4), dtype=tl.int32)
        for i in tl.static_range(TASKS):
            union |= tl.load(words_ptr + (i * N + n)[:, None] * W + w[None, :], mask=inside, other=0)
        words = tl.load(words_ptr + (task * N + n)[:, None] * W + w[None, :], mask=inside, other=0)
        union = union.to(tl.uint32, bitcast=True)
        counts = count_bits(union)
        starts = tl.load(offsets_ptr + n * (W // 4) + k0 // 128, mask=n < N, other=0)
        starts = starts[:, None] + tl.cumsum(counts, 1) - counts  # [BLOCK_N, 4]: where each word's values start
        shifts = tl.arange(0, 32)
        below = (tl.full((32,), 1, tl.uint32) << shifts.to(tl.uint32)) - 1
        places = starts[:, :, None] + count_bits(union[:, :, None] & below[None, None, :])
        bits = (words[:, :, None] >> shifts[None, None, :]) & 1
        values = tl.load(values_ptr + places, mask=bits != 0, other=0.0).reshape(BLOCK_N, BLOCK_K)
    else:
        rows = n if FORMAT == "masked" else task * N + n
        pointers = values_ptr + rows[:, None] * stride_wn + k[None, :]
        values = tl.load(pointers, mask=inside if EVEN_K else inside & (k < K)[None, :], other=0.0)
        if FORMAT == "masked":
            w = k0 // 32 + tl.arange(0, BLOCK_K // 32)  # always inside: W is padded to 128 columns
            words = tl.load(words_ptr + (task * N + n)[:, None] * W + w[None, :], mask=inside, other=0)
            # Chosen, not multiplied: a pruned weight may be NaN.
            values = tl.where(kept(words, BLOCK_N, BLOCK_K), values, 0.0).to(values.dtype)
    return values
