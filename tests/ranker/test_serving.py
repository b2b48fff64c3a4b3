"""The artefact and the ranker: what is served is what was trained, and nothing damaged is served at all."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Layer, assert_exact, assert_rounding, mlp_reference
from safetensors import safe_open
from safetensors.torch import save_file

from lt4rec_sparse import MaskedMLP, Ranker, SparseMLP, freeze, load, save
from lt4rec_sparse.checked_file import _digest
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.formats import BlockWeight
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.network import PRECISIONS
from lt4rec_sparse.ranker import ArtefactError
from lt4rec_sparse.ranker.features import FeatureEncoder
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models import SparseSharing


@pytest.fixture(scope="module")
def model(small_log):
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(small_log.encoder.fields, small_log.encoder.table_sizes, dim=4, std=0.3)
    model = SparseSharing(inputs, ("ctr", "cvr"), (32, 16))
    generator = torch.Generator().manual_seed(0)
    for task in model.tasks:
        shapes = model.mlp.mask(task).shapes
        model.mlp.set_mask(Mask.random(shapes, {n: r * c // 5 for n, (r, c) in shapes.items()}, generator), task)
    return model.eval()


@pytest.fixture(scope="module")
def artefact(model, small_log, tmp_path_factory):
    path = tmp_path_factory.mktemp("artefact") / "model.safetensors"
    save(Ranker(small_log.encoder, copy.deepcopy(model.inputs), freeze(model.mlp, sigmoid=True)), path)
    return path


def test_served_equals_trained_for_every_task(model, artefact, small_log):
    ranker = load(artefact)
    for batch in small_log.stream("test", 256, shuffle=False).epoch(0):
        served = ranker.score_encoded(batch.features)
        with torch.no_grad():
            x = model.inputs(batch.features)
        for i, task in enumerate(model.tasks):
            mask = model.mlp.mask(task)
            layers = [
                Layer(layer.weight.detach() * mask[f"layers.{j}"], layer.bias.detach(), "relu")
                for j, layer in enumerate(model.mlp.masked_layers())
            ]
            head = model.mlp.heads[task]
            reference = mlp_reference(x, [*layers, Layer(head.weight.detach(), head.bias.detach(), "sigmoid")])
            assert_rounding(served[:, i : i + 1], reference)
            assert_rounding(torch.sigmoid(model(batch.features, task)).detach(), reference)


def test_saving_and_loading_change_no_bit(artefact, small_log, tmp_path):
    first = load(artefact)
    save(first, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == artefact.read_bytes()
    features = next(small_log.stream("test", 100, shuffle=False).epoch(0)).features
    assert_exact(load(tmp_path / "again.safetensors").score_encoded(features), first.score_encoded(features))


def without_context(encoder):
    """The same encoder, whose candidates have nothing in common: the network then reads all inputs in their order."""
    arrays, description = encoder.to_arrays()
    assert description.pop("context")
    return FeatureEncoder.from_arrays(arrays, description)


def in_blocks(network):
    """The same widths, every hidden layer kept in random blocks."""
    hidden = []
    for i, layer in enumerate(network.hidden):
        generator = torch.Generator().manual_seed(i)
        rows, columns = layer.weight.shape
        weight, masks = torch.randn(rows, columns, generator=generator), {}
        for task in network.tasks:
            grid = torch.rand(-(-rows // 16), -(-columns // 4), generator=generator) < 0.4
            masks[task] = grid.repeat_interleave(16, 0).repeat_interleave(4, 1)[:rows, :columns]
        hidden.append(layer._replace(weight=BlockWeight.from_dense(weight, masks)))
    return replace(network, hidden=tuple(hidden))


def test_blocks_are_saved_and_scored_as_the_weights_that_they_are(artefact, small_log, tmp_path):
    plain = load(artefact)
    network = in_blocks(plain.mlp.network)
    alone = replace(network, hidden=tuple(x._replace(weight=x.weight.as_shared()) for x in network.hidden))
    features = next(small_log.stream("test", 100, shuffle=False).epoch(0)).features
    encoder = without_context(plain.encoder)
    wanted = Ranker(encoder, plain.inputs, SparseMLP(alone)).score_encoded(features)
    for name, of_name, version in (("blocks", network, 2), ("alone", alone, 1)):
        path = tmp_path / f"{name}.safetensors"
        save(Ranker(encoder, plain.inputs, SparseMLP(of_name)), path)
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["lt4rec_sparse"])["version"] == version
        assert_exact(load(path).score_encoded(features), wanted)
    loaded = load(tmp_path / "blocks.safetensors").mlp.network
    for layer, original in zip(loaded.hidden, network.hidden, strict=True):
        assert isinstance(layer.weight, BlockWeight)
        assert_exact(layer.weight.values, original.weight.values)
        assert_exact(layer.weight.bitmask, original.weight.bitmask)


def candidates(small_log, n=5):
    """Raw values of made-up candidates, with every column of the schema."""
    rng = np.random.default_rng(0)
    batch = {}
    for column in small_log.schema.features:
        if column.kind == "dense":
            batch[column.name] = rng.random(n) * 100
        elif column.kind == "multi":
            batch[column.name] = [[1, 2] if column.type == "int" else ["a", "b"]] * n
        else:
            batch[column.name] = [int(i) if column.type == "int" else str(i) for i in range(n)]
    return batch


def test_score_from_raw_values(artefact, small_log):
    ranker = load(artefact)
    batch = candidates(small_log)
    scores = ranker.score(batch)
    assert set(scores) == {"ctr", "cvr"}
    assert all(s.shape == (5,) and s.dtype == np.float32 and ((s > 0) & (s < 1)).all() for s in scores.values())
    encoded = ranker.score_encoded(small_log.encoder.encode(batch)).numpy()
    assert np.array_equal(np.stack(list(scores.values()), 1), encoded)


def test_a_candidates_score_does_not_depend_on_the_others(artefact, small_log):
    ranker, batch = load(artefact), candidates(small_log, 40)
    whole = ranker.score(batch)
    for row in (0, 7, 39):
        alone = ranker.score({name: values[row : row + 1] for name, values in batch.items()})
        for task in whole:
            # The cross is a batched product of torch, whose order of summation may differ: float32 rounding remains.
            assert abs(float(alone[task][0]) - float(whole[task][row])) <= 2.0**-20


def test_what_a_request_has_once_is_sent_once(artefact, small_log):
    ranker, batch = load(artefact), candidates(small_log)
    names = list(batch)[::2]
    repeated = batch | {name: [batch[name][0]] * 5 for name in names}
    once = batch | {name: batch[name][:1] for name in names}
    for task, scores in ranker.score(once).items():
        assert np.array_equal(scores, ranker.score(repeated)[task])
    with pytest.raises(InputError, match=r"column '\w+': got 3 rows, wanted 5 as in '\w+', or 1"):
        ranker.score(batch | {names[-1]: batch[names[-1]][:3]})
    none = {name: values if name in names else values[:0] for name, values in once.items()}
    assert all(scores.shape == (0,) for scores in ranker.score(none).values())


@pytest.mark.parametrize("form", ["tensor", "array", "read only", "backwards", "by column"])
def test_embeddings_that_are_given_stand_in_for_columns(artefact, small_log, form):
    ranker, batch = load(artefact), candidates(small_log)
    embedded, fields = ranker.inputs.embed(ranker.encoder.encode(batch)), ranker.encoder.fields
    names = [fields[0].column, fields[-1].column]
    vectors = {field.column: embedded[:, i].clone() for i, field in enumerate(fields) if field.column in names}
    if form != "tensor":
        vectors = {name: of_name.numpy().copy() for name, of_name in vectors.items()}
        for of_name in vectors.values():
            of_name.flags.writeable = form != "read only"
    if form == "backwards":
        vectors = {name: of_name[::-1, ::-1].copy()[::-1, ::-1] for name, of_name in vectors.items()}
    if form == "by column":
        vectors = {name: np.asfortranarray(of_name) for name, of_name in vectors.items()}
    rest = {name: values for name, values in batch.items() if name not in names}
    wanted = ranker.score(batch)
    for task, scores in ranker.score(rest, vectors).items():
        assert np.array_equal(scores, wanted[task])
    everything = {field.column: embedded[:, i] for i, field in enumerate(fields)}
    for task, scores in ranker.score({}, everything).items():
        assert np.array_equal(scores, wanted[task])
    first = {name: of_name[:1] for name, of_name in vectors.items()}
    assert all(scores.shape == (5,) for scores in ranker.score(rest, first).values())


def test_embeddings_that_are_none_are_refused(artefact, small_log):
    ranker, batch = load(artefact), candidates(small_log)
    name = ranker.encoder.fields[0].column
    for vectors, got in (
        ([[0.0] * 4] * 5, "list"),
        (np.zeros((5, 4)), r"float64 \[5, 4\]"),
        (np.zeros((5, 4), np.int32), r"int32 \[5, 4\]"),
        (np.zeros(4, np.float32), r"float32 \[4\]"),
        (torch.zeros(4), r"torch.float32 \[4\]"),
    ):
        with pytest.raises(InputError, match=rf"embeddings of '{name}': got {got}, wanted a tensor, or an array of"):
            ranker.score(batch, {name: vectors})
    with pytest.raises(InputError, match=r"column '\w+': got 5 rows, wanted 3 as in"):
        ranker.score(batch, {name: torch.zeros(3, 4)})
    with pytest.raises(InputError, match="embeddings: got column 'shoe', wanted one of"):
        ranker.score(batch, {"shoe": torch.zeros(5, 4)})


def test_a_missing_column_is_named(artefact, small_log):
    batch = candidates(small_log)
    name = next(iter(batch))
    del batch[name]
    with pytest.raises(ValueError, match=name):
        load(artefact).score(batch)


@pytest.mark.parametrize("make", [float, np.float64, np.array, torch.tensor], ids=lambda make: make.__name__)
def test_a_number_is_no_column(artefact, small_log, make):
    batch = candidates(small_log)
    for column in small_log.schema.features:
        with pytest.raises(InputError, match=rf"column '{column.name}': got .*, wanted a sequence of values"):
            load(artefact).score(batch | {column.name: make(3.0)})


def test_a_column_of_several_dimensions_is_refused(artefact, small_log):
    batch = candidates(small_log)
    for column in small_log.schema.features:
        shape = (5, 2, 1) if column.kind == "multi" else (5, 2)
        with pytest.raises(InputError, match=rf"column '{column.name}': got .*, wanted a sequence of values"):
            load(artefact).score(batch | {column.name: np.ones(shape, np.int64)})


def test_no_candidates_give_no_scores(artefact, small_log):
    scores = load(artefact).score({name: values[:0] for name, values in candidates(small_log).items()})
    assert all(s.shape == (0,) for s in scores.values())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such file"):
        load(tmp_path / "nothing.safetensors")


@settings(max_examples=60)
@given(data=st.data())
def test_truncated_or_altered_files_are_refused(artefact, tmp_path_factory, data):
    contents = bytearray(artefact.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        contents = contents[: data.draw(st.integers(0, len(contents) - 1), label="length")]
    else:
        place = data.draw(st.integers(0, len(contents) - 1), label="place")
        contents[place] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    path.write_bytes(contents)
    with pytest.raises(ArtefactError, match=r"model\.safetensors"):
        load(path)


def rewritten(artefact, path, change):
    with safe_open(artefact, "pt") as file:
        meta = json.loads(file.metadata()["lt4rec_sparse"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(meta, tensors)
    save_file(tensors, path, metadata={"lt4rec_sparse": json.dumps(meta)})
    return path


def test_another_version_is_refused(artefact, tmp_path):
    path = rewritten(artefact, tmp_path / "m.safetensors", lambda meta, tensors: meta.update(version=99))
    with pytest.raises(ArtefactError, match="got version 99, wanted 1 or 2"):
        load(path)


def test_a_swapped_tensor_is_refused(artefact, tmp_path):
    def swap(meta, tensors):
        a, b = "heads.ctr.weight", "heads.cvr.weight"
        tensors[a], tensors[b] = tensors[b], tensors[a]

    with pytest.raises(ArtefactError, match="do not match their checksum"):
        load(rewritten(artefact, tmp_path / "m.safetensors", swap))


def test_other_safetensors_are_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ArtefactError, match="safetensors of another kind"):
        load(tmp_path / "m.safetensors")


# Precisions


@pytest.fixture(scope="module")
def calibrated(model, artefact, small_log, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrated") / "model.safetensors"
    with torch.inference_mode():
        rows = model.inputs(next(small_log.stream("train", 1000).epoch(0)).features)
    ranker = load(artefact)
    save(Ranker(ranker.encoder, ranker.inputs, ranker.mlp.calibrated(rows)), path)
    return path


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_artefact_is_loaded_in_any_precision(calibrated, artefact, small_log, precision):
    ranker, uncalibrated = load(calibrated, precision), load(artefact)
    assert ranker.precision == ranker.mlp.precision == precision
    features = next(small_log.stream("test", 100, shuffle=False).epoch(0)).features
    scores = ranker.score_encoded(features)
    assert_exact(scores, load(calibrated).to_precision(precision).score_encoded(features))
    in_order = Ranker(without_context(ranker.encoder), ranker.inputs, ranker.mlp)
    assert_exact(in_order.score_encoded(features), ranker.mlp(ranker.inputs(features)))
    # Calibration changes int8 only, and no precision changes the weights.
    assert_exact(ranker.to_precision("fp32").score_encoded(features), uncalibrated.score_encoded(features))
    assert torch.equal(scores, uncalibrated.score_encoded(features)) == (precision == "fp32")


def test_quantisation_parameters_are_kept_to_the_bit(calibrated, tmp_path):
    first = load(calibrated)
    save(first.to_precision("int8"), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == calibrated.read_bytes()
    again = load(tmp_path / "again.safetensors")
    assert again.mlp.network.quantization == first.mlp.network.quantization
    assert [len(of_task) for of_task in again.mlp.network.quantization.values()] == [3, 3]


def test_an_artefact_that_is_not_calibrated_has_no_entry_for_it(artefact, calibrated, tmp_path):
    keys = {"version", "tasks", "layers", "dim", "encoder", "sha256"}
    for path, wanted in ((artefact, keys), (calibrated, keys | {"codes"})):
        with safe_open(path, "pt") as file:
            meta = json.loads(file.metadata()["lt4rec_sparse"])
        assert set(meta) == wanted
        assert meta["version"] == 1


def test_int8_is_refused_without_calibration(artefact):
    with pytest.raises(
        ArtefactError, match="got no quantisation parameters, wanted an artefact that is calibrated for int8"
    ):
        load(artefact, "int8")
    assert load(artefact, "bf16").precision == "bf16"


def test_an_unknown_precision_is_refused(calibrated):
    with pytest.raises(InputError, match="precision: got 'fp8', wanted one of fp32, bf16, int8"):
        load(calibrated, "fp8")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    "codes",
    [
        {"ctr": [[0.1, 3]] * 3},
        {"ctr": [[0.1, 3]] * 3, "cvr": [[0.1, 3]] * 2},
        {"ctr": [[0.1, 3]] * 3, "cvr": [[0.1, 3], [0.1, 3], [0.0, 3]]},
        {"ctr": [[0.1, 3]] * 3, "cvr": [[0.1, 3], [0.1, 3], [float("nan"), 3]]},
        {"ctr": [[0.1, 3]] * 3, "cvr": [[0.1, 3], [0.1, 3], [float("inf"), 3]]},
        {"ctr": [[0.1, 3]] * 3, "cvr": [[0.1, 3], [0.1, 3], ["0.1", 3]]},
        {"ctr": [[0.1, 3]] * 3, "cvr": [[0.1, 3], [0.1, 3], [0.1, 256]]},
        {"ctr": [[0.1, 3]] * 3, "cvr": [[0.1, 3], [0.1, 3], [0.1, 2.5]]},
        {"ctr": [[0.1, 3]] * 3, "cvr": [[0.1, 3], [0.1, 3], [0.1]]},
        {"ctr": [[0.1, 3]] * 3, "cvr": [[0.2, 3], [0.1, 3], [0.1, 3]]},
        {"ctr": 1, "cvr": 2},
        [1, 2],
        "codes",
    ],
)
def test_quantisation_parameters_that_do_not_fit_are_refused(calibrated, tmp_path, codes, precision):
    def change(meta, tensors):
        meta["codes"] = codes
        del meta["sha256"]
        meta["sha256"] = _digest(meta, tensors)

    path = rewritten(calibrated, tmp_path / "m.safetensors", change)
    with pytest.raises(ArtefactError, match=r"m\.safetensors: got contents that do not fit together"):
        load(path, precision)


def test_a_ranker_wants_probabilities(model, small_log):
    with pytest.raises(ValueError, match="wanted sigmoid"):
        Ranker(small_log.encoder, copy.deepcopy(model.inputs), freeze(model.mlp))


def test_a_ranker_wants_one_output_per_task(model, small_log):
    wide = MaskedMLP(model.inputs.out_features, (8,), out_features=2, tasks=("ctr", "cvr"))
    with pytest.raises(ValueError, match="mlp: got heads with 2 outputs, wanted one output per task: ctr, cvr"):
        Ranker(small_log.encoder, copy.deepcopy(model.inputs), freeze(wide, sigmoid=True))


def test_importing_the_package_imports_no_reader_plotter_or_compiler():
    import subprocess
    import sys

    code = (
        "import sys, lt4rec_sparse; "
        "print([m for m in ('pyarrow', 'matplotlib', 'triton', 'typer', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
