"""Trials are carried out from the starts, through the masks and by the searches that they declare; nothing twice."""

import json
from dataclasses import replace

import pytest
import torch

from lt4rec_sparse.masks import overlap
from lt4rec_sparse.recsys.harness import starts as module
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.trials import METHODS, Masks, Search, Training, Trial

TASKS = ("ctr", "cvr")
TRAINING = Training(hidden=(16, 8), embedding_dim=4, batch_size=512)
SEARCH = Search(TRAINING, rounds=2, density=0.25)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lab(small_log, tmp_path_factory):
    return Laboratory(small_log, tmp_path_factory.mktemp("lab"))


def sparse(kind="tickets", search=SEARCH, seed=0, **masks) -> Trial:
    training = replace(TRAINING, warm_up=search.training.warm_up)
    return Trial("sparse_sharing", TASKS, seed, training, Masks(kind, search, **masks))


@pytest.fixture
def nothing_is_trained(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("trained, wanted what was trained before")

    monkeypatch.setattr(module, "train", refuse)


def test_a_baseline_is_level_0_of_every_search_and_the_single_task_row(lab, monkeypatch):
    single = lab.single(TRAINING, "cvr", 0)
    trained = []
    train = module.train
    monkeypatch.setattr(module, "train", lambda *a, **k: (trained.append(1), train(*a, **k))[1])
    found = lab.tickets(SEARCH, "cvr", TASKS, 0)
    assert len(trained) == SEARCH.rounds
    assert found[0].metrics == single["validation"]["all"]["cvr"]
    assert found[0].mask.density == 1
    record = lab.run(Trial("sparse_sharing", ("cvr",), 0, TRAINING))
    assert len(trained) == SEARCH.rounds
    assert record["validation"] == single["validation"]
    assert list(record["test"]["all"]) == ["cvr"]


def test_all_networks_of_a_seed_start_alike(lab, small_log):
    shared = lab.sparse_sharing(TRAINING, TASKS, 0).state_dict()
    for task in TASKS:
        own = lab.sparse_sharing(TRAINING, (task,), 0).state_dict()
        assert all(torch.equal(own[name], shared[name]) for name in own if not name.endswith((".masks", ".mask_tasks")))
        assert f"mlp.heads.{task}.weight" in own
    started = lab._new(sparse()).state_dict()
    assert all(
        torch.equal(started[name], shared[name]) for name in shared if not name.endswith((".masks", ".mask_tasks"))
    )
    fresh = lab._new(sparse(fresh_start=True)).state_dict()
    assert not torch.equal(fresh["mlp.layers.0.weight"], shared["mlp.layers.0.weight"])
    assert torch.equal(fresh["mlp.layers.0.masks"], started["mlp.layers.0.masks"])
    other = lab.sparse_sharing(TRAINING, TASKS, 1).state_dict()
    assert not torch.equal(other["inputs.embedding"], shared["inputs.embedding"])


def test_rescaled_weights_are_larger_by_the_root_of_their_density(lab):
    plain, scaled = (lab._new(sparse("random", rescale=rescale)) for rescale in (False, True))
    for a, b in zip(plain.mlp.masked_layers(), scaled.mlp.masked_layers(), strict=True):
        ratio = torch.tensor(1 / a.masks.float().mean().item()).sqrt()
        assert torch.allclose(b.weight, a.weight * ratio, rtol=1e-6)


def test_a_trial_is_trained_once(lab, monkeypatch):
    trial = sparse(level="last")
    record = lab.run(trial)
    assert record["masks"]["density"].keys() == set(TASKS)
    assert record["tickets"]["ctr"][-1]["density"] == pytest.approx(SEARCH.density, abs=1e-3)
    assert record["seconds"]["search"] > 0
    assert record["multiply_adds"] < 0.3 * 2 * sum(w.numel() for w in lab.model(trial).mlp.masked_weights().values())
    monkeypatch.setattr(module, "train", None)
    again = Laboratory(lab.prepared, lab.folder)
    assert again.run(trial) == record
    assert json.loads(json.dumps(record)) == record
    predicted = again.predictions(trial, "test")
    rows = predicted.rows["cvr"]
    error = (predicted.probabilities["cvr"] - predicted.labels["cvr"])[rows].double().square().mean().item()
    assert error == pytest.approx(record["test"]["all"]["cvr"]["mse"], rel=1e-5)


def test_equal_masks_are_trained_once(lab, monkeypatch):
    """Where the best tickets are the last ones, the two trials are one training; at other rates they are two."""
    last = sparse(level="last")
    lab.run(last)
    best = sparse()
    if lab.masks(best) != lab.masks(last):
        monkeypatch.setattr(Laboratory, "_best", lambda lab, task, tickets: tickets[-1])
    trained = []
    train = module.train
    monkeypatch.setattr(module, "train", lambda *a, **k: (trained.append(1), train(*a, **k))[1])
    record = lab.run(replace(best, is_tested=False))
    assert not trained
    assert record["state"] == lab.run(last)["state"]
    assert record["validation"] == lab.run(last)["validation"]
    lab.run(replace(best.at(0, {"ctr": 2e-3, "cvr": 1e-3}), is_tested=False))
    assert trained


EVERYTHING = replace(
    TRAINING, base_rates=True, schedule="linear", warm_up_steps=2, weight_decay=0.1, clip_norm=0.05, ema=0.9
)


@pytest.mark.parametrize("training", [TRAINING, EVERYTHING, replace(EVERYTHING, epochs=2, patience=1)])
def test_a_training_that_was_interrupted_goes_on_and_ends_the_same(small_log, tmp_path, monkeypatch, training):
    trial = Trial("sparse_sharing", TASKS, 0, training, Masks("random", SEARCH), is_tested=False)
    whole = Laboratory(small_log, tmp_path / "whole")
    wanted = whole.run(trial)
    train = module.train

    def cut(*args, **kwargs):
        def stop(batch, done, total):
            if done == 4:
                raise KeyboardInterrupt

        return train(*args, **kwargs | {"checkpoint_every": 2, "after_batch": stop})

    monkeypatch.setattr(module, "train", cut)
    lab = Laboratory(small_log, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        lab.run(trial)
    assert list((tmp_path / "cut").rglob("*.checkpoint.pt"))
    monkeypatch.setattr(module, "train", train)
    record = lab.run(trial)
    assert record["validation"] == wanted["validation"]
    states = [laboratory.model(trial).state_dict() for laboratory in (whole, lab)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not list((tmp_path / "cut").rglob("*.checkpoint.pt"))


@pytest.mark.parametrize(
    "change", [{"schedule": "cosine"}, {"warm_up_steps": 4}, {"weight_decay": 0.5}, {"clip_norm": 0.01}, {"ema": 0.9}]
)
def test_every_option_of_a_step_changes_what_is_trained_and_no_pruned_weight(lab, change):
    plain, changed = (
        Trial("sparse_sharing", TASKS, 0, training, Masks("random", SEARCH), is_tested=False)
        for training in (TRAINING, replace(TRAINING, **change))
    )
    for trial in (plain, changed):
        lab.run(trial)
    start = lab._new(plain).mlp.masked_layers()
    layers = [lab.model(trial).mlp.masked_layers() for trial in (plain, changed)]
    for first, a, b in zip(start, *layers, strict=True):
        kept = first.masks.any(0)
        assert torch.equal(a.weight[~kept], first.weight[~kept])
        assert torch.equal(b.weight[~kept], first.weight[~kept])
        assert not torch.equal(a.weight[kept], b.weight[kept])


def test_what_is_judged_is_the_average(lab):
    """Were it the weights themselves, an average would not change the metrics of the validation days."""
    judged = [
        lab.run(Trial("mmoe", TASKS, 0, replace(TRAINING, ema=ema), objective="joint", is_tested=False))["validation"]
        for ema in (0.0, 0.9)
    ]
    assert judged[0] != judged[1]


@pytest.mark.parametrize("tasks", [TASKS, ("ctr",)])
def test_another_top_k_judges_what_is_trained_and_trains_nothing(lab, monkeypatch, tasks):
    plain = Trial("sparse_sharing", tasks, 0, TRAINING)
    before = lab.run(plain)
    monkeypatch.setattr(module, "train", None)
    after = lab.run(replace(plain, top_k=3))
    assert after["state"] == before["state"]
    for split in ("validation", "test"):
        for part, judged in after[split].items():
            assert {"ndcg@3", "hit_rate@3"} <= judged["ctr"].keys()
            rest = {name: value for name, value in judged["ctr"].items() if "@" not in name}
            assert rest == before[split][part]["ctr"]
    assert replace(plain, top_k=3).at(0, is_tested=False).top_k == 0, "choices are made without it"


def test_metrics_are_logged_for_every_training(small_log, tmp_path):
    lab = Laboratory(small_log, tmp_path)
    trial = Trial("sparse_sharing", TASKS, 0, TRAINING, Masks("random", SEARCH))
    record = lab.run(trial)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line.get("task")) for line in lines] == [
        ("train", "ctr"),
        ("train", "cvr"),
        ("validation", None),
        ("test", None),
    ]
    assert lines[-1]["metrics"] == record["test"]


def test_a_choice_is_made_without_the_test_days(lab):
    assert "test" not in lab.run(replace(sparse("random"), is_tested=False))


def test_masks_are_what_they_are_called(lab):
    def masks(*args, **kwargs):
        found = lab.masks(sparse(*args, **kwargs))
        return found["ctr"], found["cvr"]

    tickets, last = masks(), masks(level="last")
    found = {task: lab.tickets(SEARCH, task, TASKS, 0) for task in TASKS}
    assert last == tuple(found[task][-1].mask for task in TASKS)
    assert all(mask in [ticket.mask for ticket in found[task][1:]] for task, mask in zip(TASKS, tickets, strict=True))
    shuffled = masks("random_like", level="last")
    assert [mask.layer_nnz() for mask in shuffled] == [mask.layer_nnz() for mask in last]
    assert shuffled != last
    assert masks("one_for_all", level="last") == (last[0], last[0])
    uniform = masks("random")
    assert uniform[0] != uniform[1]
    assert all(density == pytest.approx(0.25, abs=0.01) for density in uniform[0].layer_density().values())
    one = masks("one_random")
    assert one[0] == one[1]
    joint = masks("unanimous")
    assert joint[0] == joint[1]
    assert joint[0].layer_nnz() == uniform[0].layer_nnz()
    for kind in ("separate", "random_separate"):
        for shared, iou in ((0.0, 0.0), (0.5, 1 / 3), (1.0, 1.0)):
            a, b = masks(kind, shared=shared)
            assert a.layer_nnz() == b.layer_nnz() == uniform[0].layer_nnz()
            assert all(value == pytest.approx(iou, abs=0.03) for value in overlap(a, b).values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_a_ticket_of_the_density(lab, method):
    search = replace(SEARCH, method=method)
    ticket = lab.tickets(search, "ctr", TASKS, 0)[-1]
    assert ticket.mask.density == pytest.approx(0.25, abs=0.01)
    assert set(ticket.metrics) == (set() if method == "one_shot" else {"auc", "gauc", "log_loss", "calibration"})
    assert lab.seconds(Masks(search=search, level="last"), ("ctr",), 0) > 0


def test_a_search_goes_on_where_a_shorter_one_ended(lab, nothing_is_trained):
    shorter = replace(SEARCH, rounds=1, density=0.5)  # the same share per round
    assert [t.mask for t in lab.tickets(shorter, "ctr", TASKS, 0)] == [
        t.mask for t in lab.tickets(SEARCH, "ctr", TASKS, 0)[:2]
    ]


def test_a_search_that_goes_further_prunes_the_last_level_of_one_that_ended(lab):
    """What ended has judged its last level and not pruned it."""
    for rounds in (1, 3):
        search = replace(SEARCH, rounds=rounds, density=0.5**rounds)
        found = lab.tickets(search, "cvr", TASKS, 1)
    whole = lab.tickets(search, "cvr", TASKS, 1)
    assert [ticket.mask.density for ticket in whole] == pytest.approx([1, 0.5, 0.25, 0.125], abs=2e-3)
    assert found == whole


def test_a_task_searches_at_the_rate_of_its_baseline(lab):
    rate = 2 * TRAINING.learning_rate
    search = replace(SEARCH, training=TRAINING.at({"ctr": TRAINING.learning_rate, "cvr": rate}))
    assert search.folder("ctr") == SEARCH.folder("ctr")
    assert search.folder("cvr") != SEARCH.folder("cvr")
    found = lab.tickets(search, "cvr", TASKS, 0)
    single = lab.single(replace(TRAINING, learning_rate=rate), "cvr", 0)
    assert found[0].metrics == single["validation"]["all"]["cvr"]


def test_masks_cost_the_trainings_that_they_need(lab):
    def seconds(kind="tickets", **masks):
        return lab.seconds(Masks(kind, SEARCH, **masks), TASKS, 0)

    for task in TASKS:
        lab.tickets(SEARCH, task, TASKS, 0)
    singles = sum(lab.single(TRAINING, task, 0)["seconds"] for task in TASKS)
    assert seconds("random") == 0
    assert seconds("unanimous") == singles
    assert singles < seconds(level="last") < seconds(level="best")
    assert seconds("one_for_all", level="last") < seconds(level="last")


def test_a_warm_up_is_where_searches_and_trials_start(lab):
    search = replace(SEARCH, training=replace(TRAINING, warm_up=0.5))
    warm = lab.warm(search.training, TASKS, 0)[0]
    cold = lab.sparse_sharing(TRAINING, TASKS, 0).state_dict()
    assert not torch.equal(warm["mlp.layers.0.weight"], cold["mlp.layers.0.weight"])
    started = lab._new(sparse("random", search)).state_dict()
    assert torch.equal(started["mlp.layers.0.weight"], warm["mlp.layers.0.weight"])
    found = lab.tickets(search, "cvr", TASKS, 0)
    assert found[0].metrics != lab.single(TRAINING, "cvr", 0)["validation"]["all"]["cvr"]


def test_late_rewinding_prunes_other_weights(lab):
    rewound = lab.tickets(replace(SEARCH, rewind=0.5), "ctr", TASKS, 0)
    plain = lab.tickets(SEARCH, "ctr", TASKS, 0)
    assert rewound[-1].mask.nnz == plain[-1].mask.nnz
    assert rewound[-1].mask != plain[-1].mask


@pytest.mark.parametrize("objective", ["alternating", "joint", "uncertainty", "pcgrad"])
def test_every_objective_trains(lab, objective):
    record = lab.run(Trial("shared_bottom", TASKS, 0, TRAINING, objective=objective, is_tested=False))
    assert record["masks"] is None
    assert 0 < record["validation"]["all"]["cvr"]["mse"] < 0.2


@pytest.mark.parametrize("model", ["hard_sharing", "mmoe", "ple", "aitm", "esmm"])
def test_every_model_trains(lab, model):
    record = lab.run(Trial(model, TASKS, 0, TRAINING, objective="joint", is_tested=False))
    assert 0 < record["validation"]["all"]["cvr"]["mse"] < 0.2
