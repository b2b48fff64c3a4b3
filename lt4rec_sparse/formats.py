"""Compressed weights in their one canonical form per format, as they stand on disk and in the API.

Every format is made from `(weight, mask)` and never from `weight != 0`: a kept weight may be exactly zero. Values are
copied bit by bit, so a round trip keeps -0.0 and the payload of a NaN. What a kernel wants (blocked, reordered, 16-bit
offsets) is prepacked from these at load and is private to the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lt4rec_sparse.masks import pack_bits, unpack_bits

VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class CSRWeight:
    """One task's weight as compressed sparse rows.

    Layout, for a weight `[out_features, in_features]` with `nnz` kept entries:

    - `crow_indices`: int32 `[out_features + 1]`; row `n` is entries `crow_indices[n]` to `crow_indices[n + 1]`.
    - `col_indices`: int32 `[nnz]`; the columns of each row, strictly ascending.
    - `values`: float32, float16 or bfloat16 `[nnz]`; the kept weights, in the order of `col_indices`.

    Bytes: `4 (out_features + 1) + (4 + itemsize) nnz`.
    """

    shape: tuple[int, int]
    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor) -> CSRWeight:
        """Compress the entries of `weight` that `mask` keeps.

        Args:
            weight: `[out_features, in_features]`, float32, float16 or bfloat16.
            mask: `[out_features, in_features]`, bool, True = kept.

        Raises:
            ValueError: If the shapes differ or a dtype is none of these.
        """
        _check_dense(weight, mask)
        crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int32)
        crow[1:] = mask.sum(1).cumsum(0)
        return cls(_shape(mask), crow, mask.nonzero()[:, 1].to(torch.int32), weight.detach()[mask])

    def to_dense(self) -> Tensor:
        """Return `[out_features, in_features]` with exact zeros where nothing is kept."""
        dense = torch.zeros(self.shape, dtype=self.values.dtype)
        rows = torch.repeat_interleave(torch.arange(self.shape[0]), self.crow_indices.diff())
        dense[rows, self.col_indices.long()] = self.values
        return dense

    @property
    def nnz(self) -> int:
        """How many weights are kept."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return _nbytes(self.crow_indices, self.col_indices, self.values)

    def validate(self) -> None:
        """Check everything that a kernel trusts.

        Raises:
            ValueError: If a part has a wrong dtype or length, rows do not ascend, or columns are out of range,
                repeated or out of order.
        """
        rows, columns = self.shape
        _check_part("crow_indices", self.crow_indices, (torch.int32,), (rows + 1,))
        _check_part("values", self.values, VALUE_DTYPES, (self.nnz,))
        _check_part("col_indices", self.col_indices, (torch.int32,), (self.nnz,))
        if (
            int(self.crow_indices[0]) != 0
            or int(self.crow_indices[-1]) != self.nnz
            or (self.crow_indices.diff() < 0).any()
        ):
            raise ValueError(f"crow_indices: wanted an ascent from 0 to nnz = {self.nnz}")
        if self.nnz and (int(self.col_indices.min()) < 0 or int(self.col_indices.max()) >= columns):
            raise ValueError(f"col_indices: wanted values in [0, {columns})")
        starts_row = torch.zeros(self.nnz + 1, dtype=torch.bool)
        starts_row[self.crow_indices.long()] = True
        if ((self.col_indices.diff() <= 0) & ~starts_row[1 : self.nnz]).any():
            raise ValueError("col_indices: wanted strictly ascending columns within each row")


@dataclass(frozen=True, eq=False)
class BitmapWeight:
    """One task's weight as one bit per weight, and the kept values.

    Layout, for a weight `[out_features, in_features]` with `nnz` kept entries (names and bit order of
    compressed-tensors):

    - `bitmask`: uint8 `[out_features, ceil(in_features / 8)]`; column `k` is bit `k % 8` of byte `k // 8`,
      least significant first; padding bits are zero.
    - `row_offsets`: int32 `[out_features]`; where each row starts in `values`.
    - `values`: float32, float16 or bfloat16 `[nnz]`; row by row, columns ascending.

    Bytes: `out_features (ceil(in_features / 8) + 4) + itemsize nnz`.
    """

    shape: tuple[int, int]
    bitmask: Tensor
    row_offsets: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor) -> BitmapWeight:
        """Compress the entries of `weight` that `mask` keeps (arguments and errors as `CSRWeight.from_dense`)."""
        _check_dense(weight, mask)
        return cls(_shape(mask), pack_bits(mask), _row_offsets(mask), weight.detach()[mask])

    def to_dense(self) -> Tensor:
        """Return `[out_features, in_features]` with exact zeros where nothing is kept."""
        dense = torch.zeros(self.shape, dtype=self.values.dtype)
        dense[self.mask()] = self.values
        return dense

    def mask(self) -> Tensor:
        """Return bool `[out_features, in_features]`, True = kept."""
        return unpack_bits(self.bitmask, self.shape[1])

    @property
    def nnz(self) -> int:
        """How many weights are kept."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return _nbytes(self.bitmask, self.row_offsets, self.values)

    def validate(self) -> None:
        """Check everything that a kernel trusts.

        Raises:
            ValueError: If a part has a wrong dtype or shape, or bits, offsets and values do not agree.
        """
        rows, columns = self.shape
        _check_part("bitmask", self.bitmask, (torch.uint8,), (rows, (columns + 7) // 8))
        _check_values(self.mask(), self.row_offsets, self.values)


@dataclass(frozen=True, eq=False)
class SharedWeight:
    """All tasks' weight: the values of the union of the masks once, and one bit plane per task.

    This is LT4REC's one shared network: a weight that several tasks own is stored once, and each task costs one bit
    per weight. Layout, for a weight `[out_features, in_features]` and a union of `nnz` kept entries:

    - `bitmask`: uint8 `[tasks, out_features, ceil(in_features / 8)]`; plane `t` is the mask of `tasks[t]`, packed as in
      `BitmapWeight`.
    - `row_offsets`: int32 `[out_features]`; where each row of the union starts in `values`.
    - `values`: float32, float16 or bfloat16 `[nnz]`; the union row by row, columns ascending.

    Bytes: `out_features (tasks ceil(in_features / 8) + 4) + itemsize nnz`.
    """

    shape: tuple[int, int]
    tasks: tuple[str, ...]
    bitmask: Tensor
    row_offsets: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, masks: Mapping[str, Tensor]) -> SharedWeight:
        """Compress the entries of `weight` that any of the tasks' masks keeps.

        Args:
            weight: `[out_features, in_features]`, float32, float16 or bfloat16.
            masks: Task name -> bool `[out_features, in_features]`, True = kept.

        Raises:
            ValueError: If there is no task, the shapes differ or a dtype is none of these.
        """
        if not masks:
            raise ValueError("masks: got no task, wanted at least one")
        for mask in masks.values():
            _check_dense(weight, mask)
        planes = torch.stack(list(masks.values()))
        union = planes.any(0)
        return cls(_shape(union), tuple(masks), pack_bits(planes), _row_offsets(union), weight.detach()[union])

    def mask(self, task: str) -> Tensor:
        """Return the mask of one task: bool `[out_features, in_features]`, True = kept."""
        return unpack_bits(self.bitmask[self._index(task)], self.shape[1])

    def union(self) -> Tensor:
        """Return bool `[out_features, in_features]`, True where any task keeps the weight."""
        return unpack_bits(self.bitmask, self.shape[1]).any(0)

    def to_dense(self, task: str | None = None) -> Tensor:
        """Return `[out_features, in_features]`: `sNET * mask_task`, or the union without a task."""
        dense = torch.zeros(self.shape, dtype=self.values.dtype)
        dense[self.union()] = self.values
        if task is not None:
            dense[~self.mask(task)] = 0
        return dense

    def select(self, tasks: Sequence[str]) -> SharedWeight:
        """Return the weight of some of the tasks alone, in the order given.

        Raises:
            ValueError: If the weight has no such task.
        """
        planes = unpack_bits(self.bitmask[[self._index(task) for task in tasks]], self.shape[1])
        return SharedWeight.from_dense(self.to_dense(), dict(zip(tasks, planes, strict=True)))

    def csr(self, task: str) -> CSRWeight:
        """Return one task's view as compressed sparse rows.

        Raises:
            ValueError: If the weight has no such task.
        """
        mask = self.mask(task)
        return CSRWeight.from_dense(self.to_dense(), mask)

    @property
    def nnz(self) -> int:
        """How many weights the union keeps."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return _nbytes(self.bitmask, self.row_offsets, self.values)

    def validate(self) -> None:
        """Check everything that a kernel trusts (errors as `BitmapWeight.validate`)."""
        rows, columns = self.shape
        _check_part("bitmask", self.bitmask, (torch.uint8,), (len(self.tasks), rows, (columns + 7) // 8))
        _check_values(self.union(), self.row_offsets, self.values)

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise ValueError(f"task: got {task!r}, wanted one of {', '.join(self.tasks)}")
        return self.tasks.index(task)


def _shape(mask: Tensor) -> tuple[int, int]:
    return mask.shape[0], mask.shape[1]


def _nbytes(*parts: Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in parts)


def _row_offsets(mask: Tensor) -> Tensor:
    counts = mask.sum(1)
    return (counts.cumsum(0) - counts).to(torch.int32)


def _check_dense(weight: Tensor, mask: Tensor) -> None:
    if weight.dim() != 2 or weight.shape != mask.shape:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, wanted that of the weight, {tuple(weight.shape)}")
    if weight.dtype not in VALUE_DTYPES or mask.dtype != torch.bool:
        raise ValueError(f"weight and mask: got {weight.dtype} and {mask.dtype}, wanted float32/16/bfloat16 and bool")


def _check_part(name: str, part: Tensor, dtypes: Sequence[torch.dtype], shape: tuple[int, ...]) -> None:
    if part.dtype not in dtypes or tuple(part.shape) != shape:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: got {part.dtype} {tuple(part.shape)}, wanted {wanted} {shape}")


def _check_values(mask: Tensor, row_offsets: Tensor, values: Tensor) -> None:
    _check_part("values", values, VALUE_DTYPES, (int(mask.sum()),))
    _check_part("row_offsets", row_offsets, (torch.int32,), (mask.shape[0],))
    if not torch.equal(row_offsets, _row_offsets(mask)):
        raise ValueError("row_offsets: wanted the running count of the bitmask's set bits")
