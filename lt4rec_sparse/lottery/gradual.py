"""A ticket from one training run: masks that shrink while the network trains."""

from __future__ import annotations

import torch
from torch import nn

from lt4rec_sparse.lottery.pruning import check_granularity, check_scope, prune_by_magnitude, wanted_nnz
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.nn import MaskedLinear
from lt4rec_sparse.nn.optim import MaskedAdam


class GradualPruning:
    """Prune a model's masks little by little: `density(p) = d + (1 - d) (1 - p)**3`, `p` from 0 to 1.

    The model is any module with `MaskedLinear` layers of one task: a `MaskedMLP`, or what `mask_linears` made of a
    model. A pruned weight stays pruned, and nothing is rewound: the resulting network is trained, and its mask is a
    ticket that cost one training run, where `search_tickets` takes one per round.

    Call `after_batch` from the training loop. It has no state of its own: a run that continues from a checkpoint prunes
    like one that was never interrupted.

    Example:
        >>> from lt4rec_sparse import MaskedMLP
        >>> mlp = MaskedMLP(8, hidden=(4,))
        >>> pruning = GradualPruning(mlp, MaskedAdam(mlp), density=0.25)
        >>> for batch in range(100):
        ...     pruning.after_batch(batch, batch + 1, 100)
        >>> pruning.density_after(10, 100), round(pruning.density_after(20, 100), 2), mlp.mask().density
        (1.0, 0.72, 0.25)

    Args:
        model: The model. The masks of its layers shrink from their present density to `density`.
        optimizer: A `MaskedAdam`, which takes over each new mask, or any optimiser of torch. Such a one may still move
            a pruned weight, by momentum or decay; nothing reads that weight again.
        density: The density at the end: exact for single weights, otherwise what `prune_by_magnitude` keeps for it.
        granularity: What is pruned as a unit, one of `GRANULARITIES`.
        scope: What a quantile is taken over, one of `SCOPES`.
        begin: The share of all batches after which pruning begins.
        end: The share after which `density` is reached; the remaining batches are trained through the final mask.
        every: How many batches lie between two prunings.

    Raises:
        ValueError: If the model has no masked layer, one has several tasks, the optimiser lacks a masked weight, or an
            argument is out of its range.

    Source: Zhu and Gupta (arXiv 1710.01878), equation 1, starting from a full network.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MaskedAdam | torch.optim.Optimizer,
        density: float,
        granularity: str = "weight",
        scope: str = "global",
        begin: float = 0.1,
        end: float = 0.8,
        every: int = 10,
    ) -> None:
        check_granularity(granularity)
        check_scope(scope)
        if not 0 < density <= 1:
            raise ValueError(f"density: got {density}, wanted more than 0 and at most 1")
        if not 0 <= begin <= end <= 1:
            raise ValueError(f"begin and end: got {begin} and {end}, wanted 0 <= begin <= end <= 1")
        if every < 1:
            raise ValueError(f"every: got {every}, wanted at least 1")
        self._layers = {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}
        if not self._layers:
            got = f"got a {type(model).__name__} without masked layers"
            raise ValueError(f"model: {got}, wanted a MaskedMLP, or mask_linears(model) first")
        self._mask()  # raises if there are several tasks
        if isinstance(optimizer, torch.optim.Optimizer):
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for name, layer in self._layers.items():
                if id(layer.weight) not in stepped:
                    raise ValueError(f"optimizer: got one without the weight of {name}, wanted one of this model")
        self._optimizer = optimizer
        self._density, self._granularity, self._scope = density, granularity, scope
        self._begin, self._end, self._every = begin, end, every

    def density_after(self, done: int, total: int) -> float:
        """Return the wanted density after `done` of `total` batches."""
        first, last = self._span(total)
        if done >= last:
            return self._density
        part = max(done - first, 0) / (last - first)
        return self._density + (1 - self._density) * (1 - part) ** 3

    def after_batch(self, batch: object, done: int, total: int) -> None:
        """Prune if it is time to, after `done` of `total` batches; the batch itself is ignored."""
        first, last = self._span(total)
        if done != last and not (first < done < last and (done - first) % self._every == 0):
            return
        mask = self._mask()
        nnz = wanted_nnz(mask, self.density_after(done, total), self._scope)
        weights = {name: layer.weight for name, layer in self._layers.items()}
        for name, kept in prune_by_magnitude(weights, mask, nnz, self._granularity).items():
            self._layers[name].set_mask(kept)
        if isinstance(self._optimizer, MaskedAdam):
            self._optimizer.remask()

    def _mask(self) -> Mask:
        return Mask({name: layer.mask() for name, layer in self._layers.items()})

    def _span(self, total: int) -> tuple[int, int]:
        last = max(round(self._end * total), 1)  # no pruning is due before the first batch ends
        return min(round(self._begin * total), last - 1), last
