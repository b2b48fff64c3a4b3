"""The columns of a model as inputs of the Open Inference Protocol, and tensors to the raw columns that a ranker reads.

- A column of ints is INT64 (or another INT or UINT), one of text BYTES, a dense one FP64 (or FP32, FP16, and ints up to
  2^53, which FP64 holds exactly). Its shape is `[n]`; `[1]` beside others of `[n]` holds for all candidates.
- A missing value is `null` in JSON and NaN in FP. For every datatype there is `<column>.present`, BOOL of the column's
  shape: false where the value is missing, whatever the column holds there.
- A vector of `size` numbers is FP like a dense one, its rows one after another: `[n * size]`, and `[size]` beside
  others for all candidates. One of NaN or `null` alone is missing; there is no `<column>.present`.
- A multi-valued column is its values, `[values of all rows]`, and `<column>.offsets`, INT64 `[n + 1]`: row i has the
  values from `offsets[i]` to `offsets[i + 1]`. Without offsets it is BYTES `[n]`, text with the schema's separator. A
  row without values is a missing one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lt4rec_sparse.errors import shown
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.ranker.features.schema import Column
from lt4rec_sparse.serve.settings import Limits, RequestError
from lt4rec_sparse.serve.tensors import BYTES, Tensor

EXACT = 1 << 53  # ints up to it are float64 without rounding


class Columns:
    """The columns of one model.

    Args:
        schema: The model's.
        limits: What a request may hold at most.
    """

    def __init__(self, schema: Schema, limits: Limits) -> None:
        self.features = {column.name: column for column in schema.features}
        self.limits = limits
        multi = {f"{c.name}.offsets": c for c in schema.features if c.kind == "multi"}
        others = {f"{c.name}.present": c for c in schema.features if not c.is_list}
        # A declared column keeps its name, whatever it ends in.
        self._beside = {name: c for name, c in (multi | others).items() if name not in self.features}

    def inputs(self) -> list[dict[str, Any]]:
        """Return name, datatype and shape of every input that a request must have, as the protocol lists them."""
        listed = []
        for column in self.features.values():
            is_number = column.kind in ("dense", "vector")
            datatype = "FP64" if is_number else "INT64" if column.type == "int" else BYTES
            listed.append({"name": column.name, "datatype": datatype, "shape": [-1]})
            if column.kind == "multi":
                listed.append({"name": f"{column.name}.offsets", "datatype": "INT64", "shape": [-1]})
        return listed

    def most(self, name: str) -> int:
        """Return how many elements an input may have."""
        column = self.features.get(name)
        if column is not None and column.kind == "multi":
            return self.limits.rows * self.limits.bag_values
        if column is not None and column.kind == "vector":
            return self.limits.rows * column.size
        return self.limits.rows + 1 if name in self._beside else self.limits.rows

    def raw(self, tensors: Mapping[str, Tensor], others: Collection[str]) -> dict[str, Any]:
        """Return the columns of a request, in the forms of `features.raw`.

        Args:
            tensors: By name.
            others: Columns of numbers that may be there although they are no features.

        Raises:
            RequestError: If a tensor is no column, has a datatype that its column cannot have, or too many values.
        """
        columns: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if name in self.features:
                columns[name] = self._raw(self.features[name], tensor, tensors)
            elif name in self._beside:
                if self._beside[name].name not in tensors:
                    raise RequestError(f"input {shown(name)}: got it without {self._beside[name].name!r}, wanted both")
            elif name in others:
                columns[name] = _numbers(tensor)
            else:
                raise RequestError(f"input {shown(name)}: got no column of the model, wanted {self.known()}")
        return columns

    def check_rows(self, columns: Mapping[str, int]) -> int:
        """Return the rows of a request of columns with so many rows each.

        Raises:
            RequestError: If there are too many, or columns of more than one row differ.
        """
        first, rows = "", 1
        for name, got in columns.items():
            if got > self.limits.rows:
                raise RequestError(f"column {name!r}: got {got} rows, wanted at most {self.limits.rows}")
            if got != 1 and not first:
                first, rows = name, got
            elif got not in (1, rows):
                raise RequestError(f"column {name!r}: got {got} rows, wanted {rows} as in {first!r}, or 1")
        return rows

    def known(self) -> str:
        """Return the names of all columns for a message, cut where there are many."""
        names = ", ".join(self.features)
        return names if len(names) < 400 else f"{names[:400]}..."

    def check_bag(self, column: Column, values: int) -> None:
        """Refuse a row of too many values."""
        if values > self.limits.bag_values:
            most = self.limits.bag_values
            raise RequestError(f"column {column.name!r}: got {values} values in one row, wanted at most {most}")

    def _raw(self, column: Column, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Any:
        if column.kind == "multi":
            offsets = tensors.get(f"{column.name}.offsets") if f"{column.name}.offsets" in self._beside else None
            return self._bags(column, tensor, offsets)
        if column.kind == "vector":
            return _vectors(column, tensor)
        if column.kind == "dense":
            values = _numbers(tensor)
        else:
            _check_datatype(column, tensor)
            values = tensor.values
        present = tensors.get(f"{column.name}.present") if f"{column.name}.present" in self._beside else None
        return values if present is None else _masked(values, present)

    def _bags(self, column: Column, tensor: Tensor, offsets: Tensor | None) -> Any:
        if offsets is None:
            if tensor.datatype != BYTES:
                wanted = f"{column.name}.offsets beside it, or BYTES with {column.separator!r} between values"
                raise RequestError(f"input {column.name!r}: got {tensor.datatype} without offsets, wanted {wanted}")
            for text in tensor.values:
                self.check_bag(column, 0 if text is None else text.count(column.separator) + 1)
            return list(tensor.values)
        _check_datatype(column, tensor)
        if not _is_int(offsets) or isinstance(offsets.values, np.ma.MaskedArray):
            raise RequestError(f"input {offsets.name!r}: got {offsets.datatype}, wanted INT64 without missing ones")
        total = len(tensor.values)
        cuts = offsets.values
        is_cut = len(cuts) > 0 and cuts[0] == 0 and cuts[-1] == total and bool((cuts[1:] >= cuts[:-1]).all())
        if not is_cut:
            raise RequestError(
                f"input {offsets.name!r}: got {shown(cuts)}, wanted offsets that ascend from 0 to {total}"
            )
        if len(cuts) > 1:
            self.check_bag(column, int(np.diff(cuts.astype(np.int64)).max()))
        return tensor.values, cuts.astype(np.int64)


def rows_of(raw: Any) -> int:
    """Return the rows of a column that `Columns.raw` made."""
    return len(raw[1]) - 1 if isinstance(raw, tuple) else len(raw)


def _check_datatype(column: Column, tensor: Tensor) -> None:
    fits = _is_int(tensor) if column.type == "int" else tensor.datatype == BYTES
    if not fits:
        wanted = "INT64" if column.type == "int" else BYTES
        raise RequestError(f"input {column.name!r}: got {tensor.datatype}, wanted {wanted}")


def _is_int(tensor: Tensor) -> bool:
    return tensor.values.dtype.kind in "iu"


def _numbers(tensor: Tensor) -> NDArray[Any]:
    if tensor.datatype in (BYTES, "BOOL"):
        raise RequestError(f"input {tensor.name!r}: got {tensor.datatype}, wanted FP64, or ints that it holds exactly")
    values = tensor.values
    if values.dtype.kind in "iu" and len(values) and (int(values.max()) > EXACT or int(values.min()) < -EXACT):
        raise RequestError(f"input {tensor.name!r}: got ints beyond 2^53, wanted FP64, or ints that it holds exactly")
    return values if values.dtype == np.float64 else values.astype(np.float64)


def _vectors(column: Column, tensor: Tensor) -> NDArray[np.float64]:
    values = np.ma.filled(_numbers(tensor), np.nan)
    if len(values) % column.size:
        wanted = f"a multiple of {column.size}, the size of a vector"
        raise RequestError(f"input {column.name!r}: got {len(values)} elements, wanted {wanted}")
    rows: NDArray[np.float64] = values.reshape(-1, column.size)
    return rows


def _masked(values: NDArray[Any], present: Tensor) -> NDArray[Any]:
    if present.datatype != "BOOL" or isinstance(present.values, np.ma.MaskedArray):
        raise RequestError(f"input {present.name!r}: got {present.datatype}, wanted BOOL without missing ones")
    if len(present.values) != len(values):
        raise RequestError(f"input {present.name!r}: got {len(present.values)} elements, wanted {len(values)}")
    if values.dtype.kind == "O":
        texts: NDArray[Any] = values.copy()
        texts[~present.values] = None
        return texts
    masked: NDArray[Any] = np.ma.array(values, mask=~present.values | np.ma.getmaskarray(values))
    return masked
