"""Malformed requests by the thousand: `python -m tests.serve.hostile COUNT [SEED]`.

Each is a good request of one of two spellings, changed in one to three places, in its JSON, its tensors or its bytes.
The answer is the scores or an error of the 4xx, in one line, that says what was got and what was wanted; never a 5xx,
and never an exception. Every so often the good request is sent again: its answer has not changed by a bit.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from serve.models import as_binary, plain_request, settings, tensors

from lt4rec_sparse.serve.app import create_app
from lt4rec_sparse.serve.oip import HEADER_LENGTH
from lt4rec_sparse.serve.service import Service

JUNK: tuple[Callable[[random.Random], Any], ...] = (
    lambda chance: None,
    lambda chance: chance.choice([True, False]),
    lambda chance: chance.choice([-1, 0, 1, 2, 5, 6, 301, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**400]),
    lambda chance: chance.choice([0.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 5e-324]),
    lambda chance: chance.choice(
        ["", "x", "item", "ctr", "é" * 40, "\ud800", "a|b", "3,4", "1" * 70, "NaN", "\0", "-"]
    ),
    lambda chance: chance.choice(
        [[], [[]], [1, "x", None], [None], [[1, 2], [3, 4]], [{}], ["a"], [1] * 22, [5], [5, 1]]
    ),
    lambda chance: chance.choice([{}, {"name": "item"}, {"binary_data_size": 8}, {"k": 2}, {"x": {"y": {"z": [1]}}}]),
    lambda chance: _nested(chance.choice([3, 9, 40])),
    lambda chance: chance.getrandbits(chance.choice([8, 32, 64, 70])),
)
DATATYPES = ("BOOL", "INT8", "INT64", "UINT8", "UINT64", "FP16", "FP32", "FP64", "BYTES", "BF16", "int64", "")
NAMES = (
    "item",
    "age",
    "length",
    "tags",
    "tags.offsets",
    "seller",
    "similar",
    "similar.offsets",
    "item.present",
    "price",
)


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every part of a JSON value but the whole."""
    found = [] if not path else [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += _places(part, (*path, key))
    return found


def _change_json(content: Any, chance: random.Random) -> None:
    """Replace, remove, repeat or rename a part."""
    places = _places(content)
    if not places:
        return
    # A short path is as likely as a long one: most parts are values of some list.
    depth = chance.choice(sorted({len(place) for place in places}))
    *path, key = chance.choice([place for place in places if len(place) == depth])
    parent = content
    for step in path:
        parent = parent[step]
    action = chance.randrange(6)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, list):
        parent.insert(chance.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
    elif action == 2 and isinstance(parent, dict):
        parent[chance.choice([*NAMES, "data", "shape", "name", "k", "by", "\ud800"])] = parent.pop(key)
    else:
        parent[key] = chance.choice(JUNK)(chance)


def _change_tensor(content: Any, chance: random.Random) -> None:
    """Give an input another name, shape, datatype or size."""
    entries = content.get("inputs") if isinstance(content, dict) else None
    entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    if not entries:
        return
    entry = chance.choice(entries)
    action = chance.randrange(4)
    if action == 0:
        entry["datatype"] = chance.choice(DATATYPES)
    elif action == 1:
        entry["shape"] = [chance.choice([-1, 0, 1, 4, 5, 6, 300, 1 << 20, 1 << 62, 10**30])] * chance.choice(
            [0, 1, 1, 1, 2]
        )
    elif action == 2:
        entry["name"] = chance.choice(NAMES)
    else:
        entry["parameters"] = {"binary_data_size": chance.choice([-1, 0, 1, 4, 8, 40, 41, 1 << 40, 1.5, "8", None])}


def _change_bytes(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    action = chance.randrange(5)
    if action == 0:
        return data[:at]
    if action == 1:
        return data + chance.randbytes(chance.choice([1, 4, 64]))
    if action == 2:
        return (
            data[:at]
            + chance.choice([b"\xff", b"\0", b'"', b"[" * 20, b"{", b"}", b",", b"\\ud800", b"9" * 5000])
            + data[at:]
        )
    if action == 3:
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    return chance.randbytes(chance.choice([0, 1, 10, 1000]))


def malformed(seed: int) -> tuple[str, dict[str, str], bytes]:
    """Return path, headers and body of a request."""
    chance = random.Random(seed)
    headers: dict[str, str] = {}
    binary = b""
    if chance.randrange(3) == 0:
        path, content = "/rank", copy.deepcopy(plain_request(k=3, by={"ctr": 1.0}))
        if chance.randrange(2):
            columns = content["candidates"]
            content["candidates"] = [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
    else:
        path, content = (
            "/v2/models/shop/infer",
            {"inputs": copy.deepcopy(tensors()), "parameters": {"k": 3, "by.ctr": 1.0}},
        )
        content["outputs"] = [{"name": "ctr", "parameters": {"binary_data": True}}, {"name": "row"}]
        if chance.randrange(2):
            content["inputs"], binary = as_binary(content["inputs"])
    is_binary = bool(binary)
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        chance.choice([_change_json, _change_tensor])(content, chance)
    text = json.dumps(content).encode()
    if is_binary:
        headers[HEADER_LENGTH] = str(len(text))
        if chance.randrange(3) == 0:
            binary = _change_bytes(binary, chance)
        if chance.randrange(6) == 0:
            headers[HEADER_LENGTH] = chance.choice(
                ["-1", "0", "x", str(len(text) - 1), str(len(text) + 9), "9" * 25, "\u0661"]
            )
    body = text + binary
    if chance.randrange(4) == 0:
        body = _change_bytes(body, chance)
    return path, headers, body


class Target:
    """An application that is called directly: no socket and no client in between."""

    def __init__(self, folder: Path) -> None:
        self.service = Service(settings(folder))
        self.service.load()
        self._app = create_app(self.service)
        self._loop = asyncio.new_event_loop()

    def answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        """Return status and body."""
        return self._loop.run_until_complete(self._answer(path, headers, body))

    async def _answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        listed = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": listed,
            "query_string": b"",
            "root_path": "",
        }
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

    def close(self) -> None:
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        self.service.pool.shutdown()


def check(target: Target, seed: int) -> int:
    """Send one malformed request; return the status, or raise what is wrong with the answer."""
    path, headers, body = malformed(seed)
    status, answer = target.answer(path, headers, body)
    if status == 200:
        return status
    assert 400 <= status < 500, (seed, status, answer)
    content = json.loads(answer)
    assert content.keys() == {"error"}, (seed, content)
    message = content["error"]
    assert "got" in message and "wanted" in message and ":" in message and "\n" not in message, (seed, message)
    return status


def run(target: Target, seeds: range) -> Counter[int]:
    """Send many; return how often each status came."""
    good = json.dumps({"inputs": tensors()}).encode()
    wanted = target.answer("/v2/models/shop/infer", {}, good)
    assert wanted[0] == 200
    statuses: Counter[int] = Counter()
    for seed in seeds:
        statuses[check(target, seed)] += 1
        if seed % 100 == 0:
            assert target.answer("/v2/models/shop/infer", {}, good) == wanted, seed
    return statuses


if __name__ == "__main__":
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder))
        print(run(target, range(first, first + count)))  # noqa: T201
        target.close()
