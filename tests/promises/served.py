"""What is served is what was trained: an artefact's scores over the test days, by every way to them.

The reference is float64: the embeddings as they are held, their dot products, and each task's masked network, with the
rounding bound of tests/oracle.py. In float32 every score lies within it. In every precision a row's scores are equal to
the bit: from raw values and from ids, on every instruction set of this machine, from every layout, with one thread and
several, and with what candidates have in common given once or for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.request import raw_columns
from lt4rec_sparse import Ranker, load
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.network import PRECISIONS
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.recsys.data import Prepared
from tests.oracle import Bounded, Layer, assert_rounding, mlp_reference

BATCH = 1024


def run(folder: Path, count: int | None = None) -> dict[str, Any]:
    """Judge the artefact of a run's folder on `count` rows of its test days, or on all.

    Raises:
        AssertionError: At the first score that is wrong.
    """
    prepared = Prepared.load(folder / "data")
    path = folder / "model.safetensors"
    trained = load(path)
    has_int8 = trained.mlp.network.quantization is not None
    rankers = {p: load(path, p) for p in PRECISIONS if p != "int8" or has_int8}
    found = {"rows": 0, "requests": 0, "scores": 0, "precisions": list(rankers), "isas": list(cpu.supported_isas())}
    for batch in prepared.stream("test", BATCH, shuffle=False).epoch(0):
        features = batch.features
        columns = raw_columns(trained.encoder, features)
        _check_ids(trained, columns, features)
        requests = _requests(trained, features)
        for precision, ranker in rankers.items():
            wanted = ranker.score_encoded(features)
            if precision == "fp32":
                _check_rounding(ranker, features, wanted)
            found["scores"] += _check_ways(ranker, columns, features, requests, wanted)
        found["rows"] += features.batch
        found["requests"] += len(requests)
        if count is not None and found["rows"] >= count:
            break
    return found


def _check_ids(ranker: Ranker, columns: dict[str, list[Any]], features: EncodedFeatures) -> None:
    again = ranker.encoder.encode(columns)
    for name in ("single", "multi_values", "multi_offsets"):
        assert torch.equal(getattr(again, name), getattr(features, name).long()), f"{name}: other ids"


def _requests(ranker: Ranker, features: EncodedFeatures) -> list[list[int]]:
    """Group the rows that have everything in common that candidates of a request may have."""
    fields = ranker.encoder.fields
    common = [i for i, field in enumerate(fields) if field.column in ranker.encoder.schema.in_common]
    of_common = features.of_fields(common)
    groups: dict[tuple[Any, ...], list[int]] = {}
    bags = (of_common.multi_offsets.numel() - 1) // features.batch
    ends = of_common.multi_offsets.tolist()
    for row, single in enumerate(of_common.single.tolist()):
        spans = [(ends[f * features.batch + row], ends[f * features.batch + row + 1]) for f in range(bags)]
        key = (*single, *(tuple(of_common.multi_values[first:last].tolist()) for first, last in spans))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _check_rounding(ranker: Ranker, features: EncodedFeatures, scores: Tensor) -> None:
    embedded = ranker.inputs.embed(features).double()
    n, dim = embedded.shape[1:]
    first, second = torch.triu_indices(n, n, offset=1)
    dots = (embedded @ embedded.transpose(1, 2))[:, first, second]
    # A dot product of `dim` terms, each added by one rounding.
    sums = (embedded.abs() @ embedded.abs().transpose(1, 2))[:, first, second]
    x = torch.cat([embedded.flatten(1), dots], 1)
    bound = torch.cat([torch.zeros_like(embedded.flatten(1)), sums * (dim + 1) * 2.0**-24], 1)
    network = ranker.mlp.network
    for t, task in enumerate(ranker.tasks):
        dense = [network.layer(i, task) for i in range(network.depth)]
        layers = [Layer(layer.weight, layer.bias, layer.activation, layer.slope) for layer in dense]
        assert_rounding(scores[:, t : t + 1], mlp_reference(Bounded(x, bound), layers))


def _check_ways(
    ranker: Ranker,
    columns: dict[str, list[Any]],
    features: EncodedFeatures,
    requests: list[list[int]],
    wanted: Tensor,
) -> int:
    """Score the rows in every way; return how many scores were compared."""
    checked, before = 0, torch.get_num_threads()

    def check(got: Any, rows: Any, way: str) -> None:
        nonlocal checked
        scores = torch.stack([torch.from_numpy(got[task]) for task in ranker.tasks], 1)
        assert torch.equal(scores, wanted[rows]), f"{way}, {ranker.precision}: other scores"
        checked += scores.numel()

    rows = torch.arange(features.batch)
    check(ranker.score(columns), rows, "raw values")
    common = ranker.encoder.schema.in_common
    for request in requests:
        own = {name: [values[row] for row in request] for name, values in columns.items() if name not in common}
        context = {name: [values[request[0]]] for name, values in columns.items() if name in common}
        ranked = ranker.rank(own, context) if context else None
        if ranked is not None:
            check(ranked.scores, torch.tensor(request)[ranked.rows], "what is in common given once")
    try:
        for isa in cpu.supported_isas():
            with cpu.forced_isa(isa):
                for threads, rows_at_once in ((1, features.batch), (2, features.batch), (1, 7), (1, 1)):
                    torch.set_num_threads(threads)
                    some = rows if rows_at_once == features.batch else rows[:rows_at_once]
                    scores = ranker.score_encoded(features.take(some))
                    of_tasks = {task: scores[:, i].numpy() for i, task in enumerate(ranker.tasks)}
                    check(of_tasks, some, f"{isa}, {threads} threads, {len(some)} rows at once")
    finally:
        torch.set_num_threads(before)
    return checked
