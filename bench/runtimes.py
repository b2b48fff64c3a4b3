"""Runtimes of other projects on a file of ONNX: ONNX Runtime, OpenVINO, and DeepSparse in a Python of its own.

Each is set up before the clock starts: buffers are bound, threads made, for the one shape of the inputs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

DEEPSPARSE_PYTHON = "LT4REC_BENCH_DEEPSPARSE_PYTHON"
DEEPSPARSE_RUN_S = 0.01  # duration of one command to the other process, whose pipe takes about 50 us


class UnavailableError(Exception):
    """An opponent that is only partly installed, or that this processor or this network rules out."""


class Made(NamedTuple):
    """The part of a `Peer` that only its maker knows."""

    run: Callable[[], object]
    scores: Callable[[], Tensor]
    calls: int = 1


class Model(NamedTuple):
    """A file of ONNX, and what enters and leaves it; its output is "y"."""

    path: Path
    inputs: Mapping[str, Tensor]  # in the model's order
    shape: tuple[int, ...]  # of "y", float32
    threads: int
    stack: ExitStack  # for whatever must end with the opponents


def onnxruntime(model: Model) -> Made:
    """Run a session with both ends bound, which leaves no tensor to make in a call."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = model.threads
    # Its threads spin during a call, but not into the next opponent's time.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(model.path, options, providers=["CPUExecutionProvider"])
    y = _result(model)
    ends = {name: ort.OrtValue.ortvalue_from_numpy(x.numpy()) for name, x in model.inputs.items()}
    ends["y"] = ort.OrtValue.ortvalue_from_numpy(y)
    binding = session.io_binding()
    for name in model.inputs:
        binding.bind_ortvalue_input(name, ends[name])
    binding.bind_ortvalue_output("y", ends["y"])
    run = partial(session.run_with_iobinding, binding)
    return Made(run, lambda: _after(run, ends["y"].numpy()))


def quantized(model: Path, path: Path, inputs: Iterable[Mapping[str, Array]], **options: Any) -> Path:
    """Write a model in static int8 as QuantizeLinear pairs: u8 activations, s8 weights with one scale per row.

    Args:
        model: The file of ONNX in float32.
        path: The file to write.
        inputs: What to calibrate with, one batch after the other.
        options: Others of `quantize_static`.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Inputs(CalibrationDataReader):  # type: ignore[misc]
        """The batches in turn."""

        def __init__(self) -> None:
            self.batches = iter(inputs)

        def get_next(self) -> Mapping[str, Array] | None:
            return next(self.batches, None)

    quantize_static(
        model,
        path,
        Inputs(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        **options,
    )
    return path


def openvino(model: Model, precision: str) -> Made:
    """Reuse one request, on memory that it shares with us."""
    import openvino as ov

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": model.threads,
        "NUM_STREAMS": 1,
    }
    compiled = ov.Core().compile_model(model.path, "CPU", settings)
    runs_in = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if runs_in != precision:
        raise UnavailableError(f"OpenVINO runs in {runs_in} on this processor, not in {precision}")
    request = compiled.create_infer_request()
    # The request does not keep what it is given alive: `ends` does.
    ends = {name: ov.Tensor(x.numpy(), shared_memory=True) for name, x in model.inputs.items()}
    ends["y"] = ov.Tensor(_result(model), shared_memory=True)
    for name in model.inputs:
        request.set_tensor(name, ends[name])
    request.set_output_tensor(ends["y"])
    run = partial(request.infer, share_outputs=True)
    return Made(run, lambda: _after(run, ends["y"].data))


def deepsparse(model: Model) -> Made:
    """Run DeepSparse in its own Python; one command makes many calls, so that the pipe's time does not count."""
    python, path = deepsparse_python(), model.path
    x, y, log = (path.with_suffix(suffix) for suffix in (".x.npz", ".y.npy", ".log"))
    np.savez(x, *(part.numpy() for part in model.inputs.values()))
    child = model.stack.enter_context(
        subprocess.Popen(
            [python, "-c", _DEEPSPARSE, str(path), str(x), str(y), str(model.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=model.stack.enter_context(log.open("w")),
            env=os.environ | {"NM_DISABLE_ANALYTICS": "True"},
            text=True,
        )
    )
    assert child.stdin is not None and child.stdout is not None
    commands, answers = child.stdin, child.stdout
    if not answers.readline():
        last = log.read_text().strip().rpartition("\n")[2]
        raise UnavailableError(f"DeepSparse's Python ended with code {child.wait()}: {last}")

    def run(calls: int) -> None:
        print(calls, file=commands, flush=True)
        if not answers.readline():
            raise RuntimeError(f"DeepSparse's Python ended with code {child.wait()}")

    start = time.perf_counter()
    run(8)
    calls = max(1, round(DEEPSPARSE_RUN_S * 8 / (time.perf_counter() - start)))
    return Made(partial(run, calls), lambda: torch.from_numpy(np.load(y)), calls)


def deepsparse_python() -> str:
    """Return DeepSparse's Python, or raise an `UnavailableError`."""
    python = os.environ.get(DEEPSPARSE_PYTHON, "")
    if shutil.which(python) is None:
        raise UnavailableError(f"{DEEPSPARSE_PYTHON} names no Python that has DeepSparse: got {python!r}")
    return python


# Ends when its stdin does. The engine prints a banner on stdout, so the answers go to a copy of it.
_DEEPSPARSE = """
import os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import deepsparse, numpy
model, x, y, threads = sys.argv[1:]
x = list(numpy.load(x).values())
engine = deepsparse.Engine(model, batch_size=len(x[0]), num_cores=int(threads))
numpy.save(y, engine.run(x)[0])
print("ready", file=answers, flush=True)
for calls in sys.stdin:
    for _ in range(int(calls)):
        engine.run(x, val_inp=False)
    print("done", file=answers, flush=True)
"""


def _after(run: Callable[[], object], y: Array) -> Tensor:
    run()
    return torch.from_numpy(y.copy())


def _result(model: Model) -> Array:
    return np.full(model.shape, np.nan, dtype=np.float32)
