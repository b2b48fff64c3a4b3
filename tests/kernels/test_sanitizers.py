"""The quick part of `python -m tests.kernels.sanitize`; the whole of it takes minutes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_HERE = 77


@pytest.mark.sanitizers
def test_sanitizers_find_nothing_but_what_they_must() -> None:
    command = [sys.executable, "-m", "tests.kernels.sanitize", "quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == NOT_HERE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
