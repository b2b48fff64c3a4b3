"""Whether autocast is on, and how to leave it: what computes in a precision of its own takes the dtypes it is given."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_is_enabled = torch.is_autocast_enabled


def is_autocast(x: Tensor) -> bool:
    """Tell whether autocast is on for operations on the device of `x`."""
    # Other devices, such as "meta", may have no autocast; what tells is opaque to the compiler of torch 2.11. Asked so,
    # it takes a third of what the name of the device takes.
    return _is_enabled("cpu") if x.is_cpu else x.is_cuda and _is_enabled("cuda")


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which operations on the device of `x` take the dtypes that they are given."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()
