"""The move from DeepSparse: what its users call, and the same here, line by line.

DeepSparse                                              here
----------                                              ----
engine = Engine("model.onnx", batch_size=64)            served = from_onnx("model.onnx")
the network before it was exported                      served = freeze(model)
engine.run([x])                                         served(torch.from_numpy(x))
Engine(..., num_cores=2)                                torch.set_num_threads(2)
deepsparse.benchmark model.onnx                         print(report(served, example=torch.from_numpy(x)))
a model quantised by SparseML                           int8 = freeze(model, precision="int8", example=rows)
one engine per batch size                               one module for all; what a batch size needs is made on first use

`model` is the torch module that SparseML pruned, with its zeros (`sparsified` is the place where yours is loaded), and
`rows` are some thousand of its inputs. A file that quantises activations brings its own calibration:
`from_onnx("model.onnx", "int8")`. Reading files needs the extra `onnx`. DeepSparse is not needed to run this.
"""

from __future__ import annotations

import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lt4rec_sparse import SparseMLP, freeze, from_onnx, report, to_onnx
from lt4rec_sparse.lottery import project_to_blocks, prune_by_magnitude
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.stopwatch import interleaved, one_thread

SPARSITY = 0.9
HAS_ONNX = all(find_spec(name) is not None for name in ("onnx", "onnxruntime"))  # the extra


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


def through_onnx(model: nn.Sequential) -> nn.Module:
    """Return the model as its ONNX file has it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        to_onnx(SparseMLP.from_sequential(model), path)  # your exporter's place
        return from_onnx(path)


def main() -> dict[str, float]:
    """Print and return the microseconds for 64 rows: dense, single weights and blocks, fp32 and int8."""
    rows = torch.randn(1000, 512, generator=torch.Generator().manual_seed(1))
    x = rows[:64]
    engine = Engine(sparsified("weight"))
    y = engine.run([x.numpy()])[0]
    models: dict[str, nn.Module] = {"dense torch": sparsified("weight")}
    for words, granularity in (("single weights", "weight"), ("blocks 16 x 4", "16x4")):
        model = sparsified(granularity)
        models |= {
            f"{words}, fp32": freeze(model),
            f"{words}, int8": freeze(model, precision="int8", example=rows),
        }
    if HAS_ONNX:
        models["from model.onnx, fp32"] = through_onnx(sparsified("weight"))
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
