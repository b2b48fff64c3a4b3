"""From a click log to a frozen ranker and a report."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import nn

from lt4rec_sparse import __version__, ops
from lt4rec_sparse.files import read_json, write_whole
from lt4rec_sparse.ranker.features import Schema, SchemaError, Task
from lt4rec_sparse.ranker.inputs import inputs_width
from lt4rec_sparse.recsys.data import SPLITS, DataError, Prepared, SimulatorConfig, open_source, prepare, simulate
from lt4rec_sparse.recsys.data.remote import COPY, data_name, local_data
from lt4rec_sparse.recsys.frozen import freeze_and_compare
from lt4rec_sparse.recsys.harness.baselines import baselines
from lt4rec_sparse.recsys.harness.jobs import DATA, check_executor, laboratory
from lt4rec_sparse.recsys.harness.recovery import PLANTED, recovery
from lt4rec_sparse.recsys.harness.rows import S_WEIGHT, S_WEIGHT_LAST, Row, Rows, narrow_factor
from lt4rec_sparse.recsys.harness.settings import (
    RunSettings,
    check_settings,
    locked,
    pin_settings,
    tasks_of,
)
from lt4rec_sparse.recsys.harness.statistics import best_of
from lt4rec_sparse.recsys.harness.study import Progress, Resources, Study, carrier, carry_out
from lt4rec_sparse.recsys.harness.trackers import tracking
from lt4rec_sparse.recsys.metrics import LOSS
from lt4rec_sparse.recsys.report import verdict, warned, write_report

PLANTED_FIELDS = 2  # of each kind in the simulated log: enough to see whether masks find them
MODEL, MODEL_LAST, RESULTS = "model.safetensors", "model_last.safetensors", "results.json"


class Finished(NamedTuple):
    """What a run leaves: the path of `report.md`, its verdict, and its warnings, each in one line."""

    report: Path
    verdict: str
    warnings: tuple[str, ...] = ()


def run(
    data: Path | str | None,
    out: Path,
    settings: RunSettings,
    progress: Progress = lambda stage, done, total: None,
    resources: Resources | None = None,
) -> Finished:
    """Prepare the data, find masks, train every row, freeze, measure and report; continue an interrupted run.

    The rows are the candidates for a product (`Rows.product`), trained as those of the experiments are; `experiment
    tickets` has their controls. A finished run is not measured again.

    The folder `out` then holds `report.md`, `report.html` and `plots/`; `model.safetensors`, the frozen sparse sharing
    model of seed 0, calibrated for int8, whose masks (random or tickets) the settings or the validation days choose;
    `model_last.safetensors`, through the last, sparsest tickets, where tickets were searched and it is another model;
    `results.json`, all figures of the report; `config.json`, the resolved settings; `data/`, the prepared log;
    `singles/`, `searches/` and `trials/`, what was trained; `metrics.jsonl`.

    Args:
        data: A folder with a schema file, or in KuaiRand's layout, or the URL of one, of which `out` gets a copy
            (`local_data`); None simulates a click log.
        out: The run folder; its report covers every seed that was ever asked for in it.
        settings: What to do.
        progress: Called with a stage's name, steps done and steps in all.
        resources: The processes that train, and what tracks them.

    Raises:
        InputError: If `out` holds a run with other settings or of another version, or another process works there; or
            as `check_executor`.
        DataError: If `out` holds a run on other data, or the data do not match their schema.
        SchemaError: If the schema contradicts itself, or has a name that cannot be used here.
    """
    started, resources = perf_counter(), resources or Resources()
    check_executor(resources.workers, resources.executor)
    given = _simulated(out, progress) if data is None else _of_folder(data, out, progress)
    with begun(given, out, settings, progress) as log:
        facts = {
            "name": "simulated click log" if data is None else given.name,
            "counts": log.prepared.counts,
            "grouped": log.prepared.schema.group is not None,
            "tasks": log.tasks,
            "fields": [*(field.column for field in log.prepared.encoder.fields), *log.prepared.encoder.numbers],
        }
        if data is None:
            facts["truth"] = read_json(log.source / "truth.json", "fields")
        results = _earlier(out, log.config)
        if results is None:
            results = {
                "data": facts,
                "config": log.config,
                "machine": _machine(),
                "command": shlex.join(["lt4rec-sparse", *sys.argv[1:]]),
                **_measured(log, out, facts, progress, resources),
                "seconds": perf_counter() - started,
            }
            write_whole(out / RESULTS, json.dumps(results, indent=1) + "\n")
        report = write_report(results, out)
        files = [report, out / "report.html", out / RESULTS, *(out / name for name in results["files"].values())]
        tracking(out, resources.tracker).whole(log.config, log.settings.seeds, results["records"], files)
        return Finished(report, verdict(results), tuple(map(str, warned(results))))


class Given(NamedTuple):
    """A log to train on: its name, and what brings it to a folder.

    `place` is told whether the run folder holds a run already, and returns the folder of the log, and its schema where
    it is not the folder's.
    """

    name: str
    place: Callable[[bool], tuple[Path, Schema | None]]


class Begun(NamedTuple):
    """A log that a run folder was begun with: its folder, what was prepared, tasks and kinds, and the settings."""

    source: Path
    prepared: Prepared
    tasks: dict[str, str]
    settings: RunSettings
    config: dict[str, Any]


def _of_folder(data: Path | str, out: Path, progress: Progress) -> Given:
    return Given(data_name(data), lambda is_begun: (local_data(data, out / COPY, progress=progress), None))


def _simulated(out: Path, progress: Progress) -> Given:
    def place(is_begun: bool) -> tuple[Path, None]:
        source = out / "simulated"
        if not (source / "truth.json").exists():
            progress("simulate", 0, 1)
            simulate(SimulatorConfig(planted_fields=PLANTED_FIELDS), source)
            progress("simulate", 1, 1)
        return source, None

    return Given("simulated", place)


@contextmanager
def begun(given: Given, out: Path, settings: RunSettings, progress: Progress) -> Iterator[Begun]:
    """Prepare a log in a run folder and pin the settings, of which nothing is left open.

    The folder is locked meanwhile. Raises what `run` does.
    """
    known = check_settings(out, given.name, settings)
    settings = known or settings
    with locked(out):
        source, schema = given.place(known is not None)
        schema = open_source(source, schema).schema
        tasks = tasks_of(schema, settings.tasks)
        _check_names(schema)
        # Earlier trials were trained on the data as they were then.
        prepared = prepare(source, out / DATA, schema, progress, replace=known is None)
        _check_classes(prepared, source, tasks)
        settings = settings.of_rows(prepared.counts["train"]["rows"])
        config = pin_settings(out, given.name, settings)
        yield Begun(source, prepared, {task.name: task.kind for task in tasks}, settings, config)


def trained(
    log: Begun, out: Path, progress: Progress, resources: Resources, wanted: Callable[[Row], bool] = lambda row: True
) -> Study:
    """Train the rows of a run that are wanted, by default all; what was trained before is read from the folder."""
    settings = log.settings
    encoder = log.prepared.encoder
    in_features = inputs_width(len(encoder.fields), settings.embedding_dim, encoder.n_numbers)
    rows = Rows(
        tuple(log.tasks),
        settings.training,
        rounds=settings.rounds,
        density=settings.density,
        granularity=settings.granularity,
        narrow=narrow_factor(in_features, settings.hidden, settings.density),
        top_k=settings.top_k,
    )
    return carry_out(
        lambda rows: [row for row in rows.product(settings.masks) if wanted(row)],
        rows,
        settings.seeds,
        log.prepared.schema,
        out,
        carrier(out, resources, progress, "models"),
        settings.learning_rates,
    )


def _measured(
    log: Begun, out: Path, facts: Mapping[str, Any], progress: Progress, resources: Resources
) -> dict[str, Any]:
    """Train, choose on the validation days, freeze and measure."""
    settings = log.settings
    study = trained(log, out, progress, resources)
    first = {record["row"]: record for record in study.records if record["seed"] == 0}
    served = served_row(study.records, settings.masks, log.tasks)
    files = {served: MODEL}
    if S_WEIGHT_LAST in first and first[S_WEIGHT_LAST]["state"] != first[served]["state"]:
        files[S_WEIGHT_LAST] = MODEL_LAST
    lab = laboratory(out)
    progress("baselines", 0, 1)
    found = baselines(lab, tuple(log.tasks), settings.seeds, settings.top_k)
    progress("baselines", 1, 1)
    progress("freeze and measure", 0, 1)
    frozen = {
        row: freeze_and_compare(lab, study.trials[row, 0][0], out / file, settings.embeddings)
        for row, file in files.items()
    }
    planted = facts["truth"]["fields"] if "truth" in facts and log.tasks.keys() >= PLANTED.keys() else {}
    masked = [row for row in study.rows if planted and first[row]["masks"]]
    progress("freeze and measure", 1, 1)
    return {
        "rows": study.rows | found.rows,
        "left_out": study.left_out | found.left_out,
        "learning_rates": study.rates,
        "steps": lab.batches(settings.training) * settings.training.epochs,
        "files": files,
        "frozen": frozen,
        "recovery": {row: recovery(lab, study.trials[row, 0][0], planted) for row in masked},
        "records": study.records + found.records,
    }


def served_row(records: Sequence[Mapping[str, Any]], masks: str, kinds: Mapping[str, str]) -> str:
    """Return the row to serve: of several masked ones, the best on the validation days at seed 0."""
    if masks == "tickets":
        return S_WEIGHT
    masked = {r["row"]: r["validation"]["all"] for r in records if r["masks"] and r["seed"] == 0}
    losses = {row: {task: metrics[task][LOSS[kind]] for task, kind in kinds.items()} for row, metrics in masked.items()}
    served: str = best_of(losses)
    return served


def _earlier(out: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the results of a run that finished with these settings."""
    path = out / RESULTS
    if not path.exists():
        return None
    results: dict[str, Any] = read_json(path, "config", "files")
    is_whole = results["config"] == config and all((out / file).exists() for file in results["files"].values())
    return results if is_whole else None


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "engine": ops.cpu_engine(),
        "lt4rec_sparse": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _check_names(schema: Schema) -> None:
    """Refuse names that a run cannot use, before hours of work."""
    for task in schema.tasks:
        # A task names a folder of tickets and parts of the models, in which "keys" or "train" is a method.
        if not re.fullmatch(r"[\w-]+", task.name) or hasattr(nn.ModuleDict(), task.name):
            raise SchemaError(
                f"task {task.name!r}: got a name that is reserved or has other signs, wanted letters, digits, _, -"
            )
    if any(part.name == "all" for part in schema.slices):
        raise SchemaError("slice 'all': got the name that a report has for all rows, wanted another")


def _check_classes(prepared: Prepared, source: Path, tasks: Sequence[Task]) -> None:
    """Refuse a split in which a binary task has labels of one class only: nothing can be ranked or judged there."""
    for split in SPLITS:
        for task in tasks:
            mean = prepared.counts[split]["tasks"][task.name]["label_mean"]
            if task.kind == "binary" and mean in (0, 1):
                raise DataError(f"{source}: split {split!r}: got only labels {mean:.0f} of {task.name}, wanted 0 and 1")
