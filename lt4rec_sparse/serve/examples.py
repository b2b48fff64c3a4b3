"""Requests to show and to warm up with: from a file, or made from what the encoder knows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.ranker.features import FeatureEncoder
from lt4rec_sparse.ranker.features.schema import Column
from lt4rec_sparse.serve import body, plain
from lt4rec_sparse.serve.columns import Columns

FREQUENT = 1_000  # values of a vocabulary to draw from; it begins with the most frequent ones
BAG = 4  # values of a made bag, at most
MOST_LOG = 80.0  # whose exponential float32 holds


def from_file(path: str | Path, columns: Columns) -> list[dict[str, Any]]:
    """Return the requests of a JSON file, `{"requests": [{"name": ..., "context": ..., "candidates": ...}, ...]}`.

    Raises:
        InputError: If the file is no such JSON, or one of them is no request of this model.
        OSError: If it cannot be read.
    """
    content = body.parse(Path(path).read_bytes(), columns.limits.depth + 2)
    requests = content.get("requests")
    if not isinstance(requests, list) or not requests or not all(isinstance(item, dict) for item in requests):
        raise InputError(f"{path}: got requests {shown(requests)}, wanted a list of at least one request")
    for i, item in enumerate(requests):
        if not isinstance(item.get("name"), str):
            raise InputError(f"{path}: request {i}: got name {shown(item.get('name'))}, wanted text")
        try:
            plain.read(item, columns)
        except InputError as error:
            raise InputError(f"{path}: request {shown(item['name'])}: {error}") from error
    return requests


def made(encoder: FeatureEncoder, requests: int, rows: int) -> list[dict[str, Any]]:
    """Return requests of values that training saw, always the same ones.

    What the schema says candidates have in common is in `context`.
    """
    arrays, _ = encoder.to_arrays()
    draws = {column.name: _draw(column, arrays) for column in encoder.schema.features}
    in_common = encoder.schema.in_common & draws.keys()
    if len(in_common) == len(draws):
        in_common = frozenset()  # candidates need a column
    listed = []
    for i in range(requests):
        chance = random.Random(i)
        context = {name: draw(chance) for name, draw in draws.items() if name in in_common}
        row = {name: draw for name, draw in draws.items() if name not in in_common}
        candidates = [{name: draw(chance) for name, draw in row.items()} for _ in range(rows)]
        listed.append({"name": f"request {i + 1}", "context": context, "candidates": candidates})
    return listed


def _draw(column: Column, arrays: Mapping[str, Any]) -> Callable[[random.Random], Any]:
    """Return what draws a value of a column."""
    if column.is_number:
        return _draw_numbers(column, arrays)
    one = _draw_one(column, arrays)
    if column.kind != "multi":
        return one
    return lambda chance: [one(chance) for _ in range(chance.randrange(BAG + 1))]


def _draw_numbers(column: Column, arrays: Mapping[str, Any]) -> Callable[[random.Random], Any]:
    """Return what draws a number or a vector about as far from the mean as those of training."""
    mean, std = (arrays[f"{column.name}.{part}"].tolist() for part in ("mean", "std"))

    def draw(chance: random.Random) -> Any:
        drawn = [m + s * chance.uniform(-1, 1) for m, s in zip(mean, std, strict=True)]
        if column.encoding == "log":
            drawn = [math.copysign(math.expm1(min(abs(z), MOST_LOG)), z) for z in drawn]
        return drawn if column.kind == "vector" else drawn[0]

    return draw


def _draw_one(column: Column, arrays: Mapping[str, Any]) -> Callable[[random.Random], Any]:
    def part(name: str) -> Any:
        return arrays[f"{column.table}.{name}"]

    if column.kind == "dense":
        cuts = part("cuts").tolist()
        finite = [cut for cut in cuts if abs(cut) < float("inf")]
        return lambda chance: chance.choice(finite) if finite else 0.0
    if column.encoding == "hash":
        return lambda chance: (
            chance.randrange(FREQUENT) if column.type == "int" else f"value {chance.randrange(FREQUENT)}"
        )
    if column.type == "int":
        keys = part("keys")[:FREQUENT].tolist()
        return lambda chance: chance.choice(keys) if keys else 0
    offsets = part("offsets")[: FREQUENT + 1].tolist()
    texts = [
        part("bytes")[first:last].tobytes().decode("utf-8", "replace")
        for first, last in zip(offsets[:-1], offsets[1:], strict=True)
    ]
    return lambda chance: chance.choice(texts) if texts else ""
