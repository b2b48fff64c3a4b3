"""Adam with a learning rate per task, and what else belongs to a step: schedule, clipping, weight decay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lt4rec_sparse.nn.masked import MaskedLinear
from lt4rec_sparse.nn.optim import MaskedAdam


class TaskAdam(MaskedAdam):
    """A `MaskedAdam` with a learning rate per task.

    A task's step moves everything that the task reads, including weights that others share, by Adam's direction times
    the task's own rate. What only this task moves (its head, the weights that it alone owns) trains as in a
    single-task model of that rate. Shared parameters have one momentum, fed by the gradients of all their tasks.

    Before a step, its gradients are scaled down to a global norm of `clip_norm` if theirs is larger, as
    `torch.nn.utils.clip_grad_norm_` does, those of pruned weights being zero. With `weight_decay`, weights of linear
    layers that the step moves are then multiplied by `1 - rate * weight_decay`, as by `torch.optim.AdamW`: no bias, no
    embedding, and no weight outside the masks of the step's tasks.

    Args:
        model: The model.
        rates: Task -> learning rate.
        clip_norm: The largest norm of a step's gradients; 0 for any.
        weight_decay: The decoupled decay; 0 for none.

    Source of the decay: Loshchilov and Hutter (arXiv 1711.05101), Algorithm 2.
    """

    def __init__(
        self, model: nn.Module, rates: Mapping[str, float], clip_norm: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(model)
        self.rates = dict(rates)
        self.factor = 1.0  # of every rate; see `Schedule`
        self._clip_norm, self._weight_decay = clip_norm, weight_decay
        self._parameters = list(model.parameters())
        self._linear = [module for module in model.modules() if isinstance(module, nn.Linear)]

    def step(self, *tasks: str) -> None:
        """Move what any of `tasks` owns; with no names, what any task owns; see `MaskedAdam.step`.

        Raises:
            ValueError: If the tasks have different rates, or for the reasons of `MaskedAdam.step`.
        """
        rates = {self.rates[task] for task in tasks or self.rates}
        if len(rates) != 1:
            raise ValueError(f"rates: got {self.rates} for one step of several tasks, wanted one rate")
        rate = rates.pop() * self.factor
        self._adam.param_groups[0]["lr"] = rate
        if self._clip_norm:
            self._clip()
        if self._weight_decay:
            self._decay(1 - rate * self._weight_decay, tasks)
        super().step(*tasks)

    @torch.no_grad()
    def _clip(self) -> None:
        gradients = []
        for parameter in self._parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()  # entries of one row are summed before they are squared
                gradients.append(parameter.grad.values())
            elif parameter.grad is not None:
                gradients.append(parameter.grad)
        # 1e-6 as in `clip_grad_norm_`, which takes no sparse gradients.
        factor = (self._clip_norm / (get_total_norm(gradients) + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)

    @torch.no_grad()
    def _decay(self, factor: float, tasks: tuple[str, ...]) -> None:
        for layer in self._linear:
            if layer.weight.grad is not None:
                owned = _owned(layer, tasks)
                decayed = layer.weight * factor
                layer.weight.copy_(decayed if owned is None else torch.where(owned, decayed, layer.weight))


def _owned(layer: nn.Linear, tasks: tuple[str, ...]) -> Tensor | None:
    """Return which weights any of the tasks owns, or None for all."""
    if not isinstance(layer, MaskedLinear):
        return None
    places = [place for place, task in enumerate(layer.tasks) if not tasks or task in tasks]
    owned: Tensor = layer.masks[places].any(0)
    return owned
