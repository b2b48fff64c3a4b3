"""What of a frozen MLP still computes, as smaller dense layers: dead inputs and neurons are gone, task by task."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lt4rec_sparse import ops
from lt4rec_sparse.network import DenseLayer, FrozenNetwork


@dataclass(frozen=True, eq=False)
class Compacted:
    """A frozen MLP without what is dead in it. Printed, it shows each task's widths and what is left to multiply.

    Attributes:
        names: The tasks' names, in the order of the outputs.
        columns: int64 `[kept]`, ascending: the columns of `x` that the first layer of any task reads.
        tasks: For each task its layers in float32, input first, each as wide as the task's own masks leave it. The
            first layers of all tasks read the same `columns`.
        widths_before: The width of `x` and `out_features` of the layers that these were.
    """

    names: tuple[str, ...]
    columns: Tensor
    tasks: list[list[DenseLayer]]
    widths_before: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Score every task, in eager torch: what `SparseMLP.forward` of the same MLP returns, but for rounding."""
        outputs = []
        with ops.without_autocast(x):
            for layers in self.tasks:
                h = x[:, self.columns]
                for layer in layers:
                    h = layer.activate(F.linear(h, layer.weight, layer.bias))
                outputs.append(h)
        return torch.cat(outputs, dim=-1)

    @property
    def widths(self) -> list[tuple[int, ...]]:
        """For each task the number of columns that it reads, and `out_features` of its layers."""
        return [(len(self.columns), *(len(layer.weight) for layer in layers)) for layers in self.tasks]

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one row of `x`, all tasks, by dense products."""
        return sum(a * b for widths in self.widths for a, b in pairwise(widths))

    @property
    def multiply_adds_before(self) -> int:
        """The same of the MLP as it was, its masked weights dense in every task."""
        return len(self.tasks) * sum(a * b for a, b in pairwise(self.widths_before))

    def __str__(self) -> str:
        lines = [
            f"{name}: {'-'.join(map(str, self.widths_before))} -> {'-'.join(map(str, widths))}"
            for name, widths in zip(self.names, self.widths, strict=True)
        ]
        before, after = self.multiply_adds_before, self.multiply_adds
        return "\n".join([*lines, f"multiply-adds: {before:,} -> {after:,}, {after / before:.1%}"])


def compact(network: FrozenNetwork) -> Compacted:
    """Drop what no output depends on, and fold what is constant: dense layers of only the neurons that compute.

    For each task alone, by its masks (a kept weight counts even if it is zero):

    - A hidden neuron that reads nothing is the constant `activation(bias)`. It is added to the biases of the layer
      above through the weights that read it, and dropped; those that read only such ones are constants in turn. The
      sums are float64 and rounded once, when all are folded.
    - A hidden neuron that nothing reads is dropped, and so are those that only such ones read.
    - A column of `x` is dropped if no neuron left reads it in any task.

    Compacting the result again would change nothing. Outputs are never dropped, and no layer becomes empty: of a layer
    without a neuron one stays, whose weights and bias are zeros and which is read through zeros; of `x` without a
    column that is read, column 0.

    In exact arithmetic, for finite inputs and weights, the result equals the masked MLP in fp32. A NaN or infinity in a
    column that was dropped reaches no output; in one that was kept it spreads through the zeros of pruned weights,
    where the engine passes over them.

    What is structured shrinks: neurons pruned whole (`prune_by_magnitude(..., granularity="neuron")`) and dead inputs.
    At medium densities single weights leave nothing dead.

    Example:
        >>> from lt4rec_sparse import Mask, MaskedMLP, freeze
        >>> mlp = MaskedMLP(8, hidden=(4, 2))
        >>> first = torch.tensor([True, False, False, False])[:, None].expand(4, 8)  # three neurons without fan-in
        >>> mlp.set_mask(Mask({"layers.0": first, "layers.1": torch.ones(2, 4, dtype=torch.bool)}))
        >>> print(compact(freeze(mlp).network))
        task: 8-4-2-1 -> 8-1-2-1
        multiply-adds: 42 -> 12, 28.6%

    Args:
        network: The frozen network; the result has float32 weights.
    """
    compacted = [_compact_task(network, task) for task in network.tasks]
    is_read = torch.stack([inputs for inputs, _ in compacted]).any(0)
    if not is_read.any():
        is_read[0] = True
    columns = is_read.nonzero().squeeze(1)
    tasks = [[first._replace(weight=first.weight[:, columns]), *rest] for _, (first, *rest) in compacted]
    return Compacted(network.tasks, columns, tasks, (network.in_features, *network.widths))


def _compact_task(network: FrozenNetwork, task: str) -> tuple[Tensor, list[DenseLayer]]:
    """Compact one task's layers; return also which columns of `x` it reads, all of which its first layer still has."""
    path = [network.layer(i, task) for i in range(network.depth)]
    weights = [layer.weight for layer in path]
    masks = [network.mask(i, task) for i in range(network.depth)]
    biases = [
        torch.zeros(len(layer.weight), dtype=torch.float64) if layer.bias is None else layer.bias.cpu().double()
        for layer in path
    ]
    # Up: each constant goes into the biases above it, after which nothing reads it.
    for i in range(len(path) - 1):
        is_constant = ~masks[i].any(1)
        value = path[i].activate(biases[i].clone()[None])[0]  # [1, out_features], for slopes per output
        folded = (weights[i + 1].double() * value).masked_fill(~masks[i + 1], 0)  # what does not read it meets no inf
        biases[i + 1] = biases[i + 1] + folded[:, is_constant].sum(1)
        masks[i + 1] = masks[i + 1] & ~is_constant
    # Down: what the layer above does not read goes, even if it is a constant. This makes no new ones: what is dropped
    # was read by nothing.
    kept = [torch.arange(len(weights[-1]))]
    for i in reversed(range(len(path) - 1)):
        is_read = masks[i + 1][kept[0]].any(0)
        if not is_read.any():
            is_read[0] = True  # the zero neuron: nothing reads it, and it reads nothing
            masks[i][0], biases[i][0] = False, 0
        kept.insert(0, is_read.nonzero().squeeze(1))
    columns: list[Tensor | slice] = [slice(None), *kept[:-1]]
    layers = []
    for layer, weight, mask, bias, rows, read in zip(path, weights, masks, biases, kept, columns, strict=True):
        left = weight.masked_fill(~mask, 0)[rows][:, read]
        slope = layer.slope[..., rows] if isinstance(layer.slope, Tensor) else layer.slope
        layers.append(layer._replace(weight=left, bias=bias[rows].float(), slope=slope))
    return masks[0][kept[0]].any(0), layers
