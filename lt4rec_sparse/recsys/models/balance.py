"""How the losses or the gradients of several tasks are combined, and rows on which the tasks conflict weighted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# The factor of `exp(-s)`: 1 / (2 sigma^2) for a squared error, 1 / sigma^2 for a cross entropy.
_PRECISION = {"binary": 1.0, "ratio": 0.5}


class UncertaintyWeights(nn.Module):
    """Weight each task's loss by the learned noise of the task: `sum over t of c_t exp(-s_t) loss_t + s_t / 2`.

    `s_t = log sigma_t^2` is learned; `c` is 1/2 for a squared error and 1 for a cross entropy. `s` starts at 0.
    `kinds` is task -> kind of its loss: "ratio" (squared error) or "binary" (cross entropy).

    Source: Kendall et al. (arXiv 1705.07115), equations 7 and 10.
    """

    def __init__(self, tasks: Sequence[str], kinds: Mapping[str, str]) -> None:
        super().__init__()
        self.precision = {task: _PRECISION[kinds[task]] for task in tasks}
        # One parameter per task: without rows of a task in a batch its parameter has no gradient, and Adam skips it.
        # Adam moves a parameter by at most the learning rate per step, whatever its gradient, but `s` has to move by
        # whole units within an epoch: the parameter is a hundredth of it.
        self.hundredths = nn.ParameterDict({task: nn.Parameter(torch.zeros(())) for task in tasks})

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum, a scalar, of task -> scalar loss; tasks may be missing."""
        terms = []
        for task, loss in losses.items():
            log_variance = self.hundredths[task] * 100
            terms.append(self.precision[task] * torch.exp(-log_variance) * loss + log_variance / 2)
        return torch.stack(terms).sum()


def pcgrad(gradients: Sequence[Sequence[Tensor]], generator: torch.Generator) -> list[Tensor]:
    """Combine the tasks' gradients so that none opposes another: the sum of `without_conflicts`, per parameter.

    `gradients` has for each task one tensor per parameter, zero where the task does not use it. The `generator`, on the
    CPU, draws the order of the tasks.

    Source: Yu et al. (arXiv 2001.06782), Algorithm 1.
    """
    return [torch.stack(parts).sum(0) for parts in zip(*without_conflicts(gradients, generator), strict=True)]


def without_conflicts(gradients: Sequence[Sequence[Tensor]], generator: torch.Generator) -> list[list[Tensor]]:
    """Remove from each task's gradient the part that opposes another's: `g_i -= (g_i . g_j / |g_j|^2) g_j` if negative.

    The other tasks come in random order, each with its original gradient. All parameters together are one vector.
    """
    projected = []
    for i, own in enumerate(gradients):
        result = list(own)
        for j in torch.randperm(len(gradients), generator=generator).tolist():
            if j != i and (along := _dot(result, gradients[j])) < 0:
                share = along / _dot(gradients[j], gradients[j])
                result = [a - share * b for a, b in zip(result, gradients[j], strict=True)]
        projected.append(result)
    return projected


@dataclass(frozen=True)
class Conflict:
    """The paper's answer to opposing gradients: a clicked and hardly watched row counts more for CVR, less for CTR.

    A video is long above `long_ms`, in milliseconds. A long one is hardly watched below the watch ratio `long_ratio`,
    any other below `short_ratio`. The last two are the factors of such a row in the CTR loss and in the CVR loss.

    Source: LT4REC (arXiv 2008.09872), section 2.2, "gradient conflict"; the figures are those of its published code.
    """

    long_ms: float = 60_000.0
    long_ratio: float = 0.1
    short_ratio: float = 0.2
    click_factor: float = 0.2
    watch_factor: float = 5.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"{name}: got {value}, wanted at least 0")

    def factors(self, ratio: Tensor, clicked: Tensor, duration_ms: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's factors in the CTR and in the CVR loss, `[batch]`, dtype of `ratio`: 1 without a conflict.

        A row without a duration (NaN, or not above 0) or without a ratio (NaN) is never in conflict.
        All are `[batch]`: the share of the video that was watched, bool, and the duration of the video.
        """
        hardly = torch.where(duration_ms > self.long_ms, ratio < self.long_ratio, ratio < self.short_ratio)
        rows, one = clicked & hardly & (duration_ms > 0), torch.ones_like(ratio)
        return torch.where(rows, self.click_factor * one, one), torch.where(rows, self.watch_factor * one, one)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    # Parameters are summed in Python's float64: in float32 the large sum of an embedding table would absorb a head's.
    return sum(torch.dot(x.reshape(-1), y.reshape(-1)).item() for x, y in zip(a, b, strict=True))
