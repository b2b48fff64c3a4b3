"""What differs between two artefacts: schema, vocabularies, embeddings, masks, weights, quantisation, bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lt4rec_sparse.formats import BlockWeight
from lt4rec_sparse.masks import Mask, overlap
from lt4rec_sparse.network import DenseLayer, FrozenNetwork, SparseLayer
from lt4rec_sparse.ranker.artefact import load
from lt4rec_sparse.ranker.features import FeatureEncoder
from lt4rec_sparse.ranker.features.tables import (
    MISSING,
    UNSEEN,
    HashTable,
    IntVocabulary,
    QuantileTable,
    StringVocabulary,
    Table,
)
from lt4rec_sparse.ranker.ranker import Ranker

EXAMPLES = 5  # of values that are in one vocabulary alone
Pair = tuple[Any, Any]  # of A and of B; None where there is none


@dataclass(frozen=True)
class WeightDifference:
    """How far weights of one shape are apart: `|A|`, `|B|` and `|A - B|`, Euclidean norms of what any task keeps."""

    a: float
    b: float
    difference: float

    @property
    def relative(self) -> float | None:
        """`|A - B| / |A|`; None where A is zero and B is not."""
        return self.difference / self.a if self.a else None if self.difference else 0.0


@dataclass(frozen=True)
class MaskDifference:
    """One task's mask of one layer: kept weights over all weights, and those kept by both over those kept by any."""

    density: tuple[float, float]
    overlap: float


@dataclass(frozen=True)
class LayerDifference:
    """A hidden layer, or a head, which has no masks.

    Attributes:
        shape: `[out_features, in_features]` of each; None where there is no such layer.
        activation: The name of each one's.
        blocks: Whether each is kept in blocks of 16 x 4.
        masks: Task -> its masks, of tasks that both have; empty where shapes differ.
        weight: None where shapes differ.
        bias: Likewise.
    """

    shape: Pair
    activation: Pair
    blocks: Pair
    masks: Mapping[str, MaskDifference]
    weight: WeightDifference | None
    bias: WeightDifference | None


@dataclass(frozen=True)
class TableDifference:
    """The values of one embedding table, and their rows.

    Attributes:
        rows: How many each has, those of unseen and missing values among them; None where there is no such table.
        added: How many values B's vocabulary has and A's lacks; None of a table that is no vocabulary in both.
        removed: How many A's has and B's lacks.
        moved: How many of both have another id.
        examples: Some values that were added, and some that were removed.
        embeddings: The rows of equal values, those of unseen and missing values among them; None where there are no
            such rows, where widths differ, or where embeddings are elsewhere.
    """

    rows: Pair
    added: int | None
    removed: int | None
    moved: int | None
    examples: tuple[tuple[str, ...], tuple[str, ...]]
    embeddings: WeightDifference | None


@dataclass(frozen=True)
class Difference:
    """What differs between artefacts A and B.

    Attributes:
        equal: Whether the files have the same bytes.
        facts: What differs in schema, tasks, days of training, widths and kinds of numbers: (where, of A, of B).
        tables: Table -> values and embeddings.
        layers: `layers.<i>`, `heads.<task>` and `attention.<column>`, a whole unit as one row -> masks and weights.
        quantization: Task -> B's scale over A's of the input of each layer; None where one is not calibrated.
        nbytes: What -> bytes of A and of B.
    """

    equal: bool
    facts: tuple[tuple[str, Any, Any], ...]
    tables: Mapping[str, TableDifference]
    layers: Mapping[str, LayerDifference]
    quantization: Mapping[str, tuple[float, ...]] | None
    nbytes: Mapping[str, tuple[int, int]]


def diff(a: str | Path, b: str | Path) -> Difference:
    """Compare two artefacts; rows of embeddings are compared value by value, whatever their ids.

    Raises:
        FileNotFoundError: If one is absent.
        ArtefactError: If one cannot be read.
    """
    first, second = load(a), load(b)
    networks = first.mlp.network, second.mlp.network
    sizes = {"file": (Path(a).stat().st_size, Path(b).stat().st_size)}
    sizes["embeddings"] = (first.inputs.nbytes, second.inputs.nbytes)
    sizes["MLP"] = (networks[0].nbytes, networks[1].nbytes)
    return Difference(
        _same_bytes(Path(a), Path(b)),
        tuple(_differing(_facts(first), _facts(second))),
        _tables(first, second),
        _layers(*networks) | _units(first, second),
        _quantization(*networks),
        sizes,
    )


def _same_bytes(a: Path, b: Path) -> bool:
    """Compare files piece by piece: both may be larger than memory."""
    with a.open("rb") as first, b.open("rb") as second:
        while True:
            one, other = first.read(1 << 20), second.read(1 << 20)
            if one != other or not one:
                return one == other


def _facts(ranker: Ranker) -> dict[str, Any]:
    encoder, network = ranker.encoder, ranker.mlp.network
    return {
        "tasks": ", ".join(ranker.tasks),
        "trained until": encoder.until,
        "embedding dim": ranker.inputs.dim,
        "embeddings": ranker.inputs.kind,
        "embeddings elsewhere": ", ".join(sorted(ranker.inputs.absent)) or None,
        "weights": str(network.dtype).removeprefix("torch."),
        "hidden layers": len(network.hidden),
        "calibrated for int8": network.quantization is not None,
        "schema": encoder.schema.to_stored(),
        "scales": {name: _scale(encoder, name) for name in encoder.numbers},
    }


def _scale(encoder: FeatureEncoder, name: str) -> dict[str, Any]:
    """Return what standardises a column of raw numbers."""
    return {part: array.tolist() for part, array in encoder.scale(name).to_arrays().items()}


def _differing(a: Any, b: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield where plain data differ; parts of lists that have names are compared by name."""
    if isinstance(a, list) and isinstance(b, list) and all(isinstance(x, dict) and "name" in x for x in (*a, *b)):
        a, b = ({part["name"]: part for part in parts} for parts in (a, b))
    if not (isinstance(a, dict) and isinstance(b, dict)):
        if a != b:
            yield where, a, b
        return
    for key in dict.fromkeys((*a, *b)):
        yield from _differing(a.get(key), b.get(key), f"{where}: {key}" if where else key)


def _tables(a: Ranker, b: Ranker) -> dict[str, TableDifference]:
    found = {}
    for name in dict.fromkeys((*a.inputs.table_sizes, *b.inputs.table_sizes)):
        sizes = a.inputs.table_sizes.get(name), b.inputs.table_sizes.get(name)
        if None in sizes:
            found[name] = TableDifference(sizes, None, None, None, ((), ()), None)
            continue
        first, second = a.encoder.table(name), b.encoder.table(name)
        rows = _rows_of_equal_values(first, second)
        embeddings = None
        if rows is not None and a.inputs.dim == b.inputs.dim and name not in a.inputs.absent | b.inputs.absent:
            embeddings = _weights(a.inputs.table(name)[rows[0]], b.inputs.table(name)[rows[1]])
        is_vocabulary = isinstance(first, IntVocabulary | StringVocabulary) and type(first) is type(second)
        if not is_vocabulary or rows is None:
            found[name] = TableDifference(sizes, None, None, None, ((), ()), embeddings)
            continue
        added, removed = _alone(second, first), _alone(first, second)
        moved = int((rows[0] != rows[1]).sum())
        examples = (tuple(map(str, added[:EXAMPLES])), tuple(map(str, removed[:EXAMPLES])))
        found[name] = TableDifference(sizes, len(added), len(removed), moved, examples, embeddings)
    return found


def _rows_of_equal_values(a: Table, b: Table) -> tuple[Tensor, Tensor] | None:
    """Return the ids, in A and in B, of values that both tables tell from all others; None if they share no rule."""
    if isinstance(a, HashTable) and isinstance(b, HashTable) and a.size == b.size:
        return torch.arange(a.size), torch.arange(a.size)
    if isinstance(a, QuantileTable) and isinstance(b, QuantileTable) and np.array_equal(a.cuts, b.cuts):
        return torch.arange(a.size), torch.arange(a.size)
    if isinstance(a, IntVocabulary | StringVocabulary) and type(a) is type(b):
        ids = b.lookup(_keys(a))
        known = np.flatnonzero(ids != UNSEEN)
        always = [MISSING, UNSEEN]
        return torch.from_numpy(np.r_[always, known + 2]), torch.from_numpy(np.r_[always, ids[known]])
    return None


def _alone(a: Any, b: Any) -> list[Any]:
    """Return the values that vocabulary A has and B lacks, in A's order."""
    keys = _keys(a)
    found: list[Any] = keys[b.lookup(keys) == UNSEEN].tolist()
    return found


def _keys(table: IntVocabulary | StringVocabulary) -> Any:
    return table.keys if isinstance(table, IntVocabulary) else np.array([*table.keys, None], object)[:-1]


def _units(a: Ranker, b: Ranker) -> dict[str, LayerDifference]:
    """Compare what weighs the values of bags by attention: each unit as one row of numbers."""
    held = []
    for inputs in (a.inputs, b.inputs):
        flat = [torch.cat([t.detach().flatten() for t in unit.parameters()])[None] for unit in inputs.units]
        held.append(dict(zip(inputs.attention, flat, strict=True)))
    found = {}
    for name in dict.fromkeys((*held[0], *held[1])):
        one, other = (part.get(name) for part in held)
        shape = None if one is None else tuple(one.shape), None if other is None else tuple(other.shape)
        kind = None if one is None else "prelu", None if other is None else "prelu"
        alike = None if one is None or other is None or one.shape != other.shape else _weights(one, other)
        found[f"attention.{name}"] = LayerDifference(shape, kind, (False, False), {}, alike, None)
    return found


def _layers(a: FrozenNetwork, b: FrozenNetwork) -> dict[str, LayerDifference]:
    names = [f"layers.{i}" for i in range(max(len(a.hidden), len(b.hidden)))]
    names += [f"heads.{task}" for task in dict.fromkeys((*a.heads, *b.heads))]
    return {name: _layer(_named(a, name), _named(b, name)) for name in names}


def _named(network: FrozenNetwork, name: str) -> SparseLayer | DenseLayer | None:
    kind, _, rest = name.partition(".")
    if kind == "heads":
        return network.heads.get(rest)
    return network.hidden[int(rest)] if int(rest) < len(network.hidden) else None


def _layer(a: SparseLayer | DenseLayer | None, b: SparseLayer | DenseLayer | None) -> LayerDifference:
    shapes = None if a is None else tuple(a.weight.shape), None if b is None else tuple(b.weight.shape)
    activations = None if a is None else a.activation, None if b is None else b.activation
    blocks = tuple(isinstance(layer, SparseLayer) and isinstance(layer.weight, BlockWeight) for layer in (a, b))
    masks = {}
    weight = bias = None
    if a is not None and b is not None and shapes[0] == shapes[1]:
        if isinstance(a, SparseLayer) and isinstance(b, SparseLayer):
            for task in (task for task in a.weight.tasks if task in b.weight.tasks):
                kept = Mask({"": a.weight.mask(task)}), Mask({"": b.weight.mask(task)})
                masks[task] = MaskDifference((kept[0].density, kept[1].density), overlap(*kept)[""])
        weight = _weights(_dense(a), _dense(b))
        bias = _weights(*(torch.zeros(x.weight.shape[0]) if x.bias is None else x.bias for x in (a, b)))
    return LayerDifference(shapes, activations, (blocks[0], blocks[1]), masks, weight, bias)


def _dense(layer: SparseLayer | DenseLayer) -> Tensor:
    return layer.weight.to_dense() if isinstance(layer, SparseLayer) else layer.weight


def _weights(a: Tensor, b: Tensor) -> WeightDifference:
    first, second = a.detach().double(), b.detach().double()
    return WeightDifference(first.norm().item(), second.norm().item(), (first - second).norm().item())


def _quantization(a: FrozenNetwork, b: FrozenNetwork) -> dict[str, tuple[float, ...]] | None:
    if a.quantization is None or b.quantization is None or a.depth != b.depth:
        return None
    tasks = [task for task in a.tasks if task in b.tasks]
    return {
        task: tuple(
            after.scale / before.scale for before, after in zip(a.quantization[task], b.quantization[task], strict=True)
        )
        for task in tasks
    }
