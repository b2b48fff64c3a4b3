"""The ARM kernels, cross-compiled and run under an emulator against the scalar definition."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = Path("/usr/aarch64-linux-gnu")  # where Debian puts those of its cross compiler
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")


@pytest.mark.neon
def test_neon_computes_what_the_scalar_definition_does(tmp_path: Path) -> None:
    for tool, package in ((COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}; Debian has it in {package}")
    sources = [
        path for path in sorted(CSRC.glob("*.cpp")) if not path.name.startswith("module")
    ]  # which needs ARM's Python
    program = tmp_path / "compare_isas"
    compile_command = [COMPILER, *FLAGS, f"-I{CSRC}", *sources, HERE / "compare_isas.cpp", "-o", program]
    subprocess.run(compile_command, check=True)
    # First the oldest processor there is: an instruction that not all have would end the run.
    for processor, isas in (("cortex-a53", "scalar neon agree"), ("max", "scalar neon neon_dot agree")):
        run_command = [EMULATOR, "-cpu", processor, "-L", LIBRARIES, program, "240"]
        result = subprocess.run(run_command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.startswith(isas)
