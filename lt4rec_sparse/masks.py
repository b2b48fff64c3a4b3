"""Which weights are kept: one `Mask` per task, with one bool tensor per layer, True = kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lt4rec_sparse.errors import InputError, told
from lt4rec_sparse.files import check_regular, parse_json, whole_file

FORMAT = "lt4rec_sparse.mask.v1"
Shapes = Mapping[str, tuple[int, int]]


class Mask(Mapping[str, Tensor]):
    """The kept weights of one task: layer name -> bool `[out_features, in_features]`, True = kept.

    A mapping that does not change: pruning makes a new mask. Two masks are equal if they have the same layers and keep
    the same weights.

    Example:
        >>> mask = Mask({"layers.0": torch.tensor([[True, False], [True, True]])})
        >>> mask.nnz, mask.density
        (3, 0.75)

    Args:
        layers: Layer name -> bool tensor of two dimensions. Copied.

    Raises:
        TypeError: If a layer is not bool.
        ValueError: If a layer does not have two dimensions, or there is no layer.
    """

    def __init__(self, layers: Mapping[str, Tensor]) -> None:
        if not layers:
            raise ValueError("mask: got no layer, wanted at least one")
        for name, kept in layers.items():
            if kept.dtype != torch.bool:
                raise TypeError(f"mask of {name}: got dtype {kept.dtype}, wanted torch.bool")
            if kept.dim() != 2:
                raise ValueError(f"mask of {name}: got shape {tuple(kept.shape)}, wanted [out_features, in_features]")
        self._layers = {name: kept.detach().cpu().clone() for name, kept in layers.items()}

    @classmethod
    def full(cls, shapes: Shapes) -> Mask:
        """Keep every weight of the layers with these shapes."""
        return cls({name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})

    @classmethod
    def random(cls, shapes: Shapes, nnz: Mapping[str, int], generator: torch.Generator) -> Mask:
        """Keep exactly `nnz[name]` uniformly drawn weights of each layer.

        Raises:
            ValueError: If a count is negative or larger than its layer.
        """
        layers = {}
        for name, (rows, columns) in shapes.items():
            size = rows * columns
            if not 0 <= nnz[name] <= size:
                raise ValueError(f"nnz of {name}: got {nnz[name]}, wanted 0 to {size}")
            kept = torch.zeros(size, dtype=torch.bool)
            kept[torch.randperm(size, generator=generator)[: nnz[name]]] = True
            layers[name] = kept.view(rows, columns)
        return cls(layers)

    def __getitem__(self, name: str) -> Tensor:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.shapes == other.shapes and all(torch.equal(kept, other[name]) for name, kept in self.items())

    __hash__ = None  # type: ignore[assignment]  # equal by content, so not by identity

    def __repr__(self) -> str:
        return f"Mask({', '.join(f'{name}: {d:.1%}' for name, d in self.layer_density().items())})"

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name -> `(out_features, in_features)`."""
        return {name: (kept.shape[0], kept.shape[1]) for name, kept in self.items()}

    @property
    def size(self) -> int:
        """How many weights there are, kept or not."""
        return sum(kept.numel() for kept in self.values())

    @property
    def nnz(self) -> int:
        """How many weights are kept."""
        return sum(self.layer_nnz().values())

    @property
    def density(self) -> float:
        """Kept weights over all weights."""
        return self.nnz / self.size

    def layer_nnz(self) -> dict[str, int]:
        """Layer name -> number of kept weights."""
        return {name: int(kept.sum()) for name, kept in self.items()}

    def layer_density(self) -> dict[str, float]:
        """Layer name -> kept weights over all weights of the layer."""
        return {name: nnz / self[name].numel() for name, nnz in self.layer_nnz().items()}

    def save(self, path: str | Path) -> None:
        """Write the mask as safetensors: one `<layer>.bitmask` per layer (`pack_bits`), the shapes in the metadata."""
        tensors = {f"{name}.bitmask": pack_bits(kept) for name, kept in self.items()}
        with whole_file(path) as temporary:
            # One entry: safetensors writes several in a random order, and equal masks would be different files.
            save_file(tensors, temporary, metadata={FORMAT: json.dumps(self.shapes)})

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a mask that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            InputError: If the file is not a mask, or is damaged; the message begins with its path.
        """
        check_regular(path, FORMAT)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        except SafetensorError as error:
            raise InputError(f"{path}: got no readable mask ({told(error)}), wanted {FORMAT}") from error
        # Until 0.1.0 the format and the shapes were two entries.
        shapes = metadata.get(FORMAT, metadata.get("shapes") if metadata.get("format") == FORMAT else None)
        if shapes is None:
            raise InputError(f"{path}: got format {metadata.get('format')}, wanted {FORMAT}")
        try:
            described = parse_json(shapes, "shapes")
            return cls({name: _unpacked(tensors.get(f"{name}.bitmask"), shape) for name, shape in described.items()})
        except ValueError as error:
            raise InputError(f"{path}: got a damaged mask ({told(error)}), wanted {FORMAT}") from error


def overlap(a: Mask, b: Mask) -> dict[str, float]:
    """Return the intersection over union of two masks for each layer; 1.0 where neither keeps anything.

    Raises:
        ValueError: If the masks are not over the same layers.
    """
    if a.shapes != b.shapes:
        raise ValueError(f"masks over different layers: got {b.shapes}, wanted {a.shapes}")
    result = {}
    for name, kept in a.items():
        union = int((kept | b[name]).sum())
        result[name] = int((kept & b[name]).sum()) / union if union else 1.0
    return result


def ownership(masks: Mapping[str, Mask]) -> dict[str, dict[str, int]]:
    """Count who owns the weights of each layer, as in Figure 3 of LT4REC.

    Returns:
        Layer name -> {"shared": kept by two tasks or more, "<task> only": kept by that task alone, "dead": by none}.
    """
    first = next(iter(masks.values()))
    result = {}
    for name in first:
        planes = torch.stack([mask[name] for mask in masks.values()])
        owners = planes.sum(0)
        counts = {"shared": int((owners > 1).sum())}
        counts |= {
            f"{task} only": int((plane & (owners == 1)).sum()) for task, plane in zip(masks, planes, strict=True)
        }
        result[name] = counts | {"dead": int((owners == 0).sum())}
    return result


def pack_bits(mask: Tensor) -> Tensor:
    """Pack bool `[..., columns]` into uint8 `[..., ceil(columns / 8)]`.

    Column `k` is bit `k % 8` (least significant first) of byte `k // 8`; the last byte is padded with zero bits.
    """
    columns = mask.shape[-1]
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -columns % 8))
    weight = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded.view(*mask.shape[:-1], (columns + 7) // 8, 8) * weight).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """Undo `pack_bits`: bool `[..., columns]`.

    Raises:
        ValueError: If the byte count is not that of `columns`, or a padding bit is set.
    """
    if bits.dtype != torch.uint8 or bits.shape[-1] != (columns + 7) // 8:
        raise ValueError(
            f"bitmask: got {bits.dtype} {tuple(bits.shape)}, wanted torch.uint8 [..., {(columns + 7) // 8}]"
        )
    unpacked = (bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    flat = unpacked.flatten(-2).to(torch.bool)
    if flat[..., columns:].any():
        raise ValueError(f"bitmask: a padding bit beyond column {columns - 1} is set, wanted zero")
    return flat[..., :columns]


def pack_words(mask: Tensor) -> Tensor:
    """Pack bool `[..., columns]` into int32 `[..., 4 ceil(columns / 128)]`, as GPU kernels read it.

    Column `k` is bit `k % 32` of word `k // 32`. Rows are padded with zero bits to 128 columns, so that each starts at
    a multiple of 16 bytes, and a tile of up to 128 columns never reads beyond its row.
    """
    bits = pack_bits(mask)
    return torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 16)).view(torch.int32)


def unpack_words(words: Tensor, columns: int) -> Tensor:
    """Undo `pack_words`: bool `[..., columns]`, True = kept. Padding bits are ignored."""
    bits = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return bits.flatten(-2)[..., :columns] != 0


def _unpacked(bits: Tensor | None, shape: Any) -> Tensor:
    rows, columns = shape if isinstance(shape, list) and len(shape) == 2 else (None, None)
    if bits is None or bits.dim() != 2 or bits.shape[0] != rows or type(columns) is not int or columns < 0:
        got = None if bits is None else tuple(bits.shape)
        raise ValueError(f"bitmask: got {got} for {str(shape)[:60]}, wanted [out_features, ceil(in_features / 8)]")
    return unpack_bits(bits, columns)
