"""The CPU engine's training: an MLP's kept weights alone, forward and back. See csrc/training.h."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lt4rec_sparse.kernels import cpu

TILE = 128  # columns or rows of single weights whose part of a panel stays in the first cache
_LAYER = struct.Struct("<16q")  # TrainingLayer of csrc/training.h


class Pattern(NamedTuple):
    """Where the weights stand that one task keeps of one layer: blocks of 16 outputs and 4 inputs, or single ones.

    A row is sixteen outputs or one, a column four inputs or one; weights stand row by row, columns ascending. Single
    weights are taken in tiles of `TILE` columns, or rows.
    """

    row_begins: Tensor  # int32 [tiles of columns + 1, rows]: where each row's weights of a tile begin, and at last end
    columns: Tensor  # int32 [count]
    column_begins: Tensor  # int32 [tiles of rows + 1, columns]: the same of the two below
    column_places: Tensor  # int32 [count]: where each of a column's weights stands row by row
    column_rows: Tensor  # int32 [count]: and its row


class Layer(NamedTuple):
    """One hidden layer as the engine trains it: `h = relu(x @ weight.T + bias)`; contiguous float32 tensors."""

    pattern: Pattern
    values: Tensor  # [count, 16, 4] or [count]
    bias: Tensor  # [out_features]
    in_features: int


def forward(layers: Sequence[Layer], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `h [batch, out_features]` for `x [batch, in_features]`, and what `backward` needs: the panels.

    Raises:
        MemoryError: If there is none.
    """
    batch, threads = len(x), torch.get_num_threads()
    x = x if x.stride(1) == 1 else x.contiguous()
    described = _described(layers)
    address = _address(described)
    panels = x.new_empty(cpu.engine().training_floats(address, len(layers), batch))
    h = x.new_empty(batch, len(layers[-1].bias))
    status = cpu.engine().training_forward(
        address, len(layers), x.data_ptr(), x.stride(0), batch, threads, panels.data_ptr(), h.data_ptr(), h.stride(0)
    )
    _check(status)
    return h, panels


def backward(
    layers: Sequence[Layer], panels: Tensor, dh: Tensor, needs_x: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Return the gradients of x (or None), of each layer's values, and of each layer's bias.

    Raises:
        MemoryError: If there is none.
    """
    batch, threads = len(dh), torch.get_num_threads()
    dh = dh if dh.stride(1) == 1 else dh.contiguous()
    values = [torch.empty_like(layer.values) for layer in layers]
    biases = [torch.empty_like(layer.bias) for layer in layers]
    dx = dh.new_empty(batch, layers[0].in_features) if needs_x else None
    described = _described(layers, values, biases)
    status = cpu.engine().training_backward(
        _address(described),
        len(layers),
        panels.data_ptr(),
        dh.data_ptr(),
        dh.stride(0),
        batch,
        threads,
        0 if dx is None else dx.data_ptr(),
        layers[0].in_features,
    )
    _check(status)
    return dx, values, biases


def _described(
    layers: Sequence[Layer], values: Sequence[Tensor | None] = (), biases: Sequence[Tensor | None] = ()
) -> Tensor:
    """Return TrainingLayer[] as bytes, with the gradients' addresses where they are wanted."""
    described = bytearray()
    for i, (pattern, weights, bias, in_features) in enumerate(layers):
        gradients = (0, 0) if not values else (_pointer(values[i]), _pointer(biases[i]))
        pointers = [part.data_ptr() for part in (*pattern, weights, bias)]
        kind = int(weights.dim() == 3)
        tiles = len(pattern.column_begins) - 1, len(pattern.row_begins) - 1
        described += _LAYER.pack(in_features, len(bias), kind, 1, len(weights), *tiles, *pointers, *gradients)
    return torch.frombuffer(described, dtype=torch.uint8)


def _address(described: Tensor) -> int:
    return described.data_ptr()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError("training: got no memory for the gradients of a batch")
