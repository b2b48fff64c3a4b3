"""Layers that are trained through a mask a task: drop-ins for `nn.Linear` and for an MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lt4rec_sparse import ops
from lt4rec_sparse.masks import Mask, pack_words


class TaskRows(NamedTuple):
    """Which rows of a batch each task reads, in the order of the tasks: `lengths[t]` rows from `starts[t]` on."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    def apart(self) -> TaskRows:
        """Return where they stand in a result, whose rows are the tasks' one after another."""
        return TaskRows((0, *accumulate(self.lengths[:-1])), self.lengths)


class MaskedLinear(nn.Linear):
    """A linear layer that each task sees through its own mask: `y = x @ (weight * mask_task).T + bias`.

    With no `tasks` it is a drop-in for `nn.Linear` with one mask, at first all True.

    Masks change through `set_mask`, or with a loaded state. On a GPU they are read packed, from `mask_words`: a mask
    that is written in place is packed again before the next call, but inside a compiled graph nothing looks for that.

    Example:
        >>> layer = MaskedLinear(4, 2)
        >>> layer.set_mask(torch.zeros(2, 4, dtype=torch.bool))
        >>> torch.equal(layer(torch.ones(3, 4)), layer.bias.expand(3, 2))
        True

    Args:
        in_features: Width of `x`.
        out_features: Width of `y`.
        bias: Whether there is a bias; it is never masked.
        tasks: The tasks' names.
        device: As in `nn.Linear`.
        dtype: As in `nn.Linear`.

    Source: LT4REC (arXiv 2008.09872), section 2.2.
    """

    masks: Tensor  # bool [tasks, out_features, in_features]
    mask_words: Tensor  # int32 [tasks, out_features, W], `pack_words` of the masks

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        tasks: Sequence[str] = ("task",),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.tasks = check_tasks(tasks)
        planes = torch.ones(len(tasks), out_features, in_features, dtype=torch.bool, device=device)
        self.register_buffer("masks", planes)
        self.register_buffer("mask_words", pack_words(planes), persistent=False)
        self._packed = _identity(planes)

    def mask(self, task: str | None = None) -> Tensor:
        """Return one task's mask: bool `[out_features, in_features]`, True = kept.

        Raises:
            ValueError: If there is no such task, or none is named and there are several.
        """
        return self.masks[task_index(self.tasks, task)]

    def set_mask(self, mask: Tensor, task: str | None = None) -> None:
        """Set one task's mask: bool `[out_features, in_features]`, True = kept; copied.

        Raises:
            ValueError: If the shape or dtype is another, or the task is unknown.
        """
        if mask.shape != self.weight.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask: got {mask.dtype} {tuple(mask.shape)}, wanted torch.bool {tuple(self.weight.shape)}, True = kept"
            )
        self.masks[task_index(self.tasks, task)] = mask.to(self.masks.device)
        self._pack()

    def forward(
        self, x: Tensor, task: str | None = None, activation: str = "none", rows: TaskRows | None = None
    ) -> Tensor:
        """Apply the layer through one task's mask, or through every task's, each to its rows.

        Args:
            x: `[..., in_features]`, dtype and device of the weight; a lower dtype under autocast.
            task: The task's name; may be left out where there is one.
            activation: "none", or "relu" in the same kernel.
            rows: Instead of a task: which rows of `x [rows, in_features]` each task reads.

        Returns:
            `[..., out_features]`, dtype of `x`; of several tasks their rows one after another.
        """
        if rows is not None:
            return ops.masked_linear_tasks(x, self.weight, self._planes(), self.bias, *rows, activation)
        plane = self._planes()[task_index(self.tasks, task)]
        return ops.masked_linear(x, self.weight, plane, self.bias, activation)

    def _planes(self) -> Tensor:
        """Return the masks as the kernels of the device read them."""
        if self.masks.device.type == "cpu":
            return self.masks
        if not torch.compiler.is_compiling() and _identity(self.masks) != self._packed:
            self._pack()
        return self.mask_words

    def _pack(self) -> None:
        words = pack_words(self.masks)
        if words.device == self.mask_words.device:
            self.mask_words.copy_(words)  # in place, where captured and compiled graphs read it
        else:
            self.mask_words = words  # a state was loaded into a module on the meta device
        self._packed = _identity(self.masks)

    # Where the masks become another tensor, it may stand where the old one stood: they are packed anew.

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pack()

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
    """One shared MLP, a mask and a head a task: `h = relu(h @ (weight * mask_task).T + bias)`, then the task's head.

    Only the hidden weights are masked, never biases and heads. With no `tasks` it is a drop-in for an MLP.

    Example:
        >>> mlp = MaskedMLP(8, hidden=(4, 2), tasks=("ctr", "cvr"))
        >>> mlp(torch.ones(3, 8), task="cvr").shape, mlp(torch.ones(3, 8)).shape
        (torch.Size([3, 1]), torch.Size([3, 2]))

    Args:
        in_features: Width of `x`.
        hidden: Widths of the hidden layers.
        out_features: Width of each task's head.
        tasks: The tasks' names.

    Source: LT4REC (arXiv 2008.09872), section 2.2 and Algorithm 1, `sNET * mask`.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (512, 256, 128),
        out_features: int = 1,
        tasks: Sequence[str] = ("task",),
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("hidden: got no layer, wanted at least one width")
        self.in_features = in_features
        self.out_features = out_features
        self.tasks = check_tasks(tasks)
        widths = (in_features, *hidden)
        self.layers = nn.ModuleList(
            MaskedLinear(k, n, tasks=self.tasks) for k, n in zip(widths[:-1], widths[1:], strict=True)
        )
        self.heads = nn.ModuleDict({task: nn.Linear(hidden[-1], out_features) for task in self.tasks})

    def masked_layers(self) -> list[MaskedLinear]:
        """Return the hidden layers, input first."""
        return [layer for layer in self.layers if isinstance(layer, MaskedLinear)]

    def masked_weights(self) -> dict[str, Tensor]:
        """Return the weights that masks apply to, by the layer names that masks use."""
        return {f"layers.{i}": layer.weight for i, layer in enumerate(self.masked_layers())}

    def mask(self, task: str | None = None) -> Mask:
        """Return one task's mask over all hidden layers."""
        return Mask({f"layers.{i}": layer.mask(task) for i, layer in enumerate(self.masked_layers())})

    def set_mask(self, mask: Mask, task: str | None = None) -> None:
        """Set one task's mask over all hidden layers.

        Raises:
            ValueError: If the mask names other layers or shapes than `masked_weights`, or the task is unknown.
        """
        wanted = {name: (w.shape[0], w.shape[1]) for name, w in self.masked_weights().items()}
        if mask.shapes != wanted:
            raise ValueError(f"mask: got layers {mask.shapes}, wanted {wanted}")
        for name, layer in zip(wanted, self.masked_layers(), strict=True):
            layer.set_mask(mask[name], task)

    def forward(
        self, x: Tensor, task: str | None = None, rows: Mapping[str, tuple[int, int]] | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Run one task's subnetwork, or all of them at once.

        Args:
            x: `[batch, in_features]`.
            task: The task's name; None runs every task: each layer of all of them in one launch on a GPU.
            rows: Where tasks read parts of the batch only: task -> first row, and the row after the last. With two
                tasks order the batch [only a | both | only b].

        Returns:
            Logits: `[batch, out_features]` of the task; or those of all tasks side by side,
            `[batch, tasks * out_features]`; or with `rows` task -> `[its rows, out_features]`.

        Raises:
            ValueError: If there is no such task, both task and rows are given, rows name other tasks, or a range is not
                inside the batch.
        """
        if task is not None:
            if rows is not None:
                raise ValueError(f"task and rows: got both, {task!r} and {dict(rows)}, wanted one of them")
            task_index(self.tasks, task)
            for layer in self.layers:
                x = layer(x, task, "relu")
            logits: Tensor = self.heads[task](x)
            return logits
        if rows is None and len(self.tasks) == 1:
            only: Tensor = self(x, self.tasks[0])
            return only
        of_tasks = self._task_rows(x.shape[0], rows)
        for layer in self.layers:
            x = layer(x, None, "relu", of_tasks)
            of_tasks = of_tasks.apart()
        parts = torch.split(x, list(of_tasks.lengths))
        scores = {name: self.heads[name](part) for name, part in zip(self.tasks, parts, strict=True)}
        return scores if rows is not None else torch.cat(list(scores.values()), dim=-1)

    def _task_rows(self, batch: int, rows: Mapping[str, tuple[int, int]] | None) -> TaskRows:
        if rows is None:
            return TaskRows((0,) * len(self.tasks), (batch,) * len(self.tasks))
        if set(rows) != set(self.tasks):
            raise ValueError(f"rows: got tasks {', '.join(rows)}, wanted {', '.join(self.tasks)}")
        for name, (start, stop) in rows.items():
            if not 0 <= start <= stop <= batch:
                raise ValueError(f"rows of {name}: got {start} to {stop}, wanted some of the {batch} rows of x")
        ranges = [rows[name] for name in self.tasks]
        return TaskRows(tuple(start for start, _ in ranges), tuple(stop - start for start, stop in ranges))


def _identity(t: Tensor) -> tuple[int, int]:
    """Tell one content of a tensor from another: which memory it is, and how often that was written."""
    return (0 if t.is_meta else t.data_ptr()), (0 if t.is_inference() else t._version)


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks' names as a tuple.

    Raises:
        ValueError: If there is none, one stands twice, or there are more than 62 (owners are bits of an int64).
    """
    if isinstance(tasks, str) or not tasks or len(set(tasks)) != len(tasks) or len(tasks) > 62:
        raise ValueError(f"tasks: got {tasks!r}, wanted a sequence of different names, 1 to 62 of them")
    return tuple(tasks)


def task_index(tasks: tuple[str, ...], task: str | None) -> int:
    """Return which of the tasks is named; None names the only one.

    Raises:
        ValueError: If there is no such task, or none is named and there are several.
    """
    if task is None and len(tasks) == 1:
        return 0
    if task not in tasks:
        raise ValueError(f"task: got {task!r}, wanted one of {', '.join(tasks)}")
    return tasks.index(task)
