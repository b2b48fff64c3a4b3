"""A frozen module as one safetensors file: the sparse calls whole, of all else the state.

Metadata `lt4rec_sparse_module` (see `checked_file`): `calls`, one entry per call of the engine, with its `places` in
the module, `kind`, `precision` and the data of `network_state`; `absorbed`, the places of what calls absorbed;
`traced`, those of modules that torch.fx traced, which compute otherwise than the model does.
A file has the least version that it needs: 2 if a layer has the activation dice, else 1.
Tensors: `calls.<i>.<name>` of `network_state`, and `state.<name>`, what `state_dict` holds of everything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from lt4rec_sparse import checked_file, network_state
from lt4rec_sparse.checked_file import ArtefactError
from lt4rec_sparse.errors import shown, told
from lt4rec_sparse.network import PRECISIONS
from lt4rec_sparse.nn.copying import copy_of
from lt4rec_sparse.nn.fused import Absorbed, FusedSequential
from lt4rec_sparse.nn.sparse import SparseLinear, SparseMLP
from lt4rec_sparse.nn.traced import traced
from lt4rec_sparse.nn.transformer import call_sparse_parts

KEY = "lt4rec_sparse_module"
VERSIONS = (1, 2)
KINDS: dict[str, type[SparseMLP]] = {"SparseLinear": SparseLinear, "SparseMLP": SparseMLP}
_WANTED = "what save_module wrote"


def save_module(module: nn.Module, path: str | Path) -> None:
    """Write a frozen module as one file, completely or not at all; `load_module` reads it.

    A plan or a GPU's graphs are not stored: they are of a machine, and made where the module is served.

    Raises:
        ValueError: If no layer is sparse, a sparse one is of a class of yours or computes in a precision that only a
            GPU has, or a state holds something else than tensors.
        InputError: If a sparse weight is NaN or infinite.
    """
    places: dict[SparseMLP, list[str]] = {}
    absorbed, graphs = [], []
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, SparseMLP):
            places.setdefault(part, []).append(name)
        elif isinstance(part, Absorbed):
            absorbed.append(name)
        elif isinstance(part, fx.GraphModule):
            graphs.append(name)
    if not places:
        raise ValueError(f"module: got a {type(module).__name__} without a sparse layer, wanted one that freeze made")
    calls, tensors = [], {}
    for i, (call, of_call) in enumerate(places.items()):
        place = of_call[0] or "module"
        if KINDS.get(type(call).__name__) is not type(call):
            raise ValueError(f"{place}: got a {type(call).__name__}, wanted a {' or a '.join(KINDS)} itself")
        if call.precision not in PRECISIONS:
            wanted = f"{', '.join(PRECISIONS)}: save the MLP that it was made from, or SparseMLP(mlp.network)"
            raise ValueError(f"{place}: got precision {call.precision}, which only a GPU has, wanted {wanted}")
        stored, data = network_state.to_tensors(call.network)
        calls.append({"places": of_call, "kind": type(call).__name__, "precision": call.precision, **data})
        for name, tensor in stored.items():
            checked_file.check_finite(f"{of_call[0]}.{name}".lstrip("."), tensor)
            tensors[f"calls.{i}.{name}"] = tensor
    own = {_extra(place) for of_call in places.values() for place in of_call}
    for name, value in module.state_dict().items():
        if name not in own:
            if not isinstance(value, Tensor):
                raise ValueError(f"{name}: got a {type(value).__name__} in the state, wanted tensors alone")
            tensors[f"state.{name}"] = value
    version = 2 if any("dice" in call.network.activations for call in places) else 1
    meta = {"version": version, "calls": calls, "absorbed": absorbed, "traced": graphs}
    checked_file.write(path, KEY, meta, tensors)


def load_module(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a module that `save_module` wrote, check it in full, and return it ready to serve.

    Example:
        `load_module("mlp.safetensors")`, or `load_module("net.safetensors", Net())`, whose weights are not used.

    Args:
        path: The file. It is memory-mapped while the module lives.
        model: A module built as the one that was frozen, dense or frozen, also on the meta device; it is copied. None
            where the file holds one `SparseMLP` or `SparseLinear` alone.

    Raises:
        FileNotFoundError: If there is no such file.
        ArtefactError: If the file is truncated, altered, of another kind or version, or does not fit the model.
    """
    meta, tensors = checked_file.read(path, KEY, _WANTED, VERSIONS)
    try:
        calls = _calls(meta, tensors)
        state = {name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")}
        if model is None:
            if [of_call for _, of_call in calls] != [[""]]:
                held = ", ".join(of_call[0] for _, of_call in calls)
                raise ValueError(f"model: got None for a file of sparse layers {held}, wanted a model to put them into")
            return calls[0][0]
        return _filled(_alike(model, _strings(meta, "traced")), calls, _strings(meta, "absorbed"), state)
    except ValueError as error:
        raise ArtefactError(f"{path}: got contents that do not fit: {told(error)}") from error


def _calls(meta: dict[str, Any], tensors: dict[str, Tensor]) -> list[tuple[SparseMLP, list[str]]]:
    """Return the sparse modules, each with its places."""
    entries, calls = meta.get("calls"), []
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"calls: got {shown(entries)}, wanted a list of tables")
    for i, entry in enumerate(entries):
        kind, precision = entry.get("kind"), entry.get("precision")
        if not isinstance(kind, str) or kind not in KINDS or precision not in PRECISIONS:
            raise ValueError(f"calls[{i}]: got {shown((kind, precision))}, wanted one of {list(KINDS)}, {PRECISIONS}")
        prefix = f"calls.{i}."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        for name, tensor in own.items():
            checked_file.check_finite(f"{prefix}{name}", tensor)
        network = network_state.from_tensors(own, entry)
        if kind == "SparseLinear" and (len(network.hidden) > 1 or network.heads):
            raise ValueError(f"calls[{i}]: got {network.depth} layers for a SparseLinear, wanted one")
        places = _strings(entry, "places")
        if not places:
            raise ValueError(f"calls[{i}]: got no place, wanted at least one")
        calls.append((KINDS[kind](network, precision).eval(), places))
    return calls


def _filled(
    model: nn.Module, calls: list[tuple[SparseMLP, list[str]]], absorbed: list[str], state: dict[str, Tensor]
) -> nn.Module:
    """Put the calls into their places in a model, and the state."""
    result = model
    for call, places in calls:
        for place in places:
            was = result if not place else _child(result, place)
            wanted = getattr(was, "in_features", call.in_features)
            if call.in_features != wanted:
                raise ValueError(f"{place}: got {call.in_features} in_features, wanted the model's, {wanted}")
            result = call if not place else _with_child(result, place, call)
    for place in absorbed:
        _child(result, place)
        result = _with_child(result, place, Absorbed())
        parent = result.get_submodule(place.rpartition(".")[0])
        if type(parent) is nn.Sequential:
            parent.__class__ = FusedSequential
    call_sparse_parts(result)
    wanted_state = {name for name in result.state_dict() if name not in {_extra(p) for _, of in calls for p in of}}
    if absent := sorted(wanted_state - state.keys()):
        raise ValueError(f"state: got none for {', '.join(absent[:3])}, wanted the {len(wanted_state)} of the model")
    if stray := sorted(state.keys() - wanted_state):
        raise ValueError(f"state: got {', '.join(stray[:3])}, wanted the {len(wanted_state)} of the model")
    try:
        result.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # of other shapes
        raise ValueError(f"state: {told(error)}") from error
    for name, tensor in (*result.named_parameters(), *result.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name}: got a buffer on the meta device, wanted values: its module does not store it")
    return result.eval().requires_grad_(False)


def _alike(model: nn.Module, places: list[str]) -> nn.Module:
    """Return a copy of the model that is traced where the one saved was."""
    result = copy_of(model).eval()
    for place in places:
        module = _child(result, place)
        made = module if isinstance(module, fx.GraphModule) else traced(module)
        if made is None:
            raise ValueError(f"{place}: got a model that torch.fx does not trace there, wanted one like the one saved")
        result = _with_child(result, place, made) if place else made
    return result


def _child(module: nn.Module, place: str) -> nn.Module:
    try:
        return module.get_submodule(place)
    except AttributeError as error:
        raise ValueError(f"{place}: got a place that the model lacks, wanted a model like the one saved") from error


def _with_child(module: nn.Module, place: str, child: nn.Module) -> nn.Module:
    parent, _, name = place.rpartition(".")
    module.get_submodule(parent)._modules[name] = child
    return module


def _extra(place: str) -> str:
    """Return the name of a call's part of a `state_dict`."""
    return f"{place}._extra_state".lstrip(".")


def _strings(table: dict[str, Any], name: str) -> list[str]:
    values = table.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name}: got {shown(values)}, wanted a list of names")
    return values
