"""What rounded embeddings cost: metrics and bytes of a run's artefact, and the time of a request and of lookups.

Metrics are of the test days, of the scores that are served. A request is `Ranker.score_encoded`: lookups, their cross
and the MLP, without encoding. Lookups in a table of a million rows are timed alone: such a table is in no cache.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from bench import record
from lt4rec_sparse.ranker import Ranker, load, save
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.ranker.rows import EMBEDDINGS
from lt4rec_sparse.recsys.data import Prepared
from lt4rec_sparse.recsys.metrics import MAIN_METRIC
from lt4rec_sparse.recsys.training import evaluate
from lt4rec_sparse.stopwatch import interleaved

REQUESTS = (1, 256, 1024)
ROWS, DIM, SINGLE, BAG = 1_000_000, 16, 8, 10  # of the large table: fields of one value, and one of so many


def run(folder: Path) -> Path:
    """Measure a run's artefact and write `results/embeddings.json`."""
    return record.write("embeddings", measured(folder, ROWS, rounds=15, round_us=20_000.0))


def measured(folder: Path, rows: int, rounds: int, round_us: float) -> dict[str, Any]:
    """Measure the artefact and the prepared log of a run folder, and lookups in a table of `rows` rows."""
    load_average = os.getloadavg()[0]
    prepared = Prepared.load(folder / "data")
    trained = load(folder / "model.safetensors")
    batch = next(prepared.stream("test", max(REQUESTS), shuffle=False).epoch(0)).features
    large = _large(rows)
    judged, rankers = {}, {}
    for kind in EMBEDDINGS:
        with TemporaryDirectory() as place:
            path = Path(place) / "model.safetensors"
            save(trained, path, kind)
            rankers[kind] = load(path)
            judged[kind] = {
                "metrics": _metrics(rankers[kind], prepared),
                "embedding_bytes": rankers[kind].inputs.nbytes,
                "artefact_bytes": path.stat().st_size,
            }
    timings: dict[str, Any] = {"request": {}, "lookup": {}}
    for size in REQUESTS:
        features, ids = batch.take(torch.arange(size) % batch.batch), _ids(rows, size)
        request = {kind: partial(ranker.score_encoded, features) for kind, ranker in rankers.items()}
        lookup = {kind: partial(_embed, large.rounded(kind), ids) for kind in EMBEDDINGS}
        for name, calls in (("request", request), ("lookup", lookup)):
            timed = interleaved(calls, rounds, round_us)
            timings[name][str(size)] = {kind: timing._asdict() for kind, timing in timed.items()}
    where = {"machine": record.machine(), "threads": torch.get_num_threads(), "load_average": load_average}
    return {**where, "data": prepared.schema.name, "rows": rows, "dim": DIM, "judged": judged, "timings_us": timings}


class _Served(nn.Module):
    """A ranker as `evaluate` asks a model."""

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        self.ranker = ranker

    def forward(self, features: EncodedFeatures, task: str) -> Tensor:
        place = self.ranker.tasks.index(task)
        # A float32 below 1 is at least 2^-24 away from it.
        return torch.logit(self.ranker.score_encoded(features)[:, place : place + 1].double(), eps=2.0**-25)


def _metrics(ranker: Ranker, prepared: Prepared) -> dict[str, dict[str, float]]:
    kinds = {task.name: task.kind for task in prepared.schema.tasks if task.name in ranker.tasks}
    found = evaluate(_Served(ranker), prepared.stream("test", 4096, shuffle=False), kinds)["all"]
    return {task: {MAIN_METRIC[kind]: found[task][MAIN_METRIC[kind]]} for task, kind in kinds.items()}


def _large(rows: int) -> CrossedEmbeddings:
    torch.manual_seed(0)
    fields = [*((f"field_{i}", "table", False) for i in range(SINGLE)), ("bag", "table", True)]
    return CrossedEmbeddings(fields, {"table": rows}, DIM)


def _ids(rows: int, batch: int) -> EncodedFeatures:
    generator = torch.Generator().manual_seed(0)
    single = torch.randint(rows, (batch, SINGLE), generator=generator)
    values = torch.randint(rows, (batch * BAG,), generator=generator)
    return EncodedFeatures(single, values, torch.arange(0, batch * BAG + 1, BAG))


@torch.inference_mode()
def _embed(inputs: CrossedEmbeddings, features: EncodedFeatures) -> Tensor:
    return inputs.embed(features)
