"""A small ranker with every kind of column, requests to it in both spellings, and a client in the same process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from lt4rec_sparse import MaskedMLP, Ranker, freeze, save
from lt4rec_sparse.ranker.features import FeatureEncoder, Schema
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.serve.app import create_app
from lt4rec_sparse.serve.service import Service
from lt4rec_sparse.serve.settings import Limits, Settings

SCHEMA = {
    "name": "shop",
    "context": ["age"],
    "files": {"log": ["log.csv"]},
    "time": {"day": "date"},
    "group": {"column": "user", "type": "int"},
    "columns": [
        {"name": "item", "type": "int"},
        {"name": "age"},
        {"name": "length", "kind": "dense"},
        {"name": "tags", "kind": "multi", "separator": "|"},
        {"name": "seller", "type": "int", "encoding": "hash", "size": 16},
        {"name": "similar", "kind": "multi", "type": "int", "table": "item"},
    ],
    "tasks": [
        {"name": "ctr", "kind": "binary", "label": "is_click"},
        {"name": "cvr", "kind": "binary", "label": "is_buy"},
    ],
}
CONTEXT = {"age": "30-40", "similar": [3, 4, 3]}
CANDIDATES = {
    "item": [5, 2, None, 77, 1],
    "length": [60.0, 5.0, 12.5, None, 600.0],
    "tags": [["a", "b"], [], None, ["b"], ["z", "a"]],
    "seller": [1, 2, 3, None, 2**60 + 1],
}
LIMITS = Limits(body_bytes=1 << 20, rows=300, bag_values=20, text_bytes=64, body_seconds=5.0)


def small_ranker(seed: int = 0, is_calibrated: bool = True) -> Ranker:
    rows = {
        "item": [0, 1, 2, 3, 4, 5],
        "age": ["20-30", "30-40", "é"] * 2,
        "length": [1.0, 10.0, 30.0, 60.0, 300.0, 900.0],
        "tags": [["a"], ["b"], ["c"], [], ["a", "c"], []],
        "seller": [1, 2, 3, 4, 5, 6],
        "similar": [[1], [2], [], [3], [4], [5]],
    }
    encoder = FeatureEncoder.fit(Schema.from_dict(SCHEMA), [rows])
    torch.manual_seed(seed)
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, dim=4, std=1.0)
    mlp = MaskedMLP(inputs.out_features, (32, 16), tasks=("ctr", "cvr"))
    x = inputs(encoder.encode(rows)).detach()
    frozen = freeze(mlp, sigmoid=True)
    return Ranker(encoder, inputs, frozen.calibrated(x) if is_calibrated else frozen)


def settings(folder: Path, **options: Any) -> Settings:
    path = folder / "model.safetensors"
    if not path.exists():
        save(small_ranker(), path)
    return Settings(**{"artefact": str(path), "access_log": False, "limits": LIMITS, "drain_seconds": 0.2} | options)


def raw_columns() -> dict[str, Any]:
    """The request below, as `Ranker.score` takes it."""
    return CANDIDATES | {name: [value] for name, value in CONTEXT.items()}


def plain_request(**options: Any) -> dict[str, Any]:
    return {"context": CONTEXT, "candidates": CANDIDATES, **options}


def tensors() -> list[dict[str, Any]]:
    """The same request as tensors whose data are lists."""
    flat = [value for bag in CANDIDATES["tags"] for value in bag or []]
    offsets = np.cumsum([0, *(len(bag or []) for bag in CANDIDATES["tags"])]).tolist()
    return [
        {"name": "item", "datatype": "INT64", "shape": [5], "data": CANDIDATES["item"]},
        {"name": "length", "datatype": "FP64", "shape": [5], "data": CANDIDATES["length"]},
        {"name": "tags", "datatype": "BYTES", "shape": [len(flat)], "data": flat},
        {"name": "tags.offsets", "datatype": "INT64", "shape": [6], "data": offsets},
        {"name": "seller", "datatype": "INT64", "shape": [5], "data": CANDIDATES["seller"]},
        {"name": "age", "datatype": "BYTES", "shape": [1], "data": ["30-40"]},
        {"name": "similar", "datatype": "INT64", "shape": [3], "data": [3, 4, 3]},
        {"name": "similar.offsets", "datatype": "INT64", "shape": [2], "data": [0, 3]},
    ]


def as_binary(entries: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bytes]:
    """Return inputs whose data comes as bytes after the JSON, and these bytes; missing ones are told apart."""
    listed, parts = [], []
    for entry in entries:
        data = entry["data"]
        present = [value is not None for value in data]
        if entry["datatype"] == "BYTES":
            texts = [(value or "").encode() for value in data]
            part = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
        else:
            dtype = {"INT64": "<i8", "FP64": "<f8", "BOOL": "?"}[entry["datatype"]]
            part = np.array([value or 0 for value in data], dtype).tobytes()
        listed.append({k: v for k, v in entry.items() if k != "data"} | {"parameters": {"binary_data_size": len(part)}})
        parts.append(part)
        if not all(present):
            beside = {"name": f"{entry['name']}.present", "datatype": "BOOL", "shape": [len(data)]}
            listed.append(beside | {"parameters": {"binary_data_size": len(data)}})
            parts.append(bytes(present))
    return listed, b"".join(parts)


class Client:
    """Requests to a service's application, without a socket."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._loop = asyncio.new_event_loop()
        transport = httpx.ASGITransport(create_app(service))  # an error of the application's own is raised here
        self._client = httpx.AsyncClient(transport=transport, base_url="http://test")

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.wait(self.request(method, path, **options))

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return await self._client.request(method, path, **options)

    def wait(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.send("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.send("POST", path, **options)

    def infer(self, content: dict[str, Any], binary: bytes | None = None) -> httpx.Response:
        text = json.dumps(content).encode()
        headers = {} if binary is None else {"Inference-Header-Content-Length": str(len(text))}
        return self.post("/v2/models/shop/infer", content=text + (binary or b""), headers=headers)

    def close(self) -> None:
        self._loop.run_until_complete(self._client.aclose())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        self.service.pool.shutdown()
