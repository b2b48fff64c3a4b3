"""Sparse against small and dense: accuracy against the measured time of a request, in float32 and in int8."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from lt4rec_sparse.paper import figures, pages
from lt4rec_sparse.paper.equal_time import (
    AS_FAST,
    CANDIDATES,
    CHOSEN,
    CURVES,
    HARD,
    PRECISIONS,
    SINGLE,
    choices,
    chosen_table,
    curves_of,
    difference_text,
    measure,
    validation_losses,
    values,
)
from lt4rec_sparse.paper.pages import Findings
from lt4rec_sparse.recsys.harness.statistics import best_of, summary
from lt4rec_sparse.recsys.metrics import HIGHER_IS_BETTER, MAIN_METRIC
from lt4rec_sparse.recsys.tables import table as markdown

DRAWN = (SINGLE, HARD, *(CURVES[key] for key in ("blocks", "weights", "tickets")))  # more hide each other


def frontier(findings: Findings) -> str:
    """Return which networks rank best in the same time: sparse ones, or dense ones with fewer neurons."""
    times = findings.further["microseconds"] = measure(findings)
    curves = curves_of(findings.rows)
    drawn = {row: title for row, title in curves.items() if title in DRAWN}
    parts, chosen = [_densities(findings)], findings.further.setdefault("chosen", {})
    for precision in PRECISIONS:
        draw = partial(figures.plot_frontier, findings.records, drawn, findings.tasks, precision, (SINGLE, HARD))
        caption = f"Test metric of each task against microseconds for {CANDIDATES} candidates, {precision}"
        parts.append(findings.plot(f"frontier_{precision}", caption, draw))
        chosen[precision] = choices(findings, curves, times[precision], precision)
        best = chosen_table(chosen[precision], findings.rows, list(findings.tasks))
        parts.append(f"## Chosen on the validation days, {precision}\n\n{CHOSEN}\n\n{best}")
        parts.append(_at_equal_time(findings, curves, times[precision], precision))
    return pages.page(findings, "Sparse against small and dense", parts)


def _densities(findings: Findings) -> str:
    """Return which density each task takes on the validation days: alone, and all together."""
    losses = validation_losses(findings)
    alone = {row: losses[row] for row in findings.rows if row.startswith("blocks")}
    best = {task: min(alone, key=lambda row: alone[row][task]) for task in findings.tasks}
    jointly = best_of({row: losses[row] for row in findings.rows if row.startswith(("blocks", "mixed"))})
    each = ", ".join(f"{task} {findings.rows[row].rpartition(' at ')[2]}" for task, row in best.items())
    return (
        "A density per task, chosen on the validation days among random blocks. Alone, each from the models with one "
        f"density for all tasks: {each}. All tasks together: {findings.rows[jointly]}."
    )


def _at_equal_time(findings: Findings, curves: Mapping[str, str], times: Mapping[str, float], precision: str) -> str:
    """Return a table of all rows by time, the masked ones against the best dense network that is as fast."""
    dense = [row for row, title in curves.items() if title in (SINGLE, HARD)]
    header = ["network", f"µs, {precision}"]
    for task, kind in findings.tasks.items():
        header += [f"{task} {MAIN_METRIC[kind].upper()}", "against the best dense one as fast"]
    lines = []
    for row in sorted(curves, key=lambda row: times[row]):
        line = [findings.rows[row], f"{times[row]:,.0f}"]
        for task, kind in findings.tasks.items():
            metric = MAIN_METRIC[kind]
            of_rows = {other: values(findings, other, task, precision) for other in (row, *dense)}
            line.append(f"{summary(list(of_rows[row].values())).mean:.5f}")
            as_fast = [other for other in dense if times[other] <= AS_FAST * times[row]]
            if row in dense or not as_fast:
                line.append("" if row in dense else "none is as fast")
                continue
            sign = 1 if HIGHER_IS_BETTER[metric] else -1
            best = max(as_fast, key=lambda other: sign * summary(list(of_rows[other].values())).mean)
            line.append(difference_text(findings, row, best, task, precision))
        lines.append(line)
    text = (
        f"## At equal time, {precision}\n\nMicroseconds for {CANDIDATES} candidates, the MLPs of all tasks on one "
        "thread: medians of one interleaved run, seed 0. A masked network is compared with the dense network that has "
        "the best test metric of all that take no longer; bold is better by more than two standard errors."
    )
    return f"{text}\n\n{markdown(header, lines)}"
