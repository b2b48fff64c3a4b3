"""From ids to the MLP's input: embeddings, mean-pooled multi-valued fields, pairwise dots. Trained and served alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt4rec_sparse.features import EncodedFeatures, Field


class CrossedEmbeddings(nn.Module):
    """Embed every field and cross all pairs: `x = [e_1, ..., e_n, e_i . e_j for i < j]` (DLRM style).

    A multi-valued field is the mean of its values' embeddings, and zero where it has none. All tables stand in one
    matrix, so that a batch is one lookup for its single-valued fields and one pooled lookup for the others.

    Args:
        fields: The fields, in the order of the encoder.
        table_sizes: Table name -> number of rows.
        dim: Width of an embedding.
        std: Standard deviation of the initial embeddings.

    Raises:
        ValueError: If there is no field, or a field's table has no size.

    Source: LT4REC (arXiv 2008.09872), Figure 1; the cross of DLRM (arXiv 1906.00091), one triangle without diagonal.
    """

    table_starts: Tensor
    pairs: Tensor

    def __init__(
        self, fields: Sequence[tuple[str, str, bool]], table_sizes: Mapping[str, int], dim: int = 16, std: float = 0.05
    ) -> None:
        super().__init__()
        self.fields = tuple(Field(*field) for field in fields)
        self.table_sizes = dict(table_sizes)
        self.dim = dim
        missing = [field.table for field in self.fields if field.table not in table_sizes]
        if not self.fields or missing:
            raise ValueError(f"fields: got {self.fields} without sizes for tables {missing}, wanted a size for each")
        starts, total = {}, 0
        for table, size in self.table_sizes.items():
            starts[table], total = total, total + size
        ordered = sorted(self.fields, key=lambda field: field.multi)  # single-valued fields first, order kept
        self.n_single = sum(not field.multi for field in self.fields)
        self.embedding = nn.Parameter(torch.empty(total, dim).normal_(std=std))
        self.register_buffer("table_starts", torch.tensor([starts[f.table] for f in ordered]), persistent=False)
        n = len(self.fields)
        rows, columns = torch.triu_indices(n, n, offset=1)
        self.register_buffer("pairs", rows * n + columns, persistent=False)

    @property
    def out_features(self) -> int:
        """Width of the result: `n dim + n (n - 1) / 2`."""
        return len(self.fields) * self.dim + self.pairs.numel()

    def forward(self, features: EncodedFeatures) -> Tensor:
        """Embed and cross a batch.

        Args:
            features: Ids that are local to their tables, as the encoder makes them.

        Returns:
            `[batch, out_features]`, dtype of the embeddings.
        """
        batch, n = features.single.shape[0], len(self.fields)
        parts = []
        if self.n_single:
            parts.append(F.embedding(features.single + self.table_starts[: self.n_single], self.embedding))
        if n > self.n_single:
            # Bags are field-major: field f's values are contiguous, and bag f * batch + b is row b's.
            ends = (
                features.multi_offsets[batch::batch] if batch else features.multi_offsets.new_zeros(n - self.n_single)
            )
            counts = torch.diff(ends, prepend=ends.new_zeros(1))
            starts = torch.repeat_interleave(self.table_starts[self.n_single :], counts)
            pooled = F.embedding_bag(
                features.multi_values + starts,
                self.embedding,
                features.multi_offsets,
                mode="mean",
                include_last_offset=True,
            )
            parts.append(pooled.view(n - self.n_single, batch, self.dim).transpose(0, 1))
        embedded = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]  # [batch, n, dim]
        dots = torch.bmm(embedded, embedded.transpose(1, 2)).flatten(1)  # [batch, n * n]
        return torch.cat([embedded.flatten(1), dots.index_select(1, self.pairs)], dim=1)
