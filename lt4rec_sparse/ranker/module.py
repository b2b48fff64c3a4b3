"""A ranker from ids on, as a module of torch: to export, to quantise, to serve elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lt4rec_sparse.ranker.features import EncodedFeatures, Field
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings

PADDING = -1  # no value; 0 is a value that is missing, which has an embedding


class RankerModule(nn.Module):
    """Every field's ids to every task's scores: what `Ranker.to_module` and `Ranker.to_dense` return.

    Servers put requests together along the first dimension of every tensor. A multi-valued field is therefore padded,
    and not values with offsets; `padded_ids` makes such ids of what the encoder gives. Raw numbers, where the ranker
    has any, are one more tensor behind the ids.

    Args:
        inputs: The embeddings and the cross. The memory of float32 embeddings is shared; rounded ones become float32.
        mlp: `[batch, in_features]` to `[batch, tasks]`.
        tasks: The names of the tasks.

    Raises:
        InputError: If embeddings of a table are elsewhere.

    Attributes:
        fields: In the order of the ids: single-valued ones first.
        numbers: Raw numbers per row.
    """

    pairs: Tensor

    def __init__(self, inputs: CrossedEmbeddings, mlp: nn.Module, tasks: Sequence[str]) -> None:
        super().__init__()
        self.fields, self.tasks, self.mlp = ordered_fields(inputs), tuple(tasks), mlp
        self.numbers = inputs.numbers
        self.units = copy.deepcopy(inputs.units)
        of_column = {field.column: i for i, field in enumerate(self.fields)}
        self._attention = {of_column[column]: of_column[target] for column, target in inputs.attention.items()}
        places = {name: i for i, name in enumerate(inputs.table_sizes)}
        tables = inputs.tables().values()
        self.tables = nn.ModuleList(nn.Embedding(len(table), inputs.dim, _weight=table) for table in tables)
        self._table_of = tuple(places[field.table] for field in self.fields)
        self.register_buffer("pairs", inputs.pairs)
        self.eval().requires_grad_(False)

    def forward(self, *ids: Tensor) -> dict[str, Tensor]:
        """Score candidates.

        Args:
            *ids: One int64 tensor per field, in the order of `fields`: `[batch]`, or of a multi-valued field
                `[batch, values]`, filled up with -1. Where there are raw numbers, these last: float32
                `[batch, numbers]`, as the encoder has them.

        Returns:
            Task name -> `[batch]`, float32.

        Raises:
            ValueError: If there are not as many tensors as fields, or one has another number of dimensions.
            IndexError: If an id is not in its table.
        """
        wanted = len(self.fields) + bool(self.numbers)
        if len(ids) != wanted:
            last = ", and one of numbers" if self.numbers else ""
            raise ValueError(f"ids: got {len(ids)} tensors, wanted {wanted}, one per field{last}")
        numbers = ids[len(self.fields) :]
        for z in numbers:
            if z.dim() != 2 or z.shape[1] != self.numbers:
                raise ValueError(f"numbers: got shape {tuple(z.shape)}, wanted [batch, {self.numbers}]")
        vectors: list[Tensor] = []
        units = iter(self.units)
        for i, (field, table, of_field) in enumerate(zip(self.fields, self._table_of, ids, strict=False)):
            if of_field.dim() != 1 + field.multi:
                shape = "[batch, values]" if field.multi else "[batch]"
                raise ValueError(f"{field.column}: got shape {tuple(of_field.shape)}, wanted {shape}")
            rows = self.tables[table]
            if i in self._attention:  # single-valued fields come first: the target is there
                vectors.append(_attended(rows, of_field, next(units), vectors[self._attention[i]]))
            else:
                vectors.append(_pooled(rows, of_field) if field.multi else rows(of_field))
        embedded = torch.stack(vectors, 1)  # [batch, fields, dim]
        dots = torch.bmm(embedded, embedded.transpose(1, 2)).flatten(1)
        x = torch.cat([embedded.flatten(1), dots.index_select(1, self.pairs), *numbers], 1)
        return dict(zip(self.tasks, self.mlp(x).unbind(1), strict=True))


def ordered_fields(inputs: CrossedEmbeddings) -> tuple[Field, ...]:
    """Return the fields in the order in which `CrossedEmbeddings` embeds them: single-valued ones first."""
    return tuple(sorted(inputs.fields, key=lambda field: field.multi))


def padded_ids(features: EncodedFeatures, fields: Sequence[Field]) -> tuple[Tensor, ...]:
    """Return encoded rows as a `RankerModule` or an exported ranker reads them, one tensor per field.

    Example:
        >>> features = EncodedFeatures(torch.tensor([[7], [8]]), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3]))
        >>> fields = [Field("item", "item", multi=False), Field("tags", "tags", multi=True)]
        >>> [ids.tolist() for ids in padded_ids(features, fields)]
        [[7, 8], [[1, -1], [2, 3]]]

    Args:
        features: What the encoder gives; it may have no row.
        fields: `encoder.fields`, or those of the module.

    Returns:
        Int64 `[batch]` of each single-valued field; of each multi-valued one `[batch, most values of a row]`, filled up
        with -1. Where there are raw numbers, these last: float32 `[batch, numbers]`.

    Raises:
        ValueError: If the rows are of other fields.
    """
    batch, n_multi = features.batch, sum(field.multi for field in fields)
    got, wanted = features.single.shape[1], len(fields) - n_multi
    if got != wanted or features.multi_offsets.numel() != n_multi * batch + 1:
        n_bags = features.multi_offsets.numel() - 1
        raise ValueError(f"features: got {got} ids and {n_bags} bags, wanted {wanted} per row and {n_multi * batch}")
    padded = []
    for f in range(n_multi):
        offsets = features.multi_offsets[f * batch : (f + 1) * batch + 1]
        lengths = offsets.diff()
        places = torch.arange(int(lengths.max()) if batch else 0)
        of_field = torch.full((batch, len(places)), PADDING, dtype=torch.int64)
        of_field[places < lengths[:, None]] = features.multi_values[int(offsets[0]) : int(offsets[-1])].long()
        padded.append(of_field)
    numbers = (features.numbers,) if features.numbers.shape[1] else ()
    return (*features.single.long().unbind(1), *padded, *numbers)


def _attended(table: nn.Module, ids: Tensor, unit: nn.Module, target: Tensor) -> Tensor:
    """Return the sum of the embeddings of the ids of a row that are no padding, by attention to `target`."""
    is_padding = ids == PADDING
    h = table(ids.masked_fill(is_padding, 0))  # [batch, values, dim]
    weights = unit(h, target.unsqueeze(1).expand_as(h)).masked_fill(is_padding.unsqueeze(2), 0.0)
    total: Tensor = (weights * h).sum(1)
    return total


def _pooled(table: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean embedding of the ids of a row that are no padding; zero if there is none."""
    is_padding = ids == PADDING
    rows = table(ids.masked_fill(is_padding, 0)).masked_fill(is_padding.unsqueeze(2), 0.0)
    mean: Tensor = rows.sum(1) / (~is_padding).sum(1, keepdim=True).clamp(min=1)
    return mean
