"""The ways in which a GPU can run layers of a frozen network, by the names that plans use, and which of them fit.

- "dense": the masks multiplied in beforehand, cuBLAS; the first layer of all tasks in one product, later ones in one
  batched product.
- "tail premasked": `kernels.gpu.fused_tail`, from that layer to the scores in one launch.
- "tail dense", "tail branches": the same layers by cuBLAS, task after task with bias and ReLU in the epilogues, or the
  tasks side by side as branches of a CUDA graph.
- "block16", "block32", "block64": `kernels.gpu.block_sparse`.
- "2:4": torch's semi-structured tensors, on the sparse tensor cores, for masks that keep two of four.
- "compact": the whole network without what is dead in it (`nn.compaction`), dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lt4rec_sparse.kernels.gpu import block_sparse, fused_tail
from lt4rec_sparse.kernels.gpu.block_sparse import BlockWeight
from lt4rec_sparse.kernels.gpu.fused_tail import Tail
from lt4rec_sparse.kernels.gpu.launch import has_room
from lt4rec_sparse.kernels.gpu.runs import (
    BlockRun,
    CompactRun,
    DenseRun,
    SemiStructuredRun,
    TailRun,
    TaskwiseRun,
    engine,
    fits,
)
from lt4rec_sparse.network import DenseLayer, FrozenNetwork
from lt4rec_sparse.nn.compaction import Compacted, compact
from lt4rec_sparse.nn.plan.plan import Chain, Machine, Segment

Run = Callable[[Tensor], Tensor]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Rows that do not start at 16 bytes are loaded element by element, and are slow in cuBLAS too. So widths are padded,
# those of x so that the tiles' steps divide it, with columns of zeros and with neurons whose bias and weights are zero.
X_ALIGNMENT, ALIGNMENT, HEAD_ALIGNMENT = 64, 16, 8
ACTIVATIONS = ("none", "relu", "sigmoid")  # of the kernels
MAX_BLOCK_DENSITY = 0.6  # of kept blocks; above it, walking them cannot beat a dense product
WORTH_COMPACTING = 0.95  # of the multiply-adds left; what drops less than a twentieth is the dense network again


class Layer(NamedTuple):
    """One layer of all tasks, dense on the CPU, its widths padded."""

    # float32 [out_features, in_features], which the masks select from; None if tasks have their own, as heads
    weight: Tensor | None
    masked: Tensor  # float32 [tasks, out_features, in_features], zeros where nothing is kept
    masks: Tensor  # bool, likewise
    bias: Tensor  # float32 [tasks, out_features]
    activation: str


@dataclass(frozen=True)
class GpuNetwork:
    """A chain of runs over all layers."""

    runs: tuple[Run, ...]
    padded: int  # columns of x as the runs read it; an x with fewer columns is padded with zeros
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Score `x [rows, in_features]` for all tasks: float32 `[rows, tasks * out_features]`."""
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
        return _nbytes(self.runs)


class Ways:
    """The runs and chains that a frozen network can be prepacked for, each prepacked once.

    Args:
        network: The frozen network.
        precision: The dtype of weights and activations: "bf16", "fp16" or "fp32".
        device: Where they run.

    Raises:
        ValueError: If heads end in different activations: on a GPU they are one layer.
    """

    def __init__(self, network: FrozenNetwork, precision: str, device: torch.device) -> None:
        self._network = network
        self.layers = _layers(network)
        self.precision = precision
        self.dtype = DTYPES[precision]
        self.device = device
        self._runs: dict[Segment, Run] = {}

    @property
    def machine(self) -> Machine:
        """What a plan's timings depend on, besides the network."""
        return Machine(engine(self.device, self.dtype), 0, str(torch.__version__))

    @property
    def default(self) -> Chain:
        """The chain that is predicted to be fastest: dense layers, then the longest tail that fits, in one launch."""
        fitting = [segment for segment in self._tails() if segment.kernel == "tail premasked"]
        tail = fitting[:1] if has_room(self.device) else []
        first = tail[0].first if tail else len(self.layers)
        return (*(self._segment("dense", i) for i in range(first)), *tail)

    @cached_property
    def segments(self) -> Chain:
        """Every run that fits some of the layers; each layer has at least "dense"."""
        found = []
        last = len(self.layers) - 1
        if last > 0 and self._compacted.multiply_adds <= WORTH_COMPACTING * self._compacted.multiply_adds_before:
            found.append(self._segment("compact", 0, last))
        for i, layer in enumerate(self.layers):
            _, n, k = layer.masked.shape
            found.append(self._segment("dense", i))
            if layer.weight is None:  # heads, each of one task alone
                continue
            if self.dtype in block_sparse.DTYPES:
                sides = [s for s in block_sparse.BLOCKS if _block_density(layer.masks, s) <= MAX_BLOCK_DENSITY]
                found += [self._segment(f"block{side}", i) for side in sides]
            is_for_sparse_cores = self.device.type == "cuda" and self.dtype != torch.float32
            if i < last and is_for_sparse_cores and n % 32 == 0 and k % 64 == 0 and _is_2_4(layer.masks):
                found.append(self._segment("2:4", i))
        return (*found, *self._tails())

    def run(self, segment: Segment) -> Run:
        """Return one run, prepacked.

        Raises:
            ValueError: If there is no such way, or the layers do not allow it.
        """
        if segment not in self._runs:
            self._runs[segment] = self._prepack(segment)
        return self._runs[segment]

    def network(self, chain: Chain) -> GpuNetwork:
        """Return the runs of a chain as one network."""
        return GpuNetwork(tuple(map(self.run, chain)), self.layers[0].masked.shape[2], self.dtype)

    def nbytes(self, chains: Sequence[Chain]) -> dict[str, int]:
        """Bytes of the weights that chains read, by the kernel that reads them; a run of several chains counts once."""
        total: dict[str, int] = {}
        for segment in dict.fromkeys(segment for chain in chains for segment in chain):
            total[segment.kernel] = total.get(segment.kernel, 0) + _nbytes(self.run(segment))
        return total

    def examples(self, batch: int) -> list[Tensor]:
        """Draw activations as they enter each layer: `[tasks, batch, in_features]`, or those of x."""
        generator = torch.Generator().manual_seed(0)
        examples = []
        for i, layer in enumerate(self.layers):
            tasks, _, k = layer.masked.shape
            h = torch.randn(1 if i == 0 else tasks, batch, k, generator=generator).to(self.device, self.dtype)
            examples.append(h if i == 0 else h.relu_())
        return examples

    def fits(self, segment: Segment, h: Tensor) -> bool:
        """Tell whether a run's kernel can be launched on this GPU, by launching it."""
        return fits(self.run(segment), h)

    @cached_property
    def _compacted(self) -> Compacted:
        return compact(self._network)

    def _segment(self, kernel: str, first: int, last: int | None = None) -> Segment:
        return Segment(kernel, self.precision, first, first if last is None else last)

    def _tails(self) -> Iterator[Segment]:
        """Yield every run that combines the last layers, the longest first."""
        last = len(self.layers) - 1
        for first in range(1, last):
            *hidden, head = self.layers[first:]
            if any(layer.activation != "relu" for layer in hidden) or head.activation not in ("none", "sigmoid"):
                continue
            yield self._segment("tail dense", first, last)
            if len(head.masked) > 1 and self.device.type == "cuda":
                yield self._segment("tail branches", first, last)
            widths = [hidden[0].masked.shape[2], *(layer.masked.shape[1] for layer in (*hidden, head))]
            if fused_tail.fits(widths, self.dtype):
                yield self._segment("tail premasked", first, last)

    def _prepack(self, segment: Segment) -> Any:  # mypy takes no NamedTuple for callable
        kernel, first = segment.kernel, segment.first
        layer, is_last = self.layers[first], first == len(self.layers) - 1
        tasks = len(layer.masked)
        if kernel == "compact":
            return self._compact()
        if kernel == "tail premasked":
            return self._fused_tail(self.layers[first:])
        if kernel in ("tail dense", "tail branches"):
            sides: tuple[torch.cuda.Stream, ...] = ()
            if kernel == "tail branches":
                # Streams of a priority of their own: torch hands out 32 of each priority, in turn.
                sides = tuple(torch.cuda.Stream(self.device, priority=-1) for _ in range(tasks - 1))  # type: ignore[no-untyped-call]
            return self._dense_tail(self.layers[first:], sides)
        if kernel == "dense":  # cuBLAS reads a bias of the operands' dtype
            bias = layer.bias.to(self.device, torch.float32 if is_last else self.dtype)
            return DenseRun(self._put(layer.masked), bias, layer.activation, is_last)
        bias = layer.bias.to(self.device)
        if kernel == "2:4":
            if not _is_2_4(layer.masks):  # torch would silently drop the surplus
                raise ValueError("2:4: got masks that keep more than two of four, wanted lottery.project_to_2_4's")
            weights = tuple(torch.sparse.to_sparse_semi_structured(w) for w in self._put(layer.masked))
            return SemiStructuredRun(weights, bias.to(self.dtype), layer.activation)
        if not kernel.startswith("block"):
            raise ValueError(f"kernel: got {kernel!r}, wanted one of the ways of nn.ways")
        if layer.weight is None:
            raise ValueError(f"{kernel}: got tasks with weights of their own, wanted one weight that their masks share")
        side = int(kernel.removeprefix("block"))
        together = tasks if first == 0 and tasks in (2, 4) and tasks * side <= block_sparse.MAX_COLUMNS else 1
        weight, masks = layer.weight.to(self.device), layer.masks.to(self.device)
        blocks = BlockWeight.from_dense(weight, masks, side, self.dtype, together)
        return BlockRun(blocks, bias, layer.activation, is_last)

    def _put(self, t: Tensor) -> Tensor:
        return t.to(self.device, self.dtype)

    def _fused_tail(self, layers: Sequence[Layer]) -> TailRun:
        *hidden, head = layers
        return TailRun(
            Tail(
                tuple(self._put(layer.masked) for layer in hidden),
                tuple(layer.bias.to(self.device) for layer in hidden),
                head.masked.to(self.device),
                head.bias.to(self.device),
                head.activation,
            )
        )

    def _dense_tail(self, layers: Sequence[Layer], sides: tuple[torch.cuda.Stream, ...]) -> TaskwiseRun:
        *hidden, head = layers
        outputs = head.masked.shape[1]
        rows = -outputs % HEAD_ALIGNMENT  # cuBLAS is slow otherwise
        weights = [self._put(w) for w in (*(x.masked for x in hidden), F.pad(head.masked, (0, 0, 0, rows)))]
        biases = [*(self._put(x.bias) for x in hidden), F.pad(head.bias, (0, rows)).to(self.device)]
        activations = tuple(layer.activation for layer in layers)
        return TaskwiseRun(
            tuple(zip(*weights, strict=True)), tuple(zip(*biases, strict=True)), activations, outputs, sides
        )

    def _compact(self) -> CompactRun:
        tasks = [[_aligned(layer, layer is layers[-1]) for layer in layers] for layers in self._compacted.tasks]
        columns = self._compacted.columns
        # The padding is read again, by weights of zero.
        columns = torch.cat([columns, columns[:1].expand(-len(columns) % ALIGNMENT)])
        rest = TaskwiseRun(
            tuple(tuple(self._put(weight) for weight, _ in layers[1:]) for layers in tasks),
            tuple((*(self._put(b) for _, b in layers[1:-1]), layers[-1][1].to(self.device)) for layers in tasks),
            tuple(layer.activation for layer in self.layers[1:]),
            self.layers[-1].masked.shape[1],
        )
        weight, bias = (self._put(torch.cat(parts)) for parts in zip(*(layers[0] for layers in tasks), strict=True))
        return CompactRun(columns.to(self.device), weight, bias, self.layers[0].activation, rest)


def _layers(network: FrozenNetwork) -> list[Layer]:
    layers, columns = [], X_ALIGNMENT
    for i in range(network.depth):
        of_tasks = [network.layer(i, task) for task in network.tasks]
        activations = {layer.activation for layer in of_tasks}
        if len(activations) > 1:
            raise ValueError(f"heads: got activations {', '.join(sorted(activations))}, wanted one for all tasks")
        if not activations <= set(ACTIVATIONS):
            got = ", ".join(sorted(activations))
            raise ValueError(f"layer {i}: got activation {got}, wanted one of {', '.join(ACTIVATIONS)} on a GPU")
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


def _aligned(layer: DenseLayer, is_last: bool) -> tuple[Tensor, Tensor]:
    """Pad a compact layer's weight and bias like the inner widths."""
    assert layer.bias is not None
    rows = 0 if is_last else -len(layer.weight) % ALIGNMENT
    return F.pad(layer.weight, (0, -layer.weight.shape[1] % ALIGNMENT, 0, rows)), F.pad(layer.bias, (0, rows))


def _block_density(masks: Tensor, side: int) -> float:
    """Return the kept blocks over all blocks, all tasks together."""
    tasks, n, k = masks.shape
    whole = F.pad(masks, (0, -k % side, 0, -n % side))
    blocks = whole.view(tasks, -(-n // side), side, -(-k // side), side).any(4).any(2)
    return float(blocks.float().mean())


def _is_2_4(masks: Tensor) -> bool:
    return bool((masks.view(*masks.shape[:2], -1, 4).sum(-1) <= 2).all())


def _nbytes(value: Any) -> int:
    """Bytes of all tensors in nested tuples."""
    # A semi-structured tensor holds two, and has no storage of its own.
    packed = [[getattr(part, name, None) for name in ("packed", "meta")] for part in _tensors(value)]
    held = zip(_tensors(value), packed, strict=True)
    return sum(sum(t.nbytes for t in inner if t is not None) or part.nbytes for part, inner in held)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
