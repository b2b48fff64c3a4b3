"""Compressed weights in their canonical form, as they stand on disk and in the API.

A format is made from `(weight, mask)` and never from `weight != 0`: a kept weight may be exactly zero. Values are
copied bit by bit, so a round trip keeps -0.0 and the payload of a NaN. What a kernel wants (blocked, reordered, 16-bit
offsets) is prepacked from these when it first runs and is private to the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lt4rec_sparse.masks import pack_bits, unpack_bits

if TYPE_CHECKING:
    from typing_extensions import Self

VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class CompressedWeight:
    """All tasks' weight: the values of the union of the masks once, and one bit plane per task.

    This is LT4REC's one shared network: a weight that several tasks own is stored once. What is kept or pruned as one
    is a block of `BLOCK` rows and columns; a subclass says which. Blocks at the lower and the right edge may hang over:
    there the values are zero. For a weight `[out_features, in_features]`, whose grid of blocks is `[rows, columns]`:

    - `bitmask`: uint8 `[tasks, rows, ceil(columns / 8)]`; plane `t` is the mask of `tasks[t]`; column `k` is bit
      `k % 8` of byte `k // 8`, least significant first; padding bits are zero.
    - `row_offsets`: int32 `[rows]`; where each row of the union starts in `values`.
    - `values`: float32, float16 or bfloat16, the union's blocks row by row, columns ascending.

    Bytes: `rows (tasks ceil(columns / 8) + 4) + values.nbytes`.
    """

    BLOCK: ClassVar[tuple[int, int]] = (1, 1)

    shape: tuple[int, int]
    tasks: tuple[str, ...]
    bitmask: Tensor
    row_offsets: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, masks: Mapping[str, Tensor]) -> Self:
        """Compress the entries of `weight` that any of the tasks' masks keeps.

        Args:
            weight: `[out_features, in_features]`, float32, float16 or bfloat16.
            masks: Task name -> bool `[out_features, in_features]`, True = kept.

        Raises:
            ValueError: If there is no task, the shapes differ, a dtype is none of these, or a mask keeps a part of a
                block.
        """
        if not masks:
            raise ValueError("masks: got no task, wanted at least one")
        for mask in masks.values():
            if weight.dim() != 2 or weight.shape != mask.shape:
                got, wanted = tuple(mask.shape), tuple(weight.shape)
                raise ValueError(f"mask: got shape {got}, wanted that of the weight, {wanted}")
            if weight.dtype not in VALUE_DTYPES or mask.dtype != torch.bool:
                got_dtypes = f"{weight.dtype} and {mask.dtype}"
                raise ValueError(f"weight and mask: got {got_dtypes}, wanted float32/16/bfloat16 and bool")
        found = []
        for task, mask in masks.items():
            grid = cls._grid_of(mask)
            if grid is None:
                raise ValueError(f"mask of {task}: got one that keeps a part of a block, wanted {_whole(cls.BLOCK)}")
            found.append(grid)
        grids = torch.stack(found)
        union = grids.any(0) if len(found) > 1 else grids[0]
        tiles = weight.detach() if cls.BLOCK == (1, 1) else cls._tiles(weight.detach())
        shape = (weight.shape[0], weight.shape[1])
        return cls(shape, tuple(masks), pack_bits(grids), _row_offsets(union), tiles[union])

    @classmethod
    def keeps_blocks(cls, mask: Tensor) -> bool:
        """Whether a bool mask `[out_features, in_features]` keeps or prunes every block whole."""
        return cls._grid_of(mask) is not None

    def mask(self, task: str) -> Tensor:
        """Return the mask of one task: bool `[out_features, in_features]`, True = kept.

        Raises:
            ValueError: If there is no such task.
        """
        return self._spread(unpack_bits(self.bitmask[self._index(task)], self._grid()[1]), self.shape)

    def union(self) -> Tensor:
        """Return bool `[out_features, in_features]`, True where any task keeps the weight."""
        return self._spread(self._union(), self.shape)

    def to_dense(self, task: str | None = None) -> Tensor:
        """Return `[out_features, in_features]`: `sNET * mask_task`, or the union without a task."""
        dense = self._untiled()[: self.shape[0], : self.shape[1]].contiguous()
        if task is not None:
            dense[~self.mask(task)] = 0
        return dense

    def select(self, tasks: Sequence[str]) -> Self:
        """Return the weight of some of the tasks alone, in the order given.

        Raises:
            ValueError: If there is no such task.
        """
        return type(self).from_dense(self.to_dense(), {task: self.mask(task) for task in tasks})

    def select_columns(self, columns: Tensor) -> Self:
        """Return the weight of some of the inputs alone, int64 `[n]`, in the order given.

        Raises:
            ValueError: If blocks would be cut.
        """
        masks = {task: self.mask(task)[:, columns] for task in self.tasks}
        return type(self).from_dense(self.to_dense()[:, columns], masks)

    def as_shared(self) -> SharedWeight:
        """Return the same weight with a bit per weight: each kept one alone."""
        if isinstance(self, SharedWeight):
            return self
        return SharedWeight.from_dense(self.to_dense(), {task: self.mask(task) for task in self.tasks})

    @property
    def nnz(self) -> int:
        """Number of weights that the union keeps."""
        return int(self.union().count_nonzero())

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.bitmask.nbytes + self.row_offsets.nbytes + self.values.nbytes

    def validate(self) -> None:
        """Check everything that a kernel trusts.

        Raises:
            ValueError: If a part has a wrong dtype or shape, bits, offsets and values do not agree, or a value beyond
                the edge is not zero.
        """
        rows, columns = self._grid()
        _check_part("bitmask", self.bitmask, (torch.uint8,), (len(self.tasks), rows, (columns + 7) // 8))
        union = self._union()
        _check_part("values", self.values, VALUE_DTYPES, self._values_shape(int(union.sum())))
        _check_part("row_offsets", self.row_offsets, (torch.int32,), (rows,))
        if not torch.equal(self.row_offsets, _row_offsets(union)):
            raise ValueError("row_offsets: wanted the running count of the bitmask's set bits")
        row, column = union.nonzero(as_tuple=True)
        high, wide = (
            size - (count - 1) * side for size, count, side in zip(self.shape, (rows, columns), self.BLOCK, strict=True)
        )
        blocks = self.values.view(-1, *self.BLOCK)
        if blocks[row == rows - 1, high:].any() or blocks[column == columns - 1, :, wide:].any():
            raise ValueError(f"values: got some beyond the edge of {self.shape}, wanted zeros there")

    @classmethod
    def _values_shape(cls, blocks: int) -> tuple[int, ...]:
        return (blocks,) if cls.BLOCK == (1, 1) else (blocks, *cls.BLOCK)

    @classmethod
    def _tiles(cls, t: Tensor) -> Tensor:
        """Cut `[..., out_features, in_features]` into blocks, padded with zeros: `[..., rows, columns, *BLOCK]`."""
        (high, wide), (rows, columns) = cls.BLOCK, t.shape[-2:]
        grid = -(-rows // high), -(-columns // wide)
        beyond = (0, -columns % wide, 0, -rows % high)
        padded = F.pad(t, beyond) if any(beyond) else t  # without a copy
        return padded.reshape(*t.shape[:-2], grid[0], high, grid[1], wide).transpose(-3, -2)

    @classmethod
    def _grid_of(cls, mask: Tensor) -> Tensor | None:
        """Return for each block whether the mask keeps it; None where it keeps a part of one."""
        if cls.BLOCK == (1, 1):
            return mask
        grid = cls._tiles(mask)[..., 0, 0]
        return grid if torch.equal(cls._spread(grid, (mask.shape[0], mask.shape[1])), mask) else None

    @classmethod
    def _spread(cls, grid: Tensor, shape: tuple[int, int]) -> Tensor:
        """Repeat each element of a grid over its block: `[out_features, in_features]`."""
        high, wide = cls.BLOCK
        if high == wide == 1:
            return grid
        return grid.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: shape[0], : shape[1]]

    def _grid(self) -> tuple[int, int]:
        return -(-self.shape[0] // self.BLOCK[0]), -(-self.shape[1] // self.BLOCK[1])

    def _union(self) -> Tensor:
        return unpack_bits(self.bitmask, self._grid()[1]).any(0)

    def _untiled(self) -> Tensor:
        rows, columns = self._grid()
        tiles = torch.zeros(rows, columns, *self.BLOCK, dtype=self.values.dtype)
        tiles[self._union()] = self.values.view(-1, *self.BLOCK)
        return tiles.transpose(1, 2).flatten(2).flatten(0, 1)

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise ValueError(f"task: got {task!r}, wanted one of {', '.join(self.tasks)}")
        return self.tasks.index(task)


class SharedWeight(CompressedWeight):
    """Weights that are kept one by one: `values` is `[nnz]`, the names and the bit order are compressed-tensors'.

    Example:
        >>> weight, kept = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, False, True]])
        >>> shared = SharedWeight.from_dense(weight, {"ctr": kept, "cvr": ~kept})
        >>> shared.nnz, shared.to_dense("ctr").tolist()
        (3, [[1.0, 0.0, 3.0]])
    """


class BlockWeight(CompressedWeight):
    """Weights that are kept in blocks of 16 outputs x 4 inputs: `values` is `[blocks, 16, 4]`, as torch's BSR has them.

    Such a block costs a kernel what a tile of a dense product costs.

    Example:
        >>> kept = torch.zeros(32, 8, dtype=torch.bool)
        >>> kept[16:, :4] = True
        >>> blocks = BlockWeight.from_dense(torch.ones(32, 8), {"ctr": kept})
        >>> blocks.nnz, blocks.values.shape, blocks.nbytes
        (64, torch.Size([1, 16, 4]), 266)
    """

    BLOCK = (16, 4)

    @classmethod
    def from_bsr(cls, weight: Tensor, task: str = "task") -> BlockWeight:
        """Compress a torch BSR tensor of blocksize (16, 4): every block that it has is kept.

        Raises:
            ValueError: If it is no BSR tensor, or its blocks have another size.
        """
        if weight.layout != torch.sparse_bsr or tuple(weight.values().shape[1:]) != cls.BLOCK:
            raise ValueError(f"weight: got {_described(weight)}, wanted a torch.sparse_bsr of {_whole(cls.BLOCK)}")
        starts, columns, values = weight.crow_indices(), weight.col_indices(), weight.values()
        kept = torch.sparse_bsr_tensor(starts, columns, torch.ones_like(values), weight.shape, check_invariants=True)
        return cls.from_dense(weight.to_dense(), {task: kept.to_dense() != 0})

    def to_bsr(self, task: str | None = None) -> Tensor:
        """Return torch's BSR tensor of what a task keeps, or of the union without a task.

        Raises:
            ValueError: If there is no such task, or blocks hang over an edge, which BSR tensors cannot.
        """
        if any(size % side for size, side in zip(self.shape, self.BLOCK, strict=True)):
            raise ValueError(f"weight: got shape {self.shape}, wanted multiples of {self.BLOCK} for a BSR tensor")
        grid = self._union() if task is None else unpack_bits(self.bitmask[self._index(task)], self._grid()[1])
        starts = F.pad(grid.sum(1).cumsum(0), (1, 0))
        values = self.values[grid[self._union()]]
        return torch.sparse_bsr_tensor(starts, grid.nonzero()[:, 1], values, self.shape, check_invariants=True)


def format_for(masks: Iterable[Tensor]) -> type[CompressedWeight]:
    """Return the format of weights with these masks: in blocks if every mask keeps whole ones, else single weights."""
    return BlockWeight if all(BlockWeight.keeps_blocks(mask) for mask in masks) else SharedWeight


def _whole(block: Sequence[int]) -> str:
    return f"whole blocks of {' x '.join(map(str, block))}"


def _described(weight: Tensor) -> str:
    return f"{weight.layout}" + (
        f" of {_whole(weight.values().shape[1:])}" if weight.layout == torch.sparse_bsr else ""
    )


def _row_offsets(mask: Tensor) -> Tensor:
    # By 128, whose sums fit a byte: torch adds bytes thirty times as fast as it counts what is not zero.
    rows, columns = mask.shape
    padded = F.pad(mask.view(torch.uint8), (0, -columns % 128))
    counts = padded.view(rows, -(-columns // 128), 128).sum(-1, dtype=torch.uint8).sum(1)
    return (counts.cumsum(0) - counts).to(torch.int32)


def _check_part(name: str, part: Tensor, dtypes: Sequence[torch.dtype], shape: tuple[int, ...]) -> None:
    if part.dtype not in dtypes or tuple(part.shape) != shape:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: got {part.dtype} {tuple(part.shape)}, wanted {wanted} {shape}")
