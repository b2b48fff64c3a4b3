"""What a run left in its folder, read again: a file that is damaged is named, with what to do about it."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from lt4rec_sparse import checked_file
from lt4rec_sparse.errors import InputError, told
from lt4rec_sparse.files import check_regular

WEIGHTS, VERSION = "lt4rec_sparse_weights", 1  # see `checked_file`
DOS_FOLDER = 0x10  # of a part's attributes in a ZIP archive


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state with checksums, completely or not at all."""
    checked_file.write(path, WEIGHTS, {"version": VERSION}, model.state_dict())


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what `save_weights` wrote. Files of before there was one have no metadata, and so no checksum.

    Raises:
        InputError: If the file is damaged, or of another model.
    """
    check_regular(path)
    try:
        with safe_open(path, "pt") as file:
            is_checked = file.metadata() is not None
        state = checked_file.read(path, WEIGHTS, "weights", (VERSION,))[1] if is_checked else load_file(path)
        model.load_state_dict(state)
    except (SafetensorError, InputError, RuntimeError) as error:  # torch's, of names and shapes
        raise _damaged(path, error) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, which `torch.save` wrote, after checking every part of its archive, which torch does not.

    Raises:
        InputError: If the file is damaged.
    """
    check_regular(path)
    content = BytesIO(path.read_bytes())  # from here on every error is of what the file holds
    try:
        with ZipFile(content) as archive:
            # Each way of packing has errors of its own; of a folder torch reads nothing, into memory left as it was.
            for part in archive.infolist():
                if part.compress_type != ZIP_STORED or part.is_dir() or part.external_attr & DOS_FOLDER:
                    raise BadZipFile(f"{part.filename} is compressed or a folder")
            altered = archive.testzip()
        if altered is not None:
            raise BadZipFile(f"{altered} does not match its checksum")
        content.seek(0)
        state: dict[str, Any] = torch.load(content, weights_only=True)
    except (BadZipFile, RuntimeError, UnpicklingError, EOFError, ValueError, KeyError, OverflowError) as error:
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
    why = told(error).removeprefix(f"{path}: ")
    return InputError(f"{path}: got a damaged file ({why}), wanted what a run left there: delete it to go on")
