"""An MLP whose parameters are its kept weights alone: what `MaskedMLP` is while masks stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lt4rec_sparse import ops
from lt4rec_sparse.formats import BlockWeight
from lt4rec_sparse.masks import pack_bits, unpack_bits
from lt4rec_sparse.nn.masked import MaskedLinear, MaskedMLP, task_index

# The share of kept weights up to which a step of them alone is faster than one of torch's dense layers, by a third at
# least: bench/results/sparse_training.json.
BREAK_EVEN = {"blocks": 0.5, "weights": 0.2}


class _View(NamedTuple):
    """How a task sees a layer: its parts, and where their weights stand in what the engine reads."""

    parts: tuple[int, ...]
    places: Tensor | None  # int64, of the parts one after the other; None: as they are
    pattern: ops.Pattern


class CompressedLinear(nn.Module):
    """A layer of which only what some task keeps exists: `y = relu(x @ (weight * mask_task).T + bias)`.

    Weights that the same tasks own make up one parameter, in blocks `[blocks, 16, 4]` where every mask keeps whole
    ones, else `[count]`; row by row, columns ascending. So a task's gradient reaches the parameters of the task alone,
    and an optimiser holds moments of kept weights alone.

    A state holds `mask_bits`, and a state of other masks is refused.
    """

    mask_bits: Tensor  # uint8 [tasks, out_features, ceil(in_features / 8)], `pack_bits` of the masks

    def __init__(self, masked: MaskedLinear) -> None:
        super().__init__()
        weight, bias = masked.weight_and_bias()
        self.out_features, self.in_features = weight.shape
        self.tasks = masked.tasks
        masks = masked.masks.detach().cpu()
        self.is_blocks = all(BlockWeight.keeps_blocks(mask) for mask in masks)
        self.register_buffer("mask_bits", pack_bits(masks))
        owners = self._owners()
        self._codes = sorted(set(owners[owners > 0].tolist()))
        kept = _blocks(weight.detach().cpu()) if self.is_blocks else weight.detach().cpu()
        self.parts = nn.ParameterList(nn.Parameter(kept[owners == code].clone()) for code in self._codes)
        self.has_bias = bias is not None
        self.bias = nn.Parameter(torch.zeros(self.out_features), requires_grad=self.has_bias)
        if bias is not None:
            self.bias.data.copy_(bias)
        self._views = {task: self._view(owners, place) for place, task in enumerate(self.tasks)}

    @property
    def owners(self) -> tuple[frozenset[str], ...]:
        """The tasks that own each part."""
        return tuple(
            frozenset(task for place, task in enumerate(self.tasks) if code >> place & 1) for code in self._codes
        )

    def places(self) -> list[Tensor]:
        """Return where each part's weights stand in the flattened `[out_features, in_features]`, int64, in its order.

        Of blocks that hang over an edge the places beyond are -1.
        """
        numbers = torch.arange(self.out_features * self.in_features).view(self.out_features, self.in_features)
        numbers = _blocks(numbers, -1) if self.is_blocks else numbers
        owners = self._owners()
        return [numbers[owners == code].flatten() for code in self._codes]

    def values(self, task: str | None = None) -> Tensor:
        """Return what a task keeps, row by row: `[blocks, 16, 4]` or `[count]`, with a gradient to its parts."""
        parts, places, _ = self._views[self.tasks[task_index(self.tasks, task)]]
        if places is None:
            found: Tensor = self.parts[parts[0]]
            return found
        if not parts:
            return self.bias.new_zeros(0, *BlockWeight.BLOCK) if self.is_blocks else self.bias.new_zeros(0)
        arranged: Tensor = _Arranged.apply(places, *(self.parts[part] for part in parts))  # type: ignore[no-untyped-call]
        return arranged

    def pattern(self, task: str | None = None) -> ops.Pattern:
        """Return where a task's weights stand."""
        return self._views[self.tasks[task_index(self.tasks, task)]].pattern

    def mask(self, task: str | None = None) -> Tensor:
        """Return one task's mask: bool `[out_features, in_features]`, True = kept."""
        return unpack_bits(self.mask_bits[task_index(self.tasks, task)], self.in_features)

    def to_masked(self) -> MaskedLinear:
        """Return the same layer with all its weights: those that no task keeps are 0."""
        made = MaskedLinear(self.in_features, self.out_features, self.has_bias, tasks=self.tasks)
        made.set_mask({task: self.mask(task) for task in self.tasks})
        with torch.no_grad():
            made.weight.zero_()
        self.copy_to(made)
        return made

    @torch.no_grad()
    def copy_to(self, masked: MaskedLinear) -> None:
        """Write what is kept, and the bias, into a layer of the same masks; what no task keeps stays as it is.

        Raises:
            ValueError: If it has other masks.
        """
        if masked.tasks != self.tasks or not torch.equal(pack_bits(masked.masks.cpu()), self.mask_bits):
            raise ValueError("masked: got a layer of other masks, wanted those that this one was made with")
        for places, values in zip(self.places(), self.parts, strict=True):
            is_inside = places >= 0
            masked.weight.view(-1)[places[is_inside]] = values.flatten()[is_inside]
        if self.has_bias:
            masked.bias.copy_(self.bias)

    def _owners(self) -> Tensor:
        """Return which tasks own each weight, or block: int64, bit t of the t-th task."""
        masks = unpack_bits(self.mask_bits, self.in_features)
        grid = torch.stack([_blocks(mask).flatten(2).any(2) for mask in masks]) if self.is_blocks else masks
        return (grid * (1 << torch.arange(len(masks))).view(-1, 1, 1)).sum(0)

    def _view(self, owners: Tensor, place: int) -> _View:
        parts = tuple(i for i, code in enumerate(self._codes) if code >> place & 1)
        kept = (owners >> place & 1).bool()
        order = None
        if len(parts) != 1:
            rank = torch.empty_like(owners)
            rank[kept] = torch.arange(int(kept.sum()))
            of_parts = [rank[owners == self._codes[i]] for i in parts]
            order = torch.cat(of_parts) if of_parts else torch.zeros(0, dtype=torch.int64)
        return _View(parts, order, ops.pattern_of(kept, is_blocks=self.is_blocks))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        bits = state_dict.get(f"{prefix}mask_bits")
        if bits is not None and not torch.equal(bits.cpu(), self.mask_bits):
            args[-1].append(f"{prefix}mask_bits: got other masks, wanted those that the layer was made with")
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Show widths, format and how much each task keeps."""
        density = ", ".join(f"{task}={self.mask(task).float().mean().item():.1%}" for task in self.tasks)
        kind = "blocks" if self.is_blocks else "weights"
        return f"{self.in_features}, {self.out_features}, {kind}, density: {density}"


class CompressedMLP(nn.Module):
    """A `MaskedMLP` whose parameters are its kept weights alone, and whose every product skips what is pruned.

    It is what a network trains in while its masks stay as they are: values, gradients and an optimiser's moments take
    the memory of kept weights, and a step's time falls with them. It computes in float32 on the CPU, also under
    autocast. Heads are dense.

    Example:
        >>> masked = MaskedMLP(8, hidden=(4, 2), tasks=("ctr", "cvr"))
        >>> mlp = CompressedMLP.from_masked(masked)
        >>> mlp(torch.ones(3, 8), task="cvr").shape, mlp(torch.ones(3, 8)).shape
        (torch.Size([3, 1]), torch.Size([3, 2]))

    Source: LT4REC (arXiv 2008.09872), section 2.2 and Algorithm 1, `sNET * mask`.
    """

    def __init__(self, masked: MaskedMLP) -> None:
        super().__init__()
        for name, part in masked.named_parameters():
            if part.dtype != torch.float32 or part.device.type != "cpu":
                raise ValueError(f"{name}: got {part.dtype} on {part.device}, wanted torch.float32 on the CPU")
        self.in_features = masked.in_features
        self.out_features = masked.out_features
        self.tasks = masked.tasks
        self.layers = nn.ModuleList(CompressedLinear(layer) for layer in masked.masked_layers())
        self.heads = nn.ModuleDict({task: _copied(masked.heads[task]) for task in self.tasks})

    @classmethod
    def from_masked(cls, masked: MaskedMLP) -> CompressedMLP:
        """Return a compressed copy. What no task keeps is forgotten.

        Raises:
            ValueError: If a parameter is not float32 on the CPU.
        """
        return cls(masked)

    @staticmethod
    def is_faster_than(masked: MaskedMLP) -> bool:
        """Tell whether training steps of kept weights alone take less time, as measured (`BREAK_EVEN`)."""
        if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in masked.parameters()):
            return False
        if ops.cpu_engine() == "reference":
            return False
        layers = masked.masked_layers()
        is_blocks = all(BlockWeight.keeps_blocks(mask) for layer in layers for mask in layer.masks)
        kept = sum(int(layer.masks.sum()) for layer in layers) / len(masked.tasks)
        break_even = BREAK_EVEN["blocks" if is_blocks else "weights"]
        return kept <= break_even * sum(layer.weight.numel() for layer in layers)

    def to_masked(self) -> MaskedMLP:
        """Return the same network as a `MaskedMLP`: weights that no task keeps are 0, all others are the same bits."""
        widths = [layer.out_features for layer in self._layers]
        made = MaskedMLP(self.in_features, widths, self.out_features, tasks=self.tasks)
        made.layers = nn.ModuleList(layer.to_masked() for layer in self._layers)
        made.heads = nn.ModuleDict({task: _copied(self.heads[task]) for task in self.tasks})
        return made

    def copy_to(self, masked: MaskedMLP) -> None:
        """Write what is kept, biases and heads into an MLP of the same masks; what no task keeps stays as it is.

        Raises:
            ValueError: If it has other layers, tasks or masks.
        """
        if masked.tasks != self.tasks or len(masked.layers) != len(self.layers):
            got, wanted = (f"{len(mlp.layers)} layers of {', '.join(mlp.tasks)}" for mlp in (masked, self))
            raise ValueError(f"masked: got {got}, wanted {wanted}")
        for layer, of_masked in zip(self._layers, masked.masked_layers(), strict=True):
            layer.copy_to(of_masked)
        masked.heads.load_state_dict(self.heads.state_dict())

    def forward(self, x: Tensor, task: str | None = None) -> Tensor:
        """Run one task's subnetwork, or all of them.

        Args:
            x: `[..., in_features]`, float32.
            task: The task's name; None runs every task.

        Returns:
            Logits: `[..., out_features]` of the task, or `[..., tasks * out_features]` of all tasks side by side.

        Raises:
            ValueError: If there is no such task, or a shape, dtype or device disagrees.
        """
        tasks = self.tasks if task is None else (self.tasks[task_index(self.tasks, task)],)
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., {self.in_features}]")
        rows = x.reshape(-1, self.in_features)
        if ops.is_autocast(x):
            rows = rows.float()  # of all products these are not in a lower dtype
        logits = [self.heads[name](self._hidden(rows, name)) for name in tasks]
        y = logits[0] if len(tasks) == 1 else torch.cat(logits, dim=-1)
        return y.view(*x.shape[:-1], y.shape[-1])

    @property
    def _layers(self) -> Sequence[CompressedLinear]:
        return [layer for layer in self.layers if isinstance(layer, CompressedLinear)]

    def _hidden(self, x: Tensor, task: str) -> Tensor:
        layers = self._layers
        values, patterns = [layer.values(task) for layer in layers], [layer.pattern(task) for layer in layers]
        return ops.compressed_mlp(x, values, [layer.bias for layer in layers], patterns)


class _Arranged(torch.autograd.Function):
    """Parts one after the other, put where the engine reads them; gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.sizes = [len(part) for part in parts]
        joined = torch.cat(parts)
        return torch.empty_like(joined).index_copy_(0, places, joined)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (places,), (gradient,) = ctx.saved_tensors, gradients
        return None, *torch.split(gradient.index_select(0, places), ctx.sizes)


def _blocks(weight: Tensor, fill: int = 0) -> Tensor:
    """Return `[rows, columns, 16, 4]`: a weight's blocks, filled up beyond its edges."""
    (high, wide), (n, k) = BlockWeight.BLOCK, weight.shape
    padded = nn.functional.pad(weight, (0, -k % wide, 0, -n % high), value=fill)
    return padded.view(len(padded) // high, high, -1, wide).transpose(1, 2)


def _copied(head: nn.Module) -> nn.Linear:
    assert isinstance(head, nn.Linear)
    return deepcopy(head)
