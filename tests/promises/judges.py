"""What may become of a mutant: it is refused by one line of the right class, or it is served and right."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lt4rec_sparse import Plan, SparseMLP, load, load_module
from lt4rec_sparse.checked_file import ArtefactError
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import Column
from tests.oracle import Bounded, Layer, assert_rounding, mlp_reference
from tests.promises import bases, mutants
from tests.promises.bases import SAMPLES
from tests.ranker.agreement import assert_agrees, bounded_scores
from tests.ranker.reader import Reader

REFUSED, SERVED, BEYOND = "refused", "served and right", "served beyond float32"
PRECISIONS = ("fp32", "fp32", "fp32", "bf16", "int8")  # as often as they are drawn
OPERANDS = {"fp32": None, "bf16": torch.bfloat16}  # int8 has no second reader: its file is judged in float32
LARGEST = float(np.finfo(np.float32).max)


class Subject:
    """One kind of file: `mutant` makes the bytes of one, `judge` says what became of it, or raises."""

    error: type[InputError]
    suffix: str

    def mutant(self, rng: random.Random) -> bytes:
        raise NotImplementedError

    def served(self, path: Path, content: bytes, rng: random.Random) -> str:
        raise NotImplementedError

    def judge(self, path: Path, content: bytes, rng: random.Random) -> str:
        """Return the verdict.

        Raises:
            AssertionError: If the message is no line that names the file, or what is served is wrong.
            Exception: Whatever else escapes.
        """
        path.write_bytes(content)
        try:
            return self.served(path, content, rng)
        except self.error as error:
            assert re.fullmatch(rf"{re.escape(str(path))}: [^\n]+", str(error)), f"message: {error!s:.300}"
            assert len(str(error)) < 1_000, f"message of {len(str(error))} characters: {error!s:.200}"
            return REFUSED


class Artefacts(Subject):
    error, suffix = ArtefactError, "safetensors"

    def __init__(self) -> None:
        self.bases = bases.artefacts()

    def mutant(self, rng: random.Random) -> bytes:
        return mutants.mutant(rng, self.bases)

    def served(self, path: Path, content: bytes, rng: random.Random) -> str:
        precision = rng.choice(PRECISIONS)
        ranker = load(path, precision)
        columns = {column.name: samples_of(column) for column in ranker.encoder.schema.features}
        absent = [field.column for field in ranker.inputs.fields if field.table in ranker.inputs.absent]
        given = {column: np.full((3, ranker.inputs.dim), 0.5, np.float32) for column in absent}
        reader = Reader(content)
        try:
            scores = ranker.score(columns, given)
        except InputError as error:  # a scale that makes too much of an ordinary number
            assert reader.numbers and re.fullmatch(r"column .*: got .* too far from [^\n]+", str(error)), error
            assert largest(reader, columns, given) >= LARGEST, error
            return BEYOND
        if largest(reader, columns, given) >= LARGEST:
            return BEYOND
        if precision in OPERANDS:
            assert_agrees(scores, bounded_scores(reader, columns, given, OPERANDS[precision]))
        if precision != "fp32":
            assert_agrees(load(path).score(columns, given), bounded_scores(reader, columns, given))
        for task, of_task in scores.items():
            assert of_task.shape == (3,) and np.isfinite(of_task).all(), f"{task}: got {of_task}"
            assert ((of_task >= 0) & (of_task <= 1)).all(), f"{task}: got {of_task}"
        return SERVED


class Modules(Subject):
    error, suffix = ArtefactError, "safetensors"

    def __init__(self) -> None:
        self.bases = bases.modules()

    def mutant(self, rng: random.Random) -> bytes:
        return mutants.mutant(rng, self.bases)

    def served(self, path: Path, content: bytes, rng: random.Random) -> str:
        module = load_module(path)
        network = module.network
        x = torch.linspace(-1, 1, 3 * network.in_features).view(3, -1)
        y = module(x)
        assert y.shape == (3, network.outputs), f"got {tuple(y.shape)}"
        most = x.double().abs().max()
        tasks = [[Layer(*network.layer(i, task)) for i in range(network.depth)] for task in network.tasks]
        for layers in tasks:
            m = x.double().abs()
            for layer in layers:
                bias = 0.0 if layer.bias is None else layer.bias.double().abs()
                m = (m @ layer.weight.double().abs().T + bias) * torch.as_tensor(_gain(layer))
                most = max(most, m.max())
        if not most < LARGEST:
            return BEYOND
        if module.precision in OPERANDS:
            assert_rounding(y, _reference(x, tasks, OPERANDS[module.precision]))
        if module.precision != "fp32":
            assert_rounding(SparseMLP(network)(x), _reference(x, tasks))
        assert y.isfinite().all(), f"got {y}"
        return SERVED


class Plans(Subject):
    error, suffix = InputError, "json"

    def __init__(self) -> None:
        segment = {"kernel": "sparse", "precision": "fp32", "first": 0, "last": 2}
        timing = {"median_us": 1.0, "p20_us": 0.5, "p80_us": 2.0}
        dense = [{**segment, "kernel": "dense", "first": i, "last": i} for i in range(3)]
        chains = [
            {"name": "sparse fp32", "chain": [segment], "timing": timing},
            {"name": "mixed", "chain": [dense[0], {**segment, "first": 1}], "timing": timing},
            {"name": "dense fp32", "chain": dense, "timing": timing},
        ]
        batch = {"batch": 1, "contestants": chains, "segments": [{"segment": segment, "timing": timing}]}
        network = {"in_features": 5, "out_features": [4, 3, 1], "tasks": 2, "densities": [0.5, 0.5, 1.0]}
        machine = {"engine": "avx2", "threads": 1, "torch": "2.13.0"}
        plan = {"version": 1, "machine": machine, "network": network, "precision": "fp32"}
        self.plan = {**plan, "batches": [batch, {**batch, "batch": 64}]}

    def whole(self) -> bytes:
        return json.dumps(self.plan).encode()

    def mutant(self, rng: random.Random) -> bytes:
        changed = json.loads(self.whole())
        for _ in range(rng.choice((1, 1, 2, 3))):
            mutants.change_json(rng, changed)
        text = json.dumps(changed).encode()
        return mutants.change_bytes(rng, text) if rng.random() < 0.2 else text

    def served(self, path: Path, content: bytes, rng: random.Random) -> str:
        plan = Plan.load(path)
        layers = len(plan.network.out_features)
        for batch in plan.batches:
            for timed in batch.chains:
                covered = [i for segment in timed.chain for i in range(segment.first, segment.last + 1)]
                assert covered == list(range(layers)), f"chain: got {timed.chain}"
        assert len(str(plan)) > 0
        again = path.with_name("again.json")
        plan.save(again)
        assert repr(Plan.load(again)) == repr(plan)  # a NaN among the times equals nothing, and is written alike
        return SERVED


SUBJECTS: dict[str, Callable[[], Subject]] = {"artefacts": Artefacts, "modules": Modules, "plans": Plans}


def _reference(x: torch.Tensor, tasks: list[list[Layer]], operands: torch.dtype | None = None) -> Bounded:
    """Return what dense float64 gives for all tasks, side by side."""
    references = [mlp_reference(x, layers, operands=operands) for layers in tasks]
    return Bounded(*(torch.cat(parts, 1) for parts in zip(*references, strict=True)))


def _gain(layer: Any) -> Any:
    """Return how many times as large as a sum the result of its activation can be; dice is between z and alpha z."""
    slope = layer.slope[2] if layer.activation == "dice" else layer.slope
    return np.maximum(1, np.abs(np.asarray(slope, np.float64)))


def samples_of(column: Column) -> list[Any]:
    """Return three values of a column."""
    if column.kind == "vector":
        return [[2.5] * column.size, None, column.separator.join(["100"] * column.size)]
    return SAMPLES[column.kind if column.kind == "dense" else f"{column.kind} {column.type}"]


def largest(reader: Reader, columns: dict[str, Any], given: dict[str, np.ndarray]) -> float:
    """Return the largest magnitude that a sum of the network may have on the way, however its terms are signed.

    Finite weights may be so large that float32 overflows where the float64 of a second reader does not: what is served
    then is infinite or NaN, as in torch.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        embedded, most, _ = reader.inputs(columns, given)
        biggest = [np.abs(embedded).max(initial=0), most.max(initial=0), reader.peak]
        for task in reader.tasks:
            m = most
            for layer in reader.layers(task):
                m = (m @ np.abs(layer.weight).T + np.abs(layer.bias)) * _gain(layer)
                biggest.append(m.max(initial=0))
    worst = float(np.max(biggest))
    return math.inf if math.isnan(worst) else worst
