"""What training reads of the data: batches of rows, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from lt4rec_sparse.ranker.features import EncodedFeatures


class Batch(Protocol):
    """The part of a batch of rows that the loop reads (`data.batches.Batch`)."""

    @property
    def features(self) -> EncodedFeatures: ...  # noqa: D102
    @property
    def labels(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def rows(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def weights(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def groups(self) -> Tensor: ...  # noqa: D102
    @property
    def slices(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def values(self) -> Mapping[str, Tensor]: ...  # noqa: D102


class Stream(Protocol):
    """The source of batches: epochs whose order depends only on their number, and can start at any batch."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from batch `start` on."""
