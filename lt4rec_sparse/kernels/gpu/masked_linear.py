"""Masked products on a GPU: which kernels run, by shape, and in which arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lt4rec_sparse.kernels.gpu import mask_and_cast, masked_matmul
from lt4rec_sparse.kernels.gpu.launch import has_room
from lt4rec_sparse.masks import pack_words

PATHS = ("triton", "cublas")
# From this number of rows per task on, one kernel masks and casts, then cuBLAS multiplies: decoding costs 4 to 5
# instructions per weight and row tile, and cuBLAS has the better main loop. Predicted, to be measured.
CUBLAS_ROWS = 4096
_forced: list[str] = []  # not a context variable: autograd runs the backward pass of a GPU in a thread of its own


@contextmanager
def forced_path(path: str) -> Iterator[None]:
    """Run every masked product by "triton" or by "cublas": for tests and benchmarks."""
    if path not in PATHS:
        raise ValueError(f"path: got {path!r}, wanted one of {', '.join(PATHS)}")
    _forced.append(path)
    try:
        yield
    finally:
        _forced.pop()


def masked_linear(x: Tensor, weight: Tensor, masks: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`reference.masked_linear` on a GPU."""
    bias = None if bias is None else bias.contiguous()
    parts = (_rows(x), _rows(weight), _words(masks), bias, activation)
    if _path(x, *weight.shape) == "triton":
        return masked_matmul.forward(*parts, precision())
    return mask_and_cast.forward(*parts)


def masked_linear_dgrad(dy: Tensor, weight: Tensor, masks: Tensor, is_shared: bool) -> Tensor:
    """`reference.masked_linear_dgrad` on a GPU."""
    parts = (dy.contiguous(), _rows(weight), _words(masks), is_shared)
    if _path(dy, *weight.shape) == "triton":
        return masked_matmul.dgrad(*parts, precision())
    return mask_and_cast.dgrad(*parts)


def masked_linear_wgrad(dy: Tensor, x: Tensor, masks: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.masked_linear_wgrad` on a GPU."""
    parts = (dy.contiguous(), _rows(x), _words(masks), dtype)
    if _path(dy, dy.shape[2], x.shape[2]) == "triton":
        return masked_matmul.wgrad(*parts, precision())
    return mask_and_cast.wgrad(*parts)


def precision() -> str:
    """Name the arithmetic of float32 products that torch is set to: "ieee", or "tf32" where torch allows it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _path(t: Tensor, out_features: int, in_features: int) -> str:
    """Choose the kernels for one of the operands, `[tasks, rows, features]`."""
    if _forced:
        return _forced[-1]
    # Rows of a width that 16 does not divide are not aligned: the kernels would load them element by element.
    is_aligned = out_features % 16 == 0 and in_features % 16 == 0
    is_for_triton = t.shape[1] < CUBLAS_ROWS and is_aligned and has_room(t.device)
    return "triton" if is_for_triton else "cublas"


def _words(masks: Tensor) -> Tensor:
    return pack_words(masks) if masks.dtype == torch.bool else masks.contiguous()


def _rows(t: Tensor) -> Tensor:
    """Return `t` with neighbouring elements in its rows."""
    return t if t.stride(-1) == 1 else t.contiguous()
