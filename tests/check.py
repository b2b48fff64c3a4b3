"""`python -m tests.check`: the whole check, one step after another, and the time of each.

Every step runs, whatever became of those before it; the exit code is 1 where one failed. The engine must be native:
`LT4REC_SPARSE_REQUIRE_NATIVE=1` is set for all steps, so that a test run on the fallback cannot pass for one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KSERVE = ROOT / ".kserve"  # a client of servers that wants an older protobuf, and brings pandas and gRPC
TRITON36 = ROOT / ".triton36"  # the Triton of torch 2.11, whose interpreter needs NumPy below 2.4
MODULE = (sys.executable, "-m")
PYTEST = (*MODULE, "pytest", "-q")

BIN = Path(sys.executable).parent

STEPS: dict[str, tuple[str | Path, ...]] = {
    "lint": (BIN / "ruff", "check", "."),
    "format": (BIN / "ruff", "format", "--check", "."),
    "types": (BIN / "mypy",),
    "imports": (BIN / "lint-imports",),
    "second Triton": (*MODULE, "pip", "install", "-q", "--no-deps", "--target", TRITON36, "triton==3.6.0", "numpy<2.4"),
    "kserve": (*MODULE, "venv", KSERVE),
    "kserve's packages": (KSERVE / "bin" / "pip", "install", "-q", "kserve==0.21.0"),
    "tests": (*PYTEST, "--hypothesis-profile=thorough"),
    "heavy tests": (*PYTEST, "-m", "heavy"),
    "tests held to AVX2": (*MODULE, "tests.settings", "--short", "avx2"),
}


def main() -> int:
    """Run every step; return the exit code."""
    os.chdir(ROOT)
    os.environ["LT4REC_SPARSE_REQUIRE_NATIVE"] = "1"
    from lt4rec_sparse.kernels import cpu

    if not cpu.is_available():
        build = "LT4REC_SPARSE_REQUIRE_NATIVE=1 pip install -e '.[test]' -c constraints.txt"
        sys.exit(f"the CPU engine was not built ({cpu.absence_reason()}); this shows why: {build}")
    if (TRITON36 / "triton-3.6.0.dist-info").exists():
        del STEPS["second Triton"]
    if any(KSERVE.glob("lib/*/site-packages/kserve-*.dist-info")):
        del STEPS["kserve"], STEPS["kserve's packages"]
    rows = []
    for name, arguments in STEPS.items():
        print(f"== {name}: {' '.join(map(str, arguments))}", flush=True)
        started = time.perf_counter()
        code = subprocess.run(arguments, check=False).returncode
        rows.append((name, code, time.perf_counter() - started))
    print("== the whole check")
    for name, code, seconds in rows:
        print(f"{name:20} {'passed' if code == 0 else f'FAILED ({code})':12} {seconds:6.0f} s")
    return int(any(code for _, code, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
