"""What to do after a run, as commands to paste where the run's own command was given."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import NamedTuple

from lt4rec_sparse.recsys.harness.by_rows import PATIENCE, STEPS, few_steps
from lt4rec_sparse.recsys.harness.statistics import is_clear
from lt4rec_sparse.recsys.report.results import OPPONENTS, Run, path_of
from lt4rec_sparse.recsys.tables import count

AT = 256  # candidates of the request by whose time a precision is advised
MOST_SEEDS = 5  # that are advised


class Step(NamedTuple):
    """A step, and its command; empty if it has none."""

    text: str
    command: str = ""


def steps(run: Run, folder: Path) -> list[Step]:
    """Return what the results of the run in a folder suggest."""
    data = _data(run, folder)
    config, model = run.config, folder / "model.safetensors"
    hidden = ",".join(map(str, config["hidden"]))
    tickets = (
        f"lt4rec-sparse experiment tickets --data {shlex.quote(data)} --hidden {hidden} --embedding-dim "
        f"{config['embedding_dim']} --batch-size {config['batch_size']} --epochs {config['epochs']}"
    )
    scores = shlex.join(["lt4rec-sparse", "score", str(model), str(folder / "scores.csv"), "--data", data])
    return [
        *_more(run, folder),
        Step("Which property of a mask matters on this log:", tickets),
        _serve(run, model),
        Step("Score the test days. For other requests, `lt4rec-sparse candidates` makes what `score` reads.", scores),
    ]


def _more(run: Run, folder: Path) -> Iterator[Step]:
    """Yield what may make the results better or surer: further trainings."""
    steps, epochs, rates = run.results["steps"], run.config["epochs"], run.config["learning_rates"]
    if few_steps(steps):
        longer = ceil(STEPS * epochs / steps)
        text = f"Train longer: {count(longer, 'epoch')} make {STEPS} steps or more, and end where they gain nothing."
        yield Step(text, _again(run, epochs=longer, patience=PATIENCE, out=f"{folder}-longer"))
    known = [row for row in OPPONENTS if row in run.titles]
    unclear = any(not is_clear(run.difference(row, task)) for row in known for task in run.tasks)
    if run.seeds < MOST_SEEDS and unclear:
        seeds = 3 if run.seeds < 3 else MOST_SEEDS
        text = f"Train up to {seeds} seeds in the same folder, to tell differences from the noise of one start."
        yield Step(text, _again(run, seeds=seeds))
    if len(rates) == 1:
        tried = ",".join(f"{factor * rates[0]:g}" for factor in (0.5, 1, 2))
        text = "Search learning rates, which this run did not: the validation days choose one per model and task."
        yield Step(text, _again(run, learning_rate=tried, out=f"{folder}-rates"))


def _data(run: Run, folder: Path) -> str:
    """Return the folder of the log, as the run's own command named it."""
    given = _given(run)
    options = [f"--data={value}" for name, value in pairwise(given) if name == "--data"] + given
    named = [option.partition("=")[2] for option in options if option.startswith("--data=")]
    return named[0] if named else str(folder / "simulated") if given else "FOLDER"


def _given(run: Run) -> list[str]:
    """Return the run's own command; nothing for a run that was not made by one."""
    given = shlex.split(run.results["command"])
    return given if given[:2] == ["lt4rec-sparse", "run"] else []


def _again(run: Run, **options: object) -> str:
    """Return the run's own command with other options; empty for a run that was not made by one."""
    names, kept, arguments = {"--" + name.replace("_", "-") for name in options}, [], iter(_given(run))
    for argument in arguments:
        if argument in names:
            next(arguments, None)  # its value
        elif argument.partition("=")[0] not in names:
            kept.append(argument)
    added = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]
    return shlex.join([*kept, *added]) if kept else ""


def _serve(run: Run, model: Path) -> Step:
    timed = run.timings(run.served)
    size = max(size for size in timed if size <= AT)
    precisions = run.frozen[run.served]["precisions"]
    mine = {p: timed[size][path_of(p)] for p, found in precisions.items() if p == "fp32" or found["accepted"]}
    best = min(mine, key=lambda precision: mine[precision]["median_us"])
    dense = timed[size]["dense, MLP alone"]
    ratio = dense["median_us"] / mine[best]["median_us"]
    if mine[best]["p80_us"] < dense["p20_us"]:
        than = f"the MLPs {ratio:.1f}x as fast as dense fp32 torch"
    elif dense["p80_us"] < mine[best]["p20_us"]:
        than = f"the MLPs {ratio:.1f}x as fast as dense fp32 torch. **Dense torch is faster here**: let `lt4rec-sparse "
        than += "plan` choose the kernels"
    else:
        than = f"the MLPs as fast as dense fp32 torch, as far as these timings can tell ({ratio:.1f}x)"
    text = f"Serve in {best}: of the accepted precisions it is the fastest here at {count(size, 'candidate')}, {than}."
    return Step(text, shlex.join(["lt4rec-sparse", "serve", str(model), "--precision", best]))
