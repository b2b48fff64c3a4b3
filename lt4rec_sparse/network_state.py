"""A frozen network as named tensors and plain data: what artefacts and `state_dict` carry, and are not trusted with.

Tensors (names and bit order of compressed-tensors where it has them): `layers.<i>.compressed`, `.bitmask`,
`.row_offsets` of hidden layer i and its `.bias`; `heads.<task>.weight`, `.bias`; `.slope` of a layer whose slope is a
tensor. Data, as JSON holds it: `tasks`; `layers` with the shape and activation of each, its `slope` if it is a number,
and `block`, [16, 4], if weights are kept in such blocks; `heads`, task -> activation, or [activation, slope]; where the
network is calibrated `codes`, task -> [scale, zero point] of the input of each layer. A layer without a bias has no
such tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lt4rec_sparse.errors import shown
from lt4rec_sparse.formats import VALUE_DTYPES, BlockWeight, CompressedWeight, SharedWeight
from lt4rec_sparse.network import ACTIVATIONS, DenseLayer, FrozenNetwork, QuantizationParameters, SparseLayer

MAX_WIDTH = (1 << 31) - 1


def to_tensors(network: FrozenNetwork) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a network's tensors and data."""
    tensors: dict[str, Tensor | None] = {}
    for i, layer in enumerate(network.hidden):
        tensors |= {
            f"layers.{i}.compressed": layer.weight.values,
            f"layers.{i}.bitmask": layer.weight.bitmask,
            f"layers.{i}.row_offsets": layer.weight.row_offsets,
            f"layers.{i}.bias": layer.bias,
            f"layers.{i}.slope": _slopes(layer),
        }
    for task, head in network.heads.items():
        tensors |= {f"heads.{task}.weight": head.weight, f"heads.{task}.bias": head.bias}
        tensors[f"heads.{task}.slope"] = _slopes(head)
    data: dict[str, Any] = {
        "tasks": list(network.tasks),
        "layers": [_described(layer) for layer in network.hidden],
        "heads": {
            task: [head.activation, slope] if (slope := _number(head)) else head.activation
            for task, head in network.heads.items()
        },
    }
    if network.quantization is not None:
        data["codes"] = {task: [list(q) for q in network.quantization[task]] for task in network.tasks}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}, data


def from_tensors(tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> FrozenNetwork:
    """Read `to_tensors` back, without trusting it.

    Raises:
        ValueError: If an entry or a tensor is absent, of a wrong type, or does not fit the others.
    """
    tasks = _tasks(data)
    hidden = []
    for i, entry in enumerate(_list(data, "layers")):
        kind, shape, activation, slope = _layer(entry, f"layers[{i}]")
        part = f"layers.{i}."
        parts = (tensor(tensors, part + name) for name in ("bitmask", "row_offsets", "compressed"))
        weight = kind(shape, tasks, *parts)
        weight.validate()
        hidden.append(SparseLayer(weight, _bias(tensors, part), activation, tensors.get(part + "slope", slope)))
    activations = data.get("heads")
    if not isinstance(activations, dict) or (activations and set(activations) != set(tasks)):
        raise ValueError(f"heads: got {shown(activations)}, wanted an activation for each of {', '.join(tasks)}")
    heads = {}
    for task in tasks if activations else ():
        part, stored = f"heads.{task}.", activations[task]
        activation, slope = stored if isinstance(stored, list) and len(stored) == 2 else (stored, 0.0)
        if not isinstance(activation, str) or type(slope) is not float:
            raise ValueError(f"head of {task}: got activation {shown(stored)}, wanted a name, or a name and a slope")
        heads[task] = DenseLayer(
            tensor(tensors, part + "weight", VALUE_DTYPES),
            _bias(tensors, part),
            activation,
            tensors.get(part + "slope", slope),
        )
    return FrozenNetwork(tuple(hidden), heads, _quantization(data, tasks))


def tensor(tensors: Mapping[str, Tensor], name: str, dtypes: Sequence[torch.dtype] | None = None) -> Tensor:
    """Return a tensor by its name.

    Raises:
        ValueError: If there is none, or it has none of the dtypes.
    """
    if name not in tensors:
        raise ValueError(f"{name}: is absent")
    if dtypes is not None and tensors[name].dtype not in dtypes:
        raise ValueError(f"{name}: got {tensors[name].dtype}, wanted one of {', '.join(map(str, dtypes))}")
    return tensors[name]


def width(value: Any, where: str) -> int:
    """Return a width that is one.

    Raises:
        ValueError: If it is no int from 1 to `MAX_WIDTH`.
    """
    if type(value) is not int or not 1 <= value <= MAX_WIDTH:
        raise ValueError(f"{where}: got width {shown(value)}, wanted a number from 1 to {MAX_WIDTH}")
    return value


def _bias(tensors: Mapping[str, Tensor], part: str) -> Tensor | None:
    return tensor(tensors, part + "bias", VALUE_DTYPES) if part + "bias" in tensors else None


def _slopes(layer: SparseLayer | DenseLayer) -> Tensor | None:
    return layer.slope if isinstance(layer.slope, Tensor) else None


def _number(layer: SparseLayer | DenseLayer) -> float:
    return 0.0 if isinstance(layer.slope, Tensor) else layer.slope


def _tasks(data: Mapping[str, Any]) -> tuple[str, ...]:
    tasks = _list(data, "tasks")
    if not tasks or not all(isinstance(task, str) for task in tasks) or len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks: got {shown(tasks)}, wanted at least one name, each once")
    return tuple(tasks)


def _described(layer: SparseLayer) -> dict[str, Any]:
    described: dict[str, Any] = {"shape": list(layer.weight.shape), "activation": layer.activation}
    if slope := _number(layer):
        described["slope"] = slope
    return described if isinstance(layer.weight, SharedWeight) else {**described, "block": list(layer.weight.BLOCK)}


def _layer(entry: Any, where: str) -> tuple[type[CompressedWeight], tuple[int, int], str, float]:
    shape, activation = (entry.get("shape"), entry.get("activation")) if isinstance(entry, dict) else (None, None)
    if not isinstance(shape, list) or len(shape) != 2 or not isinstance(activation, str):
        raise ValueError(f"{where}: got {shown(entry)}, wanted a shape and an activation")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}: got activation {shown(activation)}, wanted one of {', '.join(ACTIVATIONS)}")
    kinds = {kind.BLOCK: kind for kind in (SharedWeight, BlockWeight)}
    block = entry.get("block", list(SharedWeight.BLOCK))
    if not isinstance(block, list) or any(type(side) is not int for side in block) or tuple(block) not in kinds:
        raise ValueError(f"{where}: got block {shown(block)}, wanted [16, 4] or none")
    slope = entry.get("slope", 0.0)
    if type(slope) is not float:
        raise ValueError(f"{where}: got slope {shown(slope)}, wanted a number")
    return kinds[tuple(block)], (width(shape[0], where), width(shape[1], where)), activation, slope


def _quantization(
    data: Mapping[str, Any], tasks: Sequence[str]
) -> dict[str, tuple[QuantizationParameters, ...]] | None:
    stored = data.get("codes")
    if stored is None:
        return None
    if not isinstance(stored, dict) or set(stored) != set(tasks):
        raise ValueError(f"codes: got {shown(stored)}, wanted quantisation parameters of {', '.join(tasks)}")
    return {task: tuple(_parameters(x, task) for x in _list(stored, task)) for task in tasks}


def _parameters(entry: Any, task: str) -> QuantizationParameters:
    kinds = [type(x) for x in entry] if isinstance(entry, list) else None
    if kinds not in ([float, int], [int, int]):
        raise ValueError(f"codes of {task}: got {shown(entry)}, wanted pairs of a scale and a zero point")
    return QuantizationParameters(*entry)


def _list(entries: Mapping[str, Any], name: str) -> list[Any]:
    value = entries.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{name}: got {shown(value)}, wanted a list")
    return value
