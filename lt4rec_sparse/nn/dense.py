"""Layers of a frozen MLP as dense matrix products of torch: the opponent that a plan measures the engine against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lt4rec_sparse import ops
from lt4rec_sparse.network import ACTIVATIONS, FrozenNetwork, Slope

Product = Callable[[Tensor], Tensor]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# oneDNN chooses the packed layout for one batch and runs any other with it: as fast, here, as with one of their own.
_PACKED_BATCH = 64


def dense_kernels(precision: str) -> tuple[str, ...]:
    """Name the ways in which this machine's torch multiplies by a dense weight in `precision`.

    Returns:
        Of "dense", `F.linear` as it is, and "onednn", the weight packed by oneDNN and a ReLU in its epilogue.
        None in int8, and none in bf16 where the CPU has no bfloat16 arithmetic: torch emulates it there.
    """
    if precision not in _DTYPES:
        return ()
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if precision == "bf16" and not (has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return ()
    return ("dense", "onednn") if has_onednn else ("dense",)


class DenseRun:
    """One layer for all tasks, its masks multiplied in beforehand: `activation(h @ (weight * mask_task).T + bias)`.

    In bf16 weights, biases and activations are bfloat16, and so is the result: sums are float32 and rounded once.

    Args:
        network: The frozen network.
        index: Which layer. The tasks' layers that read `x` stand in one matrix: one product instead of several.
        kernel: "dense" or "onednn"; one of `dense_kernels(precision)`.
        precision: "fp32" or "bf16".
    """

    def __init__(self, network: FrozenNetwork, index: int, kernel: str, precision: str) -> None:
        dtype = _DTYPES[precision]
        make = packed_product if kernel == "onednn" else _product
        layers = [network.layer(index, task) for task in network.tasks]
        weights = [layer.weight.to(dtype) for layer in layers]
        biases = [
            torch.zeros(len(layer.weight), dtype=dtype) if layer.bias is None else layer.bias.to(dtype)
            for layer in layers
        ]
        activations = [(layer.activation, layer.slope) for layer in layers]
        if index == 0 and len(set(activations)) == 1:
            activation, slope = activations[0]
            slope = torch.cat([slope] * len(layers), -1) if isinstance(slope, Tensor) else slope
            with ops.without_autocast(weights[0]):
                weights, biases, activations = [torch.cat(weights)], [torch.cat(biases)], [(activation, slope)]
        self.nbytes = sum(part.nbytes for part in (*weights, *biases))
        self._products = [
            make(w, b, *activation) for w, b, activation in zip(weights, biases, activations, strict=True)
        ]
        self._dtype = dtype

    def __call__(self, hs: Sequence[Tensor]) -> list[Tensor]:
        """Apply the layer to each task's `[batch, in_features]`, or to one that all tasks read.

        Returns:
            `[batch, out_features]` for each task, or `[batch, tasks * out_features]`; of this layer's dtype.
        """
        hs = [h.to(self._dtype) for h in hs]
        if len(hs) < len(self._products):
            hs *= len(self._products)
        return [product(h) for product, h in zip(self._products, hs, strict=True)]


def _product(weight: Tensor, bias: Tensor, activation: str, slope: Slope = 0.0) -> Product:
    activate = ACTIVATIONS[activation]
    return lambda h: activate(F.linear(h, weight, bias), slope)


def packed_product(weight: Tensor, bias: Tensor, activation: str, slope: Slope = 0.0) -> Product:
    """Return `activation(h @ weight.T + bias)` with the weight packed by oneDNN; "onednn" of `dense_kernels`."""
    # What torch.compile makes of a frozen Linear on the CPU (torch/_inductor/fx_passes/mkldnn_fusion.py).
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_BATCH)
    linear = torch.ops.mkldnn._linear_pointwise.default
    if activation == "relu":  # in oneDNN's epilogue; its sigmoid is another approximation than torch's
        return lambda h: linear(h, packed, bias, "relu", [], "")
    activate = ACTIVATIONS[activation]
    return lambda h: activate(linear(h, packed, bias, "none", [], ""), slope)
