"""Tensors and JSON in one safetensors file, written whole, read without trust: by version, dtype and checksum.

Metadata: one entry, whose name says the kind of file: a JSON object with `version` and `sha256`, over everything else:
the object without it and each tensor's name, dtype, shape and bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.files import parse_json, whole_file

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ArtefactError(InputError):
    """An artefact that is incomplete, of another kind, or inconsistent."""


def write(path: str | Path, key: str, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file, completely or not at all.

    Args:
        path: The file.
        key: Its kind.
        meta: What JSON can hold, with `version`, without `sha256`.
        tensors: They may be on any device; two that share memory are stored twice.
    """
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        place = stored.untyped_storage().data_ptr()
        own[name] = stored.clone() if place in seen else stored  # safetensors refuses tensors that share memory
        seen.add(place)
    complete = {**meta, "sha256": _digest(meta, own)}
    with whole_file(path) as temporary:
        save_file(own, temporary, metadata={key: json.dumps(complete)})


def read(
    path: str | Path, key: str, wanted: str, versions: Sequence[int], dtypes: Sequence[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write` wrote: its JSON without the checksum, and its tensors, memory-mapped.

    Args:
        path: The file.
        key: The kind that it must be.
        wanted: What a message calls such a file.
        versions: Those that can be read.
        dtypes: Those that tensors can have, as safetensors spells them; None for any.

    Raises:
        FileNotFoundError: If there is no such file.
        ArtefactError: If the file is truncated, altered, of another kind or version, or has another dtype.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file, wanted {wanted}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if key not in metadata:
                raise ArtefactError(f"{path}: got safetensors of another kind, wanted {wanted}")
            tensors = {}
            for name in file.keys():  # noqa: SIM118  # not a mapping
                dtype = file.get_slice(name).get_dtype()
                if dtypes is not None and dtype not in dtypes:
                    raise ArtefactError(f"{path}: {name}: got dtype {dtype}, wanted one of {', '.join(dtypes)}")
                tensors[name] = _aligned(file.get_tensor(name))
        meta = parse_json(metadata[key], "metadata")
    except ArtefactError:
        raise
    except (SafetensorError, UnicodeDecodeError, InputError) as error:
        raise ArtefactError(f"{path}: got a damaged file ({error}), wanted {wanted}") from error
    if meta.get("version") not in versions:
        known = " or ".join(map(str, versions))
        raise ArtefactError(f"{path}: got version {shown(meta.get('version'))}, wanted {known}")
    if meta.pop("sha256", None) != _digest(meta, tensors):
        raise ArtefactError(f"{path}: the contents do not match their checksum, wanted {wanted} as it was written")
    return meta, tensors


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity, and floating point of 8 bits or less, in which torch does not look for them.

    Raises:
        InputError: If the tensor has one, or such a dtype.
    """
    if tensor.is_floating_point() and tensor.dtype not in FLOATS:
        raise InputError(f"{name}: got {tensor.dtype}, wanted one of {', '.join(map(str, FLOATS))}")
    if tensor.is_floating_point() and tensor.numel():
        low, high = tensor.aminmax()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"{name}: got NaN or Inf among {tensor.numel()} numbers, wanted finite ones")


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor aligned to its element's size, which safetensors files need not be."""
    if tensor.data_ptr() % tensor.element_size() == 0:
        return tensor
    return _bytes(tensor).clone().view(tensor.dtype).view(tensor.shape)


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a contiguous tensor; torch does not view an empty one in another dtype."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def _digest(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor).numpy().data)
    return digest.hexdigest()
