"""Run pruned networks fast, and rank with them: masks, compressed weights, CPU and GPU kernels, training and serving.

The public names of the library and the ranker. They are imported when they are first asked for, so that the command
line answers `--help` without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lt4rec_sparse.formats import BlockWeight, SharedWeight
    from lt4rec_sparse.masks import Mask
    from lt4rec_sparse.network import FrozenNetwork
    from lt4rec_sparse.nn import (
        Dice,
        MaskedAdam,
        MaskedLinear,
        MaskedMLP,
        Plan,
        SparseLinear,
        SparseMLP,
        freeze,
        load_module,
        mask_linears,
        report,
        save_module,
        unfreeze,
    )
    from lt4rec_sparse.onnx import from_onnx, to_onnx
    from lt4rec_sparse.ranker import Ranker, load, save

__version__ = "0.1.0"

_HOMES = {
    "Dice": "nn",
    "FrozenNetwork": "network",
    "Mask": "masks",
    "MaskedAdam": "nn",
    "MaskedLinear": "nn",
    "MaskedMLP": "nn",
    "Plan": "nn",
    "Ranker": "ranker",
    "BlockWeight": "formats",
    "SharedWeight": "formats",
    "SparseLinear": "nn",
    "SparseMLP": "nn",
    "freeze": "nn",
    "from_onnx": "onnx",
    "load": "ranker",
    "load_module": "nn",
    "mask_linears": "nn",
    "report": "nn",
    "save": "ranker",
    "save_module": "nn",
    "to_onnx": "onnx",
    "unfreeze": "nn",
}

__all__ = [
    "BlockWeight",
    "Dice",
    "FrozenNetwork",
    "Mask",
    "MaskedAdam",
    "MaskedLinear",
    "MaskedMLP",
    "Plan",
    "Ranker",
    "SharedWeight",
    "SparseLinear",
    "SparseMLP",
    "freeze",
    "from_onnx",
    "load",
    "load_module",
    "mask_linears",
    "report",
    "save",
    "save_module",
    "to_onnx",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
