"""Adam with a learning rate per task."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lt4rec_sparse.nn.optim import MaskedAdam


class TaskAdam(MaskedAdam):
    """`MaskedAdam` whose step for a task has that task's learning rate.

    A task's step moves all that the task reads, weights that others share included, by Adam's direction times the
    task's own rate. What moves by it alone (its head, the weights that it alone owns) trains as in a single-task model
    of that rate. Shared parameters have one momentum, which the gradients of all their tasks go into.

    Args:
        model: As for `MaskedAdam`.
        rates: Task -> learning rate.
    """

    def __init__(self, model: nn.Module, rates: Mapping[str, float]) -> None:
        super().__init__(model)
        self.rates = dict(rates)

    def step(self, *tasks: str) -> None:
        """Move what any of `tasks` owns, with no name what any task owns; see `MaskedAdam.step`.

        Raises:
            ValueError: If the tasks have different rates, or as `MaskedAdam.step`.
        """
        rates = {self.rates[task] for task in tasks or self.rates}
        if len(rates) != 1:
            raise ValueError(f"rates: got {self.rates} for one step of several tasks, wanted one rate")
        self._adam.param_groups[0]["lr"] = rates.pop()
        super().step(*tasks)
