"""From ids to the MLP's input: embeddings, mean-pooled multi-valued fields, pairwise dots; in training and serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lt4rec_sparse import ops
from lt4rec_sparse.ranker.features import EncodedFeatures, Field


class CrossedEmbeddings(nn.Module):
    """Embed every field and cross all pairs: `x = [e_1, ..., e_n, e_i . e_j for i < j]` (DLRM style).

    A multi-valued field is the mean of its values' embeddings, and zero if it has none. One matrix holds all tables, so
    that a batch takes one lookup for its single-valued fields and one pooled lookup for the others.

    Args:
        fields: The fields, in the order of the encoder.
        table_sizes: Table name -> number of rows.
        dim: Width of an embedding.
        std: Standard deviation of the initial embeddings.
        embedding: `[sum of the table sizes, dim]`, float32: embeddings to use as they are, without a copy, instead of
            drawing new ones.

    Raises:
        ValueError: If there is no field, a field's table has no size, or `embedding` has another shape or dtype.

    Source: LT4REC (arXiv 2008.09872), Figure 1; the cross of DLRM (arXiv 1906.00091), one triangle without diagonal.
    """

    table_starts: Tensor
    pairs: Tensor
    pair_of: Tensor

    def __init__(
        self,
        fields: Sequence[tuple[str, str, bool]],
        table_sizes: Mapping[str, int],
        dim: int = 16,
        std: float = 0.05,
        embedding: Tensor | None = None,
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
        # Sizes may come from a file, so they are compared with the embedding before anything of that size is made.
        if embedding is None:
            embedding = torch.empty(total, dim).normal_(std=std)
        elif embedding.shape != (total, dim) or embedding.dtype != torch.float32:
            got = f"{embedding.dtype} {tuple(embedding.shape)}"
            raise ValueError(f"embedding: got {got}, wanted torch.float32 {(total, dim)}")
        self.embedding = nn.Parameter(embedding)
        self.register_buffer("table_starts", torch.tensor([starts[f.table] for f in ordered]), persistent=False)
        n = len(self.fields)
        rows, columns = torch.triu_indices(n, n, offset=1)
        self.register_buffer("pairs", rows * n + columns, persistent=False)
        # The pair that each of the n x n dots belongs to; on the diagonal any pair.
        pair_of = torch.zeros(n, n, dtype=torch.int64)
        pair_of[rows, columns] = pair_of[columns, rows] = torch.arange(len(rows))
        self.register_buffer("pair_of", pair_of.flatten(), persistent=False)

    @property
    def out_features(self) -> int:
        """Width of the result: `n dim + n (n - 1) / 2`."""
        return len(self.fields) * self.dim + self.pairs.numel()

    def forward(self, features: EncodedFeatures) -> Tensor:
        """Embed and cross a batch of the encoder's ids: `[batch, out_features]`, dtype of the embeddings."""
        embedded = self.embed(features)
        if self.pairs.numel() and torch.is_grad_enabled() and embedded.requires_grad:
            crossed: Tensor = _Cross.apply(embedded, self.pairs, self.pair_of)  # type: ignore[no-untyped-call]
            return crossed
        return _cross(embedded, self.pairs)

    def embed(self, features: EncodedFeatures) -> Tensor:
        """Return each field's vector, uncrossed: `[batch, n, dim]`, single-valued fields first."""
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
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _cross(embedded: Tensor, pairs: Tensor) -> Tensor:
    """Return `[embedded, dots of pairs]`, `[batch, n dim + n (n - 1) / 2]`, for `embedded [batch, n, dim]`."""
    with ops.without_autocast(embedded):  # products this small take longer to cast than to compute
        dots = torch.bmm(embedded, embedded.transpose(1, 2)).flatten(1)  # [batch, n * n]
    return torch.cat([embedded.flatten(1), dots.index_select(1, pairs)], dim=1)


class _Cross(torch.autograd.Function):
    """`_cross` with a gradient of one gather and one product; torch's own scatters, and multiplies twice."""

    @staticmethod
    def forward(ctx: Any, embedded: Tensor, pairs: Tensor, pair_of: Tensor) -> Tensor:
        ctx.save_for_backward(embedded, pair_of)
        return _cross(embedded, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        embedded, pair_of = ctx.saved_tensors
        batch, n, dim = embedded.shape
        # e_i . e_j moves e_i along e_j and e_j along e_i, and nothing moves a vector along itself.
        d_dots = dx.index_select(1, pair_of + n * dim).view(batch, n, n)
        d_dots.diagonal(dim1=1, dim2=2).zero_()
        return torch.baddbmm(dx[:, : n * dim].view(batch, n, dim), d_dots, embedded), None, None
