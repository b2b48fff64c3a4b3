"""Early stopping: a training ends when the validation days no longer gain, with the weights of its best epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lt4rec_sparse.errors import InputError

Losses = Callable[[nn.Module], Mapping[str, float]]


class EarlyStopping:
    """Ends a training after `patience` epochs in a row that were no better than an earlier one.

    The score of an epoch is the sum over tasks of `validation loss / validation loss of the first epoch`; the least is
    the best.

    Args:
        losses: From a model to its validation losses, task -> loss, each 0 or more.
        patience: Epochs, at least 1.
    """

    def __init__(self, losses: Losses, patience: int) -> None:
        if patience < 1:
            raise InputError(f"patience: got {patience}, wanted at least 1")
        self._losses, self._patience = losses, patience
        self._first: dict[str, float] = {}
        self._scores: list[float] = []
        self._best: dict[str, Tensor] = {}

    def is_over(self, model: nn.Module) -> bool:
        """Judge the model as an epoch left it, and return whether the training ends here.

        Raises:
            InputError: If a loss is NaN or infinite, as without a row of the task on the validation days.
        """
        losses = dict(self._losses(model))
        for task, loss in losses.items():
            if not math.isfinite(loss):
                raise InputError(
                    f"validation loss of {task}: got {loss} after epoch {len(self._scores)}, wanted a number"
                )
        self._first = self._first or losses
        score = sum(loss / self._first[task] if self._first[task] else loss for task, loss in losses.items())
        if not self._scores or score < min(self._scores):
            self._best = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._scores.append(score)
        return len(self._scores) - 1 - self._scores.index(min(self._scores)) >= self._patience

    def restore(self, model: nn.Module) -> None:
        """Give the model the weights of the best epoch judged so far; without one it is left as it is."""
        if self._best:
            model.load_state_dict(self._best)

    def state_dict(self) -> dict[str, Any]:
        """Return what an interrupted training needs to go on."""
        return {"first": self._first, "scores": self._scores, "best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._first, self._scores, self._best = dict(state["first"]), list(state["scores"]), dict(state["best"])
