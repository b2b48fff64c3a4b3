"""An `nn.Sequential` as layers that the engine computes in one call: which modules belong to which linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from lt4rec_sparse.nn.plain import FUSED, PlainLayer, is_activation, of_linear, with_activation
from lt4rec_sparse.nn.reading import affine_of, computes_as, hook_of

DROPPED = (nn.Dropout, nn.AlphaDropout, nn.Identity)  # these do nothing at inference


class Chain:
    """Linear layers one after the other, with what belongs to each; built module by module.

    Activations (`plain.is_activation`) belong to the linear layer before them. BatchNorm1d is folded into the linear
    layer before it, or the one after it, as it computes in `eval()` on `[batch, features]`; the products are formed in
    float64. `DROPPED` are dropped.

    Args:
        begin: The place of the first module that can be taken.
        read: Reads a linear layer, as `of_linear`, or raises a ValueError.
    """

    def __init__(self, begin: int = 0, read: Callable[[nn.Module, str], PlainLayer] = of_linear) -> None:
        self.layers: list[PlainLayer] = []
        self.linear: list[nn.Module] = []  # what each was read from
        self.places: list[tuple[int, int]] = []  # of each layer: its first module, and the one after its last
        self.waiting: tuple[Tensor, Tensor] | None = None  # scale and shift that the next linear layer takes in
        self._next, self._read = begin, read  # where the next layer's modules begin

    def take(self, place: int, module: nn.Module, name: str) -> None:
        """Add the next module.

        Raises:
            ValueError: If it cannot be part of the chain; the message begins with `name`. The chain is as it was.
        """
        if isinstance(module, nn.Linear):
            layer = self._read(module, name)
            self.layers.append(layer if self.waiting is None else _after(layer, *self.waiting, name))
            self.linear.append(module)
            self.waiting = None
            self.places.append((self._next, place + 1))
            self._next = place + 1
            return
        if reason := hook_of(module):
            raise ValueError(f"{name}: {reason}")
        if computes_as(module, nn.BatchNorm1d):
            assert isinstance(module, nn.BatchNorm1d)
            self._take_norm(*affine_of(module, name), name)
        elif is_activation(module):
            if not self.layers or self.layers[-1].activation != "none" or self.waiting is not None:
                raise ValueError(f"{name}: got a {type(module).__name__}, wanted it right after a linear layer")
            self.layers[-1] = with_activation(self.layers[-1], module, name)
        elif not computes_as(module, *DROPPED):
            kinds: tuple[type[nn.Module], ...] = (nn.Linear, *FUSED, nn.BatchNorm1d, *DROPPED)
            wanted = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name}: got a {type(module).__name__}, wanted {wanted}")
        if self.layers and self.waiting is None:
            self.places[-1] = (self.places[-1][0], place + 1)
            self._next = place + 1

    def try_take(self, place: int, module: nn.Module, name: str) -> bool:
        """Add the next module if it can be part of the chain, and tell whether it could."""
        try:
            self.take(place, module, name)
        except ValueError:
            return False
        return True

    def _take_norm(self, scale: Tensor, shift: Tensor, name: str) -> None:
        if self.waiting is not None:
            self.waiting = self.waiting[0] * scale, self.waiting[1] * scale + shift
        elif self.layers and self.layers[-1].activation == "none":
            self.layers[-1] = _before(self.layers[-1], scale, shift, name)
        else:
            self.waiting = scale, shift


def layers_of(sequential: nn.Module) -> list[PlainLayer]:
    """Return the layers of an `nn.Sequential` as it computes in `eval()`; one within is read as if it were not there.

    Raises:
        ValueError: If it contains something that a `Chain` does not take; the message names it.
    """
    chain, last = Chain(), ""
    for place, (name, module) in enumerate(_flat(sequential, "")):
        chain.take(place, module, name)
        last = name if isinstance(module, nn.Linear) else last
    if not chain.layers:
        raise ValueError("sequential: got one without a linear layer, wanted at least one")
    if chain.waiting is not None:
        raise ValueError(
            f"sequential: got a BatchNorm1d after the activation of {last}, wanted a linear layer after it"
        )
    return chain.layers


def chains_of(sequential: nn.Module, read: Callable[[nn.Module, str], PlainLayer]) -> Iterator[Chain]:
    """Yield the longest chains among the children of an `nn.Sequential`; places are those of the children."""
    chain = Chain(0, read)
    for place, (name, child) in enumerate(sequential._modules.items()):
        if not chain.try_take(place, child or nn.Identity(), name):
            yield chain
            chain = Chain(place + 1, read)
    yield chain


def _flat(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if not computes_as(module, nn.Sequential):
        where = prefix or "sequential"
        raise ValueError(
            f"{where}: got a {type(module).__name__}, wanted an nn.Sequential without a forward of its own"
        )
    if reason := hook_of(module):
        raise ValueError(f"{prefix or 'sequential'}: {reason}")
    for name, child in module._modules.items():  # `named_children` leaves out a module that is there twice
        if child is None:
            continue
        if isinstance(child, nn.Sequential):
            yield from _flat(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _before(layer: PlainLayer, scale: Tensor, shift: Tensor, name: str) -> PlainLayer:
    """Fold `scale * y + shift` into the layer whose result y is."""
    _check_width(name, len(scale), layer.weight.shape[0])
    bias = shift if layer.bias is None else layer.bias.double() * scale + shift
    return _folded(layer, layer.weight.double() * scale[:, None], bias)


def _after(layer: PlainLayer, scale: Tensor, shift: Tensor, name: str) -> PlainLayer:
    """Fold `scale * x + shift` into the layer that reads x."""
    _check_width(name, layer.weight.shape[1], len(scale))
    bias = layer.weight.double() @ shift
    return _folded(layer, layer.weight.double() * scale, bias if layer.bias is None else layer.bias.double() + bias)


def _folded(layer: PlainLayer, weight: Tensor, bias: Tensor) -> PlainLayer:
    return layer._replace(weight=weight.to(layer.weight.dtype), bias=bias.float())


def _check_width(name: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise ValueError(f"{name}: got {got} features, wanted {wanted}")
