"""What `python -m bench serving` puts behind the server's routes: rankers whose MLP another engine computes, dense.

Encoding and embeddings are the engine's in all of them, in one call, so that only the MLP differs.
`lt4rec_sparse.serve` calls one of the loaders by name, with the artefact's path and a precision, which an opponent
ignores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.runtimes import quantized
from lt4rec_sparse import Ranker, load, to_onnx
from lt4rec_sparse.network import FrozenNetwork
from lt4rec_sparse.nn import SparseMLP
from lt4rec_sparse.serve import examples

CALIBRATION = (16, 256)  # requests, and candidates of each


class Opponent:
    """Another engine in the place of ours: an executor.

    Args:
        network: The network.
        kernel: What runs it.
        run: Writes `x [rows, in_features]`'s scores to `out [rows, tasks]`, on one thread.
    """

    precision = "fp32"  # of the network that it was given

    def __init__(self, network: FrozenNetwork, kernel: str, run: Callable[[Tensor, Tensor], None]) -> None:
        self.network = network
        self.run = run
        self._kernel = kernel

    def kernel_for(self, rows: int) -> str:
        """Name what runs a batch."""
        return self._kernel

    @property
    def prepacked_nbytes(self) -> dict[str, int]:
        """What it holds is its own."""
        return {}


def dense_torch(path: str, precision: str) -> Ranker:
    """Load a ranker whose MLP is torch's, dense, in float32."""
    ranker = load(path)
    mlp = ranker.mlp.to_dense().float().eval()

    @torch.inference_mode()
    def run(x: Tensor, out: Tensor) -> None:
        out.copy_(mlp(x))

    return _with(ranker, "dense torch", run)


def dense_onnx_int8(path: str, precision: str) -> Ranker:
    """Load a ranker whose MLP is ONNX Runtime's, dense, in int8: calibrated, per channel."""
    import onnxruntime as ort
    from onnxruntime.quantization import quant_pre_process

    ranker = load(path)
    requests = examples.made(ranker.encoder, *CALIBRATION)
    with tempfile.TemporaryDirectory() as folder:
        written, prepared, int8 = (Path(folder) / f"{name}.onnx" for name in ("mlp", "prepared", "int8"))
        to_onnx(ranker.mlp, written)
        quant_pre_process(written, prepared, skip_symbolic_shape=True)
        quantized(prepared, int8, [{"x": _inputs(ranker, columns(request)).numpy()} for request in requests])
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(int8, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor, out: Tensor) -> None:
        of_tasks = torch.empty(len(ranker.tasks), len(x), 1)
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, np.float32, tuple(x.shape), x.data_ptr())
        for task, scores in zip(ranker.tasks, of_tasks, strict=True):
            binding.bind_output(task, "cpu", 0, np.float32, tuple(scores.shape), scores.data_ptr())
        session.run_with_iobinding(binding)
        out.copy_(of_tasks[:, :, 0].t())

    return _with(ranker, "dense ONNX Runtime int8", run)


def columns(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a made request as `Ranker.score` takes it."""
    rows = request["candidates"]
    candidates = {name: [row[name] for row in rows] for name in rows[0]}
    return candidates | {name: [value] for name, value in request["context"].items()}


def _with(ranker: Ranker, kernel: str, run: Callable[[Tensor, Tensor], None]) -> Ranker:
    """Return a ranker with another MLP. It takes its inputs from the engine: all else would be timed too."""
    network = ranker.mlp.network
    opponent = Ranker(ranker.encoder, ranker.inputs, SparseMLP(network, executor=Opponent(network, kernel, run)))
    if opponent.mlp.has_engine:
        raise ValueError(f"{kernel}: got a ranker that our engine runs, wanted the opponent's")
    return opponent


@torch.inference_mode()
def _inputs(ranker: Ranker, batch: Mapping[str, Any]) -> Tensor:
    """Return what enters the MLP."""
    x: Tensor = ranker.inputs(ranker.encoder.encode(batch))
    return x
