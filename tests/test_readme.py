"""The README says what the committed results say, and CI runs what the README tells a newcomer to run."""

import re
from pathlib import Path

import pytest

from bench import readme

ROOT = Path(__file__).parents[1]


def first_block() -> list[str]:
    block = re.search(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert block is not None
    return block[1].strip().splitlines()


def test_the_tables_are_those_of_the_committed_results():
    assert readme.generated() == readme.README.read_text(encoding="utf-8"), "run: python -m bench readme"


def test_ci_runs_the_second_command_and_nothing_else():
    _, check = first_block()
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8") == f"#!/usr/bin/env bash\n{check}\n"


def test_the_python_example_runs(tmp_path, monkeypatch):
    """Except for its last line, which wants a finished run."""
    code = re.search(r"^```python\n(.*?)^```", readme.README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert code is not None
    *lines, last = code[1].strip().splitlines()
    names: dict[str, object] = {}
    exec("\n".join(lines), names)
    assert last.startswith("scores = load(")
    assert names["sparse"].tasks == ("ctr", "cvr")


@pytest.mark.parametrize("name", ["cpu", "kuairand_pure", "simulated", "commands"])
def test_a_result_says_where_it_was_measured(name):
    machine = readme.record.read(name)["machine"]
    assert {"commit", "processor", "cores", "torch", "python"} <= set(machine)
    assert machine["clean"], "record it from a committed tree"
