"""The page of each experiment: its tables and plots, from the records of its trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lt4rec_sparse.nn import MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.nn.compaction import compact
from lt4rec_sparse.nn.dense import dense_kernels, packed_product
from lt4rec_sparse.paper import figures
from lt4rec_sparse.paper.replay import TABLE_3, LoggedRows, over_seeds, replay, sessions, table_3_scores
from lt4rec_sparse.recsys.frozen import Product, dense_pass, score_mlp
from lt4rec_sparse.recsys.harness.jobs import laboratory
from lt4rec_sparse.recsys.harness.rows import BASE, HARD, RANDOM, SMALL
from lt4rec_sparse.recsys.harness.study import Study
from lt4rec_sparse.recsys.harness.trials import Trial
from lt4rec_sparse.recsys.models import HardSharing, SparseSharing
from lt4rec_sparse.recsys.plots import plot_ownership, plot_tickets
from lt4rec_sparse.recsys.report import render
from lt4rec_sparse.recsys.tables import LEGEND, comparison_table, further_table, levels_table, reasons, table
from lt4rec_sparse.recsys.training import Predictions
from lt4rec_sparse.stopwatch import interleaved

REPLAY = "the replay of requests"  # a part of Table 3's page
CANDIDATES = (1, 32, 256)  # of the requests that the granularity experiment times


@dataclass
class Findings:
    """What an experiment's page is written from: the facts of `records.json`, and the study.

    `out` is the folder where it was trained; plots go to `<experiment>/plots/` in it. `further` are measurements of the
    page itself, saved beside the records.
    """

    facts: Mapping[str, Any]
    study: Study
    out: Path
    further: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows, self.records = self.study.rows, self.study.records
        self.tasks: Mapping[str, str] = self.facts["tasks"]
        # Beside the rows: a constant and trees, which are neither frozen nor timed.
        beside = self.facts.get("baselines", {"rows": {}, "records": []})
        self.all_rows, self.all_records = self.rows | beside["rows"], self.records + beside["records"]

    def plot(self, name: str, caption: str, draw: Callable[[Path], object]) -> str:
        """Draw `plots/<name>.png` and return it as Markdown."""
        draw(self.out / self.facts["experiment"] / "plots" / f"{name}.png")
        return f"![{caption}](plots/{name}.png)"


def table3(findings: Findings) -> str:
    """Return Table 3 offline: the four arms' lists replayed on the logged requests of the test days.

    Of a log that cannot be replayed, the page compares the models that the arms combine.
    """
    left_out = findings.facts["left_out"]
    models = comparison_table(findings.all_records, findings.all_rows, BASE, findings.tasks)
    after = [f"## The models\n\n{models}", *([reasons(left_out)] if left_out else [])]
    if REPLAY in left_out:
        return _written(findings, "Table 3: the models of its arms", after)
    results = {seed: _replayed(findings, seed) for seed in range(findings.facts["seeds"])}
    merged = over_seeds(results)
    findings.further["replay"] = merged
    parts = [REPLAY_LEGEND]
    for k, found in merged["k"].items():
        parts.append(f"## The top {k} of requests of more than {k} impressions\n\n{_replay_table(found)}")
    return _written(findings, "Table 3: the four arms replayed offline", [*parts, *after])


def figure4(findings: Findings) -> str:
    """Return Figure 4: each task's metric against the weights that remain, for all seeds."""
    (row,) = (key for key in findings.rows if key != BASE)
    records = [record for record in findings.records if record["row"] == row]
    plot = findings.plot(
        "figure4",
        "Validation metric of each task against the hidden weights that remain",
        lambda path: plot_tickets(records, findings.tasks, path),
    )
    levels = "On the validation days, each level trained alone from the start:"
    parts = [plot, f"{levels}\n\n{levels_table(records, findings.tasks)}"]
    return page(findings, "Figure 4: pruning round by round", parts)


def granularity(findings: Findings) -> str:
    """Return accuracy against density and against measured time, from single weights to whole neurons."""
    curves = {key: key.removesuffix("_last") for key in findings.rows if key.endswith("_last")}
    timed = {HARD: "hard sharing (dense)", HARD + SMALL: findings.rows[HARD + SMALL], **curves}
    measured = serving_times(findings.out, {row: findings.study.trials[row, 0][0] for row in timed})
    findings.further["serving"] = measured
    for record in findings.records:
        if record["row"] in measured:
            record["serving"] = measured[record["row"]]
    parts = [
        findings.plot(
            "granularity",
            "Validation metric of each task against density, one line per granularity",
            lambda path: figures.plot_granularity(findings.records, curves, findings.tasks, path),
        ),
        findings.plot(
            "speed",
            "Test metric of each task against microseconds for 256 candidates",
            lambda path: figures.plot_speed(findings.records, timed, findings.tasks, path),
        ),
        _times(measured, timed),
    ]
    return page(findings, "Granularity: accuracy against real speed", parts)


def tickets(findings: Findings) -> str:
    """Return which property of a mask decides."""
    against_random = comparison_table(findings.records, findings.rows, RANDOM, findings.tasks)
    shown = ["ticket", "ticket_layer", "random_like", RANDOM, "separate_0.5"]
    return page(findings, "Does the ticket matter?", [f"## Against random masks\n\n{against_random}"], shown)


REPLAY_LEGEND = """\
Every request's impressions are ranked by `pCTR * pCVR * length` (Eq 3, a = b = c = 1) and the top k are judged by the
log. This is a replay within the lists that the logging policy showed, not an online test. Where the log has no
requests, a request is a user's impressions, each at most four hours after the previous one. View time counts clicked
impressions only, in seconds per request; `expected` is the true expectation, where the log is simulated. Values are
means over the seeds; differences are paired over seeds, ± their standard error. The rows from `random` down are orders
to compare the arms with: random, by length alone, as shown, and the best possible in hindsight or by the truth."""


def page(findings: Findings, title: str, parts: Sequence[str] = (), shown: Sequence[str] = ()) -> str:
    """Return a page: the comparison with single-task models, `parts`, and who owns the weights of the rows `shown`."""
    sections = [LEGEND]
    for part in findings.records[0]["test"]:
        caption = "All rows of the test days" if part == "all" else f"The slice `{part}` of the test days"
        left_out = findings.facts["left_out"]
        rows = comparison_table(findings.all_records, findings.all_rows, BASE, findings.tasks, part, left_out)
        sections.append(f"## {caption}\n\n{rows}")
    if findings.facts["left_out"]:
        sections.append(reasons(findings.facts["left_out"]))
    sections += parts
    masked = {record["row"] for record in findings.records if record["masks"]}
    if owners := {key: findings.rows[key] for key in shown if key in masked}:
        plot = findings.plot(
            "overlap",
            "Shared, private and dead weights of each layer",
            lambda path: plot_ownership(findings.records, owners, path),
        )
        sections.append(f"## Who owns which weights\n\n{plot}")
    further = further_table(findings.all_records, findings.all_rows, findings.tasks)
    sections.append(f"## Every other metric, and what each row costs\n\n{further}")
    return _written(findings, title, sections)


def _written(findings: Findings, title: str, sections: Sequence[str]) -> str:
    """Return a page: what was trained and how, and its sections."""
    facts = findings.facts
    rates = sorted({rate for of_row in facts["learning_rates"].values() for rate in of_row.values()})
    return render(
        "page.md",
        "lt4rec_sparse.paper",
        title=title,
        facts=facts,
        training=facts["training"],
        rates=[f"{rate:g}" for rate in rates],
        sections=sections,
    )


def _times(measured: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    sizes = next(iter(measured.values()))["microseconds"]
    header = ["masks", *(f"µs at {size}" for size in sizes), "served as"]
    lines = [
        [title, *(f"{us:,.0f}" for us in measured[key]["microseconds"].values()), measured[key]["way"]]
        for key, title in titles.items()
    ]
    text = "The MLPs of all tasks, fp32, seed 0: medians of one interleaved run, each model served in its fastest way."
    return f"{text}\n\n{table(header, lines)}"


def _replayed(findings: Findings, seed: int) -> dict[str, Any]:
    """Replay the test days with the models of one seed."""
    lab = laboratory(findings.out)
    predicted: dict[str, dict[str, Any]] = {task: {} for task in findings.tasks}
    rows: Predictions | None = None
    for row in sorted({row for arm in TABLE_3.values() for row in arm}):
        for trial in findings.study.trials[row, seed]:
            rows = lab.predictions(trial, "test")
            for task, probability in rows.probabilities.items():
                predicted[task][row] = probability.double().numpy()
    assert rows is not None and rows.groups is not None
    click, watch = findings.tasks
    values = {name: column.numpy() for name, column in rows.values.items()}
    users, times = rows.groups.numpy(), values["time_ms"].astype(np.int64)
    expected = None
    if "truth_click" in values:
        expected = values["truth_click"] * values["truth_watch"] * np.nan_to_num(values["duration_ms"]) / 1000
    log = LoggedRows(
        values["request_id"].astype(np.int64) if "request_id" in values else sessions(users, times),
        values["duration_ms"] / 1000,
        values["play_time_ms"] / 1000,
        rows.labels[click].numpy() > 0.5,
        times,
        expected,
    )
    return replay(log, table_3_scores(predicted[click], predicted[watch], log.duration_s))


def _replay_table(found: Mapping[str, Any]) -> str:
    """Return Table 3's columns for one k: the arms, then the reference orders."""
    first, *_ = found["arms"]
    metrics = {"view_time_s": "view time, s", "cvr": "cvr", "ctr": "ctr"}
    main = "view_time_s"
    if "expected_view_time_s" in found["arms"][first]:
        main = "expected_view_time_s"
        metrics[main] = "expected view time, s"
    header = ["order", *metrics.values(), f"{metrics[main]}, against {first}"]
    lines = []
    for name, values in (found["arms"] | found["references"]).items():
        difference = found["differences"].get(name, {}).get(first, {}).get(main, {})
        line = [name, *(_number(values[metric]["mean"], values[metric]["deviation"] or None) for metric in metrics)]
        lines.append([*line, _number(difference.get("difference"), difference.get("error"), "+")])
    return f"{found['requests']:,} requests.\n\n{table(header, lines)}"


def _number(mean: float | None, error: float | None, sign: str = "") -> str:
    if mean is None:
        return ""
    return f"{mean:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def serving_times(folder: Path, trials: Mapping[str, Trial]) -> dict[str, Any]:
    """Time the MLPs of trained trials, row -> trial, all tasks, fp32, on rows of the test days.

    The ways of a masked network: "sparse", the engine on compressed weights; "compacted", smaller dense layers without
    dead inputs and neurons; "dense" and "packed dense", masks multiplied in beforehand, by torch and by oneDNN.
    Networks without masks are dense.

    Returns:
        Row -> {"microseconds": {candidates: median of its fastest way}, "way": that way for the most candidates,
        "ways": {way: {candidates: median}}}.
    """
    lab = laboratory(folder)
    models = {row: lab.model(trial) for row, trial in trials.items()}
    features = next(lab.prepared.stream("test", max(CANDIDATES), shuffle=False).epoch(0)).features
    with torch.inference_mode():
        x = cast(SparseSharing, next(iter(models.values()))).inputs(features)
    calls = {f"{row}|{way}": score for row, model in models.items() for way, score in _ways(model).items()}
    medians: dict[str, dict[str, dict[str, float]]] = {row: {} for row in trials}
    for size in CANDIDATES:
        for name, timing in interleaved({name: partial(score, x[:size]) for name, score in calls.items()}).items():
            row, way = name.split("|")
            medians[row].setdefault(way, {})[str(size)] = timing.median_us
    result = {}
    for row, ways in medians.items():
        fastest = {str(size): min(ways, key=lambda way: ways[way][str(size)]) for size in CANDIDATES}
        result[row] = {
            "microseconds": {size: ways[way][size] for size, way in fastest.items()},
            "way": fastest[str(max(CANDIDATES))],
            "ways": ways,
        }
    return result


def _ways(model: nn.Module) -> dict[str, Product]:
    if isinstance(model, HardSharing):
        return dense_ways([cast(MaskedMLP, model.mlps[task]) for task in model.tasks])
    assert isinstance(model, SparseSharing)
    frozen = freeze(model.mlp, sigmoid=True)
    assert isinstance(frozen, SparseMLP)
    compacted = compact(frozen.network)
    return {
        "sparse": partial(score_mlp, frozen),
        "compacted": torch.inference_mode()(compacted.__call__),
        **dense_ways([model.mlp]),
    }


def dense_ways(mlps: Sequence[MaskedMLP]) -> dict[str, Product]:
    """Return the ways that need no sparse kernel: torch's `F.linear`, and weights that oneDNN packed."""
    makers = {"dense": None, **({"packed dense": packed_product} if "onednn" in dense_kernels("fp32") else {})}
    return {way: partial(_side_by_side, [dense_pass(mlp, make) for mlp in mlps]) for way, make in makers.items()}


def _side_by_side(parts: Sequence[Product], x: Tensor) -> Tensor:
    return parts[0](x) if len(parts) == 1 else torch.cat([part(x) for part in parts], dim=1)
