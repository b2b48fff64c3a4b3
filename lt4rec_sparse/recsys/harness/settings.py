"""The settings of a run: everything that a result depends on besides the data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import write_whole
from lt4rec_sparse.lottery.pruning import check_granularity
from lt4rec_sparse.ranker.features import Schema, Task

CONFIG = "config.json"
MASKS = ("best", "random", "tickets")
_BEFORE_IT_WAS_A_SETTING = {
    "granularity": "weight",
    "tasks": [],
    "masks": "tickets",
}  # what runs did whose config.json does not name it


class SettingsError(InputError):
    """A setting outside its range, or a run folder that was made with others."""


@dataclass(frozen=True)
class RunSettings:
    """What a run does; the defaults follow the paper and its published code where they fit a public log.

    One epoch, as in the paper: on KuaiRand the validation metrics are best after one. The simulated log is smaller and
    has no ids worth remembering; there two epochs of smaller batches are not yet too many (`SIMULATED`).

    Attributes:
        seeds: How many seeds, from 0 on; each is a whole search and training.
        embedding_dim: Width of an embedding.
        hidden: Widths of the MLP's hidden layers.
        learning_rate: Of Adam.
        epochs: Epochs of every training: a round of the search, a baseline, the joint training.
        batch_size: Impressions a batch.
        masks: Where the tasks' masks come from: "random", without a search; "tickets", the paper's; or "best", both, of
            which the validation days choose.
        rounds: Rounds of pruning a task, for tickets.
        density: Share of the hidden weights that a random mask keeps, or the last ticket.
        granularity: What pruning takes as one: a weight, a block or a neuron (`lottery.GRANULARITIES`).
        tasks: Which of the schema's tasks, in that order; none named are all but the extra ones.
    """

    seeds: int = 1
    embedding_dim: int = 16
    hidden: tuple[int, ...] = (512, 256, 128)
    learning_rate: float = 1e-3
    epochs: int = 1
    batch_size: int = 1024
    masks: str = "best"
    rounds: int = 4
    density: float = 0.2
    granularity: str = "weight"
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("seeds", "embedding_dim", "epochs", "batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if self.masks not in MASKS:
            raise SettingsError(f"masks: got {self.masks!r}, wanted one of {', '.join(MASKS)}")
        if not self.hidden or min(self.hidden) < 1:
            raise SettingsError(f"hidden: got {self.hidden}, wanted at least one width, each at least 1")
        if not 0 < self.density < 1:
            raise SettingsError(f"density: got {self.density}, wanted more than 0 and less than 1")
        if not self.learning_rate > 0:
            raise SettingsError(f"learning_rate: got {self.learning_rate}, wanted more than 0")
        try:
            check_granularity(self.granularity)
        except ValueError as error:
            raise SettingsError(str(error)) from error


def tasks_of(schema: Schema, named: tuple[str, ...]) -> tuple[Task, ...]:
    """Return the tasks that are named, or all of a schema but its extra ones.

    Raises:
        SettingsError: If the schema has no such task, or one is named twice.
    """
    if not named:
        return tuple(task for task in schema.tasks if not task.extra)
    by_name = {task.name: task for task in schema.tasks}
    if len(set(named)) != len(named) or not by_name.keys() >= set(named):
        raise SettingsError(f"tasks: got {', '.join(named)}, wanted some of {', '.join(by_name)}, each once")
    return tuple(by_name[name] for name in named)


SIMULATED = RunSettings(epochs=2, batch_size=256)


def check_settings(folder: Path, data: str, settings: RunSettings) -> bool:
    """Return whether a run was begun in the folder, and check that it was one of the same data and settings.

    More seeds than before are welcome: the run adds them.

    Raises:
        SettingsError: If it was a run of other data or settings (the first difference is named), or no run.
    """
    path = folder / CONFIG
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"{folder}: got a file, wanted a folder for the run")
    if not path.exists():
        return False
    try:
        got: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        got = None
    if not isinstance(got, dict):
        raise SettingsError(f"{path}: got no settings of a run, wanted those of an earlier one; choose another --out")
    got = _BEFORE_IT_WAS_A_SETTING | got
    for key, value in _config(data, settings).items():
        if key != "seeds" and got.get(key) != value:
            raise SettingsError(f"{path}: got {key} = {got.get(key)}, wanted {value}; choose another --out")
    return True


def with_seeds_of(folder: Path, settings: RunSettings) -> RunSettings:
    """Return the settings with as many seeds as an earlier run in the folder had: asking for fewer drops none."""
    path = folder / CONFIG
    if not path.exists():
        return settings
    return replace(settings, seeds=max(settings.seeds, json.loads(path.read_text(encoding="utf-8"))["seeds"]))


def pin_settings(folder: Path, data: str, settings: RunSettings) -> None:
    """Write `config.json`: from here on the folder is a run of these data and settings."""
    write_whole(folder / CONFIG, json.dumps(_config(data, settings), indent=1) + "\n")


def _config(data: str, settings: RunSettings) -> dict[str, Any]:
    config: dict[str, Any] = {"data": data, **json.loads(json.dumps(asdict(settings)))}
    return config
