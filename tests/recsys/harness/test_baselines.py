"""Baselines: a constant that is the base rate, trees that learn, both judged as every model is."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lt4rec_sparse.recsys.harness import baselines as module
from lt4rec_sparse.recsys.harness.baselines import CONSTANT, TITLES, TREES, baselines, obstacle
from lt4rec_sparse.recsys.harness.laboratory import Laboratory

TASKS = ("ctr", "cvr")
needs_trees = pytest.mark.skipif(module.find_spec("sklearn") is None, reason="scikit-learn is absent")


@pytest.fixture(scope="module")
def lab(small_log, tmp_path_factory):
    return Laboratory(small_log, tmp_path_factory.mktemp("lab"))


def of_row(found, row, seed=0):
    (record,) = (record for record in found.records if (record["row"], record["seed"]) == (row, seed))
    return record


def test_the_constant_is_the_base_rate(lab):
    record = of_row(baselines(lab, TASKS, 2), CONSTANT, 1)
    rates = lab.base_rates(TASKS)
    for split in ("validation", "test"):
        counts = lab.prepared.counts[split]["tasks"]
        ctr, cvr = (record[split]["all"][task] for task in TASKS)
        assert ctr["auc"] == ctr["gauc"] == 0.5
        rate, mean = rates["ctr"], counts["ctr"]["label_mean"]
        entropy = -(mean * math.log(rate) + (1 - mean) * math.log(1 - rate))
        assert ctr["log_loss"] == pytest.approx(entropy, rel=1e-6)
        assert cvr["calibration"] == pytest.approx(rates["cvr"] / counts["cvr"]["label_mean"], rel=1e-6)
    assert (record["parameters"], record["multiply_adds"], record["masks"]) == (2, 0, None)


@needs_trees
def test_trees_rank_better_than_a_constant_and_are_trained_once(lab, monkeypatch):
    found = baselines(lab, TASKS, 1)
    assert found.rows == TITLES
    assert not found.left_out
    constant, trees = (of_row(found, row)["test"]["all"] for row in (CONSTANT, TREES))
    assert trees["ctr"]["auc"] > 0.55
    assert trees["ctr"]["log_loss"] < constant["ctr"]["log_loss"]
    assert trees["cvr"]["mse"] < constant["cvr"]["mse"]
    assert set(of_row(found, TREES)["test"]) == set(of_row(found, CONSTANT)["test"]) == {"all", "tab_0"}
    monkeypatch.setattr(module, "_trees", None)
    monkeypatch.setattr(module, "_constant", None)
    assert baselines(Laboratory(lab.prepared, lab.folder), TASKS, 1) == found


def test_columns_are_ids_and_bags_are_length_and_first_id(small_log):
    batch = next(small_log.stream("test", 50, shuffle=False).epoch(0))
    columns, features = module._columns(batch.features), batch.features
    single = features.single.shape[1]
    fields = small_log.encoder.fields
    assert columns.shape == (50, single + 2 * (len(fields) - single))
    numbers = torch.arange(100.0).view(50, 2)
    with_two = module._columns(replace(features, numbers=numbers))
    assert np.array_equal(with_two, np.concatenate([columns, numbers.numpy()], 1))
    assert np.array_equal(columns[:, :single], features.single.numpy())
    offsets = features.multi_offsets.tolist()
    for bag in range(len(fields) - single):
        for row in range(50):
            begin, end = offsets[bag * 50 + row], offsets[bag * 50 + row + 1]
            assert columns[row, single + bag] == end - begin
            first = float(features.multi_values[begin]) if end > begin else -1.0
            assert columns[row, single + len(fields) - single + bag] == first
    assert len(module._categories(small_log.encoder)) == columns.shape[1]


def test_trees_that_cannot_be_are_left_out_with_the_reason(lab, monkeypatch):
    for split, name in (("train", "training"), ("validation", "validation")):
        counts = {**lab.prepared.counts, split: {**lab.prepared.counts[split], "rows": 5_000_001}}
        large = replace(lab.prepared, counts=counts)
        assert obstacle(large, TASKS) == f"got 5,000,001 {name} rows, wanted at most 5,000,000"
    one_class = {"rows": 9, "tasks": {"ctr": {"rows": 9, "label_mean": 0.0}}}
    assert "got only labels 0 of ctr" in obstacle(
        replace(large, counts={"train": one_class, "validation": one_class}), ("ctr",)
    )
    monkeypatch.setattr(module, "version", lambda name: "1.6.2")
    assert obstacle(lab.prepared, TASKS).startswith("scikit-learn: got 1.6.2, wanted 1.7 or newer")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert obstacle(lab.prepared, TASKS).startswith("scikit-learn: got none, wanted 1.7 or newer: `pip install ")
    found = baselines(lab, TASKS, 1)
    assert list(found.rows) == [CONSTANT]
    assert list(found.left_out) == [TITLES[TREES]]


def test_a_tree_scores_no_rows(lab):
    model = module._Trees({"ctr": None})
    empty = next(lab.prepared.stream("test", 4).epoch(0)).take(torch.empty(0, dtype=torch.int64))
    assert model(empty.features, "ctr").shape == (0, 1)
