"""A ranker from ids on, as a module and as an ONNX model: scores are those of `Ranker.score`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx_models import runtime
from oracle import Layer, assert_exact, assert_rounding, mlp_reference, small_integers

from lt4rec_sparse import MaskedMLP, Ranker, freeze, from_onnx, to_onnx
from lt4rec_sparse.lottery import random_masks
from lt4rec_sparse.ranker.features import EncodedFeatures, FeatureEncoder, Schema
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.ranker.module import padded_ids

COLUMNS = {"item": [1, 2, 3], "tags": [["a", "b"], [], ["b"]], "hour": [5, 6, 7], "past": [[1, 3], [2], []]}


def ranker_of(multi: bool = True) -> Ranker:
    """Return a ranker whose embeddings are small integers: with two values per bag at most its inputs are exact."""
    columns = [
        {"name": "item", "type": "int"},
        {"name": "tags", "kind": "multi"},
        {"name": "hour", "type": "int"},
        {"name": "past", "type": "int", "kind": "multi", "table": "item"},
    ]
    schema = Schema.from_dict(
        {
            "name": "shop",
            "files": {"log": ["log.csv"]},
            "time": {"day": "date"},
            "group": {"column": "user"},
            "columns": [column for column in columns if multi or "kind" not in column],
            "tasks": [{"name": name, "kind": "binary", "label": f"is_{name}"} for name in ("ctr", "cvr")],
        }
    )
    encoder = FeatureEncoder.fit(schema, [COLUMNS])
    generator = torch.Generator().manual_seed(0)
    table = small_integers(sum(encoder.table_sizes.values()), 4, generator=generator)
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, 4, embedding=table)
    torch.manual_seed(0)
    mlp = MaskedMLP(inputs.out_features, hidden=(32, 16), tasks=("ctr", "cvr"))
    for task, mask in random_masks(mlp.mask("ctr").shapes, 0.25, mlp.tasks, generator).items():
        mlp.set_mask(mask, task)
    return Ranker(encoder, inputs, freeze(mlp, sigmoid=True))


RANKER = ranker_of()
MODEL = to_onnx(RANKER)


def ids_of(features: EncodedFeatures) -> tuple[torch.Tensor, ...]:
    return padded_ids(features, RANKER.encoder.fields)


def assert_scores(ranker: Ranker, scores, features) -> None:
    """Fail unless scores, one tensor per task, are the network's of the inputs that the ids have."""
    x = ranker.inputs(features)
    for task, found in zip(ranker.tasks, scores, strict=True):
        layers = [Layer(*ranker.mlp.network.layer(i, task)) for i in range(3)]
        assert_rounding(found[:, None], mlp_reference(x, layers))


bags = st.lists(st.sampled_from(["a", "b", "new"]), max_size=2)
rows = st.lists(
    st.tuples(st.integers(0, 4), bags, st.none() | st.integers(5, 9), st.lists(st.integers(1, 4), max_size=2)),
    max_size=5,
)


@given(rows)
def test_every_form_of_a_ranker_scores_alike(batch):
    columns = {name: [row[i] for row in batch] for i, name in enumerate(COLUMNS)}
    features = RANKER.encoder.encode(columns)
    assert_scores(RANKER, map(torch.from_numpy, RANKER.score(columns).values()), features)
    ids = ids_of(features)
    for module in (RANKER.to_dense(), RANKER.to_module()):
        scores = module(*ids)
        assert list(scores) == ["ctr", "cvr"]
        assert_scores(RANKER, scores.values(), features)
    assert_scores(RANKER, runtime(MODEL, *ids), features)


def test_sparse_initializers_score_alike():
    features = RANKER.encoder.encode(COLUMNS)
    written = to_onnx(RANKER, sparse=True)
    assert len(written.graph.sparse_initializer) == 4
    assert_scores(RANKER, runtime(written, *ids_of(features)), features)


def test_only_single_valued_fields():
    ranker = ranker_of(multi=False)
    features = ranker.encoder.encode({"item": [1, 9], "hour": [None, 5]})
    ids = padded_ids(features, ranker.encoder.fields)
    assert_scores(ranker, ranker.to_dense()(*ids).values(), features)
    assert_scores(ranker, runtime(to_onnx(ranker), *ids), features)


def test_one_field():
    ranker = ranker_of(multi=False)
    (field, *_), sizes = ranker.encoder.fields, ranker.encoder.table_sizes
    inputs = CrossedEmbeddings([field], {field.table: sizes[field.table]}, 4)
    torch.manual_seed(0)
    mlp = freeze(MaskedMLP(4, hidden=(8,), tasks=("ctr",)), sigmoid=True)
    alone = Ranker(ranker.encoder, inputs, mlp)
    ids = torch.tensor([0, 1, 2])
    x = inputs.embedding[ids]
    reference = mlp_reference(x, [Layer(*mlp.network.layer(i, "ctr")) for i in range(2)])
    assert_rounding(alone.to_dense()(ids)["ctr"][:, None], reference)
    assert_rounding(runtime(to_onnx(alone), ids)[0][:, None], reference)


def test_the_model_has_an_input_per_field_and_an_output_per_task():
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*MODEL.graph.input, *MODEL.graph.output)
    }
    assert shapes == {
        "item": ["batch"],
        "hour": ["batch"],
        "tags": ["batch", "values of tags"],
        "past": ["batch", "values of past"],
        "ctr": ["batch"],
        "cvr": ["batch"],
    }
    assert [field.column for field in RANKER.to_module().fields] == ["item", "hour", "tags", "past"]


def test_what_is_written_runs_in_the_engine_when_it_is_read():
    module, features = from_onnx(MODEL), RANKER.encoder.encode(COLUMNS)
    assert (module.parts, len(module.calls)) == (2, 2)
    assert_scores(RANKER, module(*ids_of(features)), features)


def test_dense_modules_are_torchs_own():
    kinds = {type(module).__module__.partition(".")[0] for module in RANKER.to_dense().tables.modules()}
    assert kinds == {"torch"}
    names = {type(m).__name__ for m in RANKER.to_dense().modules()}
    assert names == {"RankerModule", "ModuleList", "Embedding", "DenseTasks", "Sequential", "Linear", "ReLU", "Sigmoid"}
    assert "SparseMLP" in {type(m).__name__ for m in RANKER.to_module().modules()}
    memory = RANKER.inputs.embedding.untyped_storage().data_ptr()
    assert all(table.weight.untyped_storage().data_ptr() == memory for table in RANKER.to_module().tables)


@pytest.mark.parametrize("is_dense", [True, False])
def test_torch_exports_it_for_any_batch(is_dense):
    module, features = RANKER.to_dense() if is_dense else RANKER.to_module(), RANKER.encoder.encode(COLUMNS)
    ids = ids_of(features)
    batch = torch.export.Dim("batch", min=1, max=1024)
    shapes = tuple({0: batch, **({1: torch.export.Dim(f"values{i}", max=64)} if i > 1 else {})} for i in range(4))
    program = torch.export.export(module, ids, dynamic_shapes=(shapes,))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("sparse_mlp" in name for name in operators) == (not is_dense)
    again = RANKER.encoder.encode({name: values * 2 for name, values in COLUMNS.items()})
    for of_rows in (features, again):
        assert_scores(RANKER, program.module()(*ids_of(of_rows)).values(), of_rows)


def test_wrong_ids_are_refused():
    module, ids = RANKER.to_module(), ids_of(RANKER.encoder.encode(COLUMNS))
    with pytest.raises(ValueError, match="ids: got 3 tensors, wanted 4, one per field"):
        module(*ids[:3])
    with pytest.raises(ValueError, match=r"tags: got shape \(3,\), wanted \[batch, values\]"):
        module(*ids[:2], ids[0], ids[3])
    size = len(module.tables[0].weight)
    for place, value in ((0, -1), (0, size), (2, -2), (2, 99)):
        wrong = [x.clone() for x in ids]
        wrong[place].view(-1)[0] = value
        with pytest.raises(IndexError):
            module(*wrong)
        with pytest.raises(Exception, match="out of data bounds"):
            runtime(MODEL, *wrong)


def test_padding_changes_no_bit():
    features = RANKER.encoder.encode({**COLUMNS, "tags": [["a"], ["new"], []]})
    tags = ids_of(features)[2]
    assert tags.shape == (3, 1)
    assert tags[1] == 1
    assert tags[2] == -1
    wider = torch.cat([tags, torch.full((3, 4), -1)], 1)
    ids = list(ids_of(features))
    first = RANKER.to_dense()(*ids)
    ids[2] = wider
    second = RANKER.to_dense()(*ids)
    for task in first:
        assert_exact(second[task], first[task])


def test_an_empty_request_has_all_fields():
    features = RANKER.encoder.encode({name: [] for name in COLUMNS})
    assert [tuple(ids.shape) for ids in ids_of(features)] == [(0,), (0,), (0, 0), (0, 0)]
    assert [tuple(ids.shape) for ids in padded_ids(features, RANKER.to_module().fields)] == [(0,), (0,), (0, 0), (0, 0)]
    assert all(scores.shape == (0,) for scores in RANKER.to_module()(*ids_of(features)).values())


def test_ids_of_other_fields_are_refused():
    features = RANKER.encoder.encode(COLUMNS)
    with pytest.raises(ValueError, match="features: got 2 ids and 6 bags, wanted 2 per row and 3"):
        padded_ids(features, RANKER.encoder.fields[:-1])
    with pytest.raises(ValueError, match="features: got 2 ids and 6 bags, wanted 1 per row and 6"):
        padded_ids(features, RANKER.encoder.fields[1:])


def test_a_column_with_the_name_of_a_task_is_refused():
    ranker = ranker_of(multi=False)
    fields = [field._replace(column="ctr") for field in ranker.inputs.fields]
    inputs = CrossedEmbeddings(fields, ranker.inputs.table_sizes, 4, embedding=ranker.inputs.embedding.detach())
    with pytest.raises(ValueError, match="names: got 'ctr'"):
        to_onnx(Ranker(ranker.encoder, inputs, ranker.mlp))


def test_other_precisions_are_not_written():
    with pytest.raises(ValueError, match="module: got precision bf16, wanted fp32"):
        to_onnx(RANKER.to_precision("bf16"))


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_rounded_embeddings_become_float32(kind):
    ranker = Ranker(RANKER.encoder, RANKER.inputs.rounded(kind), RANKER.mlp)
    features = ranker.encoder.encode(COLUMNS)
    ids = ids_of(features)
    for scores in (ranker.to_dense()(*ids), ranker.to_module()(*ids)):
        assert_scores(ranker, scores.values(), features)
    assert_scores(ranker, [torch.as_tensor(y) for y in runtime(to_onnx(ranker), *ids)], features)


def test_a_table_that_is_elsewhere_is_named():
    ranker = Ranker(RANKER.encoder, RANKER.inputs.without(["item"]), RANKER.mlp)
    for export in (ranker.to_dense, ranker.to_module, lambda: to_onnx(ranker)):
        with pytest.raises(ValueError, match="embeddings: got none of table item, wanted those of all"):
            export()
