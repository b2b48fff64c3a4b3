"""ONNX in and out. Its two functions import onnx and onnxruntime when they are called: the extra `onnx`."""

from lt4rec_sparse.onnx.doors import from_onnx, to_onnx

__all__ = ["from_onnx", "to_onnx"]
