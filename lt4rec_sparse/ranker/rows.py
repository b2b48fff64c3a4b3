"""Rows of embedding tables, rounded for serving, and what they are when they are looked up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt4rec_sparse.checked_file import check_finite
from lt4rec_sparse.errors import InputError

EMBEDDINGS = ("fp32", "fp16", "int8")
MAX_VALUE = 127


class RoundedRows(nn.Module):
    """Rows rounded to halves, `row = values`, or to int8 with a scale per row, `row = scale * values`.

    They stay rounded in memory: a lookup makes float32 of the rows that it reads, and of no others. In int8 the scale
    of a row is `max |row| / 127`, so that a number is off by half a scale at most; a row of zeros has scale 0. There is
    no zero point: on KuaiRand it would take off a fifth of the error, for bytes of its own.

    Args:
        values: `[rows, dim]`, float16, or int8 from -127 to 127.
        scales: `[rows]`, float32, finite and not negative, with int8 values; None with float16.

    Raises:
        ValueError: If a shape or dtype differs, a value or a scale is out of its range, or a row is not finite.
    """

    values: Tensor
    scales: Tensor | None

    def __init__(self, values: Tensor, scales: Tensor | None = None) -> None:
        super().__init__()
        wanted = torch.float16 if scales is None else torch.int8
        if values.dim() != 2 or values.dtype != wanted:
            raise ValueError(f"values: got {values.dtype} {tuple(values.shape)}, wanted {wanted} [rows, dim]")
        if scales is not None:
            if scales.shape != values.shape[:1] or scales.dtype != torch.float32:
                got = f"{scales.dtype} {tuple(scales.shape)}"
                raise ValueError(f"scales: got {got}, wanted torch.float32 {tuple(values.shape[:1])}")
            if values.numel() and int(values.amin()) < -MAX_VALUE:
                raise ValueError(f"values: got {int(values.amin())}, wanted {-MAX_VALUE} to {MAX_VALUE}")
            most = torch.finfo(torch.float32).max / MAX_VALUE
            if not bool(((scales >= 0) & (scales <= most)).all()):
                low, high = scales.aminmax()
                raise ValueError(f"scales: got numbers from {low:g} to {high:g}, wanted 0 to {most:g}")
        else:
            check_finite("values", values)
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    @classmethod
    def from_dense(cls, rows: Tensor, kind: str) -> RoundedRows:
        """Round `rows [rows, dim]`, float32, to "fp16" or "int8".

        Raises:
            InputError: If a number is NaN or infinite, or beyond what a half can be.
        """
        if not bool(rows.isfinite().all()):
            raise InputError(f"embeddings: got NaN or Inf among {rows.numel()} numbers, wanted finite ones")
        if kind == "fp16":
            values = rows.half()
            if not bool(values.isfinite().all()):
                largest, most = rows.abs().max(), torch.finfo(torch.float16).max
                raise InputError(f"embeddings: got a number of {largest:g}, wanted at most {most:g} in fp16")
            return cls(values)
        largest = rows.abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
        # The quotient first: a scale may be too small for a float, a number over the largest of its row is at most 1.
        values = (rows / largest.where(largest > 0, 1.0)).mul_(MAX_VALUE).round_().to(torch.int8)
        return cls(values, (largest / MAX_VALUE).squeeze(1))

    def parts(self, spans: Sequence[slice]) -> RoundedRows:
        """Return the rows of some spans, one span after another, in memory of their own."""
        values = torch.cat([self.values[:0], *(self.values[span] for span in spans)])
        if self.scales is None:
            return RoundedRows(values)
        return RoundedRows(values, torch.cat([self.scales[:0], *(self.scales[span] for span in spans)]))

    def to_dense(self) -> Tensor:
        """Return all rows as a lookup makes them: `[rows, dim]`, float32."""
        rows = self.values.float()
        return rows if self.scales is None else rows.mul_(self.scales.unsqueeze(1))

    @property
    def kind(self) -> str:
        """Return "fp16" or "int8"."""
        return "fp16" if self.scales is None else "int8"

    @property
    def nbytes(self) -> int:
        """Memory of values and scales."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows: `ids` int64 of any shape to float32 `[*ids.shape, dim]`."""
        rows = F.embedding(ids, self.values).float()
        return rows if self.scales is None else rows.mul_(self.scales[ids].unsqueeze(-1))
