"""The settings of a run: everything that a result depends on besides the data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.files import read_json, sweep, write_whole
from lt4rec_sparse.ranker.features import Schema, Task
from lt4rec_sparse.ranker.rows import EMBEDDINGS
from lt4rec_sparse.recsys.harness.by_rows import Sizes, by_rows
from lt4rec_sparse.recsys.harness.trials import LATER, Search, Training, as_before, check_counts, check_top_k
from lt4rec_sparse.recsys.training.distributed import is_apart

CONFIG, LOCK = "config.json", ".lock"
LAYOUT = 2  # of a run folder; folders of layout 1 have no such entry in their config.json
MASKS = ("best", "random", "tickets")
EARLIER = {**LATER, "patience": 0}  # settings that older runs do not name, as they were


@dataclass(frozen=True)
class RunSettings:
    """What a run does; the defaults follow the paper and its published code where they fit a public log.

    One epoch of batches of 1,024 where there are enough rows (`by_rows`), as in the paper: on KuaiRand the validation
    metrics are best after one. Blocks at a tenth of the weights,
    unlike the paper: they rank as well as single weights at a fifth in less than half of the time (docs/experiments.md,
    "Sparse against small and dense"). What is not described here is described at `Training` and `Search`.

    Attributes:
        seeds: How many seeds, from 0 on; each is a whole search and training.
        learning_rates: Adam's. A single one is used for every task of every model; of several, each model takes the
            best on the validation days, per task (`study.tuned_rates`).
        epochs, batch_size, patience: None leaves them to the rows of the training days.
        masks: Where the tasks' masks come from: "random", without a search; "tickets", the paper's; or "best", both, of
            which the validation days choose.
        density: Share of the hidden weights that a random mask keeps, or the last ticket.
        tasks: Names of the schema's tasks to train, in this order; empty for all but the extra ones.
        top_k: See `Trial`.
        embeddings: How the artefact holds embeddings: "fp32", "fp16" or "int8" (`ranker.save`).
    """

    seeds: int = 1
    embedding_dim: int = 16
    hidden: tuple[int, ...] = (512, 256, 128)
    learning_rates: tuple[float, ...] = (1e-3,)
    epochs: int | None = None
    batch_size: int | None = None
    masks: str = "best"
    rounds: int = 4
    density: float = 0.1
    granularity: str = "16x4"
    tasks: tuple[str, ...] = ()
    dtype: str = "float32"
    sparse_gradients: bool = False
    embeddings: str = "fp32"
    base_rates: bool = True
    sparse_steps: bool = True
    patience: int | None = None
    schedule: str = "constant"
    warm_up_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    ema: float = 0.0
    top_k: int = 10

    def __post_init__(self) -> None:
        check_counts(seeds=self.seeds)
        check_top_k(self.top_k)
        if self.embeddings not in EMBEDDINGS:
            raise InputError(f"embeddings: got {self.embeddings!r}, wanted one of {', '.join(EMBEDDINGS)}")
        if self.masks not in MASKS:
            raise InputError(f"masks: got {self.masks!r}, wanted one of {', '.join(MASKS)}")
        if not self.learning_rates:
            raise InputError("learning_rates: got none, wanted at least one")
        for rate in self.learning_rates:  # what both have is checked there
            training = replace(self.training, learning_rate=rate)
            Search(training, granularity=self.granularity, rounds=self.rounds, density=self.density)

    @property
    def training(self) -> Training:
        """How every model trains, but for widths and learning rates."""
        shared = {field.name: getattr(self, field.name, None) for field in fields(Training)}
        known = {name: value for name, value in shared.items() if value is not None}
        return Training(learning_rate=self.learning_rates[0], **known)

    def of_rows(self, rows: int) -> RunSettings:
        """Return the settings of a log with so many training rows, in which nothing is left open (`by_rows`)."""
        found: dict[str, Any] = by_rows(rows, self.batch_size, self.epochs, self.patience)._asdict()
        return replace(self, **found)


# For the simulated log, which is small: a result in a minute on two cores.
SIMULATED = RunSettings(
    embedding_dim=8, hidden=(256, 128, 64), learning_rates=(4e-3,), epochs=2, batch_size=256, rounds=2
)


def tasks_of(schema: Schema, named: tuple[str, ...]) -> tuple[Task, ...]:
    """Return the tasks that are named, or all of a schema but its extra ones."""
    if not named:
        return tuple(task for task in schema.tasks if not task.extra)
    by_name = {task.name: task for task in schema.tasks}
    if len(set(named)) != len(named) or not by_name.keys() >= set(named):
        raise InputError(f"tasks: got {', '.join(named)}, wanted some of {', '.join(by_name)}, each once")
    return tuple(by_name[name] for name in named)


def check_settings(folder: Path, data: str, settings: RunSettings) -> RunSettings | None:
    """Return the settings with which a run that was begun in the folder goes on; None if there is none.

    They are those that were asked for, with at least as many seeds as before: none are dropped. What was left open is
    as the run began. Other data or settings, of which the first difference is named, another version, or no run, are
    an InputError.
    """
    path = folder / CONFIG
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: got a file, wanted a folder for the run")
    if not path.exists():
        return None
    try:
        got = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; choose another --out") from error
    if got.get("layout") != LAYOUT:
        raise InputError(f"{folder}: got a run of another version, wanted one of this; choose another --out")
    got, wanted = {**EARLIER, **got}, {**EARLIER, **_config(data, settings)}
    for key, value in wanted.items():
        if key != "seeds" and not (key in Sizes._fields and value is None) and got.get(key) != value:
            raise InputError(f"{path}: got {key} = {got.get(key)}, wanted {value}; choose another --out")
    counts = {
        name: _count(path, got, name) for name in ("seeds", *(n for n in Sizes._fields if got.get(n) is not None))
    }
    found: dict[str, Any] = {**counts, "seeds": max(settings.seeds, counts["seeds"])}
    return replace(settings, **found)


def _count(path: Path, config: Mapping[str, Any], name: str) -> int:
    count = config.get(name)
    if type(count) is not int:
        raise InputError(f"{path}: got {name} = {shown(count)}, wanted a count; choose another --out")
    return count


def pin_settings(folder: Path, data: str, settings: RunSettings) -> dict[str, Any]:
    """Write `config.json` and return its content; from then on the folder is a run of these data and settings."""
    config = _config(data, settings)
    write_whole(folder / CONFIG, json.dumps(config, indent=1) + "\n")
    return config


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder meanwhile; a process that dies releases it, and what it left is removed.

    If nothing came into the folder, it is left as it was: without the lock's file, or gone with parents made for it.
    """
    import fcntl  # POSIX only, like training

    refused = f"{folder}: another process works in this folder, wanted to wait for it, or another --out"
    if is_apart():
        refused += "; processes of torchrun share one by lt4rec_sparse.recsys.training.led"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    before, path = set(folder.iterdir()), folder / LOCK
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_same = os.fstat(file.fileno()).st_ino == path.stat().st_ino  # not one that its holder has removed since
        except OSError as error:
            raise InputError(refused) from error
        if not is_same:
            raise InputError(refused)
        try:
            sweep(folder)
            yield
        finally:
            if set(folder.iterdir()) - before == {path}:
                path.unlink()
                for parent in made:
                    with suppress(OSError):  # somebody else's files came into it
                        parent.rmdir()


def _config(data: str, settings: RunSettings) -> dict[str, Any]:
    config: dict[str, Any] = {"layout": LAYOUT, "data": data, **json.loads(json.dumps(as_before(asdict(settings))))}
    return config
