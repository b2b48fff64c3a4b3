"""A weight as the GPU kernels read it: prepacked from the canonical shared format, in one of three layouts.

See `weight_tile` for the layouts byte by byte. With the masks multiplied in a weight is fastest to read from the L2
cache; compressed it is smallest, which counts where a batch is so small that the weights' bytes are its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lt4rec_sparse.formats import SharedWeight
from lt4rec_sparse.masks import pack_words

FORMATS = ("premasked", "masked", "shared")
GROUP = 128  # columns for which "shared" keeps one offset


class Weight(NamedTuple):
    """All tasks' weight, `[out_features, in_features]`, on a device."""

    format: str  # one of FORMATS
    shape: tuple[int, int]
    values: Tensor  # [tasks, N, K], [N, K] or [nnz of the union]
    words: Tensor | None  # int32 [tasks, N, W]; none where masks are multiplied in
    offsets: Tensor | None  # int32 [N, W / 4] of "shared"
    tasks: int

    @classmethod
    def prepack(
        cls, weight: SharedWeight, tasks: Sequence[str], format: str, dtype: torch.dtype, device: torch.device
    ) -> Weight:
        """Make it from the canonical weight.

        Args:
            weight: What to read.
            tasks: The planes wanted, in order.
            format: One of `FORMATS`.
            dtype: Of the values.
            device: Where they go.
        """
        planes = torch.stack([weight.mask(task) for task in tasks])
        dense = weight.to_dense()
        if format == "premasked":
            values = torch.where(planes, dense, 0).to(device, dtype)
            return cls(format, weight.shape, values, None, None, len(tasks))
        words = pack_words(planes).to(device)
        if format == "masked":
            return cls(format, weight.shape, dense.to(device, dtype), words, None, len(tasks))
        if format != "shared":
            raise ValueError(f"format: got {format!r}, wanted one of {', '.join(FORMATS)}")
        union = planes.any(0)
        padded = torch.nn.functional.pad(union, (0, -weight.shape[1] % GROUP))
        counts = padded.view(weight.shape[0], -1, GROUP).sum(2).flatten()
        offsets = (counts.cumsum(0) - counts).to(torch.int32).view(weight.shape[0], -1).to(device)
        return cls(format, weight.shape, dense[union].to(device, dtype), words, offsets, len(tasks))

    def of_tasks(self, tasks: slice) -> Weight:
        """Return some tasks' part.

        Raises:
            ValueError: If the weight is compressed: the union that compresses it is of all its tasks.
        """
        if self.format == "premasked":
            return self._replace(values=self.values[tasks], tasks=len(self.values[tasks]))
        if self.words is None or self.offsets is not None:
            raise ValueError(f"tasks: got {self.tasks} of a compressed weight, wanted as many as one launch takes")
        return self._replace(words=self.words[tasks], tasks=len(self.words[tasks]))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in (self.values, self.words, self.offsets) if part is not None)
