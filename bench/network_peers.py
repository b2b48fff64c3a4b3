"""The opponents of a frozen network: whatever else runs the pruned torch module, each at its best and checked.

Torch runs the module as it is, and compiled with its weights frozen (inductor packs them) and a wrapper in C++, which
costs a small network less than one in Python. ONNX Runtime and OpenVINO get what torch exports. Their int8 is ONNX
Runtime's: dynamic quantisation, as its users would begin, and static, calibrated on what our own int8 is; weights have
one scale per channel in both. Only products with weights are quantised, here as in ours.

Each reads the newest opset that serves it: `OPSET`, or the `OLD_OPSET` that DeepSparse ends at. Static int8 is made
from the older one too: where LayerNormalization is one operator, ONNX Runtime's tool rounds its result to 8 bits for
the residual connection as well, which the gate refuses. Both runtimes fuse the older operators when they load a file.

DeepSparse runs the exported module sparse in fp32. Its sparse int8 needs a graph that SparseML exports from a network
that it trained; `bench/wide.py` has layers of that form.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import runtimes
from bench.network_gate import ROWS, Inputs
from bench.peers import Maker
from bench.runtimes import Made, Model

OPSET = 20  # the newest that torch exports with operators of its own: LayerNormalization and Gelu are one each
OLD_OPSET = 14  # the newest that DeepSparse 1.8 reads, and the oldest with scaled_dot_product_attention


class NetworkCase(NamedTuple):
    """What an opponent is built from."""

    model: nn.Module  # pruned weights are zeros in place
    inputs: Inputs
    seen: Sequence[Inputs]  # representative ones, of the same shapes
    threads: int
    folder: Path  # for exported models, which do not depend on the threads
    stack: ExitStack  # for whatever must end with the opponents


def first_rows(scores: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return only the rows that the gate knows."""
    return lambda: scores()[:ROWS].clone()


def _torch(case: NetworkCase) -> Made:
    run = partial(case.model, *case.inputs)
    return Made(run, first_rows(run))


def _compiled(case: NetworkCase) -> Made:
    torch._dynamo.reset()  # nothing that was compiled before is needed again
    options = {"freezing": True, "cpp_wrapper": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about itself
        run = partial(torch.compile(case.model, options=options, dynamic=False), *case.inputs)
        run()
    return Made(run, first_rows(run))


def _exported(case: NetworkCase, opset: int = OPSET) -> Path:
    """Export the network, for one batch size."""
    path = case.folder / f"network{opset}.onnx"
    if not path.exists():
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")  # this exporter is deprecated; the new one cannot go below opset 18
            torch.onnx.export(
                case.model,
                tuple(x.clone() for x in case.inputs),
                path,
                dynamo=False,
                opset_version=opset,
                input_names=list(_named(case.inputs)),
                output_names=["y"],
            )
    return path


def _prepared(case: NetworkCase, opset: int) -> Path:
    from onnxruntime.quantization import quant_pre_process

    path = case.folder / f"prepared{opset}.onnx"
    if not path.exists():
        quant_pre_process(_exported(case, opset), path, skip_symbolic_shape=True)
    return path


def _dynamic_int8(case: NetworkCase) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = case.folder / "dynamic.onnx"
    if not path.exists():
        quantize_dynamic(
            _prepared(case, OPSET),
            path,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
    return path


def _static_int8(case: NetworkCase) -> Path:
    path = case.folder / "static.onnx"
    if not path.exists():
        runtimes.quantized(
            _prepared(case, OLD_OPSET),
            path,
            [{name: x.numpy() for name, x in _named(some).items()} for some in case.seen],
            op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"MatMulConstBOnly": True},
        )
    return path


def _deepsparse(case: NetworkCase) -> Made:
    runtimes.deepsparse_python()
    return _in(runtimes.deepsparse, partial(_exported, opset=OLD_OPSET))(case)


def _in(runtime: Callable[[Model], Made], model: Callable[[NetworkCase], Path]) -> Callable[[NetworkCase], Made]:
    def make(case: NetworkCase) -> Made:
        shape = tuple(case.model(*case.inputs).shape)
        made = runtime(Model(model(case), _named(case.inputs), shape, case.threads, case.stack))
        return made._replace(scores=first_rows(made.scores))

    return make


def _named(inputs: Inputs) -> dict[str, Tensor]:
    return {f"x{i}": x for i, x in enumerate(inputs)}


_openvino = partial(runtimes.openvino, precision="f32")
MAKERS: dict[str, Maker[Any]] = {
    "torch fp32": ("fp32", "dense", _torch),
    "torch compiled fp32": ("fp32", "dense", _compiled),
    "onnxruntime fp32": ("fp32", "dense", _in(runtimes.onnxruntime, _exported)),
    "openvino fp32": ("fp32", "dense", _in(_openvino, _exported)),
    "onnxruntime dynamic int8": ("int8", "dense", _in(runtimes.onnxruntime, _dynamic_int8)),
    "onnxruntime static int8": ("int8", "dense", _in(runtimes.onnxruntime, _static_int8)),
    "openvino static int8": ("int8", "dense", _in(_openvino, _static_int8)),
    "deepsparse fp32": ("fp32", "sparse", _deepsparse),
}
