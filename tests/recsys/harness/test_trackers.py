"""Trackers are told of every training once, whatever dies meanwhile, and whatever they raise ends nothing."""

import json
import logging
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.recsys.harness import starts, trackers
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.study import Resources, carrier
from lt4rec_sparse.recsys.harness.trackers import TRACKERS, Tracking, check_tracker, tracking
from lt4rec_sparse.recsys.harness.trials import Masks, Search, Training, Trial
from lt4rec_sparse.recsys.training import loop

TASKS = ("ctr", "cvr")
TRAINING = Training(hidden=(8,), embedding_dim=2, batch_size=512, epochs=2)
TRIAL = Trial("hard_sharing", TASKS, 0, TRAINING)
NAME = "json"  # of a tracker for tests: a package that is always there


class Tiny:
    """Appends what it is told to a list, and raises what it is asked to."""

    told: ClassVar[list] = []
    raises: ClassVar[dict] = {}  # (method, step or None) -> error

    def __init__(self, entry, step):
        self.entry, self.step = entry, step
        self._tell("made", step)

    def start(self, config):
        self._tell("start", config)

    def log(self, step, metrics):
        self._tell("log", step, metrics)

    def finish(self, results, files):
        self._tell("finish", results, files)

    def _tell(self, what, *arguments):
        Tiny.told.append((self.entry, what, *arguments))
        for key in ((what, None), (what, arguments[0] if what == "log" else ...)):
            if key in Tiny.raises:
                raise Tiny.raises[key]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Let `NAME` be the tiny tracker, told often and of trainings with checkpoints as often; return what it is told."""
    monkeypatch.setitem(TRACKERS, NAME, "")
    made = Tracking.tracker
    monkeypatch.setattr(
        Tracking, "tracker", lambda self, *entry: Tiny(*entry) if self.name == NAME else made(self, *entry)
    )
    monkeypatch.setattr(loop, "WATCHED", 5)
    monkeypatch.setattr(starts, "train", partial(loop.train, checkpoint_every=5))
    monkeypatch.setattr(Tiny, "told", [])
    monkeypatch.setattr(Tiny, "raises", {})
    tracking.cache_clear()
    yield Tiny
    tracking.cache_clear()


def lab_of(log, folder, name=NAME):
    """Return a laboratory whose tracking has begun, as a process of its own would make it."""
    tracking.cache_clear()
    lab = Laboratory(log, folder)
    lab.tracking = tracking(folder, name)
    return lab


def steps_of(told):
    return [step for _, what, step, *_ in told if what == "log"]


def test_a_training_is_told_from_its_settings_to_its_results(small_log, tmp_path, tiny):
    lab = lab_of(small_log, tmp_path)
    lab.tracking.begin()
    record = lab.run(TRIAL)
    (_, made, _), *told = tiny.told
    assert made == "made"  # by `begin`, of the whole run
    (entry,) = {entry for entry, *_ in told}
    assert entry.startswith("trials/hard_sharing-trained-")
    assert [what for _, what, *_ in told][:2] == ["made", "start"]
    config = told[1][2]
    assert (config["tasks"], config["seed"], config["epochs"], config["trial"]["model"]) == (TASKS, 0, 2, TRIAL.model)
    batches = lab.batches(TRAINING)
    of_epoch = [*range(5, batches, 5), batches]
    assert steps_of(told) == [*of_epoch, *(batches + step for step in of_epoch)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for _, _, step, metrics in (line for line in told if line[1] == "log"):
        assert {"train_loss/ctr", "train_loss/cvr"} <= set(metrics)
        judged = [name for name in metrics if name.startswith("validation/")]
        assert bool(judged) == (step % batches == 0), "validation metrics once per epoch"
    ends = [metrics for _, what, step, metrics in (x for x in told if x[1] == "log") if step % batches == 0]
    validated = [line["metrics"]["all"]["ctr"]["auc"] for line in lines if line["split"] == "validation"]
    assert [metrics["validation/ctr/auc"] for metrics in ends] == validated[:2]
    (_, what, results, files) = told[-1]
    assert (what, files) == ("finish", ())
    assert results["final/test/ctr/auc"] == record["test"]["all"]["ctr"]["auc"]
    assert results["final/validation/tab_0/cvr/mse"] == record["validation"]["tab_0"]["cvr"]["mse"]


def test_losses_of_the_intervals_are_those_of_the_epoch(small_log, tmp_path, tiny):
    lab = lab_of(small_log, tmp_path)
    lab.tracking.begin()
    lab.single(TRAINING, "ctr", 0)
    batches = lab.batches(TRAINING)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    mean = [line["train_loss"] for line in lines if line["split"] == "train"]
    of_interval = {x[2]: x[3]["train_loss/ctr"] for x in tiny.told if x[1] == "log"}
    before, total = 0, 0.0
    for step in sorted(step for step in of_interval if step <= batches):
        total, before = total + (step - before) * of_interval[step], step
    assert total / batches == pytest.approx(mean[0], rel=1e-12)


@pytest.mark.parametrize("patience", [0, 1])
def test_a_tracked_training_ends_with_the_same_weights(small_log, tmp_path, tiny, patience):
    trial = replace(TRIAL, training=replace(TRAINING, patience=patience, ema=0.9))
    plain, tracked = lab_of(small_log, tmp_path / "plain", "none"), lab_of(small_log, tmp_path / "tracked")
    tracked.tracking.begin()
    records = [lab.run(trial) for lab in (plain, tracked)]
    assert steps_of(tiny.told)
    assert records[0]["test"] == records[1]["test"]
    for a, b in zip(plain.model(trial).parameters(), tracked.model(trial).parameters(), strict=True):
        assert torch.equal(a, b)
    assert not (tmp_path / "plain" / "tracking").exists()


@pytest.mark.parametrize("at", range(4))  # in an epoch, at its end, and in the next one
def test_a_resumed_training_goes_on_and_tells_no_step_twice(small_log, tmp_path, tiny, at):
    whole = lab_of(small_log, tmp_path / "whole")
    whole.tracking.begin()
    whole.run(TRIAL)
    steps, (*_, results) = steps_of(tiny.told), tiny.told
    at = steps[at]
    tiny.told, tiny.raises = [], {("log", at): KeyboardInterrupt()}
    lab = lab_of(small_log, tmp_path / "killed")
    lab.tracking.begin()
    with pytest.raises(KeyboardInterrupt):
        lab.run(TRIAL)
    tiny.raises = {}
    again = lab_of(small_log, tmp_path / "killed")
    again.tracking.begin()
    again.run(TRIAL)
    assert steps_of(tiny.told) == steps
    assert tiny.told[-1] == results
    assert [step for _, what, step in (x[:3] for x in tiny.told) if what == "made"][-1] == at


def test_what_was_trained_is_not_told_again(small_log, tmp_path, tiny):
    training = replace(TRAINING, epochs=1)
    trial = Trial("sparse_sharing", TASKS, 0, training, Masks("tickets", Search(training, rounds=1, density=0.3)))
    for _ in range(2):
        lab = lab_of(small_log, tmp_path)
        lab.tracking.begin()
        lab.run(trial)
    told = [(entry, what) for entry, what, *_ in tiny.told if entry != "run"]
    kinds = {entry.partition("/")[0] for entry, _ in told}
    assert kinds == {"singles", "searches", "trials"}
    for entry in {entry for entry, _ in told}:
        assert [what for name, what in told if name == entry and what != "log"] == ["made", "start", "finish"]


def test_warm_ups_and_rewinds_are_finished_without_results(small_log, tmp_path, tiny):
    lab = lab_of(small_log, tmp_path)
    lab.tracking.begin()
    warm = replace(TRAINING, epochs=1, warm_up=0.5)
    lab.tickets(Search(warm, rounds=1, density=0.3, rewind=0.5), "ctr", TASKS, 0)
    ends = {entry: what for entry, *what in tiny.told if entry != "run"}
    assert {what[0] for what in ends.values()} == {"finish"}
    bare = [entry for entry, (_, results, _) in ends.items() if not results]
    assert sorted(entry.rpartition("/")[2].partition("-")[0] for entry in bare) == ["rewind", "warm"]


def test_a_finished_entry_is_not_begun_again_by_a_trial_with_equal_masks(small_log, tmp_path, tiny):
    masks = Masks("random", Search(TRAINING, density=0.3))
    trial = Trial("sparse_sharing", TASKS, 0, TRAINING, masks)
    lab = lab_of(small_log, tmp_path)
    lab.tracking.begin()
    lab.run(trial)
    told = list(tiny.told)
    same = replace(trial, masks=replace(masks, search=replace(masks.search, rounds=1)))
    assert same.key != trial.key
    assert lab.run(same)["state"] == lab.run(trial)["state"]
    assert tiny.told == told


def test_results_of_a_single_model_that_is_a_row_too_are_told_once_each(small_log, tmp_path, tiny):
    lab = lab_of(small_log, tmp_path)
    lab.tracking.begin()
    lab.run(Trial("sparse_sharing", ("ctr",), 0, TRAINING))
    finished = [results for _, what, results, *_ in (x for x in tiny.told if x[1] == "finish")]
    names = [name for results in finished for name in results]
    assert len(names) == len(set(names))
    assert {"final/validation/ctr/auc", "final/test/ctr/auc"} <= set(names)


@pytest.mark.parametrize("method", ["made", "start", "log", "finish"])
def test_whatever_a_tracker_raises_ends_nothing_and_is_told_once(small_log, tmp_path, tiny, caplog, method):
    tiny.raises = {(method, None): RuntimeError("no\nserver")}
    lab = lab_of(small_log, tmp_path)
    with caplog.at_level(logging.WARNING):
        lab.tracking.begin()
        lab.run(replace(TRIAL, seed=1))
        lab_of(small_log, tmp_path).run(replace(TRIAL, seed=2))  # as another process does
    (record,) = caplog.records
    assert record.getMessage() == "warning: tracker json: got RuntimeError: no server; the run goes on without it"
    caplog.clear()
    tiny.raises = {}
    lab.tracking.begin()  # the next command
    lab.run(replace(TRIAL, seed=3))
    assert not caplog.records
    assert tiny.told[-1][1] == "finish"


def test_a_whole_run_is_told_when_it_has_more_seeds(tmp_path, tiny):
    def records(seeds):
        values = [{"ctr": {"auc": 0.5 + seed / 10}} for seed in range(seeds)]
        return [{"row": "base", "seed": seed, "test": {"all": tasks}} for seed, tasks in enumerate(values)]

    for seeds in (1, 1, 2):
        tracking.cache_clear()
        found = tracking(tmp_path, NAME)
        found.begin()
        found.whole({"density": 0.1}, seeds, records(seeds), [tmp_path / "report.md"])
    told = [x[1:] for x in tiny.told if x[1] in ("log", "finish")]
    finish = ("finish", {}, [tmp_path / "report.md"])
    assert [x[:2] for x in told] == [("log", 1), finish[:2], ("log", 2), finish[:2]]
    assert told[0][2] == {"base/ctr/auc": 0.5} and told[1] == finish
    assert told[2][2] == {"base/ctr/auc": pytest.approx(0.55, rel=1e-15)}


@pytest.mark.parametrize("method", ["made", "start", "log", "finish"])
def test_a_finished_run_is_told_by_the_next_command(tmp_path, tiny, method):
    def told_whole():
        tracking.cache_clear()
        tracking(tmp_path, NAME).whole({}, 1, [], [])
        return [x[1] for x in tiny.told if x[1] in ("log", "finish")]

    tiny.raises = {(method, None): RuntimeError("no server")}
    told_whole()
    tiny.told, tiny.raises = [], {}
    assert told_whole() == (["finish"] if method == "finish" else ["log", "finish"])
    assert not list(tmp_path.rglob("failed"))
    tiny.told = []
    assert told_whole() == []


def test_a_tracker_is_told_what_another_one_was_told_and_of_no_error_of_its(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(TRACKERS, "csv", "")
    monkeypatch.setattr(Tracking, "tracker", lambda self, *entry: Tiny(*entry))
    for name in (NAME, "csv"):
        found = tracking(tmp_path, name)
        found.begin()
        found.course("singles/a").log(5, {})
        found.finish("singles/a", {})
        found.guarded(lambda: int("no"))
    assert [x[1] for x in tiny.told if x[0] == "singles/a"] == ["made", "start", "log", "finish"] * 2
    assert not Tracking(tmp_path, NAME).is_on
    tracking(tmp_path, NAME).begin()
    assert Tracking(tmp_path, NAME).is_on and not Tracking(tmp_path, "csv").is_on


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    with pytest.raises(InputError, match=r"^tracker: got 'wandb', wanted one of none, tensorboard, mlflow, json$"):
        Resources(tracker="wandb")
    monkeypatch.setitem(TRACKERS, "no_such_package", "")
    with pytest.raises(InputError, match=r"not installed, wanted `pip install 'lt4rec-sparse\[no_such_package\]'`$"):
        check_tracker("no_such_package")
    check_tracker("none")


# The real ones


def scalars(folder):
    """Return what TensorBoard shows of an entry: tag -> steps."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def interrupted(log, folder, name, monkeypatch):
    """Train a trial, killed once in the middle, and return its laboratory."""
    tell = trackers.Course._tell

    def killed(course, *told):
        tell(course, *told)
        if course._step >= 10:
            raise KeyboardInterrupt

    lab = lab_of(log, folder, name)
    lab.tracking.begin()
    with monkeypatch.context() as patch:
        patch.setattr(trackers.Course, "_tell", killed)
        with pytest.raises(KeyboardInterrupt):
            lab.run(TRIAL)
    again = lab_of(log, folder, name)
    again.tracking.begin()
    again.run(TRIAL)
    return again


def test_tensorboard_shows_an_interrupted_training_as_one(small_log, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    lab = interrupted(small_log, tmp_path, "tensorboard", monkeypatch)
    (entry,) = (tmp_path / "tensorboard" / "trials").iterdir()
    found, batches = scalars(entry), lab.batches(TRAINING)
    of_epoch = [*range(5, batches, 5), batches]
    assert found["train_loss/ctr"] == [*of_epoch, *(batches + step for step in of_epoch)]
    assert found["validation/cvr/mse"] == [batches, 2 * batches]
    assert found["final/test/ctr/auc"] == [2 * batches]


def test_mlflow_has_an_interrupted_training_as_one_run(small_log, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # much quicker to make than a database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    mlflow = pytest.importorskip("mlflow")
    lab = interrupted(small_log, tmp_path / "shop", "mlflow", monkeypatch)
    lab.tracking.whole({"density": 0.1}, 1, [], [tmp_path / "shop" / "metrics.jsonl"])
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("lt4rec-sparse/shop")
    whole, run = client.search_runs([experiment.experiment_id])
    batches = lab.batches(TRAINING)
    assert run.info.status == whole.info.status == "FINISHED"
    assert run.info.run_name.startswith("trials/hard_sharing-trained-")
    assert run.data.params["trial.training.hidden"] == "(8,)"
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train_loss/ctr")]
    of_epoch = [*range(5, batches, 5), batches]
    assert steps == [*of_epoch, *(batches + step for step in of_epoch)]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "final/test/ctr/auc")] == [2 * batches]
    assert [file.path for file in client.list_artifacts(whole.info.run_id)] == ["metrics.jsonl"]


@pytest.mark.heavy  # two interpreters
@pytest.mark.filterwarnings("default::DeprecationWarning:mlflow.*")  # of an SQLAlchemy beyond constraints.txt
@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_workers_tell_trackers_side_by_side(small_folder, small_log, tmp_path, name):
    package = pytest.importorskip(name)
    from lt4rec_sparse.recsys.data import prepare

    prepare(small_folder, tmp_path / "data")
    trials = [replace(TRIAL, seed=seed) for seed in (0, 1)]
    carrier(tmp_path, Resources(2, tracker=name), lambda *_: None, "test")("train", trials)
    if name == "tensorboard":
        assert len(list((tmp_path / "tensorboard" / "trials").iterdir())) == 2
        return
    client = package.MlflowClient(f"sqlite:///{tmp_path.resolve() / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == f"lt4rec-sparse/{tmp_path.name}")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.params["seed"] for run in runs) == ["0", "1"]
    assert all(run.info.status == "FINISHED" for run in runs)
