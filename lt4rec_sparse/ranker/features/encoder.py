"""The encoder: fitted on the training days, stored in the artefact, and the only way from raw values to ids.

Its ids, and the numbers beside them, are the input of every model of this project.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.ranker.features import raw as raw_columns
from lt4rec_sparse.ranker.features import tables as id_tables
from lt4rec_sparse.ranker.features.numbers import Scale, ScaleFit
from lt4rec_sparse.ranker.features.schema import Column, Schema
from lt4rec_sparse.ranker.features.tables import MISSING, Array, Fit, IntVocabulary, StringVocabulary, Table

FORMAT = 1
NO_NUMBERS = torch.empty(0, 0)


@dataclass(frozen=True)
class EncodedFeatures:
    """Ids of `batch` rows, each local to its embedding table; id 0 is a missing value.

    Attributes:
        single: `[batch, n_single]` int64: the single-valued and bucketed columns, in the order of `encoder.fields`.
        multi_values: `[nnz]` int64: the bags of all multi-valued columns, one after another.
        multi_offsets: `[n_multi * batch + 1]` int64: bag `f * batch + b` of field `f` and row `b` is
            `multi_values[multi_offsets[f * batch + b] : multi_offsets[f * batch + b + 1]]`, as `EmbeddingBag` wants it
            with `include_last_offset`. An empty bag pools to zero.
        numbers: `[batch, encoder.n_numbers]` float32: the inputs of raw numbers and vectors, in the order of
            `encoder.numbers`. Rows that are made without any have none.

    Ids may be stored as int32, as in a cache; `take` always returns int64.
    """

    single: Tensor
    multi_values: Tensor
    multi_offsets: Tensor
    numbers: Tensor = NO_NUMBERS

    def __post_init__(self) -> None:
        if self.numbers is NO_NUMBERS:
            object.__setattr__(self, "numbers", torch.empty(self.batch, 0, device=self.single.device))

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.single.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        return sum(part.nbytes for part in (self.single, self.multi_values, self.multi_offsets, self.numbers))

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
        return EncodedFeatures(single, values, offsets, self.numbers.index_select(0, rows))

    def of_fields(self, places: Sequence[int]) -> EncodedFeatures:
        """Return the same rows with the fields at some places alone, in ascending order; numbers stay.

        Places count the single-valued fields, then the multi-valued ones.
        """
        n_single, batch = self.single.shape[1], self.batch
        bags = [place - n_single for place in places if place >= n_single]
        ends = [(self.multi_offsets[f * batch], self.multi_offsets[(f + 1) * batch]) for f in bags]
        lengths = [self.multi_offsets[f * batch : (f + 1) * batch + 1].diff() for f in bags]
        return EncodedFeatures(
            self.single[:, [place for place in places if place < n_single]],
            torch.cat([self.multi_values[:0], *(self.multi_values[first:last] for first, last in ends)]),
            torch.cat([self.multi_offsets[:1], *lengths]).cumsum(0),
            self.numbers,
        )

    def to(self, device: torch.device | str) -> EncodedFeatures:
        """Return the same rows on `device`."""
        parts = (self.single, self.multi_values, self.multi_offsets, self.numbers)
        return EncodedFeatures(*(part.to(device) for part in parts))

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
            torch.cat([part.numbers for part in parts]),
        )


class Field(NamedTuple):
    """One input field of a model: its column, its embedding table, and whether it holds a bag of values."""

    column: str
    table: str
    multi: bool


class FeatureEncoder:
    """Turn raw columns into ids, the same way in training and in serving.

    Id 0 is a missing value. In a vocabulary table 1 is a value unseen in training and 2, 3, ... are the known values by
    descending count, then value, and behind them those that later days added (`grown`). In a hashed table the ids from
    1 are hashes, in a dense one quantile buckets.

    Raw numbers and vectors have no ids: `Scale` makes inputs of them.

    Args:
        schema: The columns.
        tables: The fitted table of every table name in use.
        scales: The fitted scale of every column of raw numbers.
        until: The last day of a log that the model was trained on; None if that is not known.

    Attributes:
        fields: Single-valued and bucketed ones in schema order (as in `single`), then multi-valued ones (as the bags).
        table_sizes: Rows of every embedding table, in the order of first use by `fields`.
        numbers: Column -> its inputs, of raw numbers and vectors, in schema order.
        attention: Multi-valued column -> the single-valued one that its values attend to, in the order of `fields`.
    """

    def __init__(
        self,
        schema: Schema,
        tables: Mapping[str, Table],
        scales: Mapping[str, Scale] = {},
        until: str | None = None,
    ) -> None:
        self.schema, self.until = schema, until
        self._numbers = tuple(column for column in schema.features if column.is_number)
        with_ids = [column for column in schema.features if not column.is_number]
        self._single = tuple(column for column in with_ids if column.kind != "multi")
        self._multi = tuple(column for column in with_ids if column.kind == "multi")
        columns = (*self._single, *self._multi)
        self._tables = {column.table: tables[column.table] for column in columns}
        self.fields = tuple(Field(column.name, column.table, column.kind == "multi") for column in columns)
        self.table_sizes = {name: table.size for name, table in self._tables.items()}
        self._scales = {column.name: scales[column.name] for column in self._numbers}
        self.numbers = {name: scale.width for name, scale in self._scales.items()}
        self.attention = {column.name: column.target for column in self._multi if column.target is not None}

    @property
    def n_numbers(self) -> int:
        """Inputs of all raw numbers and vectors together."""
        return sum(self.numbers.values())

    @classmethod
    def fit(
        cls,
        schema: Schema,
        chunks: Iterable[Mapping[str, Any]],
        until: str | None = None,
        scratch: Path | None = None,
    ) -> FeatureEncoder:
        """Learn vocabularies, quantiles and scales from the chunks of the training days, one in memory at a time.

        Columns that share a table share its counts. Chunks and errors are as in `encode`. With a folder `scratch` for
        temporary files, memory holds the counts of at most `tables.HELD` values of each table, and then what is kept;
        the result is the same.
        """
        return cls(schema, *_fitted(schema.features, chunks, scratch), until)

    def grown(
        self, chunks: Iterable[Mapping[str, Any]], until: str | None = None, scratch: Path | None = None
    ) -> FeatureEncoder:
        """Return the encoder with values of later days added to its vocabularies: no id of before changes.

        Values are counted in these chunks alone: one that they have at least `min_count` times is added, by descending
        count, then value. Hashed tables, quantiles and scales stay. Chunks and errors are as in `encode`, and `scratch`
        as in `fit`.
        """
        kinds = (IntVocabulary, StringVocabulary)
        columns = [column for column in self.schema.features if isinstance(self._tables.get(column.table), kinds)]
        grown: dict[str, Any] = dict(self._tables)
        for name, found in _fitted(columns, chunks, scratch)[0].items():
            grown[name] = grown[name].grown(found)
        return FeatureEncoder(self.schema, grown, self._scales, until)

    def encode(self, columns: Mapping[str, Any], given: Mapping[str, int] | None = None) -> EncodedFeatures:
        """Encode raw columns, in any of the forms that `features.raw` describes.

        Args:
            columns: Every feature column by name, all with the same number of rows, or with one row, which then holds
                for all and is encoded once; other columns are ignored.
            given: Column -> rows of the vectors that replace it: it is not read, its ids are those of missing values.

        Returns:
            Int64 ids and float32 numbers, on the CPU.

        Raises:
            ValueError: If a column is absent, has another number of rows, or has a value of a wrong type, or a number
                that `Scale` refuses.
        """
        given = given or {}
        batch = self._rows(columns, given)
        single = np.full((batch, len(self._single)), MISSING, np.int64)
        for place, column in enumerate(self._single):
            if column.name in given:
                continue
            values, present = raw_columns.single(column, columns[column.name])
            rows = present if len(present) == batch else slice(None) if present[0] else slice(0)
            single[rows, place] = self._tables[column.table].lookup(values)
        ids, lengths = [np.empty(0, np.int64)], [np.zeros(1, np.int64)]
        for column in self._multi:
            if column.name in given:
                lengths.append(np.zeros(batch, np.int64))
                continue
            values, offsets = raw_columns.bags(column, columns[column.name])
            repeats = batch if len(offsets) == 2 else 1
            ids.append(np.tile(self._tables[column.table].lookup(values), repeats))
            lengths.append(np.tile(np.diff(offsets), repeats))
        return EncodedFeatures(
            torch.from_numpy(single),
            torch.from_numpy(np.concatenate(ids)),
            torch.from_numpy(np.cumsum(np.concatenate(lengths))),
            torch.from_numpy(self._inputs_of_numbers(columns, given, batch)),
        )

    def _inputs_of_numbers(
        self, columns: Mapping[str, Any], given: Mapping[str, int], batch: int
    ) -> NDArray[np.float32]:
        """Return `[batch, n_numbers]`; a column of one row holds for all."""
        found = np.zeros((batch, self.n_numbers), np.float32)
        end = 0
        for name, scale in self._scales.items():
            begin, end = end, end + scale.width
            if name not in given:  # which no number may be: the model says so
                found[:, begin:end] = scale.inputs(*raw_columns.numbers(scale.column, columns[name]))
        return found

    def table(self, name: str) -> Table:
        """Return a fitted table."""
        return self._tables[name]

    def scale(self, name: str) -> Scale:
        """Return the fitted scale of a column of raw numbers."""
        return self._scales[name]

    def to_arrays(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return what was fitted as arrays named `<table>.<part>`, and the schema as data for JSON."""
        arrays = {
            f"{name}.{part}": array
            for name, fitted in (*self._tables.items(), *self._scales.items())
            for part, array in fitted.to_arrays().items()
        }
        # Beside the schema, where readers of before it was there do not look.
        schema = self.schema.to_stored()
        context = {"context": named} if (named := schema.pop("context")) else {}
        until = {} if self.until is None else {"until": self.until}
        return arrays, {"format": FORMAT, "schema": schema, **context, **until}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> FeatureEncoder:
        """Read `to_arrays` back.

        Raises:
            ValueError: If the format differs, the schema is wrong, or an array is absent or malformed.
        """
        if meta.get("format") != FORMAT:
            raise ValueError(f"encoder format: got {shown(meta.get('format'))}, wanted {FORMAT}")
        until = meta.get("until")
        if not isinstance(until, str | None):
            raise ValueError(f"until: got {shown(until)}, wanted a day, or none")
        described = meta.get("schema", {})
        if isinstance(described, Mapping):
            described = {**described, "context": meta.get("context", [])}
        schema = Schema.from_stored(described)
        by_table: dict[str, dict[str, Array]] = {}
        for name, array in arrays.items():
            table, _, part = name.rpartition(".")  # names of tables may hold dots: only the last part names the array
            by_table.setdefault(table, {})[part] = array
        tables: dict[str, Table] = {}
        scales: dict[str, Scale] = {}
        for column in schema.features:  # columns that share a table are alike in all that makes it
            if column.is_number:
                scales[column.name] = _stored_scale(column, by_table.get(column.name, {}))
            elif column.table not in tables:
                tables[column.table] = _stored_table(column, by_table.get(column.table, {}))
        return cls(schema, tables, scales, until)

    def _rows(self, columns: Mapping[str, Any], given: Mapping[str, int]) -> int:
        """Return the rows of a batch: those of all columns but for columns of one row."""
        first, wanted = "", 1
        for column in (*self._single, *self._multi, *self._numbers):
            if column.name not in columns and column.name not in given:
                raise InputError(f"column {column.name!r}: got nothing, wanted values; it is a feature")
            name = column.name
            got = given[name] if name in given else raw_columns.rows_of(column, columns[name])
            if got == 1:
                continue
            if not first:
                first, wanted = name, got
            elif got != wanted:
                raise InputError(f"column {name!r}: got {got} rows, wanted {wanted} as in {first!r}, or 1")
        return wanted


def _fitted(
    columns: Sequence[Column], chunks: Iterable[Mapping[str, Any]], scratch: Path | None
) -> tuple[dict[str, Table], dict[str, Scale]]:
    fits = {column.table: _new_fit(column, scratch) for column in columns if not column.is_number}
    scales = {column.name: ScaleFit(column) for column in columns if column.is_number}
    for chunk in chunks:
        for column in columns:
            if column.is_number:
                scales[column.name].add(*raw_columns.numbers(column, chunk[column.name]))
                continue
            part = raw_columns.bags if column.kind == "multi" else raw_columns.single
            fits[column.table].add(part(column, chunk[column.name])[0])
    return {name: fit.table() for name, fit in fits.items()}, {name: fit.scale() for name, fit in scales.items()}


def _new_fit(column: Column, scratch: Path | None) -> Fit:
    if column.kind == "dense":
        return id_tables.QuantileFit(column.buckets, column.encoding == "nonzero_buckets")
    if column.encoding == "hash":
        return id_tables.HashTable(column.size)
    of_type = id_tables.IntFit if column.type == "int" else id_tables.StringFit
    return of_type(column.min_count, scratch)


def _stored_scale(column: Column, arrays: dict[str, Array]) -> Scale:
    try:
        return Scale.from_arrays(column, arrays)
    except ValueError as error:
        raise ValueError(f"encoder column {column.name!r}: {error}") from error


def _stored_table(column: Column, arrays: dict[str, Array]) -> Table:
    try:
        if column.kind == "dense":
            return id_tables.QuantileTable.from_arrays(arrays)
        if column.encoding == "hash":
            return id_tables.HashTable(column.size)
        vocabulary = id_tables.IntVocabulary if column.type == "int" else id_tables.StringVocabulary
        return vocabulary.from_arrays(arrays)
    except ValueError as error:
        raise ValueError(f"encoder table {column.table!r}: {error}") from error
