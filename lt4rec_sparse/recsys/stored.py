"""What a run left in its folder, read again: a file that is damaged is named, with what to do about it."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lt4rec_sparse.errors import InputError, told
from lt4rec_sparse.files import check_regular


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what `save_file(model.state_dict(), path)` wrote.

    Raises:
        InputError: If the file is damaged, or of another model.
    """
    check_regular(path)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:  # torch's, of names and shapes
        raise _damaged(path, error) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, which `torch.save` wrote, after checking every part of its archive, which torch does not.

    Raises:
        InputError: If the file is damaged.
    """
    check_regular(path)
    try:
        with ZipFile(path) as archive:
            altered = archive.testzip()
        if altered is not None:
            raise BadZipFile(f"{altered} does not match its checksum")
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (BadZipFile, RuntimeError, UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    return state


def read_seconds(path: Path) -> float:
    """Read a number of seconds.

    Raises:
        InputError: If the file holds no number.
    """
    check_regular(path)
    try:
        return float(path.read_text(encoding="utf-8"))
    except ValueError as error:  # a UnicodeDecodeError among them
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: got a damaged file ({told(error)}), wanted what a run left there: delete it to go on")
