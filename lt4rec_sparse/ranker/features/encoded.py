"""A batch of rows as ids: the input of every model of this project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncodedFeatures:
    """Ids of `batch` rows, each local to its embedding table; id 0 is a missing value.

    Attributes:
        single: `[batch, n_single]` int64: the single-valued and dense columns, in the order of `encoder.fields`.
        multi_values: `[nnz]` int64: the bags of all multi-valued columns, one after another.
        multi_offsets: `[n_multi * batch + 1]` int64: bag `f * batch + b` of field `f` and row `b` is
            `multi_values[multi_offsets[f * batch + b] : multi_offsets[f * batch + b + 1]]`, as `EmbeddingBag` wants it
            with `include_last_offset`. An empty bag pools to zero.

    Ids may be stored as int32, as in a cache; `take` always returns int64.
    """

    single: Tensor
    multi_values: Tensor
    multi_offsets: Tensor

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.single.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of the three tensors."""
        return sum(part.nbytes for part in (self.single, self.multi_values, self.multi_offsets))

    def take(self, rows: Tensor) -> EncodedFeatures:
        """Return the rows at positions `rows [n]` int64, in that order; a row may be taken twice."""
        device = self.single.device
        single = self.single.index_select(0, rows).long()
        n_multi = (self.multi_offsets.numel() - 1) // self.batch if self.batch else 0
        bags = (torch.arange(n_multi, device=device).unsqueeze(1) * self.batch + rows).reshape(-1)
        starts = self.multi_offsets.index_select(0, bags)
        lengths = self.multi_offsets.index_select(0, bags + 1) - starts
        offsets = torch.zeros(len(bags) + 1, dtype=torch.int64, device=device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        # Value i of a bag that begins at s in the source and at t in the result comes from s + (i - t).
        shift = torch.repeat_interleave(starts - offsets[:-1], lengths)
        values = self.multi_values.index_select(0, torch.arange(len(shift), device=device) + shift).long()
        return EncodedFeatures(single, values, offsets)

    def to(self, device: torch.device | str) -> EncodedFeatures:
        """Return the same rows on `device`."""
        return EncodedFeatures(self.single.to(device), self.multi_values.to(device), self.multi_offsets.to(device))

    @staticmethod
    def cat(parts: Sequence[EncodedFeatures]) -> EncodedFeatures:
        """Return the rows of all parts, one part after another; each has the same fields and at least one row."""
        if len(parts) == 1:
            return parts[0]
        n_multi = (parts[0].multi_offsets.numel() - 1) // parts[0].batch
        values, lengths = [], []
        for field in range(n_multi):
            for part in parts:
                offsets = part.multi_offsets[field * part.batch : (field + 1) * part.batch + 1]
                values.append(part.multi_values[int(offsets[0]) : int(offsets[-1])])
                lengths.append(offsets.diff())
        return EncodedFeatures(
            torch.cat([part.single for part in parts]),
            torch.cat(values) if values else parts[0].multi_values,
            torch.cat([parts[0].multi_offsets[:1], *lengths]).cumsum(0),
        )
