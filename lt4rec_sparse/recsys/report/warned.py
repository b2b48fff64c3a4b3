"""What a reader of a run's results must know before acting on them."""

from __future__ import annotations

import math
from typing import NamedTuple

from lt4rec_sparse.recsys.harness.baselines import CONSTANT, TREES
from lt4rec_sparse.recsys.harness.by_rows import few_steps
from lt4rec_sparse.recsys.harness.rows import HARD, SMALL
from lt4rec_sparse.recsys.metrics import LOSS, MAIN_METRIC
from lt4rec_sparse.recsys.report.page import worded
from lt4rec_sparse.recsys.report.results import Results, Run
from lt4rec_sparse.recsys.tables import count

CALIBRATED = 0.05  # how far predicted over observed may be from 1 without a word, in practice
FAR = 0.1  # so far it is remarked even where chance alone may have made it
FEW = (
    100  # rows of a class in a split: they alone give an AUC a standard error of 0.03, and a mean label one of a tenth
)

WORDS = {"auc": "AUC", "mse": "MSE", "log_loss": "log loss"}
SIMPLE = {  # row -> words for it, and what to do where it is better at a task
    CONSTANT: ("a constant", "There the model has learned less than the base rate: do not serve its scores."),
    TREES: ("gradient-boosted trees", "Networks need more rows or longer training, or trees are enough for this log."),
}


class Warned(NamedTuple):
    """A warning: what it is about, in a few words, and its text; it prints in one line."""

    about: str
    text: str

    def __str__(self) -> str:
        return f"{self.about}: {self.text}"


def warned(results: Results) -> list[Warned]:
    """Return the warnings of a run, the gravest first."""
    run = Run(results)
    found = [*_beaten(run), *_calibration(run), *_steps(run), *_classes(run), *_seeds(run)]
    return [Warned(about, worded(text, run.data["counts"])) for about, text in found]


def _beaten(run: Run) -> list[Warned]:
    """Return which simple models are better: a constant or trees at any task, a narrow dense network at all."""
    found = []
    for row, (who, advice) in SIMPLE.items():
        better = [text for task in run.tasks if (text := _gains(run, row, task))] if row in run.titles else []
        if better:
            text = f"better than the served model on the test days at {' and at '.join(better)}. {advice}"
            found.append(Warned(who, text))
    if HARD + SMALL in run.titles and all(run.is_beaten(HARD + SMALL, task) for task in run.tasks):
        text = "better than the served model at every task on the test days, and simpler to serve: consider it instead."
        found.append(Warned("the narrow dense network", text))
    return found


def _gains(run: Run, row: str, task: str) -> str:
    """Return what a row gains over the served one, such as "ctr (AUC 0.72 against 0.71)"; empty if nothing is clear."""
    kind, gains = run.tasks[task], []
    for metric in dict.fromkeys((MAIN_METRIC[kind], LOSS[kind])):
        if run.is_beaten(row, task, metric):
            mine, other = run.mean(run.served, task, metric), run.mean(row, task, metric)
            gains.append(f"{WORDS[metric]} {other:.4f} against {mine:.4f}")
    return f"{task} ({', '.join(gains)})" if gains else ""


def _calibration(run: Run) -> list[Warned]:
    """Return the tasks whose mean score is not the mean label of the test days.

    The mean label `m` of `n` rows has a relative standard error of at most `sqrt((1 - m) / (n m))`: that of a binary
    label, and no label in [0, 1] varies more. A ratio is remarked that is further from 1 than twice this error, within
    the bounds `CALIBRATED` and `FAR`.
    """
    found = []
    for task in run.tasks:
        ratio, counts = run.mean(run.served, task, "calibration"), run.data["counts"]
        test, train = (counts[split]["tasks"][task] for split in ("test", "train"))
        rows, mean = test["rows"], test["label_mean"]
        chance = 2 * math.sqrt((1 - mean) / (rows * mean)) if rows and mean else math.inf
        if abs(ratio - 1) <= min(max(chance, CALIBRATED), FAR):
            continue
        is_chance = abs(ratio - 1) <= chance
        drift = f"; the training days themselves have {train['label_mean'] / mean:.2f} times that rate" if mean else ""
        found.append(
            Warned(
                f"calibration of {task}",
                f"the served model predicts {ratio:.2f} times what the test days show{drift}. "
                + (f"Chance alone may do this: it moves {count(rows, 'row')} by {chance:.0%}. " if is_chance else "")
                + "The order by this score is unaffected; recalibrate it before multiplying it with anything else.",
            )
        )
    return found


def _steps(run: Run) -> list[Warned]:
    warning = few_steps(run.results["steps"])
    return [Warned("few steps", warning)] if warning else []


def _classes(run: Run) -> list[Warned]:
    """Return the splits with few rows of a class of a binary task, or few rows of another."""
    found = []
    for task, kind in run.tasks.items():
        few = []
        for split in ("train", "validation", "test"):
            counts = run.data["counts"][split]["tasks"][task]
            positive = round(counts["rows"] * counts["label_mean"])
            classes = {"positive": positive, "negative": counts["rows"] - positive}
            few += [
                f"{count(number, f'{name} row')} in {split}"
                for name, number in (classes if kind == "binary" else {"known": counts["rows"]}).items()
                if number < FEW
            ]
        if few:
            text = f"{', '.join(few)}. So few decide little: what the validation days choose and the test days say"
            found.append(Warned(f"few rows of {task}", f"{text} may be chance, whatever the seeds say."))
    return found


def _seeds(run: Run) -> list[Warned]:
    if run.seeds > 1:
        return []
    return [Warned("one seed", "another start may turn any difference round that is small; train two more seeds.")]
