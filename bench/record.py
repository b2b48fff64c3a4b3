"""Where a committed result was measured, so that a figure can be judged and reproduced."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

PEERS = ("onnxruntime", "openvino", "scipy", "sparseprop", "torch_rechub")
COMMIT = "LT4REC_SPARSE_COMMIT"  # of a copied tree; ends in "-dirty" if the tree differs from it
NOT_CODE = (":!/bench/results", ":!/README.md", ":!/docs")  # written from results
RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return commit, processor, cores, instruction sets, threads and versions."""
    return {
        **_source(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "peers": {name: version(name) for name in PEERS if find_spec(name)},
    }


def write(name: str, record: dict[str, Any]) -> Path:
    """Write `results/<name>.json` and return its path."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def read(name: str) -> dict[str, Any]:
    """Read `results/<name>.json`."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return record


def _source() -> dict[str, Any]:
    """Return the commit, and whether the code is that commit's; for a copied tree the environment says both."""
    try:
        return {
            "commit": _git("rev-parse", "--short=12", "HEAD"),
            "clean": not _git("status", "--porcelain", "--untracked-files=no", "--", ":/", *NOT_CODE),
        }
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get(COMMIT, "unknown")
        return {
            "commit": commit.removesuffix("-dirty"),
            "clean": COMMIT in os.environ and not commit.endswith("-dirty"),
        }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def _processor() -> str:
    """Name the processor as Linux does, with family and model, because some names say nothing."""
    facts = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if ":" in line
    )
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    if "model name" not in facts:  # ARM
        return f"{platform.machine()} (implementer {facts.get('CPU implementer')}, part {facts.get('CPU part')})"
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']}, stepping {facts['stepping']})"
