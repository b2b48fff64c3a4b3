"""Layers that are served from compressed weights, and `freeze`, where the type changes once.

A `MaskedMLP` is trained and never served; a `SparseMLP` is served and never trained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lt4rec_sparse import ops
from lt4rec_sparse.formats import SharedWeight
from lt4rec_sparse.nn.masked import MaskedLinear, MaskedMLP, task_index
from lt4rec_sparse.nn.quantization import calibrate, check_codes
from lt4rec_sparse.ops import Codes, SparseLayer

ALL = "all"  # the one plane of a head, which belongs to its task alone and keeps every weight


class SparseMLP(nn.Module):
    """All tasks' sparse MLPs in one call of the CPU engine, or in a few launches on a GPU, from compressed weights.

    The hidden weights are one `SharedWeight` a layer: the union of the tasks' masks once, a bit plane a task. The
    engine's own layout is prepacked from them when the module is made, and lives only in memory; a GPU's, where `x` is
    on one, at the first call there. int8 runs as the dense reference on a GPU. `nn.gpu.GpuMLP` serves there faster, by
    a measured plan and from CUDA graphs.

    Args:
        hidden: The hidden layers, input first, all with the same tasks.
        heads: Task name -> its last layer, `[out_features, hidden[-1]]`, of one plane; in the order of the outputs.
        precision: How it computes: "fp32", "bf16" or "int8" (`ops.prepack`). The canonical weights are kept as they
            are, so that any precision can be made from any other.
        codes: Task name -> how int8 counts the activations that enter each layer, the head's last; None where that is
            not calibrated.

    Raises:
        ValueError: If widths do not chain, tasks differ between layers, there is no such precision, codes are not
            valid, or "int8" comes without codes.
    """

    def __init__(
        self,
        hidden: Sequence[SparseLayer],
        heads: dict[str, SparseLayer],
        precision: str = "fp32",
        codes: Mapping[str, Sequence[Codes]] | None = None,
    ) -> None:
        super().__init__()
        width = hidden[0].weight.shape[1] if hidden else next(iter(heads.values())).weight.shape[1]
        self.in_features = width
        for i, layer in enumerate(hidden):
            if layer.weight.shape[1] != width:
                raise ValueError(f"layer {i}: got in_features {layer.weight.shape[1]}, wanted {width}")
            if layer.weight.tasks != tuple(heads):
                raise ValueError(
                    f"layer {i}: got tasks {layer.weight.tasks}, wanted {tuple(heads)}, those of the heads"
                )
            width = layer.weight.shape[0]
        for task, head in heads.items():
            if head.weight.shape[1] != width:
                raise ValueError(f"head of {task}: got in_features {head.weight.shape[1]}, wanted {width}")
        self.hidden = tuple(hidden)
        self.heads = dict(heads)
        self.tasks = tuple(heads)
        widths = {head.weight.shape[0] for head in heads.values()}
        if len(widths) > 1:
            raise ValueError(f"heads: got out_features {sorted(widths)}, wanted the same for every task")
        self.out_features = sum(head.weight.shape[0] for head in heads.values())
        self.precision: str = precision
        self.codes: dict[str, tuple[Codes, ...]] | None = None
        if codes is not None:
            check_codes(codes, self.tasks, len(self.hidden) + 1)
            self.codes = {task: tuple(codes[task]) for task in self.tasks}
        self.prepacked = ops.prepack(self._paths(), precision, self._codes())
        self._network = None if self.prepacked is None else ops.Network(self.prepacked)
        self._gpu: dict[torch.device, ops.GpuParts] = {}

    def forward(self, x: Tensor, task: str | None = None) -> Tensor:
        """Score every task, or return one task's part of it.

        Args:
            x: `[..., in_features]`, float32 or bfloat16; on a GPU float16 too.
            task: The task's name; None returns every task. All are computed in any case, in one call.

        Returns:
            `[..., tasks * out_features]`, float32: the tasks side by side, as `MaskedMLP.forward` without a task; or
            `[..., out_features]` of the task.

        Raises:
            ValueError: If the last dimension is another, or there is no such task.
            TypeError: If `x` is neither float32 nor bfloat16.
        """
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., {self.in_features}]")
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        if x.device.type == "cuda" and self.precision != "int8":
            y = ops.sparse_mlp_gpu(rows, self.prepack_on(x.device))
        elif self.prepacked is None or x.device.type != "cpu":
            y = ops.sparse_mlp_dense(rows, self._paths(), self.precision, self._codes())
        else:
            y = ops.sparse_mlp(rows, self.prepacked, self.out_features)
        y = y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.out_features)
        return y if task is None else y.chunk(len(self.tasks), dim=-1)[task_index(self.tasks, task)]

    def score_into(self, x: Tensor, out: Tensor) -> None:
        """Write every task's scores into `out`, with as little of Python and torch in between as there can be.

        For inference alone: autograd and `torch.compile` do not see it.

        Args:
            x: `[batch, in_features]`, float32 or bfloat16; rows may be strided, elements of a row not.
            out: `[batch, tasks * out_features]`, float32; rows may be strided. Must not overlap `x`.

        Raises:
            ValueError: If a shape, dtype, device or stride is another.
        """
        if self._network is not None and x.is_cpu:
            self._network.sparse_mlp(x, out)
            return
        y = self(x)
        if out.shape != y.shape:
            raise ValueError(f"out: got shape {tuple(out.shape)}, wanted {tuple(y.shape)}")
        out.copy_(y)

    def to_precision(self, precision: str) -> SparseMLP:
        """Return the same MLP in another precision; both share the canonical weights.

        Example:
            >>> mlp = freeze(MaskedMLP(8, hidden=(4, 2)))
            >>> mlp.calibrated(torch.rand(100, 8)).to_precision("int8").precision
            'int8'

        Raises:
            ValueError: If there is no such precision, or "int8" is asked of an MLP that is not calibrated.
        """
        return self._remade(precision, self.codes)

    def prepack_on(self, device: torch.device) -> ops.GpuParts:
        """Return what a GPU runs, prepacked at the first call.

        `forward` calls it. Who compiles or exports the module calls it first, so that it is not traced.
        """
        if device not in self._gpu:
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
            self._gpu[device] = ops.prepack_gpu(self._paths(), dtype, device)
        return self._gpu[device]

    def calibrated(self, x: Tensor) -> SparseMLP:
        """Return the same MLP, in the same precision, with codes for int8 from representative inputs (`calibrate`)."""
        return self._remade(self.precision, calibrate(self, x))

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical weights and biases."""
        return sum(layer_nbytes(layer) for layer in (*self.hidden, *self.heads.values()))

    @property
    def prepacked_nbytes(self) -> int:
        """Bytes of what the engine of this machine made from them; 0 without the engine."""
        return 0 if self.prepacked is None else self.prepacked.numel()

    def extra_repr(self) -> str:
        """Show widths, tasks and densities."""
        shapes = " -> ".join(str(layer.weight.shape[0]) for layer in self.hidden)
        union = [f"{layer.weight.nnz / (layer.weight.shape[0] * layer.weight.shape[1]):.1%}" for layer in self.hidden]
        return (
            f"{self.in_features} -> {shapes}, tasks={', '.join(self.tasks)}, {self.precision}, "
            f"union density: {', '.join(union)}"
        )

    def _remade(self, precision: str, codes: Mapping[str, Sequence[Codes]] | None) -> SparseMLP:
        return SparseMLP(self.hidden, self.heads, precision, codes).eval()

    def _codes(self) -> list[tuple[Codes, ...]] | None:
        return None if self.codes is None else [self.codes[task] for task in self.tasks]

    def _paths(self) -> list[list[tuple[SparseLayer, str]]]:
        return [[*((layer, task) for layer in self.hidden), (head, ALL)] for task, head in self.heads.items()]


class SparseLinear(SparseMLP):
    """A linear layer served from a compressed weight: what `freeze` makes of a `MaskedLinear`.

    Args:
        weight: `[out_features, in_features]` for all its tasks; their outputs stand side by side.
        bias: `[out_features]`, or None.
        precision: As of `SparseMLP`.
        codes: As of `SparseMLP`.
    """

    def __init__(
        self,
        weight: SharedWeight,
        bias: Tensor | None,
        precision: str = "fp32",
        codes: Mapping[str, Sequence[Codes]] | None = None,
    ) -> None:
        heads = {task: SparseLayer(weight, bias, "none") for task in weight.tasks}
        super().__init__((), heads, precision, codes)

    def _remade(self, precision: str, codes: Mapping[str, Sequence[Codes]] | None) -> SparseMLP:
        layer = next(iter(self.heads.values()))
        return SparseLinear(layer.weight, layer.bias, precision, codes).eval()

    def _paths(self) -> list[list[tuple[SparseLayer, str]]]:
        return [[(layer, task)] for task, layer in self.heads.items()]

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical weight and bias; all tasks read the same."""
        return layer_nbytes(next(iter(self.heads.values())))

    def extra_repr(self) -> str:
        """Show widths, tasks and density."""
        weight, tasks = next(iter(self.heads.values())).weight, ", ".join(self.tasks)
        return f"{weight.shape[1]} -> {weight.shape[0]}, tasks={tasks}, {self.precision}, union nnz={weight.nnz}"


def freeze(model: nn.Module, sigmoid: bool = False) -> nn.Module:
    """Return a copy of `model` for serving, every masked layer in it replaced by its compressed form.

    `freeze(mlp)(x)` equals `mlp(x)` within rounding, for every task; the copy cannot be trained.

    Example:
        >>> mlp = MaskedMLP(8, hidden=(4, 2), tasks=("ctr", "cvr"))
        >>> x = torch.ones(3, 8)
        >>> torch.allclose(freeze(mlp)(x), mlp(x), atol=1e-6)
        True

    Args:
        model: A `MaskedMLP`, a `MaskedLinear`, or any module that contains them.
        sigmoid: Whether the heads of the MLPs end in a sigmoid: probabilities instead of logits.

    Raises:
        ValueError: If the model contains no masked layer.
    """
    frozen: dict[int, nn.Module] = {}
    inner: set[int] = set()
    for module in model.modules():
        sparse = None if id(module) in inner else _freeze_masked(module, sigmoid)
        if sparse is not None:
            frozen[id(module)] = sparse
            inner |= {id(part) for part in module.modules()}
    if not frozen:
        raise ValueError(
            f"model: got a {type(model).__name__} without masked layers, wanted a MaskedMLP or MaskedLinear"
        )
    # As the memo of the copy, the frozen layers take the masked ones' place wherever they are referred to.
    result: nn.Module = copy.deepcopy(model, frozen)
    return result.eval().requires_grad_(False)


def freeze_layer(layer: nn.Linear, masks: dict[str, Tensor], activation: str) -> SparseLayer:
    """Compress one linear layer through the tasks' masks."""
    weight = SharedWeight.from_dense(layer.weight.detach().cpu(), {task: mask.cpu() for task, mask in masks.items()})
    return SparseLayer(weight, None if layer.bias is None else layer.bias.detach().cpu().clone(), activation)


def layer_nbytes(layer: SparseLayer) -> int:
    """Bytes of a layer's canonical weight and bias."""
    return layer.weight.nbytes + (0 if layer.bias is None else layer.bias.numel() * layer.bias.element_size())


def _freeze_masked(module: nn.Module, sigmoid: bool) -> nn.Module | None:
    if isinstance(module, MaskedLinear):
        layer = freeze_layer(module, {task: module.mask(task) for task in module.tasks}, "none")
        return SparseLinear(layer.weight, layer.bias)
    if isinstance(module, MaskedMLP):
        hidden = [
            freeze_layer(layer, {task: layer.mask(task) for task in module.tasks}, "relu")
            for layer in module.masked_layers()
        ]
        heads = {}
        for task, head in module.heads.items():
            assert isinstance(head, nn.Linear)
            kept = torch.ones_like(head.weight, dtype=torch.bool)
            heads[task] = freeze_layer(head, {ALL: kept}, "sigmoid" if sigmoid else "none")
        return SparseMLP(hidden, heads)
    return None
