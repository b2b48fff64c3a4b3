"""The only door to the kernels: every operation's schema, checks, shape rule and gradient, written once.

The device picks the kernel. `masked_linear` is eager torch on the CPU and Triton or cuBLAS on a GPU (`kernels.gpu`);
`sparse_mlp` is the native engine of `csrc/` on the CPU. Tests and benchmarks force one of the engine's instruction sets
through `kernels.native.forced_isa`, and a way to a masked product through `kernels.gpu.forced_path`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lt4rec_sparse.formats import SharedWeight
from lt4rec_sparse.kernels import cpu, reference

PRECISIONS = cpu.PRECISIONS  # what `prepack` can make
Network = cpu.Network  # `sparse_mlp_out` of one prepacked network, with all looked up that does not change
X_DTYPES = (torch.float32, torch.bfloat16)  # what `sparse_mlp` reads, in every precision

_library = torch.library.Library("lt4rec_sparse", "DEF")
_library.define(
    "masked_linear(Tensor x, Tensor weight, Tensor masks, Tensor? bias, SymInt[] starts, SymInt[] lengths,"
    " str activation) -> Tensor"
)
_library.define(
    "masked_linear_dgrad(Tensor dy, Tensor weight, Tensor masks, SymInt[] starts, SymInt[] lengths, SymInt rows)"
    " -> Tensor"
)
_library.define(
    "masked_linear_wgrad(Tensor dy, Tensor x, Tensor masks, SymInt[] starts, SymInt[] lengths, ScalarType dtype)"
    " -> Tensor"
)
_library.define("sparse_mlp(Tensor x, Tensor prepacked, int outputs) -> Tensor")
_library.define("sparse_mlp_gpu(Tensor x, Tensor[] parts, str layout, int outputs) -> Tensor")


def masked_linear(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Apply a linear layer through a mask: `y = activation(x @ (weight * mask).T + bias)`.

    A pruned weight contributes nothing and receives no gradient, whatever its value:
    `dW = (dy.T @ x) * mask`. Under autocast `x` takes the lower dtype, and so does the product; the weight is cast
    where it is read, and its gradient keeps its dtype.

    Args:
        x: `[..., in_features]`; float64, float32, float16 or bfloat16.
        weight: `[out_features, in_features]`, dtype of `x`, or float32 beside float16 and bfloat16; device of `x`.
        mask: `[out_features, in_features]`, bool, True keeps the weight; or its `masks.pack_words`, which a GPU reads
            without packing it first.
        bias: `[out_features]`, dtype and device of the weight.
        activation: "none" or "relu", in the same kernel.

    Returns:
        `[..., out_features]`, dtype of `x`.

    Raises:
        ValueError: If a shape, dtype or device disagrees, or there is no such activation.

    Source: LT4REC (arXiv 2008.09872), section 2.2, `sNET * mask`.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.ones(1, 3)
        >>> masked_linear(x, weight, torch.tensor([[True, False, True]])).tolist()
        [[2.0], [2.0]]
    """
    x = _autocast(x)
    if mask.dim() != 2:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, wanted [out_features, in_features]")
    _check_masked_linear(x, weight, mask[None], bias, activation)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = torch.ops.lt4rec_sparse.masked_linear(rows, weight, mask[None], bias, [0], [rows.shape[0]], activation)
    return cast(Tensor, y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0]))


def masked_linear_tasks(
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    bias: Tensor | None,
    starts: Sequence[int],
    lengths: Sequence[int],
    activation: str = "none",
) -> Tensor:
    """Apply a linear layer through every task's mask, each to its own range of rows: `masked_linear`, tasks at once.

    The ranges may overlap, as where all tasks read the same `x`. Of a batch with rows of one task alone, order it
    [only a | both | only b], and each task has one range. The gradients of `x` and of the weight are the sums over the
    tasks, always in the same order.

    Args:
        x: `[rows, in_features]`, as in `masked_linear`.
        weight: As in `masked_linear`.
        masks: `[tasks, out_features, in_features]`, bool, or their `pack_words`.
        bias: As in `masked_linear`; one for all tasks.
        starts: Where each task's rows start in `x`.
        lengths: How many they are.
        activation: As in `masked_linear`.

    Returns:
        `[sum of lengths, out_features]`, dtype of `x`: the tasks' rows one after another.

    Raises:
        ValueError: As `masked_linear`, or if a range is not inside `x`.

    Example:
        >>> x, weight, masks = torch.ones(3, 2), torch.ones(1, 2), torch.tensor([[[True, False]], [[True, True]]])
        >>> masked_linear_tasks(x, weight, masks, None, starts=(0, 1), lengths=(2, 2)).flatten().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    x = _autocast(x)
    if x.dim() != 2 or masks.dim() != 3:
        raise ValueError(
            f"x and masks: got shapes {tuple(x.shape)} and {tuple(masks.shape)}, wanted [rows, in_features] and "
            "[tasks, out_features, in_features]"
        )
    _check_masked_linear(x, weight, masks, bias, activation)
    if not len(masks) == len(starts) == len(lengths):
        raise ValueError(f"starts, lengths: got {len(starts)} and {len(lengths)}, wanted {len(masks)}, one a task")
    for start, length in zip(starts, lengths, strict=True):
        if start < 0 or length < 0 or start + length > x.shape[0]:
            raise ValueError(f"range: got {length} rows from {start} on, wanted some of the {x.shape[0]} rows of x")
    y = torch.ops.lt4rec_sparse.masked_linear(x, weight, masks, bias, list(starts), list(lengths), activation)
    return cast(Tensor, y)


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
    kernels = importlib.import_module("lt4rec_sparse.kernels.gpu.gpu_network")
    layers = gpu_layers(tasks)
    network = kernels.prepack(layers, kernels.default_chain(layers, dtype, device), dtype, device)
    parts, layout = kernels.flatten(network)
    outputs = sum(path[-1][0].weight.shape[0] for path in tasks)
    return GpuParts(parts, layout, tasks[0][0][0].weight.shape[1], outputs)


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


def gpu_layers(tasks: Sequence[Sequence[tuple[SparseLayer, str]]]) -> list[Any]:
    """Return the layers as `kernels.gpu_network.Layer`: dense on the CPU, all tasks of a layer together, aligned.

    Args:
        tasks: As in `prepack`; layer by layer as wide for every task.
    """
    kernels = importlib.import_module("lt4rec_sparse.kernels.gpu.gpu_network")
    layers = []
    for of_layer in zip(*tasks, strict=True):
        weights = [layer.weight for layer, _ in of_layer]
        is_shared = all(weight is weights[0] for weight in weights)
        dense = weights[0].to_dense().float() if is_shared else None
        biases = [
            torch.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.detach().float()
            for layer, _ in of_layer
        ]
        layers.append(
            kernels.Layer(
                dense,
                torch.stack([layer.weight.to_dense(task).float() for layer, task in of_layer]),
                torch.stack([layer.weight.mask(task) for layer, task in of_layer]),
                torch.stack(biases),
                of_layer[0][0].activation,
            )
        )
    return cast(list[Any], kernels.align(layers))


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


def _autocast(x: Tensor) -> Tensor:
    """Return `x` as autocast wants the operands of a matrix product."""
    if x.dtype != torch.float64 and _is_autocast(x):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _is_autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which operations on the device of `x` take the dtypes that they are given."""
    return torch.autocast(x.device.type, enabled=False) if _is_autocast(x) else nullcontext()


def _check_masked_linear(x: Tensor, weight: Tensor, masks: Tensor, bias: Tensor | None, activation: str) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted [out_features, in_features]")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., {weight.shape[1]}], the weight's in_features")
    if masks.dtype not in (torch.bool, torch.int32):
        raise ValueError(f"mask: got {masks.dtype}, wanted torch.bool, True = kept, or the int32 of pack_words")
    n, k = weight.shape
    wanted = (n, k) if masks.dtype == torch.bool else (n, 4 * -(-k // 128))
    if masks.shape[1:] != wanted:
        raise ValueError(f"mask: got shape {tuple(masks.shape[1:])}, wanted {tuple(wanted)}, that of the weight")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, wanted ({weight.shape[0]},), the weight's out_features")
    is_mixed = weight.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)
    if weight.dtype != x.dtype and not is_mixed:
        raise ValueError(f"weight: got {weight.dtype}, wanted {x.dtype}, that of x")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias: got {bias.dtype}, wanted {weight.dtype}, that of the weight")
    for name, other in (("weight", weight), ("mask", masks), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: got device {other.device}, wanted {x.device}, that of x")
    if activation not in ("none", "relu"):
        raise ValueError(f"activation: got {activation!r}, wanted none or relu")


def _on_gpu(name: str) -> Callable[..., Tensor]:
    """Return the GPU's kernel; it is imported when it is first called, since CPU builds of torch have no Triton."""
    specification = getattr(reference, name)

    def run(first: Tensor, *rest: Any) -> Tensor:
        if first.dtype == torch.float64:  # for checks of gradients: the kernels sum in float32
            return cast(Tensor, specification(first, *rest))
        kernel = getattr(importlib.import_module("lt4rec_sparse.kernels.gpu.masked_linear"), name)
        return cast(Tensor, kernel(first, *rest))

    return run


def _as_it_is(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the kernel without autocast: the dtypes were chosen at the door, and a gradient's are its forward's."""

    def run(first: Tensor, *rest: Any) -> Tensor:
        with without_autocast(first):
            return kernel(first, *rest)

    return run


for _name in ("masked_linear", "masked_linear_dgrad", "masked_linear_wgrad"):
    _library.impl(_name, _as_it_is(getattr(reference, _name)), "CompositeExplicitAutograd")
    _library.impl(_name, _as_it_is(_on_gpu(_name)), "CUDA")


@torch.library.register_fake("lt4rec_sparse::masked_linear")
def _masked_linear_fake(
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    bias: Tensor | None,
    starts: Sequence[int],
    lengths: Sequence[int],
    activation: str,
) -> Tensor:
    return x.new_empty(sum(lengths), weight.shape[0])


@torch.library.register_fake("lt4rec_sparse::masked_linear_dgrad")
def _masked_linear_dgrad_fake(
    dy: Tensor, weight: Tensor, masks: Tensor, starts: Sequence[int], lengths: Sequence[int], rows: int
) -> Tensor:
    return dy.new_empty(rows, weight.shape[1])


@torch.library.register_fake("lt4rec_sparse::masked_linear_wgrad")
def _masked_linear_wgrad_fake(
    dy: Tensor, x: Tensor, masks: Tensor, starts: Sequence[int], lengths: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype)


def _masked_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, masks, bias, ctx.starts, ctx.lengths, activation = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    # Of a ReLU the result tells where its gradient passes. weight * mask is formed again, and never kept.
    ctx.save_for_backward(x, weight, masks, *([output] if activation == "relu" else []))


def _masked_linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, masks, *outputs = ctx.saved_tensors
    if outputs:
        dy = torch.ops.aten.threshold_backward(dy, outputs[0], 0)
    needs_x, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
    rows, ranges = x.shape[0], (ctx.starts, ctx.lengths)
    return (
        torch.ops.lt4rec_sparse.masked_linear_dgrad(dy, weight, masks, *ranges, rows) if needs_x else None,
        torch.ops.lt4rec_sparse.masked_linear_wgrad(dy, x, masks, *ranges, weight.dtype) if needs_weight else None,
        None,
        dy.sum(0, dtype=ctx.bias_dtype) if needs_bias else None,
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "lt4rec_sparse::masked_linear", _masked_linear_backward, setup_context=_masked_linear_setup
)


# Both gradients are bilinear, in each other's terms: so that gradients of gradients are right, not dropped.


def _dgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, weight, masks, ctx.starts, ctx.lengths, _ = inputs
    ctx.save_for_backward(dy, weight, masks)


def _dgrad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight, masks = ctx.saved_tensors
    ranges = (ctx.starts, ctx.lengths)
    d_dy = torch.ops.lt4rec_sparse.masked_linear(g, weight, masks, None, *ranges, "none")
    return (
        d_dy,
        torch.ops.lt4rec_sparse.masked_linear_wgrad(dy, g, masks, *ranges, weight.dtype),
        None,
        None,
        None,
        None,
    )


def _wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, masks, ctx.starts, ctx.lengths, _ = inputs
    ctx.save_for_backward(dy, x, masks)


def _wgrad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, masks = ctx.saved_tensors
    ranges = (ctx.starts, ctx.lengths)
    d_dy = torch.ops.lt4rec_sparse.masked_linear(x, g, masks, None, *ranges, "none")
    return d_dy, torch.ops.lt4rec_sparse.masked_linear_dgrad(dy, g, masks, *ranges, x.shape[0]), None, None, None, None


torch.library.register_autograd("lt4rec_sparse::masked_linear_dgrad", _dgrad_backward, setup_context=_dgrad_setup)
torch.library.register_autograd("lt4rec_sparse::masked_linear_wgrad", _wgrad_backward, setup_context=_wgrad_setup)


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
    kernels = importlib.import_module("lt4rec_sparse.kernels.gpu.gpu_network")
    return cast(Tensor, kernels.unflatten(parts, layout)(x))


_library.impl("sparse_mlp_gpu", _sparse_mlp_gpu, "CUDA")


@torch.library.register_fake("lt4rec_sparse::sparse_mlp_gpu")
def _sparse_mlp_gpu_fake(x: Tensor, parts: Sequence[Tensor], layout: str, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs, dtype=torch.float32)


def _sparse_mlp_backward(ctx: Any, dy: Tensor) -> None:
    raise RuntimeError("sparse_mlp: got a backward pass, wanted inference only: train the MaskedMLP it was frozen from")


torch.library.register_autograd("lt4rec_sparse::sparse_mlp", _sparse_mlp_backward)
torch.library.register_autograd("lt4rec_sparse::sparse_mlp_gpu", _sparse_mlp_backward)
