"""What differs between two artefacts: nothing of a copy, and of others exactly what was changed."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from rankers import make

from lt4rec_sparse import MaskedMLP, freeze
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.nn import SparseMLP
from lt4rec_sparse.ranker import ArtefactError, Ranker, save
from lt4rec_sparse.ranker.diff import diff
from lt4rec_sparse.ranker.features import FeatureEncoder, Schema
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings


@pytest.fixture
def kept(tmp_path):
    """Save rankers as files of increasing names."""
    count = iter(range(100))

    def path_of(ranker, *how):
        path = tmp_path / f"{next(count)}.safetensors"
        save(ranker, path, *how)
        return path

    return path_of


def changed_inputs(ranker, change):
    inputs = ranker.inputs._with(ranker.inputs.embedding.detach().clone(), ())
    with torch.no_grad():
        change(inputs)
    return Ranker(ranker.encoder, inputs, ranker.mlp)


@pytest.mark.parametrize("how", [{}, {"blocks": True, "precision": "int8"}, {"kind": "int8"}])
def test_a_copy_is_equal_and_nothing_differs(kept, how):
    ranker = make(**how)
    found = diff(kept(ranker), kept(ranker))
    assert found.equal and found.facts == ()
    assert all(a == b for a, b in found.nbytes.values())
    for table in found.tables.values():
        assert table.rows[0] == table.rows[1] and not table.added and not table.removed and not table.moved
        assert table.embeddings.difference == 0 and table.embeddings.relative == 0
    for name, layer in found.layers.items():
        assert layer.weight.difference == layer.bias.difference == 0
        assert (not layer.masks) == name.startswith("heads.")
        assert all(m.overlap == 1 and m.density[0] == m.density[1] for m in layer.masks.values())
    json.dumps(asdict(found), allow_nan=False)


def test_grown_vocabularies_are_compared_by_value(kept):
    ranker = make()
    rows = {"video": [100, 100, 7], "price": [1.0] * 3, "colour": ["blue"] * 3, "tags": [[]] * 3, "seen": [[]] * 3}
    rows |= {"shop": [None] * 3, "seller": [None] * 3, "words": [[]] * 3, "age": [0.0] * 3}
    encoder = ranker.encoder.grown([rows], "day 2")
    inputs = ranker.inputs.grown(encoder.table_sizes, torch.Generator().manual_seed(0)).requires_grad_(False)
    a, b = kept(ranker), kept(Ranker(encoder, inputs, ranker.mlp))
    found, back = diff(a, b), diff(b, a)
    assert not found.equal and found.facts == (("trained until", None, "day 2"),)
    for name, table in found.tables.items():
        added = encoder.table_sizes[name] - ranker.encoder.table_sizes[name]
        assert table.rows[1] - table.rows[0] == (table.added or 0) == added == (back.tables[name].removed or 0)
        assert not table.removed and not table.moved and table.embeddings.difference == 0
    assert found.tables["colour"].examples == (("blue",), ()) and back.tables["colour"].examples == ((), ("blue",))
    assert {name for name, table in found.tables.items() if table.added} >= {"colour", "video"}


def test_ids_that_moved_are_counted_and_their_rows_still_compared(kept):
    ranker = make()
    table = ranker.encoder.table("colour")
    order = [*range(1, len(table.keys)), 0]
    tables = {name: ranker.encoder.table(name) for name in ranker.encoder.table_sizes}
    tables["colour"] = type(table)([table.keys[i] for i in order])
    start = ranker.inputs.first_row("colour") + 2

    def turn(inputs):
        rows = inputs.embedding[start : start + len(order)].clone()
        inputs.embedding[start : start + len(order)] = rows[order]

    turned = changed_inputs(ranker, turn)
    found = diff(kept(ranker), kept(Ranker(FeatureEncoder(ranker.encoder.schema, tables), turned.inputs, ranker.mlp)))
    assert found.tables["colour"].moved == len(order)
    assert all(table.embeddings.difference == 0 for table in found.tables.values())


def test_one_changed_row_is_in_its_table_alone(kept):
    ranker = make()
    first = ranker.inputs.first_row("video")

    def change(inputs):
        inputs.embedding[first + 2] += 3.0

    tables = diff(kept(ranker), kept(changed_inputs(ranker, change))).tables
    apart = {name for name, table in tables.items() if table.embeddings.difference}
    assert apart == {"video"}
    assert tables["video"].embeddings.difference == pytest.approx(3 * ranker.inputs.dim**0.5)


def test_masks_and_weights_are_compared_layer_by_layer(kept):
    def made(first, head):
        mlp = MaskedMLP(ranker.inputs.out_features, (4, 2), tasks=("ctr", "cvr"))
        with torch.no_grad():
            for parameter in mlp.parameters():
                parameter.fill_(1.0)
            mlp.heads["cvr"].weight.fill_(head)
        mask = Mask.full(mlp.mask("ctr").shapes)
        plane = mask["layers.0"].clone()
        plane[first:] = False
        mlp.set_mask({"layers.0": plane, "layers.1": mask["layers.1"]}, "ctr")
        return Ranker(ranker.encoder, ranker.inputs, freeze(mlp, sigmoid=True))

    ranker = make()
    layers = diff(kept(made(3, 1.0)), kept(made(1, 5.0))).layers
    assert list(layers) == ["layers.0", "layers.1", "heads.ctr", "heads.cvr"]
    ctr = layers["layers.0"].masks["ctr"]
    assert ctr.density == (0.75, 0.25) and ctr.overlap == 1 / 3
    assert layers["layers.0"].masks["cvr"].overlap == layers["layers.1"].masks["ctr"].overlap == 1
    assert layers["layers.0"].weight.difference == layers["heads.ctr"].weight.difference == 0
    head = layers["heads.cvr"].weight
    assert (head.a, head.difference, head.relative) == (2**0.5, 4 * 2**0.5, 4)


def test_other_shapes_tasks_and_kinds_are_said(kept):
    ranker = make()
    mlp = freeze(MaskedMLP(ranker.inputs.out_features, (8,), tasks=("ctr", "buy")), sigmoid=True)
    other = Ranker(ranker.encoder, ranker.inputs, mlp.calibrated(torch.randn(50, mlp.in_features)))
    found = diff(kept(ranker), kept(other, "int8"))
    facts = {where: (a, b) for where, a, b in found.facts}
    assert facts["tasks"] == ("ctr, cvr", "ctr, buy") and facts["embeddings"] == ("fp32", "int8")
    assert facts["hidden layers"] == (2, 1) and facts["calibrated for int8"] == (False, True)
    assert found.layers["layers.0"].weight is None and not found.layers["layers.0"].masks
    assert found.layers["layers.1"].shape[1] is None
    assert found.layers["heads.buy"].shape[0] is None and found.layers["heads.cvr"].shape[1] is None
    assert found.quantization is None
    json.dumps(asdict(found), allow_nan=False)


def test_schemas_are_compared_by_the_names_of_their_parts(kept):
    ranker = make()
    data = ranker.encoder.schema.to_dict()
    columns = [{**c, "separator": "|"} if c["name"] == "tags" else c for c in data["columns"]]
    schema = Schema.from_dict({**data, "columns": [columns[1], columns[0], *columns[2:]]})
    tables = {name: ranker.encoder.table(name) for name in ranker.encoder.table_sizes}
    encoder = FeatureEncoder(schema, tables)
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, ranker.inputs.dim)
    found = diff(kept(ranker), kept(Ranker(encoder, inputs, ranker.mlp)))
    where = "schema: columns: tags: separator"
    assert (where, ",", "|") in found.facts
    assert all("video" not in place and "price" not in place for place, _, _ in found.facts)


def test_scales_are_compared_where_both_are_calibrated(kept):
    ranker = make(precision="int8").to_precision("fp32")
    doubled = {
        task: tuple(q._replace(scale=2 * q.scale) for q in of_task)
        for task, of_task in ranker.mlp.network.quantization.items()
    }
    network = replace(ranker.mlp.network, quantization=doubled)
    found = diff(kept(ranker), kept(Ranker(ranker.encoder, ranker.inputs, SparseMLP(network))))
    assert found.quantization == dict.fromkeys(ranker.tasks, (2.0,) * network.depth)


def test_absent_embeddings_are_not_compared(kept):
    ranker = make()
    path = kept(ranker)
    without = path.with_name("without.safetensors")
    save(ranker, without, without=["video"])
    found = diff(path, without)
    assert found.tables["video"].embeddings is None and found.tables["video"].added == 0
    assert ("embeddings elsewhere", None, "video") in found.facts


def test_a_refused_file_is_refused(kept, tmp_path):
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(ArtefactError, match="bad: got a damaged file"):
        diff(kept(make()), tmp_path / "bad")
