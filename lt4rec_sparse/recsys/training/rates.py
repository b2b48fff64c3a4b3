"""Adam with a learning rate per task."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lt4rec_sparse.nn.optim import MaskedAdam


class TaskAdam(MaskedAdam):
    """A `MaskedAdam` with a learning rate per task.

    A task's step moves everything that the task reads, including weights that others share, by Adam's direction times
    the task's own rate. What only this task moves (its head, the weights that it alone owns) trains as in a
    single-task model of that rate. Shared parameters have one momentum, fed by the gradients of all their tasks.
    """

    def __init__(self, model: nn.Module, rates: Mapping[str, float]) -> None:
        super().__init__(model)
        self.rates = dict(rates)

    def step(self, *tasks: str) -> None:
        """Move what any of `tasks` owns; with no names, what any task owns; see `MaskedAdam.step`.

        Raises:
            ValueError: If the tasks have different rates, or for the reasons of `MaskedAdam.step`.
        """
        rates = {self.rates[task] for task in tasks or self.rates}
        if len(rates) != 1:
            raise ValueError(f"rates: got {self.rates} for one step of several tasks, wanted one rate")
        self._adam.param_groups[0]["lr"] = rates.pop()
        super().step(*tasks)
