"""All tasks' weight as the kernels read it, in one of two layouts, and how a tile of it is read.

The layouts, for a weight `[N, K]` and its tasks:

- "premasked": `values [tasks, N, K]`, one copy per task with zeros where nothing is kept. The fastest to read.
- "masked": `values [N, K]` once, and `words [tasks, N, W]`, int32: bit `k % 32` of word `k // 32` says whether column
  `k` is kept. `W` is a multiple of 4, so that a row of words starts at 16 bytes; padding bits are zero. The smallest,
  and the only one whose weight may change.

A word is loaded once for 32 weights and expanded in registers. One load of a word for each weight would fill the shared
memory of a pipelined loop with copies of masks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lt4rec_sparse.masks import pack_words

FORMATS = ("premasked", "masked")


class Weight(NamedTuple):
    """All tasks' weight, `[out_features, in_features]`, on a device."""

    format: str  # one of FORMATS
    shape: tuple[int, int]
    values: Tensor  # [tasks, N, K] or [N, K]
    words: Tensor | None  # int32 [tasks, N, W] of "masked"
    tasks: int

    @classmethod
    def prepack(cls, weight: Tensor, masks: Tensor, format: str, dtype: torch.dtype, device: torch.device) -> Weight:
        """Make it from the weight and the tasks' masks.

        Args:
            weight: `[out_features, in_features]`.
            masks: `[tasks, out_features, in_features]`, bool, True = kept.
            format: One of `FORMATS`.
            dtype: The dtype of the values.
            device: Where they go.

        Raises:
            ValueError: If there is no such format.
        """
        tasks, n, k = masks.shape
        if format == "premasked":
            # Chosen, not multiplied: a pruned weight may be NaN.
            return cls(format, (n, k), torch.where(masks, weight, 0).to(device, dtype), None, tasks)
        if format == "masked":
            return cls(format, (n, k), weight.to(device, dtype), pack_words(masks).to(device), tasks)
        raise ValueError(f"format: got {format!r}, wanted one of {', '.join(FORMATS)}")

    def of_tasks(self, tasks: slice) -> Weight:
        """Return the part of some tasks."""
        if self.words is None:
            return self._replace(values=self.values[tasks], tasks=len(self.values[tasks]))
        return self._replace(words=self.words[tasks], tasks=len(self.words[tasks]))

    @property
    def words_per_row(self) -> int:
        """How many mask words a row has; 0 where the masks are multiplied in."""
        return 0 if self.words is None else self.words.shape[2]


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
