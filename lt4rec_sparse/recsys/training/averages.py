"""An exponential moving average of a model's weights, which is judged and served in their place."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of a model whose weights follow the model's: `average <- d average + (1 - d) weight`.

    `update_parameters(model)` is called after each batch. `d = min(decay, n / (n + 9))` after `n` batches, from 1 on:
    an average of few batches forgets the start. A weight that no step moves stays the same to the bit, such as one that
    is pruned; masks are the model's. `module` is the model with these weights.

    Source: the moving average of TensorFlow (`tf.train.ExponentialMovingAverage` with `num_updates`); Polyak and
    Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """

    def follow(averages: Any, weights: Any, updates: Tensor | int) -> None:
        steps = int(updates) + 1  # torch copies the weights of the first batch, and then calls this with 1, 2, ...
        share = 1 - min(decay, steps / (steps + 9))
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, share)

    return AveragedModel(model, multi_avg_fn=follow)
