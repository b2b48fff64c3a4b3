"""Tensors and JSON in one safetensors file, written whole, read without trust: by version, dtype and checksum.

Metadata: one entry, whose name says the kind of file: a JSON object with `version`; with `digests`, the SHA-256 of each
tensor's name, dtype, shape and bytes; and with `sha256`, over everything else: the object without it and all tensors.
The one tells whether a file is whole, the other which part of it is not. docs/artefact.md has them byte by byte. Files
of before there were `digests` lack them, and readers of that time ignore them.
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

from lt4rec_sparse.errors import InputError, shown, told
from lt4rec_sparse.files import check_regular, parse_json, whole_file

# What describes a file is read before anything can be compared with the file's size, and JSON takes some twenty times
# its length in memory. An artefact of a thousand columns has 0.2 MB of it.
MAX_HEADER_BYTES = 1 << 24
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

    Raises:
        InputError: If what describes the file is longer than `MAX_HEADER_BYTES`.
    """
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        place = stored.untyped_storage().data_ptr()
        own[name] = stored.clone() if place in seen else stored  # safetensors refuses tensors that share memory
        seen.add(place)
    described = {**meta, "digests": {name: _part(name, own[name]).hexdigest() for name in sorted(own)}}
    complete = {**described, "sha256": _digest(described, own)}
    with whole_file(path) as temporary:
        save_file(own, temporary, metadata={key: json.dumps(complete)})
        if (got := _header_bytes(temporary)) > MAX_HEADER_BYTES:
            raise InputError(f"{path}: got a header of {got:,} bytes, wanted at most {MAX_HEADER_BYTES:,}")


def read(
    path: str | Path, key: str, wanted: str, versions: Sequence[int], dtypes: Sequence[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write` wrote: its JSON without the checksums, and its tensors, memory-mapped.

    Sizes are compared with the file's before anything of them is made; tensors are read in place.

    Args:
        path: The file.
        key: The kind that it must be.
        wanted: What a message calls such a file.
        versions: Those that can be read.
        dtypes: Those that tensors can have, as safetensors spells them; None for any.

    Raises:
        FileNotFoundError: If there is no such file.
        ArtefactError: If it is no regular file, is truncated, altered, of another kind or version, or has another
            dtype; of what was altered the message names the tensor.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file, wanted {wanted}")
    check_regular(path, wanted, ArtefactError)
    try:
        if (got := _header_bytes(path)) > MAX_HEADER_BYTES:
            raise InputError(f"a header of {got:,} bytes, above {MAX_HEADER_BYTES:,}")
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
        raise ArtefactError(f"{path}: got a damaged file ({told(error)}), wanted {wanted}") from error
    if meta.get("version") not in versions:
        known = " or ".join(map(str, versions))
        raise ArtefactError(f"{path}: got version {shown(meta.get('version'))}, wanted {known}")
    if meta.pop("sha256", None) != _digest(meta, tensors):
        altered = _altered(meta.get("digests"), tensors)
        raise ArtefactError(
            f"{path}: the contents do not match their checksum{altered}, wanted {wanted} as it was written"
        )
    return {name: entry for name, entry in meta.items() if name != "digests"}, tensors


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
        _part(name, tensors[name], digest)
    return digest.hexdigest()


def _part(name: str, tensor: Tensor, digest: hashlib._Hash | None = None) -> hashlib._Hash:
    """Add a tensor to a digest, or begin one with it."""
    digest = hashlib.sha256() if digest is None else digest
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(_bytes(tensor).numpy().data)
    return digest


def _altered(digests: Any, tensors: Mapping[str, Tensor]) -> str:
    """Return which parts of a file are not as they were written, in brackets, as far as the tensors' digests tell."""
    if not isinstance(digests, dict):
        return ""
    altered = [name for name in tensors if digests.get(name) != _part(name, tensors[name]).hexdigest()]
    altered += sorted(digests.keys() - tensors.keys())
    names = ", ".join(map(shown, altered[:3])) + (f" and {len(altered) - 3} more" if len(altered) > 3 else "")
    return f" (tensor {names})" if altered else " (the metadata)"


def _header_bytes(path: str | Path) -> int:
    with Path(path).open("rb") as file:
        return int.from_bytes(file.read(8), "little")
