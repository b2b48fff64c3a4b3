"""A whole run: a click log in, a frozen ranker and a report out, stopped and continued anywhere in between."""

import fcntl
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from oracle import Layer, assert_rounding, mlp_reference

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker import Ranker, load
from lt4rec_sparse.ranker.features import SchemaError
from lt4rec_sparse.recsys import frozen
from lt4rec_sparse.recsys import run as run_module
from lt4rec_sparse.recsys.data import DataError, Prepared
from lt4rec_sparse.recsys.harness import baselines, starts
from lt4rec_sparse.recsys.harness.by_rows import by_rows
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.rows import BASE, HARD, RANDOM_RESCALED, S_WEIGHT, S_WEIGHT_LAST, SMALL, Rows
from lt4rec_sparse.recsys.harness.settings import RunSettings, check_settings, locked, pin_settings
from lt4rec_sparse.recsys.harness.study import Resources
from lt4rec_sparse.recsys.run import MODEL, MODEL_LAST, run
from lt4rec_sparse.recsys.training import train

# A few blocks are all that so small a network has.
SETTINGS = RunSettings(
    hidden=(16, 8),
    embedding_dim=4,
    masks="tickets",
    rounds=2,
    density=0.2,
    granularity="weight",
    epochs=1,
    batch_size=512,
)
TASKS = ("ctr", "cvr")
ROWS = [BASE, HARD, HARD + SMALL, S_WEIGHT, S_WEIGHT_LAST]
HERE = Resources(executor="here")


def go(data, out, settings=SETTINGS, progress=lambda stage, done, total: None):
    return run(data, out, settings, progress, HERE)


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    """Time next to nothing, and spare such small models the threads, which only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "ROUNDS", 1)
        patch.setattr(frozen, "ROUND_US", 1.0)
        # The last tickets must be another model than the best ones, so that both are frozen.
        patch.setattr(Laboratory, "_best", lambda lab, task, tickets: tickets[1])
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(small_folder, tmp_path_factory):
    """A run that nobody interrupted; tests do not change it."""
    # As the tests of conftest's `poisoned_memory` run, which a fixture of this scope comes before.
    torch.use_deterministic_algorithms(True)
    out = tmp_path_factory.mktemp("runs") / "finished"
    go(small_folder, out)
    torch.use_deterministic_algorithms(False)
    return out


@pytest.fixture
def again(finished, tmp_path):
    """A copy of it, to be continued."""
    return shutil.copytree(finished, tmp_path / "again")


@pytest.fixture
def lab(finished):
    return Laboratory(Prepared.load(finished / "data"), finished)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def trial_of(row, masks="tickets", seed=0):
    rows = Rows(TASKS, SETTINGS.training, tuple(dict.fromkeys(TASKS, 1e-3).items()), SETTINGS.rounds)
    rows = replace(rows, top_k=SETTINGS.top_k)
    (found,) = (r for r in rows.product(masks) if r.key == row)
    return found.trials[0].at(seed, dict.fromkeys(TASKS, 1e-3))


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_leaves_all_that_it_says(finished):
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    plots = {f"plots/{name}.png" for name in ("tickets", "ownership", "latency")}
    reports = {"report.md", "report.html", "results.json", "config.json", "metrics.jsonl"}
    assert files >= plots | reports | {MODEL, MODEL_LAST, "data/prepared.json"}
    assert not [name for name in files if name.endswith(("tmp", "checkpoint.pt"))]


def test_every_row_of_the_product_is_trained_and_every_metric_is_a_number(finished):
    results = results_of(finished)
    assert list(results["rows"]) == [*ROWS, *baselines.TITLES]
    assert results["left_out"] == {}
    for row in results["rows"]:
        found = [record for record in results["records"] if record["row"] == row]
        for part in ("all", "tab_0"):
            metrics = {task: values for record in found for task, values in record["test"][part].items()}
            assert {task: len(values) for task, values in metrics.items()} == {"ctr": 6, "cvr": 2}
            assert all(math.isfinite(value) for values in metrics.values() for value in values.values())


def test_the_narrow_network_has_as_many_weights_as_the_masks_keep(small_folder, tmp_path):
    settings = replace(SETTINGS, hidden=(64, 32), masks="random", density=0.3)
    go(small_folder, tmp_path, settings)
    adds = {record["row"]: record["multiply_adds"] for record in results_of(tmp_path)["records"]}
    # A width is rounded to a whole number, by half a neuron of some 20 at most in the first layer.
    assert adds[HARD + SMALL] == pytest.approx(adds[RANDOM_RESCALED], rel=0.03)


def test_a_run_without_a_search_trains_baselines_and_random_masks_alone(small_folder, tmp_path):
    report = go(small_folder, tmp_path / "run", replace(SETTINGS, masks="random")).report
    results = results_of(tmp_path / "run")
    assert list(results["rows"]) == [BASE, HARD, HARD + SMALL, RANDOM_RESCALED, *baselines.TITLES]
    assert not (tmp_path / "run" / "searches").exists()
    assert {path.name for path in (tmp_path / "run").glob("*.safetensors")} == {MODEL}
    ranker = load(tmp_path / "run" / MODEL)
    masks = {task: [layer.weight.mask(task) for layer in ranker.mlp.network.hidden] for task in TASKS}
    for layers in masks.values():
        assert [int(kept.sum()) for kept in layers] == [round(kept.numel() * SETTINGS.density) for kept in layers]
    assert not all(torch.equal(a, b) for a, b in zip(*masks.values(), strict=True))
    text = report.read_text()
    assert "random masks that keep 20% of the hidden weights" in text
    assert "Tickets" not in text
    assert not (report.parent / "plots" / "tickets.png").exists()


@pytest.mark.parametrize("best", [RANDOM_RESCALED, S_WEIGHT, S_WEIGHT_LAST])
def test_the_validation_days_choose_what_is_served(best):
    """By all tasks together: of rows that are best at one task each, the one that loses less at the other."""
    losses = dict.fromkeys((RANDOM_RESCALED, S_WEIGHT, S_WEIGHT_LAST), (0.6, 0.10)) | {best: (0.61, 0.09)}
    records = [
        {
            "row": row,
            "seed": seed,
            "masks": row != HARD,
            "validation": {"all": {"ctr": {"log_loss": ctr - seed}, "cvr": {"mse": cvr}}},
            "test": None,
        }
        for row, (ctr, cvr) in {HARD: (0.1, 0.01), **losses}.items()
        for seed in (0, 0.5)  # another seed has no say
    ]
    kinds = {"ctr": "binary", "cvr": "ratio"}
    assert run_module.served_row(records, "best", kinds) == best
    assert run_module.served_row(records, "tickets", kinds) == S_WEIGHT


@pytest.mark.parametrize(("row", "file"), [(S_WEIGHT, MODEL), (S_WEIGHT_LAST, MODEL_LAST)])
def test_the_artefact_serves_the_trained_model(finished, lab, row, file):
    ranker, trial = load(finished / file), trial_of(row)
    model, masks = lab.model(trial), lab.masks(trial)
    for batch in lab.prepared.stream("test", 256, shuffle=False).epoch(0):
        served = ranker.score_encoded(batch.features)
        x = model.inputs(batch.features).detach()
        for i, task in enumerate(TASKS):
            layers = [
                Layer(layer.weight.detach() * masks[task][f"layers.{j}"], layer.bias.detach(), "relu")
                for j, layer in enumerate(model.mlp.masked_layers())
            ]
            head = Layer(model.mlp.heads[task].weight.detach(), model.mlp.heads[task].bias.detach(), "sigmoid")
            reference = mlp_reference(x, [*layers, head])
            assert_rounding(served[:, i : i + 1], reference)
            assert_rounding(torch.sigmoid(model(batch.features, task)).detach(), reference)


@pytest.mark.parametrize(("row", "file"), [(S_WEIGHT, MODEL), (S_WEIGHT_LAST, MODEL_LAST)])
def test_every_precision_is_judged_by_what_it_serves(finished, lab, row, file):
    judged = results_of(finished)["frozen"][row]["precisions"]
    assert list(judged) == ["fp32", "bf16", "int8"]
    fp32 = load(finished / file)
    for precision, found in judged.items():
        ranker = load(finished / file, precision)
        for split in ("validation", "test"):
            rows = lab.prepared.counts[split]["rows"]
            (batch,) = lab.prepared.stream(split, rows, shuffle=False).epoch(0)
            scores, labels, own = ranker.score_encoded(batch.features), batch.labels["cvr"], batch.rows["cvr"]
            assert set(found[split]) == {"ctr", "cvr"}
            # Through logits and back, in float64: no score here is so near to 0 or 1 as to be cut.
            mse = (scores[own, 1].double() - labels[own].double()).square().mean().item()
            assert found[split]["cvr"] == {"mse": pytest.approx(mse, rel=1e-9)}
            clicked = batch.labels["ctr"] > 0.5
            pairs = scores[clicked, 0][:, None].double() - scores[~clicked, 0].double()
            auc = (pairs > 0).double().mean() + (pairs == 0).double().mean() / 2
            shared_bins = (torch.logit(scores[clicked, 0])[:, None] - torch.logit(scores[~clicked, 0])).abs() < 0.0005
            assert abs(found[split]["ctr"]["auc"] - auc) <= shared_bins.double().mean()
        difference = (scores - fp32.score_encoded(batch.features)).abs().amax(0)
        assert found["largest_difference"] == dict(zip(TASKS, difference.tolist(), strict=True))
        assert (precision == "fp32") == (max(found["largest_difference"].values()) == 0)
        assert found["prepacked_bytes"] == ranker.prepacked_nbytes > 0  # now that it has scored
    assert judged["fp32"]["accepted"]


def test_precisions_are_accepted_on_validation(finished, lab, monkeypatch):
    served = {"fp32": (0.7, 0.1), "bf16": (0.6996, 0.1001), "int8": (0.71, 0.1003)}
    metrics = {
        "validation": {name: {"ctr": {"auc": auc}, "cvr": {"mse": mse}} for name, (auc, mse) in served.items()},
        "test": {name: {"ctr": {"auc": 0.5}, "cvr": {"mse": 0.9}} for name in served},
    }

    def judge(lab, kinds, rankers, split):
        return metrics[split], {name: {} for name in rankers}

    monkeypatch.setattr(frozen, "_served", judge)
    rankers = {name: load(finished / MODEL, name) for name in served}
    judged = frozen._precisions(lab, lab.kinds, rankers, rankers["fp32"])
    assert {precision: found["accepted"] for precision, found in judged.items()} == {
        "fp32": True,
        "bf16": True,
        "int8": False,
    }


def test_rounded_embeddings_are_accepted_against_those_that_were_trained(finished, lab, monkeypatch):
    served = {"fp32": (0.7, 0.1), "bf16": (0.6996, 0.1), "int8": (0.7002, 0.1)}

    def judge(lab, kinds, rankers, split):
        of = {"fp32": (0.7003, 0.1)} if set(rankers) == {"fp32"} else served
        found = {name: {"ctr": {"auc": auc}, "cvr": {"mse": mse}} for name, (auc, mse) in of.items()}
        return found, {name: {} for name in of}

    monkeypatch.setattr(frozen, "_served", judge)
    trained = load(finished / MODEL)
    rounded = Ranker(trained.encoder, trained.inputs.rounded("int8"), trained.mlp)
    judged = frozen._precisions(lab, lab.kinds, dict.fromkeys(served, rounded), trained)
    assert [found["accepted"] for found in judged.values()] == [True, False, True]


@pytest.mark.parametrize(("row", "file"), [(S_WEIGHT, MODEL), (S_WEIGHT_LAST, MODEL_LAST)])
def test_the_artefact_is_calibrated_on_training_rows(finished, lab, row, file):
    stream = lab.prepared.stream("train", frozen.CALIBRATION_ROWS, shuffle=True)
    with torch.inference_mode():
        x = lab.model(trial_of(row)).inputs(next(stream.epoch(0)).features)
    mlp = load(finished / file).mlp
    assert mlp.calibrated(x).network.quantization == mlp.network.quantization


def test_dense_torch_scores_as_the_trained_model_does(lab):
    model = lab.model(trial_of(S_WEIGHT))
    batch = next(lab.prepared.stream("test", 64, shuffle=False).epoch(0))
    x = model.inputs(batch.features).detach()
    for i, task in enumerate(TASKS):
        layers = [
            Layer((layer.weight * layer.mask(task)).detach(), layer.bias.detach(), "relu")
            for layer in model.mlp.masked_layers()
        ]
        head = Layer(model.mlp.heads[task].weight.detach(), model.mlp.heads[task].bias.detach(), "sigmoid")
        assert_rounding(frozen.dense_pass(model.mlp)(x)[:, i : i + 1], mlp_reference(x, [*layers, head]))


def test_where_best_and_last_tickets_are_one_model_one_is_frozen(small_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Laboratory, "_best", lambda lab, task, tickets: tickets[-1])
    go(small_folder, tmp_path)
    assert results_of(tmp_path)["files"] == {S_WEIGHT: MODEL}
    assert not (tmp_path / MODEL_LAST).exists()


# Stopping and going on


class StopError(Exception):
    """A power failure."""


# In the order of a run: the first time that a stage gets so far, the run stops.
STOPS = (
    ("encode", 1),
    ("models: train", 1),
    ("models: train", 4),
    ("models: train", 9),
    ("freeze and measure", 0),
    ("freeze and measure", 1),
)


def comparable(folder):
    """Return everything in `results.json` except times."""
    results = results_of(folder)
    del results["seconds"]
    for part in results["records"]:
        part.pop("seconds")
    for part in results["frozen"].values():
        part.pop("latency")
    return results


def test_a_run_that_stops_anywhere_ends_as_if_it_had_not(small_folder, finished, tmp_path, monkeypatch):
    out, calls, epochs = tmp_path / "run", [], []

    def stop_at(stop):
        def progress(stage, done, total):
            calls.append((stage, done))
            if (stage, done) == stop:
                raise StopError

        return progress

    def counted(*args, **rest):
        epochs.append(args)
        return train(*args, **rest)

    monkeypatch.setattr(starts, "train", counted)
    for stop in STOPS:
        calls.clear()
        with pytest.raises(StopError):
            go(small_folder, out, progress=stop_at(stop))
        assert calls[-1] == stop
        assert not (out / "results.json").exists()
        if stop == STOPS[0]:
            assert {path.name for path in out.iterdir()} == {".lock", ".data.unfinished"}  # the next one goes on there
    go(small_folder, out)
    # Two baselines, two levels for each task, two dense models, two masked ones: nothing twice.
    assert len(epochs) == 2 + 2 * SETTINGS.rounds + 2 + 2
    assert comparable(out) == comparable(finished)
    for file in (MODEL, MODEL_LAST):
        assert (out / file).read_bytes() == (finished / file).read_bytes()
    assert (out / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
    assert not list(out.rglob("*.tmp")) + list(out.rglob("*checkpoint.pt"))


@pytest.mark.parametrize(
    "pattern",
    [
        "results.json",
        "trials/*.json",
        "trials/*.safetensors",
        "trials/*.seconds",
        "singles/*.json",
        "singles/*.safetensors",
        "searches/**/*.json",
        "searches/**/*.safetensors",
        "searches/**/*.seconds",
    ],
)
def test_a_damaged_file_of_a_run_is_named(small_folder, again, pattern):
    """Whichever the run reads first of those that are damaged alike; without results it goes through all of them."""
    damaged = [path for path in again.glob(pattern) if path.is_file()]
    assert damaged
    for path in damaged:
        path.write_bytes(b"{")
    if pattern != "results.json":
        (again / "results.json").unlink()
        for trial in again.glob("trials/*.json") if pattern != "trials/*.json" else ():
            trial.unlink()  # so that what it was made from is read again
    names = "|".join(re.escape(str(path)) for path in damaged)
    with pytest.raises(InputError, match=rf"^({names}): got ") as caught:
        go(small_folder, again)
    assert "\n" not in str(caught.value)


def test_a_finished_run_trains_and_measures_nothing(small_folder, finished, again):
    stages = []
    found = go(small_folder, again, progress=lambda stage, done, total: stages.append(stage))
    assert not stages
    assert found.verdict.startswith("Serve S-Weight (model.safetensors), the tickets that were asked for. ")
    # The commands of the report name the folder.
    here, there = bytes(again), bytes(finished)
    assert {path.relative_to(again): data.replace(here, there) for path, data in contents(again).items()} == {
        path.relative_to(finished): data for path, data in contents(finished).items()
    }
    (again / MODEL).unlink()
    go(small_folder, again, progress=lambda stage, done, total: stages.append(stage))
    assert (again / MODEL).read_bytes() == (finished / MODEL).read_bytes()


def test_more_seeds_are_added_to_the_old_ones(small_folder, finished, again, monkeypatch):
    trained = []

    def counted(*args, **rest):
        trained.append(args)
        return train(*args, **rest)

    monkeypatch.setattr(starts, "train", counted)
    report = go(small_folder, again, replace(SETTINGS, seeds=2)).report
    assert len(trained) == 2 + 2 * SETTINGS.rounds + 2 + 2, "those of the second seed"
    first, second = ([r for r in results_of(again)["records"] if r["seed"] == seed] for seed in (0, 1))
    assert first == results_of(finished)["records"]
    assert [record["row"] for record in second] == [record["row"] for record in first]
    drawn = [(a, b) for a, b in zip(first, second, strict=True) if a["row"] not in baselines.TITLES]
    assert all(a["test"] != b["test"] for a, b in drawn), (
        "a seed draws nothing of a constant, and of so few rows' trees"
    )
    assert (again / MODEL).read_bytes() == (finished / MODEL).read_bytes()
    assert json.loads((again / "config.json").read_text())["seeds"] == 2
    assert "2 seeds" in report.read_text()


# What is refused, and left as it was


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("density", 0.3, "density = 0.2, wanted 0.3"),
        ("hidden", (16, 4), r"hidden = \[16, 8\], wanted \[16, 4\]"),
        ("embedding_dim", 8, "embedding_dim = 4, wanted 8"),
        ("learning_rates", (0.1,), r"learning_rates = \[0.001\], wanted \[0.1\]"),
        ("epochs", 2, "epochs = 1, wanted 2"),
        ("batch_size", 256, "batch_size = 512, wanted 256"),
        ("rounds", 3, "rounds = 2, wanted 3"),
    ],
)
def test_a_run_of_other_settings_is_refused(small_folder, finished, key, value, shown):
    before = contents(finished)
    with pytest.raises(InputError, match=rf"config\.json: got {shown}; choose another --out"):
        go(small_folder, finished, replace(SETTINGS, **{key: value}))
    assert contents(finished) == before


def test_a_run_of_other_data_is_refused(small_folder, finished, tmp_path):
    before = contents(finished)
    other = shutil.copytree(small_folder, tmp_path / "other")
    with pytest.raises(InputError, match="got data = log, wanted other"):
        go(other, finished)
    # The same name, but different data.
    changed = other.rename(tmp_path / small_folder.name)
    pq.write_table(pq.read_table(changed / "users.parquet")[:-1], changed / "users.parquet")
    with pytest.raises(DataError, match=r"finished/data: got data of other files.*/log has now, wanted the same"):
        go(changed, finished)
    assert contents(finished) == before


def test_the_name_of_a_data_set_is_that_of_its_folder(small_folder, again, monkeypatch):
    monkeypatch.chdir(small_folder)
    (again / "results.json").unlink()
    go(type(small_folder)("."), again)
    assert results_of(again)["data"]["name"] == small_folder.name


def test_a_foreign_folder_is_refused(small_folder, tmp_path):
    (tmp_path / "config.json").write_text("no settings")
    with pytest.raises(InputError, match=r"config\.json: got no JSON .*; choose another --out$"):
        go(small_folder, tmp_path)
    with pytest.raises(InputError, match=r"config\.json: got a file, wanted a folder"):
        go(small_folder, tmp_path / "config.json")
    assert contents(tmp_path) == {tmp_path / "config.json": b"no settings"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "ctr"', 'name = "c.tr"', "task 'c.tr': got a name"),
        ('name = "ctr"', 'name = "../ctr"', "task '../ctr': got a name"),
        ('name = "ctr"', 'name = "keys"', "task 'keys': got a name"),  # a method of torch's ModuleDict
        ('name = "tab_0"', 'name = "all"', "slice 'all': got the name"),
    ],
)
def test_names_without_a_place_are_refused_before_any_work(small_folder, tmp_path, old, new, message):
    folder = shutil.copytree(small_folder, tmp_path / "log")
    text = (folder / "schema.toml").read_text()
    assert old in text
    (folder / "schema.toml").write_text(text.replace(old, new))
    with pytest.raises(SchemaError, match=message):
        go(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds: got 0, wanted at least 1"),
        ({"hidden": ()}, r"hidden: got \(\), wanted at least one width"),
        ({"hidden": (16, 0)}, r"hidden: got \(16, 0\)"),
        ({"density": 1.0}, "density: got 1.0, wanted more than 0 and less than 1"),
        ({"density": math.nan}, "density: got nan"),
        ({"learning_rates": (1e-3, 0.0)}, "learning_rate: got 0.0, wanted more than 0"),
        ({"learning_rates": ()}, "learning_rates: got none"),
        ({"top_k": -1}, "top_k: got -1, wanted 0 or more"),
        ({"dtype": "int8"}, "dtype: got 'int8', wanted one of float32, bfloat16"),
    ],
)
def test_settings_outside_their_range(changes, message):
    with pytest.raises(InputError, match=message):
        RunSettings(**changes)


def test_a_run_of_another_version_is_refused(small_folder, tmp_path):
    config = pin_settings(tmp_path, small_folder.name, SETTINGS)
    del config["layout"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="got a run of another version, wanted one of this; choose another --out"):
        go(small_folder, tmp_path)


def test_a_folder_that_another_process_works_in_is_refused(small_folder, again):
    with (again / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # an open file's own, so that it need not be another process
        with pytest.raises(InputError, match="another process works in this folder"):
            go(small_folder, again)
    go(small_folder, again)


def test_the_lock_dies_with_its_process_and_what_that_left_is_swept(tmp_path):
    hold = "import sys, time; from pathlib import Path; from lt4rec_sparse.recsys.harness.settings import locked\n"
    hold += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    left = tmp_path / "trials" / f".x.checkpoint.pt.elsewhere.{child.pid}.0.tmp"
    left.mkdir(parents=True)
    with pytest.raises(InputError, match="another process works in this folder"), locked(tmp_path):
        pass
    assert left.exists()
    child.kill()
    child.communicate()
    with locked(tmp_path):
        assert not left.exists()


def test_a_second_run_is_refused_while_the_first_prepares(small_folder, tmp_path, monkeypatch):
    def in_between(*arguments, **options):
        with pytest.raises(InputError, match="another process works in this folder"):
            go(small_folder, tmp_path / "out")
        raise InputError("enough")

    monkeypatch.setattr(run_module, "prepare", in_between)
    with pytest.raises(InputError, match="enough"):
        go(small_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_of_one_class_are_refused_before_any_training(small_folder, tmp_path):
    folder = tmp_path / "clicked"
    shutil.copytree(small_folder, folder)
    for path in (folder / "log").glob("*.parquet"):
        table = pq.read_table(path)
        place = table.schema.get_field_index("is_click")
        ones = pa.array([1] * table.num_rows, table.schema.field("is_click").type)
        pq.write_table(table.set_column(place, "is_click", ones), path)
    with pytest.raises(DataError, match="split 'train': got only labels 1 of ctr, wanted 0 and 1"):
        go(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_sparse_gradients_and_rounded_embeddings_of_a_run(small_folder, tmp_path):
    settings = replace(SETTINGS, masks="random", sparse_gradients=True, embeddings="int8")
    report = go(small_folder, tmp_path / "run", settings).report.read_text()
    assert "A step moves only the embeddings that its batch looks up." in report
    assert "The artefact holds embeddings in int8." in report
    ranker, results = load(tmp_path / "run" / MODEL), results_of(tmp_path / "run")
    assert ranker.inputs.kind == "int8"
    (found,) = results["frozen"].values()
    assert found["bytes"]["embeddings"] == ranker.inputs.nbytes
    assert max(found["largest_difference"].values()) > 0
    lab = Laboratory(Prepared.load(tmp_path / "run" / "data"), tmp_path / "run")
    (trial,) = (
        trial
        for row in Rows(TASKS, settings.training, density=0.2).product("random")
        for trial in row.trials
        if trial.masks
    )
    model = lab.model(trial)
    assert model.inputs.sparse_gradients
    assert model.inputs.rounded("int8").nbytes == ranker.inputs.nbytes


def test_a_run_begun_before_later_settings_goes_on_with_their_defaults_alone(tmp_path):
    config = pin_settings(tmp_path, "log", SETTINGS)
    assert not {"sparse_gradients", "embeddings"} & config.keys()
    assert check_settings(tmp_path, "log", SETTINGS) == SETTINGS
    for change, message in (
        ({"sparse_gradients": True}, "got sparse_gradients = False, wanted True"),
        ({"embeddings": "int8"}, "got embeddings = fp32, wanted int8"),
    ):
        with pytest.raises(InputError, match=message):
            check_settings(tmp_path, "log", replace(SETTINGS, **change))
    pin_settings(tmp_path, "log", replace(SETTINGS, embeddings="int8"))
    with pytest.raises(InputError, match="got embeddings = int8, wanted fp32"):
        check_settings(tmp_path, "log", SETTINGS)


def reworded(path, old, new):
    pin_settings(path.parent, "log", SETTINGS)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text('{"a":' * 100_000), "got JSON nested too deeply"),
        (lambda path: path.write_text("[]"), "got JSON of type list"),
        (lambda path: path.mkdir(), "got a folder, a device or a pipe"),
        (os.mkfifo, "got a folder, a device or a pipe"),
        (lambda path: reworded(path, '"seeds": 1', '"seeds": "9"'), "got seeds = '9'"),
        (lambda path: reworded(path, '"seeds"', '"seed"'), "got seeds = None"),
    ],
)
def test_settings_of_a_run_that_cannot_be_read_are_one_line(tmp_path, damage, message):
    path = tmp_path / "config.json"
    damage(path)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: {message}[^\n]*; choose another --out$"):
        check_settings(tmp_path, "log", SETTINGS)


def test_fewer_seeds_than_before_drop_none(tmp_path):
    pin_settings(tmp_path, "log", RunSettings(seeds=3))
    assert check_settings(tmp_path, "log", RunSettings(seeds=1)).seeds == 3
    assert check_settings(tmp_path, "log", RunSettings(seeds=4)).seeds == 4
    assert check_settings(tmp_path / "new", "log", RunSettings(seeds=2)) is None


def test_what_nobody_asked_for_goes_by_rows_and_stays(small_folder, tmp_path):
    """A run that left sizes open goes on with those it began with, also if they are named."""
    open_sizes = replace(SETTINGS, batch_size=None, epochs=None, masks="random", hidden=(4,), embedding_dim=2)
    assert open_sizes.of_rows(2_676) == replace(open_sizes, batch_size=64, epochs=20, patience=2)
    pin_settings(tmp_path, "log", open_sizes.of_rows(2_676))
    named = replace(open_sizes, batch_size=64, epochs=20, patience=2)
    for asked in (open_sizes, named, replace(open_sizes, epochs=20)):
        assert check_settings(tmp_path, "log", asked) == named
    with pytest.raises(InputError, match="got epochs = 20, wanted 3; choose another --out"):
        check_settings(tmp_path, "log", replace(open_sizes, epochs=3))


def test_a_run_by_rows_trains_by_them_and_says_so(small_folder, tmp_path):
    settings = replace(SETTINGS, batch_size=None, epochs=None, masks="random", hidden=(4,), embedding_dim=2)
    finished = go(small_folder, tmp_path, settings)
    config, results = json.loads((tmp_path / "config.json").read_text()), results_of(tmp_path)
    rows = results["data"]["counts"]["train"]["rows"]
    sizes = by_rows(rows)
    assert {name: config[name] for name in sizes._fields} == sizes._asdict()
    assert results["steps"] >= 800
    assert not [warning for warning in finished.warnings if warning.startswith("few steps")]
    assert (
        f"at most {sizes.epochs} epochs, 2 without a gain end a training, of batches of" in finished.report.read_text()
    )
