"""ONNX Runtime's sessions, and tensors on their way in and out: without a copy where memory allows it."""

from __future__ import annotations

import numpy as np
import torch
from onnxruntime import InferenceSession
from torch import Tensor

from lt4rec_sparse.onnx.graph import Array, quiet


def session_of(model: bytes) -> InferenceSession:
    """Return a session with as many threads as torch has now; they sleep while the engine's compute."""
    options = quiet()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return InferenceSession(model, options, ["CPUExecutionProvider"])


def to_array(tensor: Tensor) -> Array:
    """Return a tensor as ONNX Runtime reads it; both share memory if it is contiguous."""
    array: Array = tensor.detach().contiguous().numpy()
    return array


def to_tensor(array: Array) -> Tensor:
    """Return what ONNX Runtime computed as a tensor; both share memory."""
    tensor = torch.from_numpy(np.asarray(array))
    return tensor if tensor.numel() else tensor.clone(memory_format=torch.contiguous_format)  # its strides are 0
