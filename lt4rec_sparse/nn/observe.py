"""What enters a model's calls of the engine when the model runs on an example."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn.sparse import SparseMLP


def calls_of(model: nn.Module) -> dict[str, SparseMLP]:
    """Return name -> each call of the engine in a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseMLP)}


def inputs_of(model: nn.Module, example: Any) -> dict[str, list[Tensor]]:
    """Run a model on an example, and return name -> what entered each call of the engine, once for each time it ran.

    Args:
        model: Any module.
        example: What the model is called with: an input, a tuple of them, or a mapping of them by name.
    """
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.setdefault(name, []).append(arguments[0].detach().clone())  # the model may overwrite it

    hooks = [module.register_forward_pre_hook(partial(keep, name)) for name, module in calls_of(model).items()]
    try:
        with torch.inference_mode():
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def rows_of(x: Tensor) -> Tensor:
    """Return an input as a call reads it: float32 `[rows, in_features]`."""
    return x.reshape(-1, x.shape[-1]).float()


def batch_of(example: Any) -> int:
    """Return the batch size of an example: the length of its first tensor.

    Raises:
        ValueError: If there is no tensor, or it has no rows.
    """
    inputs = example.values() if isinstance(example, Mapping) else example if isinstance(example, tuple) else (example,)
    sizes = [len(x) for x in inputs if isinstance(x, Tensor) and x.dim()]
    if not sizes or not sizes[0]:
        raise ValueError(f"example: got {type(example).__name__} of sizes {sizes}, wanted a tensor of at least one row")
    return sizes[0]
