"""Prune a torch model of one's own to blocks of 16 x 4 while it trains, freeze it, and compare accuracy and time.

The ten lines are in `train`: `mask_linears` before the loop, `GradualPruning` in it; model, loss and optimiser are as
they were. The data are made here: three spirals in two of 64 numbers, turned so that every number carries a part.
"""

from __future__ import annotations

import copy
import math
from functools import partial

import torch
from torch import Tensor, nn

from lt4rec_sparse import freeze, mask_linears
from lt4rec_sparse.lottery import GradualPruning
from lt4rec_sparse.stopwatch import interleaved, one_thread

NUMBERS, CLASSES, DENSITY, STEPS = 64, 3, 0.1, 200


class Net(nn.Module):
    """A residual MLP, with functions between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(NUMBERS, 256), nn.LayerNorm(256)
        self.wide, self.narrow = nn.Linear(256, 512), nn.Linear(512, 256)
        self.head = nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[batch, CLASSES]` for `x` `[batch, NUMBERS]`."""
        h = nn.functional.gelu(self.first(x))
        h = h + self.narrow(nn.functional.gelu(self.wide(self.norm(h))))
        logits: Tensor = self.head(h)
        return logits


def spirals(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points on three noisy spirals, and which spiral each is of."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (rows,), generator=generator)
    radius = torch.rand(rows, generator=generator)
    angle = 4 * radius + label * 2 * math.pi / CLASSES + 0.15 * torch.randn(rows, generator=generator)
    plane = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    turn = torch.linalg.qr(torch.randn(NUMBERS, NUMBERS, generator=torch.Generator().manual_seed(0)))[0]
    return 4 * plane @ turn[:2] + 0.02 * torch.randn(rows, NUMBERS, generator=generator), label


def train(model: nn.Module, density: float | None = None) -> None:
    """Train; with a density, prune all but the head to it meanwhile, in blocks."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    if density is not None:
        mask_linears(model, leave=["head"])
        pruning = GradualPruning(model, optimizer, density, "16x4", scope="layer", end=0.6)
    for step in range(1, STEPS + 1):
        x, label = spirals(128, seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), label).backward()
        optimizer.step()
        if density is not None:
            pruning.after_batch(x, step, STEPS)


def accuracy(model: nn.Module) -> float:
    """Return the share of rows, new ones, whose class is right."""
    x, label = spirals(4000, seed=10**6)
    with torch.inference_mode():
        return (model(x).argmax(1) == label).float().mean().item()


def main() -> list[tuple[str, float, dict[int, float]]]:
    """Train dense and pruned, and print and return name, accuracy, and rows -> microseconds of each."""
    torch.manual_seed(0)
    dense = Net()
    pruned = copy.deepcopy(dense)
    with one_thread():  # as it is timed, and more do not help so small a network
        train(dense)
        train(pruned, DENSITY)
    served = {"dense": dense.eval(), f"blocks, {DENSITY:.0%} kept, frozen": freeze(pruned)}
    us: dict[str, dict[int, float]] = {name: {} for name in served}
    with one_thread(), torch.inference_mode():
        for rows in (1, 128):
            x, _ = spirals(rows, seed=0)
            timed = interleaved({name: partial(m, x) for name, m in served.items()}, rounds=5, round_us=3000)
            for name, timing in timed.items():
                us[name][rows] = timing.median_us
    table = [(name, accuracy(model), us[name]) for name, model in served.items()]
    print(f"{'':<28} {'accuracy':>8} {'1 row, us':>10} {'128 rows, us':>13}")
    for name, share, times in table:
        print(f"{name:<28} {share:>8.1%} {times[1]:>10,.0f} {times[128]:>13,.0f}")
    return table


if __name__ == "__main__":
    main()
