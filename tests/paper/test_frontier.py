"""The frontier's table: every masked network against the best dense one that is as fast, and no slower one."""

from types import SimpleNamespace

from lt4rec_sparse.paper.equal_time import choices, chosen_table, curves_of
from lt4rec_sparse.paper.frontier import _at_equal_time, _densities

TASKS = {"ctr": "binary", "cvr": "ratio"}
# row -> microseconds, AUC, MSE at seed 0; seed 1 is a little better
ROWS = {
    "base": (400.0, 0.75, 0.090),
    "base_small_0.25": (100.0, 0.73, 0.097),
    "hard_sharing_small_0.25": (102.0, 0.72, 0.095),
    "blocks_0.05": (100.0, 0.74, 0.096),
    "blocks_0.2": (399.0, 0.74, 0.096),
    "blocks_0.025": (50.0, 0.74, 0.096),
}
CURVE_OF = curves_of(ROWS)
TIMES = {row: us for row, (us, _, _) in ROWS.items()}


def findings_of(losses: dict[str, tuple[float, float]]) -> SimpleNamespace:
    """Return two seeds of every row; `losses` are those on the validation days of the click and the watch ratio."""
    records = []
    for row, (_, auc, mse) in ROWS.items():
        for seed in range(2):
            click, watch = losses.get(row, (1.0, 1.0))
            metrics = {"ctr": {"auc": auc + 0.001 * seed}, "cvr": {"mse": mse * (1 - 0.001 * seed)}}
            validation = {"ctr": {"log_loss": click + 0.1 * seed}, "cvr": {"mse": watch - 0.1 * seed}}
            for tasks in [["ctr"], ["cvr"]] if row.startswith("base") else [["ctr", "cvr"]]:
                served = {"int8": {task: metrics[task] for task in tasks}}
                judged = {"all": {task: validation[task] for task in tasks}}
                records.append({"row": row, "seed": seed, "served": served, "validation": judged})
    return SimpleNamespace(
        records=records, tasks=TASKS, rows={row: f"{row} at {row.rpartition('_')[2]} %" for row in ROWS}
    )


def cells_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_a_masked_network_is_compared_with_the_best_dense_one_that_takes_no_longer():
    text = _at_equal_time(findings_of({}), CURVE_OF, TIMES, "int8")
    cells = {line[0].partition(" at ")[0]: line[1:] for line in cells_of(text)}
    assert list(cells) == sorted(ROWS, key=lambda row: ROWS[row][0])
    assert cells["base"] == ["400", "0.75050", "", "0.08995", ""]
    # 102 us are as fast as 100; of the two, each task's own best.
    assert cells["blocks_0.05"] == ["100", "0.74050", "**+0.0100 ± 0.0000**", "0.09595", "+1.05 ± 0.00 %"]
    assert cells["blocks_0.2"][2] == "-0.0100 ± 0.0000", "399 us are as fast as 400"
    assert cells["blocks_0.025"][2::2] == ["none is as fast", "none is as fast"]


def test_of_what_is_as_fast_the_validation_days_choose():
    """Not the test days: there the dense network that is a quarter as wide is no better than the others."""
    losses = {"base_small_0.25": (0.5, 0.9), "blocks_0.2": (0.4, 0.4), "blocks_0.05": (0.6, 0.7)}
    findings = findings_of(losses)
    slow, fast = cells_of(chosen_table(choices(findings, CURVE_OF, TIMES, "int8"), findings.rows, list(TASKS)))
    assert slow[:3] == ["400", "base_small_0.25 at 0.25 %", "blocks_0.2 at 0.2 %"]
    assert fast[:3] == ["100", "base_small_0.25 at 0.25 %", "blocks_0.05 at 0.05 %"]
    assert fast[3:] == ["**+0.0100 ± 0.0000**", "**-1.03 ± 0.00 %**"]
    assert slow[3:] == fast[3:], "alike on the test days"


def test_each_task_takes_the_density_of_its_least_loss():
    text = _densities(findings_of({"blocks_0.2": (0.4, 0.9), "blocks_0.05": (0.7, 0.5)}))
    assert "ctr 0.2 %, cvr 0.05 %" in text
    assert text.endswith("All tasks together: blocks_0.05 at 0.05 %.")
