"""`freeze` and `unfreeze`: where the type changes, from what is trained to what is served, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lt4rec_sparse.formats import BlockWeight, format_for
from lt4rec_sparse.network import PRECISIONS, DenseLayer, FrozenNetwork, SparseLayer
from lt4rec_sparse.nn import plain
from lt4rec_sparse.nn.chain import Chain, chains_of
from lt4rec_sparse.nn.copying import copy_of
from lt4rec_sparse.nn.fused import Absorbed, FusedSequential
from lt4rec_sparse.nn.masked import MaskedLinear, MaskedMLP
from lt4rec_sparse.nn.observe import batch_of, calls_of, inputs_of, rows_of
from lt4rec_sparse.nn.plan.plan import check_asked
from lt4rec_sparse.nn.reading import computes_as, hook_of
from lt4rec_sparse.nn.sparse import SparseLinear, SparseMLP
from lt4rec_sparse.nn.traced import with_sequentials
from lt4rec_sparse.nn.transformer import call_sparse_parts, feed_forward, restore_fast_path

LEAST_SPARSITY = 0.5  # of a plain layer: less is left to dense products
MOST_DENSE = 0.25  # of the kept weights: a dense layer of more is not run by kernels for single weights


def freeze(
    model: nn.Module,
    sigmoid: bool = False,
    *,
    precision: str = "fp32",
    example: Any = None,
    batch_sizes: Sequence[int] | None = None,
    trace: bool = False,
) -> nn.Module:
    """Return a copy of `model` for serving, every masked or pruned linear layer in it replaced by its compressed form.

    `freeze(model)(x)` equals `model.eval()(x)` within rounding; the copy cannot be trained. Compressed are:

    - each `MaskedMLP` and `MaskedLinear`;
    - each plain `nn.Linear` of which at least half is zero, or pruned by `torch.nn.utils.prune`;
    - what is between such layers in an `nn.Sequential`, in one call of the engine: activations, BatchNorm1d, Dropout
      (`SparseMLP.from_sequential`), and linear layers that are not pruned, if they are small. The first of these
      modules is replaced by the call, the others by `fused.Absorbed`, which refuse to be called one by one. Where
      BatchNorm1d, Dice or a PReLU with several slopes is among them, `x` of the call is `[batch, features]`;
    - the feed-forward part of torch's own transformer layers, in one call.

    Everything else is copied: layers with a forward or hooks of their own too, masked ones among them. Where all masks
    of a call keep whole blocks of 16 outputs x 4 inputs (or everything), its weights are compressed in blocks, which
    kernels run fastest.

    Example:
        >>> import torch
        >>> mlp = MaskedMLP(8, hidden=(4, 2), tasks=("ctr", "cvr"))
        >>> x = torch.ones(3, 8)
        >>> torch.allclose(freeze(mlp)(x), mlp(x), atol=1e-6)
        True

    Args:
        model: Any module.
        sigmoid: Whether the heads of `MaskedMLP`s end in a sigmoid: probabilities instead of logits.
        precision: How the engine computes: "fp32", "bf16" or "int8".
        example: What the model is called with: an input, a tuple of them, or a mapping of them by name. Int8 is
            calibrated on what enters each call then, so it should be representative: some thousand rows.
        batch_sizes: Batch sizes of the model, ascending, that will be served. Each call is then measured on this
            machine for the rows that reach it, which are in proportion to those of the example, and served by the
            fastest plan, dense products among its choices (`SparseMLP.measure_plan`).
        trace: Whether to fuse too what modules' own forwards show, as torch.fx traces them (`traced.with_sequentials`):
            `self.b(F.gelu(self.a(x)))` in one call. Such a module becomes a `torch.fx.GraphModule`.

    Raises:
        ValueError: If nothing in the model is masked or pruned, there is no such precision, batch sizes do not ascend
            from 1, int8 or batch sizes come without an example, or the example does not reach a call.
    """
    check_asked(precision, PRECISIONS, (1,) if batch_sizes is None else batch_sizes)
    if example is None and (precision == "int8" or batch_sizes is not None):
        raise ValueError("example: got None, wanted an input of the model: int8 and batch_sizes are measured on it")
    reader = _Reader()
    if trace:
        model = with_sequentials(model, reader.is_compressed)
    calls = {id(m): [*_calls(m, reader), *_feed_forward_calls(m, reader)] for m in model.modules()}
    frozen, inner = _frozen_alone(model, calls, reader, sigmoid)
    if not frozen and not any(calls.values()):
        wanted = f"a MaskedMLP, a MaskedLinear, or an nn.Linear of which {LEAST_SPARSITY:.0%} is zero"
        raise ValueError(f"model: got a {type(model).__name__} without masked or pruned layers, wanted {wanted}")
    memo: dict[int, Any] = dict(frozen)
    result = copy_of(model, memo, inner)
    for module in model.modules():
        for first, last, call in calls.get(id(module), ()):
            copied = memo[id(module)]
            children = copied._modules
            children.update({name: Absorbed() for name in list(children)[first:last]})
            children[list(children)[first]] = call
            if type(copied) is nn.Sequential:
                copied.__class__ = FusedSequential
    call_sparse_parts(result)
    result.eval().requires_grad_(False)
    if precision != "fp32" or batch_sizes is not None:
        made = {id(call) for call in (*frozen.values(), *(call for of_one in calls.values() for *_, call in of_one))}
        _prepare(result, made, precision, example, batch_sizes)
    return result


def unfreeze(model: nn.Module) -> nn.Module:
    """Return a copy of `model` without a sparse layer: each is a plain one with exactly its weights (`to_dense`).

    The copy is in `eval()`, and all its parameters can be trained. What one call of the engine computed is an
    `nn.Sequential` in its place. To train on through masks, give such a one to `MaskedMLP.from_sequential`, or a layer
    to `MaskedLinear.from_linear`.

    Example:
        >>> import torch
        >>> from lt4rec_sparse import SparseLinear
        >>> layer = unfreeze(nn.Sequential(SparseLinear.from_dense(torch.eye(2)), nn.Softmax(-1)))[0]
        >>> layer, layer.weight.tolist()
        (Linear(in_features=2, out_features=2, bias=False), [[1.0, 0.0], [0.0, 1.0]])
    """
    result = copy_of(model, {id(m): m.to_dense() for m in model.modules() if isinstance(m, SparseMLP)})
    plain_kinds: dict[type[nn.Module], type[nn.Module]] = {FusedSequential: nn.Sequential, Absorbed: nn.Identity}
    for module in result.modules():
        module.__class__ = plain_kinds.get(type(module), type(module))
    restore_fast_path(result)
    return result.eval().requires_grad_(True)


def _prepare(
    frozen: nn.Module, made: Container[int], precision: str, example: Any, batch_sizes: Sequence[int] | None
) -> None:
    """Let the calls that `freeze` made, by their ids, compute in a precision, and by plans for batch sizes."""
    inputs = {} if example is None else inputs_of(frozen, example)
    for name, call in calls_of(frozen).items():
        if id(call) not in made:
            continue
        if name not in inputs:
            if precision == "int8" or batch_sizes is not None:
                raise ValueError(f"example: got one that does not reach {name}, wanted one that runs every layer")
            call.become(call.to_precision(precision))
            continue
        x = torch.cat([rows_of(part) for part in inputs[name]])
        prepared = (call.calibrated(x) if precision == "int8" else call).to_precision(precision)
        if batch_sizes is not None:
            rows = len(rows_of(inputs[name][-1])) / batch_of(example)
            served = sorted({max(1, round(rows * batch)) for batch in batch_sizes})
            prepared = prepared.planned(prepared.measure_plan(served))
        call.become(prepared)


Call = tuple[int, int, SparseMLP]  # of a module: the first child, the one after the last, what computes them


class _Reader:
    """Reads each linear layer once."""

    def __init__(self) -> None:
        self._read: dict[nn.Module, plain.PlainLayer] = {}

    def __call__(self, linear: nn.Module, name: str = "linear") -> plain.PlainLayer:
        """Return a layer that can be part of a call, or raise a ValueError."""
        if linear not in self._read:
            self._read[linear] = self._of(linear, name)
        return self._read[linear]

    def _of(self, linear: nn.Module, name: str) -> plain.PlainLayer:
        if not isinstance(linear, MaskedLinear):
            if reason := obstacle(linear):
                raise ValueError(f"{name}: {reason}")
            return plain.of_linear(linear, name)
        if len(linear.tasks) > 1 or _does_more(linear):
            raise ValueError(f"{name}: got tasks {linear.tasks}, a hook or another forward, wanted one task alone")
        return plain.of_tensors(*linear.weight_and_bias(), linear.mask())

    def is_compressed(self, module: nn.Module) -> bool:
        """Tell whether a layer is masked, or pruned so far that it is compressed."""
        if isinstance(module, MaskedLinear):
            return not _does_more(module)
        if not isinstance(module, nn.Linear) or obstacle(module) is not None:
            return False
        mask = self(module).mask
        return 1 - mask.sum().item() / mask.numel() >= LEAST_SPARSITY


def _frozen_alone(
    model: nn.Module, calls: Mapping[int, Sequence[Call]], reader: _Reader, sigmoid: bool
) -> tuple[dict[int, nn.Module], set[int]]:
    """Return id -> what takes the place of a module that is not part of a call everywhere; and ids of all its parts."""
    parts = [(m, list(m._modules.values())) for m in model.modules()]
    places = Counter([id(model), *(id(child) for _, children in parts for child in children)])
    places.subtract(id(child) for m, children in parts for a, b, _ in calls.get(id(m), ()) for child in children[a:b])
    frozen: dict[int, nn.Module] = {}
    inner: set[int] = set()
    kept: set[int] = set()  # parts of what stays masked, as nothing would call its hooks and forwards
    for module in model.modules():
        if id(module) in inner | kept or not places[id(module)]:
            continue
        if isinstance(module, MaskedLinear | MaskedMLP) and _does_more(module):
            kept |= {id(part) for part in module.modules()}
            continue
        sparse = _freeze_masked(module, sigmoid)
        if sparse is None and isinstance(module, nn.Linear) and reader.is_compressed(module):
            sparse = SparseLinear(plain.network_of([reader(module)]))
        if sparse is not None:
            frozen[id(module)] = sparse
            inner |= {id(part) for part in module.modules()}
    return frozen, inner


def _calls(module: nn.Module, reader: _Reader) -> Iterator[Call]:
    """Yield what becomes calls of an `nn.Sequential`; nothing of another module."""
    if not computes_as(module, nn.Sequential):
        return
    for chain in chains_of(module, reader):
        for first, last, call in _calls_of_chain(chain, reader):
            yield chain.places[first][0], chain.places[last - 1][1], call


def _feed_forward_calls(module: nn.Module, reader: _Reader) -> Iterator[Call]:
    """Yield the call that computes the whole feed-forward part of a transformer layer of torch, if there is one."""
    parts, children = feed_forward(module), list(module._modules)
    chain = Chain(read=reader)
    if parts and all(chain.try_take(place, part, name) for place, (name, part) in enumerate(parts.items())):
        for first, last, call in _calls_of_chain(chain, reader):
            if last - first == len(chain.layers):
                yield children.index("linear1"), children.index("linear2") + 1, call


def _calls_of_chain(chain: Chain, reader: _Reader) -> Iterator[Call]:
    """Yield the calls of a chain; places are those of its layers."""
    is_sparse = [reader.is_compressed(linear) for linear in chain.linear]
    if not any(is_sparse):
        return
    layers = [
        layer if sparse else layer._replace(mask=torch.ones_like(layer.mask))
        for layer, sparse in zip(chain.layers, is_sparse, strict=True)
    ]
    for first, last in _worthwhile(layers, is_sparse):
        network = plain.network_of(layers[first:last])
        yield first, last, (SparseLinear if last - first == 1 else SparseMLP)(network)


def _worthwhile(layers: Sequence[plain.PlainLayer], is_sparse: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yield the layers to run in one call: all of those in blocks, or those between large dense ones."""
    sparse = [layer for layer, is_one in zip(layers, is_sparse, strict=True) if is_one]
    if format_for(layer.mask for layer in sparse) is BlockWeight:
        yield 0, len(layers)
        return
    most = MOST_DENSE * sum(int(layer.mask.sum()) for layer in sparse)
    begin = 0
    for i, layer in enumerate(layers):
        if not is_sparse[i] and layer.weight.numel() > most:
            if any(is_sparse[begin:i]):
                yield begin, i
            begin = i + 1
    if any(is_sparse[begin:]):
        yield begin, len(layers)


def obstacle(linear: nn.Module) -> str | None:
    """Return why a layer that is no masked one is left as it is, or None."""
    if reason := plain.obstacle(linear):
        return reason
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if not weight.is_cpu:
        return f"got a weight on {weight.device}, wanted one on the CPU, where the engine computes"
    return None


def _does_more(masked: nn.Module) -> bool:
    """Tell whether a masked module, or a part of it, has hooks or a forward of its own, which nothing would call."""
    parts = [part for part in masked.modules() if isinstance(part, MaskedMLP | nn.Linear)]
    return any(hook_of(part) or not computes_as(part, MaskedMLP, MaskedLinear, nn.Linear) for part in parts)


def _freeze_masked(module: nn.Module, sigmoid: bool) -> nn.Module | None:
    if isinstance(module, MaskedLinear):
        return SparseLinear(FrozenNetwork(_sparse([module], "none")))
    if isinstance(module, MaskedMLP):
        hidden = _sparse(module.masked_layers(), "relu")
        heads = {}
        for task, head in module.heads.items():
            layer = (
                plain.of_tensors(*head.weight_and_bias(), head.mask())
                if isinstance(head, MaskedLinear)
                else plain.of_linear(head, f"head of {task}")
            )
            heads[task] = DenseLayer(layer.weight, layer.bias, "sigmoid" if sigmoid else "none")
        return SparseMLP(FrozenNetwork(hidden, heads))
    return None


def _sparse(layers: Iterable[MaskedLinear], activation: str) -> tuple[SparseLayer, ...]:
    layers = list(layers)
    masks = [{task: layer.mask(task).cpu() for task in layer.tasks} for layer in layers]
    kind = format_for(mask for of_layer in masks for mask in of_layer.values())
    sparse = []
    for layer, of_layer in zip(layers, masks, strict=True):
        weight, bias = layer.weight_and_bias()  # as pruning and parametrisations make them now
        compressed = kind.from_dense(weight.detach().cpu(), of_layer)
        sparse.append(SparseLayer(compressed, None if bias is None else _kept(bias), activation))
    return tuple(sparse)


def _kept(parameter: Tensor) -> Tensor:
    return parameter.detach().cpu().clone()
