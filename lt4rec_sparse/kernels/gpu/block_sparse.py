"""A block-sparse matrix product in Triton, for all tasks of one weight in one launch: forward, for serving.

Masks keep or prune square blocks of B x B weights. A program has BLOCK_M rows and one row of blocks, and walks the
blocks that are kept there, BLOCK_K / B of them per step: compute and bytes fall with the density.

    y[t] = activation(x[t] @ (weight * mask_t).T + bias)            x [tasks, rows, in_features], in 16 bits

or `x[0]` for every task, where `x` is `[1, rows, in_features]`.

What limits it, on paper: a kept block costs `2 BLOCK_M B B` operations, and `2 B (BLOCK_M + B)` bytes from the L2
cache: 28 operations per byte at B = 32 and BLOCK_M = 256, of some 140 that the tensor cores of an H200 could do. So L2
bytes are all that counts: tiles are tall, and where tasks' masks overlap, `together` reads x once for both and
multiplies a block that one of them lacks by zeros, which the idle tensor cores do for nothing. Two programs on each
multiprocessor hide the start of one, three loads that wait for one another, behind the other.

Letters, in kernels only: M rows, N out_features, K in_features, B the side of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from lt4rec_sparse.kernels.gpu.epilogue import epilogue
from lt4rec_sparse.kernels.gpu.launch import Launch, Tile, choose_tile

BLOCKS = (16, 32, 64)  # sides that wgmma takes as its N, and at least one of its K-steps
MAX_COLUMNS = 128  # of one program: sums of more do not fit in registers beside 128 rows
DTYPES = (torch.float16, torch.bfloat16)

# By the columns of a program, `together * block`; largest first. `block_k` is a multiple of every block that can have
# so many columns. Two programs of an entry fit on a multiprocessor of an H200.
TILES = {
    16: (Tile(256, 16, 64, 8, 3), Tile(64, 16, 64, 4, 6), Tile(16, 16, 64, 4, 6)),
    32: (Tile(256, 32, 64, 8, 3), Tile(64, 32, 64, 4, 6), Tile(16, 32, 64, 4, 6)),
    64: (Tile(256, 64, 64, 8, 2), Tile(64, 64, 64, 4, 4), Tile(16, 64, 64, 4, 6)),
    128: (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 8, 4), Tile(16, 128, 64, 4, 4)),
}


@triton.jit
def entries(col_ptr, place_ptr, e, end, g, TOGETHER: tl.constexpr):
    """Return block columns `[BLOCK_K]` and places `[TOGETHER * B, BLOCK_K]` of entries `e`; -1 where there is none."""
    col = tl.load(col_ptr + e, mask=e < end, other=-1)
    places = place_ptr + e[None, :] * TOGETHER + g[:, None]
    return col, tl.load(places, mask=(e < end)[None, :] & (g >= 0)[:, None], other=-1)


@triton.jit(do_not_specialize=["M"])
def block_sparse_fwd_kernel(
    x_ptr,
    values_ptr,
    crow_ptr,
    col_ptr,
    place_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xt,
    stride_xm,
    stride_bt,
    stride_ym,
    TOGETHER: tl.constexpr,  # tasks of one program: they read the same rows, so an x tile is loaded once for them
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of B
    B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a multiple of B
):
    # Neighbouring programs have the same rows: x, which may exceed the L2 cache, comes from memory once for all.
    block_row = tl.program_id(0)
    group = tl.program_id(1)
    first_task = group * TOGETHER
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    # A column of the tile is a neuron of a task: B neurons of one task, then the same of the next.
    column = tl.arange(0, TOGETHER * B)
    g = column // B
    neuron = column % B
    has_row = (m < M)[:, None]
    x_rows = x_ptr + first_task.to(tl.int64) * stride_xt + m.to(tl.int64)[:, None] * stride_xm
    row_ptr = crow_ptr + group * (tl.cdiv(N, B) + 1) + block_row
    begin = tl.load(row_ptr)
    end = tl.load(row_ptr + 1)
    step = tl.arange(0, BLOCK_K)
    k_in_block = step % B
    e = begin + step // B
    col, place = entries(col_ptr, place_ptr, e, end, g, TOGETHER)
    acc = tl.zeros((BLOCK_M, TOGETHER * B), dtype=tl.float32)
    for _ in range(begin, end, BLOCK_K // B):
        # The compiler cannot know that a loaded column starts a block: without its hints it copies element by element.
        k = tl.max_contiguous(tl.multiple_of(col * B + k_in_block, B), B)
        offsets = place.to(tl.int64) * (B * B) + (neuron * B)[:, None] + k_in_block[None, :]
        offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, B)), (1, B))
        # Entries beyond the end must not be read either: a NaN in x times a weight of zero is NaN.
        has_column = col >= 0 if EVEN_K else (col >= 0) & (k < K)
        x = tl.load(x_rows + k[None, :], mask=has_row & has_column[None, :], other=0.0)
        w = tl.load(values_ptr + offsets, mask=place >= 0, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
        # The next step's, and carried there: columns loaded in the step that needs them would take half of the
        # pipeline's stages for themselves.
        e += BLOCK_K // B
        col, place = entries(col_ptr, place_ptr, e, end, g, TOGETHER)
    n = block_row * B + neuron
    task = first_task + g
    acc = epilogue(acc, bias_ptr, task * stride_bt + n, n < N, ACTIVATION)
    y_rows = (task[None, :] * M + m[:, None]).to(tl.int64)
    tl.store(y_ptr + y_rows * stride_ym + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=has_row & (n < N)[None, :])


class BlockWeight(NamedTuple):
    """All tasks' weight as the block-sparse kernel reads it.

    Layout, for a weight `[out_features, in_features]` in square blocks of side `block` (the last ones padded with
    zeros), `R = ceil(out_features / block)` rows of blocks, and groups of `together` tasks that one program serves:

    - `values`: float16 or bfloat16 `[stored, block, block]`; blocks, each row by row. A weight that a task prunes
      within a block that it keeps is zero. A block that is the same bits for several tasks stands once.
    - `crow`: int32 `[tasks / together, R + 1]`; row of blocks `r` of group `g` is entries `crow[g, r]` to
      `crow[g, r + 1]`.
    - `col`: int32 `[entries]`; block columns, ascending in each row: those that any task of the group keeps.
    - `place`: int32 `[entries, together]`; where the block of each task of the group stands in `values`, or -1 if the
      task does not keep it.

    Bytes: `2 block^2 stored + 4 (1 + together) entries + 4 (R + 1) tasks / together`.
    """

    shape: tuple[int, int]  # out_features, in_features
    block: int
    tasks: int
    together: int
    values: Tensor
    crow: Tensor
    col: Tensor
    place: Tensor

    @classmethod
    def from_dense(
        cls, weight: Tensor, masks: Tensor, block: int, dtype: torch.dtype, together: int = 1
    ) -> BlockWeight:
        """Prepack a weight under the tasks' masks; a block is kept if any of its weights is.

        Args:
            weight: `[out_features, in_features]`, float32, float16 or bfloat16.
            masks: `[tasks, out_features, in_features]`, bool, True = kept; on the device of `weight`.
            block: The side of a block: 16, 32 or 64.
            dtype: The dtype of the values, and of the `x` to multiply: float16 or bfloat16.
            together: How many tasks, one after another, read the same rows of `x`: 1, 2 or 4, a divisor of the number
                of tasks, and at most `128 / block`.

        Raises:
            ValueError: If there are no such blocks, dtype or tasks together.
        """
        _check(masks, block, dtype, together)
        tasks, n, k = masks.shape
        # Chosen, not multiplied: a pruned weight may be NaN.
        content = _cut(torch.where(masks, weight.detach().to(dtype), 0), block)  # [tasks, R, C, block, block]
        kept = _cut(masks, block).flatten(-2).any(-1)  # [tasks, R, C]
        bits = content.view(torch.int16)  # NaN equals itself, 0 does not equal -0
        task = torch.arange(tasks, device=weight.device)[:, None, None]
        owner = task.expand_as(kept).clone()  # the first task with the same block
        for t in range(tasks):
            for s in reversed(range(t)):
                owner[t][kept[s] & (bits[s] == bits[t]).flatten(-2).all(-1)] = s
        stored = (kept & (owner == task)).permute(1, 2, 0)  # a place in the weight after another, tasks within it
        places = (stored.flatten().cumsum(0) - 1).view_as(stored).permute(2, 0, 1).gather(0, owner)
        places[~kept] = -1
        groups = kept.view(-1, together, *kept.shape[1:])
        listed = groups.any(1)  # [tasks / together, R, C]
        counts = listed.sum(-1)
        ends = counts.flatten().cumsum(0).view_as(counts)
        return cls(
            (n, k),
            block,
            tasks,
            together,
            content.permute(1, 2, 0, 3, 4)[stored],
            torch.cat([ends[:, :1] - counts[:, :1], ends], dim=1).to(torch.int32),
            listed.nonzero()[:, 2].to(torch.int32),
            places.view_as(groups).permute(0, 2, 3, 1)[listed].to(torch.int32),
        )


def block_sparse_launch(
    x: Tensor, weight: BlockWeight, bias: Tensor | None, y: Tensor, activation: str, tile: Tile | None = None
) -> Launch:
    """Make the launch of `block_sparse_fwd_kernel`, in the table's tile unless one is given.

    Args:
        x: `[tasks, rows, in_features]`, or `[1, rows, in_features]` for all tasks, which tasks together need;
            neighbouring elements in its rows; of the weight's dtype.
        weight: The weight of all tasks.
        bias: `[out_features]`, or `[tasks, out_features]`.
        y: `[tasks, rows, out_features]`; a task's first row follows the last row of the task before. Float32 or the
            dtype of `x`.
        activation: "none", "relu" or "sigmoid".
        tile: One of `TILES`.
    """
    (n, k), rows = weight.shape, x.shape[1]
    block_rows, groups = triton.cdiv(n, weight.block), weight.tasks // weight.together
    if tile is None:
        tiles = TILES[weight.together * weight.block]
        # What Triton tells its compiler, which otherwise copies element by element, through registers: the tallest
        # tile spills then.
        is_aligned = k % 16 == 0 and x.stride(1) % 16 == 0 and x.data_ptr() % 16 == 0
        fitting = tiles if is_aligned else tiles[1:]
        tile = choose_tile(fitting, rows, lambda t: block_rows * groups * triton.cdiv(rows, t.block_m))
    return Launch(
        block_sparse_fwd_kernel,
        (block_rows, groups, triton.cdiv(rows, tile.block_m)),
        {
            "x_ptr": x,
            "values_ptr": weight.values,
            "crow_ptr": weight.crow,
            "col_ptr": weight.col,
            "place_ptr": weight.place,
            "bias_ptr": bias,
            "y_ptr": y,
            "M": rows,
            "N": n,
            "K": k,
            "stride_xt": x.stride(0) if len(x) > 1 else 0,
            "stride_xm": x.stride(1),
            "stride_bt": bias.stride(0) if bias is not None and bias.dim() == 2 else 0,
            "stride_ym": y.stride(1),
        },
        {
            "TOGETHER": weight.together,
            "ACTIVATION": activation,
            "EVEN_K": k % weight.block == 0,
            "B": weight.block,
            "BLOCK_M": tile.block_m,
            "BLOCK_K": tile.block_k,
        },
        tile.warps,
        tile.stages,
    )


def _check(masks: Tensor, block: int, dtype: torch.dtype, together: int) -> None:
    if block not in BLOCKS:
        raise ValueError(f"block: got {block}, wanted one of {', '.join(map(str, BLOCKS))}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, wanted float16 or bfloat16")
    if together not in (1, 2, 4) or len(masks) % together or together * block > MAX_COLUMNS:
        wanted = f"1, 2 or 4, a divisor of the {len(masks)} tasks, at most {MAX_COLUMNS // block}"
        raise ValueError(f"together: got {together}, wanted {wanted}")


def _cut(t: Tensor, block: int) -> Tensor:
    """Cut `[tasks, N, K]` into `[tasks, R, C, block, block]`, padded with zeros."""
    tasks, n, k = t.shape
    padded = pad(t, (0, -k % block, 0, -n % block))
    return padded.view(tasks, triton.cdiv(n, block), block, triton.cdiv(k, block), block).transpose(2, 3)
