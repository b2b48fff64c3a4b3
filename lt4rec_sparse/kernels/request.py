"""The door to the request of csrc/: raw columns or ids in, every task's scores out, in one call of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.network import FrozenNetwork

TABLE_KINDS = ("ints", "strings", "hashed_ints", "hashed_strings", "cuts")  # of csrc/ranker.h, in its order
ROW_KINDS = {torch.float32: 0, torch.float16: 1, torch.int8: 2}  # of csrc/ranker.h

if cpu.is_available():
    cpu.engine().use_arrays(np.ndarray, np.ma.MaskedArray)


class IdTable(NamedTuple):
    """What turns a column's values into ids, and where the rows of its embeddings begin."""

    kind: str  # one of TABLE_KINDS
    size: int  # ids are below
    first_row: int  # -1: the embeddings are elsewhere
    keys: NDArray[Any] | None = None  # ints: int64 [n]; strings: their UTF-8, uint8; cuts: float64 [n], ascending
    offsets: NDArray[np.int64] | None = None  # strings: where each begins in `keys`, and the last one ends


class IdField(NamedTuple):
    """One input of the network: a column, and how its values are read."""

    column: str
    table: int  # its place among the tables
    is_bag: bool
    is_common: bool  # all candidates of a request have it in common
    separator: str  # of a bag that is given as text


class Split(NamedTuple):
    """A network in two: its first layers over what candidates have in common, and all layers over the rest."""

    common: FrozenNetwork | None  # without activation; None where nothing is in common
    own: FrozenNetwork  # whose first layers have no bias where there is a `common`
    common_columns: Tensor  # int64: which input of the whole network each of its inputs is
    own_columns: Tensor


class _Blobs:
    """The networks, prepacked for as many rows as requests have had. The engine asks for more."""

    def __init__(self, split: Split, precision: str) -> None:
        self._networks, self._precision = (split.common, split.own), precision
        self.held: list[Tensor] = []

    def prepare(self, is_own: int, rows: int) -> int:
        """Prepack a network for a number of rows, and return the address of what stays."""
        network = self._networks[is_own]
        assert network is not None
        takes_bias = bool(is_own) and self._networks[0] is not None
        blob = cpu.prepack(network, self._precision, batch=rows, takes_bias=takes_bias)
        self.held.append(blob)
        return blob.data_ptr()


class RequestEngine:
    """A ranker in the engine, or its inputs alone. A layout is prepacked when a request first needs it, and kept.

    Args:
        tables: The id tables.
        fields: The inputs, those with a single value first.
        embedding: `[rows, dim]`, float32, float16 or int8; contiguous, on the CPU. Its memory is read as it is.
        scales: `[rows]`, float32, with int8.
        split: The networks.
        precision: "fp32", "bf16" or "int8".
    """

    def __init__(
        self,
        tables: Sequence[IdTable],
        fields: Sequence[IdField],
        embedding: Tensor,
        scales: Tensor | None,
        split: Split,
        precision: str,
    ) -> None:
        self._blobs = _Blobs(split, precision)
        texts = [np.frombuffer(field.separator.encode("utf-8", "surrogatepass") + b"\0", np.uint8) for field in fields]
        of_tables = np.array([_table_words(table) for table in tables], np.int64)
        of_fields = np.array(
            [
                (field.table, field.is_bag, field.is_common, text.ctypes.data)
                for field, text in zip(fields, texts, strict=True)
            ],
            np.int64,
        )
        common, own = split.common_columns.contiguous(), split.own_columns.contiguous()
        spec = np.array(
            [
                of_tables.ctypes.data,
                len(tables),
                of_fields.ctypes.data,
                len(fields),
                embedding.shape[1],
                embedding.data_ptr(),
                ROW_KINDS[embedding.dtype],
                0 if scales is None else scales.data_ptr(),
                common.data_ptr(),
                common.numel(),
                own.data_ptr(),
                own.numel(),
            ],
            np.int64,
        )
        self._kept = (list(tables), texts, embedding, scales)  # what the capsule reads by address
        engine = cpu.engine()
        names = tuple(field.column for field in fields)
        capsule = engine.new_ranker(spec.ctypes.data, names, split.own.outputs, self._blobs.prepare)
        self._score_columns: Callable[..., Tensor | None] = engine.score_columns
        self._inputs_of_columns: Callable[..., Tensor | None] = engine.inputs_of_columns
        self._score_ids: Callable[..., Tensor | None] = engine.score_ids
        self._capsule = capsule

    def score(
        self,
        candidates: Mapping[str, Any],
        context: Mapping[str, Any] | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> Tensor | None:
        """Score raw columns: float32 `[rows, tasks]`; None where the engine does not read one, or they do not agree.

        A column of `context` has one row, and is none of `candidates`. `given` are vectors in the place of a column,
        float32 `[rows, dim]` or `[1, dim]`, contiguous and finite.
        """
        return self._score_columns(self._capsule, candidates, context, given, torch.get_num_threads(), torch.empty)

    def inputs(
        self,
        candidates: Mapping[str, Any],
        context: Mapping[str, Any] | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> Tensor | None:
        """Return what enters the network, float32 `[rows, in_features]`; wants a split without anything in common.

        Arguments, and when it is None, are those of `score`.
        """
        return self._inputs_of_columns(self._capsule, candidates, context, given, torch.get_num_threads(), torch.empty)

    def score_ids(
        self, single: Tensor, values: Tensor, offsets: Tensor, given: Mapping[str, Tensor] | None = None
    ) -> Tensor | None:
        """Score encoded rows, `EncodedFeatures`' tensors: contiguous int64; None where an id is out of its table."""
        return self._score_ids(
            self._capsule,
            single.data_ptr(),
            len(single),
            values.data_ptr(),
            values.numel(),
            offsets.data_ptr(),
            given,
            torch.get_num_threads(),
            torch.empty,
        )

    @property
    def prepacked_nbytes(self) -> int:
        """Bytes of what is prepacked so far."""
        return sum(blob.nbytes for blob in self._blobs.held)


def _table_words(table: IdTable) -> tuple[int, ...]:
    """The words of TableSpec in csrc/ranker.h."""
    keys = 0 if table.keys is None else table.keys.ctypes.data
    offsets = 0 if table.offsets is None else table.offsets.ctypes.data
    count = len(table.keys) if table.offsets is None and table.keys is not None else 0
    if table.offsets is not None:
        count = len(table.offsets) - 1
    return TABLE_KINDS.index(table.kind), table.size, keys, offsets, count, table.first_row
