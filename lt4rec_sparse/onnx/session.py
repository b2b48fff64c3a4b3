"""ONNX Runtime's sessions, and tensors on their way in and out: without a copy where memory allows it."""

from __future__ import annotations

import torch
from onnxruntime import InferenceSession, OrtValue
from torch import Tensor

from lt4rec_sparse.onnx.graph import quiet


def session_of(model: bytes) -> InferenceSession:
    """Return a session with as many threads as torch has now; they sleep while the engine's compute."""
    options = quiet()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return InferenceSession(model, options, ["CPUExecutionProvider"])


def to_value(tensor: Tensor) -> OrtValue:
    """Return a tensor as ONNX Runtime's; both share memory if it is contiguous."""
    return OrtValue.ortvalue_from_numpy(tensor.detach().contiguous().numpy())


def to_tensor(value: OrtValue) -> Tensor:
    """Return ONNX Runtime's tensor as torch's; both share memory."""
    tensor = torch.from_numpy(value.numpy())
    return tensor if tensor.numel() else tensor.clone(memory_format=torch.contiguous_format)  # its strides are 0
