"""Compressed weights in their canonical form, as they stand on disk and in the API.

A format is made from `(weight, mask)` and never from `weight != 0`: a kept weight may be exactly zero. Values are
copied bit by bit, so a round trip keeps -0.0 and the payload of a NaN. What a kernel wants (blocked, reordered, 16-bit
offsets) is prepacked from these when it first runs and is private to the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lt4rec_sparse.masks import pack_bits, unpack_bits

VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class SharedWeight:
    """All tasks' weight: the values of the union of the masks once, and one bit plane per task.

    This is LT4REC's one shared network: a weight that several tasks own is stored once, and each task adds one bit per
    weight. Layout, for a weight `[out_features, in_features]` and a union of `nnz` kept entries (names and bit order of
    compressed-tensors):

    - `bitmask`: uint8 `[tasks, out_features, ceil(in_features / 8)]`; plane `t` is the mask of `tasks[t]`; column `k`
      is bit `k % 8` of byte `k // 8`, least significant first; padding bits are zero.
    - `row_offsets`: int32 `[out_features]`; where each row of the union starts in `values`.
    - `values`: float32, float16 or bfloat16 `[nnz]`; the union row by row, columns ascending.

    Bytes: `out_features (tasks ceil(in_features / 8) + 4) + itemsize nnz`.

    Example:
        >>> weight, kept = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, False, True]])
        >>> shared = SharedWeight.from_dense(weight, {"ctr": kept, "cvr": ~kept})
        >>> shared.nnz, shared.to_dense("ctr").tolist()
        (3, [[1.0, 0.0, 3.0]])
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
            if weight.dim() != 2 or weight.shape != mask.shape:
                got, wanted = tuple(mask.shape), tuple(weight.shape)
                raise ValueError(f"mask: got shape {got}, wanted that of the weight, {wanted}")
            if weight.dtype not in VALUE_DTYPES or mask.dtype != torch.bool:
                got_dtypes = f"{weight.dtype} and {mask.dtype}"
                raise ValueError(f"weight and mask: got {got_dtypes}, wanted float32/16/bfloat16 and bool")
        planes = torch.stack(list(masks.values()))
        union = planes.any(0)
        shape = (union.shape[0], union.shape[1])
        return cls(shape, tuple(masks), pack_bits(planes), _row_offsets(union), weight.detach()[union])

    def mask(self, task: str) -> Tensor:
        """Return the mask of one task: bool `[out_features, in_features]`, True = kept.

        Raises:
            ValueError: If there is no such task.
        """
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
            ValueError: If there is no such task.
        """
        planes = unpack_bits(self.bitmask[[self._index(task) for task in tasks]], self.shape[1])
        return SharedWeight.from_dense(self.to_dense(), dict(zip(tasks, planes, strict=True)))

    @property
    def nnz(self) -> int:
        """Number of weights that the union keeps."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.bitmask.nbytes + self.row_offsets.nbytes + self.values.nbytes

    def validate(self) -> None:
        """Check everything that a kernel trusts.

        Raises:
            ValueError: If a part has a wrong dtype or shape, or bits, offsets and values do not agree.
        """
        rows, columns = self.shape
        _check_part("bitmask", self.bitmask, (torch.uint8,), (len(self.tasks), rows, (columns + 7) // 8))
        union = self.union()
        _check_part("values", self.values, VALUE_DTYPES, (int(union.sum()),))
        _check_part("row_offsets", self.row_offsets, (torch.int32,), (rows,))
        if not torch.equal(self.row_offsets, _row_offsets(union)):
            raise ValueError("row_offsets: wanted the running count of the bitmask's set bits")

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise ValueError(f"task: got {task!r}, wanted one of {', '.join(self.tasks)}")
        return self.tasks.index(task)


def _row_offsets(mask: Tensor) -> Tensor:
    counts = mask.sum(1)
    return (counts.cumsum(0) - counts).to(torch.int32)


def _check_part(name: str, part: Tensor, dtypes: Sequence[torch.dtype], shape: tuple[int, ...]) -> None:
    if part.dtype not in dtypes or tuple(part.shape) != shape:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: got {part.dtype} {tuple(part.shape)}, wanted {wanted} {shape}")
