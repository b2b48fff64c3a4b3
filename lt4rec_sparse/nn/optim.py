"""Adam for sparse sharing: a step for one task moves only what that task owns."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn.masked import MaskedLinear


class _Part(NamedTuple):
    """The weights of one layer that the same tasks own: all of them live in the same time."""

    layer: MaskedLinear
    owners: frozenset[str]
    places: Tensor  # int64 [n], into the flattened weight
    values: nn.Parameter  # [n], what Adam steps; the weight itself between two steps


class MaskedAdam:
    """Adam whose step for a task leaves every weight outside that task's mask bit for bit untouched.

    A plain Adam moves a weight whose gradient is zero, by its momentum and by weight decay: a step for one task would
    move what only another task owns. Here each masked weight lives in its own time: only steps of tasks that own it
    happen to it, its momentum, its decay and its bias correction included. Parameters that are not masked (embeddings,
    biases, heads) take the plain step, those without gradient none.

    Weights that the same tasks own share their time, so they are gathered into one vector, stepped by torch's Adam,
    and put back; momentum is stored for kept weights only.

    Args:
        model: Its `MaskedLinear` layers' weights are stepped through the masks that they have now.
        learning_rate: As in `torch.optim.Adam`.
        betas: As in `torch.optim.Adam`.
        eps: As in `torch.optim.Adam`.
        weight_decay: As in `torch.optim.Adam`: an L2 term in the gradient.

    Source: LT4REC (arXiv 2008.09872), Algorithm 1, lines 12 to 17; Adam (arXiv 1412.6980).
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        masked = [module for module in model.modules() if isinstance(module, MaskedLinear)]
        # A layer that every task keeps whole has nothing to protect, and takes the plain step.
        pruned = [layer for layer in masked if not bool(layer.masks.all())]
        self._parts = [part for layer in pruned for part in _parts(layer)]
        self._pruned = pruned
        # Of every layer: one that is whole now and pruned later would be stepped past its new mask.
        self._masked = masked
        self._masks = [layer.masks.clone() for layer in masked]
        self._versions = [layer.masks._version for layer in masked]
        gathered = {id(layer.weight) for layer in pruned}
        free = [parameter for parameter in model.parameters() if id(parameter) not in gathered]
        values = [part.values for part in self._parts]
        self._adam = torch.optim.Adam([*free, *values], learning_rate, betas, eps, weight_decay, fused=True)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._adam.zero_grad(set_to_none=True)
        for layer in self._pruned:
            layer.weight.grad = None

    @torch.no_grad()
    def step(self, task: str) -> None:
        """Move what `task` owns, by the gradients of its loss.

        Raises:
            ValueError: If no masked layer knows the task.
            RuntimeError: If a mask changed since the optimiser was made.
        """
        if self._parts and not any(task in part.layer.tasks for part in self._parts):
            known = sorted({name for part in self._parts for name in part.layer.tasks})
            raise ValueError(f"task: got {task!r}, wanted one of {', '.join(known)}, the masked layers' tasks")
        self._check_masks()
        moved = [part for part in self._parts if task in part.owners and part.layer.weight.grad is not None]
        for layer, _, places, values in moved:
            assert layer.weight.grad is not None
            torch.index_select(layer.weight.view(-1), 0, places, out=values.data)
            values.grad = layer.weight.grad.reshape(-1).index_select(0, places)
        self._adam.step()
        for layer, _, places, values in moved:
            layer.weight.view(-1).index_copy_(0, places, values)
            values.grad = None

    def _check_masks(self) -> None:
        versions = [layer.masks._version for layer in self._masked]
        if versions == self._versions:
            return
        # Written since, maybe with what stood there before, as when a checkpoint is loaded.
        if not all(torch.equal(layer.masks, mask) for layer, mask in zip(self._masked, self._masks, strict=True)):
            raise RuntimeError("masks: got others than when the optimiser was made, wanted a new MaskedAdam for them")
        self._versions = versions

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint of the same model with the same masks."""
        self._adam.load_state_dict(copy.deepcopy(state))  # torch would share the tensors


def _parts(layer: MaskedLinear) -> list[_Part]:
    # Owners as the bits of one number: tasks are few, and weights with equal numbers form a part.
    bits = torch.tensor([1 << i for i in range(len(layer.tasks))], device=layer.masks.device).view(-1, 1, 1)
    owners = (layer.masks * bits).sum(0).flatten()
    parts = []
    for number in torch.unique(owners).tolist():
        names = frozenset(task for i, task in enumerate(layer.tasks) if number >> i & 1)
        if names:
            places = (owners == number).nonzero().squeeze(1)
            values = nn.Parameter(layer.weight.detach().view(-1)[places])
            parts.append(_Part(layer, names, places, values))
    return parts
