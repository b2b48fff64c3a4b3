"""What a file may hold: version 1 for ever, every fitted table, and nothing that is not an artefact."""

from __future__ import annotations

import copy
import json
import math
import re
import stat
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lt4rec_sparse import MaskedMLP, Ranker, SparseMLP, checked_file, freeze, load, save
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.formats import BlockWeight
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.ranker import ArtefactError
from lt4rec_sparse.ranker.artefact import KEY, network_from_tensors, network_to_tensors
from lt4rec_sparse.ranker.features import FeatureEncoder, Schema
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings

# With the scores that they gave. Version 1 was written by the code of commit cb0158c, which defined the format; 2, of
# blocks with ragged edges, by that of aac1169; 3, of int8 rows, a table elsewhere, slopes and bfloat16 weights, by the
# first that wrote digests; 4, of Dice, 5, of raw numbers and vectors, and 6, of attention
# and last values, by the first that had them.
GOLDEN = {version: Path(__file__).with_name(f"artefact_v{version}.safetensors") for version in (1, 2, 3, 4, 5, 6)}
VERSION_1 = GOLDEN[1]
EXPECTED = json.loads(VERSION_1.with_suffix(".json").read_text())


def contents(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write(path, meta, tensors):
    """Write an artefact with a right checksum, whatever is in it."""
    meta.pop("sha256", None)
    checked_file.write(path, KEY, meta, tensors)
    return path


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("version", GOLDEN)
@pytest.mark.skipif(not cpu.is_available(), reason="the scores are the engine's, to the bit")
def test_an_old_artefact_scores_as_it_did_to_the_bit(version, precision):
    # Embeddings are multiples of a power of two, so that every order of summation gives the same input of the MLP.
    expected = json.loads(GOLDEN[version].with_suffix(".json").read_text(encoding="utf-8"))
    given = {column: np.array(rows, np.float32) for column, rows in expected.get("embeddings", {}).items()}
    scores = load(GOLDEN[version], precision).score(expected["candidates"], given)
    assert {task: values.tolist() for task, values in scores.items()} == expected["scores"][precision]
    assert contents(GOLDEN[version])[0]["version"] == version


def test_an_artefact_of_version_1_is_written_as_it_was(tmp_path):
    save(load(VERSION_1), tmp_path / "again.safetensors")
    (old, old_tensors), (new, new_tensors) = contents(VERSION_1), contents(tmp_path / "again.safetensors")
    assert set(new.pop("digests")) == set(new_tensors)  # which files did not have then
    assert new | {"sha256": None} == old | {"sha256": None}
    assert new_tensors.keys() == old_tensors.keys()
    assert all(torch.equal(new_tensors[name], old_tensors[name]) for name in old_tensors)


def test_the_weights_of_a_loaded_ranker_are_the_files_own_memory():
    ranker = load(VERSION_1)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(VERSION_1) in line]
    spans = [[int(end, 16) for end in fields[0].split("-")] for fields in maps]
    for tensor in (ranker.inputs.embedding, *(layer.weight.values for layer in ranker.mlp.network.hidden)):
        assert any(first <= tensor.data_ptr() < last for first, last in spans)


def test_others_may_read_an_artefact(tmp_path):
    save(load(VERSION_1), tmp_path / "model.safetensors")
    (tmp_path / "beside").touch()
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "beside").stat().st_mode
    )


# Fitted tables


COLUMNS = {
    "price": {"kind": "dense"},
    "colour": {},
    "video": {"type": "int", "min_count": 2},
    "tags": {"kind": "multi"},
    "seen": {"kind": "multi", "type": "int"},
    "shop": {"encoding": "hash", "size": 5},
}
EMPTY = {
    "price": [[7.5] * 3, [None] * 3, [float("nan")] * 3],
    "colour": [[None] * 3],
    "video": [[1, 2, 3], [None] * 3],
    "tags": [[[]] * 3, [[None]] * 3],
    "seen": [[[]] * 3],
    "shop": [[None] * 3],
}
FULL = {
    "price": [1, 2, 3],
    "colour": ["a"] * 3,
    "video": [1] * 3,
    "tags": ["a"] * 3,
    "seen": [[1]] * 3,
    "shop": ["a"] * 3,
}


def ranker_of(columns):
    schema = Schema.from_dict(
        {
            "name": "test",
            "files": {"log": ["*.csv"]},
            "time": {"day": "date"},
            "group": {"column": "user"},
            "columns": [{"name": name, **COLUMNS[name]} for name in columns],
            "tasks": [{"name": "ctr", "kind": "binary", "label": "click"}],
        }
    )
    encoder = FeatureEncoder.fit(schema, [columns])
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, dim=2)
    return Ranker(encoder, inputs, freeze(MaskedMLP(inputs.out_features, (4,), tasks=("ctr",)), sigmoid=True))


@pytest.mark.parametrize(
    "columns",
    [
        *({name: values} for name, cases in EMPTY.items() for values in cases),
        *(FULL | {name: values} for name, cases in EMPTY.items() for values in cases),
        {name: cases[0] for name, cases in EMPTY.items()},
        FULL,
    ],
    ids=str,
)
def test_a_table_that_nothing_was_fitted_to_is_saved_loaded_and_scores(tmp_path, columns):
    ranker = ranker_of(columns)
    save(ranker, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.encoder.table_sizes == ranker.encoder.table_sizes
    for batch in (columns, {name: FULL[name] for name in columns}):
        assert np.array_equal(loaded.score(batch)["ctr"], ranker.score(batch)["ctr"])


# How embeddings are held


def needed(tables):
    """Vectors of some rows for the columns of some tables, as a store of the trained embeddings would answer."""
    ranker = load(VERSION_1)
    features, inputs = ranker.encoder.encode(EXPECTED["candidates"]), ranker.inputs
    vectors = inputs.embed(features)
    return {field.column: vectors[:, i] for i, field in enumerate(inputs._ordered) if field.table in tables}


@pytest.mark.parametrize(("kind", "version"), [("fp32", 1), ("fp16", 1), ("int8", 3)])
def test_embeddings_stay_as_they_were_written(tmp_path, kind, version):
    original = load(VERSION_1)
    save(original, tmp_path / "first.safetensors", embeddings=kind)
    meta, tensors = contents(tmp_path / "first.safetensors")
    loaded = load(tmp_path / "first.safetensors")
    assert (meta["version"], loaded.inputs.kind) == (version, kind)
    assert loaded.inputs.nbytes == sum(t.nbytes for name, t in tensors.items() if name.startswith("inputs."))
    dense = Ranker(original.encoder, original.inputs.rounded(kind).rounded("fp32"), original.mlp)
    for task, scores in loaded.score(EXPECTED["candidates"]).items():
        assert np.array_equal(scores, dense.score(EXPECTED["candidates"])[task])
    save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "first.safetensors").read_bytes()
    spans = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "first.safetens" in line]
    held = loaded.inputs.embedding if kind == "fp32" else loaded.inputs.embedding.values
    ends = [[int(end, 16) for end in span.split("-")] for span in spans]
    assert any(first <= held.data_ptr() < last for first, last in ends), "read from the mapped file"


def test_in_halves_and_int8_the_file_is_as_small_as_it_says(tmp_path):
    original = load(VERSION_1)
    rows, dim = original.inputs.embedding.shape
    sizes = {kind: rows * (dim + 4) if kind == "int8" else rows * dim * 2 for kind in ("fp16", "int8")}
    for kind, size in sizes.items():
        save(original, tmp_path / kind, embeddings=kind)
        assert load(tmp_path / kind).inputs.nbytes == size


def test_the_file_is_specified_to_the_byte(tmp_path):
    ranker = ranker_of({"colour": ["a", "b"]})
    ranker.inputs.embedding.data = torch.tensor([[0.0, 0.0], [127.0, -3.0], [0.5, -0.5], [-254.0, 4.0]])
    save(ranker, tmp_path / "m.safetensors", embeddings="int8")
    _, tensors = contents(tmp_path / "m.safetensors")
    assert tensors["inputs.embedding"].tolist() == [[0, 0], [127, -3], [127, -127], [-127, 2]]
    assert tensors["inputs.embedding"].dtype == torch.int8
    assert torch.equal(tensors["inputs.scales"], torch.tensor([0.0, 1.0, 0.5 / 127, 2.0]))


def test_tables_that_are_elsewhere_are_not_in_the_file(tmp_path):
    original = load(VERSION_1)
    tables = list(original.encoder.table_sizes)[:2]
    save(original, tmp_path / "m.safetensors", without=tables)
    meta, tensors = contents(tmp_path / "m.safetensors")
    rows = sum(size for table, size in original.encoder.table_sizes.items() if table not in tables)
    assert (meta["version"], meta["without"], len(tensors["inputs.embedding"])) == (3, tables, rows)
    loaded, vectors = load(tmp_path / "m.safetensors"), needed(tables)
    wanted = original.score(EXPECTED["candidates"])
    rest = {name: values for name, values in EXPECTED["candidates"].items() if name not in vectors}
    for task, scores in loaded.score(rest, embeddings=vectors).items():
        assert np.array_equal(scores, wanted[task])
    with pytest.raises(
        InputError, match=rf"embeddings of '\w+': got none, .* since table '{tables[0]}' is absent here"
    ):
        loaded.score(EXPECTED["candidates"])
    save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    save(original, tmp_path / "none.safetensors", "int8", without=list(original.encoder.table_sizes))
    assert not load(tmp_path / "none.safetensors").inputs.nbytes


def test_a_table_that_is_elsewhere_already_may_be_named_again(tmp_path):
    original = load(VERSION_1)
    first, second = list(original.encoder.table_sizes)[:2]
    save(original, tmp_path / "first.safetensors", without=[first])
    loaded = load(tmp_path / "first.safetensors")
    save(loaded, tmp_path / "again.safetensors", without=[first])
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "first.safetensors").read_bytes()
    save(loaded, tmp_path / "both.safetensors", without=[first, second])
    assert contents(tmp_path / "both.safetensors")[0]["without"] == [first, second]


@pytest.mark.parametrize("blocks", [False, True])
def test_a_slope_per_output_has_its_version_and_comes_back(tmp_path, blocks):
    original = load(VERSION_1)
    first, *rest = original.mlp.network.hidden
    weight = first.weight
    if blocks:
        dense = {task: torch.ones(weight.shape, dtype=torch.bool) for task in original.tasks}
        weight = BlockWeight.from_dense(torch.randn(weight.shape), dense)
    least = 2 if blocks else 1
    slopes = torch.randn(3, weight.shape[0])
    for activation, slope, version in (("leaky_relu", slopes[0], 3), ("leaky_relu", 0.25, least), ("dice", slopes, 4)):
        hidden = (first._replace(weight=weight, activation=activation, slope=slope), *rest)
        network = replace(original.mlp.network, hidden=hidden)
        ranker = Ranker(original.encoder, original.inputs, SparseMLP(network))
        save(ranker, tmp_path / "m.safetensors")
        meta, tensors = contents(tmp_path / "m.safetensors")
        assert (meta["version"], "layers.0.slope" in tensors) == (version, version > least)
        for task, scores in load(tmp_path / "m.safetensors").score(EXPECTED["candidates"]).items():
            assert np.array_equal(scores, ranker.score(EXPECTED["candidates"])[task])


def test_what_cannot_be_written_leaves_no_file(tmp_path):
    ranker = load(VERSION_1)
    with pytest.raises(InputError, match="embeddings: got 'int4', wanted one of fp32, fp16, int8"):
        save(ranker, tmp_path / "m.safetensors", embeddings="int4")
    with pytest.raises(InputError, match="table: got 'shoe', wanted one of"):
        save(ranker, tmp_path / "m.safetensors", without=["shoe"])
    assert not any(tmp_path.iterdir())


# What a file may not hold


def in_int8(change):
    def of_rounded(meta, tensors):
        rounded = load(VERSION_1).inputs.rounded("int8").embedding
        tensors |= {"inputs.embedding": rounded.values, "inputs.scales": rounded.scales}
        meta["version"] = 3
        change(meta, tensors)

    return of_rounded


def changed(tmp_path, change):
    meta, tensors = contents(VERSION_1)
    change(meta, tensors)
    return write(tmp_path / "model.safetensors", meta, tensors)


def give_two_outputs(meta, tensors):
    for task in meta["tasks"]:
        tensors[f"heads.{task}.weight"] = tensors[f"heads.{task}.weight"].repeat(2, 1)
        tensors[f"heads.{task}.bias"] = tensors[f"heads.{task}.bias"].repeat(2)


def hash_videos(size, dim):
    def change(meta, tensors):
        meta["encoder"]["schema"]["columns"][0] |= {"encoding": "hash", "size": size, "min_count": 1}
        meta["dim"] = dim

    return change


def set_entry(*path, value):
    def change(meta, tensors):
        *parents, last = path
        for name in parents:
            meta = meta[name]
        meta[last] = value

    return change


def set_number(name, value):
    def change(meta, tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] = value

    return change


def repeat_a_tag(meta, tensors):
    text, (first, second, third) = tensors["encoder.tags.bytes"].clone(), tensors["encoder.tags.offsets"][:3].tolist()
    assert second - first == third - second
    text[second:third] = text[first:second]
    tensors["encoder.tags.bytes"] = text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (give_two_outputs, "mlp: got heads with 2 outputs, wanted one output per task: ctr, cvr"),
        # Terabytes, if they were made before being compared with what the file holds.
        (hash_videos(2**31 - 1, 2), r"embedding: got torch.float32 \(\d+, 2\), wanted torch.float32 \(2147483\d+, 2\)"),
        (hash_videos(2**31 - 1, 2**31 - 1), "network: got in_features 152, wanted 343"),
        (hash_videos(2**31, 2), "column 'video_id': got hash of kind='single', size=2147483648, wanted"),
        (set_entry("layers", 0, "shape", value=[2**31 - 1, 152]), "bitmask: got torch.uint8"),
        (set_entry("layers", 0, "shape", value=[2**62, 152]), r"layers\[0\]: got width 46116"),
        (set_entry("layers", 0, "shape", value=[12, 0]), r"layers\[0\]: got width 0, wanted a number from 1"),
        (set_entry("layers", 0, "activation", value="cos"), r"layers\[0\]: got activation 'cos', wanted one of none"),
        (set_entry("layers", 0, value=None), r"layers\[0\]: got None, wanted a shape and an activation"),
        (set_entry("layers", value={}), "layers: got {}, wanted a list"),
        (set_entry("tasks", value=[]), r"tasks: got \[\], wanted at least one name, each once"),
        (set_entry("tasks", value=["ctr", "ctr"]), "tasks: got .*, wanted at least one name, each once"),
        (set_entry("tasks", value=["ctr", ["cvr"]]), "tasks: got .*, wanted at least one name, each once"),
        (set_entry("tasks", value=["ctr", "buy"]), "heads.buy.weight: is absent"),
        (set_entry("dim", value=2.0), "dim: got width 2.0, wanted a number from 1"),
        (set_entry("encoder", value=[]), r"encoder: got \[\], wanted a table"),
        (set_entry("encoder", "format", value=None), "encoder format: got None, wanted 1"),
        (set_entry("encoder", "schema", value=3), "schema: got 3, wanted a table"),
        (set_entry("encoder", "schema", "histories", 0, "columns", value=["x"]), "history 'clicked': got column 'x'"),
        (set_entry("encoder", "context", value=["x"]), "context: got column 'x', wanted features"),
        (set_number("layers.0.compressed", math.nan), "layers.0.compressed: got NaN or Inf among"),
        (set_number("heads.cvr.bias", math.inf), "heads.cvr.bias: got NaN or Inf among 1 numbers, wanted finite ones"),
        (set_number("inputs.embedding", -math.inf), "inputs.embedding: got NaN or Inf among"),
        (in_int8(set_number("inputs.scales", math.nan)), "inputs.scales: got NaN or Inf among"),
        (in_int8(set_number("inputs.scales", -1.0)), "scales: got numbers from -1 to"),
        (in_int8(set_number("inputs.scales", 3e38)), r"scales: got numbers from .* to 3e\+38, wanted 0 to 2.6"),
        (in_int8(set_number("inputs.embedding", -128)), "values: got -128, wanted -127 to 127"),
        (in_int8(lambda meta, tensors: tensors.pop("inputs.scales")), "inputs.scales: is absent"),
        (in_int8(lambda meta, tensors: tensors.update({"inputs.scales": torch.zeros(2)})), "scales: got torch.float32"),
        (set_number("encoder.video_id.keys", 10), "encoder table 'video_id': keys: got 10 twice, wanted each once"),
        (set_number("encoder.tags.bytes", 0xFF), "encoder table 'tags': 'utf-8' codec can't decode byte 0xff"),
        (repeat_a_tag, "encoder table 'tags': keys: got 'tag .*' twice, wanted each once"),
        (set_entry("without", value=["shoe"]), r"without: got \['shoe'\], wanted some of"),
        (set_entry("without", value="video_id"), "without: got 'video_id', wanted some of"),
        (set_entry("without", value=["video_id", "video_id"]), "without: got .*, wanted some of .*, in order"),
        (set_entry("without", value=["video_id"]), r"embedding: got torch.float32 \(\d+, 2\), wanted torch.float32"),
    ],
)
def test_contents_that_cannot_be_served_are_refused(tmp_path, change, message):
    with pytest.raises(ArtefactError, match=rf"model\.safetensors: got contents that do not fit together: {message}"):
        load(changed(tmp_path, change))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": %s}' % ("9" * 5_000), "{", "[]", ""])
def test_metadata_that_is_no_json_object_is_refused(tmp_path, text):
    save_file({}, tmp_path / "model.safetensors", metadata={KEY: text})
    with pytest.raises(ArtefactError, match=r"model\.safetensors: got a damaged file \(metadata: got"):
        load(tmp_path / "model.safetensors")


def test_a_description_that_would_take_much_memory_is_refused_unread(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", checked_file.MAX_HEADER_BYTES + 1) + b"{}")
    with pytest.raises(ArtefactError, match=r"got a damaged file \(a header of 16,777,217 bytes, above 16,777,216\)"):
        load(path)
    ranker = ranker_of(FULL)
    ranker.encoder.schema = replace(ranker.encoder.schema, name="x" * checked_file.MAX_HEADER_BYTES)
    path.unlink()
    with pytest.raises(InputError, match=r"got a header of 16,7\d\d,\d+ bytes, wanted at most 16,777,216"):
        save(ranker, path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 10_000, "ä\n" * 900])
def test_a_long_name_makes_no_long_message(tmp_path, name):
    def rename(meta, tensors):
        meta["tasks"][0] = name

    with pytest.raises(ArtefactError) as caught:
        load(changed(tmp_path, rename))
    assert len(str(caught.value)) < 1_000
    assert "\n" not in str(caught.value)


def test_a_model_that_diverged_is_not_saved(tmp_path):
    ranker = ranker_of(FULL)
    ranker.inputs.embedding.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"inputs\.embedding: got NaN or Inf among \d+ numbers, wanted finite ones"):
        save(ranker, tmp_path / "model.safetensors")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shift", [1, 2, 3, 5])
def test_tensors_that_start_at_an_odd_place_score_alike(tmp_path, shift):
    """The safetensors format asks for no alignment, but a kernel that reads floats needs some."""
    content = VERSION_1.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length] + b" " * shift
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    ranker, wanted = load(tmp_path / "model.safetensors"), load(VERSION_1)
    for layer in ranker.mlp.network.hidden:
        assert all(part.data_ptr() % part.element_size() == 0 for part in (layer.weight.values, layer.bias))
    assert ranker.inputs.embedding.data_ptr() % 4 == 0
    for task, scores in ranker.score(EXPECTED["candidates"]).items():
        assert np.array_equal(scores, wanted.score(EXPECTED["candidates"])[task])


def test_a_network_is_what_it_was_stored_from():
    meta, tensors = contents(VERSION_1)
    network = network_from_tensors(tensors, meta)
    again, entries = network_to_tensors(network)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.items())
    assert entries == {name: meta[name] for name in ("tasks", "layers", "codes")}


# Any change at all


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 2**70, 10**400, -(2**70)]),
    st.floats(),
    st.sampled_from(["", "ctr", "relu", "multi", "dense", "hash", "int", "x\ny", "\ud800", "a" * 10_000]),
    st.sampled_from([[], {}, [[]], [None], {"a": {}}, [1, 2, 3], ["ctr"]]),
)
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float64,
    torch.bool,
)


def nodes(value, path=()):
    """Yield the path of every entry of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from nodes(item, (*path, key))


def mutate_json(data, meta):
    *parents, last = data.draw(st.sampled_from(list(nodes(meta))), label="entry")
    for key in parents:
        meta = meta[key]
    kind = data.draw(st.sampled_from(["replace", "delete", "repeat", "swap"]), label="change")
    if kind == "replace":
        meta[last] = data.draw(ODD, label="value")
    elif kind == "delete":
        del meta[last]
    elif isinstance(meta, list) and kind == "repeat":
        meta.append(meta[last])
    elif isinstance(meta, list):
        meta.reverse()
    else:
        meta[data.draw(st.sampled_from(["x", *meta]), label="name")] = meta.pop(last)


def mutate_tensor(data, tensors):
    name = data.draw(st.sampled_from(sorted(tensors)), label="tensor")
    tensor = tensors.pop(name)
    kind = data.draw(st.sampled_from(["drop", "rename", "cast", "cut", "flatten", "widen", "number"]), label="change")
    if kind == "rename":
        name = data.draw(st.sampled_from(["x", *sorted(tensors)]), label="name")
    elif kind == "cast":
        tensor = tensor.to(data.draw(st.sampled_from(DTYPES), label="dtype"))
    elif kind == "cut" and tensor.dim():
        tensor = tensor[: data.draw(st.integers(0, len(tensor)), label="length")].clone()
    elif kind == "flatten":
        tensor = tensor.reshape(data.draw(st.sampled_from([(-1,), (1, -1)])) if tensor.numel() else (0,)).clone()
    elif kind == "widen":
        tensor = torch.cat([tensor, tensor])
    elif kind == "number" and tensor.numel():
        tensor, place = tensor.clone(), data.draw(st.integers(0, tensor.numel() - 1), label="place")
        if tensor.is_floating_point():
            values = st.sampled_from([math.nan, math.inf, 3e38, -3e38, 1e-40, 0.0])
        else:
            values = st.integers(0, 255) if tensor.dtype == torch.uint8 else st.integers(-(2**31), 2**31 - 1)
        tensor.view(-1)[place] = data.draw(values, label="number")
    if kind != "drop":
        tensors[name] = tensor


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def original(request, tmp_path_factory):
    if request.param == "fp32":
        return contents(VERSION_1)
    path = tmp_path_factory.mktemp("rounded") / "model.safetensors"
    save(load(VERSION_1), path, request.param, without=["video_id"] if request.param == "int8" else ())
    return contents(path)


@settings(max_examples=8 * settings.default.max_examples)  # 120, or 400 in the check
@given(data=st.data())
def test_whatever_an_artefact_holds_it_is_served_or_refused(original, tmp_path_factory, data):
    meta, tensors = copy.deepcopy(original)
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        if data.draw(st.booleans(), label="in the metadata"):
            mutate_json(data, meta)
        else:
            mutate_tensor(data, tensors)
    path = write(tmp_path_factory.getbasetemp() / "mutant.safetensors", meta, tensors)
    precision = data.draw(st.sampled_from(["fp32", "bf16", "int8"]), label="precision")
    try:
        ranker = load(path, precision)
    except ArtefactError as error:
        assert re.fullmatch(r"[^\n]*mutant\.safetensors: [^\n]+", str(error))
        assert len(str(error)) < 1_000
        return
    batch = {column.name: [None] * 3 for column in ranker.encoder.schema.features}
    absent = [field.column for field in ranker.inputs.fields if field.table in ranker.inputs.absent]
    scores = ranker.score(batch, dict.fromkeys(absent, torch.zeros(1, ranker.inputs.dim)))
    assert scores.keys() == set(meta["tasks"])
    assert all(values.shape == (3,) for values in scores.values())
