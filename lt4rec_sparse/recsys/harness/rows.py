"""Rows of tables, declared as trials: a model for all tasks, or one model per task; and the rows of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lt4rec_sparse.recsys.harness.trials import Masks, Search, Training, Trial

BASE, HARD, S_WEIGHT, S_WEIGHT_LAST = "base", "hard_sharing", "s_weight", "s_weight_last"
RANDOM, RANDOM_RESCALED, SMALL = "random", "random_rescaled", "_small"


@dataclass(frozen=True)
class Row:
    """A row of a table: one model for all tasks, or one model per task, as trials at seed 0.

    `key` is its name in files, `title` in reports; `rate_of` is the row whose learning rates it trains with, its own
    key if it searches them.
    """

    key: str
    title: str
    trials: tuple[Trial, ...]
    rate_of: str


@dataclass(frozen=True)
class Rows:
    """Makes rows over the same tasks and the same training.

    Attributes:
        tasks: The tasks, the densest first.
        training: How every row trains unless a row says otherwise; learning rates may be searched.
        search_rates: Task -> learning rate of its mask search, which is that of its single-task baseline.
        rounds: See `Search`, for `granularity` too.
        density: Share of the weights kept by random masks and by the tickets of the last round.
        narrow: Factor of the hidden widths of narrow dense networks.
        top_k: See `Trial`.
    """

    tasks: tuple[str, ...]
    training: Training = field(default_factory=Training)
    search_rates: tuple[tuple[str, float], ...] = ()
    rounds: int = 4
    density: float = 0.2
    granularity: str = "weight"
    narrow: float = 0.25  # some 20 % of the weights, since the first layer has most of them
    top_k: int = 0

    def base(self) -> Row:
        """Return the single-task models."""
        trials = tuple(
            Trial("sparse_sharing", (task,), training=self.training, top_k=self.top_k) for task in self.tasks
        )
        return Row(BASE, "base (single-task)", trials, BASE)

    def hard(self) -> Row:
        """Return hard sharing as in the paper: shared embeddings, an MLP, and one step per task."""
        return self.dense(HARD, "hard sharing", "alternating")

    def small(self) -> list[Row]:
        """Return single-task models and hard sharing at narrow widths, which equally costly sparse ones must beat."""
        widths = scaled(self.training.hidden, self.narrow)
        narrow = replace(self, training=replace(self.training, hidden=widths))
        title = f"dense and {self.narrow:.2g}x as wide"
        return [
            Row(row.key + SMALL, f"{row.title}, {title}", row.trials, row.key + SMALL)
            for row in (narrow.base(), narrow.hard())
        ]

    def dense(self, model: str, title: str, objective: str = "joint") -> Row:
        """Return a multi-task model without masks; its key names the objective if it is not the one of its authors."""
        usual = "alternating" if model == HARD else "joint"
        key = model if objective == usual else f"{model}_{objective}"
        how: dict[str, Any] = {"training": self.training, "objective": objective, "top_k": self.top_k}
        return Row(key, title, (Trial(model, self.tasks, **how),), key)

    def search(self, **changes: Any) -> Search:
        """Return the paper's search with some changes; each task has the learning rate of its baseline."""
        search = Search(self.training, granularity=self.granularity, rounds=self.rounds, density=self.density)
        search = replace(search, **changes)
        return replace(search, training=search.training.at(dict(self.search_rates)))

    def tickets(self) -> list[Row]:
        """Return the paper's models, one through each task's best ticket and one through the last tickets."""
        best = Masks(search=self.search())
        return [
            self.sparse(S_WEIGHT, "S-Weight", best),
            self.sparse(S_WEIGHT_LAST, f"S-Weight at {self.density * 100:g} %", replace(best, level="last")),
        ]

    def random(self) -> list[Row]:
        """Return random masks, once with the initial weights as drawn and once scaled up for the density."""
        masks, title = Masks("random", self.search()), f"random masks at {self.density * 100:g} %"
        scaled_up = replace(masks, rescale=True)
        return [
            self.sparse(RANDOM, f"{title}, no search", masks, RANDOM),
            self.sparse(RANDOM_RESCALED, f"{title}, scaled up at the start", scaled_up, RANDOM_RESCALED),
        ]

    def sparse(self, key: str, title: str, masks: Masks, rate_of: str = S_WEIGHT, **changes: Any) -> Row:
        """Return sparse sharing through some masks, in the network that they were searched in.

        `changes` are further settings of the trial; for the others see `Row`.
        """
        searched = masks.search.training
        training = replace(
            self.training,
            hidden=searched.hidden,
            embedding_dim=searched.embedding_dim,
            exclusive_dim=searched.exclusive_dim,
            cross=searched.cross,
            warm_up=searched.warm_up,
        )
        trial = Trial("sparse_sharing", self.tasks, training=training, masks=masks, top_k=self.top_k, **changes)
        return Row(key, title, (trial,), rate_of)

    def product(self, masks: str) -> list[Row]:
        """Return the rows among which a run chooses its ranker, and their baselines; for `masks` see `RunSettings`."""
        (narrow,) = (row for row in self.small() if row.key == HARD + SMALL)
        table = [self.base(), self.hard(), narrow]
        if masks != "tickets":
            table.append(self.random()[1])
        return table if masks == "random" else [*table, *self.tickets()]


def scaled(widths: Sequence[int], factor: float) -> tuple[int, ...]:
    """Return hidden widths times a factor, each at least 1."""
    return tuple(max(1, round(factor * width)) for width in widths)


def narrow_factor(in_features: int, hidden: Sequence[int], density: float) -> float:
    """Return the factor of all hidden widths at which a dense MLP has `density` times the weights.

    The positive root of `first f + rest f^2 = density (first + rest)`: weights of the first layer grow with the width,
    those of the other layers with its square.

    >>> round(narrow_factor(1000, (100, 100), 0.2), 3)
    0.215
    """
    first = in_features * hidden[0]
    rest = sum(a * b for a, b in zip(hidden[:-1], hidden[1:], strict=True))
    wanted = density * (first + rest)
    return 2 * wanted / (first + math.sqrt(first * first + 4 * rest * wanted))
