"""Declared trials: equal settings have equal names, different ones different names; searches share common parts."""

from dataclasses import fields, replace

import pytest

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.recsys.harness.objectives import obstacle
from lt4rec_sparse.recsys.harness.trials import Masks, Search, Training, Trial
from lt4rec_sparse.recsys.models import Conflict

TRIAL = Trial("sparse_sharing", ("ctr", "cvr"), masks=Masks())
OTHERS = {
    "model": Trial("mmoe", ("ctr", "cvr")),
    "tasks": replace(TRIAL, tasks=("cvr", "ctr")),
    "seed": replace(TRIAL, seed=1),
    "training": replace(TRIAL, training=Training(learning_rate=2e-3)),
    "masks": replace(TRIAL, masks=Masks(level="last")),
    "objective": replace(TRIAL, objective="joint"),
    "scales": replace(TRIAL, scales=(("cvr", 5.0),)),
    "conflict": replace(TRIAL, conflict=Conflict()),
    "options": replace(TRIAL, options=(("experts", 2),)),
    "is_tested": replace(TRIAL, is_tested=False),
    "top_k": replace(TRIAL, top_k=10),
}


def test_every_setting_is_in_the_key():
    assert set(OTHERS) == {field.name for field in fields(Trial)}
    keys = {TRIAL.key, *(other.key for other in OTHERS.values())}
    assert len(keys) == 1 + len(OTHERS)
    assert replace(TRIAL).key == TRIAL.key


def test_settings_that_came_later_leave_older_names_as_they_were():
    before = Trial("sparse_sharing", ("ctr", "cvr"), training=Training(warm_up=0.5), masks=Masks())
    assert before.key == "sparse_sharing-beb538c47f03-seed_0", "as before there were sparse gradients"
    assert before.masks.search.folder("ctr") == "rounds-6809e0223a1d"
    later = replace(before, training=replace(before.training, sparse_gradients=True))
    assert later.key != before.key
    assert Search(Training(sparse_gradients=True)).folder("ctr") != Search().folder("ctr")


def test_pcgrad_projects_no_sparse_gradients():
    trial = Trial("shared_bottom", ("ctr", "cvr"), objective="pcgrad")
    assert obstacle(trial, {"ctr": "binary", "cvr": "ratio"}, ()) is None
    sparse = replace(trial, training=Training(sparse_gradients=True))
    found = obstacle(sparse, {"ctr": "binary", "cvr": "ratio"}, ())
    assert found == "pcgrad: got sparse gradients, wanted dense ones, which it projects"


def test_another_seed_and_rate_change_nothing_else():
    other = TRIAL.at(3, dict.fromkeys(TRIAL.tasks, 5e-4), is_tested=False)
    assert (other.seed, other.training.learning_rate, other.is_tested) == (3, 5e-4, False)
    assert other.masks == TRIAL.masks, "the search keeps its own learning rate"
    assert other.at(0, dict.fromkeys(TRIAL.tasks, TRIAL.training.learning_rate)) == TRIAL


def test_each_task_has_a_rate_of_its_own():
    rates = {"cvr": 2e-3, "ctr": 5e-4, "like": 1.0}
    trial = TRIAL.at(0, rates)
    assert {task: trial.training.rate(task) for task in trial.tasks} == {"ctr": 5e-4, "cvr": 2e-3}
    assert trial.key != TRIAL.at(0, {"ctr": 2e-3, "cvr": 5e-4}).key
    assert trial == TRIAL.at(0, dict(reversed(rates.items()))), "the order in which rates are named means nothing"
    assert trial.training.of("cvr") == Training(learning_rate=2e-3), "what a single-task model of that rate has"
    joint = replace(TRIAL, objective="joint")
    assert joint.at(0, dict.fromkeys(TRIAL.tasks, 2e-3)).training.learning_rate == 2e-3
    with pytest.raises(InputError, match="rates: got one per task for sparse_sharing with one step for all"):
        joint.at(0, rates)


def test_searches_that_take_the_same_steps_share_a_folder():
    four, eight = Search(rounds=4, density=0.2), Search(rounds=8, density=0.04)
    assert four.folder("ctr") == eight.folder("ctr")
    assert Search(rounds=4, density=0.1).folder("ctr") != four.folder("ctr")
    for change in (
        {"granularity": "neuron"},
        {"scope": "layer"},
        {"method": "one_shot"},
        {"rewind": 0.5},
        {"training": Training(warm_up=0.5)},
    ):
        assert Search(**change).folder("ctr") != four.folder("ctr")
    assert Search(method="gradual", density=0.1).folder("ctr") != Search(method="gradual").folder("ctr")
    of_tasks = Search(density=(("ctr", 0.1), ("cvr", 0.2)))
    assert of_tasks.folder("cvr") == four.folder("cvr")
    assert of_tasks.folder("ctr") == Search(density=0.1).folder("ctr")


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda: Search(method="magic"), "method: got 'magic', wanted one of rounds"),
        (lambda: Search(granularity="half"), "granularity: got 'half', wanted one of weight"),
        (lambda: Search(density=1.0), "density: got 1.0, wanted more than 0 and less than 1"),
        (lambda: Search(density=(("ctr", 0.1), ("cvr", 0.0))), "density: got 0.0, wanted more than 0"),
        (lambda: Search(density=(("ctr", 0.1),)).density_of("cvr"), "density: got tasks ctr, wanted cvr among them"),
        (lambda: Masks("unanimous", Search(density=(("ctr", 0.1),))), "density: got one per task with unanimous masks"),
        (lambda: Masks("separate"), "shared: got None with separate masks"),
        (lambda: Masks(shared=0.5), "shared: got 0.5 with tickets masks"),
        (lambda: Training(dtype="float8"), "dtype: got 'float8', wanted one of float32, bfloat16"),
        (lambda: Training(learning_rate=0.0), "learning_rate: got 0.0, wanted more than 0"),
        (lambda: Training(schedule="step"), "schedule: got 'step', wanted one of constant, linear, cosine"),
        (lambda: Training(warm_up_steps=-1), "warm_up_steps: got -1, wanted 0 or more"),
        (lambda: Training(weight_decay=-0.1), "weight_decay: got -0.1, wanted 0 or more, and finite"),
        (lambda: Training(clip_norm=float("nan")), "clip_norm: got nan, wanted 0 or more, and finite"),
        (lambda: Training(ema=1.0), "ema: got 1.0, wanted at least 0 and less than 1"),
        (lambda: Trial("mmoe", ("ctr",), top_k=-1), "top_k: got -1, wanted 0 or more"),
        (lambda: Trial("oracle", ("ctr",)), "model: got 'oracle', wanted one of"),
        (lambda: replace(TRIAL, objective="both"), "objective: got 'both', wanted one of alternating"),
    ],
)
def test_bad_settings_are_refused(make, shown):
    with pytest.raises(InputError, match=shown.replace("(", r"\(")):
        make()
