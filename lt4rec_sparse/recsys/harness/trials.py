"""What is trained, declared as plain data: a trial, the search that its masks come from, and how both train."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.lottery import GRANULARITIES
from lt4rec_sparse.recsys.models import CROSSES, LOSSES, Conflict
from lt4rec_sparse.recsys.models.build import MODELS
from lt4rec_sparse.recsys.training import SCHEDULES

METHODS = ("rounds", "one_shot", "gradual", "drop_and_grow")
SEARCHED = ("tickets", "random_like", "one_for_all")  # kinds of masks for which tickets must be found first
SCORED = ("separate", "unanimous")  # those that read the magnitudes of the single-task baselines
KINDS_OF_MASKS = (*SEARCHED, *SCORED, "random", "one_random", "random_separate")
OBJECTIVES = ("alternating", "joint", "uncertainty", "pcgrad")
DTYPES = ("float32", "bfloat16")
LATER: dict[str, Any] = {
    "sparse_gradients": False,
    "embeddings": "fp32",
    "base_rates": False,
    "schedule": "constant",
    "warm_up_steps": 0,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "ema": 0.0,
    "top_k": 0,
}  # settings that came later, as all were before


def digest(settings: Mapping[str, Any]) -> str:
    """Return twelve hexadecimal digits that tell these settings from others."""
    return hashlib.blake2b(json.dumps(as_before(settings), sort_keys=True).encode(), digest_size=6).hexdigest()


def as_before(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out later settings, nested ones too, that are as before: older folders are found again by the rest."""
    return {
        name: as_before(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in LATER or value != LATER[name]
    }


def _check(value: str, known: tuple[str, ...], name: str) -> None:
    if value not in known:
        raise InputError(f"{name}: got {value!r}, wanted one of {', '.join(known)}")


def check_counts(**counts: int) -> None:
    """Check that named numbers are at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name}: got {count}, wanted at least 1")


def check_top_k(top_k: int) -> None:
    """Check the number of rows that a model is judged by at the top."""
    if top_k < 0:
        raise InputError(f"top_k: got {top_k}, wanted 0 or more")


@dataclass(frozen=True)
class Training:
    """The network and how it is trained; a search and the trials that use its masks may share one.

    Attributes:
        hidden: Widths of the MLP's hidden layers.
        embedding_dim: Width of an embedding.
        exclusive_dim: Width of each task's own additional embedding (multiview); 0 for none.
        cross: "dlrm", "wide_deep" or "deepfm".
        learning_rate: Adam's, for every task that `rates` does not name.
        rates: Task -> learning rate of that task's steps (`TaskAdam`).
        epochs: Epochs of every training, or the most.
        patience: A training ends after so many epochs in a row that were no better on the validation days, with the
            weights of its best one (`EarlyStopping`); 0 for all epochs. Warm-ups, and searches that prune while they
            train, take all.
        batch_size: Impressions per batch.
        warm_up: Epochs of dense training of all tasks before anything else; searches and trials start from there.
        losses: Task -> name of its loss, where it is not the default of the task's kind.
        dtype: The dtype that matrix products compute in while training, "float32" or "bfloat16"; sums and weights are
            float32, and models are judged in float32.
        sparse_gradients: Whether a step moves only the embeddings that its batch looks up (the lazy step of
            `MaskedAdam`): its time then does not grow with the tables.
        base_rates: Whether every task's scores start at the task's mean label on the training days (`base_rates`),
            not at one half.
        schedule: How learning rates fall over all epochs, one of `SCHEDULES`; see `Schedule`.
        warm_up_steps: Batches in which they rise first.
        weight_decay: Decoupled decay of the weights of linear layers (`TaskAdam`); 0 for none.
        clip_norm: The largest norm of a step's gradients (`TaskAdam`); 0 for any.
        ema: Decay of the moving average of weights that is judged and served (`averaged_model`); 0 for the weights
            themselves. Warm-ups, and searches that prune while they train, have none.
    """

    hidden: tuple[int, ...] = (512, 256, 128)
    embedding_dim: int = 16
    exclusive_dim: int = 0
    cross: str = "dlrm"
    learning_rate: float = 1e-3
    rates: tuple[tuple[str, float], ...] = ()
    epochs: int = 1
    patience: int = 0
    batch_size: int = 1024
    warm_up: float = 0.0
    losses: tuple[tuple[str, str], ...] = ()
    dtype: str = "float32"
    sparse_gradients: bool = False
    base_rates: bool = False
    schedule: str = "constant"
    warm_up_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        _check(self.dtype, DTYPES, "dtype")
        _check(self.schedule, SCHEDULES, "schedule")
        _check(self.cross, CROSSES, "cross")
        for _, loss in self.losses:
            _check(loss, tuple(LOSSES), "loss")
        check_counts(embedding_dim=self.embedding_dim, epochs=self.epochs, batch_size=self.batch_size)
        if self.patience < 0:
            raise InputError(f"patience: got {self.patience}, wanted 0 or more epochs")
        if not self.hidden or min(self.hidden) < 1:
            raise InputError(f"hidden: got {self.hidden}, wanted at least one width, each at least 1")
        for rate in (self.learning_rate, *(rate for _, rate in self.rates)):
            if not rate > 0:
                raise InputError(f"learning_rate: got {rate}, wanted more than 0")
        if self.warm_up_steps < 0:
            raise InputError(f"warm_up_steps: got {self.warm_up_steps}, wanted 0 or more")
        for name in ("weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: got {getattr(self, name)}, wanted 0 or more, and finite")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema: got {self.ema}, wanted at least 0 and less than 1")

    def rate(self, task: str) -> float:
        """Return the learning rate of a task's steps."""
        return dict(self.rates).get(task, self.learning_rate)

    def at(self, rates: Mapping[str, float]) -> Training:
        """Return the same training with these learning rates, task -> rate; equal rates give equal values."""
        if not rates:
            return self
        if len(set(rates.values())) == 1:
            return replace(self, learning_rate=next(iter(rates.values())), rates=())
        return replace(self, learning_rate=min(rates.values()), rates=tuple(sorted(rates.items())))

    def of(self, task: str) -> Training:
        """Return how a single-task model of this task trains."""
        return self.at({task: self.rate(task)})


@dataclass(frozen=True)
class Search:
    """How each task finds its mask, in the network that all tasks will share.

    Attributes:
        training: How every round trains. A task's rate is that of its single-task baseline.
        method: "rounds" (the paper's), or one training instead: "one_shot" prunes the single-task baseline itself,
            "gradual" prunes while it trains, "drop_and_grow" (RigL) moves sparse connections while it trains.
        granularity: The unit of pruning.
        scope: "global", one quantile over all layers, or "layer", one quantile per layer.
        rounds: Rounds of pruning.
        density: Share of the weights kept after the last round; one for all tasks, or pairs of a task and its own.
        rewind: The epochs of a task's own first training to rewind to (late rewinding); 0 rewinds to the start.
    """

    training: Training = field(default_factory=Training)
    method: str = "rounds"
    granularity: str = "weight"
    scope: str = "global"
    rounds: int = 4
    density: float | tuple[tuple[str, float], ...] = 0.2
    rewind: float = 0.0

    def __post_init__(self) -> None:
        _check(self.method, METHODS, "method")
        _check(self.granularity, GRANULARITIES, "granularity")
        check_counts(rounds=self.rounds)
        for density in (share for _, share in self.density) if isinstance(self.density, tuple) else (self.density,):
            if not 0 < density < 1:
                raise InputError(f"density: got {density}, wanted more than 0 and less than 1")

    def density_of(self, task: str) -> float:
        """Return the share of the weights that a task keeps after the last round."""
        if not isinstance(self.density, tuple):
            return self.density
        by_task = dict(self.density)
        if task not in by_task:
            raise InputError(f"density: got tasks {', '.join(by_task)}, wanted {task} among them")
        return by_task[task]

    def folder(self, task: str) -> str:
        """Return the name of a task's folder. Searches with the same steps share it, however many rounds they have."""
        density = self.density_of(task)
        steps = {**asdict(self), "training": asdict(self.training.of(task)), "density": density}
        if self.method == "rounds":
            steps["round_keeps"] = round(density ** (1 / self.rounds), 9)
            del steps["rounds"], steps["density"]
        return f"{self.method}-{digest(steps)}"


@dataclass(frozen=True)
class Masks:
    """The masks that a trial trains through.

    Attributes:
        kind: "tickets"; or a control: "random" (no search, `search.density` in every layer), "random_like" (as many
            weights in every layer as the tickets), "one_for_all" (the first task's ticket for every task),
            "one_random" (one random mask for every task), "unanimous" (one mask: what any task would keep),
            "separate" (by magnitude, with a share that all tasks own together), "random_separate".
        search: Where tickets and densities come from.
        level: "best" on the validation days, or "last".
        shared: For "separate" and "random_separate": the share of each task's weights that all tasks own.
        fresh_start: Whether the network starts from weights that the search has not seen.
        rescale: Whether each layer's weights start larger, divided by the square root of its tasks' mean density.
    """

    kind: str = "tickets"
    search: Search = field(default_factory=Search)
    level: str = "best"
    shared: float | None = None
    fresh_start: bool = False
    rescale: bool = False

    def __post_init__(self) -> None:
        _check(self.kind, KINDS_OF_MASKS, "kind of masks")
        if (self.shared is not None) != (self.kind in ("separate", "random_separate")):
            raise InputError(f"shared: got {self.shared} with {self.kind} masks, wanted it only with separate ones")
        if isinstance(self.search.density, tuple) and self.kind not in ("tickets", "random", "random_like"):
            raise InputError(f"density: got one per task with {self.kind} masks, wanted one for all")


@dataclass(frozen=True)
class Trial:
    """One model, trained once and judged once.

    Attributes:
        model: One of `models.MODELS`; "sparse_sharing" with one task and no masks is a single-task baseline.
        tasks: The tasks' names.
        seed: Seed of initial weights, order of the rows and random masks.
        masks: For sparse sharing; None for full masks.
        objective: "alternating" (one step per task), "joint" (one step on the sum), "uncertainty" or "pcgrad" (likewise
            one step).
        scales: Task -> factor of its loss: Eq 2's a and b.
        conflict: Thresholds and factors for rows that were clicked but hardly watched, or None.
        options: Other options of the model.
        is_tested: Whether the test days are read; choices are made without them.
        top_k: The model is judged by the first so many rows of each group too (`metrics_of`); 0 for not. It trains
            nothing else.
    """

    model: str
    tasks: tuple[str, ...]
    seed: int = 0
    training: Training = field(default_factory=Training)
    masks: Masks | None = None
    objective: str = "alternating"
    scales: tuple[tuple[str, float], ...] = ()
    conflict: Conflict | None = None
    options: tuple[tuple[str, Any], ...] = ()
    is_tested: bool = True
    top_k: int = 0

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        _check(self.model, MODELS, "model")
        _check(self.objective, OBJECTIVES, "objective")
        if self.training.rates and self.steps_together:
            raise InputError(f"rates: got one per task for {self.model} with one step for all tasks, wanted one rate")

    @property
    def steps_together(self) -> bool:
        """Whether one optimiser step serves all tasks, which then have one learning rate."""
        return self.objective != "alternating" or self.model == "esmm"

    @property
    def key(self) -> str:
        """The name of its files on disk; equal settings have equal names."""
        return f"{self.model}-{digest(asdict(self))}-seed_{self.seed}"

    def at(self, seed: int, rates: Mapping[str, float] | None = None, is_tested: bool = True) -> Trial:
        """Return the same trial at another seed, with the learning rates of its tasks if they are given."""
        own = {task: rate for task, rate in (rates or {}).items() if task in self.tasks}
        top_k = self.top_k if is_tested else 0
        return replace(self, seed=seed, training=self.training.at(own), is_tested=is_tested, top_k=top_k)
