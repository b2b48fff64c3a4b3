"""Before it is trained, a model scores every row at the base rates of the training days."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from lt4rec_sparse.recsys.data import SimulatorConfig, prepare, simulate
from lt4rec_sparse.recsys.harness.base_rates import base_rates
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.trials import Masks, Search, Training, Trial, digest
from lt4rec_sparse.recsys.metrics import LogLoss
from lt4rec_sparse.recsys.models.build import MODELS

TASKS = ("ctr", "cvr")
TRAINING = Training(hidden=(16, 8), embedding_dim=4, batch_size=512, base_rates=True)


@pytest.fixture
def lab(small_log, tmp_path):
    return Laboratory(small_log, tmp_path)


def whole(prepared):
    (batch,) = prepared.stream("train", 1 << 20, shuffle=False).epoch(0)
    return batch


def test_rates_are_weighted_means_over_the_tasks_rows(small_log):
    batch = whole(small_log)
    for task, rate in base_rates(small_log, TASKS).items():
        rows = batch.rows[task]
        weights = batch.weights[task][rows].double()
        mean = (batch.labels[task][rows].double() * weights).sum() / weights.sum()
        assert rate == pytest.approx(float(mean), rel=1e-12)
    counts = small_log.counts["train"]["tasks"]
    assert base_rates(small_log, ("cvr",))["cvr"] == pytest.approx(counts["cvr"]["label_mean"], rel=1e-12)


def test_over_all_impressions_a_later_rate_is_of_what_was_clicked(small_log):
    batch, found = whole(small_log), base_rates(small_log, TASKS, entire_space=True)
    click, known = batch.labels["ctr"].double(), (batch.labels["ctr"] < 0.5) | batch.rows["cvr"]
    assert found["ctr"] == base_rates(small_log, TASKS)["ctr"]
    assert found["cvr"] == pytest.approx(
        float(batch.labels["cvr"].double()[known].sum() / click[known].sum()), rel=1e-9
    )


@pytest.mark.parametrize(("label", "wanted"), [(0.0, 0.125), (1.0, 0.875)])
def test_a_task_of_one_class_has_a_rate_half_a_row_away(label, wanted, monkeypatch):
    columns = {"label.a": np.full(4, label), "member.a": np.ones(4), "weight.a": np.full(4, 3.0)}
    monkeypatch.setattr("lt4rec_sparse.recsys.harness.base_rates._labels", lambda prepared, tasks: iter([columns]))
    assert base_rates(None, ("a",)) == {"a": wanted}


@pytest.mark.parametrize("cross", ["dlrm", "wide_deep"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_starts_at_the_rates(lab, model, cross):
    """Exactly, once its heads' weights are zero; and these heads alone give the logits."""
    tasks = ("cvr",) if model == "single_task" else TASKS
    training = replace(TRAINING, cross=cross)
    network, before = (
        lab.network(model, replace(training, base_rates=on), tasks, 0, {}).state_dict() for on in (True, False)
    )
    heads = [name for name in network if not torch.equal(network[name], before[name])]
    assert len(heads) == len(tasks)
    assert all(name.endswith("bias") for name in heads)
    started = lab.network(model, training, tasks, 0, {})
    for task in tasks:
        torch.nn.init.zeros_(started.head(task).weight)
    rates = base_rates(lab.prepared, tasks, model == "esmm")
    wanted = torch.tensor([[math.log(rate / (1 - rate)) for rate in rates.values()]])
    with torch.no_grad():
        logits = started(next(lab.prepared.stream("test", 64).epoch(0)).features)
    assert torch.equal(logits, wanted.expand_as(logits))


def test_baselines_searches_and_masked_networks_start_alike(lab):
    full = lab.sparse_sharing(TRAINING, TASKS, 0).state_dict()
    masked = lab._new(Trial("sparse_sharing", TASKS, 0, TRAINING, Masks("random", Search(TRAINING)))).state_dict()
    rates = base_rates(lab.prepared, TASKS)
    for task, rate in rates.items():
        bias = f"mlp.heads.{task}.bias"
        assert full[bias] == masked[bias] == lab.sparse_sharing(TRAINING, (task,), 0).state_dict()[bias]
        assert full[bias].item() == pytest.approx(math.log(rate / (1 - rate)), rel=1e-6)


def test_experiments_of_before_are_found_again():
    before = {name: value for name, value in asdict(Training()).items() if name != "base_rates"}
    assert digest(asdict(Training())) == digest(before)
    assert digest(asdict(Training(base_rates=True))) != digest(before)


@pytest.mark.parametrize("model", ["sparse_sharing", "mmoe", "esmm"])
def test_a_few_steps_lose_nothing_to_a_constant(tmp_path, model):
    """Of 5 % clicks; a model that starts at one half is worse by more than half of the constant's loss."""
    simulate(SimulatorConfig(users=200, videos=100, impressions=4_000, click_rate=0.05), tmp_path / "log")
    prepared = prepare(tmp_path / "log", tmp_path / "data")
    rates, constant = base_rates(prepared, TASKS), LogLoss()
    (batch,) = prepared.stream("validation", 1 << 20, shuffle=False).epoch(0)
    logit = math.log(rates["ctr"] / (1 - rates["ctr"]))
    constant.update(np.full(batch.batch, logit), batch.labels["ctr"].double().numpy(), batch.groups.numpy())
    losses = {}
    for on in (True, False):
        lab = Laboratory(prepared, tmp_path / str(on))
        trial = Trial(model, TASKS, 0, replace(TRAINING, batch_size=1024, base_rates=on), is_tested=False)
        losses[on] = json.loads(json.dumps(lab.run(trial)))["validation"]["all"]["ctr"]["log_loss"]
    # The standard error of the constant's own loss on so few rows.
    noise = math.sqrt(rates["ctr"] * (1 - rates["ctr"]) / batch.batch) * abs(logit)
    assert losses[True] < constant.compute() + noise
    assert losses[False] > 1.5 * constant.compute()
