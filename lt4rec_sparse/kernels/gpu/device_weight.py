"""A weight as the GPU kernels read it, in one of three layouts.

See `weight_tile` for the layouts byte by byte. With the masks multiplied in a weight is fastest to read from the L2
cache; compressed it is smallest, which counts where a batch is so small that the weights' bytes are its time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
    def prepack(cls, weight: Tensor, masks: Tensor, format: str, dtype: torch.dtype, device: torch.device) -> Weight:
        """Make it from the weight and the tasks' masks.

        Args:
            weight: `[out_features, in_features]`.
            masks: `[tasks, out_features, in_features]`, bool, True = kept.
            format: One of `FORMATS`.
            dtype: Of the values.
            device: Where they go.

        Raises:
            ValueError: If there is no such format.
        """
        tasks, n, k = masks.shape
        if format == "premasked":
            # Chosen, not multiplied: a pruned weight may be NaN.
            return cls(format, (n, k), torch.where(masks, weight, 0).to(device, dtype), None, None, tasks)
        words = pack_words(masks).to(device)
        if format == "masked":
            return cls(format, (n, k), weight.to(device, dtype), words, None, tasks)
        if format != "shared":
            raise ValueError(f"format: got {format!r}, wanted one of {', '.join(FORMATS)}")
        union = masks.any(0)
        counts = torch.nn.functional.pad(union, (0, -k % GROUP)).view(n, -1, GROUP).sum(2)
        offsets = (counts.flatten().cumsum(0).view_as(counts) - counts).to(device, torch.int32)
        return cls(format, (n, k), weight[union].to(device, dtype), words, offsets, tasks)

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
