"""The package without Triton, as on a CPU build of torch; and with it, that nothing imports it before it is needed."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
"""

SERVE = """
import sys
import torch
import lt4rec_sparse

heavy = {"triton", "pyarrow", "matplotlib"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()

import lt4rec_sparse.nn
import lt4rec_sparse.ranker

mlp = lt4rec_sparse.MaskedMLP(8, hidden=(6, 4), tasks=("ctr", "cvr"))
mlp.layers[0].set_mask(torch.rand(6, 8) < 0.5, "ctr")
x = torch.randn(5, 8)
mlp(x).sum().backward()
with torch.autocast("cpu", dtype=torch.bfloat16):
    mlp(x, "cvr").sum().backward()
assert lt4rec_sparse.freeze(mlp, sigmoid=True)(x).shape == (5, 2)
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()

import lt4rec_sparse.cli

assert not {"triton", "matplotlib"} & sys.modules.keys()
"""

TRAIN = """
from lt4rec_sparse.nn.optim import MaskedAdam  # torch's optimisers import torch._dynamo, and it imports Triton

before = mlp.layers[0].weight.detach().clone()
optimiser = MaskedAdam(mlp)
mlp(x, "ctr").sum().backward()
optimiser.step("ctr")
kept = mlp.layers[0].mask("ctr")
assert torch.equal(mlp.layers[0].weight[~kept], before[~kept])
assert not torch.equal(mlp.layers[0].weight, before)
assert lt4rec_sparse.freeze(mlp, sigmoid=True)(x).shape == (5, 2)
assert "lt4rec_sparse.kernels.gpu.masked_linear" not in sys.modules
"""


def run(script):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_without_triton_it_trains_freezes_and_scores():
    run(BLOCK + SERVE + TRAIN + "assert 'triton' not in sys.modules")


@pytest.mark.heavy
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_nothing_imports_triton_before_a_gpu_needs_it():
    run(SERVE + TRAIN)
