"""Tables against numbers by hand: what is bold, what is paired, what is not known."""

import math

import pytest

from lt4rec_sparse.recsys.tables import comparison_table, further_table, levels_table, table

TASKS = {"ctr": "binary", "cvr": "ratio"}
ROWS = {"base": "single-task", "hard": "hard sharing", "s_weight": "S-Weight"}


def record(row, seed, auc=None, mse=None, density=None, **changes):
    metrics = {}
    if auc is not None:
        metrics["ctr"] = {"auc": auc, "gauc": 0.6, "log_loss": 0.5, "calibration": 1.0}
    if mse is not None:
        metrics["cvr"] = {"mse": mse, "calibration": 0.9}
    return {
        "key": f"{row}-{seed}",
        "row": row,
        "seed": seed,
        "test": {"all": metrics, "tab_0": metrics},
        "seconds": {"train": 10.0, "search": 0.0},
        "parameters": 1000,
        "multiply_adds": 500,
        "masks": {"density": density} if density else None,
    } | changes


def both(row, aucs, mses, **changes):
    pairs = enumerate(zip(aucs, mses, strict=True))
    return [record(row, seed, auc, mse, **changes) for seed, (auc, mse) in pairs]


BASE = both("base", [0.70, 0.72], [0.10, 0.20])


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def lines(text):
    return {line[0]: line[1:] for line in cells(text)[2:]}


def test_means_deviations_and_paired_differences_by_hand():
    # AUC: +0.01 and +0.03; MSE: -10 % and -20 %.
    text = comparison_table([*BASE, *both("hard", [0.71, 0.75], [0.09, 0.16])], ROWS, "base", TASKS)
    assert cells(text)[0] == ["model", "seeds", "ctr AUC", "against single-task", "cvr MSE", "against single-task"]
    by_row = lines(text)
    assert by_row["single-task"] == ["2", "0.71000 ± 0.01414", "", "0.15000 ± 0.07071", ""]
    assert by_row["hard sharing"] == [
        "2",
        "0.73000 ± 0.02828",
        "**+0.0200 ± 0.0100**",
        "0.12500 ± 0.04950",
        "**-15.00 ± 5.00 %**",
    ]


def test_bold_is_for_what_is_better_by_more_than_its_error_alone():
    # Binary fractions, so that nothing is rounded. AUC: -0.25 twice, worse; MSE: -50 % and +50 %, nothing.
    base, worse = both("base", [0.5, 0.5], [0.5, 0.5]), both("hard", [0.25, 0.25], [0.25, 0.75])
    assert lines(comparison_table([*base, *worse], ROWS, "base", TASKS))["hard sharing"][2::2] == [
        "-0.2500 ± 0.0000",
        "+0.00 ± 50.00 %",
    ]
    # AUC: 0 and +0.25, as large as its error and no larger.
    same = both("hard", [0.5, 0.75], [0.25, 0.25])
    assert lines(comparison_table([*base, *same], ROWS, "base", TASKS))["hard sharing"][2::2] == [
        "+0.1250 ± 0.1250",
        "**-50.00 ± 0.00 %**",
    ]


def test_one_seed_has_no_error_and_is_never_bold():
    text = comparison_table([BASE[0], *both("hard", [0.9], [0.05])], ROWS, "base", TASKS)
    assert lines(text)["hard sharing"] == ["1", "0.90000", "+0.2000", "0.05000", "-50.00 %"]


def test_a_row_that_lacks_seeds_is_paired_at_those_it_has():
    second = record("hard", 1, 0.73, 0.10)
    by_row = lines(comparison_table([*BASE, second], ROWS, "base", TASKS))
    assert by_row["hard sharing"] == ["1", "0.73000", "+0.0100", "0.10000", "-50.00 %"]
    assert by_row["S-Weight"] == ["0", "n/a", "n/a", "n/a", "n/a"]
    further = [second, record("hard", 7, 0.75, 0.10)]
    assert lines(comparison_table([*BASE, *further], ROWS, "base", TASKS))["hard sharing"][2] == "+0.0100 (seeds: 1)"
    without = lines(comparison_table(further, ROWS, "base", TASKS))
    assert without["single-task"] == ["0", "n/a", "", "n/a", ""]
    assert without["hard sharing"][2] == "n/a"


def test_records_of_single_tasks_are_one_row():
    ctr = [record("base", seed, auc=auc) for seed, auc in enumerate([0.70, 0.72])]
    cvr = [record("base", seed, mse=mse) for seed, mse in enumerate([0.10, 0.20])]
    other = both("hard", [0.71, 0.75], [0.09, 0.16])
    merged = [*cvr, *ctr, *other]
    assert comparison_table(merged, ROWS, "base", TASKS) == comparison_table([*BASE, *other], ROWS, "base", TASKS)
    base = lines(further_table(merged, ROWS, TASKS))["single-task"]
    assert base[-7:] == ["20.0", "0.0", "20.0", "2,000", "1,000", "100.0%", "100.0%"]
    lacking = lines(comparison_table([*ctr, cvr[0], *other], ROWS, "base", TASKS))
    assert lacking["single-task"] == ["ctr 2, cvr 1", "0.71000 ± 0.01414", "", "0.10000", ""]
    assert lacking["hard sharing"][4] == "-10.00 % (seeds: 1)"
    # The seed whose model of cvr is not there yet does not make the row cheaper.
    assert lines(further_table([*ctr, cvr[0]], ROWS, TASKS))["single-task"][-5:-2] == ["20.0", "2,000", "1,000"]


@pytest.mark.parametrize("bad", [math.nan, None])
def test_what_is_no_number_is_said_and_never_bold(bad):
    other = both("hard", [0.75, 0.8], [0.09, 0.16])
    other[0]["test"]["all"]["ctr"]["auc"] = bad
    other[0]["test"]["all"]["ctr"]["gauc"] = bad
    line = lines(comparison_table([*BASE, *other], ROWS, "base", TASKS))["hard sharing"]
    assert line[1:3] == ["n/a", "n/a"]
    assert lines(further_table([*BASE, *other], ROWS, TASKS))["hard sharing"][1] == "n/a"


def test_further_metrics_and_costs_by_hand():
    masked = both("s_weight", [0.7, 0.7], [0.1, 0.1], density={"ctr": 0.5, "cvr": 0.25})
    masked[1] |= {
        "masks": {"density": {"ctr": 0.25, "cvr": 0.25}},
        "seconds": {"train": 20.0, "search": 2000.0},
        "multiply_adds": 1000,
    }
    text = further_table([*BASE, *masked], ROWS, TASKS)
    assert cells(text)[0] == [
        *("model", "seeds", "ctr gauc", "ctr log loss", "ctr calibration", "cvr calibration"),
        *("train, s", "search, s", "together, s", "parameters", "multiply-adds", "ctr density", "cvr density"),
    ]
    assert lines(text)["S-Weight"] == [
        *("2", "0.6000 ± 0.0000", "0.5000 ± 0.0000", "1.0000 ± 0.0000", "0.9000 ± 0.0000"),
        *("15.0", "1,000.0", "1,015.0", "1,000", "750", "37.5%", "25.0%"),
    ]
    assert lines(text)["hard sharing"] == ["0", *["n/a"] * 11]


def test_slices_are_chosen():
    changed = [record("base", 0, 0.70, 0.10)]
    changed[0]["test"]["tab_0"] = {"ctr": {"auc": 0.60}, "cvr": {"mse": 0.30}}
    line = lines(comparison_table(changed, ROWS, "base", TASKS, part="tab_0"))["single-task"]
    assert line == ["1", "0.60000", "", "0.30000", ""]


def test_table_is_markdown():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_levels_say_how_often_each_was_best():
    curves = {"ctr": [0.70, 0.72, 0.69], "cvr": [0.20, 0.19, 0.18]}
    records = [
        {
            "tickets": {
                task: [
                    {"density": density, "validation": {"auc" if task == "ctr" else "mse": value + seed / 100}}
                    for density, value in zip((1.0, 0.5, 0.25), values, strict=True)
                ]
                for task, values in curves.items()
            },
            "best_level": {"ctr": 1 + seed, "cvr": 2},
        }
        for seed in range(2)
    ]
    assert lines(levels_table(records, TASKS)) == {
        "100.0%": ["0.70500 ± 0.00707", "0.20500 ± 0.00707"],
        "50.0%": ["0.72500 ± 0.00707 (best at one seed)", "0.19500 ± 0.00707"],
        "25.0%": ["0.69500 ± 0.00707 (best at one seed)", "0.18500 ± 0.00707 (best at 2 seeds)"],
    }
