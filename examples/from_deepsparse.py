"""The move from DeepSparse: what its users call, and the same here, line by line.

DeepSparse                                              here
----------                                              ----
engine = Engine("model.onnx", batch_size=64)            served = freeze(model)
engine.run([x])                                         served(torch.from_numpy(x))
Engine(..., num_cores=2)                                torch.set_num_threads(2)
deepsparse.benchmark model.onnx                         print(report(served, example=x))
a model quantised by SparseML                           int8 = served.calibrated(rows).to_precision("int8")
one engine per batch size                               one module for all; what a batch size needs is made on first use

The network comes as a torch module: the one that SparseML pruned, with its zeros, before it was exported (`sparsified`
is the place where yours is loaded). DeepSparse is not needed to run this.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn

from lt4rec_sparse import SparseMLP, freeze, report
from lt4rec_sparse.lottery import project_to_blocks, prune_by_magnitude
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.stopwatch import interleaved, one_thread

SPARSITY = 0.9


def sparsified(granularity: str) -> nn.Sequential:
    """Return a tower as SparseML leaves it: pruned by magnitude, zeros in plain layers."""
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1))
    for layer in (tower[0], tower[2]):
        weights = {"layer": layer.weight.detach()}
        mask = Mask.full({"layer": (layer.out_features, layer.in_features)})
        mask = prune_by_magnitude(weights, mask, round(mask.size * (1 - SPARSITY)))
        if granularity == "16x4":  # train on after this; here it only shows the time
            mask = project_to_blocks(weights, mask).mask
        layer.weight.data *= mask["layer"]
    return tower.eval()


class Engine:
    """DeepSparse's call, `engine.run([x]) -> [y]` of NumPy arrays, for programs that are not to change yet."""

    def __init__(self, model: nn.Module) -> None:
        self.model = freeze(model)

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Return the outputs, of float32 arrays `[batch, features]`."""
        with torch.inference_mode():
            return [self.model(*map(torch.from_numpy, inputs)).numpy()]


def main() -> dict[str, float]:
    """Print and return the microseconds for 64 rows: dense, single weights and blocks, fp32 and int8."""
    rows = torch.randn(1000, 512, generator=torch.Generator().manual_seed(1))
    x = rows[:64]
    engine = Engine(sparsified("weight"))
    y = engine.run([x.numpy()])[0]
    models: dict[str, nn.Module] = {"dense torch": sparsified("weight")}
    for words, granularity in (("single weights", "weight"), ("blocks 16 x 4", "16x4")):
        served = SparseMLP.from_sequential(sparsified(granularity))  # freeze for a whole model; this for one tower
        models |= {
            f"{words}, fp32": served,
            f"{words}, int8": served.calibrated(rows).to_precision("int8"),
        }
    with one_thread(), torch.inference_mode():
        timed = interleaved({n: partial(m, x) for n, m in models.items()}, rounds=5, round_us=3000)
        print(f"{'64 rows, 90 % pruned':<22} {'us':>6} {'largest difference to engine.run':>33}")
        for name, model in models.items():
            against = "" if "blocks" in name else f"{np.abs(model(x).numpy() - y).max():.0e}"  # blocks keep others
            print(f"{name:<22} {timed[name].median_us:>6,.0f} {against:>33}")
        print(report(engine.model, example=x))
    return {name: timing.median_us for name, timing in timed.items()}


if __name__ == "__main__":
    main()
