"""Layers that are trained through one mask per task: drop-ins for `nn.Linear` and for an MLP."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lt4rec_sparse import ops
from lt4rec_sparse.masks import Mask, pack_words
from lt4rec_sparse.network import FrozenNetwork
from lt4rec_sparse.nn import plain
from lt4rec_sparse.nn.chain import layers_of
from lt4rec_sparse.nn.reading import pruned


class MaskedLinear(nn.Linear):
    """A linear layer that each task sees through its own mask: `y = x @ (weight * mask_task).T + bias`.

    With no `tasks` it is a drop-in for `nn.Linear` with one mask, at first all True.

    Masks change through `set_mask`, with a loaded state, or by `torch.nn.utils.prune`. On a GPU they are read packed,
    from `mask_words`: a mask that is written in place is packed again before the next call, but a compiled graph does
    not look for that.

    A state holds `masks`, and in `mask_tasks` the names of their tasks (JSON, as uint8). Masks are loaded by name,
    whatever the order; other names raise. A state without names, as of version 0.1, is loaded if it cannot be
    mistaken: if there is one task, or all its masks are equal.

    `torch.nn.utils.prune` on `weight` prunes for every task, and for ever: what it prunes is pruned from the masks, so
    that `mask` tells and `freeze` keeps it, before and after `prune.remove`. A parametrisation of the weight changes
    no mask.

    `DistributedDataParallel` sends the masks of the first process to all others with every forward pass, unless
    `forward_sync_buffers=False`. (Before torch 2.13 it is `broadcast_buffers=False`, which sends them never: every
    process must set the same masks.)

    Example:
        >>> layer = MaskedLinear(4, 2)
        >>> layer.set_mask(torch.zeros(2, 4, dtype=torch.bool))
        >>> torch.equal(layer(torch.ones(3, 4)), layer.bias.expand(3, 2))
        True

    Args:
        in_features, out_features, device, dtype: As in `nn.Linear`.
        bias: Whether there is a bias; it is never masked.
        tasks: The tasks' names.

    Raises:
        TypeError: If `bias` is not a bool.
        ValueError: If there is no task, or two have the same name.

    Source: LT4REC (arXiv 2008.09872), section 2.2.
    """

    masks: Tensor  # bool [tasks, out_features, in_features]
    mask_words: Tensor  # int32 [tasks, out_features, W], `pack_words` of the masks

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        tasks: Sequence[str] = ("task",),
    ) -> None:
        if not isinstance(bias, bool):
            raise TypeError(f"bias: got {bias!r}, wanted True or False (tasks are named by keyword)")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.tasks = check_tasks(tasks)
        planes = torch.ones(len(tasks), out_features, in_features, dtype=torch.bool, device=device)
        self.register_buffer("masks", planes)
        self.register_buffer("mask_words", pack_words(planes), persistent=False)
        self._packed = _identity(planes)

    @classmethod
    def from_linear(cls, linear: nn.Module, *, tasks: Sequence[str] = ("task",)) -> MaskedLinear:
        """Return a masked copy of an `nn.Linear`: its mask keeps what `torch.nn.utils.prune` kept, or what is not zero.

        Raises:
            ValueError: If it is no plain `nn.Linear`, has hooks, or the tasks are not different names.
        """
        return cls._of(plain.of_linear(linear), linear.weight.device, tasks)

    @classmethod
    def _of(cls, layer: plain.PlainLayer, device: Any, tasks: Sequence[str]) -> MaskedLinear:
        (n, k), dtype = layer.weight.shape, layer.weight.dtype
        made = cls(k, n, layer.bias is not None, device, dtype, tasks=tasks)
        with torch.no_grad():
            made.weight.copy_(layer.weight)
            if layer.bias is not None:
                made.bias.copy_(layer.bias)
        for task in made.tasks:
            made.set_mask(layer.mask, task)
        return made

    def mask(self, task: str | None = None) -> Tensor:
        """Return one task's mask: bool `[out_features, in_features]`, True = kept.

        Raises:
            ValueError: If there is no such task, or none is named and there are several.
        """
        return self.masks[task_index(self.tasks, task)]

    def set_mask(self, mask: Tensor | Mapping[str, Tensor], task: str | None = None) -> None:
        """Set one task's mask: bool `[out_features, in_features]`, True = kept; copied. Or those of several by name.

        While `torch.nn.utils.prune` prunes the weight, what it prunes stays pruned. If one mask cannot be, none is set.

        Raises:
            TypeError: If a mask is not a tensor.
            ValueError: If a shape or dtype is wrong, or a task is unknown.
        """
        masks = _by_task(mask, task, isinstance(mask, Mapping))
        places = [task_index(self.tasks, name) for name in masks]
        for of_task in masks.values():
            if not isinstance(of_task, Tensor):
                got, wanted = type(of_task).__name__, tuple(self.weight.shape)
                raise TypeError(f"mask: got a {got}, wanted a bool tensor {wanted}")
            if of_task.shape != self.weight.shape or of_task.dtype != torch.bool:
                got, wanted = f"{of_task.dtype} {tuple(of_task.shape)}", tuple(self.weight.shape)
                raise ValueError(f"mask: got {got}, wanted torch.bool {wanted}, True = kept")
        for place, of_task in zip(places, masks.values(), strict=True):
            self.masks[place] = of_task.to(self.masks.device)
        self._pack()

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias as the next forward pass reads them.

        They are the attributes of these names but where `torch.nn.utils.prune` is at work: it computes the attributes
        before each forward pass, so that after a step of an optimiser they are those of the step before.
        """
        weight, bias = (pruned(self, name) for name in ("weight", "bias"))
        assert weight is not None
        return weight, bias

    def forward(self, x: Tensor, task: str | None = None, activation: str = "none", every_task: bool = False) -> Tensor:
        """Apply the layer through one task's mask, or through every task's at once.

        Args:
            x: `[..., in_features]`, dtype and device of the weight; a lower dtype under autocast. For every task
                `[rows, in_features]`, which all of them read, or `[tasks, rows, in_features]`.
            task: The task's name; may be left out where there is one.
            activation: "none", or "relu" in the same kernel.
            every_task: Whether to apply every task's mask, instead of that of `task`: `[tasks, rows, out_features]`.

        Raises:
            ValueError: If there is no such task, or a shape, dtype or device disagrees.
        """
        planes = self._planes()
        mask = planes if every_task else planes[task_index(self.tasks, task)]
        return ops.masked_linear(x, self.weight, mask, self.bias, activation)

    @property
    def mask_tasks(self) -> Tensor:
        """The tasks' names, as a state holds them: uint8, the bytes of a JSON list."""
        return torch.frombuffer(bytearray(json.dumps(self.tasks).encode()), dtype=torch.uint8)

    def _planes(self) -> Tensor:
        """Return the masks as the kernels of the device read them."""
        if self.masks.device.type == "cpu":
            return self.masks
        if not torch.compiler.is_compiling() and _identity(self.masks) != self._packed:
            self._pack()
        return self.mask_words

    def _pack(self) -> None:
        pruned = self._buffers.get("weight_mask")  # of torch.nn.utils.prune
        if pruned is not None:
            self.masks &= pruned.to(self.masks.device) != 0
        words = pack_words(self.masks)
        if words.device == self.mask_words.device:
            self.mask_words.copy_(words)  # in place, where captured and compiled graphs read it
        else:
            self.mask_words = words  # a state was loaded into a module on the meta device
        self._packed = _identity(self.masks)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As in `nn.Module`; what `torch.nn.utils.prune` registers for the weight is pruned from the masks."""
        super().register_buffer(name, tensor, persistent)
        if name == "weight_mask":
            self._pack()

    # Where the masks become another tensor, it may stand where the old one stood: they are packed anew.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}mask_tasks"] = self.mask_tasks

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        errors: list[str] = args[-1]
        names, masks = state_dict.pop(f"{prefix}mask_tasks", None), state_dict.get(f"{prefix}masks")
        if masks is not None:
            try:
                state_dict[f"{prefix}masks"] = self._of_own_tasks(masks, names)
            except ValueError as error:
                errors.append(f"{prefix}masks: {error}")
                state_dict[f"{prefix}masks"] = self.masks
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._pack()

    def _of_own_tasks(self, masks: Tensor, names: Tensor | None) -> Tensor:
        """Return the masks of a state in the order of this layer's tasks."""
        if names is None:
            if len(masks) > 1 and not bool((masks == masks[:1]).all()):
                raise ValueError("got several without the names of their tasks, wanted mask_tasks beside them")
            return masks
        got = json.loads(bytes(names.tolist())) if names.dtype == torch.uint8 and names.dim() == 1 else None
        if not isinstance(got, list) or len(got) != len(masks) or not all(isinstance(name, str) for name in got):
            raise ValueError(f"got {len(masks)} of tasks {got}, wanted a name for each (in mask_tasks)")
        if sorted(got) != sorted(self.tasks):
            raise ValueError(f"got {len(masks)} of tasks {', '.join(got)}, wanted those of {', '.join(self.tasks)}")
        return masks if got == list(self.tasks) else masks[[got.index(task) for task in self.tasks]]

    def _apply(self, *args: Any, **kwargs: Any) -> MaskedLinear:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._pack()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()

    def extra_repr(self) -> str:
        """Show the tasks and how much each keeps."""
        density = ", ".join(f"{t}={self.mask(t).float().mean().item():.1%}" for t in self.tasks)
        return f"{super().extra_repr()}, density: {density}"


class MaskedMLP(nn.Module):
    """One shared MLP, with a mask and a head per task: `h = relu(h @ (weight * mask_task).T + bias)`, then the head.

    Only the hidden weights are masked, never biases and heads. With no `tasks` it is a drop-in for an MLP. States,
    pruning by torch and `DistributedDataParallel` are as for `MaskedLinear`.

    Example:
        >>> mlp = MaskedMLP(8, hidden=(4, 2), tasks=("ctr", "cvr"))
        >>> mlp(torch.ones(3, 8), task="cvr").shape, mlp(torch.ones(3, 8)).shape
        (torch.Size([3, 1]), torch.Size([3, 2]))

    Args:
        in_features: Width of `x`.
        hidden: Widths of the hidden layers.
        out_features: How many outputs each task has: the width of its head.
        tasks: The tasks' names.

    Raises:
        TypeError: If `out_features` is not a number.
        ValueError: If there is no hidden layer, no task, or two tasks have the same name.

    Source: LT4REC (arXiv 2008.09872), section 2.2 and Algorithm 1, `sNET * mask`.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (512, 256, 128),
        out_features: int = 1,
        *,
        tasks: Sequence[str] = ("task",),
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("hidden: got no layer, wanted at least one width")
        if not isinstance(out_features, int):
            raise TypeError(f"out_features: got {out_features!r}, wanted the number of outputs per task")
        self.in_features = in_features
        self.out_features = out_features
        self.tasks = check_tasks(tasks)
        widths = (in_features, *hidden)
        self.layers = nn.ModuleList(
            MaskedLinear(k, n, tasks=self.tasks) for k, n in zip(widths[:-1], widths[1:], strict=True)
        )
        self.heads = nn.ModuleDict({task: nn.Linear(hidden[-1], out_features) for task in self.tasks})

    @classmethod
    def from_sequential(cls, sequential: nn.Module, *, tasks: Sequence[str] = ("task",)) -> MaskedMLP:
        """Return a masked copy of an `nn.Sequential` of linear layers with a ReLU between: the last one is the head.

        Every task gets the masks that the layers have (`MaskedLinear.from_linear`) and a head of its own, all alike.
        Otherwise as `SparseMLP.from_sequential`: BatchNorm1d is folded as in `eval()`, Dropout is dropped. A head is
        dense: it keeps its zeros as weights that can be trained.

        Raises:
            ValueError: If it contains something else, there are fewer than two linear layers, one of the hidden ones
                has no ReLU, or the last one an activation.
        """
        *hidden, last = layers_of(sequential)
        device = next(sequential.parameters()).device
        if not hidden:
            raise ValueError("sequential: got one linear layer, wanted at least two: hidden ones and the head")
        for i, layer in enumerate((*hidden, last)):
            wanted = "none" if layer is last else "relu"
            if layer.activation != wanted:
                raise ValueError(f"linear layer {i}: got activation {layer.activation}, wanted {wanted}")
        made = cls(hidden[0].weight.shape[1], [len(layer.weight) for layer in hidden], len(last.weight), tasks=tasks)
        made.layers = nn.ModuleList(MaskedLinear._of(layer, device, made.tasks) for layer in hidden)
        for head in made.heads.values():
            assert isinstance(head, nn.Linear)
            with torch.no_grad():
                head.weight.copy_(last.weight)
                head.bias.copy_(torch.zeros(()) if last.bias is None else last.bias)
        made.heads.to(device, last.weight.dtype)
        return made

    @classmethod
    def from_network(cls, network: FrozenNetwork) -> MaskedMLP:
        """Return a frozen network as one to train on, in float32: its masks, weights, biases and heads.

        A head that ends in a sigmoid gives logits. Weights that no task keeps are 0.

        Raises:
            ValueError: If there is no hidden layer or no head, a hidden layer does not end in ReLU, or a head in
                anything but a sigmoid or nothing.
        """
        if not network.hidden or not network.heads:
            raise ValueError("network: got one without hidden layers or without heads, wanted both")
        ends: dict[str, tuple[str, tuple[str, ...]]]
        ends = {f"layer {i}": (layer.activation, ("relu",)) for i, layer in enumerate(network.hidden)}
        ends |= {f"head of {t}": (head.activation, ("none", "sigmoid")) for t, head in network.heads.items()}
        for name, (activation, wanted) in ends.items():
            if activation not in wanted:
                raise ValueError(f"{name}: got activation {activation}, wanted {' or '.join(wanted)}")
        *hidden, out_features = network.widths
        made = cls(network.in_features, hidden, out_features, tasks=network.tasks)
        layers: list[tuple[nn.Linear, Tensor, Tensor | None]] = []
        for masked, sparse in zip(made.masked_layers(), network.hidden, strict=True):
            masked.set_mask({task: sparse.weight.mask(task) for task in network.tasks})
            layers.append((masked, sparse.weight.to_dense(), sparse.bias))
        for task, head in network.heads.items():
            linear = made.heads[task]
            assert isinstance(linear, nn.Linear)
            layers.append((linear, head.weight, head.bias))
        with torch.no_grad():
            for linear, weight, bias in layers:
                linear.weight.copy_(weight)
                linear.bias.copy_(torch.zeros(()) if bias is None else bias)
        return made

    def masked_layers(self) -> list[MaskedLinear]:
        """Return the hidden layers, input first."""
        return [layer for layer in self.layers if isinstance(layer, MaskedLinear)]

    def masked_weights(self) -> dict[str, Tensor]:
        """Return the weights that masks apply to, by the layer names that masks use."""
        return {f"layers.{i}": layer.weight for i, layer in enumerate(self.masked_layers())}

    def mask(self, task: str | None = None) -> Mask:
        """Return one task's mask over all hidden layers; the task may be left out where there is one."""
        return Mask({f"layers.{i}": layer.mask(task) for i, layer in enumerate(self.masked_layers())})

    def set_mask(self, mask: Mapping[str, Any], task: str | None = None) -> None:
        """Set one task's mask over all hidden layers, or those of several tasks by name.

        Args:
            mask: A `Mask`, or a mapping like it: layer name -> bool tensor. Or task name -> such a mask, as
                `lottery.random_masks` returns them. If one cannot be, none is set.
            task: The task of a single mask; may be left out where there is one.

        Raises:
            TypeError: If a mask is no mapping, or of other things than bool tensors.
            ValueError: If a mask names other layers or shapes than `masked_weights`, or a task is unknown.
        """
        is_by_task = isinstance(mask, Mapping) and all(isinstance(of_task, Mapping) for of_task in mask.values())
        masks = _by_task(mask, task, is_by_task)
        wanted = {name: (w.shape[0], w.shape[1]) for name, w in self.masked_weights().items()}
        found = {}
        for name, of_task in masks.items():
            if not isinstance(of_task, Mapping) or not all(isinstance(kept, Tensor) for kept in of_task.values()):
                raise TypeError(f"mask: got a {type(of_task).__name__}, wanted a Mask of layers {', '.join(wanted)}")
            made = of_task if isinstance(of_task, Mask) else Mask(of_task)
            if made.shapes != wanted:
                raise ValueError(f"mask: got layers {made.shapes}, wanted {wanted}")
            found[self.tasks[task_index(self.tasks, name)]] = made
        for of_layer, layer in zip(wanted, self.masked_layers(), strict=True):
            layer.set_mask({name: made[of_layer] for name, made in found.items()})

    def forward(self, x: Tensor, task: str | None = None) -> Tensor:
        """Run one task's subnetwork, or all of them at once.

        Args:
            x: `[..., in_features]`.
            task: The task's name; None runs every task: each layer of all of them in one launch on a GPU.

        Returns:
            Logits: `[..., out_features]` of the task, or `[..., tasks * out_features]` of all tasks side by side.
        """
        if task is None and len(self.tasks) == 1:
            task = self.tasks[0]
        if task is not None:
            task_index(self.tasks, task)
            for layer in self.layers:
                x = layer(x, task, "relu")
            logits: Tensor = self.heads[task](x)
            return logits
        h = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        for layer in self.layers:
            h = layer(h, None, "relu", every_task=True)
        scores = [self.heads[name](of_task) for name, of_task in zip(self.tasks, h.unbind(), strict=True)]
        y = torch.cat(scores, dim=-1)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _by_task(mask: Any, task: str | None, is_by_task: bool) -> dict[str | None, Any]:
    """Return task -> mask, of a mapping of them or of one alone."""
    if not is_by_task:
        return {task: mask}
    if task is not None:
        raise ValueError(f"task: got {task!r} beside masks of {', '.join(mask)}, wanted masks by their names alone")
    return dict(mask)


def _identity(t: Tensor) -> tuple[int, int]:
    """Tell one content of a tensor from another: which memory it is, and how often that was written."""
    return (0 if t.is_meta else t.data_ptr()), (0 if t.is_inference() else t._version)


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks' names as a tuple, or raise a ValueError."""
    if isinstance(tasks, str) or not tasks or len(set(tasks)) != len(tasks) or len(tasks) > 62:
        raise ValueError(f"tasks: got {tasks!r}, wanted a sequence of different names, 1 to 62 of them")
    return tuple(tasks)


def task_index(tasks: tuple[str, ...], task: str | None) -> int:
    """Return which of the tasks is named; None names the only one, and anything else raises a ValueError."""
    if task is None and len(tasks) == 1:
        return 0
    if task not in tasks:
        raise ValueError(f"task: got {task!r}, wanted one of {', '.join(tasks)}")
    return tasks.index(task)
