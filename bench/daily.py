"""Daily training on a log: a model of the first days left alone, trained on day by day, and trained anew each day.

All have the same masks, random blocks of 16 x 4 that keep a tenth, and the default network. On each day the three are
judged by rows that none of them was trained on: the one left alone knows the first days, the others all days before.
Seconds are of one day's work; those of training count all cores together, as the machine may do other work meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from bench import record
from lt4rec_sparse.ranker import Ranker, load, save
from lt4rec_sparse.ranker.features import Split
from lt4rec_sparse.recsys.daily import UpdateSettings, trainable, update
from lt4rec_sparse.recsys.data import open_source, prepare
from lt4rec_sparse.recsys.data.later import open_later, prepare_later
from lt4rec_sparse.recsys.frozen import calibrated
from lt4rec_sparse.recsys.harness.by_rows import by_rows
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.starts import Starts
from lt4rec_sparse.recsys.harness.statistics import paired_difference
from lt4rec_sparse.recsys.harness.trials import Masks, Search, Training, Trial
from lt4rec_sparse.recsys.tables import table

TASKS = {"ctr": ("auc", "log_loss"), "cvr": ("mse",)}
FIRST = 6  # days that the first model is trained on
SEEDS = (0, 1, 2)
MODELS = ("alone", "updated", "anew")


def run(data: Path) -> Path:
    """Measure KuaiRand's days and write `results/daily.json`."""
    return record.write("daily", {"machine": record.machine(), **measured(data, FIRST, SEEDS)})


def short(data: Path) -> dict[str, Any]:
    """Measure one day of small networks, on any log with tasks ctr and cvr."""
    return measured(data, 2, (0,), Training(hidden=(16, 8), embedding_dim=4), days=2)


def measured(
    data: Path, first: int, seeds: Sequence[int], training: Training | None = None, days: int = 1 << 10
) -> dict[str, Any]:
    """Return each day's metrics and seconds of the three models, per seed, for at most so many days after the first."""
    with TemporaryDirectory() as folder:
        all_days = _days_of(data, Path(folder))
        runs = {str(seed): list(_days(data, Path(folder), all_days, first, days, seed, training)) for seed in seeds}
    return {"days": list(all_days), "first": first, "threads": torch.get_num_threads(), "seeds": runs}


def _days_of(data: Path, scratch: Path) -> tuple[str, ...]:
    counts = prepare(data, scratch / "all").counts
    return tuple(day for split in ("train", "validation", "test") for day in counts[split]["days"])


def _days(
    data: Path, folder: Path, all_days: Sequence[str], first: int, most: int, seed: int, training: Training | None
) -> Iterator[dict[str, Any]]:
    """Yield a record per day after the first; the log's last day is never judged: splits want one more."""
    models, updates = dict[str, Path](), dict[str, Any]()
    for i in range(first, min(first + most, len(all_days) - 1)):
        day = all_days[i]
        anew, seconds = _anew(data, folder / f"anew_{day}", all_days, i, seed, training)
        models.setdefault("alone", folder / f"anew_{day}" / f"seed_{seed}.safetensors")
        if i > first:
            settings = UpdateSettings(all_days[i - 1], day, seed=seed)
            out = folder / f"updated_{day}_{seed}"
            done = update(models.get("updated", models["alone"]), data, out, settings)
            models["updated"] = done.model
            updates = json.loads((out / "results.json").read_text(encoding="utf-8"))
            metrics = {"alone": _alone(models["alone"], data, folder / f"alone_{day}", all_days[i - 1], day)}
            metrics |= {"updated": updates["after"], "anew": anew}
            yield {
                "day": day,
                "rows": updates["rows"],
                "grown": sum(rows["after"] - rows["before"] for rows in updates["grown"].values()),
                "metrics": {name: _chosen(of) for name, of in metrics.items()},
                "seconds": {"updated": updates["seconds"], "anew": seconds},
            }


def _anew(
    data: Path, folder: Path, all_days: Sequence[str], i: int, seed: int, training: Training | None
) -> tuple[Any, dict[str, float]]:
    """Train on all days before the i-th, leave the artefact, and return its metrics on that day and the seconds.

    Seeds share the prepared log: the first one's seconds have its preparation.
    """
    started = perf_counter()
    split = Split(train=tuple(all_days[:i]), validation=(all_days[i],), test=(all_days[i + 1],))
    prepared = prepare(data, folder / "data", replace(open_source(data).schema, split=split))
    sizes = by_rows(prepared.counts["train"]["rows"], epochs=1)
    given = training or Training(base_rates=True, sparse_steps=True)
    given = replace(given, batch_size=sizes.batch_size, epochs=1)
    masks = Masks("random", Search(given, granularity="16x4", density=0.1), rescale=True)
    trial = Trial("sparse_sharing", tuple(TASKS), seed, given, masks, is_tested=False)
    lab = Laboratory(prepared, folder)
    found = lab.run(trial)
    model: Any = lab.model(trial)
    save(Ranker(prepared.encoder, model.inputs, calibrated(model, prepared)), folder / f"seed_{seed}.safetensors")
    return found["validation"]["all"], {"train": found["seconds"]["train"], "all": perf_counter() - started}


def _alone(model: Path, data: Path, folder: Path, before: str, day: str) -> Any:
    """Return the metrics of an artefact on a day, its vocabularies as they are."""
    ranker = load(model)
    source = open_later(data, ranker.encoder.schema)
    prepared = prepare_later(source, folder / "data", ranker.encoder, ranker.tasks, before, day)
    judged = trainable(ranker, prepared.encoder, None)
    return Starts(prepared, folder).judge(folder / "alone", judged, "validation", ranker.tasks)["all"]


def _chosen(metrics: Any) -> dict[str, dict[str, float]]:
    return {task: {metric: metrics[task][metric] for metric in of_task} for task, of_task in TASKS.items()}


def daily_table(found: dict[str, Any]) -> str:
    """Return the means over the seeds of each day's main metrics and seconds of training, and differences of means."""
    runs: list[list[dict[str, Any]]] = list(found["seeds"].values())
    mains = {task: metrics[0] for task, metrics in TASKS.items()}
    columns = [("metrics", name, task, main) for task, main in mains.items() for name in MODELS]
    columns += [("seconds", name, "train") for name in MODELS[1:]]
    header = [f"{task} {main.upper()}, {name}" for task, main in mains.items() for name in MODELS]
    header += [f"seconds, {name}" for name in MODELS[1:]]
    lines = []
    for day, of_day in zip([first["day"] for first in runs[0]], zip(*runs, strict=True), strict=True):
        lines.append([day, *(_cell(keys, [_at(of_seed, keys) for of_seed in of_day]) for keys in columns)])
    every = [of_day for of_seed in runs for of_day in of_seed]
    lines.append(["mean", *(_cell(keys, [_at(of_day, keys) for of_day in every]) for keys in columns)])
    differences = []
    for task, main in mains.items():
        means = {
            name: {
                seed: fmean(_at(of_day, ("metrics", name, task, main)) for of_day in of_seed)
                for seed, of_seed in enumerate(runs)
            }
            for name in MODELS
        }
        for base in ("alone", "anew"):
            apart = paired_difference(means["updated"], means[base], relative=main == "mse")
            differences.append(f"{task} {main.upper()}, updated against {base}: {apart}")
    return f"{table(['day', *header], lines)}\n\n{'; '.join(differences)}."


def _at(of_day: dict[str, Any], keys: Sequence[str]) -> float:
    value: Any = of_day
    for key in keys:
        value = value[key]
    return float(value)


def _cell(keys: Sequence[str], values: Sequence[float]) -> str:
    return f"{fmean(values):.{1 if keys[0] == 'seconds' else 4}f}"
