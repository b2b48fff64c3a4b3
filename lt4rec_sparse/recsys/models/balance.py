"""How the losses or the gradients of several tasks are combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn.masked import check_tasks

# The factor of `exp(-s)`: 1 / (2 sigma^2) for a squared error, 1 / sigma^2 for a cross entropy.
_PRECISION = {"binary": 1.0, "ratio": 0.5}


class UncertaintyWeights(nn.Module):
    """Weight each task's loss by the learned noise of the task: `sum over t of c_t exp(-s_t) loss_t + s_t / 2`.

    `s_t = log sigma_t^2` is learned; `c` is 1/2 for a squared error and 1 for a cross entropy. `s` starts at 0.

    Args:
        tasks: The tasks' names.
        kinds: Task -> kind of its loss: "ratio" (squared error) or "binary" (cross entropy).

    Raises:
        ValueError: If there is no task, a task is repeated, or a kind is unknown.

    Source: Kendall et al. (arXiv 1705.07115), equations 7 and 10.
    """

    def __init__(self, tasks: Sequence[str], kinds: Mapping[str, str]) -> None:
        super().__init__()
        self.kinds = {task: kinds.get(task, "none") for task in check_tasks(tasks)}
        unknown = [f"{kind} of {task}" for task, kind in self.kinds.items() if kind not in _PRECISION]
        if unknown:
            raise ValueError(f"kinds: got {', '.join(unknown)}, wanted one of {', '.join(_PRECISION)} for each task")
        # One parameter per task: without rows of a task in a batch its parameter has no gradient, and Adam skips it.
        # Adam moves a parameter by at most the learning rate per step, whatever its gradient, but `s` has to move by
        # whole units within an epoch: the parameter is a hundredth of it.
        self.hundredths = nn.ParameterDict({task: nn.Parameter(torch.zeros(())) for task in self.kinds})

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum, a scalar.

        Args:
            losses: Task -> scalar loss; tasks may be missing.

        Raises:
            ValueError: If there is no loss, or one of an unknown task.
        """
        if not losses or not losses.keys() <= self.kinds.keys():
            raise ValueError(f"losses: got {', '.join(losses) or 'none'}, wanted some of {', '.join(self.kinds)}")
        terms = [
            _PRECISION[self.kinds[task]] * self._precision(task) * loss + self._log_variance(task) / 2
            for task, loss in losses.items()
        ]
        return torch.stack(terms).sum()

    def _precision(self, task: str) -> Tensor:
        return torch.exp(-self._log_variance(task))

    def _log_variance(self, task: str) -> Tensor:
        log_variance: Tensor = self.hundredths[task] * 100
        return log_variance


def pcgrad(gradients: Sequence[Sequence[Tensor]], generator: torch.Generator) -> list[Tensor]:
    """Combine the tasks' gradients so that none opposes another: the sum of `without_conflicts`.

    Args:
        gradients: For each task, one tensor per parameter; zero where the task does not use it.
        generator: Draws the order of the tasks; on the CPU.

    Returns:
        One tensor per parameter.

    Raises:
        ValueError: As `without_conflicts` does.

    Source: Yu et al. (arXiv 2001.06782), Algorithm 1.
    """
    return [torch.stack(parts).sum(0) for parts in zip(*without_conflicts(gradients, generator), strict=True)]


def without_conflicts(gradients: Sequence[Sequence[Tensor]], generator: torch.Generator) -> list[list[Tensor]]:
    """Remove from each task's gradient the part that opposes another's: `g_i -= (g_i . g_j / |g_j|^2) g_j` if negative.

    The other tasks come in random order, each with its original gradient. All parameters together are one vector.

    Args:
        gradients: For each task, one tensor per parameter; zero where the task does not use it.
        generator: Draws the order of the tasks; on the CPU.

    Returns:
        For each task, one tensor per parameter; nothing is changed in place.

    Raises:
        ValueError: If there is no task, or tasks have different numbers of parameters.

    Source: Yu et al. (arXiv 2001.06782), Algorithm 1, lines 2 to 8.
    """
    if len({len(parts) for parts in gradients}) != 1:
        got = [len(parts) for parts in gradients]
        raise ValueError(f"gradients: got {got} tensors per task, wanted the same number for at least one task")
    projected = []
    for i, own in enumerate(gradients):
        result = list(own)
        for j in torch.randperm(len(gradients), generator=generator).tolist():
            if j != i and (along := _dot(result, gradients[j])) < 0:
                share = along / _dot(gradients[j], gradients[j])
                result = [a - share * b for a, b in zip(result, gradients[j], strict=True)]
        projected.append(result)
    return projected


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    # Parameters are summed in Python's float64: in float32 the large sum of an embedding table would absorb a head's.
    return sum(torch.dot(x.reshape(-1), y.reshape(-1)).item() for x, y in zip(a, b, strict=True))
