"""What loading takes: seconds, and memory at its peak, of artefacts large enough to be told from the rest."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lt4rec_sparse import MaskedMLP, Ranker, SparseMLP, freeze, load, save
from lt4rec_sparse.formats import BlockWeight, SharedWeight
from lt4rec_sparse.ranker.features import FeatureEncoder, Schema
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings

# name -> rows and width of the embeddings, how they are held, width of two hidden layers, format
CASES: dict[str, tuple[int, int, str, int, type[SharedWeight | BlockWeight]]] = {
    "1,000,000 x 64 embeddings, fp32": (1_000_000, 64, "fp32", 16, SharedWeight),
    "1,000,000 x 64 embeddings, fp16": (1_000_000, 64, "fp16", 16, SharedWeight),
    "1,000,000 x 64 embeddings, int8": (1_000_000, 64, "int8", 16, SharedWeight),
    "two layers of 8,192 single weights": (10, 64, "fp32", 8192, SharedWeight),
    "two layers of 8,192 in blocks": (10, 64, "fp32", 8192, BlockWeight),
}


def run(rows_share: float = 1.0) -> dict[str, Any]:
    """Return for every case the file's bytes, the seconds to load it, and how much its process grew meanwhile.

    Each is loaded in a process of its own, whose peak of resident memory counts, mapped pages of the file among it.
    `rows_share` below 1 makes smaller cases.
    """
    found = {}
    for name, (rows, dim, kind, width, weight) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            save(_ranker(round(rows * rows_share) + 3, dim, round(width * rows_share**0.5) + 16, weight), path, kind)
            command = [sys.executable, "-m", "tests.promises.memory", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name] = {"file_bytes": path.stat().st_size, **json.loads(done.stdout)}
    return found


def _ranker(rows: int, dim: int, width: int, kind: type[SharedWeight | BlockWeight]) -> Ranker:
    schema = Schema.from_dict(
        {
            "name": "shop",
            "files": {"log": ["*.csv"]},
            "time": {"day": "date"},
            "group": {"column": "user"},
            "columns": [{"name": "item", "type": "int"}],
            "tasks": [{"name": task, "kind": "binary", "label": task} for task in ("click", "buy")],
        }
    )
    encoder = FeatureEncoder.fit(schema, [{"item": torch.arange(rows).numpy()}])
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, dim)
    network = freeze(MaskedMLP(dim, (width, width), tasks=("click", "buy")), sigmoid=True).network
    layers = []
    for layer in network.hidden:
        out, width = layer.weight.shape
        high, wide = kind.BLOCK
        masks = {
            task: kind._spread(torch.rand(-(-out // high), -(-width // wide)) < 0.1, (out, width))
            for task in network.tasks
        }
        layers.append(layer._replace(weight=kind.from_dense(torch.randn(out, width), masks)))
    return Ranker(encoder, inputs, SparseMLP(replace(network, hidden=tuple(layers))))


def _resident_bytes(what: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    load(Path(__file__).parents[1] / "ranker" / "artefact_v1.safetensors")  # imports are not what is measured
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, started = _resident_bytes("VmRSS"), time.perf_counter()
    loaded = load(sys.argv[1])
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": round(seconds, 3), "peak_bytes": _resident_bytes("VmHWM") - before}))
