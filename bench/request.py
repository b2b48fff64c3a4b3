"""A whole request: raw columns to every task's scores, ours and as the modules of Python compute it.

A request is one of the run's test days: a row's context, and as many candidates of other rows. Its raw values are those
that the ids stand for. Opponents read lists of Python, as a server has them from JSON:

- "modules, every row": the encoder in Python, embeddings and their cross in torch, the sparse MLP; what candidates have
  in common is repeated for each.
- "modules, once": the same with that given once: encoded once, and computed with for each candidate.
- "onnxruntime": the encoder in Python, given it once; embeddings and cross in numpy; the dense MLP of both tasks in
  onnxruntime, int8 by static quantisation, one scale per row of a weight.
- "ours": `Ranker.score` from lists, from numpy arrays and from Arrow; "ours, every row" repeats what is in common;
  `rank` also sorts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench import record, runtimes
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.nn import SparseMLP
from lt4rec_sparse.onnx import to_onnx
from lt4rec_sparse.ranker import Ranker, load
from lt4rec_sparse.ranker.features import EncodedFeatures, FeatureEncoder
from lt4rec_sparse.ranker.features.tables import IntVocabulary, QuantileTable, StringVocabulary
from lt4rec_sparse.recsys.data import Prepared
from lt4rec_sparse.stopwatch import Timing, interleaved

CANDIDATES, PRECISIONS, CALIBRATION_ROWS = (1, 256, 1024), ("fp32", "int8"), 2048
ARTEFACTS = ("model.safetensors", "model_last.safetensors")
TOLERANCE = {"fp32": 1e-5, "int8": 0.05}  # of a score: another encoder, cross or MLP would be far off

Columns = dict[str, list[Any]]


def run(folder: Path) -> Path:
    """Measure a run's artefacts and write `results/request.json`."""
    return record.write("request", measured(folder, (1, 2), rounds=15, round_us=30_000.0))


def measured(folder: Path, threads: tuple[int, ...], rounds: int, round_us: float) -> dict[str, Any]:
    """Measure the artefacts of a run folder, whose prepared log the requests are of."""
    load_average, before = os.getloadavg()[0], torch.get_num_threads()
    prepared = Prepared.load(folder / "data")
    batch = next(prepared.stream("test", 4096, shuffle=False).epoch(0)).features
    found: dict[str, Any] = {}
    try:
        for name in ARTEFACTS:
            if (folder / name).exists():
                for count in threads:
                    torch.set_num_threads(count)
                    found.setdefault(name, {})[str(count)] = _artefact(folder / name, batch, count, rounds, round_us)
    finally:
        torch.set_num_threads(before)
    encoder = load(folder / ARTEFACTS[0]).encoder
    return {
        "machine": record.machine(),
        "load_average": load_average,
        "data": prepared.schema.name,
        "fields": len(encoder.fields),
        "in_common": len(encoder.schema.in_common & {field.column for field in encoder.fields}),
        "artefacts": found,
    }


def _artefact(path: Path, batch: EncodedFeatures, threads: int, rounds: int, round_us: float) -> dict[str, Any]:
    found: dict[str, Any] = {"densities": list(load(path).mlp.network.densities), "timings_us": {}}
    with TemporaryDirectory() as place:
        for size in CANDIDATES:
            calls: dict[str, Callable[[], object]] = {}
            context, candidates = request(load(path).encoder, batch, size)
            whole = candidates | {name: values * size for name, values in context.items()}
            for precision in PRECISIONS:
                ranker = load(path, precision)
                wanted = ranker.score(whole)
                ways = {
                    "modules, every row": partial(by_modules, ranker, whole),
                    "modules, once": partial(by_modules, ranker, candidates | context),
                    "ours, every row": partial(ranker.score, whole),
                    "ours, once": partial(ranker.score, candidates | context),
                    "ours, arrays": partial(ranker.score, _arrays(candidates | context)),
                    "ours, Arrow": partial(ranker.score, _arrow(candidates | context)),
                }
                if precision == "int8":
                    ways["onnxruntime"] = by_onnxruntime(ranker, candidates | context, batch, Path(place), threads)
                for way, call in ways.items():
                    off = max(float(np.abs(call()[task] - of_task).max()) for task, of_task in wanted.items())
                    if not off <= TOLERANCE[precision]:
                        raise RuntimeError(f"{way}, {precision}: got scores that are off by {off}")
                    calls[f"{way}, {precision}"] = call
                calls[f"ours: rank, {precision}"] = partial(ranker.rank, candidates, context, 10)
                x = ranker.inputs(ranker.encoder.encode(whole)).detach()
                calls[f"the whole MLP alone, {precision}"] = partial(_mlp, ranker.mlp, x)
            timed: Mapping[str, Timing] = interleaved(calls, rounds, round_us)
            found["timings_us"][str(size)] = {name: timing._asdict() for name, timing in timed.items()}
    return found


def request(encoder: FeatureEncoder, batch: EncodedFeatures, size: int) -> tuple[Columns, Columns]:
    """Return the context of a batch's first row, and as many candidates as wanted, as raw columns."""
    rows = batch.take(torch.arange(size) % batch.batch)
    columns = raw_columns(encoder, rows)
    common = encoder.schema.in_common
    context = {name: values[:1] for name, values in columns.items() if name in common}
    return context, {name: values for name, values in columns.items() if name not in common}


def raw_columns(encoder: FeatureEncoder, features: EncodedFeatures) -> Columns:
    """Return values that have these ids; of hashed tables, whose ids no value is known of, missing ones."""
    if encoder.n_numbers:
        raise InputError("encoder: got raw numbers, wanted ids alone: values of numbers are not told by them")
    columns: Columns = {}
    singles = [field for field in encoder.fields if not field.multi]
    for place, field in enumerate(singles):
        columns[field.column] = [_value(encoder, field.table, int(i)) for i in features.single[:, place]]
    offsets, batch = features.multi_offsets.tolist(), features.batch
    for f, field in enumerate(encoder.fields[len(singles) :]):
        ends = offsets[f * batch : (f + 1) * batch + 1]
        values = [_value(encoder, field.table, int(i)) for i in features.multi_values[ends[0] : ends[-1]]]
        columns[field.column] = [
            values[first - ends[0] : last - ends[0]] for first, last in zip(ends, ends[1:], strict=False)
        ]
    return columns


def _value(encoder: FeatureEncoder, table: str, index: int) -> Any:
    of_table = encoder.table(table)
    if index == 0:
        return None
    if isinstance(of_table, QuantileTable):  # a value on a cut is in the bucket below it
        cuts = of_table.cuts
        return float(cuts[index - 1]) if index <= len(cuts) else float(cuts[-1] + 1) if len(cuts) else 0.0
    if isinstance(of_table, IntVocabulary):
        return -(2**61) if index == 1 else int(of_table.keys[index - 2])
    if isinstance(of_table, StringVocabulary):
        return "\0unseen" if index == 1 else of_table.keys[index - 2]
    return None


@torch.inference_mode()
def by_modules(ranker: Ranker, columns: Columns) -> dict[str, Any]:
    """Score as the modules do, each by itself: the reference of a request."""
    x = ranker.inputs(ranker.encoder.encode(columns))
    return _named(ranker, _mlp(ranker.mlp, x).numpy())


def by_onnxruntime(
    ranker: Ranker, columns: Columns, batch: EncodedFeatures, folder: Path, threads: int
) -> Callable[[], dict[str, Any]]:
    """Return a call of the dense MLP in int8, on inputs that numpy makes."""
    import onnxruntime as ort

    plain, path = folder / "mlp.onnx", folder / "int8.onnx"
    rows = ranker.inputs(batch.take(torch.arange(CALIBRATION_ROWS) % batch.batch)).detach().numpy()
    if not path.exists():
        to_onnx(ranker.mlp.to_precision("fp32"), plain)
        name = ort.InferenceSession(plain, providers=["CPUExecutionProvider"]).get_inputs()[0].name
        runtimes.quantized(plain, path, [{name: rows}])
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    entry, table = session.get_inputs()[0].name, ranker.inputs.embedding.detach().numpy()
    starts = [ranker.inputs.first_row(field.table) for field in ranker.encoder.fields]
    first, second = np.triu_indices(len(starts), 1)

    def score() -> dict[str, Any]:
        features = ranker.encoder.encode(columns)
        single, n = features.single.numpy(), features.batch
        vectors = np.zeros((n, len(starts), table.shape[1]), np.float32)
        vectors[:, : single.shape[1]] = table[single + np.array(starts[: single.shape[1]])]
        values, offsets = features.multi_values.numpy(), features.multi_offsets.numpy()
        for f, start in enumerate(starts[single.shape[1] :]):
            ends = offsets[f * n : (f + 1) * n + 1]
            counts = np.diff(ends)
            of_rows = vectors[:, single.shape[1] + f]
            rows_of_values = np.repeat(np.arange(n), counts)
            np.add.at(of_rows, rows_of_values, table[values[ends[0] : ends[-1]] + start])
            of_rows /= np.maximum(counts, 1)[:, None]
        dots = np.matmul(vectors, vectors.transpose(0, 2, 1))[:, first, second]
        x = np.concatenate([vectors.reshape(n, -1), dots], 1)
        return _named(ranker, np.concatenate(session.run(None, {entry: x}), 1))

    return score


def _mlp(mlp: SparseMLP, x: torch.Tensor) -> torch.Tensor:
    scores = torch.empty(len(x), mlp.out_features)
    mlp.score_into(x, scores)
    return scores


def _named(ranker: Ranker, scores: Any) -> dict[str, Any]:
    return {task: scores[:, i] for i, task in enumerate(ranker.tasks)}


def _arrays(columns: Columns) -> dict[str, Any]:
    """Return numbers and texts as arrays of their own types, and bags as values and offsets."""
    found: dict[str, Any] = {}
    for name, values in columns.items():
        if isinstance(values[0], list):
            flat = [value for row in values for value in row]
            found[name] = np.array(flat, object), np.cumsum([0, *map(len, values)])
            if all(isinstance(value, int) for value in flat):
                found[name] = np.array(flat, np.int64), found[name][1]
        elif all(isinstance(value, int) for value in values):
            found[name] = np.array(values, np.int64)
        elif all(value is None or isinstance(value, float) for value in values):
            found[name] = np.array(values, np.float64)
        else:
            found[name] = np.array(values, object)
    return found


def _arrow(columns: Columns) -> dict[str, Any]:
    import pyarrow as pa

    return {name: pa.array(values) for name, values in columns.items()}
