"""A request in the Open Inference Protocol, version 2, and its response; see `columns` for the inputs.

Outputs: one FP32 per task, `rank_score` (FP64) and `row` (INT64). They are in the order of the candidates; with the
parameter `k` they are of the k best, best first, and `row` says which candidates they are. The parameter `by.<name>` is
the exponent of a task or of a column of numbers in the rank score; without any, it is the product of all tasks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lt4rec_sparse.errors import shown
from lt4rec_sparse.ranker.ranking import Ranking
from lt4rec_sparse.serve import body, tensors
from lt4rec_sparse.serve.columns import Columns, rows_of
from lt4rec_sparse.serve.requests import Request, check_exponents, split
from lt4rec_sparse.serve.settings import RequestError

RANK_SCORE, ROW = "rank_score", "row"
KEYS = {"id", "inputs", "outputs", "parameters", "model_name"}
HEADER_LENGTH = "Inference-Header-Content-Length"


class Output(NamedTuple):
    """An output that is asked for, and whether its data comes as bytes."""

    name: str
    is_binary: bool


class Infer(NamedTuple):
    """A request with what its response needs."""

    id: str
    request: Request
    outputs: tuple[Output, ...]


def outputs(tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Return name, datatype and shape of every output, as the protocol lists them."""
    datatypes = {**dict.fromkeys(tasks, "FP32"), RANK_SCORE: "FP64", ROW: "INT64"}
    return [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in datatypes.items()]


def read(data: bytes, header_length: str | None, columns: Columns, tasks: Sequence[str], name: str) -> Infer:
    """Read a request.

    Args:
        data: The body: JSON, then the bytes of binary inputs.
        header_length: The header `Inference-Header-Content-Length`: how much of it is JSON; None for all.
        columns: The model's.
        tasks: The model's.
        name: The model's.

    Raises:
        RequestError: If it is malformed; the message names the field.
    """
    end = _header_length(header_length, len(data))
    if end > columns.limits.json_bytes:
        raise RequestError(f"body: got {end} bytes of JSON, wanted at most {columns.limits.json_bytes}", 413)
    content = body.parse(data[:end], columns.limits.depth)
    stray = next((key for key in content if key not in KEYS), None)
    if stray is not None:
        raise RequestError(f"{shown(stray)}: got an unknown key, wanted some of {', '.join(sorted(KEYS))}")
    identity = content.get("id", "")
    if not isinstance(identity, str):
        raise RequestError(f"id: got {shown(identity)}, wanted text")
    if content.get("model_name") not in (None, name):  # KServe's client has it beside the path
        raise RequestError(f"model_name: got {shown(content['model_name'])}, wanted {name!r}")
    tensors.check_text("id", identity, columns.limits)
    parameters = _table(content.get("parameters", {}), "parameters")
    k, by = _ranking(parameters)
    check_exponents(by, columns.limits)
    found = _inputs(content.get("inputs"), memoryview(data)[end:], columns)
    raw = columns.raw(found, {name for name in by if name not in tasks})
    lengths = {name: rows_of(values) for name, values in raw.items()}
    rows = columns.check_rows(lengths)
    request = Request(*split(raw, lengths), rows, k, by or None)
    is_binary = parameters.get("binary_data_output", False)
    if not isinstance(is_binary, bool):
        raise RequestError(f"parameters: got binary_data_output {shown(is_binary)}, wanted true or false")
    return Infer(identity, request, _outputs(content.get("outputs"), is_binary, tasks))


def write(asked: Infer, ranking: Ranking, name: str, version: str) -> tuple[bytes, int | None]:
    """Return the response's body, and how much of it is JSON where bytes follow."""
    values = _values(asked.request, ranking)
    listed, parts = [], []
    for output in asked.outputs:
        of_output = values[output.name]
        datatype = {"f4": "FP32", "f8": "FP64", "i8": "INT64"}[of_output.dtype.str[1:]]
        entry: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": [len(of_output)]}
        if output.is_binary:
            parts.append(tensors.to_binary(of_output))
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = of_output.tolist()
        listed.append(entry)
    content: dict[str, Any] = {"model_name": name, "model_version": version, "outputs": listed}
    if asked.id:
        content["id"] = asked.id
    text = json.dumps(content, allow_nan=False).encode()
    return b"".join([text, *parts]), len(text) if parts else None


def _values(request: Request, ranking: Ranking) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {**ranking.scores, RANK_SCORE: ranking.rank_scores, ROW: ranking.rows}
    if request.k is not None:
        return found
    place = np.argsort(ranking.rows)  # of each candidate among the ranked ones
    return {name: values[place] for name, values in found.items()}


def _header_length(given: str | None, total: int) -> int:
    if given is None:
        return total
    if not (given.isascii() and given.isdecimal() and len(given) < 20):
        raise RequestError(f"{HEADER_LENGTH}: got {shown(given)}, wanted a number of bytes")
    if int(given) > total:
        raise RequestError(f"{HEADER_LENGTH}: got {int(given)} bytes, wanted at most {total}, the length of the body")
    return int(given)


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{where}: got {shown(value)}, wanted an object")
    return value


def _ranking(parameters: dict[str, Any]) -> tuple[int | None, dict[str, float]]:
    by = {}
    for name, value in parameters.items():
        if name.startswith("by."):
            by[name.removeprefix("by.")] = value
        elif name not in ("k", "binary_data_output"):
            raise RequestError(f"parameters: got {shown(name)}, wanted k, by.<task or column> or binary_data_output")
    return parameters.get("k"), by


def _inputs(entries: Any, binary: memoryview, columns: Columns) -> dict[str, tensors.Tensor]:
    if not isinstance(entries, list) or not entries:
        raise RequestError(f"inputs: got {shown(entries)}, wanted a list of at least one input")
    found: dict[str, tensors.Tensor] = {}
    at = 0
    for entry in entries:
        name, datatype, length = tensors.header(entry, columns.most)
        if name in found:
            raise RequestError(f"input {shown(name)}: got it twice, wanted it once")
        size = tensors.binary_size(entry)
        if size is None:
            found[name] = tensors.from_json(name, datatype, length, entry.get("data"), columns.limits)
            continue
        if size > len(binary) - at:
            raise RequestError(f"input {shown(name)}: got binary_data_size {size}, wanted at most {len(binary) - at}")
        found[name] = tensors.from_binary(name, datatype, length, binary[at : at + size], columns.limits)
        at += size
    if at != len(binary):
        raise RequestError(f"body: got {len(binary)} bytes after its JSON, wanted {at}, the sum of binary_data_size")
    return found


def _outputs(entries: Any, is_binary: bool, tasks: Sequence[str]) -> tuple[Output, ...]:
    known = (*tasks, RANK_SCORE, ROW)
    if entries is None or entries == []:
        return tuple(Output(name, is_binary) for name in known)
    if not isinstance(entries, list):
        raise RequestError(f"outputs: got {shown(entries)}, wanted a list")
    wanted: dict[str, Output] = {}
    for entry in entries:
        name = _table(entry, "outputs").get("name")
        if not isinstance(name, str) or name not in known:
            raise RequestError(f"outputs: got {shown(name)}, wanted some of {', '.join(known)}")
        parameters = _table(entry.get("parameters", {}), f"output {name!r}: parameters")
        if name in wanted or not entry.keys() <= {"name", "parameters"} or not parameters.keys() <= {"binary_data"}:
            raise RequestError(f"output {name!r}: got {shown(entry)}, wanted it once, with binary_data at most")
        binary = parameters.get("binary_data", is_binary)
        if not isinstance(binary, bool):
            raise RequestError(f"output {name!r}: got binary_data {shown(binary)}, wanted true or false")
        wanted[name] = Output(name, binary)
    return tuple(wanted.values())
