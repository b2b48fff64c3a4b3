"""Sparse against small and dense: accuracy against the measured time of a request, in float32 and in int8."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn

from lt4rec_sparse.nn import MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.paper import figures, pages
from lt4rec_sparse.paper.pages import Findings
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.recsys.frozen import CALIBRATION_ROWS, score_mlp
from lt4rec_sparse.recsys.harness.jobs import laboratory
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.starts import JUDGED_ROWS
from lt4rec_sparse.recsys.harness.statistics import paired_difference, summary
from lt4rec_sparse.recsys.metrics import HIGHER_IS_BETTER, LOSS, MAIN_METRIC
from lt4rec_sparse.recsys.models import SparseSharing
from lt4rec_sparse.recsys.tables import table as markdown
from lt4rec_sparse.recsys.tables import values_of
from lt4rec_sparse.recsys.training import evaluate
from lt4rec_sparse.stopwatch import interleaved, one_thread

CANDIDATES = 256
PRECISIONS = ("fp32", "int8")
AS_FAST = 1.03  # closer times of one interleaved run are equal
CHOSEN = (
    "The dense and the masked network with the least sum over tasks of the loss over the least loss, of all that take "
    "no longer than a dense single-task model; and how they differ on the test days. Bold is better by more than two "
    "standard errors."
)
SINGLE, HARD = "dense, single-task", "dense, hard sharing"
CURVES = {  # how keys of rows begin -> the title of their curve
    "base": SINGLE,
    "hard_sharing": HARD,
    "blocks": "random blocks of 16x4",
    "mixed": "random blocks, a density per task",
    "weights": "random weights",
    "gradual": "blocks pruned while training",
    "one_shot": "blocks of the trained base",
    "tickets": "tickets of 16x4",
}
DRAWN = (SINGLE, HARD, *(CURVES[key] for key in ("blocks", "weights", "tickets")))  # more hide each other

Kind = TypeVar("Kind", bound=nn.Module)
Times = dict[str, dict[str, float]]  # precision -> row -> microseconds


def frontier(findings: Findings) -> str:
    """Return which networks rank best in the same time: sparse ones, or dense ones with fewer neurons.

    Records get `served`, precision -> task -> metric -> value on the test days, and `microseconds`, precision -> time.
    """
    lab = laboratory(findings.out)
    training_rows = next(lab.prepared.stream("train", CALIBRATION_ROWS, seed=0, shuffle=True).epoch(0)).features
    times = serving_times(findings, lab, training_rows)
    findings.further["microseconds"] = times
    trials = {trial.key: trial for of_row in findings.study.trials.values() for trial in of_row}
    for record in findings.records:
        trial = trials[record["key"]]
        kinds = {task: findings.tasks[task] for task in trial.tasks}
        served = _served(lab.model(trial), "int8", training_rows)
        judged = evaluate(served, lab.stream("test", JUDGED_ROWS, None), kinds)
        record["served"] = {"fp32": record["test"]["all"], "int8": judged["all"]}
        record["microseconds"] = {precision: times[precision][record["row"]] for precision in PRECISIONS}
    curves = {key: next(title for start, title in CURVES.items() if key.startswith(start)) for key in findings.rows}
    drawn = {row: title for row, title in curves.items() if title in DRAWN}
    parts, chosen = [], findings.further.setdefault("chosen", {})
    for precision in PRECISIONS:
        draw = partial(figures.plot_frontier, findings.records, drawn, findings.tasks, precision, (SINGLE, HARD))
        caption = f"Test metric of each task against microseconds for {CANDIDATES} candidates, {precision}"
        parts.append(findings.plot(f"frontier_{precision}", caption, draw))
        chosen[precision] = _chosen(findings, curves, times[precision], precision)
        best = chosen_table(chosen[precision], findings.rows, list(findings.tasks))
        parts.append(f"## Chosen on the validation days, {precision}\n\n{CHOSEN}\n\n{best}")
        parts.append(_at_equal_time(findings, curves, times[precision], precision))
    parts.insert(0, _densities(findings))
    return pages.page(findings, "Sparse against small and dense", parts)


def serving_times(findings: Findings, lab: Laboratory, training_rows: EncodedFeatures) -> Times:
    """Time the MLPs of every row, all tasks, seed 0, one thread, on rows of the test days; all in one interleaved run.

    In fp32 each network takes its fastest way of the engine, torch and oneDNN. In int8 all take the engine, which runs
    a dense network as whole blocks.
    """
    features = next(lab.prepared.stream("test", CANDIDATES, shuffle=False).epoch(0)).features
    calls: dict[tuple[str, str, str], Callable[[], object]] = {}
    for row in findings.rows:
        models = [cast(SparseSharing, lab.model(trial)) for trial in findings.study.trials[row, 0]]
        with torch.inference_mode():
            xs = [model.inputs(features) for model in models]
        for precision in PRECISIONS:
            frozen = [_served(model, precision, training_rows, sigmoid=True) for model in models]
            calls[precision, row, "engine"] = _after_each_other(
                [
                    partial(score_mlp, mlp, x)
                    for model, x in zip(frozen, xs, strict=True)
                    for mlp in _of(SparseMLP, model)
                ]
            )
        dense = [
            (x, pages.dense_ways([mlp])) for model, x in zip(models, xs, strict=True) for mlp in _of(MaskedMLP, model)
        ]
        for way in dense[0][1]:
            calls["fp32", row, way] = _after_each_other([partial(ways[way], x) for x, ways in dense])
    with one_thread():
        medians = {name: timing.median_us for name, timing in interleaved(calls).items()}
    times: Times = {precision: {} for precision in PRECISIONS}
    for (precision, row, _), us in medians.items():
        times[precision][row] = min(us, times[precision].get(row, us))
    return times


def _densities(findings: Findings) -> str:
    """Return which density each task takes on the validation days: alone, and all together."""
    losses = _losses(findings)
    alone = {row: losses[row] for row in findings.rows if row.startswith("blocks")}
    best = {task: min(alone, key=lambda row: alone[row][task]) for task in findings.tasks}
    jointly = _best_row({row: losses[row] for row in findings.rows if row.startswith(("blocks", "mixed"))})
    each = ", ".join(f"{task} {findings.rows[row].rpartition(' at ')[2]}" for task, row in best.items())
    return (
        "A density per task, chosen on the validation days among random blocks. Alone, each from the models with one "
        f"density for all tasks: {each}. All tasks together: {findings.rows[jointly]}."
    )


def _chosen(
    findings: Findings, curves: Mapping[str, str], times: Mapping[str, float], precision: str
) -> list[dict[str, Any]]:
    """Return what the validation days choose in the time of each dense single-task model, the slowest first."""
    losses = _losses(findings)
    choices = []
    for budget in sorted((times[row] for row, title in curves.items() if title == SINGLE), reverse=True):
        choice: dict[str, Any] = {"microseconds": budget}
        for name, is_dense in (("dense", True), ("masked", False)):
            known = {
                row: losses[row]
                for row, title in curves.items()
                if (title in (SINGLE, HARD)) == is_dense and times[row] <= AS_FAST * budget
            }
            choice[name] = _best_row(known) if known else None
        if choice["dense"] and choice["masked"]:
            choice["differences"] = {
                task: _difference(findings, choice["masked"], choice["dense"], task, kind, precision)
                for task, kind in findings.tasks.items()
            }
        choices.append(choice)
    return choices


def chosen_table(choices: Sequence[Mapping[str, Any]], titles: Mapping[str, str], tasks: Sequence[str]) -> str:
    """Return what was chosen as a table: `choices` as in `further["chosen"][precision]`, `titles` of the rows."""
    header = ["µs at most", "dense", "masked", *(f"{task}: masked against dense" for task in tasks)]
    lines = [
        [
            f"{choice['microseconds']:,.0f}",
            *(titles[choice[name]] if choice[name] else "none is as fast" for name in ("dense", "masked")),
            *(choice.get("differences", {}).get(task, "") for task in tasks),
        ]
        for choice in choices
    ]
    return markdown(header, lines)


def _losses(findings: Findings) -> dict[str, dict[str, float]]:
    """Return row -> task -> the mean over seeds of its loss on the validation days."""
    validated = [{**record, "test": record["validation"]} for record in findings.records]
    return {
        row: {
            task: summary(list(values_of(validated, row, task, LOSS[kind]).values())).mean
            for task, kind in findings.tasks.items()
        }
        for row in findings.rows
    }


def _best_row(losses: Mapping[str, Mapping[str, float]]) -> str:
    least = {task: min(of_row[task] for of_row in losses.values()) for task in next(iter(losses.values()))}
    return min(losses, key=lambda row: sum(losses[row][task] / least[task] for task in least))


def _difference(findings: Findings, row: str, other: str, task: str, kind: str, precision: str) -> str:
    """Return how a row's main metric differs from another's on the test days; bold if clearly better."""
    metric = MAIN_METRIC[kind]
    mine, of_other = (_values(findings, key, task, metric, precision) for key in (row, other))
    difference = paired_difference(mine, of_other, metric == "mse")
    is_clear = (1 if HIGHER_IS_BETTER[metric] else -1) * difference.mean > 2 * difference.error
    return f"**{difference}**" if is_clear else str(difference)


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
            of_rows = {other: _values(findings, other, task, metric, precision) for other in (row, *dense)}
            line.append(f"{summary(list(of_rows[row].values())).mean:.5f}")
            as_fast = [other for other in dense if times[other] <= AS_FAST * times[row]]
            if row in dense or not as_fast:
                line.append("" if row in dense else "none is as fast")
                continue
            sign = 1 if HIGHER_IS_BETTER[metric] else -1
            best = max(as_fast, key=lambda other: sign * summary(list(of_rows[other].values())).mean)
            line.append(_difference(findings, row, best, task, kind, precision))
        lines.append(line)
    text = (
        f"## At equal time, {precision}\n\nMicroseconds for {CANDIDATES} candidates, the MLPs of all tasks on one "
        "thread: medians of one interleaved run, seed 0. A masked network is compared with the dense network that has "
        "the best test metric of all that take no longer; bold is better by more than two standard errors."
    )
    return f"{text}\n\n{markdown(header, lines)}"


def _values(findings: Findings, row: str, task: str, metric: str, precision: str) -> dict[int, float | None]:
    served = ({**record, "test": {"all": record["served"][precision]}} for record in findings.records)
    return values_of(served, row, task, metric)


def _served(model: nn.Module, precision: str, training_rows: EncodedFeatures, sigmoid: bool = False) -> nn.Module:
    """Return a copy of a trained model, its MLPs frozen in a precision."""
    served = freeze(model, sigmoid)
    if precision == "fp32":
        return served
    with torch.inference_mode():
        x = cast(Any, served).inputs(training_rows).clone()
    for parent in list(served.modules()):
        for name, mlp in list(parent.named_children()):
            if isinstance(mlp, SparseMLP):
                setattr(parent, name, mlp.calibrated(x).to_precision(precision))
    return served


def _of(kind: type[Kind], model: nn.Module) -> list[Kind]:
    return [module for module in model.modules() if isinstance(module, kind)]


def _after_each_other(calls: list[Callable[[], object]]) -> Callable[[], object]:
    return lambda: [call() for call in calls]
