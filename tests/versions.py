"""`python -m tests.versions INTERPRETER TORCH`: the tests with another Python and torch, in a throw-away environment.

Installs this commit with `[test]` and that torch, and nothing of constraints.txt, runs the tests of the library and the
ranker, and puts what came of them in `bench/results/versions.json`, beside the other versions that were tried.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import record
from tests.settings import ROOT, SHORT, counted

ASK = """
import json, platform, sys
from importlib.metadata import version
names = ("torch", "numpy", "triton")
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in names}}))
"""


def main(arguments: list[str]) -> int:
    """Install, run, record; return pytest's exit code."""
    if len(arguments) != 2:
        sys.exit(f"usage: {(__doc__ or '').partition(':')[0].strip('`')}")
    interpreter, torch = arguments
    with tempfile.TemporaryDirectory() as folder:
        tree, python = Path(folder) / "tree", Path(folder) / "venv" / "bin" / "python"
        tree.mkdir()
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x"], cwd=tree, input=archive, check=True)
        environment = {**os.environ, "LT4REC_SPARSE_REQUIRE_NATIVE": "1"}
        environment.pop("PYTHONPATH", None)
        for command in (
            [interpreter, "-m", "venv", Path(folder) / "venv"],
            [python, "-m", "pip", "install", "-q", f"torch=={torch}"],
            [python, "-m", "pip", "install", "-q", "-e", ".[test]"],
        ):
            subprocess.run(command, cwd=tree, env=environment, check=True)
        asked = subprocess.run([python, "-c", ASK], capture_output=True, check=True, env=environment)
        versions = json.loads(asked.stdout)
        found = counted(python, tree, SHORT, environment)
    path = record.RESULTS / "versions.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    machine = {name: record.machine()[name] for name in ("commit", "clean", "processor")}
    records[f"Python {versions['python']}, torch {versions['torch']}"] = {**machine, **versions, **found}
    record.write("versions", dict(sorted(records.items())))
    print(versions, {name: found[name] for name in ("passed", "failed", "skipped")})
    return int(found["exit_code"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
