"""Every task of every row gets the same search of its learning rate, on validation alone, once."""

import json

import pytest

from lt4rec_sparse.recsys.harness.rows import Row
from lt4rec_sparse.recsys.harness.statistics import best_of
from lt4rec_sparse.recsys.harness.study import FURTHER, RATES, SEEDS, beyond, favourites, tuned_rates
from lt4rec_sparse.recsys.harness.trials import Trial

KINDS = {"ctr": "binary", "cvr": "ratio"}
BOTH = ("ctr", "cvr")
BASE = Row("base", "base", (Trial("sparse_sharing", ("ctr",)), Trial("sparse_sharing", ("cvr",))), "base")
HARD = Row("hard", "hard sharing", (Trial("hard_sharing", BOTH),), "hard")
JOINT = Row("mmoe", "MMoE", (Trial("mmoe", BOTH, objective="joint"),), "mmoe")
OTHER = Row("other", "other", (Trial("ple", BOTH),), "hard")
EDGE = max(RATES) * 2**FURTHER


def judged(trials):
    """A click model is best at the middle rate; a watch model is better the larger its rate."""
    records = {}
    for trial in trials:
        assert trial.seed in SEEDS
        assert not trial.is_tested
        ctr, cvr = (trial.training.rate(task) for task in BOTH)
        losses = {"ctr": {"log_loss": abs(ctr - RATES[1]) + 1}, "cvr": {"mse": 1 / cvr}}
        records[trial] = {"validation": {"all": {task: losses[task] for task in trial.tasks}}}
    return records


def test_the_tasks_of_a_shared_model_get_the_rates_that_single_task_models_get(tmp_path):
    asked = []

    def carry(trials):
        asked.extend(trials)
        return judged(trials)

    rates = tuned_rates([BASE, HARD, OTHER], KINDS, tmp_path, carry)
    assert rates == {key: {"ctr": RATES[1], "cvr": EDGE} for key in ("base", "hard")}
    of = {tasks: sum(trial.tasks == tasks for trial in asked) / len(SEEDS) for tasks in (("ctr",), ("cvr",), BOTH)}
    assert of == {("ctr",): len(RATES), ("cvr",): len(RATES) + FURTHER, BOTH: len(RATES) + FURTHER + 1}
    asked.clear()
    assert tuned_rates([HARD], KINDS, tmp_path, carry) == {"hard": rates["hard"]}
    assert not asked, "found again"
    tried = json.loads((tmp_path / "tuning.json").read_text())
    assert [entry["row"] for entry in tried.values()] == ["base", "base", "hard"]


def test_one_step_for_all_tasks_has_one_rate(tmp_path):
    (rates,) = tuned_rates([JOINT], KINDS, tmp_path, judged).values()
    assert rates == dict.fromkeys(BOTH, EDGE)


def test_the_mixture_is_taken_only_if_it_is_better(tmp_path):
    """Each task may be best at a rate of its own that does harm to the other."""

    def carry(trials):
        records = judged(trials)
        for trial, record in records.items():
            if trial.training.rates:
                record["validation"]["all"]["cvr"]["mse"] *= 100
        return records

    (rates,) = tuned_rates([HARD], KINDS, tmp_path, carry).values()
    assert rates["ctr"] == rates["cvr"]


def test_of_a_single_rate_nothing_is_searched(tmp_path):
    def carry(trials):
        raise AssertionError("trained")

    rates = tuned_rates([BASE, HARD], KINDS, tmp_path, carry, (3e-3,))
    assert rates == {key: {"ctr": 3e-3, "cvr": 3e-3} for key in ("base", "hard")}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("losses", "further"),
    [
        ({1.0: (3.0, 9.0), 2.0: (2.0, 8.0), 4.0: (1.0, 9.0)}, [8.0]),
        ({1.0: (1.0, 9.0), 2.0: (2.0, 8.0), 4.0: (3.0, 9.0)}, [0.5]),
        ({1.0: (1.0, 9.0), 2.0: (2.0, 8.0), 4.0: (3.0, 7.0)}, [8.0, 0.5]),
        ({1.0: (2.0, 9.0), 2.0: (1.0, 8.0), 4.0: (2.0, 9.0)}, []),
    ],
)
def test_beyond_the_best_is_tried_where_a_task_is_at_an_edge(losses, further):
    tried = {(rate, rate): dict(zip(BOTH, values, strict=True)) for rate, values in losses.items()}
    assert beyond(HARD.trials[0], tried) == further


def test_a_loss_counts_relative_to_the_best_of_its_task():
    losses = {(1.0, 1.0): {"ctr": 0.60, "cvr": 0.10}, (2.0, 2.0): {"ctr": 0.61, "cvr": 0.09}}
    assert best_of(losses) == (2.0, 2.0)  # 0.09 is 10 % better, 0.61 not 2 % worse
    assert favourites(HARD.trials[0], losses) == {"ctr": 1.0, "cvr": 2.0}
    assert favourites(JOINT.trials[0], losses) == {"ctr": 2.0, "cvr": 2.0}
