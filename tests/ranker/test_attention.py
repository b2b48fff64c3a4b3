"""Sequences: the last values of a bag, and sums of bags by attention to a target, in every way of serving."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rankers import columns_of, schema_of

from lt4rec_sparse import MaskedMLP, Ranker, checked_file, freeze, load, save
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker import ArtefactError
from lt4rec_sparse.ranker.artefact import KEY
from lt4rec_sparse.ranker.attention import AttentionUnit
from lt4rec_sparse.ranker.diff import diff
from lt4rec_sparse.ranker.features import EncodedFeatures, FeatureEncoder, Schema, SchemaError
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.ranker.module import padded_ids
from tests.oracle import assert_exact, small_integers
from tests.ranker.agreement import assert_agrees, bounded_scores
from tests.ranker.reader import Reader
from tests.ranker.test_artefact import contents

ATTENDED = {"name": "seen", "kind": "multi", "type": "int", "pooling": "attention", "target": "item", "last": 3}
COLUMNS: list[dict[str, Any]] = [
    ATTENDED,
    {"name": "item", "type": "int"},
    {"name": "tags", "kind": "multi", "last": 2, "separator": "|"},
    {"name": "shop", "encoding": "hash", "size": 7},
    {"name": "shops", "kind": "multi", "encoding": "hash", "size": 7, "pooling": "attention", "target": "shop"},
]
ROWS = {
    "seen": [[1, 2, 3, 1], [], None, [2, 9]],
    "item": [1, 2, None, 9],
    "tags": [["a", "b", "c"], [], ["c"], None],
    "shop": ["x", "y", None, "z"],
    "shops": [["x"], ["y", "x"], [], ["z"]],
}
VALUES = st.none() | st.integers(0, 9)
TEXTS = st.none() | st.sampled_from("xyz")
REQUEST = st.lists(
    st.fixed_dictionaries(
        {
            "seen": st.none() | st.lists(VALUES, max_size=6),
            "item": VALUES,
            "tags": st.none() | st.lists(st.sampled_from("abc"), max_size=4),
            "shop": TEXTS,
            "shops": st.lists(TEXTS, max_size=4),
        }
    ),
    min_size=1,
    max_size=6,
)


def ranker_of(columns: list[dict[str, Any]] = COLUMNS, **changes: Any) -> Ranker:
    encoder = FeatureEncoder.fit(schema_of(columns, **changes), [ROWS])
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, 3, std=1.0, attention=encoder.attention)
    return Ranker(encoder, inputs, freeze(MaskedMLP(inputs.out_features, (12, 8), tasks=("ctr",)), sigmoid=True))


RANKER = ranker_of()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("attention") / "model.safetensors"
    save(RANKER, path)
    return path


FIELDS = [("item", "item", False), ("seen", "item", True), ("tags", "tag", True)]
SIZES = {"item": 5, "tag": 3}
BATCH = st.lists(
    st.tuples(st.integers(0, 4), st.lists(st.integers(0, 4), max_size=4), st.lists(st.integers(0, 2), max_size=1)),
    min_size=0,
    max_size=5,
)


def features_of(batch: list[Any]) -> EncodedFeatures:
    bags = [seen for _, seen, _ in batch] + [tags for _, _, tags in batch]
    return EncodedFeatures(
        torch.tensor([[item] for item, _, _ in batch], dtype=torch.int64).view(len(batch), 1),
        torch.tensor([value for bag in bags for value in bag], dtype=torch.int64),
        torch.tensor([0, *map(len, bags)]).cumsum(0),
    )


def inputs_of_integers(sparse_gradients: bool = False) -> CrossedEmbeddings:
    how: dict[str, Any] = {"attention": {"seen": "item"}, "sparse_gradients": sparse_gradients}
    inputs = CrossedEmbeddings(FIELDS, SIZES, 2, **how)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in inputs.parameters():
            parameter.copy_(small_integers(*parameter.shape, generator=generator))
    return inputs


def naive(inputs: CrossedEmbeddings, batch: list[Any]) -> torch.Tensor:
    """The vectors of every row, `[batch, 3, 2]`, value by value."""
    rows, unit = [], inputs.units[0]
    for item, seen, tags in batch:
        t = inputs.embedding[item]
        total = t * 0
        for value in seen:
            h = inputs.embedding[value]
            z = unit.hidden.weight @ torch.cat([h, t, h * t]) + unit.hidden.bias
            total = total + (unit.out.weight[0] @ torch.where(z > 0, z, unit.slope * z) + unit.out.bias[0]) * h
        of_tags = [inputs.embedding[5 + tag] for tag in tags]
        rows.append(torch.stack([t, total, of_tags[0] if of_tags else t * 0]))
    return torch.stack(rows) if rows else torch.zeros(0, 3, 2)


@given(BATCH)
def test_a_bag_is_the_sum_of_its_values_each_weighted_by_itself_and_the_target(batch):
    inputs, by_hand = inputs_of_integers(), inputs_of_integers()
    embedded, wanted = inputs.embed(features_of(batch)), naive(by_hand, batch)
    assert_exact(embedded.detach(), wanted.detach())
    if not batch:
        return
    embedded.sum().backward()
    wanted.sum().backward()
    for (name, ours), (_, theirs) in zip(inputs.named_parameters(), by_hand.named_parameters(), strict=True):
        # Where no bag has a value, the naive sum has no unit; ours has zeros, which processes can add up.
        assert ours.grad is not None, name
        assert_exact(ours.grad, torch.zeros_like(ours) if theirs.grad is None else theirs.grad)


@given(BATCH.filter(bool))
def test_sparse_gradients_are_the_same(batch):
    dense, sparse = inputs_of_integers(), inputs_of_integers(sparse_gradients=True)
    for inputs in (dense, sparse):
        inputs.embed(features_of(batch)).sum().backward()
    assert sparse.embedding.grad.is_sparse
    assert_exact(sparse.embedding.grad.to_dense(), dense.embedding.grad)


@pytest.mark.parametrize("attention", [{"item": "seen"}, {"seen": "seen"}, {"tags": "item"}, {"x": "item"}])
def test_attention_of_other_fields_is_refused(attention):
    with pytest.raises(InputError, match=r"attention: got .*, wanted a bag that attends to a"):
        CrossedEmbeddings(FIELDS, SIZES, 2, attention=attention)


@given(REQUEST)
def test_only_the_last_values_count_whatever_is_missing(rows):
    encoded = RANKER.encoder.encode(columns_of(rows))
    cut = [
        {
            **row,
            "seen": [v for v in row["seen"] or [] if v is not None][-3:],
            "tags": "|".join((row["tags"] or [])[-2:]),
        }
        for row in rows
    ]
    again = RANKER.encoder.encode(columns_of(cut))
    for part in ("single", "multi_values", "multi_offsets"):
        assert torch.equal(getattr(encoded, part), getattr(again, part))
    lengths = encoded.multi_offsets.diff().view(3, len(rows)).amax(1)
    assert lengths[0] <= 3 and lengths[1] <= 2


@given(REQUEST)
def test_scores_agree_with_the_second_reader_and_in_every_way_of_serving(saved, rows):
    columns, loaded, reader = columns_of(rows), load(saved), Reader(saved.read_bytes())
    scores = loaded.score(columns)
    assert_agrees(scores, bounded_scores(reader, columns))
    assert reader.meta["version"] == 6
    ranking = loaded.rank(columns)
    assert ranking.scores["ctr"].tolist() == scores["ctr"][ranking.rows].tolist()
    encoded = loaded.encoder.encode(columns)
    assert loaded.score_encoded(encoded)[:, 0].tolist() == scores["ctr"].tolist()
    dense = loaded.to_dense()(*padded_ids(encoded, loaded.encoder.fields))
    assert_agrees({"ctr": dense["ctr"].numpy()}, bounded_scores(reader, columns))


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="ONNX Runtime is absent")
def test_an_onnx_model_attends_as_the_ranker_does(saved):
    from onnx_models import runtime

    from lt4rec_sparse import to_onnx

    ids = padded_ids(RANKER.encoder.encode(ROWS), RANKER.encoder.fields)
    assert_agrees({"ctr": runtime(to_onnx(RANKER), *ids)[0].numpy()}, bounded_scores(Reader(saved.read_bytes()), ROWS))


@pytest.mark.heavy
def test_torch_exports_a_dense_ranker_that_attends():
    ids = padded_ids(RANKER.encoder.encode(ROWS), RANKER.encoder.fields)
    exported = torch.export.export(RANKER.to_dense(), ids).module()
    assert torch.equal(exported(*ids)["ctr"], RANKER.to_dense()(*ids)["ctr"])


def test_what_is_in_common_may_be_given_once():
    ranker = ranker_of(context=["seen", "shop"])
    context = {"seen": [[1, 2, 9, 2]], "shop": ["y"]}
    own = {name: values for name, values in ROWS.items() if name not in context}
    ranking = ranker.rank(own, context)
    whole = ranker.score({**own, **{name: values * 4 for name, values in context.items()}})
    assert ranking.scores["ctr"].tolist() == whole["ctr"][ranking.rows].tolist()


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_what_is_given_for_a_target_is_attended_to_and_what_is_given_for_a_bag_replaces_it(tmp_path, kind):
    save(RANKER, tmp_path / "m", kind)
    ranker, reader = load(tmp_path / "m"), Reader((tmp_path / "m").read_bytes())
    for given_rows in (
        {"item": np.full((4, 3), 0.25, np.float32)},
        {"seen": np.full((1, 3), -0.5, np.float32)},
        {"item": np.full((1, 3), 0.25, np.float32), "seen": np.full((4, 3), 2.0, np.float32)},
    ):
        whole = {name: np.broadcast_to(rows, (4, 3)) for name, rows in given_rows.items()}
        assert_agrees(ranker.score(ROWS, given_rows), bounded_scores(reader, ROWS, whole))


def test_without_the_table_of_both_each_request_brings_their_vectors(tmp_path):
    save(RANKER, tmp_path / "m", without=["item"])
    vectors = RANKER.inputs.embed(RANKER.encoder.encode(ROWS))
    places = RANKER.inputs._places
    given_rows = {name: vectors[:, places[name]] for name in ("item", "seen")}
    with pytest.raises(InputError, match="embeddings of 'seen': got none"):
        load(tmp_path / "m").score(ROWS, {"item": given_rows["item"]})
    assert load(tmp_path / "m").score(ROWS, given_rows)["ctr"].tolist() == RANKER.score(ROWS)["ctr"].tolist()


@pytest.mark.parametrize(
    ("columns", "version"), [([COLUMNS[2], COLUMNS[3]], 6), ([{**COLUMNS[2], "last": 0}, COLUMNS[3]], 2)]
)
def test_a_file_has_the_least_version_that_it_needs(tmp_path, columns, version):
    ranker = ranker_of(columns)
    save(ranker, tmp_path / "m")
    meta, _ = contents(tmp_path / "m")
    assert meta["version"] == version
    held = {key for column in meta["encoder"]["schema"]["columns"] for key in column}
    assert ("last" in held) == (version == 6) and not held & {"pooling", "target"}


def test_the_engine_is_left_aside_and_no_engine_file_is_written(tmp_path):
    for columns, kind in ((COLUMNS[2:4], "the last values of a bag"), (COLUMNS[3:], "attention")):
        ranker = ranker_of(columns)
        assert ranker._request_engine() is None
        with pytest.raises(InputError, match=f"column .*: got {kind}, wanted ids, means of bags, or numbers in"):
            ranker.to_engine_file(tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_inputs_that_do_not_attend_are_no_inputs_of_such_an_encoder():
    inputs = CrossedEmbeddings(RANKER.encoder.fields, RANKER.encoder.table_sizes, 3)
    with pytest.raises(ValueError, match=r"inputs: got 0 numbers and attention \{\}, wanted 0 and \{'seen': 'item'"):
        Ranker(RANKER.encoder, inputs, RANKER.mlp)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight", lambda t: t[:, 1:].clone(), r"weight: got shape \[36, 8\], wanted \[36, 9\]"),
        ("weight", lambda t: t[:0].clone(), r"weight: got shape \[0, 9\]"),
        ("slope", lambda t: t[1:].clone(), r"slope: got shape \[35\], wanted \[36\]"),
        ("out", lambda t: t.double(), "out: got torch.float64, wanted one of torch.float32"),
        ("out_bias", lambda t: t * float("nan"), "out_bias.*NaN"),
        ("bias", None, "bias: is absent"),
    ],
)
def test_a_unit_that_cannot_be_served_is_refused(saved, tmp_path, name, change, message):
    meta, tensors = contents(saved)
    key = f"inputs.attention.1.{name}"
    held = tensors.pop(key)
    meta.pop("sha256"), meta.pop("digests")
    checked_file.write(tmp_path / "m", KEY, meta, tensors if change is None else {**tensors, key: change(held)})
    with pytest.raises(ArtefactError, match=rf"inputs\.attention\.1\.{message}"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"name": "a", "last": 2}, "column 'a': got last, pooling or target of kind='single', wanted kind='multi'"),
        ({**ATTENDED, "last": -1}, "column 'seen': got last=-1, wanted 1 to 65536, or 0 for all"),
        ({**ATTENDED, "last": 2**40}, "column 'seen': got last=1099511627776"),
        ({**ATTENDED, "pooling": "mean"}, "column 'seen': got pooling='mean', target='item', wanted a target with"),
        ({"name": "a", "kind": "multi", "pooling": "attention"}, "got pooling='attention', target=None"),
        ({**ATTENDED, "target": "tags"}, "column 'seen': got target 'tags', wanted a feature of kind='single'"),
        ({**ATTENDED, "target": "nothing"}, "column 'seen': got target 'nothing'"),
        (
            {**ATTENDED, "table": "seen"},
            "column 'seen': got table 'seen' and target 'item' of table 'item', wanted one",
        ),
        ({**ATTENDED, "type": "string"}, "table 'item': .* differ"),
    ],
)
def test_a_schema_that_attends_to_nothing_is_refused(column, message):
    with pytest.raises(SchemaError, match=message):
        schema_of([{"name": "item", "type": "int"}, {"name": "tags", "kind": "multi"}, column])


def test_the_bags_of_a_history_attend_to_the_column_that_they_are_the_past_of(tmp_path):
    past = {"name": "bought", "when": "buy", "columns": ["item"], "length": 5, "pooling": "attention"}
    changes: dict[str, Any] = {"histories": [past], "time": {"day": "d"}, "group": {"column": "user"}}
    schema = schema_of([{"name": "item", "type": "int"}], **changes)
    (_, bag) = schema.features
    assert (bag.name, bag.kind, bag.target, bag.table) == ("bought_item", "multi", "item", "item")
    (tmp_path / "s.toml").write_text(schema.to_toml())
    assert Schema.from_toml(tmp_path / "s.toml") == schema == Schema.from_stored(schema.to_stored())
    # A history of a bag holds all of its rows' values, and attends to nothing.
    plain = schema_of(COLUMNS, **{**changes, "histories": [{**past, "pooling": "mean", "columns": ["seen"]}]})
    assert (plain.features[-1].last, plain.features[-1].target) == (0, None)
    with pytest.raises(SchemaError, match="column 'bought_tags': got target 'tags', wanted a feature of kind='single'"):
        schema_of(COLUMNS, **{**changes, "histories": [{**past, "columns": ["tags"]}]})


def test_grown_inputs_keep_their_units_and_train_them_and_a_difference_names_them(tmp_path):
    numbers = {"name": "age", "kind": "dense", "encoding": "standardised"}
    rows = {**ROWS, "age": [1.0, 2.0, None, 4.0]}
    encoder = FeatureEncoder.fit(schema_of([*COLUMNS, numbers]), [rows])
    made_for: dict[str, Any] = {"numbers": encoder.n_numbers, "attention": encoder.attention}
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, 3, **made_for)
    mlp = freeze(MaskedMLP(inputs.out_features, (8,), tasks=("ctr",)), sigmoid=True)
    save(Ranker(encoder, inputs, mlp), tmp_path / "a")
    ranker = load(tmp_path / "a")
    later = encoder.grown([{**rows, "item": [77, 77, 1, 1], "age": [100.0] * 4}], "day 2")
    assert later.scale("age") is encoder.scale("age") and later.attention == encoder.attention
    grown = ranker.inputs.grown(later.table_sizes, None)
    assert all(parameter.requires_grad for parameter in grown.parameters())
    assert torch.equal(grown(encoder.encode(rows)), ranker.inputs(encoder.encode(rows)))
    with torch.no_grad():
        before = grown.units[0].out.bias.item()
        grown.units[0].out.bias += 1.0
    save(Ranker(later, grown, ranker.mlp), tmp_path / "b")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert [where for where, _, _ in found.facts] == ["trained until"]
    assert found.layers["attention.seen"].weight.difference == grown.units[0].out.bias.item() - before
    assert found.layers["attention.shops"].weight.difference == 0.0
    other = FeatureEncoder.fit(schema_of([*COLUMNS, numbers]), [{**rows, "age": [1.0, 2.0, None, 6.0]}])
    save(Ranker(other, inputs, mlp), tmp_path / "c")
    facts = [where for where, _, _ in diff(tmp_path / "a", tmp_path / "c").facts]
    assert facts == ["scales: age: mean", "scales: age: std"]


def test_a_unit_is_read_back_as_it_was():
    unit = AttentionUnit(4, width=5)
    again = AttentionUnit.from_tensors(unit.to_tensors(), 4)
    assert unit.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(unit.state_dict()[name], t) for name, t in again.state_dict().items())
