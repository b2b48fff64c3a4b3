"""An experiment from a log to its tables: prepare, tune every row alike, train all seeds side by side, write."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import write_whole
from lt4rec_sparse.paper import declared, pages
from lt4rec_sparse.paper.declared import Variants
from lt4rec_sparse.paper.frontier import frontier
from lt4rec_sparse.recsys.data import open_source, prepare
from lt4rec_sparse.recsys.data.remote import COPY, local_data
from lt4rec_sparse.recsys.harness.baselines import baselines
from lt4rec_sparse.recsys.harness.by_rows import few_steps
from lt4rec_sparse.recsys.harness.jobs import DATA, check_executor, has_trained, laboratory
from lt4rec_sparse.recsys.harness.rows import RANDOM, S_WEIGHT, Row, Rows
from lt4rec_sparse.recsys.harness.settings import locked
from lt4rec_sparse.recsys.harness.study import Progress, Resources, carrier, carry_out
from lt4rec_sparse.recsys.harness.trackers import tracking
from lt4rec_sparse.recsys.harness.trials import Training, check_counts, check_top_k
from lt4rec_sparse.recsys.report import worded, write_page


@dataclass(frozen=True)
class Experiment:
    """The parts of an experiment: what makes its rows, and what writes its page from their records.

    It trains every task of the log only if `all_tasks`; `carried` are columns that the part of its page `named` reads
    in addition to the features, user by user, `kinds` those of its tasks, in order, if that part needs certain kinds.
    """

    rows: Callable[[Rows], list[Row]]
    write: Callable[[pages.Findings], str]
    all_tasks: bool = False
    carried: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    named: str = ""

    def obstacle(self, kinds: Mapping[str, str], carried: Collection[str], grouped: bool = True) -> dict[str, str]:
        """Return which part of the page this log cannot have, and why; nothing if it can have all."""
        missing = [column for column in self.carried if column not in carried]
        if missing:
            return {
                self.named: f"got a log that does not carry {', '.join(missing)}, wanted it in the schema's carried"
            }
        if self.carried and not grouped:
            return {self.named: "got a log without [group], wanted the user of each row: a request is one user's"}
        if self.kinds and tuple(kinds.values()) != self.kinds:
            got = f"tasks of the kinds {', '.join(kinds.values())}"
            return {self.named: f"got {got}, wanted {', '.join(self.kinds)}"}
        return {}


CHEAP = ("rounds_last", "one_shot_last", "gradual_last", "drop_and_grow_last", RANDOM)
EXPERIMENTS = {
    "table2": Experiment(
        declared.table2,
        partial(pages.page, title="Table 2: models and variants", shown=(S_WEIGHT, "s_neuron", RANDOM)),
    ),
    "table3": Experiment(
        declared.table3,
        pages.table3,
        carried=("play_time_ms", "duration_ms", "time_ms"),
        kinds=("binary", "ratio"),
        named=pages.REPLAY,
    ),
    "figure4": Experiment(declared.figure4, pages.figure4),
    "granularity": Experiment(declared.granularity, pages.granularity),
    "frontier": Experiment(declared.frontier, frontier),
    "cheap": Experiment(
        declared.cheap, partial(pages.page, title="Cheap tickets: one training instead of rounds", shown=CHEAP)
    ),
    "tickets": Experiment(declared.tickets, pages.tickets),
    "tasks": Experiment(
        declared.many_tasks,
        partial(pages.page, title="All tasks of the log together", shown=(S_WEIGHT, RANDOM)),
        all_tasks=True,
    ),
}


def run_experiment(
    name: str,
    data: Path | str,
    out: Path,
    seeds: int,
    training: Training | None = None,
    resources: Resources | None = None,
    progress: Progress = lambda stage, done, total: None,
    variants: Variants | None = None,
    top_k: int = 0,
    warn: Callable[[str], None] = lambda warning: None,
) -> Path:
    """Carry out an experiment, or the part of it that is not done yet; return the path of its `report.md`.

    All experiments on one log share the folder `out`: a model that two of them need is trained once. It then holds
    `data/`, the prepared log; `singles/`, `searches/` and `trials/`, one JSON per trained model; `metrics.jsonl`;
    `tuning.json`, every learning rate that was tried; and one folder per experiment with `report.md`, `report.html`,
    `plots/` and `records.json`, everything that the report says.

    Rows that the log cannot train, and a part of a page for which it lacks columns, users or tasks, are left out with
    the reason. Every row trains for the same epochs, on the same batches in the same order; the learning rates of all
    are searched alike (`tuned_rates`). Each trial reads the test days once, when it is trained.

    Args:
        name: One of `EXPERIMENTS`.
        data: A folder with a schema file, or in KuaiRand's layout, or the URL of one, of which `out` gets a copy.
        out: The folder for all results.
        seeds: How many seeds, from 0 on.
        training: How every row trains, except for its learning rates.
        resources: The processes that train, and what tracks them.
        progress: Called with a stage's name, steps done and steps in all.
        variants: Settings of the paper's variants.
        top_k: See `Trial`.
        warn: Called with each warning, before anything is trained.

    Raises:
        InputError: If there is no such experiment or no seed, a loss names an unknown task, or another process works in
            `out`; or as `check_executor`.
        DataError: If the data do not match their schema, or `out` holds trials on other data.
    """
    if name not in EXPERIMENTS:
        raise InputError(f"experiment: got {name!r}, wanted one of {', '.join(EXPERIMENTS)}")
    check_counts(seeds=seeds)
    check_top_k(top_k)
    resources = resources or Resources()
    check_executor(resources.workers, resources.executor)
    experiment = EXPERIMENTS[name]
    with locked(out):
        data = local_data(data, out / COPY, progress=progress)
        training, schema = training or Training(), open_source(data).schema
        kinds = {task.name: task.kind for task in schema.tasks if experiment.all_tasks or not task.extra}
        part = experiment.obstacle(kinds, schema.carried, schema.group is not None)
        unknown = dict(training.losses).keys() - {task.name for task in schema.tasks}
        if unknown:
            raise InputError(f"losses: got one of {', '.join(unknown)}, wanted them of the log's tasks")
        # Earlier trials were trained on the data as they were then.
        prepared = prepare(data, out / DATA, schema, progress, replace=not has_trained(out))
        few = few_steps(laboratory(out).batches(training) * training.epochs)
        if few:
            warn(f"few steps: {few}")
        table2 = partial(declared.table2, variants=variants or Variants())
        study = carry_out(
            table2 if name == "table2" else experiment.rows,
            Rows(tuple(kinds), training, top_k=top_k),
            seeds,
            schema,
            out,
            carrier(out, resources, progress, name),
            others=table2,
        )
        progress(f"{name}: baselines", 0, 1)
        beside = baselines(laboratory(out), tuple(kinds), seeds, top_k)
        progress(f"{name}: baselines", 1, 1)
        (out / name / "plots").mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {
            "experiment": name,
            "data": schema.name,
            "counts": prepared.counts,
            "tasks": kinds,
            "rows": study.rows,
            "left_out": part | study.left_out | beside.left_out,
            "baselines": asdict(beside),
            "seeds": seeds,
            "training": asdict(training),
            "learning_rates": study.rates,
            "few_steps": few,
        }
        progress(f"{name}: write", 0, 1)
        findings = pages.Findings(facts, study, out)
        text = experiment.write(findings)
        results = {**facts, "further": findings.further, "records": study.records}
        write_whole(out / name / "records.json", json.dumps(results, indent=1) + "\n")
        progress(f"{name}: write", 1, 1)
        report = write_page(worded(text, prepared.counts), f"{name}: {schema.name}", out / name)
        files = [report, out / name / "report.html", out / name / "records.json"]
        tracking(out, resources.tracker).whole(facts["training"], seeds, study.records, files, name)
        return report
