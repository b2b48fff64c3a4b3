"""Adam for sparse sharing: a step for one task moves only what that task owns."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn.masked import MaskedLinear


class _State(NamedTuple):
    """What Adam remembers of each masked weight, all of the weight's shape."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    age: Tensor  # steps in which the weight took part, float32


class MaskedAdam:
    """Adam whose step for a task leaves every weight outside that task's mask bit for bit untouched.

    A plain Adam moves a weight whose gradient is zero, by its momentum and by weight decay: a step for one task would
    move what only another task owns. Here each masked weight lives in its own time: only steps of tasks that own it
    happen to it, its momentum, its decay and its bias correction included. Parameters that are not masked (embeddings,
    biases, heads) take the plain step, those without gradient none.

    `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`, `w -= lr (m / (1 - b1^age)) / (sqrt(v / (1 - b2^age)) + eps)`,
    with `g` the gradient plus `weight_decay * w`, for kept weights only; `age` counts the weight's own steps.

    Args:
        model: Its `MaskedLinear` layers' weights are stepped through their masks.
        learning_rate: `lr`.
        betas: `(b1, b2)`.
        eps: `eps`.
        weight_decay: The L2 factor.

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
        self.learning_rate, self.betas, self.eps, self.weight_decay = learning_rate, betas, eps, weight_decay
        # A layer that every task keeps whole has nothing to protect, and takes torch's fused step.
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, MaskedLinear) and not bool(module.masks.all())
        }
        masked = {id(layer.weight) for layer in self._layers.values()}
        self._states = {
            name: _State(*(torch.zeros_like(layer.weight, requires_grad=False) for _ in range(3)))
            for name, layer in self._layers.items()
        }
        self._kept = {
            (name, task): layer.mask(task).flatten().nonzero().squeeze(1)
            for name, layer in self._layers.items()
            for task in layer.tasks
        }
        free = [parameter for parameter in model.parameters() if id(parameter) not in masked]
        self._free = torch.optim.Adam(free, learning_rate, betas, eps, weight_decay, fused=True)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._free.zero_grad(set_to_none=True)
        for layer in self._layers.values():
            layer.weight.grad = None

    @torch.no_grad()
    def step(self, task: str) -> None:
        """Move what `task` owns, by the gradients of its loss."""
        self._free.step()
        b1, b2 = self.betas
        for name, layer in self._layers.items():
            if layer.weight.grad is None:
                continue
            kept, state = self._kept[name, task], self._states[name]
            weight, grad, m, v, age = (
                t.view(-1).index_select(0, kept) for t in (layer.weight.data, layer.weight.grad.contiguous(), *state)
            )
            if self.weight_decay:
                grad.add_(weight, alpha=self.weight_decay)
            m.lerp_(grad, 1 - b1)
            v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
            age.add_(1)
            denominator = (v / (1 - b2**age)).sqrt_().add_(self.eps)
            weight.sub_((m / (1 - b1**age)).div_(denominator).mul_(self.learning_rate))
            for whole, part in zip((layer.weight.data, *state), (weight, m, v, age), strict=True):
                whole.view(-1).index_copy_(0, kept, part)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"free": self._free.state_dict(), "masked": {n: s._asdict() for n, s in self._states.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint of the same model with the same masks."""
        self._free.load_state_dict(copy.deepcopy(state["free"]))  # torch would share the tensors
        for name, own in self._states.items():
            for key, tensor in own._asdict().items():
                tensor.copy_(state["masked"][name][key])
