"""From a table to its records: baselines first; rows that a log cannot train are left out, with their reason."""

from types import SimpleNamespace

import pytest

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.paper.declared import table2, tickets
from lt4rec_sparse.recsys.harness.rows import BASE, Rows
from lt4rec_sparse.recsys.harness.study import carry_out

TWO = {"ctr": "binary", "cvr": "ratio"}
CLICKS = {"ctr": "binary", "like": "binary"}
MANY = {f"task_{i}": "binary" for i in range(6)}


def study_of(make, kinds, folder, carried=("duration_ms",), grid=(1e-3,), others=None):
    stages = []

    def carry(stage, trials):
        stages.append(stage)
        return {trial: {"seed": trial.seed, "tasks": trial.tasks} for trial in trials}

    schema = SimpleNamespace(tasks=[SimpleNamespace(name=n, kind=k) for n, k in kinds.items()], carried=carried)
    study = carry_out(make, Rows(tuple(kinds)), 2, schema, folder, carry, grid, others)
    assert stages == ["train"], "nothing is searched of one rate"
    return study


def test_every_row_is_trained_where_the_log_allows_it(tmp_path):
    study = study_of(table2, TWO, tmp_path)
    assert not study.left_out
    assert [(r["row"], r["seed"], r["tasks"]) for r in study.records[:4]] == [
        (BASE, 0, ("ctr",)),
        (BASE, 0, ("cvr",)),
        (BASE, 1, ("ctr",)),
        (BASE, 1, ("cvr",)),
    ]


@pytest.mark.parametrize(
    ("make", "kinds", "carried", "reasons"),
    [
        (
            table2,
            TWO,
            (),
            dict.fromkeys(
                ("S-Weight-gradientconflict", "S-Weight-tuning"), "conflict: got a log that does not carry duration_ms"
            ),
        ),
        (
            table2,
            CLICKS,
            ("duration_ms",),
            dict.fromkeys(("S-Weight-gradientconflict", "S-Weight-tuning"), "conflict: got 0 tasks of a ratio"),
        ),
        (
            table2,
            MANY,
            ("duration_ms",),
            {
                **dict.fromkeys(("S-Weight-gradientconflict", "S-Weight-tuning"), "conflict: got 0 tasks of a ratio"),
                "ESMM, log losses of all impressions": "esmm: got tasks task_0, task_1",
            },
        ),
        (
            tickets,
            MANY,
            (),
            dict.fromkeys(
                (
                    "random, nothing co-owned, scaled up at the start",
                    "by magnitude, 0% co-owned",
                    "random, 0% co-owned",
                ),
                "masks: got 6 tasks that own 120% of each layer",
            ),
        ),
    ],
)
def test_rows_that_a_log_cannot_train_are_left_out_with_the_reason(tmp_path, make, kinds, carried, reasons):
    study = study_of(make, kinds, tmp_path, carried, others=table2)
    assert study.left_out.keys() == reasons.keys()
    assert all(study.left_out[title].startswith(reason) for title, reason in reasons.items())
    whole = make(Rows(tuple(kinds)))
    assert list(study.rows.values()) == [row.title for row in whole if row.title not in reasons]
    assert {record["row"] for record in study.records} == set(study.rows)


def test_a_rate_of_a_row_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(InputError, match="rates: got no row s_weight, wanted one to search"):
        study_of(tickets, TWO, tmp_path)
