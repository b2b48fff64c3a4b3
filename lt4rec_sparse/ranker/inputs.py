"""From ids and numbers to the MLP's input: embeddings, mean-pooled bags, pairwise dots; in training and serving."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lt4rec_sparse import ops
from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.formats import VALUE_DTYPES
from lt4rec_sparse.ranker.attention import AttentionUnit
from lt4rec_sparse.ranker.features import EncodedFeatures, Field
from lt4rec_sparse.ranker.features.tables import UNSEEN
from lt4rec_sparse.ranker.rows import EMBEDDINGS, RoundedRows

STD = 0.05  # of initial embeddings


class CrossedEmbeddings(nn.Module):
    """Embed every field and cross all pairs: `x = [e_1, ..., e_n, e_i . e_j for i < j, z]` (DLRM style).

    A multi-valued field is the mean of its values' embeddings, and zero if it has none; with `attention` it is their
    sum, weighted by an `AttentionUnit` of its own. One matrix holds all tables, so that a batch takes one lookup for
    its single-valued fields and one pooled lookup for means. `z` are the raw numbers of a row
    (`EncodedFeatures.numbers`), as they are.

    Fields' vectors may also be given to a call (`embed`), from a feature store or a parameter server; tables of which
    all are need not be here (`without`).

    Args:
        fields: The fields, in the order of the encoder.
        table_sizes: Table name -> number of rows.
        dim: Width of an embedding.
        std: Standard deviation of the initial embeddings.
        embedding: `[sum of the sizes of the tables that are here, dim]`, float32, or as many `RoundedRows`: embeddings
            to use as they are, without a copy, instead of drawing new ones.
        absent: Names of tables that are not here: each call must be given the vectors of their fields.
        sparse_gradients: Whether the gradient of the embeddings is a sparse tensor that names the rows that a batch
            looks up, as `torch.nn.Embedding(sparse=True)` has it: `MaskedAdam` then steps these rows alone.
        numbers: Raw numbers per row.
        attention: Multi-valued column -> the single-valued one that its values attend to.
        units: The units of `attention`, in the order of the fields, to use as they are, instead of new ones.

    Raises:
        ValueError: If there is no field, a field's table has no size, there is no such table to be absent, or
            `embedding` has another shape or dtype.

    Source: LT4REC (arXiv 2008.09872), Figure 1; the cross of DLRM (arXiv 1906.00091), one triangle without diagonal.
    """

    table_starts: Tensor
    pairs: Tensor
    pair_of: Tensor
    embedding: nn.Parameter | RoundedRows

    def __init__(
        self,
        fields: Sequence[tuple[str, str, bool]],
        table_sizes: Mapping[str, int],
        dim: int = 16,
        std: float = STD,
        embedding: Tensor | RoundedRows | None = None,
        absent: Collection[str] = (),
        sparse_gradients: bool = False,
        numbers: int = 0,
        attention: Mapping[str, str] = {},
        units: Sequence[AttentionUnit] | None = None,
    ) -> None:
        super().__init__()
        self.numbers = numbers
        self.fields = tuple(Field(*field) for field in fields)
        self.table_sizes = dict(table_sizes)
        self.dim = dim
        missing = [field.table for field in self.fields if field.table not in table_sizes]
        if not self.fields or missing:
            raise ValueError(f"fields: got {self.fields} without sizes for tables {missing}, wanted a size for each")
        unknown = next((table for table in absent if table not in self.table_sizes), None)
        if unknown is not None:
            raise InputError(f"table: got {shown(unknown)}, wanted one of {', '.join(self.table_sizes)}")
        self.absent, self.sparse_gradients = frozenset(absent), sparse_gradients
        self._starts, total = {}, 0
        for table, size in self.table_sizes.items():
            self._starts[table] = total  # of an absent table, nothing is looked up there
            total += 0 if table in self.absent else size
        # Single-valued fields first, order kept.
        self._ordered = tuple(sorted(self.fields, key=lambda field: field.multi))
        self.n_single = sum(not field.multi for field in self.fields)
        # Sizes may come from a file, so they are compared with the embedding before anything of that size is made.
        if embedding is None:
            embedding = torch.empty(total, dim).normal_(std=std)
        held = embedding.values if isinstance(embedding, RoundedRows) else embedding
        dtype = held.dtype if isinstance(embedding, RoundedRows) else torch.float32
        if held.shape != (total, dim) or held.dtype != dtype:
            got = f"{held.dtype} {tuple(held.shape)}"
            raise ValueError(f"embedding: got {got}, wanted {dtype} {(total, dim)}")
        self.embedding = embedding if isinstance(embedding, RoundedRows) else nn.Parameter(embedding)
        starts = torch.tensor([self._starts[field.table] for field in self._ordered])
        self.register_buffer("table_starts", starts, persistent=False)
        self._places = {field.column: i for i, field in enumerate(self._ordered)}
        self._check_attention(attention)
        self.attention = {field.column: attention[field.column] for field in self._ordered if field.column in attention}
        self.units = nn.ModuleList((AttentionUnit(dim) for _ in self.attention) if units is None else units)
        n = len(self.fields)
        rows, columns = torch.triu_indices(n, n, offset=1)
        self.register_buffer("pairs", rows * n + columns, persistent=False)
        # The pair that each of the n x n dots belongs to; on the diagonal any pair.
        pair_of = torch.zeros(n, n, dtype=torch.int64)
        pair_of[rows, columns] = pair_of[columns, rows] = torch.arange(len(rows))
        self.register_buffer("pair_of", pair_of.flatten(), persistent=False)

    @property
    def out_features(self) -> int:
        """Width of the result: `n dim + n (n - 1) / 2 + numbers`."""
        return inputs_width(len(self.fields), self.dim, self.numbers)

    @property
    def kind(self) -> str:
        """How the embeddings are held, one of `EMBEDDINGS`."""
        return self.embedding.kind if isinstance(self.embedding, RoundedRows) else "fp32"

    @property
    def nbytes(self) -> int:
        """Memory of the embeddings."""
        return self.embedding.nbytes

    @property
    def address(self) -> int:
        """Where the embeddings' memory begins."""
        held = self.embedding
        return (held.values if isinstance(held, RoundedRows) else held).data_ptr()

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self.table_starts.device

    def table(self, name: str) -> Tensor:
        """Return a copy of one table's embeddings, row by id: `[rows, dim]`, float32; to serve them from elsewhere.

        Raises:
            InputError: If there is no such table here.
        """
        rows = self._parts([name])
        return rows.to_dense() if isinstance(rows, RoundedRows) else rows

    def first_row(self, name: str) -> int:
        """Return where a table's rows begin in `embedding`; -1 if they are elsewhere."""
        return -1 if name in self.absent else self._starts[name]

    def tables(self) -> dict[str, Tensor]:
        """Return all tables' embeddings, float32 `[rows, dim]` each; those held in float32 share their memory.

        Raises:
            InputError: If embeddings of a table are elsewhere.
        """
        if self.absent:
            raise InputError(f"embeddings: got none of table {', '.join(sorted(self.absent))}, wanted those of all")
        held = self.embedding
        dense = held.to_dense() if isinstance(held, RoundedRows) else held.detach()
        return dict(zip(self.table_sizes, torch.split(dense, list(self.table_sizes.values())), strict=True))

    def rounded(self, kind: str) -> CrossedEmbeddings:
        """Return the same inputs, for serving alone, with their embeddings held as "fp32", "fp16" or "int8".

        Raises:
            InputError: If there is no such kind, or the embeddings do not fit into it.
        """
        if kind not in EMBEDDINGS:
            raise InputError(f"embeddings: got {shown(kind)}, wanted one of {', '.join(EMBEDDINGS)}")
        if kind == self.kind:
            return self
        held = self.embedding
        dense = held.to_dense() if isinstance(held, RoundedRows) else held.detach()
        return self._with(dense if kind == "fp32" else RoundedRows.from_dense(dense, kind), self.absent)

    def without(self, tables: Collection[str]) -> CrossedEmbeddings:
        """Return the same inputs, for serving alone, without some tables; they share no memory.

        Tables that are absent already stay absent.

        Raises:
            InputError: If there is no such table.
        """
        for table in tables:
            if table not in self.absent:
                self._span(table)
        absent = self.absent | set(tables)
        return self._with(self._parts([table for table in self.table_sizes if table not in absent]), absent)

    def grown(
        self, table_sizes: Mapping[str, int], generator: torch.Generator | None, sparse_gradients: bool = False
    ) -> CrossedEmbeddings:
        """Return the same inputs, to train, with more rows behind those of each table, which stay, in float32.

        Args:
            table_sizes: Table name -> number of rows, at least as many as here.
            generator: Draws the new rows as initial ones are drawn. None: each is the row of values unseen in training,
                by which such values were embedded before.
            sparse_gradients: As in the constructor.

        Raises:
            InputError: If there are other tables, a table would shrink, or embeddings of a table are elsewhere.
        """
        if [*table_sizes] != [*self.table_sizes]:
            raise InputError(f"tables: got {', '.join(table_sizes)}, wanted {', '.join(self.table_sizes)}")
        parts = []
        for name, rows in self.tables().items():
            more = table_sizes[name] - len(rows)
            if more < 0:
                raise InputError(f"table {name!r}: got {table_sizes[name]} rows, wanted at least {len(rows)}")
            new = rows.new_empty(more, self.dim)
            parts += [rows, new.copy_(rows[UNSEEN]) if generator is None else new.normal_(0, STD, generator=generator)]
        how: dict[str, Any] = {"embedding": torch.cat(parts), "sparse_gradients": sparse_gradients}
        grown = CrossedEmbeddings(self.fields, table_sizes, self.dim, **how, **self._beside())
        grown.units.requires_grad_(True)  # a ranker's own are not
        return grown

    def forward(self, features: EncodedFeatures, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the network's input of an encoded batch: `[batch, out_features]`, dtype of the embeddings.

        `given` is that of `embed`.

        Raises:
            InputError: As `embed` does, or if the batch has another number of raw numbers.
        """
        return with_numbers(self.crossed(features, given), features, self.numbers)

    def crossed(self, features: EncodedFeatures, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """Embed and cross a batch of the encoder's ids, without numbers; `given` and errors are those of `embed`."""
        embedded = self.embed(features, given)
        if self.pairs.numel() and torch.is_grad_enabled() and embedded.requires_grad:
            crossed: Tensor = _Cross.apply(embedded, self.pairs, self.pair_of)  # type: ignore[no-untyped-call]
            return crossed
        return _cross(embedded, self.pairs)

    def embed(self, features: EncodedFeatures, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return each field's vector, uncrossed: `[batch, n, dim]`, single-valued fields first.

        Args:
            features: A batch.
            given: Column -> the vectors of its field, `[batch, dim]`, or `[1, dim]` for all rows; float32, float16 or
                bfloat16, finite. They stand in for the field's ids, which are not read; for a multi-valued field they
                are what pooling would yield. What attends to a field attends to what is given for it.

        Raises:
            InputError: If no field has such a column, vectors have another shape or dtype or are not finite, or a
                table is absent and vectors of its field are not given.
        """
        given = given or {}
        self.check(given, features.batch)
        if not given and not self.attention:
            return self._look_up(features, self.table_starts)
        left = {**given, **self.attention}
        places = [i for i, field in enumerate(self._ordered) if field.column not in left]
        vectors: dict[str, Tensor] = {}
        if places:
            found = self._look_up(features.of_fields(places), self.table_starts[places]).unbind(1)
            vectors = {self._ordered[i].column: rows for i, rows in zip(places, found, strict=True)}
        for column, rows in given.items():
            vectors[column] = rows.to(self.device, self._dtype).expand(features.batch, self.dim)
        for unit, (column, target) in zip(self.units, self.attention.items(), strict=True):
            if column not in given:
                vectors[column] = self._attended(features, self._places[column], unit, vectors[target])
        return torch.stack([vectors[field.column] for field in self._ordered], dim=1)

    def _attended(self, features: EncodedFeatures, place: int, unit: nn.Module, target: Tensor) -> Tensor:
        """Return the bags of a field, `[batch, dim]`, each summed by attention to its row of `target [batch, dim]`."""
        batch, first = features.batch, (place - self.n_single) * features.batch
        offsets = features.multi_offsets[first : first + batch + 1]
        ids = features.multi_values[int(offsets[0]) : int(offsets[-1])]
        if not len(ids):  # a sum of nothing, so that the unit has a gradient, as it has in processes with values
            nothing: Tensor = unit(target[:0], target[:0]).sum()
            return torch.zeros_like(target) + nothing.to(target.dtype)
        h = self._rows(ids + self.table_starts[place])
        row_of = torch.repeat_interleave(torch.arange(batch, device=ids.device), offsets.diff())
        weights = unit(h, target.index_select(0, row_of)).squeeze(1).to(h.dtype)
        at = torch.arange(len(ids), device=ids.device)
        how: dict[str, Any] = {"mode": "sum", "per_sample_weights": weights, "include_last_offset": True}
        return F.embedding_bag(at, h, offsets - offsets[0], **how)

    def _check_attention(self, attention: Mapping[str, str]) -> None:
        """Refuse attention of what is no bag to what is no single value of the same table."""
        named = {field.column: field for field in self.fields}
        for column, target in attention.items():
            bag, one = named.get(column), named.get(target)
            if bag is None or one is None or not bag.multi or one.multi or bag.table != one.table:
                wanted = "a bag that attends to a single-valued field of the same table"
                raise InputError(f"attention: got {shown(column)} to {shown(target)}, wanted {wanted}")

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if isinstance(self.embedding, RoundedRows) else self.embedding.dtype

    def _with(self, embedding: Tensor | RoundedRows, absent: Collection[str]) -> CrossedEmbeddings:
        how: dict[str, Any] = {"embedding": embedding, "absent": absent}
        return CrossedEmbeddings(self.fields, self.table_sizes, self.dim, **how, **self._beside()).eval()

    def _beside(self) -> dict[str, Any]:
        """Return what the constructor takes beside embeddings; the units are copies."""
        units = copy.deepcopy(list(self.units))
        return {"numbers": self.numbers, "attention": self.attention, "units": units}

    def _span(self, table: str) -> slice:
        here = [name for name in self.table_sizes if name not in self.absent]
        if table not in here:
            raise InputError(f"table: got {shown(table)}, wanted one of {', '.join(here) or 'none'}")
        return slice(self._starts[table], self._starts[table] + self.table_sizes[table])

    def _parts(self, tables: Collection[str]) -> Tensor | RoundedRows:
        """Return a copy of the embeddings of some tables, one table after another."""
        spans = [self._span(table) for table in tables]
        if isinstance(self.embedding, RoundedRows):
            return self.embedding.parts(spans)
        dense = self.embedding.detach()
        return torch.cat([dense[:0], *(dense[span] for span in spans)])

    def can_take(self, given: Mapping[str, Tensor]) -> bool:
        """Whether given vectors are of fields, and finite; if not, `check` says what is wrong."""
        columns = {field.column for field in self.fields} if given else set()  # most requests give none
        return all(
            column in columns and rows.dtype in VALUE_DTYPES and bool(rows.isfinite().all())
            for column, rows in given.items()
        )

    def check(self, given: Mapping[str, Tensor], batch: int) -> None:
        """Check what a call of `batch` rows gives in place of ids; errors are those of `embed`."""
        columns = [field.column for field in self.fields]
        for column, vectors in given.items():
            if column not in columns:
                raise InputError(f"embeddings: got column {shown(column)}, wanted one of {', '.join(columns)}")
            if vectors.dim() != 2 or vectors.shape[0] not in (1, batch) or vectors.shape[1] != self.dim:
                wanted = f"{[batch, self.dim]} or {[1, self.dim]}"
                raise InputError(f"embeddings of {column!r}: got shape {list(vectors.shape)}, wanted {wanted}")
            if vectors.dtype not in VALUE_DTYPES:
                names = ", ".join(map(str, VALUE_DTYPES))
                raise InputError(f"embeddings of {column!r}: got {vectors.dtype}, wanted one of {names}")
            if not bool(vectors.isfinite().all()):
                raise InputError(f"embeddings of {column!r}: got NaN or Inf, wanted finite numbers")
        for column, table, _ in self.fields if self.absent else ():
            if table in self.absent and column not in given:
                wanted = f"{[batch, self.dim]}, since table {table!r} is absent here"
                raise InputError(f"embeddings of {column!r}: got none, wanted {wanted}")

    def _look_up(self, features: EncodedFeatures, starts: Tensor) -> Tensor:
        """Return the vectors of all fields of `features`, whose tables start at `starts`."""
        batch, n, n_single = features.batch, len(starts), features.single.shape[1]
        parts = []
        if n_single:
            parts.append(self._rows(features.single + starts[:n_single]))
        if n > n_single:
            # Bags are field-major: field f's values are contiguous, and bag f * batch + b is row b's.
            ends = features.multi_offsets[batch::batch] if batch else features.multi_offsets.new_zeros(n - n_single)
            counts = torch.diff(ends, prepend=ends.new_zeros(1))
            ids = features.multi_values + torch.repeat_interleave(starts[n_single:], counts)
            pooled = self._pooled_rows(ids, features.multi_offsets)
            parts.append(pooled.view(n - n_single, batch, self.dim).transpose(0, 1))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _rows(self, ids: Tensor) -> Tensor:
        if isinstance(self.embedding, RoundedRows):
            rows: Tensor = self.embedding(ids)
            return rows
        return F.embedding(ids, self.embedding, sparse=self.sparse_gradients)

    def _pooled_rows(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return the mean of the rows of each bag, zero for an empty one."""
        if isinstance(self.embedding, RoundedRows):  # torch pools no rounded rows: theirs are looked up before
            ids, rows, sparse = torch.arange(len(ids), device=ids.device), self.embedding(ids), False
        else:
            rows, sparse = self.embedding, self.sparse_gradients
        return F.embedding_bag(ids, rows, offsets, mode="mean", include_last_offset=True, sparse=sparse)


def inputs_width(fields: int, dim: int, numbers: int) -> int:
    """Return the width of a network's input: `n dim + n (n - 1) / 2 + numbers` for n fields."""
    return fields * dim + fields * (fields - 1) // 2 + numbers


def with_numbers(x: Tensor, features: EncodedFeatures, wanted: int) -> Tensor:
    """Return `x [batch, k]` with a batch's raw numbers behind it, `[batch, k + wanted]`.

    Raises:
        InputError: If the batch has another number of them.
    """
    if features.numbers.shape[1] != wanted:
        raise InputError(f"numbers: got {features.numbers.shape[1]} per row, wanted {wanted}")
    return torch.cat([x, features.numbers.to(x)], dim=1) if wanted else x


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
