"""A ticket from one training run: a sparse network that drops and grows connections while it trains (RigL)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lt4rec_sparse.lottery.pruning import wanted_nnz
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.nn import MaskedMLP
from lt4rec_sparse.nn.optim import MaskedAdam

Batch = TypeVar("Batch")


class DropAndGrow(Generic[Batch]):
    """Train a sparse network, and regularly exchange its smallest weights for those of largest gradient (RigL).

    The network starts behind a random mask. At an update each layer drops the share `drop / 2 (1 + cos(pi t / T))` of
    its weights, those of smallest magnitude, and grows the same number where the loss would fall fastest: where the
    gradient of the dense weight is largest. So the number of weights of each layer never changes. A weight that has
    just been dropped may be chosen again, and is then unchanged. New weights begin at zero, without momentum.

    Call `after_batch` from the training loop. It has no state of its own: a run that continues from a checkpoint
    exchanges like one that was never interrupted.

    Args:
        mlp: The MLP of one task. It gets a random mask in place of its own.
        optimizer: Takes over each new mask (`MaskedAdam.remask`).
        loss: Takes a batch and returns the task's loss as in training, without a backward pass: called once per
            update, for `dense_gradients`.
        density: The density of each layer, at all times; of the first layer too, which RigL keeps whole.
        generator: Draws the first mask.
        every: How many batches lie between two updates.
        drop: The share that an update at batch 0 would exchange.
        end: The share of all batches after which no more weights are exchanged, `T` above.

    Raises:
        ValueError: If the network has several tasks, or an argument is out of its range.

    Source: Evci et al. (arXiv 1911.11134), Algorithm 1.
    """

    def __init__(
        self,
        mlp: MaskedMLP,
        optimizer: MaskedAdam,
        loss: Callable[[Batch], Tensor],
        density: float,
        generator: torch.Generator,
        every: int = 100,
        drop: float = 0.3,
        end: float = 0.75,
    ) -> None:
        if every < 1:
            raise ValueError(f"every: got {every}, wanted at least 1")
        if not 0 <= drop <= 1 or not 0 <= end <= 1:
            raise ValueError(f"drop and end: got {drop} and {end}, wanted shares from 0 to 1")
        full = Mask.full(mlp.mask().shapes)
        counts = wanted_nnz(full, density, "layer")
        assert isinstance(counts, dict)
        mlp.set_mask(Mask.random(full.shapes, counts, generator))
        optimizer.remask()
        self._mlp, self._optimizer, self._loss = mlp, optimizer, loss
        self._every, self._drop, self._end = every, drop, end

    def share_after(self, done: int, total: int) -> float:
        """Return the share of a layer's weights that is dropped after `done` of `total` batches; 0 at other times."""
        last = self._end * total
        if done % self._every or not 0 < done < last:
            return 0.0
        return self._drop / 2 * (1 + math.cos(math.pi * done / last))

    def after_batch(self, batch: Batch, done: int, total: int) -> None:
        """Exchange weights if it is time to, after `done` of `total` batches, by the gradients of this batch."""
        share = self.share_after(done, total)
        if not share:
            return
        weights, old = self._mlp.masked_weights(), self._mlp.mask()
        gradients = dense_gradients(self._mlp, lambda: self._loss(batch))
        new = Mask({name: _exchange(weights[name], gradients[name], kept, share) for name, kept in old.items()})
        with torch.no_grad():
            for name, weight in weights.items():
                weight.masked_fill_((new[name] & ~old[name]).to(weight.device), 0)
        self._mlp.set_mask(new)
        self._optimizer.remask()


def dense_gradients(mlp: MaskedMLP, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return layer name -> gradient of a loss with respect to its dense weight, pruned weights included.

    A masked layer gives pruned weights no gradient. So while `loss` runs, every weight is kept and the pruned ones
    are zero: the loss is the same, and the gradient is that of the dense weight. Weights and masks are then restored
    bit for bit, and no `.grad` is touched.
    """
    mask, weights = mlp.mask(), mlp.masked_weights()
    saved = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.masked_fill_(~mask[name].to(weight.device), 0)
        mlp.set_mask(Mask.full(mask.shapes))
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), list(weights.values()))
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved[name])
        mlp.set_mask(mask)
    return dict(zip(weights, gradients, strict=True))


def _exchange(weight: Tensor, gradient: Tensor, kept: Tensor, share: float) -> Tensor:
    """Return a layer's new mask; ties between magnitudes or between gradients go to the earlier weight."""
    nnz = int(kept.sum())
    n = round(share * nnz)
    magnitude = weight.detach().cpu().double().abs().masked_fill(~kept, -1)
    stays = _largest(magnitude, nnz - n)
    return stays | _largest(gradient.detach().cpu().double().abs().masked_fill(stays, -1), n)


def _largest(values: Tensor, n: int) -> Tensor:
    chosen = torch.zeros(values.numel(), dtype=torch.bool)
    chosen[values.flatten().sort(descending=True, stable=True).indices[:n]] = True
    return chosen.view(values.shape)
