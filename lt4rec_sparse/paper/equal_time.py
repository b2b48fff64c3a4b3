"""Dense and masked networks at equal time: each is frozen, judged as it is served, timed, and chosen for a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn

from lt4rec_sparse.nn import MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.paper import pages
from lt4rec_sparse.paper.pages import Findings
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.recsys.frozen import CALIBRATION_ROWS, score_mlp
from lt4rec_sparse.recsys.harness.jobs import laboratory
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.starts import JUDGED_ROWS
from lt4rec_sparse.recsys.harness.statistics import Difference, best_of, paired_difference, summary
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
    "alone": "random blocks of 16x4, single-task",
    "mixed": "random blocks, a density per task",
    "weights": "random weights",
    "gradual": "blocks pruned while training",
    "one_shot": "blocks of the trained base",
    "tickets": "tickets of 16x4",
    "s_weight": "tickets of weights",
}

Kind = TypeVar("Kind", bound=nn.Module)
Times = dict[str, dict[str, float]]  # precision -> row -> microseconds


def curves_of(rows: Iterable[str]) -> dict[str, str]:
    """Return row -> the title of its curve."""
    return {row: next(title for start, title in CURVES.items() if row.startswith(start)) for row in rows}


def measure(findings: Findings) -> Times:
    """Freeze every trained model, judge it and time it.

    Records get `served`, precision -> task -> metric -> value on the test days, and `microseconds`, precision -> time.
    """
    lab = laboratory(findings.out)
    training_rows = next(lab.prepared.stream("train", CALIBRATION_ROWS, seed=0, shuffle=True).epoch(0)).features
    times = _serving_times(findings, lab, training_rows)
    trials = {trial.key: trial for of_row in findings.study.trials.values() for trial in of_row}
    for record in findings.records:
        trial = trials[record["key"]]
        kinds = {task: findings.tasks[task] for task in trial.tasks}
        served = _served(lab.model(trial), "int8", training_rows)
        judged = evaluate(served, lab.stream("test", JUDGED_ROWS, None), kinds)
        record["served"] = {"fp32": record["test"]["all"], "int8": judged["all"]}
        record["microseconds"] = {precision: times[precision][record["row"]] for precision in PRECISIONS}
    return times


def choices(
    findings: Findings, curves: Mapping[str, str], times: Mapping[str, float], precision: str
) -> list[dict[str, Any]]:
    """Return what the validation days choose in the time of each dense single-task model, the slowest first.

    Each has the `budget`, a row, and its `microseconds`; the rows `dense` and `masked`, of those in `curves`, None if
    none is as fast; and, of two, `differences` on the test days, task -> text.
    """
    losses = validation_losses(findings)
    found = []
    budgets = [row for row, title in curves.items() if title == SINGLE]
    for budget in sorted(budgets, key=lambda row: times[row], reverse=True):
        choice: dict[str, Any] = {"budget": budget, "microseconds": times[budget]}
        for name, is_dense in (("dense", True), ("masked", False)):
            known = {
                row: losses[row]
                for row, title in curves.items()
                if (title in (SINGLE, HARD)) == is_dense and times[row] <= AS_FAST * times[budget]
            }
            choice[name] = best_of(known) if known else None
        if choice["dense"] and choice["masked"]:
            choice["differences"] = {
                task: difference_text(findings, choice["masked"], choice["dense"], task, precision)
                for task in findings.tasks
            }
        found.append(choice)
    return found


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


def validation_losses(findings: Findings) -> dict[str, dict[str, float]]:
    """Return row -> task -> the mean over seeds of its loss on the validation days."""
    validated = [{**record, "test": record["validation"]} for record in findings.records]
    return {
        row: {
            task: summary(list(values_of(validated, row, task, LOSS[kind]).values())).mean
            for task, kind in findings.tasks.items()
        }
        for row in findings.rows
    }


def difference(findings: Findings, row: str, other: str, task: str, precision: str) -> Difference:
    """Return how a row's main metric, as served in a precision, differs from another's on the test days."""
    metric = MAIN_METRIC[findings.tasks[task]]
    mine, of_other = (values(findings, key, task, precision) for key in (row, other))
    return paired_difference(mine, of_other, metric == "mse")


def difference_text(findings: Findings, row: str, other: str, task: str, precision: str) -> str:
    """Return `difference` as text; bold if it is clearly better."""
    found = difference(findings, row, other, task, precision)
    sign = 1 if HIGHER_IS_BETTER[MAIN_METRIC[findings.tasks[task]]] else -1
    return f"**{found}**" if sign * found.mean > 2 * found.error else str(found)


def values(findings: Findings, row: str, task: str, precision: str) -> dict[int, float | None]:
    """Return seed -> a row's main metric on the test days, as served in a precision."""
    served = ({**record, "test": {"all": record["served"][precision]}} for record in findings.records)
    return values_of(served, row, task, MAIN_METRIC[findings.tasks[task]])


def _serving_times(findings: Findings, lab: Laboratory, training_rows: EncodedFeatures) -> Times:
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
