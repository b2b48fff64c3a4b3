"""The declared rows: distinct, those of the paper's table, each with a learning rate to take."""

import pytest

from lt4rec_sparse.paper import declared
from lt4rec_sparse.paper.declared import Variants
from lt4rec_sparse.paper.experiment import EXPERIMENTS
from lt4rec_sparse.recsys.harness.rows import BASE, Rows, narrow_factor, scaled
from lt4rec_sparse.recsys.harness.study import rate_rows
from lt4rec_sparse.recsys.harness.trials import Training
from lt4rec_sparse.recsys.models import MODELS

TRAINING = Training(learning_rate=5e-4)
RATES = (("ctr", 1e-3), ("cvr", 2e-3))
ROWS = Rows(("ctr", "cvr"), TRAINING, RATES)


TABLES = {**{name: experiment.rows for name, experiment in EXPERIMENTS.items()}, "regimes": declared.regimes}


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_distinct_and_have_a_rate(name):
    table = TABLES[name](ROWS)
    assert table[0].key == BASE
    assert len({row.key for row in table}) == len({row.title for row in table}) == len(table)
    trained = {(trial.key, row.rate_of) for row in table for trial in row.trials}
    assert len(trained) == sum(len(row.trials) for row in table)
    searched = {row.key for row in rate_rows(table, declared.table2(ROWS))} | {BASE}
    assert {row.rate_of for row in table} <= searched


def test_table_2_holds_the_paper_and_its_opponents():
    table = {row.key: row for row in declared.table2(ROWS)}
    paper = ("base", "hard_sharing", "s_weight", "s_neuron", "s_weight_taskbalance", "s_weight_gradientconflict")
    paper += ("s_weight_multiview", "s_weight_biggernet", "s_weight_tuning")
    assert set(paper) <= table.keys()
    assert {trial.model for row in table.values() for trial in row.trials} == set(MODELS) - {"single_task"}
    tuning, (balance,), (conflict,) = (
        table["s_weight_tuning"].trials[0],
        table["s_weight_taskbalance"].trials,
        table["s_weight_gradientconflict"].trials,
    )
    assert (tuning.scales, tuning.conflict) == (balance.scales, conflict.conflict)
    assert tuning.masks == balance.masks == conflict.masks == table["s_weight"].trials[0].masks


def test_masks_are_searched_in_the_network_that_they_are_of_at_the_baselines_rate():
    for make in TABLES.values():
        for row in make(ROWS):
            for trial in row.trials:
                if trial.masks:
                    search = trial.masks.search.training
                    assert all(search.rate(task) == dict(RATES)[task] for task in trial.tasks)
                    for field in ("hidden", "embedding_dim", "exclusive_dim", "cross", "warm_up", "batch_size"):
                        assert getattr(search, field) == getattr(trial.training, field)


def test_the_bigger_network_is_left_with_as_many_weights():
    """At the widths and the input of KuaiRand."""

    def size(hidden):
        widths = (1258, *hidden)
        return sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True))

    row = next(row for row in declared.table2(ROWS) if row.key == "s_weight_biggernet_equal")
    (trial,) = row.trials
    assert trial.training.hidden == tuple(round(Variants().wider * width) for width in TRAINING.hidden)
    kept = size(trial.training.hidden) * trial.masks.search.density
    assert abs(kept / (size(TRAINING.hidden) * ROWS.density) - 1) < 0.02
    narrow = size(scaled(TRAINING.hidden, narrow_factor(1258, TRAINING.hidden, ROWS.density)))
    assert abs(narrow / (size(TRAINING.hidden) * ROWS.density) - 1) < 0.01
