"""Malformed files: one change or a few of a good one, most with right checksums, so that more than these is tested.

A mutant has a number, from which it follows alone: a failure is made again by its number.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

OF_TORCH = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "C64": "complex64",
    "U64": "uint64",
}
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}
SIZES |= {"F8_E4M3": 1, "C64": 8, "U64": 8}
SPECIAL = {  # as numbers that are right, extreme or none
    "F32": [struct.pack("<f", x) for x in (0.0, -0.0, 1.0, -3.5, 1e-40, 3e38, -3e38, float("inf"), float("nan"))],
    "F64": [struct.pack("<d", x) for x in (0.0, -1.0, 2.5, 1e300, float("inf"), float("-inf"), float("nan"))],
    "F16": [bytes([0, 0]), bytes([0, 0x3C]), bytes([0xFF, 0x7B]), bytes([0, 0x7C]), bytes([1, 0x7E])],
    "BF16": [bytes([0, 0]), bytes([0x80, 0x3F]), bytes([0x7F, 0x7F]), bytes([0x80, 0x7F]), bytes([0xC0, 0x7F])],
    "I32": [struct.pack("<i", x) for x in (0, 1, -1, 7, 2**31 - 1, -(2**31))],
    "I64": [struct.pack("<q", x) for x in (0, 1, -1, 7, 2**31, 2**63 - 1, -(2**63))],
}
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 4, 16, 2**31 - 1, 2**31, 2**63, 2**70, -(2**70), 10**400),
    *(0.0, 0.5, -1.0, 1e308, float("inf"), float("nan"), 127.5),
    *("", "a", "x", "relu", "none", "elu", "leaky_relu", "multi", "dense", "hash", "int", "string", "x\ny", "\ud800"),
    *("vector", "standardised", "log", "attention", "seen"),
    *("a" * 10_000, "ä", "__class__", "item", "click", "encoder.item.keys"),
    *([], {}, [[]], [None], {"a": {}}, [1, 2, 3], [16, 4], [1, 1], ["click"], [[1.0, 0]], {"x": 1}),
]


class Tensor(NamedTuple):
    dtype: str  # as safetensors spells it
    shape: list[int]
    data: bytes


class File(NamedTuple):
    """A checked file, taken apart."""

    key: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor]


def taken_apart(content: bytes, key: str) -> File:
    """Read a good file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    meta = json.loads(header.pop("__metadata__")[key])
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = Tensor(entry["dtype"], entry["shape"], content[8 + length + begin : 8 + length + end])
    return File(key, {k: v for k, v in meta.items() if k not in ("sha256", "digests")}, tensors)


def put_together(file: File, change: Callable[[dict[str, Any]], None] | None = None) -> bytes:
    """Write a file with right checksums, whatever is in it; `change` may spoil the header after them."""
    parts = {name: _part(name, tensor) for name, tensor in file.tensors.items()}
    described = {**file.meta, "digests": {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}}
    whole = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(parts):
        whole.update(parts[name])
    header: dict[str, Any] = {"__metadata__": {file.key: json.dumps({**described, "sha256": whole.hexdigest()})}}
    begin = 0
    for name, tensor in file.tensors.items():
        end = begin + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    if change is not None:
        change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(tensor.data for tensor in file.tensors.values())


def mutant(rng: random.Random, bases: list[File]) -> bytes:
    """Return the bytes of a mutant of one of the files."""
    base = rng.choice(bases)
    file = File(base.key, copy.deepcopy(base.meta), dict(base.tensors))
    kind = rng.random()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if kind < 0.4 and file.meta:
            change_json(rng, file.meta)
        elif kind < 0.65 and file.tensors:
            change_number(rng, file.tensors)
        elif kind < 0.8 and file.tensors:
            change_tensor(rng, file.tensors)
    if kind >= 0.9:
        return change_bytes(rng, put_together(file))
    return put_together(file, (lambda header: change_json(rng, header)) if kind >= 0.8 else None)


def change_json(rng: random.Random, content: Any) -> None:
    """Change one entry of parsed JSON: replace, delete, repeat, move or rename it."""
    places = list(_places(content))
    if not places:
        return
    parent, last = rng.choice(places)
    kind = rng.randrange(6)
    if kind <= 1:
        parent[last] = copy.deepcopy(rng.choice(ODD))
    elif kind == 2:
        old = parent[last]
        is_number = isinstance(old, int | float) and abs(old) < 2**60
        parent[last] = old + rng.choice((-1, 1, 0.5)) if is_number else copy.deepcopy(rng.choice(ODD))
    elif kind == 3:
        del parent[last]
    elif isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[last]))
    else:
        other = rng.choice(["x", *parent])
        if kind == 4:
            parent[other] = copy.deepcopy(parent[last])
        else:
            parent[other] = parent.pop(last)


def change_number(rng: random.Random, tensors: dict[str, Tensor]) -> None:
    """Change a number of a tensor: a bit of it, or all."""
    name = rng.choice(list(tensors))
    dtype, shape, data = tensors[name]
    if not data:
        return
    changed, size = bytearray(data), SIZES.get(dtype, 1)
    if rng.random() < 0.5 and dtype in SPECIAL:
        at = rng.randrange(len(data) // size) * size
        changed[at : at + size] = rng.choice(SPECIAL[dtype])
    elif rng.random() < 0.5:
        changed[rng.randrange(len(data))] = rng.choice((0, 1, 127, 128, 129, 255))
    else:
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    tensors[name] = Tensor(dtype, shape, bytes(changed))


def change_tensor(rng: random.Random, tensors: dict[str, Tensor]) -> None:
    """Change what a tensor is: its name, its dtype, its shape, with or without the bytes that belong to it."""
    name = rng.choice(list(tensors))
    dtype, shape, data = tensors.pop(name)
    kind = rng.randrange(7)
    if kind == 0:
        return
    if kind == 1:
        name = rng.choice(["x", *tensors])
    elif kind == 2:
        dtype = rng.choice([d for d, size in SIZES.items() if size == SIZES[dtype]])
    elif kind == 3:
        dtype = rng.choice(list(OF_TORCH))
        data = _as_long(data, dtype, shape)
    elif kind == 4:
        shape = rng.choice([[_count(shape)], [1, *shape], shape[::-1], [*shape, 1]])
    elif kind == 5 and shape:
        place, less = rng.randrange(len(shape)), rng.choice((-1, 1, -shape[0]))
        shape = [max(0, side + less) if i == place else side for i, side in enumerate(shape)]
        data = _as_long(data, dtype, shape)
    elif kind == 6 and tensors:
        other = rng.choice(list(tensors))
        tensors[name], (dtype, shape, data), name = tensors[other], (dtype, shape, data), other
    tensors[name] = Tensor(dtype, shape, data)


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    """Change bytes of a file, with no regard to what they are."""
    changed, kind, at = bytearray(content), rng.randrange(6), rng.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        changed[at : at + rng.choice((1, 8, 64))] = bytes(rng.choice((1, 8, 64)))
    elif kind == 3:
        del changed[at : at + rng.choice((1, 8, 64))]
    elif kind == 4:
        changed[:8] = struct.pack("<Q", rng.choice((0, 1, 7, at, len(content), 2**24, 2**24 + 1, 2**62, 2**64 - 1)))
    else:
        changed += content[at:]
    return bytes(changed)


def _part(name: str, tensor: Tensor) -> bytes:
    return f"{name} torch.{OF_TORCH[tensor.dtype]} {list(tensor.shape)}".encode() + tensor.data


def _as_long(data: bytes, dtype: str, shape: list[int]) -> bytes:
    """Cut or fill up bytes to what a tensor takes, unless that is more than any small file has."""
    length = _count(shape) * SIZES[dtype]
    return data[:length].ljust(length, b"\0") if length < 1 << 16 else data


def _count(shape: list[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield where every entry of parsed JSON is: what holds it, and its key."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, item in items:
        yield content, key
        yield from _places(item)
