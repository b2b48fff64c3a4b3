"""The artefact: one safetensors file that holds a `Ranker` whole, checked in full when it is loaded.

Tensors (names and bit order of compressed-tensors where it has them):

- `layers.<i>.compressed`, `.bitmask`, `.row_offsets`: the `SharedWeight` of hidden layer i; `layers.<i>.bias`.
- `heads.<task>.weight`, `.bias`: each task's head, dense.
- `inputs.embedding`: all embedding tables in one matrix, in the order of the encoder's tables.
- `encoder.<name>`: vocabularies and bucket borders.

Metadata: one entry, `lt4rec_sparse`, a JSON object with `version`, `tasks`, `layers` (shapes and activations), `dim`,
`encoder` (its description and the schema), where the MLP is calibrated for int8 `codes` (task -> [scale, zero point] of
each layer, the head's last), and `sha256` over all else: the metadata without it and each tensor's name, dtype, shape
and bytes. Weights are float32 whatever the precision: that is chosen when the artefact is loaded. Codes came without a
new version, for old files do without them and old readers pass over them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import whole_file
from lt4rec_sparse.formats import SharedWeight
from lt4rec_sparse.nn import SparseMLP
from lt4rec_sparse.nn.sparse import ALL
from lt4rec_sparse.ops import PRECISIONS, Codes, SparseLayer
from lt4rec_sparse.ranker.features import FeatureEncoder
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.ranker.ranker import Ranker

KEY = "lt4rec_sparse"
VERSION = 1


class ArtefactError(InputError):
    """An artefact that is not whole, not ours, or not what it says it is."""


def save(ranker: Ranker, path: str | Path) -> None:
    """Write a ranker as one file, whole or not at all.

    Args:
        ranker: What to write.
        path: The file, by custom `model.safetensors`.
    """
    tensors: dict[str, Tensor] = {"inputs.embedding": ranker.inputs.embedding.detach()}
    for i, layer in enumerate(ranker.mlp.hidden):
        tensors |= {
            f"layers.{i}.compressed": layer.weight.values,
            f"layers.{i}.bitmask": layer.weight.bitmask,
            f"layers.{i}.row_offsets": layer.weight.row_offsets,
            f"layers.{i}.bias": _bias(layer),
        }
    for task, head in ranker.mlp.heads.items():
        tensors |= {f"heads.{task}.weight": head.weight.to_dense(), f"heads.{task}.bias": _bias(head)}
    arrays, description = ranker.encoder.to_arrays()
    tensors |= {f"encoder.{name}": torch.from_numpy(array.copy()) for name, array in arrays.items()}
    meta = {
        "version": VERSION,
        "tasks": list(ranker.tasks),
        "layers": [{"shape": list(x.weight.shape), "activation": x.activation} for x in ranker.mlp.hidden],
        "dim": ranker.inputs.dim,
        "encoder": description,
    }
    if ranker.mlp.codes is not None:
        meta["codes"] = ranker.mlp.codes
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    meta["sha256"] = _digest(meta, tensors)
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={KEY: json.dumps(meta)})


def load(path: str | Path, precision: str = "fp32") -> Ranker:
    """Read a ranker that `save` wrote, check it in full, and prepack it for this machine.

    Example:
        `load("model.safetensors").score({"video_id": [7, 9], ...})` returns `{"ctr": [...], "cvr": [...]}`.

    Args:
        path: The file.
        precision: How its MLP shall compute: "fp32", "bf16" or "int8".

    Raises:
        FileNotFoundError: If there is no such file.
        ArtefactError: If the file is truncated, altered, of another kind or of another version; if it holds no codes
            and is to run in int8.
        InputError: If there is no such precision.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file, wanted an artefact (model.safetensors)")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise ArtefactError(f"{path}: got safetensors of another kind, wanted an artefact of {KEY}")
            meta = json.loads(metadata[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path}: got a damaged file ({error}), wanted an artefact") from error
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        got = meta.get("version") if isinstance(meta, dict) else None
        raise ArtefactError(f"{path}: got version {got}, wanted {VERSION}")
    if meta.pop("sha256", None) != _digest(meta, tensors):
        raise ArtefactError(f"{path}: the contents do not match their checksum, wanted an unaltered artefact")
    if precision == "int8" and meta.get("codes") is None:
        raise ArtefactError(f"{path}: got an artefact without codes, wanted a calibrated one for int8")
    try:
        return _ranker(meta, tensors, precision)
    except (KeyError, ValueError, TypeError) as error:
        raise ArtefactError(f"{path}: got contents that do not fit together: {error!r}") from error


def _ranker(meta: dict[str, Any], tensors: dict[str, Tensor], precision: str) -> Ranker:
    tasks = tuple(meta["tasks"])
    hidden = []
    for i, layer in enumerate(meta["layers"]):
        part = f"layers.{i}."
        rows, columns = layer["shape"]
        weight = SharedWeight(
            (rows, columns),
            tasks,
            tensors[part + "bitmask"],
            tensors[part + "row_offsets"],
            tensors[part + "compressed"],
        )
        weight.validate()
        hidden.append(SparseLayer(weight, tensors[part + "bias"], layer["activation"]))
    heads = {}
    for task in tasks:
        dense = tensors[f"heads.{task}.weight"]
        head = SharedWeight.from_dense(dense, {ALL: torch.ones_like(dense, dtype=torch.bool)})
        heads[task] = SparseLayer(head, tensors[f"heads.{task}.bias"], "sigmoid")
    arrays = {name.removeprefix("encoder."): t.numpy() for name, t in tensors.items() if name.startswith("encoder.")}
    encoder = FeatureEncoder.from_arrays(arrays, meta["encoder"])
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, meta["dim"])
    inputs.load_state_dict({"embedding": tensors["inputs.embedding"]})
    codes = meta.get("codes")
    if codes is not None:
        codes = {task: [Codes(*code) for code in of_task] for task, of_task in dict(codes).items()}
    return Ranker(encoder, inputs, SparseMLP(hidden, heads, precision, codes))


def _bias(layer: SparseLayer) -> Tensor:
    return torch.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias


def _digest(meta: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
