"""Random networks for the engine, what it must make of them to the last bit, and every way through it."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from oracle import Layer, small_integers
from torch import Tensor

from lt4rec_sparse.kernels import cpu

# What a machine of this kind may have.
ISAS = (
    ("scalar", "neon", "neon_dot")
    if platform.machine() in ("aarch64", "arm64")
    else ("scalar", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16")
)
# What this machine runs, none above the one that LT4REC_SPARSE_ISA holds the engine to.
RUNNABLE_ISAS = cpu.supported_isas()[: cpu.supported_isas().index(cpu.isa()) + 1] if cpu.is_available() else ()
PATHS = (*itertools.product(("fp32", "bf16"), cpu.UNSTRUCTURED), ("int8", "tables"), ("int8", "slices"))
BLOCK = (16, 4)  # outputs, inputs
INPUT_QUANTIZATION = (0.05, 117)  # scale and zero point of x in int8, the same for all tasks


class Kernel(NamedTuple):
    """One way through the engine; the fixture `kernel` has its instruction set in force."""

    precision: str
    path: str
    isa: str

    def run(self, x: Tensor, prepacked: Tensor, threads: int = 1) -> Tensor:
        out = torch.full((len(x), cpu.describe(prepacked).outputs), torch.nan)
        cpu.sparse_mlp(x, prepacked, out, threads, self.path)
        return out


KERNELS = [Kernel(precision, path, isa) for (precision, path), isa in itertools.product(PATHS, RUNNABLE_ISAS)]


BLOCK_KERNELS = [
    Kernel(precision, "blocks", isa) for precision, isa in itertools.product(cpu.PRECISIONS, RUNNABLE_ISAS)
]


class MaskedLayer(NamedTuple):
    """One layer; its weight is 0 where it is pruned, and a kept weight may be 0 too."""

    weight: Tensor
    mask: Tensor
    bias: Tensor | None
    activation: str
    input_scale: float = INPUT_QUANTIZATION[0]
    input_zero_point: int = INPUT_QUANTIZATION[1]
    slope: float | Tensor = 0.0

    def pack(self) -> cpu.PackLayer:
        """Compress to values and one bit plane, which no other layer shares."""
        return pack_together([self])[0]

    def dense(self) -> Layer:
        """Drop the mask, for the oracle."""
        return Layer(self.weight, self.bias, self.activation, self.slope)


Task = Sequence[MaskedLayer]


def random_mask(out_features: int, in_features: int, density: float, seed: int) -> Tensor:
    return torch.rand(out_features, in_features, generator=torch.Generator().manual_seed(seed)) < density


def random_block_mask(out_features: int, in_features: int, density: float, seed: int) -> Tensor:
    grid = random_mask(-(-out_features // BLOCK[0]), -(-in_features // BLOCK[1]), density, seed)
    return grid.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[:out_features, :in_features]


def random_layer(mask: Tensor, activation: str, seed: int, *, integers: bool = True, bias: bool = True) -> MaskedLayer:
    generator = torch.Generator().manual_seed(seed)
    draw = small_integers if integers else torch.randn
    weight, offset = draw(*mask.shape, generator=generator), draw(mask.shape[0], generator=generator)
    scale = 1 if integers else (2 / max(1, mask.sum() / len(mask))) ** 0.5
    return MaskedLayer(weight * mask * scale, mask, offset if bias else None, activation)


def random_task(
    features: Sequence[int],
    density: float,
    seed: int,
    head: str = "none",
    *,
    integers: bool = True,
    activation: str = "relu",
    draw_mask: Callable[[int, int, float, int], Tensor] = random_mask,
) -> list[MaskedLayer]:
    """An MLP; a head of one output keeps every weight. In int8 some activations of hidden layers are clipped."""
    task = []
    for i, (in_features, out_features) in enumerate(itertools.pairwise(features)):
        mask = draw_mask(out_features, in_features, 1 if out_features == 1 else density, seed + i)
        layer = random_layer(mask, head if i == len(features) - 2 else activation, seed + i, integers=integers)
        if i > 0:
            layer = layer._replace(input_scale=0.02 * 2.0 ** ((seed + i) % 4), input_zero_point=(seed + i) % 3 * 20)
        task.append(layer)
    return task


# Those that kernels leave to their paths, with a slope where they have one.
LEFT_ACTIVATIONS = (
    ("sigmoid", 0.0),
    ("tanh", 0.0),
    ("silu", 0.0),
    ("gelu", 0.0),
    ("gelu_tanh", 0.0),
    ("hardswish", 0.0),
    ("leaky_relu", 0.1),
    ("leaky_relu", -1.5),
    ("elu", 0.7),
    ("dice", torch.tensor([[0.9], [-0.3], [-0.2]])),  # scale, shift, alpha of one output
)


def with_every_activation(make: Callable[[Sequence[int]], Sequence[MaskedLayer]], in_features: int) -> Task:
    """Return a task with a layer for each of `LEFT_ACTIVATIONS`; `make` makes it from its widths."""
    widths = (in_features, *range(20 + len(LEFT_ACTIVATIONS), 20, -1))
    return [
        layer._replace(activation=name, slope=_for_each(slope, len(layer.weight)))
        for layer, (name, slope) in zip(make(widths), LEFT_ACTIVATIONS, strict=True)
    ]


def _for_each(slope: float | Tensor, out_features: int) -> float | Tensor:
    """Let outputs have constants that differ, where they have their own."""
    return slope * torch.linspace(0.5, 1.5, out_features) if isinstance(slope, Tensor) else slope


def pack_bits(mask: Tensor) -> Tensor:
    """Put column k into bit k % 8 of byte k / 8, by numpy's means alone."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def tiles(t: Tensor) -> Tensor:
    """Cut `[..., out_features, in_features]` into blocks, zeros beyond the edges: `[..., groups, quads, 16, 4]`."""
    (high, wide), (rows, columns) = BLOCK, t.shape[-2:]
    whole = t.new_zeros(*t.shape[:-2], -(-rows // high) * high, -(-columns // wide) * wide)
    whole[..., :rows, :columns] = t
    return whole.unflatten(-1, (-1, wide)).unflatten(-3, (-1, high)).transpose(-3, -2)


def pack_together(layers: Sequence[MaskedLayer], in_blocks: bool = False) -> list[cpu.PackLayer]:
    """Compress layers that `agree` to the values of their union and a bit plane each, by mask and never by `!= 0`."""
    masks = torch.stack([layer.mask for layer in layers])
    weight = layers[0].weight
    for layer in layers[1:]:
        weight = torch.where(layer.mask, layer.weight, weight)
    if in_blocks:
        masks, weight = tiles(masks)[..., 0, 0], tiles(weight)
    values, planes = weight[masks.any(dim=0)], pack_bits(masks)
    out_features, in_features = layers[0].mask.shape
    return [
        cpu.PackLayer(values, planes, t, layer.bias, in_features, out_features, *layer[3:])
        for t, layer in enumerate(layers)
    ]


def agree(a: MaskedLayer, b: MaskedLayer) -> bool:
    """Whether two layers of one shape have the same bits wherever both keep a weight."""
    if a.mask.shape != b.mask.shape:
        return False
    both = a.mask & b.mask
    return torch.equal(a.weight[both].view(torch.int32), b.weight[both].view(torch.int32))


def weight_groups(tasks: Sequence[Task]) -> list[list[int]]:
    """Group the tasks whose first layers are packed as one weight."""
    groups: list[list[int]] = []
    for t, task in enumerate(tasks):
        fitting = (group for group in groups if all(agree(tasks[other][0], task[0]) for other in group))
        group = next(fitting, None)
        if group is None:
            groups.append([t])
        else:
            group.append(t)
    return groups


def pack_tasks(tasks: Sequence[Task], in_blocks: bool = False) -> list[list[cpu.PackLayer]]:
    """Compress all layers: first layers that agree as one weight, the others each for itself."""
    packed = [[pack_together([layer], in_blocks)[0] for layer in task] for task in tasks]
    for group in weight_groups(tasks):
        for t, first in zip(group, pack_together([tasks[t][0] for t in group], in_blocks), strict=True):
            packed[t][0] = first
    return packed


def prepack(
    tasks: Sequence[Task],
    precision: str,
    layouts: Sequence[str] | None = cpu.UNSTRUCTURED,
    batch: int | None = None,
) -> Tensor:
    return cpu.prepack_layers(pack_tasks(tasks, "blocks" in (layouts or ())), precision, layouts, batch)


def is_shared(prepacked: Tensor) -> bool:
    """Whether weights of the first layer that several tasks keep are multiplied once."""
    facts = cpu.describe(prepacked)
    return facts.multiply_adds < facts.nnz


def exact_reference(x: Tensor, tasks: Sequence[Task], precision: str, in_blocks: bool = False) -> Tensor:
    """What the engine must yield to the last bit, without sigmoids.

    fp32 and bf16 need numbers whose sums are exact in every order, such as small integers; int8 takes any numbers.
    """
    if precision == "int8":
        of_tasks = zip(tasks, steps_of_firsts(tasks, in_blocks), strict=True)
        return torch.cat([_int8_reference(x, task, step, in_blocks) for task, step in of_tasks], dim=1)
    operand = rounded_to_bf16 if precision == "bf16" else lambda v: v
    return torch.cat([_float_reference(x, task, operand) for task in tasks], dim=1)


def steps_of(weight: Tensor, in_blocks: bool = False) -> Tensor:
    """Return what one step of int8's weights is worth in each row.

    127 stands for the largest of them, or in blocks for the largest sum of two neighbours, by absolute value.
    """
    if not in_blocks:
        return weight.abs().amax(dim=1) / 127
    even = torch.cat([weight, weight.new_zeros(len(weight), weight.shape[1] % 2)], dim=1).abs()
    return (even[:, ::2] / 2 + even[:, 1::2] / 2).amax(dim=1) / 63.5


def steps_of_firsts(tasks: Sequence[Task], in_blocks: bool = False) -> list[Tensor]:
    """Return `steps_of` each task's first layer.

    Tasks that share a weight have them in common, so that a result does not show what was multiplied once.
    """
    steps = [steps_of(task[0].weight, in_blocks) for task in tasks]
    for group in weight_groups(tasks):
        of_group = torch.stack([steps[t] for t in group]).amax(dim=0)
        for t in group:
            steps[t] = of_group
    return steps


def rounded_to_bf16(v: Tensor) -> Tensor:
    """As csrc/engine.h has it: to nearest even, and denormals are zeros."""
    return torch.where(v.abs() < 2.0**-126, torch.zeros_like(v).copysign(v), v.bfloat16().float())


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c` in float32, rounded once.

    The product of two float32 numbers is exact in float64. The sum is rounded to odd there: it keeps a trace of what
    was lost, so that rounding to float32 cannot mistake a number just beside a tie for the tie.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    is_even = total.view(torch.int64) % 2 == 0
    odd = torch.nextafter(total, torch.where(lost > 0, torch.inf, -torch.inf).double())
    return torch.where(is_even & (lost != 0), odd, total).float()


def _activated(v: Tensor, activation: str) -> Tensor:
    assert activation in ("none", "relu"), f"no exact reference has a {activation}"
    return v.relu() if activation == "relu" else v


def _float_reference(x: Tensor, task: Task, operand) -> Tensor:
    h = x.float()
    for layer in task:
        h, weight = operand(h).double(), operand(layer.weight).double()
        if h.isfinite().all():
            y = h @ weight.T
        else:  # a pruned weight never meets its activation, a kept 0 does
            kept = [h[:, columns] @ row[columns] for row, columns in zip(weight, layer.mask, strict=True)]
            y = torch.stack(kept, dim=1)
        y = _activated(y if layer.bias is None else y + layer.bias, layer.activation)
        h = y.float()
        assert torch.equal(h.double().nan_to_num(), y.nan_to_num()), "the case is not exact in float32"
    return h


def _int8_reference(x: Tensor, task: Task, step_of_first: Tensor, in_blocks: bool) -> Tensor:
    h = x.float()
    for i, layer in enumerate(task):
        step = steps_of(layer.weight, in_blocks) if i else step_of_first
        weight = torch.where(step[:, None] > 0, (layer.weight / step[:, None]).round().clamp(-127, 127), 0.0)
        inverse = torch.tensor(1 / layer.input_scale, dtype=torch.float64).float()
        quantized = ((h * inverse).round() + layer.input_zero_point).nan_to_num(nan=0.0).clamp(0, 255)
        sums = (quantized.double() - layer.input_zero_point) @ weight.double().T  # integers below 2^53: exact
        scale = (step.double() * layer.input_scale).float()
        bias = torch.zeros_like(step) if layer.bias is None else layer.bias
        h = _activated(fused_multiply_add(sums.float(), scale, bias), layer.activation)
    return torch.where(x.float().isnan().any(dim=1, keepdim=True), torch.nan, h)
