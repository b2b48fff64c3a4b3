"""Tables as Markdown: rows of trained models against a base, over seeds, as in Table 2 of the paper."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lt4rec_sparse.recsys.harness.statistics import Summary, is_better, paired_difference, summary
from lt4rec_sparse.recsys.metrics import HIGHER_IS_BETTER, MAIN_METRIC

LEGEND = (
    "Mean ± standard deviation over the seeds; differences are paired over seeds, ± their standard error. Bold means "
    "better than the base by more than the standard error. This is a weak sign: with five seeds, about one of five "
    "rows that are no better is bold by chance. A single seed has no error. All seeds share the training and test "
    "rows, so the errors say what another start and order would have changed, not what other users would have."
)
NOT_KNOWN = "n/a"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells as they are given."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def count(number: int, of: str) -> str:
    """Return "one epoch", or "2 epochs"."""
    return f"one {of}" if number == 1 else f"{number} {of}s"


@dataclass(frozen=True)
class _Model:
    """What a row serves at one seed: one trial, or the trials of single tasks together."""

    metrics: dict[str, Mapping[str, float | None]]
    density: dict[str, float]
    train_seconds: float
    search_seconds: float
    parameters: int
    multiply_adds: int

    def __add__(self, other: _Model) -> _Model:
        return _Model(
            self.metrics | other.metrics,
            self.density | other.density,
            self.train_seconds + other.train_seconds,
            self.search_seconds + other.search_seconds,
            self.parameters + other.parameters,
            self.multiply_adds + other.multiply_adds,
        )


def comparison_table(
    records: Iterable[Mapping[str, Any]],
    rows: Mapping[str, str],
    base: str,
    tasks: Mapping[str, str],
    part: str = "all",
    split: str = "test",
) -> str:
    """Return each row's main metrics and their paired differences to the base's as a Markdown table; see `LEGEND`.

    Differences of an MSE are in percent of the base's, those of an AUC absolute, as in Table 2 of the paper. A row that
    lacks seeds is paired with the base at the seeds that both have. Unknown values are "n/a".

    Args:
        records: Records of trials, other rows' too. Records of one row and seed that name different tasks (models of
            single tasks) make one line. Those without `split` (tuning) are left out.
        rows: Row -> its title, in the order of the lines.
        base: The row that all others are compared with.
        tasks: Task -> its kind.
        part: "all" rows of the data, or the name of a slice.
        split: "test" or "validation".

    Raises:
        ValueError: If the base is not among the rows, or two records of a row and seed name the same task.
    """
    if base not in rows:
        raise ValueError(f"base: got {base!r}, wanted one of {', '.join(rows)}")
    models = _models(records, part, split)
    header = ["model", "seeds"]
    for task, kind in tasks.items():
        header += [f"{task} {MAIN_METRIC[kind].upper()}", f"against {rows[base]}"]
    lines = []
    for row, title in rows.items():
        of_row, of_base = models.get(row, {}), models.get(base, {})
        line = [title, _seeds(of_row, tasks)]
        for task, kind in tasks.items():
            metric = MAIN_METRIC[kind]
            values = _values(of_row, task, metric)
            line.append(_spread(values.values(), 5))
            line.append("" if row == base else _against(values, _values(of_base, task, metric), metric))
        lines.append(line)
    return table(header, lines)


def further_table(
    records: Iterable[Mapping[str, Any]],
    rows: Mapping[str, str],
    tasks: Mapping[str, str],
    part: str = "all",
    split: str = "test",
) -> str:
    """Return every other metric and the cost of each row as a Markdown table: means over the seeds.

    Seconds, parameters and multiply-adds of a row of single-task models are sums over its models. Density is the
    share of the masked weights that a task keeps, 100 % without a mask.

    Args:
        records: As for `comparison_table`.
        rows: Row -> its title, in the order of the lines.
        tasks: Task -> its kind.
        part: "all" rows of the data, or the name of a slice.
        split: "test" or "validation".

    Raises:
        ValueError: If two records of a row and seed name the same task.
    """
    models = _models(records, part, split)
    metrics = {
        (task, metric): None
        for row in rows
        for model in models.get(row, {}).values()
        for task, kind in tasks.items()
        for metric in model.metrics.get(task, {})
        if metric != MAIN_METRIC[kind]
    }
    columns = sorted(metrics, key=lambda column: list(tasks).index(column[0]))  # stable: metrics keep their order
    header = ["model", "seeds", *(f"{task} {metric.replace('_', ' ')}" for task, metric in columns)]
    header += ["train, s", "search, s", "together, s", "parameters", "multiply-adds", *(f"{t} density" for t in tasks)]
    lines = []
    for row, title in rows.items():
        of_row = models.get(row, {})
        line = [title, _seeds(of_row, tasks)]
        line += [_spread(_values(of_row, task, metric).values(), 4) for task, metric in columns]
        # Without all its tasks, a row would seem to cost less.
        whole = [model for model in of_row.values() if set(tasks) <= set(model.metrics)]
        line += [
            _mean([model.train_seconds for model in whole], ",.1f"),
            _mean([model.search_seconds for model in whole], ",.1f"),
            _mean([model.train_seconds + model.search_seconds for model in whole], ",.1f"),
            _mean([model.parameters for model in whole], ",.0f"),
            _mean([model.multiply_adds for model in whole], ",.0f"),
        ]
        line += [_mean([x.density[task] for x in of_row.values() if task in x.density], ".1%") for task in tasks]
        lines.append(line)
    return table(header, lines)


def levels_table(records: Sequence[Mapping[str, Any]], tasks: Mapping[str, str]) -> str:
    """Return each task's validation metric at every level of pruning as a Markdown table, and how often each was best.

    Args:
        records: One per seed, with `tickets` and `best_level`.
        tasks: Task -> its kind.
    """
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


def _models(records: Iterable[Mapping[str, Any]], part: str, split: str) -> dict[str, dict[int, _Model]]:
    """Return row -> seed -> what was trained, with the records of single tasks put together."""
    models: dict[str, dict[int, _Model]] = {}
    for record in records:
        if not record.get(split):
            continue
        row, seed, metrics = record["row"], record["seed"], record[split].get(part, {})
        masks, seconds = record["masks"], record["seconds"]
        model = _Model(
            dict(metrics),
            {task: masks["density"][task] if masks else 1.0 for task in metrics},
            seconds["train"],
            seconds["search"],
            record["parameters"],
            record["multiply_adds"],
        )
        earlier = models.setdefault(row, {}).get(seed)
        if earlier and (twice := set(earlier.metrics) & set(metrics)):
            raise ValueError(
                f"records: got two of row {row!r}, seed {seed} and {', '.join(sorted(twice))}, wanted one of each"
            )
        models[row][seed] = earlier + model if earlier else model
    return models


def _values(models: Mapping[int, _Model], task: str, metric: str) -> dict[int, float | None]:
    return {seed: model.metrics[task].get(metric) for seed, model in models.items() if task in model.metrics}


def _seeds(models: Mapping[int, _Model], tasks: Iterable[str]) -> str:
    """Return the number of seeds, per task if they differ."""
    counts = {task: sum(task in model.metrics for model in models.values()) for task in tasks}
    if len(set(counts.values())) == 1:
        return str(next(iter(counts.values())))
    return ", ".join(f"{task} {count}" for task, count in counts.items())


def _spread(values: Iterable[float | None], digits: int) -> str:
    known = list(values)
    over = summary(known) if known else Summary(math.nan, math.nan, 0)
    if math.isnan(over.mean):
        return NOT_KNOWN
    return f"{over.mean:.{digits}f}" + (f" ± {over.deviation:.{digits}f}" if over.seeds > 1 else "")


def _against(values: Mapping[int, float | None], base: Mapping[int, float | None], metric: str) -> str:
    both = [seed for seed in values if seed in base]
    if not both:
        return NOT_KNOWN
    relative = metric == "mse"
    difference = paired_difference({s: values[s] for s in both}, {s: base[s] for s in both}, relative)
    if math.isnan(difference.mean):
        return NOT_KNOWN
    digits = 2 if relative else 4
    text = f"{difference.mean:+.{digits}f}"
    text += f" ± {difference.error:.{digits}f}" if len(both) > 1 else ""
    text += " %" if relative else ""
    text = f"**{text}**" if is_better(difference, HIGHER_IS_BETTER[metric]) else text
    return text if len(both) == len(values) else f"{text} (seeds: {len(both)})"


def _mean(values: Sequence[float], form: str) -> str:
    return f"{summary(values).mean:{form}}" if values else NOT_KNOWN
