"""The package imports without onnx, and says which extra is missing."""

import subprocess
import sys

CODE = """
import sys
{hide}
import lt4rec_sparse
import lt4rec_sparse.onnx
from lt4rec_sparse import *
assert not {{"onnxruntime", "onnxscript"}} & {{name for name, module in sys.modules.items() if module}}
assert not sys.modules.get("onnx")
import torch
for call in (lambda: lt4rec_sparse.from_onnx("m.onnx"), lambda: lt4rec_sparse.to_onnx(torch.nn.Identity())):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
"""


def run(hide: str) -> list[str]:
    code = CODE.format(hide=hide)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()


def test_nothing_is_imported_before_a_call():
    first, second = run("")
    assert first == "FileNotFoundError m.onnx: no such file, wanted an ONNX model"
    assert second.startswith("TypeError module: got a Identity, wanted a SparseMLP")


def test_the_extra_is_named():
    hidden = "sys.modules['onnx'] = sys.modules['onnxruntime'] = None"
    wanted = "got no such package, wanted the extra: pip install 'lt4rec-sparse[onnx]'"
    assert run(hidden) == [f"ImportError onnx and onnxruntime: {wanted}"] * 2
