"""The sparse MLP of all tasks: schemas, checks, shape rules and dispatch.

On the CPU it is the native engine of `csrc/`; tests and benchmarks force one of the engine's instruction sets through
`kernels.cpu.forced_isa`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lt4rec_sparse import network
from lt4rec_sparse.formats import SharedWeight
from lt4rec_sparse.kernels import cpu, reference

PRECISIONS = cpu.PRECISIONS  # what `prepack` can make
Network = cpu.Network  # `sparse_mlp_out` of one prepacked network, with all looked up that does not change
X_DTYPES = (torch.float32, torch.bfloat16)  # what `sparse_mlp` reads, in every precision

_library = torch.library.Library("lt4rec_sparse", "FRAGMENT")
_library.define("sparse_mlp(Tensor x, Tensor prepacked, int outputs) -> Tensor")
_library.define("sparse_mlp_gpu(Tensor x, Tensor[] parts, str layout, int outputs) -> Tensor")


class SparseLayer(NamedTuple):
    """One layer of a frozen MLP for all tasks: `activation(x @ (weight * mask_task).T + bias)`.

    `bias` is `[out_features]`, or None; `activation` is "none", "relu" or "sigmoid".
    """

    weight: SharedWeight
    bias: Tensor | None
    activation: str


class Codes(NamedTuple):
    """How int8 counts the activations that enter a layer: `code = round(x / scale) + zero_point`, within 0 to 255."""

    scale: float  # above 0
    zero_point: int  # 0 to 255


def prepack(
    tasks: Sequence[Sequence[tuple[SparseLayer, str]]],
    precision: str = "fp32",
    codes: Sequence[Sequence[Codes]] | None = None,
) -> Tensor | None:
    """Make what this machine's sparse MLP kernel wants from the canonical weights; once, at load.

    Args:
        tasks: For each task its layers, each with the name of the task whose plane of the weight it reads.
        precision: "fp32"; "bf16": weights and the activations that enter a layer rounded to bfloat16, summed in
            float32; "int8": weights as signed 8-bit codes with a scale for each output feature, activations as
            unsigned 8-bit codes, summed exactly.
        codes: For each task and layer, how its input is counted, `x` alike for all tasks; "int8" needs them, others
            pass over them.

    Returns:
        uint8, private to the kernel; or None without the native engine (one warning: the reference serves instead,
        more slowly).

    Raises:
        ValueError: If there is no such precision, "int8" comes without codes or with several for `x`, or a layer
            cannot have it.
    """
    layers = _with_codes(tasks, precision, codes)
    if not cpu.is_available():
        warnings.warn(
            f"the native CPU engine is absent ({cpu.absence_reason()}): sparse MLPs run dense in torch",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return cpu.prepack([[_pack_layer(*layer) for layer in path] for path in layers], precision)


def sparse_mlp(x: Tensor, prepacked: Tensor, outputs: int) -> Tensor:
    """Run all tasks' sparse MLPs over one `x`, in one call: `h = activation(h @ (weight * mask_task).T + bias)`.

    Inference only. A pruned weight does not read its activation: `0 * inf` is not formed, where a dense product of
    masked weights would give NaN.

    Args:
        x: `[batch, in_features]`, float32 or bfloat16 on the CPU; rows may be strided.
        prepacked: What `prepack` made, uint8; it decides the precision.
        outputs: The sum of the tasks' last `out_features`, as prepacked.

    Returns:
        `[batch, outputs]`, float32; the tasks side by side, in the order of `prepack`.

    Raises:
        ValueError: If `x` is not `[batch, in_features]`.
        TypeError: If `x` is not float32 or bfloat16 on the CPU.
    """
    if x.dim() != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [batch, in_features]")
    if x.dtype not in X_DTYPES or x.device.type != "cpu":
        raise TypeError(f"x: got {x.dtype} on {x.device}, wanted torch.float32 or torch.bfloat16 on cpu")
    return cast(Tensor, torch.ops.lt4rec_sparse.sparse_mlp(x, prepacked, outputs))


def sparse_mlp_out(x: Tensor, prepacked: Tensor, out: Tensor) -> None:
    """Run `sparse_mlp` into memory that is there already, without the boundary of an operator.

    For small requests, whose time is mostly Python's: autograd, `torch.compile` and fake tensors do not see it. Who
    calls often makes a `Network` of it: `Network(prepacked).sparse_mlp(x, out)`.

    Args:
        x: `[batch, in_features]`, float32 or bfloat16 on the CPU; rows may be strided, elements of a row not.
        prepacked: What `prepack` made.
        out: `[batch, outputs]`, float32 on the CPU; rows may be strided. Must not overlap `x`.

    Raises:
        ValueError: If a shape, dtype, device or stride is another.
    """
    cpu.sparse_mlp(x, prepacked, out)


class GpuParts(NamedTuple):
    """What `sparse_mlp_gpu` runs: a frozen MLP as prepacked for one chain of GPU kernels."""

    parts: list[Tensor]
    layout: str  # private to the kernels: how the parts make a network
    in_features: int
    outputs: int


def prepack_gpu(
    tasks: Sequence[Sequence[tuple[SparseLayer, str]]], dtype: torch.dtype, device: torch.device
) -> GpuParts:
    """Make what `sparse_mlp_gpu` runs from the canonical weights, in the ways predicted to be fastest; once, at load.

    Args:
        tasks: As in `prepack`.
        dtype: Of weights and activations: float32, float16 or bfloat16. Sums are float32.
        device: Whose kernels run it.
    """
    from lt4rec_sparse.kernels.gpu import network as kernels

    frozen = _network(tasks)
    parts, layout = kernels.flatten(kernels.predicted(frozen, dtype, device))
    return GpuParts(parts, layout, frozen.in_features, frozen.outputs)


def sparse_mlp_gpu(x: Tensor, prepacked: GpuParts) -> Tensor:
    """Run all tasks' frozen MLPs on a GPU, in one operator: `h = activation(h @ (weight * mask_task).T + bias)`.

    Inference only. Who serves small requests captures it: `nn.gpu.GpuMLP` holds a CUDA graph for each batch size.

    Args:
        x: `[batch, in_features]`, float32, float16 or bfloat16; cast to the prepacked dtype.
        prepacked: What `prepack_gpu` made, on the device of `x`.

    Returns:
        `[batch, outputs]`, float32; the tasks side by side.

    Raises:
        ValueError: If `x` is not `[batch, in_features]`.
        TypeError: If `x` is of another dtype.
    """
    parts, layout, in_features, outputs = prepacked
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [batch, {in_features}]")
    if x.dtype not in (*X_DTYPES, torch.float16):
        raise TypeError(f"x: got {x.dtype}, wanted torch.float32, torch.float16 or torch.bfloat16")
    return cast(Tensor, torch.ops.lt4rec_sparse.sparse_mlp_gpu(x, parts, layout, outputs))


def _network(tasks: Sequence[Sequence[tuple[SparseLayer, str]]]) -> network.FrozenNetwork:
    hidden, heads = [], {}
    for of_layer in zip(*tasks, strict=True):
        layer, _ = of_layer[0]
        if [name for _, name in of_layer] == list(layer.weight.tasks):
            hidden.append(network.SparseLayer(*layer))
        else:
            names = [name for _, name in tasks[0]] if len(tasks) == 1 else hidden[0].weight.tasks
            for task, (head, plane) in zip(names, of_layer, strict=False):
                heads[task] = network.DenseLayer(head.weight.to_dense(plane), *head[1:])
    return network.FrozenNetwork(tuple(hidden), heads)


def cpu_engine() -> str:
    """Name what runs `sparse_mlp` on this machine's CPU: an instruction set of the native engine, or "reference"."""
    return cpu.isa() if cpu.is_available() else "reference"


def sparse_mlp_dense(
    x: Tensor,
    tasks: Sequence[Sequence[tuple[SparseLayer, str]]],
    precision: str = "fp32",
    codes: Sequence[Sequence[Codes]] | None = None,
) -> Tensor:
    """Run the reference of `sparse_mlp` on the canonical weights, dense: where there is no kernel for the device.

    Args:
        x: `[batch, in_features]`, float32 or bfloat16.
        tasks: As in `prepack`.
        precision: As in `prepack`.
        codes: As in `prepack`.

    Returns:
        `[batch, outputs]`, float32.

    Raises:
        ValueError: If there is no such precision, or "int8" comes without codes or with several for `x`.
        TypeError: If `x` is neither float32 nor bfloat16.
    """
    if x.dtype not in X_DTYPES:
        raise TypeError(f"x: got {x.dtype}, wanted torch.float32 or torch.bfloat16")
    paths = _with_codes(tasks, precision, codes)
    return reference.sparse_mlp(x.float(), [[_dense_layer(x, *layer) for layer in path] for path in paths], precision)


def layer_inputs(x: Tensor, layers: Sequence[tuple[SparseLayer, str]]) -> Iterator[Tensor]:
    """Yield what enters each layer of one task's MLP, in the float32 of the reference; `x` comes first.

    Args:
        x: `[batch, in_features]`.
        layers: One element of `prepack`'s `tasks`.
    """
    for layer, task in layers:
        yield x
        x = reference.sparse_mlp(x.float(), [[_dense_layer(x, layer, task, None)]])


def _with_codes(
    tasks: Sequence[Sequence[tuple[SparseLayer, str]]], precision: str, codes: Sequence[Sequence[Codes]] | None
) -> list[list[tuple[SparseLayer, str, Codes | None]]]:
    """Return each task's layers with their codes, in int8, and without them otherwise."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    if precision != "int8":
        return [[(*layer, None) for layer in layers] for layers in tasks]
    if codes is None:
        raise ValueError("codes: got None, wanted codes for each task and layer, as int8 needs them")
    if len({of_task[0] for of_task in codes}) > 1:  # x becomes codes once
        raise ValueError(f"codes: got {[of_task[0] for of_task in codes]} for x, wanted the same for all tasks")
    pairs = zip(tasks, codes, strict=True)
    return [[(*layer, code) for layer, code in zip(*pair, strict=True)] for pair in pairs]


def _pack_layer(layer: SparseLayer, task: str, codes: Codes | None) -> cpu.PackLayer:
    csr = layer.weight.csr(task)
    bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
    parts = (csr.crow_indices, csr.col_indices, csr.values.float(), bias)
    return cpu.PackLayer(*parts, csr.shape[1], layer.activation, *(codes or ()))


def _dense_layer(x: Tensor, layer: SparseLayer, task: str, codes: Codes | None) -> reference.DenseLayer:
    weight = layer.weight.to_dense(task).to(x.device, torch.float32)
    bias = None if layer.bias is None else layer.bias.to(x.device, torch.float32)
    return reference.DenseLayer(weight, bias, layer.activation, *([] if codes is None else [codes]))


def _sparse_mlp_cpu(x: Tensor, prepacked: Tensor, outputs: int) -> Tensor:
    rows = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(x.shape[0], outputs, dtype=torch.float32)
    cpu.sparse_mlp(rows, prepacked, y)
    return y


_library.impl("sparse_mlp", _sparse_mlp_cpu, "CPU")


@torch.library.register_fake("lt4rec_sparse::sparse_mlp")
def _sparse_mlp_fake(x: Tensor, prepacked: Tensor, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs, dtype=torch.float32)


def _sparse_mlp_gpu(x: Tensor, parts: Sequence[Tensor], layout: str, outputs: int) -> Tensor:
    from lt4rec_sparse.kernels.gpu import network as kernels

    return kernels.unflatten(parts, layout)(x)


_library.impl("sparse_mlp_gpu", _sparse_mlp_gpu, "CUDA")


@torch.library.register_fake("lt4rec_sparse::sparse_mlp_gpu")
def _sparse_mlp_gpu_fake(x: Tensor, parts: Sequence[Tensor], layout: str, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs, dtype=torch.float32)


def _sparse_mlp_backward(ctx: Any, dy: Tensor) -> None:
    raise RuntimeError("sparse_mlp: got a backward pass, wanted inference only: train the MaskedMLP it was frozen from")


torch.library.register_autograd("lt4rec_sparse::sparse_mlp", _sparse_mlp_backward)
torch.library.register_autograd("lt4rec_sparse::sparse_mlp_gpu", _sparse_mlp_backward)
