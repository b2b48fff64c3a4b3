"""The older of two Triton versions: torch 2.11 brings 3.6, and the kernels must compile and compute there, too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / ".triton36"
# Triton 3.6's interpreter fails with NumPy 2.4 and later.
INSTALL = f"pip install --no-deps --target {FOLDER.name} triton==3.6.0 numpy==2.3.5"

pytestmark = [
    pytest.mark.triton36,
    pytest.mark.skipif(not FOLDER.exists(), reason=f"no {FOLDER.name}: `{INSTALL}` in the repository makes it"),
]


def test_every_kernel_compiles_within_its_gates() -> None:
    done = _run_with_triton36("-m", "tests.kernels.gpu.ahead_of_time", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Triton 3.6.0: " in done.stdout


def test_short_cases_pass_under_its_interpreter() -> None:
    # 3.6 makes scalars of arrays in a way that NumPy deprecates.
    deprecated = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
    test = ("tests/kernels/gpu/test_masked_matmul.py", "-k", "short", "-W", deprecated)
    done = _run_with_triton36("-m", "pytest", "-q", "-p", "no:cacheprovider", *test)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout


def _run_with_triton36(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
