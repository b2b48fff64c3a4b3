"""`python -m tests.settings [--short] [NAME ...]`: the test suite under each setting of the processor.

A setting holds the engine, torch and oneDNN down to what an older processor has. All settings run one after another,
or those named; one that this machine cannot hold is listed as absent. Each whole run replaces its record in
`bench/results/checks.json`, where every machine and setting has one. `--short` runs the engine, the operators and the
modules alone, without Triton, and records nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from bench import record
from lt4rec_sparse.kernels import cpu

ROOT = Path(__file__).parents[1]
CHECKS = "checks"  # of bench/results
SHORT = (
    *("tests/kernels", "tests/nn", "tests/ranker", "tests/ops", "tests/test_formats.py"),
    *("--ignore=tests/kernels/gpu", "--ignore-glob=*gpu*"),
)


class Setting(NamedTuple):
    """What the processor may use: the engine's instruction set, torch's and oneDNN's; None leaves it."""

    engine: str | None
    torch: str | None
    onednn: str | None

    def environment(self) -> dict[str, str]:
        names = ("LT4REC_SPARSE_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
        return {name: value for name, value in zip(names, self, strict=True) if value is not None}


SETTINGS = {
    "native": Setting(None, None, None),
    "avx512 without bf16": Setting("avx512_vnni", "avx512", "AVX512_CORE_VNNI"),
    "avx2": Setting("avx2", "avx2", "AVX2"),
    "scalar": Setting("scalar", "default", "SSE41"),
}


def run(setting: Setting, is_short: bool) -> dict[str, Any]:
    """Run the tests under a setting in a process of its own and return what came of them."""
    inherited = {k: v for k, v in os.environ.items() if k not in Setting("", "", "").environment()}
    environment = setting.environment()
    return {
        "environment": environment,
        **counted(sys.executable, ROOT, SHORT if is_short else (), {**inherited, **environment}),
    }


def counted(
    interpreter: str | Path, tree: Path, tests: Sequence[str], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Run pytest in a process of its own and return counts, seconds, and the reason of every skip."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [interpreter, "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:cacheprovider", *tests]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=tree, env=environment, check=False)
        seconds = time.perf_counter() - started
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    reasons = Counter(skip.get("message", "") for case in cases for skip in case.iter("skipped"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {
        "exit_code": done.returncode,
        "passed": len(cases) - len(failed) - reasons.total(),
        "failed": len(failed),
        "skipped": reasons.total(),
        "seconds": round(seconds, 1),
        "skips": dict(reasons.most_common()),
    }


def keep(name: str, found: dict[str, Any]) -> None:
    """Put one record beside those of other machines and settings."""
    machine = record.machine()
    path = record.RESULTS / f"{CHECKS}.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    records[f"{machine['processor']}, {name}"] = {"machine": machine, "setting": name, **found}
    record.write(CHECKS, dict(sorted(records.items())))


def main(arguments: list[str]) -> int:
    """Run the settings; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.settings", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(SETTINGS)}")
    parser.add_argument("--short", action="store_true", help="the engine, operators and modules alone; no record")
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in SETTINGS]
    if unknown:
        parser.error(f"NAME: got {', '.join(unknown)}, wanted some of {', '.join(SETTINGS)}")
    rows, is_good = [], True
    for name in chosen.names or SETTINGS:
        setting = SETTINGS[name]
        if setting.engine not in (None, *cpu.supported_isas()):
            rows.append((name, f"absent: this machine does not run {setting.engine}"))
            continue
        print(f"== {name} {setting.environment()}", flush=True)
        found = run(setting, chosen.short)
        is_good &= found["exit_code"] == 0
        if not chosen.short:
            keep(name, found)
        counts = ", ".join(f"{found[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
        rows.append((name, f"{counts}, {found['seconds']:.0f} s"))
    print(*(f"{name:20} {line}" for name, line in rows), sep="\n")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
