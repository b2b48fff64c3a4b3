"""The frontier's table: every masked network against the best dense one that is as fast, and no slower one."""

from types import SimpleNamespace

from lt4rec_sparse.paper.frontier import CURVES, _at_equal_time

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


def test_a_masked_network_is_compared_with_the_best_dense_one_that_takes_no_longer():
    records = []
    for row, (_, auc, mse) in ROWS.items():
        for seed in range(2):
            metrics = {"ctr": {"auc": auc + 0.001 * seed}, "cvr": {"mse": mse * (1 - 0.001 * seed)}}
            parts = [{task: of_task} for task, of_task in metrics.items()] if row.startswith("base") else [metrics]
            records += [{"row": row, "seed": seed, "served": {"int8": part}} for part in parts]
    findings = SimpleNamespace(records=records, tasks=TASKS, rows={row: row for row in ROWS})
    curves = {row: next(title for start, title in CURVES.items() if row.startswith(start)) for row in ROWS}
    text = _at_equal_time(findings, curves, {row: us for row, (us, _, _) in ROWS.items()}, "int8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    cells = {line[0]: line[1:] for line in lines[2:]}
    assert list(cells) == sorted(ROWS, key=lambda row: ROWS[row][0])
    assert cells["base"] == ["400", "0.75050", "", "0.08995", ""]
    # 102 us are as fast as 100; of the two, each task's own best.
    assert cells["blocks_0.05"] == ["100", "0.74050", "**+0.0100 ± 0.0000**", "0.09595", "+1.05 ± 0.00 %"]
    assert cells["blocks_0.2"][2] == "-0.0100 ± 0.0000", "399 us are as fast as 400"
    assert cells["blocks_0.025"][2::2] == ["none is as fast", "none is as fast"]
