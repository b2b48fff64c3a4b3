"""The whole length: a click log in, a frozen ranker and a report out, stopped and continued anywhere in between."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from oracle import Layer, assert_rounding, mlp_reference
from safetensors.torch import load_file

from lt4rec_sparse.lottery.pruning import level_nnz
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.ranker import load
from lt4rec_sparse.ranker.features import SchemaError
from lt4rec_sparse.recsys import frozen
from lt4rec_sparse.recsys.data import DataError, Prepared
from lt4rec_sparse.recsys.harness import arms
from lt4rec_sparse.recsys.harness.arms import (
    HARD,
    ONE_RANDOM,
    RANDOM_LAST,
    SINGLE,
    SPARSE,
    SPARSE_LAST,
    TITLES,
    SeedRun,
)
from lt4rec_sparse.recsys.harness.settings import RunSettings, SettingsError, pin_settings, with_seeds_of
from lt4rec_sparse.recsys.models import HardSharing
from lt4rec_sparse.recsys.run import MODEL, MODEL_LAST, MetricsLog, artefacts, run
from lt4rec_sparse.recsys.training import evaluate, train

SETTINGS = RunSettings(hidden=(16, 8), embedding_dim=4, masks="tickets", rounds=2, epochs=1, batch_size=512)
TASKS = ("ctr", "cvr")
ARTEFACTS = {SPARSE: MODEL, SPARSE_LAST: MODEL_LAST}
BATCHES = 6  # of an epoch: two days of 1,500 impressions
TRAININGS = len(TASKS) * (SETTINGS.rounds + 1) + len(TITLES) - 1  # level 0 of the search is the single-task arm


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    """Time next to nothing, and spare such small models the threads, which only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "interleaved", partial(frozen.interleaved, rounds=1, round_us=1.0))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(small_folder, tmp_path_factory):
    """A run that nobody interrupted; tests do not change it."""
    # As the tests of conftest's `poisoned_memory` run, which a fixture of this scope comes before.
    torch.use_deterministic_algorithms(True)
    out = tmp_path_factory.mktemp("runs") / "finished"
    run(small_folder, out, SETTINGS)
    torch.use_deterministic_algorithms(False)
    return out


@pytest.fixture
def again(finished, tmp_path):
    """A copy of it, to be continued."""
    return shutil.copytree(finished, tmp_path / "again")


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def seed_run(folder):
    def refuse(*args):
        raise AssertionError(f"nothing is to be trained, got {args}")

    return SeedRun(Prepared.load(folder / "data"), SETTINGS, 0, folder / "seed_0", refuse, refuse)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_leaves_all_that_it_says(finished):
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    tickets = {
        f"seed_0/tickets/{task}/level_{level}.{kind}"
        for task in TASKS
        for level in range(SETTINGS.rounds + 1)
        for kind in ("mask.safetensors", "json")
    }
    plots = {f"plots/{name}.png" for name in ("tickets", "ownership", "latency")}
    reports = {"report.md", "report.html", "results.json", "config.json", "metrics.jsonl"}
    assert files >= tickets | plots | reports | set(ARTEFACTS.values()) | {"data/prepared.json"}
    assert not [name for name in files if name.endswith(("tmp", "checkpoint.pt"))]


def test_every_metric_is_a_number(finished):
    (seed,) = results_of(finished)["seeds"]
    assert set(seed["test"]) == set(TITLES)
    numbers = [
        value
        for arm in seed["test"].values()
        for part in ("all", "tab_0")
        for task in TASKS
        for value in arm[part][task].values()
    ]
    tickets = [value for task in TASKS for ticket in seed["tickets"][task] for value in ticket["validation"].values()]
    # Four metrics of a binary task and two of a ratio.
    assert len(numbers) == len(TITLES) * 2 * 6
    assert len(tickets) == (SETTINGS.rounds + 1) * 6
    assert all(map(math.isfinite, numbers + tickets))


def test_a_run_without_a_search_trains_baselines_and_random_masks_alone(small_folder, tmp_path):
    report = run(small_folder, tmp_path / "run", replace(SETTINGS, masks="random"))
    (seed,) = results_of(tmp_path / "run")["seeds"]
    assert list(seed["test"]) == [SINGLE, HARD, RANDOM_LAST, ONE_RANDOM]
    assert len([stage for stage in seed["seconds"] if stage.startswith("search")]) == len(TASKS)
    assert seed["best_level"] == {}
    assert {path.name for path in (tmp_path / "run").glob("*.safetensors")} == {"model.safetensors"}
    ranker = load(tmp_path / "run" / "model.safetensors")
    masks = {task: [layer.weight.mask(task) for layer in ranker.mlp.hidden] for task in TASKS}
    for layers in masks.values():
        assert [int(kept.sum()) for kept in layers] == [round(kept.numel() * SETTINGS.density) for kept in layers]
    assert not all(torch.equal(a, b) for a, b in zip(*masks.values(), strict=True))
    text = report.read_text()
    assert "random masks that keep 20% of the hidden weights" in text
    assert "**sparse sharing: random masks, no search, scaled up**" in text
    assert "Tickets" not in text
    assert not (report.parent / "plots" / "tickets.png").exists()


@pytest.mark.parametrize("best", [RANDOM_LAST, SPARSE, SPARSE_LAST])
def test_the_validation_days_choose_what_is_served(finished, monkeypatch, best):
    """By all tasks together: of arms that are best at one task each, the one that loses less at the other."""
    trained = seed_run(finished)
    trained.settings = replace(SETTINGS, masks="best")
    losses = dict.fromkeys((RANDOM_LAST, SPARSE, SPARSE_LAST), (0.6, 0.10)) | {best: (0.61, 0.09)}
    monkeypatch.setattr(SeedRun, "trained_sparse_sharing", lambda run, arm: arm)

    def judge(arm, stream, kinds):
        assert stream is trained._validation
        ctr, cvr = losses[arm]
        return {"all": {"ctr": {"log_loss": ctr}, "cvr": {"mse": cvr}}}

    monkeypatch.setattr(arms, "evaluate", judge)
    assert next(iter(artefacts(trained).items())) == (best, MODEL)
    assert set(artefacts(trained)) == {best, SPARSE_LAST}
    trained.settings = replace(SETTINGS, masks="random")
    assert artefacts(trained) == {RANDOM_LAST: MODEL}


def test_metrics_are_logged_once_for_every_training(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    by_split = {name: [r for r in records if r["split"] == name] for name in ("train", "validation", "test")}
    assert sum(map(len, by_split.values())) == len(records)
    assert len(by_split["validation"]) == TRAININGS
    assert len({record["stage"] for record in by_split["train"]}) == TRAININGS
    test = {record["stage"]: record["metrics"] for record in by_split["test"]}
    assert test == results_of(finished)["seeds"][0]["test"]


def test_tickets_are_pruned_as_set_and_judged_as_reported(finished):
    (seed,) = results_of(finished)["seeds"]
    for task in TASKS:
        folder = finished / "seed_0" / "tickets" / task
        masks = [Mask.load(folder / f"level_{level}.mask.safetensors") for level in range(SETTINGS.rounds + 1)]
        size = masks[0].size
        assert [mask.nnz for mask in masks] == [level_nnz(size, SETTINGS.density, 2, level) for level in range(3)]
        for level, (mask, ticket) in enumerate(zip(masks, seed["tickets"][task], strict=True)):
            assert ticket["density"] == mask.density
            assert json.loads((folder / f"level_{level}.json").read_text())["metrics"] == ticket["validation"]
        metric, sign = ("auc", 1) if task == "ctr" else ("mse", -1)
        judged = [sign * ticket["validation"][metric] for ticket in seed["tickets"][task]]
        assert judged[seed["best_level"][task]] == max(judged[1:])


def test_single_task_is_level_0_of_the_search(finished):
    seed, arm = results_of(finished)["seeds"][0], seed_run(finished)
    for task in TASKS:
        model = arm._new(arms.SparseSharing, (task,))
        model.load_state_dict(load_file(finished / "seed_0" / f"{SINGLE}.{task}.state.safetensors"))
        assert model.mlp.mask(task).density == 1
        for split, wanted in (
            ("validation", seed["tickets"][task][0]["validation"]),
            ("test", seed["test"][SINGLE]["all"][task]),
        ):
            stream = arm.prepared.stream(split, 4096, shuffle=False)
            assert evaluate(model, stream, {task: arm.kinds[task]})["all"][task] == wanted


@pytest.mark.parametrize(("arm", "file"), ARTEFACTS.items())
def test_the_artefact_serves_the_trained_model(finished, arm, file):
    ranker, trained = load(finished / file), seed_run(finished)
    model, best = trained.trained_sparse_sharing(arm), results_of(finished)["seeds"][0]["best_level"]
    for batch in trained.prepared.stream("test", 256, shuffle=False).epoch(0):
        served = ranker.score_encoded(batch.features)
        x = model.inputs(batch.features).detach()
        for i, task in enumerate(TASKS):
            level = best[task] if arm == SPARSE else SETTINGS.rounds
            mask = Mask.load(finished / "seed_0" / "tickets" / task / f"level_{level}.mask.safetensors")
            layers = [
                Layer(layer.weight.detach() * mask[f"layers.{j}"], layer.bias.detach(), "relu")
                for j, layer in enumerate(model.mlp.masked_layers())
            ]
            head = Layer(model.mlp.heads[task].weight.detach(), model.mlp.heads[task].bias.detach(), "sigmoid")
            reference = mlp_reference(x, [*layers, head])
            assert_rounding(served[:, i : i + 1], reference)
            assert_rounding(torch.sigmoid(model(batch.features, task)).detach(), reference)


@pytest.mark.parametrize(("arm", "file"), ARTEFACTS.items())
def test_every_precision_is_judged_by_what_it_serves(finished, arm, file):
    judged, trained = results_of(finished)["frozen"][arm]["precisions"], seed_run(finished)
    assert list(judged) == ["fp32", "bf16", "int8"]
    fp32 = load(finished / file)
    for precision, found in judged.items():
        ranker = load(finished / file, precision)
        assert found["prepacked_bytes"] == ranker.mlp.prepacked_nbytes
        for split in ("validation", "test"):
            rows = trained.prepared.counts[split]["rows"]
            (batch,) = trained.prepared.stream(split, rows, shuffle=False).epoch(0)
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
    assert judged["fp32"]["accepted"]


def test_precisions_are_accepted_on_validation(finished, monkeypatch):
    served = {"fp32": (0.7, 0.1), "bf16": (0.6996, 0.1001), "int8": (0.71, 0.1003)}
    metrics = {
        "validation": {name: {"ctr": {"auc": auc}, "cvr": {"mse": mse}} for name, (auc, mse) in served.items()},
        "test": {name: {"ctr": {"auc": 0.5}, "cvr": {"mse": 0.9}} for name in served},
    }
    monkeypatch.setattr(frozen, "_served", lambda run, rankers, split: (metrics[split], {name: {} for name in rankers}))
    rankers = {name: load(finished / "model.safetensors", name) for name in served}
    judged = frozen._precisions(seed_run(finished), rankers)
    assert {precision: found["accepted"] for precision, found in judged.items()} == {
        "fp32": True,
        "bf16": True,
        "int8": False,
    }


@pytest.mark.parametrize(("arm", "file"), ARTEFACTS.items())
def test_the_artefact_is_calibrated_on_training_rows(finished, arm, file):
    run, codes = seed_run(finished), load(finished / file).mlp.codes
    stream = run.prepared.stream("train", frozen.CALIBRATION_ROWS, shuffle=True)
    with torch.inference_mode():
        x = run.trained_sparse_sharing(arm).inputs(next(stream.epoch(0)).features)
    assert load(finished / file).mlp.calibrated(x).codes == codes


def test_every_arm_starts_from_the_same_weights_and_sees_the_same_rows(small_log, tmp_path, monkeypatch):
    starts = []

    def only_look(model, optimizer, stream, losses, epochs, **rest):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        starts.append((model, losses.names, stream, epochs, state))
        for parameter in model.parameters():
            parameter.data += torch.rand(parameter.shape)  # so that the next start is one only if it was rewound to

    monkeypatch.setattr(arms, "train", only_look)
    SeedRun(small_log, replace(SETTINGS, epochs=3), 7, tmp_path, lambda *record: None, lambda *progress: None).run()
    assert len(starts) == TRAININGS
    *unscaled, (of_random, *_, scaled) = starts
    shared = unscaled[-1][-1]
    for i, layer in enumerate(of_random.mlp.masked_layers()):
        alive = int(layer.masks.any(2).sum()) * layer.in_features
        wanted = shared[f"mlp.layers.{i}.weight"] / math.sqrt(int(layer.masks.sum()) / alive)
        assert torch.equal(scaled.pop(f"mlp.layers.{i}.weight"), wanted)
    for model, tasks, stream, epochs, state in starts:
        assert stream is starts[0][2]
        assert epochs == 3
        # Hard sharing has an MLP a task, for which the one MLP of the others is no start; its inputs are theirs.
        same = {name for name in state if name.startswith("inputs.") or not isinstance(model, HardSharing)}
        same = {name for name in same if not name.endswith((".masks", ".mask_tasks"))}
        assert all(torch.equal(state[name], shared[name]) for name in same)
        assert tasks in ((*TASKS,), *((task,) for task in TASKS))
    assert [isinstance(model, HardSharing) for model, *_ in starts].count(True) == 1


def test_a_seed_is_a_start(small_log, tmp_path):
    first, again, other = (
        SeedRun(small_log, SETTINGS, seed, tmp_path, lambda *record: None, lambda *progress: None).sparse_sharing({})
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.inputs.embedding, again.inputs.embedding)
    assert not torch.equal(first.inputs.embedding, other.inputs.embedding)


# Stopping and going on


class StopError(Exception):
    """The power goes."""


# In the order of a run: the first time that a stage gets so far, the run stops.
STOPS = (
    ("encode", 1),
    ("seed 0: search.ctr.level_1", 3),
    ("seed 0: search.cvr.level_0", BATCHES),  # its last batch, trained and not yet judged
    ("seed 0: search.cvr.level_2", 1),
    (f"seed 0: {HARD}", 3),
    (f"seed 0: {SPARSE_LAST}", BATCHES),
    ("freeze and measure", 0),
    ("freeze and measure", 1),
)


def comparable(folder):
    """Return all of `results.json` that is no time."""
    results = results_of(folder)
    del results["seconds_this_run"]
    for part in chain(results["seeds"], results["frozen"].values()):
        part.pop("seconds", None)
        part.pop("latency", None)
    return results


def test_a_run_that_stops_anywhere_ends_as_if_it_had_not(small_folder, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "train", partial(train, checkpoint_every=2))
    out, calls = tmp_path / "run", []

    def stop_at(stop):
        def progress(stage, done, total):
            calls.append((stage, done))
            if (stage, done) == stop:
                raise StopError

        return progress

    for stop in STOPS:
        calls.clear()
        with pytest.raises(StopError):
            run(small_folder, out, SETTINGS, stop_at(stop))
        assert calls[-1] == stop
        assert not (out / "results.json").exists()
        if stop == STOPS[0]:
            assert not out.exists()
        if stop == STOPS[1]:
            assert list((out / "seed_0").glob("*.checkpoint.pt"))
        if stop == STOPS[2]:
            # Level 0 stands, and level 1 goes on behind the checkpoint after two batches.
            assert calls[0] == ("seed 0: search.ctr.level_1", 3)
    run(small_folder, out, SETTINGS)
    assert comparable(out) == comparable(finished)
    for file in ARTEFACTS.values():
        assert (out / file).read_bytes() == (finished / file).read_bytes()
    lines, wanted = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (out, finished))
    assert lines == wanted
    assert not list(out.rglob("*.tmp")) + list(out.rglob("*checkpoint.pt"))


def test_a_finished_run_trains_nothing(small_folder, finished, again):
    stages = []
    run(small_folder, again, SETTINGS, lambda stage, done, total: stages.append(stage))
    assert set(stages) == {"freeze and measure"}
    assert comparable(again) == comparable(finished)
    for name in ("metrics.jsonl", *ARTEFACTS.values()):
        assert (again / name).read_bytes() == (finished / name).read_bytes()


def test_more_seeds_are_added_to_the_old_ones(small_folder, finished, again):
    stages = []
    run(small_folder, again, replace(SETTINGS, seeds=2), lambda stage, done, total: stages.append(stage))
    assert not [stage for stage in stages if stage.startswith("seed 0")]
    assert len({stage for stage in stages if stage.startswith("seed 1")}) == TRAININGS
    first, second = results_of(again)["seeds"]
    assert first == results_of(finished)["seeds"][0]
    assert (second["seed"], set(second["test"])) == (1, set(first["test"]))
    assert second["test"] != first["test"]
    assert [*contents(again / "seed_0").values()] == [*contents(finished / "seed_0").values()]
    assert (again / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert (again / "metrics.jsonl").read_text().startswith((finished / "metrics.jsonl").read_text())
    assert json.loads((again / "config.json").read_text())["seeds"] == 2
    assert "2 seeds" in (again / "report.md").read_text()


# What is refused, and left as it was


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("density", 0.3, "density = 0.2, wanted 0.3"),
        ("hidden", (16, 4), r"hidden = \[16, 8\], wanted \[16, 4\]"),
        ("embedding_dim", 8, "embedding_dim = 4, wanted 8"),
        ("learning_rate", 0.1, "learning_rate = 0.001, wanted 0.1"),
        ("epochs", 2, "epochs = 1, wanted 2"),
        ("batch_size", 256, "batch_size = 512, wanted 256"),
        ("rounds", 3, "rounds = 2, wanted 3"),
    ],
)
def test_a_run_of_other_settings_is_refused(small_folder, finished, key, value, shown):
    before = contents(finished)
    with pytest.raises(SettingsError, match=rf"config\.json: got {shown}; choose another --out"):
        run(small_folder, finished, replace(SETTINGS, **{key: value}))
    assert contents(finished) == before


def test_a_run_of_other_data_is_refused(small_folder, finished, tmp_path):
    before = contents(finished)
    other = shutil.copytree(small_folder, tmp_path / "other")
    with pytest.raises(SettingsError, match="got data = log, wanted other"):
        run(other, finished, SETTINGS)
    # Of the same name, and yet not what was trained on.
    changed = other.rename(tmp_path / small_folder.name)
    pq.write_table(pq.read_table(changed / "users.parquet")[:-1], changed / "users.parquet")
    with pytest.raises(DataError, match=r"finished/data: got data of other files.*/log has now, wanted the same"):
        run(changed, finished, SETTINGS)
    assert contents(finished) == before


def test_the_name_of_a_data_set_is_that_of_its_folder(small_folder, again, monkeypatch):
    monkeypatch.chdir(small_folder)
    run(type(small_folder)("."), again, SETTINGS)
    assert results_of(again)["data"]["name"] == small_folder.name


def test_a_foreign_folder_is_refused(small_folder, tmp_path):
    (tmp_path / "config.json").write_text("no settings")
    with pytest.raises(SettingsError, match=r"config\.json: got no settings of a run"):
        run(small_folder, tmp_path, SETTINGS)
    with pytest.raises(SettingsError, match=r"config\.json: got a file, wanted a folder"):
        run(small_folder, tmp_path / "config.json", SETTINGS)
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
        run(folder, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds: got 0, wanted at least 1"),
        ({"hidden": ()}, r"hidden: got \(\), wanted at least one width"),
        ({"hidden": (16, 0)}, r"hidden: got \(16, 0\)"),
        ({"density": 1.0}, "density: got 1.0, wanted more than 0 and less than 1"),
        ({"density": math.nan}, "density: got nan"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0, wanted more than 0"),
    ],
)
def test_settings_outside_their_range(changes, message):
    with pytest.raises(SettingsError, match=message):
        RunSettings(**changes)


def test_the_metrics_log_mends_a_line_cut_short_and_repeats_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = {"seed": 0, "stage": "a", "split": "train", "task": "ctr", "epoch": 0, "train_loss": 0.5}
    MetricsLog(path)(first)
    whole = path.read_text()
    path.write_text(whole + whole[:10])
    log = MetricsLog(path)
    log(first)
    assert path.read_text() == whole
    log(first | {"epoch": 1})
    log(first | {"epoch": 1})
    assert len(path.read_text().splitlines()) == 2


def test_labels_of_one_class_are_refused_before_any_training(small_folder, tmp_path):
    folder = tmp_path / "clicked"
    shutil.copytree(small_folder, folder)
    for path in (folder / "log").glob("*.parquet"):
        table = pq.read_table(path)
        place = table.schema.get_field_index("is_click")
        ones = pa.array([1] * table.num_rows, table.schema.field("is_click").type)
        pq.write_table(table.set_column(place, "is_click", ones), path)
    with pytest.raises(DataError, match="split 'train': got only labels 1 of ctr, wanted 0 and 1"):
        run(folder, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out" / "config.json").exists()


def test_fewer_seeds_than_before_drop_none(tmp_path):
    pin_settings(tmp_path, "log", RunSettings(seeds=3))
    assert with_seeds_of(tmp_path, RunSettings(seeds=1)).seeds == 3
    assert with_seeds_of(tmp_path, RunSettings(seeds=4)).seeds == 4
    assert with_seeds_of(tmp_path / "new", RunSettings(seeds=2)).seeds == 2
