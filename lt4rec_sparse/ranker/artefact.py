"""The artefact: one safetensors file that holds a whole `Ranker`, checked in full when it is loaded.

docs/artefact.md is its specification, byte by byte; tests/ranker/reader.py is a second reader, written from that page.

A file has the least version that it needs, so that older readers read what they can: 1 has `SharedWeight` alone; 2 has
a `BlockWeight`; 3 has int8 embeddings, is `without` a table, or has a slope per output; 4 has the activation
dice; 5 has raw numbers or vectors; 6 has attention, or counts the last values of a bag alone. What an older reader may
ignore (`codes`, `context`, `digests`) needs no version.

A loaded ranker reads its weights from the memory-mapped file. Replace the file by renaming a new one to its name, as
`save` does: writing into it would change a model that is in use.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lt4rec_sparse import checked_file, network_state
from lt4rec_sparse.checked_file import ArtefactError
from lt4rec_sparse.errors import InputError, shown, told
from lt4rec_sparse.formats import VALUE_DTYPES
from lt4rec_sparse.network import PRECISIONS, FrozenNetwork
from lt4rec_sparse.nn import SparseMLP
from lt4rec_sparse.ranker.attention import AttentionUnit
from lt4rec_sparse.ranker.features import FeatureEncoder
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings, inputs_width
from lt4rec_sparse.ranker.ranker import Ranker
from lt4rec_sparse.ranker.rows import RoundedRows

KEY = "lt4rec_sparse"
VERSIONS = (1, 2, 3, 4, 5, 6)
# The dtypes of weights, bit planes, embeddings, offsets and the encoder's arrays, as safetensors spells them.
DTYPES = ("F32", "F16", "BF16", "U8", "I8", "I32", "I64", "F64")


def save(ranker: Ranker, path: str | Path, embeddings: str | None = None, without: Collection[str] = ()) -> None:
    """Write a ranker as one file, usually `model.safetensors`, completely or not at all.

    Args:
        ranker: The ranker; it stays as it is.
        path: The file.
        embeddings: How embeddings are held, in the file and after `load` in memory: "fp32", "fp16" (half of the bytes)
            or "int8" (`dim + 4` bytes per row); None for how the ranker holds them.
        without: Tables whose embeddings stay out of the file: `Ranker.score` must then be given the vectors of their
            fields. What turns raw values into ids is in it all the same: ids are the keys to ask a server by.

    Raises:
        InputError: If a weight or an embedding is NaN or infinite, or beyond what "fp16" holds; if there is no such
            kind, or no such table in the ranker.
    """
    inputs = ranker.inputs.without(without) if without else ranker.inputs
    held = inputs.rounded(inputs.kind if embeddings is None else embeddings).embedding
    rows = {"inputs.embedding": held.values if isinstance(held, RoundedRows) else held.detach()}
    if isinstance(held, RoundedRows) and held.scales is not None:
        rows["inputs.scales"] = held.scales
    for i, unit in enumerate(inputs.units):
        rows |= {f"inputs.attention.{i}.{name}": t for name, t in cast(AttentionUnit, unit).to_tensors().items()}
    network, of_network = network_to_tensors(ranker.mlp.network)
    arrays, description = ranker.encoder.to_arrays()
    tensors = network | rows
    tensors |= {f"encoder.{name}": torch.from_numpy(array.copy()) for name, array in arrays.items()}
    _check_finite(tensors)
    absent = {"without": [table for table in inputs.table_sizes if table in inputs.absent]} if inputs.absent else {}
    is_third = "inputs.scales" in rows or bool(absent) or any(name.endswith(".slope") for name in network)
    is_second = any("block" in layer for layer in of_network["layers"])
    is_fourth = "dice" in ranker.mlp.network.activations
    is_sixth = bool(inputs.attention) or any(column.last for column in ranker.encoder.schema.features)
    of_inputs = 6 if is_sixth else 5 if inputs.numbers else 1
    version = max(of_inputs, 4 if is_fourth else 3 if is_third else 2 if is_second else 1)
    meta = {"version": version, "dim": inputs.dim, "encoder": description, **absent, **of_network}
    checked_file.write(path, KEY, meta, tensors)


def load(path: str | Path, precision: str = "fp32") -> Ranker:
    """Read a ranker that `save` wrote, check it in full, and prepare it for this machine.

    Example:
        `load("model.safetensors").score({"video_id": [7, 9], ...})` returns `{"ctr": [...], "cvr": [...]}`.

    Args:
        path: The file. It is memory-mapped while the ranker lives.
        precision: How the MLP computes: "fp32", "bf16" or "int8".

    Raises:
        FileNotFoundError: If there is no such file.
        ArtefactError: If the file is truncated, altered, of another kind or version, or holds anything that cannot be
            served; if `precision` is "int8" and the MLP is not calibrated.
        InputError: If there is no such precision.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    meta, tensors = checked_file.read(path, KEY, "an artefact (model.safetensors)", VERSIONS, DTYPES)
    if precision == "int8" and meta.get("codes") is None:
        raise ArtefactError(f"{path}: got no quantisation parameters, wanted an artefact that is calibrated for int8")
    try:
        return _ranker(meta, tensors, precision)
    except ValueError as error:
        raise ArtefactError(f"{path}: got contents that do not fit together: {told(error)}") from error


def network_to_tensors(network: FrozenNetwork) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a network as an artefact stores it: its tensors, and its entries of the metadata.

    Every head ends in a sigmoid, as `Ranker` demands: the file does not say which activation.
    """
    tensors, data = network_state.to_tensors(network)
    heads = data.pop("heads")
    rows_of = {f"layers.{i}": layer.weight.shape[0] for i, layer in enumerate(network.hidden)}
    rows_of |= {f"heads.{task}": len(head.weight) for task, head in network.heads.items()}
    for part, rows in rows_of.items():
        # Every layer has a bias there; and safetensors refuses tensors that share memory, as one head for two tasks.
        tensors[f"{part}.bias"] = tensors.get(f"{part}.bias", torch.zeros(rows)).clone()
    return tensors | {f"heads.{task}.weight": tensors[f"heads.{task}.weight"].clone() for task in heads}, data


def network_from_tensors(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> FrozenNetwork:
    """Read `network_to_tensors` back, without trusting it."""
    tasks = meta.get("tasks")
    names = [task for task in tasks if isinstance(task, str)] if isinstance(tasks, list) else []
    network = network_state.from_tensors(tensors, {**meta, "heads": dict.fromkeys(names, "sigmoid")})
    biases = [*(layer.bias for layer in network.hidden), *(head.bias for head in network.heads.values())]
    if any(bias is None for bias in biases):
        raise ValueError("bias: got a layer without one, wanted one for every layer")
    return network


def _ranker(meta: Mapping[str, Any], tensors: Mapping[str, Tensor], precision: str) -> Ranker:
    _check_finite(tensors)
    network = network_from_tensors(tensors, meta)
    description = meta.get("encoder")
    if not isinstance(description, dict):
        raise ValueError(f"encoder: got {shown(description)}, wanted a table")
    arrays = {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}
    stray = next((name for name, t in arrays.items() if t.dtype in VALUE_DTYPES), None)
    if stray is not None:
        raise ValueError(f"encoder.{stray}: got {arrays[stray].dtype}, wanted uint8, int64 or float64")
    encoder = FeatureEncoder.from_arrays({name: t.numpy() for name, t in arrays.items()}, description)
    fields, dim = encoder.fields, network_state.width(meta.get("dim"), "dim")
    # The number of pairs grows with the square of the fields: it is compared with the network before they are made.
    width = inputs_width(len(fields), dim, encoder.n_numbers)
    if width != network.in_features:
        raise ValueError(f"network: got in_features {network.in_features}, wanted {width}, the width of the inputs")
    absent = meta.get("without", [])
    in_order = [table for table in encoder.table_sizes if isinstance(absent, list) and table in absent]
    if absent != in_order:
        raise ValueError(f"without: got {shown(absent)}, wanted some of {', '.join(encoder.table_sizes)}, in order")
    units = [_unit(tensors, i, dim) for i in range(len(encoder.attention))]
    how: dict[str, Any] = {"embedding": _embedding(tensors), "absent": absent, "numbers": encoder.n_numbers}
    how |= {"attention": encoder.attention, "units": units}
    inputs = CrossedEmbeddings(fields, encoder.table_sizes, dim, **how)
    return Ranker(encoder, inputs, SparseMLP(network, precision).eval())


def _embedding(tensors: Mapping[str, Tensor]) -> Tensor | RoundedRows:
    stored = network_state.tensor(tensors, "inputs.embedding", (*VALUE_DTYPES, torch.int8))
    if stored.dtype == torch.int8:
        return RoundedRows(stored, network_state.tensor(tensors, "inputs.scales"))
    return RoundedRows(stored) if stored.dtype == torch.float16 else stored.float()


def _unit(tensors: Mapping[str, Tensor], place: int, dim: int) -> AttentionUnit:
    where = f"inputs.attention.{place}"
    of_unit = {
        name: network_state.tensor(tensors, f"{where}.{name}", (torch.float32,)) for name in AttentionUnit.TENSORS
    }
    try:
        return AttentionUnit.from_tensors(of_unit, dim)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights and embeddings that are NaN or infinite; the borders of buckets, float64, may be infinite."""
    for name, tensor in tensors.items():
        if tensor.dtype in VALUE_DTYPES:
            checked_file.check_finite(name, tensor)
