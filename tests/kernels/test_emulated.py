"""Every x86 kernel against the scalar definition, on a processor with AVX2 alone: what it lacks is emulated.

`emulated/immintrin.h` stands in front of the compiler's header and computes the other instructions lane by lane.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lt4rec_sparse.kernels import cpu

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = "g++"
FLAGS = ("-std=c++17", "-fopenmp", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}")
EMULATED = ("-O1", "-mavx2", "-mfma", "-Wno-psabi", "-DLT4REC_EMULATED", f"-I{HERE / 'emulated'}")


@pytest.mark.emulated
@pytest.mark.skipif(platform.machine() != "x86_64", reason=f"instructions of x86, on {platform.machine()}")
def test_kernels_of_other_processors_compute_what_the_scalar_definition_does(tmp_path: Path) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    if cpu.is_available() and "avx2" not in cpu.supported_isas():
        pytest.skip("this machine has no AVX2, which the emulation builds on")
    sources = [path for path in sorted(CSRC.glob("*.cpp")) if path.stem != "isa" and not path.stem.startswith("module")]
    commands = []
    for source in [*sources, HERE / "compare_isas.cpp", HERE / "emulated" / "isa.cpp"]:
        is_emulated = source.stem.startswith(("kernels_avx512", "kernels_avx2_vnni"))
        flags = EMULATED if is_emulated else ("-O1",)
        target = tmp_path / f"{source.parent.name}_{source.stem}.o"
        commands.append([COMPILER, *FLAGS, *flags, "-c", source, "-o", target])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    program = tmp_path / "compare_isas"
    subprocess.run([COMPILER, "-fopenmp", *tmp_path.glob("*.o"), "-o", program], check=True)
    result = subprocess.run([program, "240"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("scalar avx2 avx2_vnni avx512 avx512_vnni avx512_bf16 agree")
