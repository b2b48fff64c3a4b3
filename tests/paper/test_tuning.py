"""Every row gets the same search of its learning rate, on validation alone, once."""

import json

from lt4rec_sparse.paper.declared import Row
from lt4rec_sparse.paper.tuning import FURTHER, RATES, SEED, beyond, tuned_rates
from lt4rec_sparse.recsys.harness.statistics import best_of
from lt4rec_sparse.recsys.harness.trials import Trial

KINDS = {"ctr": "binary", "cvr": "ratio"}
BASE = Row("base", "base", (Trial("sparse_sharing", ("ctr",)), Trial("sparse_sharing", ("cvr",))), "base")
MMOE = Row("mmoe", "MMoE", (Trial("mmoe", ("ctr", "cvr")),), "mmoe")
OTHER = Row("other", "other", (Trial("ple", ("ctr", "cvr")),), "mmoe")


def judged(trials):
    """The single-task model of ctr is best at the middle rate; for all others the larger, the better."""
    records = {}
    for trial in trials:
        assert trial.seed == SEED
        assert not trial.is_tested
        rate = trial.training.learning_rate
        loss = abs(rate - RATES[1]) + 1 if trial.tasks == ("ctr",) else 1 / rate
        all_tasks = {"ctr": {"log_loss": loss}, "cvr": {"mse": loss / 7}}
        records[trial] = {"validation": {"all": {task: all_tasks[task] for task in trial.tasks}}}
    return records


def test_the_rate_of_least_loss_is_chosen_and_found_again(tmp_path):
    asked = []

    def carry(trials):
        asked.extend(trials)
        return judged(trials)

    rates = tuned_rates([BASE, MMOE, OTHER], KINDS, tmp_path, carry)
    edge = max(RATES) * 2**FURTHER
    assert rates == {"base": (RATES[1], edge), "mmoe": (edge,)}
    # Two models of base, one of MMoE, two of them at an edge; the other row takes MMoE's.
    assert len(asked) == len(RATES) * 3 + 2 * FURTHER
    asked.clear()
    assert tuned_rates([MMOE], KINDS, tmp_path, carry) == {"mmoe": (edge,)}
    assert not asked
    tried = json.loads((tmp_path / "tuning.json").read_text())
    assert [entry["row"] for entry in tried.values()] == ["base", "base", "mmoe"]
    assert all(set(map(str, RATES)) <= entry["losses"].keys() for entry in tried.values())


def test_beyond_the_best_is_tried_where_it_is_at_an_edge():
    assert beyond({1.0: {"ctr": 3.0}, 2.0: {"ctr": 2.0}, 4.0: {"ctr": 1.0}}) == 8.0
    assert beyond({1.0: {"ctr": 1.0}, 2.0: {"ctr": 2.0}, 4.0: {"ctr": 3.0}}) == 0.5
    assert beyond({1.0: {"ctr": 2.0}, 2.0: {"ctr": 1.0}, 4.0: {"ctr": 2.0}}) is None


def test_a_loss_counts_relative_to_the_best_of_its_task():
    losses = {1.0: {"ctr": 0.60, "cvr": 0.10}, 2.0: {"ctr": 0.61, "cvr": 0.09}}
    assert best_of(losses) == 2.0  # 0.09 is 10 % better, 0.61 not 2 % worse
