"""`from_onnx` and `to_onnx`: the doors, which find what they need when they are called."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from onnx import ModelProto

    from lt4rec_sparse.ranker import Ranker


def from_onnx(source: str | Path | ModelProto, precision: str = "fp32") -> nn.Module:
    """Return a pruned ONNX network as a module, its pruned linear layers compressed.

    The module computes what the graph does, within rounding. By the rule of `freeze` the engine takes Gemm and MatMul
    by constant float32 weights of which at least half is zero, with what is right behind them: a bias, one activation,
    BatchNormalization of `[batch, features]`; and the layers between such, in one call. Weights may be initializers,
    sparse ones too (what they store is kept), constants, or computed from those, as by DequantizeLinear.

    - If that is the whole graph, the result is a `SparseMLP`.
    - Otherwise it is an `OnnxModule`: ONNX Runtime computes what is left, in as few parts as possible. It takes the
      graph's inputs in order or by name, and returns the output, or a tuple of them.

    `report` tells of each call of the engine. Initializers that are graph inputs too are constants. What quantises
    activations, and products of integers, stay in ONNX Runtime.

    Args:
        source: A file, or an `onnx.ModelProto` with all its data.
        precision: How the engine computes: "fp32", "bf16" or "int8". For int8 the file must quantise and dequantise
            what enters each layer of a call, to 8 bits by one scale: that is then its calibration, and the pairs
            between the layers are left out. The engine quantises weights by row anew.

    Raises:
        ImportError: If the extra `onnx` is not installed.
        TypeError: If `source` is neither.
        FileNotFoundError: If there is no such file.
        InputError: If the model is damaged, ONNX Runtime does not run it, no linear layer of it is pruned, an input or
            output is no tensor that torch has, there is no such precision, or the file does not quantise what enters a
            layer that int8 is wanted of.
    """
    _check_extra()
    from lt4rec_sparse.onnx.reader import read

    return read(source, precision)


def to_onnx(module: nn.Module | Ranker, path: str | Path | None = None, *, sparse: bool = False) -> ModelProto:
    """Return a frozen MLP or a whole ranker as an ONNX model of float32, and write it as a file if there is a path.

    The model computes what the module does, within rounding; but a dense weight multiplies its zeros too, so that an
    `x` of inf or NaN gives NaN where the module leaves it out. There is one output per task, named for it.

    - Of a `SparseMLP` or `SparseLinear` the input is `x [batch, in_features]`, and each output `[batch, out_features]`.
    - Of a `Ranker` there is an input per field, named for its column, as `Ranker.to_dense` has them: int64 `[batch]`,
      or `[batch, values]` of a multi-valued one, filled up with -1; raw numbers are one more input, `numbers`, float32
      `[batch, numbers]`. Each output is `[batch]`. Strings and numbers are encoded outside, by `ranker.encoder`.

    Args:
        module: What to write.
        path: The file, written whole or not at all; its folder exists.
        sparse: Whether pruned weights are stored as sparse initializers, which keep zeros that are kept. They take 12
            bytes per kept weight: less than dense ones where less than a third is kept. Not every runtime reads them.

    Raises:
        ImportError: If the extra `onnx` is not installed.
        TypeError: If `module` is none of these; a model around sparse layers is not written.
        ValueError: If it has another precision than fp32, a task and a column have one name, or the model is larger
            than the 2 GB that ONNX files hold.
    """
    _check_extra()
    from lt4rec_sparse.onnx.export import write

    return write(module, path, sparse)


def _check_extra() -> None:
    absent = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if absent:
        wanted = "the extra: pip install 'lt4rec-sparse[onnx]'"
        raise ImportError(f"{' and '.join(absent)}: got no such package, wanted {wanted}")
