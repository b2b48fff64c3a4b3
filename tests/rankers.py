"""A small ranker with fields of every kind, and requests to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from lt4rec_sparse import MaskedMLP, Ranker, SparseMLP, freeze
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.ranker.features import FeatureEncoder, Schema
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings

COMMON = ("price", "colour", "seen")
SCHEMA = {
    "name": "test",
    "context": ["price", "colour", "seen"],
    "files": {"log": ["*.csv"]},
    "time": {"day": "date"},
    "group": {"column": "user"},
    "columns": [
        {"name": "video", "type": "int"},
        {"name": "price", "kind": "dense", "buckets": 4},
        {"name": "colour"},
        {"name": "tags", "kind": "multi"},
        {"name": "seen", "kind": "multi", "type": "int", "table": "video"},
        {"name": "shop", "encoding": "hash", "size": 11},
        {"name": "seller", "type": "int", "encoding": "hash", "size": 13},
        {"name": "words", "kind": "multi", "encoding": "hash", "size": 17, "separator": "||"},
        {"name": "age", "kind": "dense"},
    ],
    "tasks": [
        {"name": "ctr", "kind": "binary", "label": "click"},
        {"name": "cvr", "kind": "binary", "label": "buy"},
    ],
}


class NotAvailable:
    """What pandas has for a missing value: comparisons with it have no answer, and are it again."""

    def __eq__(self, other: object) -> Any:
        return self

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


NA = NotAvailable()


INTS = st.one_of(st.none(), st.integers(-5, 5), st.sampled_from([2**62, -(2**62), 2**63 - 1, -(2**63)]))
TEXTS = st.one_of(st.sampled_from(["red", "green", "", "grün", "红", " a", "\x1fb\x85"]), st.text(max_size=9))
NUMBERS = st.one_of(st.none(), st.floats(-3, 3), st.sampled_from([float("nan"), float("inf"), -1e300]))
ROW = st.fixed_dictionaries(
    {
        "video": INTS,
        "price": NUMBERS,
        "colour": st.one_of(st.none(), TEXTS),
        "tags": st.one_of(st.none(), st.lists(TEXTS, max_size=3)),
        "seen": st.lists(INTS, max_size=4),
        "shop": st.one_of(st.none(), TEXTS),
        "seller": INTS,
        "words": st.lists(st.one_of(st.none(), TEXTS), max_size=3),
        "age": st.one_of(NUMBERS, st.integers(-(2**70), 2**70)),
    }
)
ROWS = st.lists(ROW, min_size=1, max_size=12)


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def schema_of(columns: list[dict[str, Any]], **changes: Any) -> Schema:
    task = {"name": "ctr", "kind": "binary", "label": "click"}
    return Schema.from_dict({"name": "t", "files": {"log": ["*"]}, "columns": columns, "tasks": [task], **changes})


def make(
    context: bool = True,
    kind: str = "fp32",
    dim: int = 5,
    precision: str = "fp32",
    blocks: bool = False,
    activation: str = "relu",
) -> Ranker:
    schema = Schema.from_dict(SCHEMA if context else {**SCHEMA, "context": []})
    rows = {
        "video": [1, 2, 3, 3, -4, 2**62],
        "price": [0.5, 1.0, 2.0, -1.0, 3.0, None],
        "colour": ["red", "green", "grün", "", "红", "red"],
        "tags": [["red"], ["green", ""], [], ["a"], ["grün"], ["b"]],
        "seen": [[1], [2, 5], [], [0], [-5], [4]],
        "shop": [None] * 6,
        "seller": [None] * 6,
        "words": [[]] * 6,
        "age": [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0],
    }
    encoder = FeatureEncoder.fit(schema, [rows])
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, dim=dim, std=1.0).rounded(kind)
    mlp = MaskedMLP(inputs.out_features, (48, 32), tasks=("ctr", "cvr"))
    generator = torch.Generator().manual_seed(0)
    for task in mlp.tasks:
        shapes = mlp.mask(task).shapes
        if blocks:
            kept = {
                name: (torch.rand(-(-r // 16), -(-c // 4), generator=generator) < 0.6)
                .repeat_interleave(16, 0)
                .repeat_interleave(4, 1)[:r, :c]
                for name, (r, c) in shapes.items()
            }
            mlp.set_mask(Mask(kept), task)
        else:
            mlp.set_mask(Mask.random(shapes, {n: r * c // 2 for n, (r, c) in shapes.items()}, generator), task)
    frozen = freeze(mlp, sigmoid=True)
    if activation == "dice":
        hidden = (
            layer._replace(activation="dice", slope=torch.randn(3, layer.weight.shape[0], generator=generator))
            for layer in frozen.network.hidden
        )
        frozen = SparseMLP(replace(frozen.network, hidden=tuple(hidden)))
    if precision == "int8":
        frozen = frozen.calibrated(torch.randn(500, inputs.out_features))
    return Ranker(encoder, inputs, frozen.to_precision(precision))


COLUMNS = {
    "video": [1, None, 77],
    "price": [0.3, None, 9.0],
    "colour": ["red", None, "mauve"],
    "tags": [["red", "green"], None, ["b"]],
    "seen": [[1, 2, 2], [], [99]],
    "shop": ["x", None, "y"],
    "seller": [7, None, 8],
    "words": [["one", "two"], [], ["three"]],
    "age": [0.1, None, 5],
}
