"""A plain MLP: the experts and towers of models that are not pruned."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Layers of `h = relu(h @ weight.T + bias)`, and optionally a linear head; initialised as by torch.

    Args:
        in_features: Width of `x`.
        hidden: Widths of the hidden layers; empty for a head alone, or for the identity.
        head: Width of the head; 0 for none.

    Raises:
        ValueError: If a width is below 1.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], head: int = 0) -> None:
        super().__init__()
        if min((in_features, *hidden)) < 1:
            raise ValueError(f"hidden: got {tuple(hidden)} after {in_features}, wanted widths of at least 1")
        widths = (in_features, *hidden)
        self.layers = nn.ModuleList(nn.Linear(k, n) for k, n in zip(widths[:-1], widths[1:], strict=True))
        self.head = nn.Linear(widths[-1], head) if head else None
        self.out_features = head or widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out_features]` for `x [..., in_features]`."""
        for layer in self.layers:
            x = layer(x).relu()
        return x if self.head is None else self.head(x)


def lower_and_upper(hidden: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split an MLP's widths: all but the last, which tasks may share, and the last, which is a task's tower.

    A single width is shared, and a tower is then a head alone.

    Raises:
        ValueError: If there is no width.
    """
    if not hidden:
        raise ValueError("hidden: got no layer, wanted at least one width")
    cut = max(1, len(hidden) - 1)
    return tuple(hidden[:cut]), tuple(hidden[cut:])


def half(widths: Sequence[int]) -> tuple[int, ...]:
    """Return half of every width: four experts of these widths cost about as much as two MLPs."""
    return tuple(max(1, width // 2) for width in widths)
