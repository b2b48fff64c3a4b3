"""A frozen network on a GPU: a chain of prepacked runs over its layers, and the list of runs that fit (`runs`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lt4rec_sparse.kernels.gpu import block_sparse, fused_tail
from lt4rec_sparse.kernels.gpu.block_sparse import BlockWeight
from lt4rec_sparse.kernels.gpu.fused_tail import Tail
from lt4rec_sparse.kernels.gpu.launch import has_room
from lt4rec_sparse.kernels.gpu.masked_linear import precision
from lt4rec_sparse.kernels.gpu.runs import (
    ApartRun,
    BatchedRun,
    BlockRun,
    BranchedTailRun,
    CompactRun,
    DenseTailRun,
    ProductRun,
    Run,
    SemiStructuredRun,
    StackedRun,
    TailRun,
)
from lt4rec_sparse.kernels.gpu.weights import FORMATS, Weight
from lt4rec_sparse.network import FrozenNetwork

Span = tuple[str, int, int]  # the name of a way, and the first and last layer that it runs
# Rows that do not start at 16 bytes are loaded element by element, and are slow in cuBLAS too. So widths are padded,
# those of x so that the tiles' steps divide it, with columns of zeros and with neurons whose bias and weights are zero.
X_ALIGNMENT, ALIGNMENT, HEAD_ALIGNMENT = 64, 16, 8
MAX_BLOCK_DENSITY = 0.6  # of kept blocks; above it, walking them cannot beat a dense product


class Layer(NamedTuple):
    """One layer of all tasks, dense on the CPU, from which runs are prepacked."""

    # float32 [out_features, in_features], which the masks select from; None if tasks have their own, as heads
    weight: Tensor | None
    masked: Tensor  # float32 [tasks, out_features, in_features], zeros where nothing is kept
    masks: Tensor  # bool, likewise
    bias: Tensor  # float32 [tasks, out_features]
    activation: str


class Compacted(Protocol):
    """The result of `nn.compaction.compact`."""

    columns: Tensor
    tasks: list[list[Any]]


class GpuNetwork(NamedTuple):
    """A chain of runs over all layers."""

    runs: tuple[Run, ...]
    padded: int  # columns of x as the runs read it; an x with fewer columns is padded with zeros
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Score `x [rows, in_features]`, which may be padded with zeros already, for all tasks.

        Returns:
            `[rows, tasks * out_features]`, float32, with the tasks side by side.
        """
        if torch.is_autocast_enabled(x.device.type):  # the chain has chosen its dtypes
            with torch.autocast(x.device.type, enabled=False):
                return self(x)
        x = x.to(self.dtype)
        if x.shape[1] < self.padded:
            x = F.pad(x, (0, self.padded - x.shape[1]))
        h = (x if x.stride(1) == 1 else x.contiguous())[None]
        for run in self.runs:
            h = run(h)
        return h.transpose(0, 1).flatten(1)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(_tensors(self.runs)).device

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and biases, as prepacked."""
        return nbytes(self.runs)


def layers_of(network: FrozenNetwork) -> list[Layer]:
    """Return the layers of a frozen network, ready to prepack runs from, with every inner width padded.

    Raises:
        ValueError: If heads end in different activations: on a GPU they are one layer.
    """
    layers, columns = [], X_ALIGNMENT
    for i in range(network.depth):
        of_tasks = [network.layer(i, task) for task in network.tasks]
        activations = {layer.activation for layer in of_tasks}
        if len(activations) > 1:
            raise ValueError(f"heads: got activations {', '.join(sorted(activations))}, wanted one for all tasks")
        n, k = of_tasks[0].weight.shape
        rows = 0 if i == network.depth - 1 else -n % ALIGNMENT
        ragged = (0, -k % columns, 0, rows)
        shared = network.hidden[i].weight.to_dense().float() if i < len(network.hidden) else None
        biases = [torch.zeros(n) if layer.bias is None else layer.bias for layer in of_tasks]
        layers.append(
            Layer(
                None if shared is None else F.pad(shared, ragged),
                F.pad(torch.stack([layer.weight for layer in of_tasks]), ragged),
                F.pad(torch.stack([network.mask(i, task) for task in network.tasks]), ragged),
                F.pad(torch.stack(biases), (0, rows)),
                activations.pop(),
            )
        )
        columns = ALIGNMENT
    return layers


def prepack_run(
    layers: Sequence[Layer],
    span: Span,
    dtype: torch.dtype,
    device: torch.device,
    compacted: Compacted | None = None,
) -> Run:
    """Prepack what one run reads, from the layers of `layers_of`.

    Raises:
        ValueError: If there is no such way, or the layers do not allow it.
    """
    kernel, first, last = span
    layer, is_last = layers[first], first == len(layers) - 1
    tasks = layer.masked.shape[0]
    bias = layer.bias.to(device, torch.float32)
    if kernel == "compact":
        if compacted is None:
            raise ValueError("compacted: got None, wanted the compacted MLP, for a chain that runs it")
        return _compact_run(compacted, dtype, device)
    if kernel in ("tail dense", "tail branches"):
        tail = _dense_tail(layers[first : last + 1], dtype, device)
        if kernel == "tail dense":
            return tail
        # Streams of a priority of their own: torch hands out 32 of each priority, in turn.
        sides = (torch.cuda.Stream(device, priority=-1) for _ in range(tasks - 1))  # type: ignore[no-untyped-call]
        return BranchedTailRun(tail, tuple(sides))
    if kernel.startswith("tail "):
        return TailRun(_tail(layers[first : last + 1], kernel.removeprefix("tail "), dtype, device))
    if kernel in ("dense", "apart"):
        weight = layer.masked.to(device, dtype)
        if not is_last:
            bias = bias.to(dtype)  # cuBLAS reads a bias of the operands' dtype
        if first == 0:
            return StackedRun(weight.flatten(0, 1), bias.flatten(), tasks, layer.activation, is_last)
        if kernel == "apart":
            return ApartRun(weight, bias, layer.activation)
        return BatchedRun(weight, bias[:, None], layer.activation, is_last)
    if kernel in FORMATS:
        return ProductRun(_weight(layer, kernel, dtype, device), bias, layer.activation, is_last)
    if kernel.startswith("block"):
        side = int(kernel.removeprefix("block"))
        together = tasks if first == 0 and tasks in (2, 4) and tasks * side <= block_sparse.MAX_COLUMNS else 1
        if layer.weight is None:
            raise ValueError(f"{kernel}: got tasks with weights of their own, wanted one weight that their masks share")
        return BlockRun(
            BlockWeight.from_dense(layer.weight.to(device), layer.masks.to(device), side, dtype, together),
            bias,
            layer.activation,
            is_last,
        )
    if kernel == "2:4":
        if not _is_2_4(layer.masks):  # torch would silently drop the surplus
            raise ValueError("2:4: got masks that keep more than two of four, wanted lottery.project_to_2_4's")
        weights = tuple(torch.sparse.to_sparse_semi_structured(w) for w in layer.masked.to(device, dtype))
        return SemiStructuredRun(weights, bias.to(dtype), layer.activation)
    raise ValueError(f"kernel: got {kernel!r}, wanted one of the ways of kernels.gpu.runs")


def spans(
    layers: Sequence[Layer], dtype: torch.dtype, device: torch.device, is_smaller_compacted: bool
) -> Iterator[Span]:
    """Yield every run that fits some of the layers; each layer has at least "dense"."""
    last = len(layers) - 1
    if is_smaller_compacted:
        yield "compact", 0, last
    for i, layer in enumerate(layers):
        tasks, n, k = layer.masked.shape
        yield "dense", i, i
        if 0 < i < last and tasks > 1:
            yield "apart", i, i
        if layer.weight is None:  # heads, each of one task alone
            continue
        for kernel in FORMATS:
            yield kernel, i, i
        for side in block_sparse.BLOCKS if dtype in block_sparse.DTYPES else ():
            if _block_density(layer.masks, side) <= MAX_BLOCK_DENSITY:
                yield f"block{side}", i, i
        is_for_sparse_cores = device.type == "cuda" and dtype != torch.float32 and n % 32 == 0 and k % 64 == 0
        if i < last and is_for_sparse_cores and _is_2_4(layer.masks):
            yield "2:4", i, i
    yield from tail_spans(layers, dtype, device)


def tail_spans(layers: Sequence[Layer], dtype: torch.dtype, device: torch.device) -> Iterator[Span]:
    """Yield every run that combines the last layers, the longest first."""
    last = len(layers) - 1
    for first in range(1, last):
        tail = layers[first:]
        widths = [tail[0].masked.shape[2], *(layer.masked.shape[1] for layer in tail)]
        hidden_relu = all(layer.activation == "relu" for layer in tail[:-1])
        if not hidden_relu or tail[-1].activation not in ("none", "sigmoid"):
            continue
        yield "tail dense", first, last
        if tail[0].masked.shape[0] > 1 and device.type == "cuda":
            yield "tail branches", first, last
        if fused_tail.fits(widths, dtype):
            for format in FORMATS:
                yield f"tail {format}", first, last


def default_chain(layers: Sequence[Layer], dtype: torch.dtype, device: torch.device) -> list[Span]:
    """Return the chain predicted to be fastest: dense layers, then the longest tail that fits, in one launch."""
    fitting = [span for span in tail_spans(layers, dtype, device) if span[0] == "tail premasked"]
    tail = fitting[:1] if has_room(device) else []
    first = tail[0][1] if tail else len(layers)
    return [*(("dense", i, i) for i in range(first)), *tail]


def fits(run: Run, h: Tensor) -> bool:
    """Tell whether a run's kernel fits on the device of `h`, by running it once."""
    try:
        run(h)
    except OutOfResources:
        return False
    return True


def nbytes(value: Any) -> int:
    """Bytes of all tensors in a network, a run, or several of them."""
    # A semi-structured tensor holds two, and has no storage of its own.
    packed = [[getattr(part, name, None) for name in ("packed", "meta")] for part in _tensors(value)]
    held = zip(_tensors(value), packed, strict=True)
    return sum(sum(t.nbytes for t in inner if t is not None) or part.nbytes for part, inner in held)


def engine(device: torch.device, dtype: torch.dtype) -> str:
    """Name what a plan's timings depend on: the GPU, Triton's version, and the arithmetic of float32 products."""
    arithmetic = f", {precision()}" if dtype == torch.float32 else ""
    if device.type != "cuda":
        return f"interpreter on {device.type}{arithmetic}"
    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}{arithmetic}"


def _weight(layer: Layer, format: str, dtype: torch.dtype, device: torch.device) -> Weight:
    if layer.weight is None:
        if format != "premasked":
            raise ValueError(f"format: got {format} for tasks with weights of their own, wanted premasked")
        tasks, n, k = layer.masked.shape
        return Weight(format, (n, k), layer.masked.to(device, dtype), None, tasks)
    return Weight.prepack(layer.weight, layer.masks, format, dtype, device)


def _tail(layers: Sequence[Layer], format: str, dtype: torch.dtype, device: torch.device) -> Tail:
    *hidden, head = layers
    return Tail(
        tuple(_weight(layer, format, dtype, device) for layer in hidden),
        tuple(layer.bias.to(device, torch.float32) for layer in hidden),
        head.masked.to(device, torch.float32),
        head.bias.to(device, torch.float32),
        head.activation,
    )


def _dense_tail(layers: Sequence[Layer], dtype: torch.dtype, device: torch.device) -> DenseTailRun:
    *hidden, head = layers
    outputs = head.masked.shape[1]
    rows = -outputs % HEAD_ALIGNMENT
    weights = [*(layer.masked for layer in hidden), F.pad(head.masked, (0, 0, 0, rows))]
    return DenseTailRun(
        tuple(weight.to(device, dtype) for weight in weights),
        (*(layer.bias.to(device, dtype) for layer in hidden), F.pad(head.bias, (0, rows)).to(device, torch.float32)),
        outputs,
        head.activation,
    )


def _compact_run(compacted: Compacted, dtype: torch.dtype, device: torch.device) -> CompactRun:
    tasks = [_aligned(layers) for layers in compacted.tasks]
    columns = compacted.columns
    # The padding is read again, by weights of zero.
    columns = torch.cat([columns, columns[:1].expand(-len(columns) % ALIGNMENT)])

    def put(t: Tensor, is_last: bool = False) -> Tensor:
        return t.to(device, torch.float32 if is_last else dtype)

    activations = tuple(tuple(layer.activation for layer in layers) for layers in tasks)
    stacked = all(len(layers) > 1 for layers in tasks) and len({names[0] for names in activations}) == 1
    own = [layers[1:] if stacked else layers for layers in tasks]
    return CompactRun(
        columns.to(device),
        tuple(tuple(put(layer.masked) for layer in layers) for layers in own),
        tuple(tuple(put(layer.bias, i == len(layers) - 1) for i, layer in enumerate(layers)) for layers in own),
        activations,
        put(torch.cat([layers[0].masked for layers in tasks])) if stacked else None,
        put(torch.cat([layers[0].bias for layers in tasks])) if stacked else None,
    )


def _aligned(layers: Sequence[Any]) -> list[Layer]:
    """Pad one task's compact layers as `layers_of` does, with the columns of x like the inner widths."""
    aligned = []
    for i, (weight, bias, activation) in enumerate(layers):
        rows = 0 if i == len(layers) - 1 else -len(weight) % ALIGNMENT
        padded = F.pad(weight, (0, -weight.shape[1] % ALIGNMENT, 0, rows))
        aligned.append(Layer(None, padded, padded != 0, F.pad(bias, (0, rows)), activation))
    return aligned


def _block_density(masks: Tensor, side: int) -> float:
    """Return the kept blocks over all blocks, all tasks together."""
    tasks, n, k = masks.shape
    whole = F.pad(masks, (0, -k % side, 0, -n % side))
    blocks = whole.view(tasks, -(-n // side), side, -(-k // side), side).any(4).any(2)
    return float(blocks.float().mean())


def _is_2_4(masks: Tensor) -> bool:
    return bool((masks.view(*masks.shape[:2], -1, 4).sum(-1) <= 2).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
