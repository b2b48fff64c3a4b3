"""A model that goes on with later days: what stays, what is added, and that an interrupted update ends the same."""

import fcntl
import json
import shutil
from dataclasses import replace
from functools import partial

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from oracle import assert_exact

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.lottery import random_masks
from lt4rec_sparse.nn import MaskedMLP, SparseMLP
from lt4rec_sparse.ranker import Ranker, load, save
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.daily import UpdateSettings, update
from lt4rec_sparse.recsys.data import DataError, Prepared, prepare
from lt4rec_sparse.recsys.frozen import calibrated
from lt4rec_sparse.recsys.harness import starts
from lt4rec_sparse.recsys.models import SparseSharing
from lt4rec_sparse.recsys.training import train
from lt4rec_sparse.recsys.training.evaluation import evaluate

TASKS = ("ctr", "cvr")
SETTINGS = UpdateSettings(batch_size=256)


@pytest.fixture(scope="module")
def ranker(small_log):
    """A model of the first days of a log, which nobody trained."""
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(small_log.encoder.fields, small_log.encoder.table_sizes, 4)
    model = SparseSharing(inputs, TASKS, (16, 8))
    masks = random_masks(model.mlp.mask("ctr").shapes, 0.4, TASKS, torch.Generator().manual_seed(0), "16x4")
    model.mlp.set_mask(masks)
    return Ranker(small_log.encoder, model.inputs, calibrated(model, small_log))


@pytest.fixture(scope="module")
def artefact(ranker, tmp_path_factory):
    path = tmp_path_factory.mktemp("artefact") / "model.safetensors"
    save(ranker, path)
    return path


@pytest.fixture(scope="module")
def updated(artefact, small_folder, tmp_path_factory):
    """An update that nobody interrupted; tests do not change it."""
    torch.use_deterministic_algorithms(True)
    out = tmp_path_factory.mktemp("updates") / "whole"
    update(artefact, small_folder, out, SETTINGS)
    torch.use_deterministic_algorithms(False)
    return out


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_masks_and_known_ids_stay_and_weights_move(ranker, updated):
    after = load(updated / "model.safetensors")
    pairs = list(zip(ranker.mlp.network.hidden, after.mlp.network.hidden, strict=True))
    for old, new in pairs:
        assert type(old.weight) is type(new.weight) and torch.equal(old.weight.bitmask, new.weight.bitmask)
        assert not torch.equal(old.weight.values, new.weight.values)
    for name, keys in ((name, ranker.encoder.table(name)) for name in ranker.inputs.table_sizes):
        if hasattr(keys, "keys"):
            assert list(after.encoder.table(name).keys)[: len(keys.keys)] == list(keys.keys)
    assert after.encoder.until == "2024-01-05" and after.encoder.schema == ranker.encoder.schema
    assert after.mlp.network.quantization is not None


def test_rows_of_ids_that_no_new_day_has_stay_to_the_bit(ranker, updated):
    after = load(updated / "model.safetensors")
    # Of all tables: which ids the training days look up, found from the prepared rows and not from the training.
    prepared = Prepared.load(updated / "data")
    looked_up = {table: set() for table in after.inputs.table_sizes}
    single = [field for field in prepared.encoder.fields if not field.multi]
    bags = [field for field in prepared.encoder.fields if field.multi]
    for batch in prepared.stream("train", 512, shuffle=False).epoch(0):
        for place, field in enumerate(single):
            looked_up[field.table].update(batch.features.single[:, place].tolist())
        for place, field in enumerate(bags):
            ends = batch.features.multi_offsets[[place * batch.batch, (place + 1) * batch.batch]].tolist()
            looked_up[field.table].update(batch.features.multi_values[slice(*ends)].tolist())
    stayed = 0
    for table, rows in ranker.inputs.tables().items():
        still = [row for row in range(len(rows)) if row not in looked_up[table]]
        assert_exact(after.inputs.table(table)[still], rows[still])
        stayed += len(still)
    assert stayed > 0


def test_the_report_has_both_models_on_days_that_train_neither(ranker, small_folder, updated):
    results = results_of(updated)
    assert results["days"] == {"train": ["2024-01-03", "2024-01-04", "2024-01-05"], "validation": ["2024-01-06"]}
    assert results["steps"] == -(-results["rows"]["train"] // 256)
    after = load(updated / "model.safetensors")
    for name, rows in results["grown"].items():
        assert (rows["before"], rows["after"]) == (ranker.inputs.table_sizes[name], after.inputs.table_sizes[name])
    assert sum(rows["after"] - rows["before"] for rows in results["grown"].values()) > 0
    page = (updated / "report.md").read_text()
    for part in ("Masks are as they were", "moments of Adam at zero", "neither was trained on", "embeddings fp32"):
        assert part in page
    for task in TASKS:
        assert f"| {task} | " in page
    text = (updated / "metrics.jsonl").read_text()
    assert [json.loads(line)["stage"] for line in text.splitlines()] == ["before", "trained", "trained", "trained"]


def test_the_model_before_is_the_old_one_for_rows_of_new_ids_too(ranker, small_log, updated):
    """Its figures are those of its own encoder, to which new ids are unseen values."""
    model = SparseSharing(ranker.inputs, TASKS, (16, 8))
    model.mlp = MaskedMLP.from_network(ranker.mlp.network)
    last = small_log.stream("test", 4096, shuffle=False)
    last._windows = last._windows[1:]  # of two days the last one
    wanted = evaluate(model, last, {"ctr": "binary", "cvr": "ratio"})["all"]
    assert results_of(updated)["before"] == wanted


class StopError(Exception):
    pass


def test_an_update_that_stops_while_it_trains_ends_as_if_it_had_not(
    artefact, small_folder, updated, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def stop(batch, done, total):
        if done == 8:
            raise StopError

    short = partial(train, checkpoint_every=3)
    monkeypatch.setattr(starts, "train", partial(short, after_batch=stop))
    with pytest.raises(StopError):
        update(artefact, small_folder, out, SETTINGS)
    assert list(out.glob("*.checkpoint.pt")) and not (out / "model.safetensors").exists()
    seen = []
    monkeypatch.setattr(starts, "train", partial(short, after_batch=lambda batch, done, total: seen.append(done)))
    update(artefact, small_folder, out, SETTINGS)
    assert seen[0] == 7  # batches 1 to 6 were saved
    for name in ("model.safetensors", "trained.safetensors"):
        assert (out / name).read_bytes() == (updated / name).read_bytes()
    assert {key: value for key, value in results_of(out).items() if key != "seconds"} == {
        key: value for key, value in results_of(updated).items() if key != "seconds"
    }
    assert not list(out.rglob("*checkpoint*")) + list(out.rglob("*.tmp"))


def test_a_finished_update_is_not_repeated_and_other_settings_are_refused(artefact, small_folder, updated, tmp_path):
    out = shutil.copytree(updated, tmp_path / "copy")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    stages = []
    update(artefact, small_folder, out, SETTINGS, lambda stage, done, total: stages.append(stage))
    assert not stages and {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    for changes, message in (
        ({"learning_rate": 0.01}, "got learning_rate = 0.001, wanted 0.01; choose another --out"),
        ({"days": "2024-01-03..2024-01-05"}, "got days = None, wanted 2024-01-03..2024-01-05; choose another --out"),
    ):
        with pytest.raises(InputError, match=message):
            update(artefact, small_folder, out, replace(SETTINGS, **changes))
    with pytest.raises(InputError, match="got model = "):
        update(_other(artefact, tmp_path), small_folder, out, SETTINGS)


def _other(artefact, folder):
    path = folder / "other.safetensors"
    save(load(artefact), path, "fp16")
    return path


def test_a_folder_in_use_and_the_artefacts_own_are_refused(artefact, small_folder, updated, tmp_path):
    out = shutil.copytree(updated, tmp_path / "copy")
    with (out / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process works in this folder"):
            update(artefact, small_folder, out, SETTINGS)
    with pytest.raises(InputError, match=r"got model\.safetensors of something else, wanted a folder for this update"):
        update(artefact, small_folder, artefact.parent, SETTINGS)
    with pytest.raises(InputError, match=r"config\.json: got model = .*, wanted .*; choose another --out"):
        update(out / "model.safetensors", small_folder, out, SETTINGS)


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_rounded_artefacts_start_from_what_they_hold_and_stay_as_they_were(ranker, small_folder, tmp_path, kind):
    network = ranker.mlp.network.to(torch.bfloat16).with_quantization(None)
    old = Ranker(ranker.encoder, ranker.inputs, SparseMLP(network))
    save(old, tmp_path / "old.safetensors", kind)
    update(tmp_path / "old.safetensors", small_folder, tmp_path / "out", replace(SETTINGS, batch_size=4096))
    new = load(tmp_path / "out" / "model.safetensors")
    assert new.inputs.kind == kind and new.mlp.network.dtype == torch.bfloat16
    assert new.mlp.network.quantization is None
    start = f"embeddings {kind}, network bfloat16"
    assert start in (tmp_path / "out" / "report.md").read_text()


def test_attention_goes_on_and_scales_of_raw_numbers_stay(small_log, small_folder, tmp_path):
    parts = small_log.schema.to_dict()
    columns = [{**c, "encoding": "standardised"} if c["name"] == "duration_ms" else c for c in parts["columns"]]
    histories = [{**h, "columns": ["video_id", "author_id"], "pooling": "attention"} for h in parts["histories"]]
    schema = Schema.from_dict({**parts, "columns": columns, "histories": histories})
    folder = shutil.copytree(small_folder, tmp_path / "log")
    (folder / "schema.toml").write_text(schema.to_toml())
    prepared = prepare(folder, tmp_path / "data", schema)
    encoder = prepared.encoder
    torch.manual_seed(0)
    how = {"numbers": encoder.n_numbers, "attention": encoder.attention}
    model = SparseSharing(CrossedEmbeddings(encoder.fields, encoder.table_sizes, 4, **how), TASKS, (8,))
    old = Ranker(encoder, model.inputs, calibrated(model, prepared))
    save(old, tmp_path / "old.safetensors")
    new = load(update(tmp_path / "old.safetensors", folder, tmp_path / "out", SETTINGS).model)
    assert new.inputs.attention == old.inputs.attention and len(new.inputs.units) == 2
    for before, after in zip(old.inputs.units.parameters(), new.inputs.units.parameters(), strict=True):
        assert not torch.equal(before, after)
    arrays = (ranker.encoder.scale("duration_ms").to_arrays() for ranker in (old, new))
    for before, after in zip(*(part.values() for part in arrays), strict=True):
        assert (before == after).all()


def test_what_cannot_be_trained_is_refused_before_the_log_is_read(ranker, tmp_path):
    path = tmp_path / "model.safetensors"
    save(ranker, path, without=["video_id"])
    with pytest.raises(InputError, match="cannot be trained: embeddings: got none of table video_id"):
        update(path, tmp_path / "none", tmp_path / "out", SETTINGS)
    hidden = tuple(layer._replace(activation="silu") for layer in ranker.mlp.network.hidden)
    save(Ranker(ranker.encoder, ranker.inputs, SparseMLP(replace(ranker.mlp.network, hidden=hidden))), path)
    with pytest.raises(InputError, match="cannot be trained: layer 0: got activation silu, wanted relu"):
        update(path, tmp_path / "none", tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: got 0.0, wanted more than 0"),
        ({"batch_size": 0}, "batch_size: got 0, wanted at least 1"),
        ({"embeddings": "fp8"}, "embeddings: got 'fp8', wanted one of fp32, fp16, int8"),
        ({"seed": -1}, "seed: got -1, wanted 0 to"),
        ({"clip_norm": -1.0}, "clip_norm: got -1.0, wanted 0 or more"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        UpdateSettings(**changes)


def test_validation_days_of_one_class_are_refused(artefact, small_folder, tmp_path):
    folder = shutil.copytree(small_folder, tmp_path / "log")
    path = folder / "log" / "2024-01-06.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.filter(pc.equal(rows["is_click"], 1)), path)
    message = "validation days: got only labels 1 of ctr on 2024-01-06, wanted 0 and 1"
    with pytest.raises(DataError, match=message):
        update(artefact, folder, tmp_path / "out", SETTINGS)
    # With others the same folder goes on.
    update(artefact, folder, tmp_path / "out", replace(SETTINGS, days="2024-01-03..2024-01-05"))
    with pytest.raises(DataError, match=r"split 'validation': got .* rows and none of task 'cvr', wanted some"):
        pq.write_table(rows.filter(pc.equal(rows["is_click"], 0)), path)
        update(artefact, folder, tmp_path / "other", SETTINGS)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("sparse_gradients", [False, True])
def test_the_log_trains_once_and_in_order(artefact, small_folder, tmp_path, monkeypatch, sparse_gradients):
    moments = []

    def noted(batch, done, total):
        moments.append(batch.values["time_ms"])

    monkeypatch.setattr(starts, "train", partial(train, after_batch=noted))
    settings = replace(SETTINGS, days="2024-01-03..2024-01-05", sparse_gradients=sparse_gradients, sparse_steps=False)
    update(artefact, small_folder, tmp_path / "out", settings)
    seen = torch.cat(moments)
    assert len(seen) == results_of(tmp_path / "out")["rows"]["train"] and bool((seen.diff() >= 0).all())
    assert results_of(tmp_path / "out")["days"]["train"] == ["2024-01-03", "2024-01-04"]
