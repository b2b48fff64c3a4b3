"""Tensors of the Open Inference Protocol, in JSON and in the binary extension, to arrays and back.

Binary data is little-endian, row after row, without padding; an element of BYTES is its length as 4 bytes, then so many
bytes. In JSON, data is a flat list, and `null` a missing value of any datatype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lt4rec_sparse.errors import shown
from lt4rec_sparse.serve.settings import Limits, RequestError

DTYPES = {
    "BOOL": "?",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
BYTES = "BYTES"
KEYS = {"name", "shape", "datatype", "parameters", "data"}


class Tensor(NamedTuple):
    """One tensor: its datatype as the protocol spells it, and an array, masked where values are missing.

    BYTES are an object array of str, None where a value is missing.
    """

    name: str
    datatype: str
    values: NDArray[Any]


def header(entry: Any, most: Callable[[str], int]) -> tuple[str, str, int]:
    """Return name, datatype and length of an input, checked; nothing is made of that length yet.

    Raises:
        RequestError: If a key is unknown or of a wrong type, or the shape is not one dimension of at most `most(name)`.
    """
    if not isinstance(entry, dict):
        raise RequestError(f"inputs: got {shown(entry)}, wanted objects")
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    if not isinstance(name, str) or not name:
        raise RequestError(f"inputs: got name {shown(name)}, wanted text")
    stray = next((key for key in entry if key not in KEYS), None)
    if stray is not None:
        raise RequestError(f"input {shown(name)}: got key {shown(stray)}, wanted some of {', '.join(sorted(KEYS))}")
    if not isinstance(datatype, str) or datatype not in (*DTYPES, BYTES):
        raise RequestError(
            f"input {shown(name)}: got datatype {shown(datatype)}, wanted one of {', '.join(DTYPES)}, BYTES"
        )
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or shape[0] < 0:
        raise RequestError(f"input {shown(name)}: got shape {shown(shape)}, wanted one dimension of at least 0")
    if shape[0] > most(name):
        raise RequestError(f"input {shown(name)}: got {shape[0]} elements, wanted at most {most(name)}")
    return name, datatype, shape[0]


def binary_size(entry: Mapping[str, Any]) -> int | None:
    """Return how many bytes of an input come after the JSON; None if its data is in the JSON.

    Raises:
        RequestError: If there are other parameters, or data in both places.
    """
    name, parameters = entry["name"], entry.get("parameters", {})
    if not isinstance(parameters, dict) or not parameters.keys() <= {"binary_data_size"}:
        raise RequestError(f"input {shown(name)}: got parameters {shown(parameters)}, wanted binary_data_size alone")
    size = parameters.get("binary_data_size")
    if size is None:
        return None
    if type(size) is not int or size < 0:
        raise RequestError(f"input {shown(name)}: got binary_data_size {shown(size)}, wanted bytes of at least 0")
    if entry.get("data") is not None:
        raise RequestError(f"input {shown(name)}: got data beside binary_data_size, wanted one of the two")
    return size


def from_binary(name: str, datatype: str, length: int, data: memoryview, limits: Limits) -> Tensor:
    """Read the bytes of one input.

    Raises:
        RequestError: If there are too few or too many, or a text is no UTF-8 or too long.
    """
    if datatype == BYTES:
        return Tensor(name, datatype, _texts(name, length, data, limits))
    dtype = np.dtype(DTYPES[datatype])
    if len(data) != length * dtype.itemsize:
        raise RequestError(f"input {shown(name)}: got {len(data)} bytes, wanted {length * dtype.itemsize} for {length}")
    if datatype == "BOOL" and not {*bytes(data)} <= {0, 1}:
        raise RequestError(f"input {shown(name)}: got a byte that is neither 0 nor 1, wanted BOOL")
    return Tensor(name, datatype, np.frombuffer(data, dtype).copy())  # aligned, and the body's memory can go


def from_json(name: str, datatype: str, length: int, data: Any, limits: Limits) -> Tensor:
    """Read the `data` of one input.

    Raises:
        RequestError: If it is no flat list of `length` values of the datatype.
    """
    if not isinstance(data, list):
        raise RequestError(f"input {shown(name)}: got data {shown(data)}, wanted a list")
    if len(data) != length:
        raise RequestError(f"input {shown(name)}: got {len(data)} values in data, wanted {length}, its shape")
    kinds = {*map(type, data)}
    accepted: set[type] = {str} if datatype == BYTES else {bool} if datatype == "BOOL" else {int}
    accepted |= {float} if datatype.startswith("FP") else set()
    if not kinds <= accepted | {type(None)}:
        stray = next(value for value in data if type(value) not in accepted | {type(None)})
        raise RequestError(f"input {shown(name)}: got {shown(stray)} in data, wanted {datatype}")
    if datatype == BYTES:
        for text in data:
            if text is not None:
                check_text(f"input {shown(name)}", text, limits)
        values = np.empty(length, object)
        values[:] = data
        return Tensor(name, datatype, values)
    present = np.fromiter((value is not None for value in data), np.bool_, length) if type(None) in kinds else None
    numbers = data if present is None else [0 if value is None else value for value in data]
    values = _numbers(name, datatype, numbers)
    return Tensor(name, datatype, values if present is None else np.ma.array(values, mask=~present))


def to_binary(values: NDArray[Any]) -> bytes:
    """Return an output's numbers as bytes."""
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def check_text(where: str, text: str, limits: Limits) -> None:
    """Refuse a text that is too long, or that UTF-8 cannot spell."""
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(f"{where}: got {shown(text)}, wanted text that UTF-8 can spell") from None
    if size > limits.text_bytes:
        raise RequestError(f"{where}: got a text of {size} bytes, wanted at most {limits.text_bytes}")


def _numbers(name: str, datatype: str, data: list[Any]) -> NDArray[Any]:
    dtype = np.dtype(DTYPES[datatype])
    try:
        if dtype.kind == "f":
            values = np.array(data, np.float64)
            largest = np.finfo(dtype).max
            wrong = np.isfinite(values) & (np.abs(values) > largest)
            if wrong.any():
                raise OverflowError
            return values.astype(dtype)
        return np.array(data, dtype)
    except OverflowError:
        beyond = next(value for value in data if not _holds(dtype, value))
        raise RequestError(f"input {shown(name)}: got {shown(beyond)}, wanted {datatype}") from None


def _holds(dtype: np.dtype[Any], value: float) -> bool:
    """Tell whether a dtype has a number within its range, or as an infinity or NaN that it was before."""
    if dtype.kind != "f":
        return bool(np.iinfo(dtype).min <= value <= np.iinfo(dtype).max)
    try:
        number = float(value)
    except OverflowError:
        return False
    return not math.isfinite(number) or abs(number) <= float(np.finfo(dtype).max)


def _texts(name: str, length: int, data: memoryview, limits: Limits) -> NDArray[Any]:
    values, at, end, most = np.empty(length, object), 0, len(data), limits.text_bytes
    if length * 4 > end:
        raise RequestError(f"input {shown(name)}: got {end} bytes, wanted at least {length * 4} for {length} texts")
    raw = bytes(data)
    for i in range(length):
        start = at + 4
        size = int.from_bytes(raw[at:start], "little")
        at = start + size
        if size > most:
            raise RequestError(f"input {shown(name)}: got a text of {size} bytes at {i}, wanted at most {most}")
        if at > end or start > end:
            raise RequestError(f"input {shown(name)}: got {end} bytes, wanted more: text {i} ends beyond them")
        try:
            values[i] = raw[start:at].decode()
        except UnicodeDecodeError:
            raise RequestError(f"input {shown(name)}: got bytes that are no UTF-8 at {i}, wanted text") from None
    if at != end:
        raise RequestError(f"input {shown(name)}: got {end} bytes, wanted {at}, where its {length} texts end")
    return values
