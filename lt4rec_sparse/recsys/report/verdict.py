"""What a run's report says first: which model to serve, how it compares, what it costs, how sure that is."""

from __future__ import annotations

import math

from lt4rec_sparse.recsys.harness.statistics import UNLIKELY, Difference, is_clear
from lt4rec_sparse.recsys.metrics import MAIN_METRIC
from lt4rec_sparse.recsys.report.page import worded
from lt4rec_sparse.recsys.report.results import OPPONENTS, Results, Run, is_gain
from lt4rec_sparse.recsys.tables import count


def verdict(results: Results) -> str:
    """Return in a few sentences which model is served and why, and how it compares on the test days.

    Against every opponent there are its differences of the main metrics, with one word: "better" or "worse", which over
    several seeds are said of clear differences alone (`is_clear`).
    """
    return " ".join(sentences(results))


def sentences(results: Results) -> list[str]:
    """Return the sentences of `verdict`; the first says what to serve."""
    run = Run(results)
    masked = {record["row"] for record in run.records if record["masks"]}
    why = {"random": "the masks that were asked for", "tickets": "the tickets that were asked for"}.get(
        results["config"]["masks"], f"the best of {count(len(masked), 'masked model')} on the validation days"
    )
    said = [
        f"Serve {run.titles[run.served]} ({results['files'][run.served]}), {why}.",
        f"On the test days it is {_against(run)}.",
        f"{_sure(run)} {_costs(run)}",
        *_found(run),
    ]
    return [worded(sentence, run.data["counts"]) for sentence in said]


def _against(run: Run) -> str:
    """Return how the served row compares, such as "better than hard sharing (ctr AUC +0.0021)"; equal words once."""
    said: dict[str, list[str]] = {}
    for row, who in OPPONENTS.items():
        differences = {task: run.difference(row, task) for task in run.tasks if row in run.titles}
        metrics = {task: MAIN_METRIC[kind] for task, kind in run.tasks.items()}
        words = {task: _word(difference, metrics[task]) for task, difference in differences.items()}
        if len(set(words.values())) == 1:
            shown = ", ".join(
                f"{task} {metrics[task].upper()} {difference}" for task, difference in differences.items()
            )
            said.setdefault(f"{words.popitem()[1]} than ", []).append(f"{who} ({shown})")
        elif words:
            apart = [f"{words[t]} at {t} ({metrics[t].upper()} {difference})" for t, difference in differences.items()]
            said[f"{' and '.join(apart)} than {who}"] = [""]
    return "; ".join(how + _listed(whom) for how, whom in said.items())


def _listed(words: list[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def _word(difference: Difference, metric: str) -> str:
    if not difference.mean or math.isnan(difference.mean):
        return "no better"
    if difference.seeds > 1 and not is_clear(difference):
        return "neither clearly better nor clearly worse"
    return "better" if is_gain(difference.mean, metric) else "worse"


def _sure(run: Run) -> str:
    if run.seeds == 1:
        return "This is one seed, which cannot tell a difference from the noise of another start."
    said = "Better and worse are said of differences beyond the noise"
    return f"{said} of {run.seeds} seeds alone (paired t-test, p < {UNLIKELY:g})."


def _costs(run: Run) -> str:
    others = ", ".join(
        f"{who} {run.cost(row, 'multiply_adds'):,.0f} and {run.seconds(row):.0f} s"
        for row, who in OPPONENTS.items()
        if row in run.titles
    )
    return (
        f"It costs {run.cost(run.served, 'multiply_adds'):,.0f} multiply-adds per row and took "
        f"{run.seconds(run.served):.0f} s of processor time to train, with the search of its masks; {others}."
    )


def _found(run: Run) -> list[str]:
    """Return in words how much of a planted truth the served model and its masks found; nothing without one."""
    truth, parts = run.data.get("truth", {}), []
    for task, kind in run.tasks.items():
        metric = MAIN_METRIC[kind]
        if (key := f"{task}_{metric}") in truth:
            constant, best = truth["constant"][key], truth[key]
            value = run.mean(run.served, task, metric)
            parts.append(f"{_percent((value - constant) / (best - constant))} ({task})")
    found = [f"It reaches {' and '.join(parts)} of what the planted truth allows over a constant."] if parts else []
    if masks := run.results["recovery"].get(run.served):
        kept = {kind: [_percent(masks[kind][task]) for task in masks[kind]] for kind in ("planted", "other")}
        planted, other, names = (" and ".join(words) for words in (*kept.values(), masks["planted"]))
        found.append(f"Its masks keep {planted} of the inputs planted for {names}, {other} of the others.")
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
