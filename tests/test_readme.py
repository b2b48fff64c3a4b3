"""The pages say what the committed results say, and CI runs what the README tells a newcomer to run."""

import re
from pathlib import Path

import pytest

from bench import memory, record, tables
from lt4rec_sparse.kernels import cpu

ROOT = Path(__file__).parents[1]


def first_block() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```(?:sh|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    return block[1].strip().splitlines()


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_the_tables_are_those_of_the_committed_results(page):
    assert tables.generated()[page] == page.read_text(encoding="utf-8"), "run: python -m bench tables"


def test_ci_runs_the_second_command_and_nothing_else():
    product, check = first_block()
    assert len(product) <= 120
    assert len(check) <= 120
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8") == f"#!/usr/bin/env bash\n{check}\n"


def test_the_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140


@pytest.mark.parametrize(
    "name", ["cpu", "default", "wide", "frozen", "kuairand_pure", "kuairand_pure_blocks", "simulated", "commands"]
)
def test_a_result_says_where_it_was_measured(name):
    result = record.read(name)
    for measured in [result] if "machine" in result else result.values():
        assert {"commit", "processor", "cores", "torch", "python"} <= set(measured["machine"])
        assert measured["machine"]["clean"], "record it from a committed tree"


@pytest.mark.skipif(not cpu.is_available(), reason="the native engine is absent")
def test_the_bytes_in_the_readme_are_those_of_this_engine():
    assert memory.measured() == record.read("memory"), "run: python -m bench memory, then: python -m bench tables"
