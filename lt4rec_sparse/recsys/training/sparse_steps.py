"""Training through masks that stay as they are, with kept weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lt4rec_sparse.nn import CompressedMLP, MaskedMLP


@contextmanager
def sparse_steps(model: nn.Module) -> Iterator[None]:
    """Let every `MaskedMLP` of a model whose steps are faster so be a `CompressedMLP` meanwhile.

    At the end kept weights, biases and heads go back to the `MaskedMLP`, also past an exception; weights that no task
    keeps stay as they were.
    """
    swapped: list[tuple[nn.Module, str, MaskedMLP, CompressedMLP]] = []
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, MaskedMLP) and CompressedMLP.is_faster_than(child):
                swapped.append((parent, name, child, CompressedMLP.from_masked(child)))
    for parent, name, _, compressed in swapped:
        setattr(parent, name, compressed)
    try:
        yield
    finally:
        for parent, name, masked, compressed in swapped:
            compressed.copy_to(masked)
            setattr(parent, name, masked)
