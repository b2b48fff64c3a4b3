"""Small good files to start from: every version, layout, kind of table and of embeddings."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lt4rec_sparse import MaskedMLP, Ranker, SparseMLP, freeze, load, save, save_module
from lt4rec_sparse.formats import BlockWeight, CompressedWeight, SharedWeight
from lt4rec_sparse.network import SparseLayer
from lt4rec_sparse.nn.module_file import KEY as MODULE
from lt4rec_sparse.ranker.artefact import KEY as ARTEFACT
from lt4rec_sparse.ranker.features import FeatureEncoder, Schema
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from tests.promises.mutants import File, taken_apart

TASKS = ("click", "buy")
COLUMNS: dict[str, dict[str, Any]] = {
    "item": {"type": "int"},
    "colour": {},
    "price": {"kind": "dense", "buckets": 4},
    "tags": {"kind": "multi", "separator": "|"},
    "user": {"encoding": "hash", "size": 4},
    "visit": {"type": "int", "encoding": "hash", "size": 3},
    "length": {"kind": "dense", "encoding": "standardised"},
    "gain": {"kind": "dense", "encoding": "log"},
    "view": {"kind": "vector", "size": 2, "separator": "|"},
    "seen": {"kind": "multi", "type": "int", "pooling": "attention", "target": "item", "last": 2},
}
FITTED = {
    "item": [7, -3, 2**40],
    "colour": ["red", "grün"],
    "price": [1.0, 2.5, 3.0, 9.5],
    "tags": [["a", "b"], ["b"], ["ü"]],
    "user": ["u"],
    "visit": [1],
    "length": [1.0, None, 9.0],
    "gain": [0.0, -1.5, 1e6],
    "view": [[0.5, -1.0], None, [1.5, 3.0]],
    "seen": [[7, -3, 7], [], [2**40]],
    "bought_item": [[7]],
    "bought_count": [0.0, 1.0],
    "bought_rate": [0.0, 0.5],
}
# Of three candidates, by kind and type of a column: known values, unseen and missing ones.
SAMPLES: dict[str, list[Any]] = {
    "single int": [7, None, 2**40],
    "single string": ["grün", None, "u"],
    "multi int": [[7, 1], None, [-3]],
    "multi string": [["a", "zz"], [], "b| ü |"],
    "dense": [2.5, None, 100.0],
}


def artefacts() -> list[File]:
    """Return small artefacts, whose scores are of ordinary size."""
    generator = torch.Generator().manual_seed(0)
    made = [
        _artefact(("item", "price"), (3,), generator, context=["price"]),
        _artefact(("colour", "tags"), (2, 2), generator, activations=("gelu", "tanh"), embeddings="fp16"),
        _artefact(("user", "visit", "price"), (18,), generator, kind=BlockWeight, activations=("silu",)),
        _artefact(
            ("item", "tags"), (3, 2), generator, activations=("leaky_relu", "elu"), embeddings="int8", has_past=True
        ),
        _artefact(("item", "colour"), (2,), generator, embeddings="int8", without=("item",)),
        _artefact(("item", "colour"), (3, 2), generator, activations=("dice", "relu")),
        _artefact(("length", "item", "gain", "view"), (3,), generator, embeddings="int8", context=["length"]),
        _artefact(("seen", "length", "item"), (3,), generator, has_past=True, attention="attention"),
    ]
    return [taken_apart(content, ARTEFACT) for content in made]


def ranker(seed: int) -> Ranker:
    """Return one of the small rankers; others have other weights."""
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(_artefact(("item", "price"), (3,), generator))
        return load(path)


def modules() -> list[File]:
    """Return small module files, of one frozen MLP or layer each."""
    generator = torch.Generator().manual_seed(0)
    networks = [
        SparseMLP(_network(5, (4, 3), generator, SharedWeight, ("relu", "elu"), True)),
        SparseMLP(_network(5, (4,), generator, SharedWeight, ("dice",), False)),
        SparseMLP(_network(6, (18,), generator, BlockWeight, ("hardswish",), False), "bf16"),
    ]
    return [taken_apart(_written(lambda path, mlp=mlp: save_module(mlp, path)), MODULE) for mlp in networks]


def _artefact(
    columns: tuple[str, ...],
    hidden: tuple[int, ...],
    generator: torch.Generator,
    kind: type[CompressedWeight] = SharedWeight,
    activations: tuple[str, ...] = ("relu",),
    embeddings: str = "fp32",
    without: tuple[str, ...] = (),
    has_past: bool = False,
    context: list[str] = [],  # noqa: B006  # read alone
    attention: str = "mean",
) -> bytes:
    of_past = {"name": "bought", "when": "buy", "columns": ["item"], "rates": True, "pooling": attention}
    past = [of_past] if has_past else []
    schema = Schema.from_dict(
        {
            "name": "shop",
            "files": {"log": ["*.csv"]},
            "time": {"day": "date"},
            "group": {"column": "user", "type": "string"},
            "columns": [{"name": name, **COLUMNS[name]} for name in columns],
            "histories": past,
            "context": context,
            "tasks": [{"name": task, "kind": "binary", "label": task} for task in TASKS],
        }
    )
    encoder = FeatureEncoder.fit(schema, [FITTED])
    torch.manual_seed(generator.initial_seed())
    made_for = {"numbers": encoder.n_numbers, "attention": encoder.attention}
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, 2, **made_for)
    inputs.embedding.data = torch.randn(inputs.embedding.shape, generator=generator)
    network = _network(inputs.out_features, hidden, generator, kind, activations, embeddings != "fp32")
    ranker = Ranker(
        encoder, inputs, SparseMLP(network).calibrated(torch.randn(20, inputs.out_features, generator=generator))
    )
    return _written(lambda path: save(ranker, path, embeddings, without=without))


def _network(
    width: int,
    hidden: tuple[int, ...],
    generator: torch.Generator,
    kind: type[CompressedWeight],
    activations: tuple[str, ...],
    has_slopes: bool,
) -> Any:
    torch.manual_seed(generator.initial_seed())  # the heads are drawn: a mutant follows from its number alone
    network = freeze(MaskedMLP(width, hidden, tasks=TASKS), sigmoid=True).network
    layers = []
    for out, activation in zip(hidden, activations, strict=True):
        masks = {}
        for task in TASKS:
            grid = torch.rand(-(-out // kind.BLOCK[0]), -(-width // kind.BLOCK[1]), generator=generator) < 0.6
            masks[task] = kind._spread(grid, (out, width))
        weight = kind.from_dense(torch.randn(out, width, generator=generator) / 2, masks)
        slope: Any = 0.25 if activation in ("leaky_relu", "elu") else 0.0
        if has_slopes and activation == "leaky_relu":
            slope = torch.linspace(-0.5, 1, out)
        if activation == "dice":
            slope = torch.randn(3, out, generator=generator)
        layers.append(SparseLayer(weight, torch.randn(out, generator=generator) / 4, activation, slope))
        width = out
    return replace(network, hidden=tuple(layers))


def _written(write: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write(path)
        return path.read_bytes()
