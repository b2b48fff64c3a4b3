"""Tables as Markdown: rows of trained models against a base, over seeds, as in Table 2 of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lt4rec_sparse.recsys.harness.statistics import is_better, paired_difference, summary
from lt4rec_sparse.recsys.metrics import HIGHER_IS_BETTER, MAIN_METRIC

LEGEND = (
    "Mean ± standard deviation over the seeds; differences are paired over seeds, ± their standard error. Bold means "
    "better than the base by more than the standard error. This is a weak sign: with five seeds, about one of five "
    "rows that are no better is bold by chance. A single seed has no error. All seeds share the training and test "
    "rows, so the errors say what another start and order would have changed, not what other users would have."
)
NOT_KNOWN = "n/a"

Record = Mapping[str, Any]
Values = dict[int, float | None]  # seed -> value


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells as they are given."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def count(number: int, of: str) -> str:
    """Return "one epoch", or "2 epochs"."""
    return f"one {of}" if number == 1 else f"{number} {of}s"


def comparison_table(
    records: Iterable[Record],
    rows: Mapping[str, str],
    base: str,
    tasks: Mapping[str, str],
    part: str = "all",
    left_out: Iterable[str] = (),
) -> str:
    """Return each row's main metrics on the test days and their paired differences to the base's; see `LEGEND`.

    Differences of an MSE are in percent of the base's, those of an AUC absolute, as in Table 2 of the paper. A row that
    lacks seeds is paired with the base at the seeds that both have. Unknown values are "n/a". Records of one row and
    seed that name different tasks (models of single tasks) make one line.

    `rows` are titles in the order of the lines; `tasks` are kinds; `part` is "all" rows of the data, or a slice;
    `left_out` are titles of rows that could not be trained, see `reasons`.
    """
    records = list(records)
    header = ["model", "seeds"]
    for task, kind in tasks.items():
        header += [f"{task} {MAIN_METRIC[kind].upper()}", f"against {rows[base]}"]
    lines = []
    for row, title in rows.items():
        line = [title, _seeds(records, row, tasks, part)]
        for task, kind in tasks.items():
            metric = MAIN_METRIC[kind]
            values = values_of(records, row, task, metric, part)
            line.append(_spread(values.values(), 5))
            others = values_of(records, base, task, metric, part)
            line.append("" if row == base else _against(values, others, metric))
        lines.append(line)
    lines += [[title, "left out", *("" for _ in header[2:])] for title in left_out]
    return table(header, lines)


def reasons(left_out: Mapping[str, str]) -> str:
    """Return why rows were left out, title -> reason, as a list; empty without any."""
    return "\n".join(f"- {title} is left out: {reason}." for title, reason in left_out.items())


def further_table(records: Sequence[Record], rows: Mapping[str, str], tasks: Mapping[str, str]) -> str:
    """Return every other metric on the test days and the cost of each row: means over the seeds.

    Seconds, parameters and multiply-adds of a row of single-task models are sums over its models. Density is the
    share of the masked weights that a task keeps, 100 % without a mask. For the arguments see `comparison_table`.
    """
    columns = [
        (task, metric)
        for task, kind in tasks.items()
        for metric in dict.fromkeys(
            metric for record in records if record["row"] in rows for metric in record["test"]["all"].get(task, ())
        )
        if metric != MAIN_METRIC[kind]
    ]
    costs: dict[str, tuple[Callable[[Record], float], str]] = {
        "train, s": (lambda record: record["seconds"]["train"], ",.1f"),
        "search, s": (lambda record: record["seconds"]["search"], ",.1f"),
        "together, s": (lambda record: record["seconds"]["train"] + record["seconds"]["search"], ",.1f"),
        "parameters": (lambda record: _or_nan(record["parameters"]), ",.0f"),
        "multiply-adds": (lambda record: _or_nan(record["multiply_adds"]), ",.0f"),
    }
    header = ["model", "seeds", *(f"{task} {metric.replace('_', ' ')}" for task, metric in columns)]
    header += [*costs, *(f"{task} density" for task in tasks)]
    lines = []
    for row, title in rows.items():
        line = [title, _seeds(records, row, tasks, "all")]
        line += [_spread(values_of(records, row, task, metric).values(), 4) for task, metric in columns]
        seeds: dict[int, list[Record]] = {}
        for record in records:
            if record["row"] == row:
                seeds.setdefault(record["seed"], []).append(record)
        # Without all its tasks, a row would seem to cost less.
        whole = [of_seed for of_seed in seeds.values() if set(tasks) <= {t for r in of_seed for t in r["test"]["all"]}]
        line += [_mean([sum(map(cost, of_seed)) for of_seed in whole], form) for cost, form in costs.values()]
        for task in tasks:
            mine = [r["masks"] for of_seed in seeds.values() for r in of_seed if task in r["test"]["all"]]
            line.append(_mean([masks["density"][task] if masks else 1.0 for masks in mine], ".1%"))
        lines.append(line)
    return table(header, lines)


def levels_table(records: Sequence[Record], tasks: Mapping[str, str]) -> str:
    """Return each task's validation metric at every level of pruning, and how often each level was best."""
    first, *_ = tasks
    header = ["remaining", *(f"{task} {MAIN_METRIC[kind].upper()}" for task, kind in tasks.items())]
    lines = []
    for level, ticket in enumerate(records[0]["tickets"][first]):
        line = [f"{ticket['density']:.1%}"]
        for task, kind in tasks.items():
            values = [record["tickets"][task][level]["validation"][MAIN_METRIC[kind]] for record in records]
            chosen = sum(record["best_level"][task] == level for record in records)
            line.append(_spread(values, 5) + (f" (best at {count(chosen, 'seed')})" if chosen else ""))
        lines.append(line)
    return table(header, lines)


def values_of(records: Iterable[Record], row: str, task: str, metric: str, part: str = "all") -> Values:
    """Return a row's metric of a task on the test days at each seed."""
    tested = ((record["seed"], record["test"].get(part, {})) for record in records if record["row"] == row)
    return {seed: metrics[task].get(metric) for seed, metrics in tested if task in metrics}


def _seeds(records: Iterable[Record], row: str, tasks: Iterable[str], part: str) -> str:
    """Return the number of seeds, per task if they differ."""
    tested = [record["test"].get(part, {}) for record in records if record["row"] == row]
    counts = {task: sum(task in metrics for metrics in tested) for task in tasks}
    if len(set(counts.values())) == 1:
        return str(next(iter(counts.values())))
    return ", ".join(f"{task} {count}" for task, count in counts.items())


def _spread(values: Iterable[float | None], digits: int) -> str:
    known = list(values)
    over = summary(known) if known else None
    if over is None or math.isnan(over.mean):
        return NOT_KNOWN
    return f"{over.mean:.{digits}f}" + (f" ± {over.deviation:.{digits}f}" if over.seeds > 1 else "")


def _against(values: Values, base: Values, metric: str) -> str:
    both = [seed for seed in values if seed in base]
    if not both:
        return NOT_KNOWN
    difference = paired_difference({s: values[s] for s in both}, {s: base[s] for s in both}, metric == "mse")
    if math.isnan(difference.mean):
        return NOT_KNOWN
    text = f"**{difference}**" if is_better(difference, HIGHER_IS_BETTER[metric]) else str(difference)
    return text if len(both) == len(values) else f"{text} (seeds: {len(both)})"


def _mean(values: Sequence[float], form: str) -> str:
    mean = summary(values).mean if values else math.nan
    return NOT_KNOWN if math.isnan(mean) else f"{mean:{form}}"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
