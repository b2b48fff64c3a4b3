"""The whole length of the product: a click log in, a frozen ranker and a report out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from lt4rec_sparse.files import write_whole
from lt4rec_sparse.ranker.features import Schema, SchemaError, Task
from lt4rec_sparse.recsys.data import SPLITS, DataError, Prepared, SimulatorConfig, open_source, prepare, simulate
from lt4rec_sparse.recsys.frozen import freeze_and_compare
from lt4rec_sparse.recsys.harness.arms import RANDOM_LAST, SPARSE, SPARSE_LAST, SeedRun
from lt4rec_sparse.recsys.harness.settings import RunSettings, check_settings, pin_settings, tasks_of, with_seeds_of
from lt4rec_sparse.recsys.report import write_report

Progress = Callable[[str, int, int], None]

MODEL, MODEL_LAST = "model.safetensors", "model_last.safetensors"


def run(
    data: Path | None, out: Path, settings: RunSettings, progress: Progress = lambda stage, done, total: None
) -> Path:
    """Prepare the data, find masks, train every arm, freeze, measure and report; continue where a run stopped.

    The folder `out` then holds `report.md`, `report.html` and `plots/`; the frozen sparse sharing model of seed 0,
    `model.safetensors`, calibrated for int8, through random masks or the best tickets, as the settings or the
    validation days say; where tickets were searched, `model_last.safetensors` through the last, sparsest ones;
    `seed_<n>/tickets/<task>/`, a mask and its validation metrics for each round, without a search for the full mask
    alone; `metrics.jsonl`; `results.json`, all figures of the report; `config.json`, the resolved settings; `data/`,
    the prepared log.

    Args:
        data: A folder with a schema file, or in KuaiRand's layout; None simulates a click log.
        out: The run folder.
        settings: What to do.
        progress: Called with a stage's name, steps done and steps in all.

    Returns:
        The path of `report.md`; it covers every seed that the folder was asked for so far.

    Raises:
        SettingsError: If `out` holds a run of other settings.
        DataError: If `out` holds a run of other data, or the data are not what their schema says.
        SchemaError: If the schema contradicts itself, or a name in it cannot be one here.
    """
    started = perf_counter()
    source = out / "simulated" if data is None else data
    name = "simulated" if data is None else data.resolve().name
    begun = check_settings(out, name, settings)
    settings = with_seeds_of(out, settings)
    if data is None:
        out.mkdir(parents=True, exist_ok=True)
        if not (source / "truth.json").exists():
            progress("simulate", 0, 1)
            simulate(SimulatorConfig(), source)
            progress("simulate", 1, 1)
    schema = open_source(source).schema
    tasks = tasks_of(schema, settings.tasks)
    _check_names(schema)
    # What was trained before is of the data as they were then.
    prepared = prepare(source, out / "data", schema, progress, replace=not begun)
    _check_classes(prepared, source, tasks)
    pin_settings(out, name, settings)
    log = MetricsLog(out / "metrics.jsonl")
    seeds = []
    first: SeedRun | None = None
    for seed in range(settings.seeds):
        seed_run = SeedRun(prepared, settings, seed, out / f"seed_{seed}", log, progress)
        first = first or seed_run
        seeds.append(seed_run.run())
    assert first is not None
    progress("freeze and measure", 0, 1)
    frozen = {arm: freeze_and_compare(first, arm, out / file) for arm, file in artefacts(first).items()}
    progress("freeze and measure", 1, 1)
    results: dict[str, Any] = {
        "data": _facts(prepared, source, tasks, simulated=data is None),
        "config": json.loads((out / "config.json").read_text(encoding="utf-8")),
        "seeds": seeds,
        "frozen": frozen,
        "seconds_this_run": perf_counter() - started,
    }
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    return write_report(results, out)


def artefacts(seed_run: SeedRun) -> dict[str, str]:
    """Return which arms are frozen to which files; the first is what is to be served."""
    if seed_run.settings.masks == "random":
        return {RANDOM_LAST: MODEL}
    served = SPARSE
    if seed_run.settings.masks == "best":
        served = seed_run.best_arm((RANDOM_LAST, SPARSE, SPARSE_LAST))
    return {served: MODEL} if served == SPARSE_LAST else {served: MODEL, SPARSE_LAST: MODEL_LAST}


class MetricsLog:
    """Appends records to a JSONL file; a record that a resumed run repeats is written once.

    Args:
        path: The file; made when the first record comes. A line cut short by a crash is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            write_whole(path, "".join(whole))
        self._seen = {_identity(json.loads(line)) for line in whole}

    def __call__(self, record: dict[str, Any]) -> None:
        """Append a record, unless one of the same seed, stage, split, task and epoch stands there."""
        if _identity(record) not in self._seen:
            self._seen.add(_identity(record))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _identity(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in ("seed", "stage", "split", "task", "epoch"))


def _check_names(schema: Schema) -> None:
    """Refuse names that a run has no place for, before hours of work."""
    for task in schema.tasks:
        # A task names a folder of tickets and a part of the models, where "keys" or "train" is a method.
        if not re.fullmatch(r"[\w-]+", task.name) or hasattr(nn.ModuleDict(), task.name):
            raise SchemaError(f"task {task.name!r}: got a name that is taken or no word, wanted letters, digits, _, -")
    if any(part.name == "all" for part in schema.slices):
        raise SchemaError("slice 'all': got the name that a report has for all rows, wanted another")


def _check_classes(prepared: Prepared, source: Path, tasks: Sequence[Task]) -> None:
    """Refuse a split in which a binary task has labels of one class only: nothing can be ranked or judged there."""
    for split in SPLITS:
        for task in tasks:
            mean = prepared.counts[split]["tasks"][task.name]["label_mean"]
            if task.kind == "binary" and mean in (0, 1):
                raise DataError(f"{source}: split {split!r}: got only labels {mean:.0f} of {task.name}, wanted 0 and 1")


def _facts(prepared: Prepared, source: Path, tasks: Sequence[Task], simulated: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": "simulated click log" if simulated else source.resolve().name,
        "counts": prepared.counts,
        "tasks": {task.name: task.kind for task in tasks},
        "fields": [field.column for field in prepared.encoder.fields],
    }
    if simulated:
        facts["truth"] = json.loads((source / "truth.json").read_text(encoding="utf-8"))
    return facts
