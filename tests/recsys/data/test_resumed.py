"""A prepared folder is the same, byte for byte, whenever its process was stopped and however little memory it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lt4rec_sparse.ranker.features import Schema, tables
from lt4rec_sparse.recsys.data import DataError, SimulatorConfig, history, ordered, prepare, simulate
from lt4rec_sparse.recsys.data.dealt import _deal_file
from lt4rec_sparse.recsys.data.source import SCHEMA_FILE

STAGES = ("read log", "order days", "fit", "encode")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupted_at(stage: str, done: int) -> Any:
    def progress(now: str, so_far: int, total: int) -> None:
        if (now, so_far) == (stage, done):
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "log"
    simulate(SimulatorConfig(users=60, videos=40, impressions=1_000, days=7), folder)
    return folder


@pytest.fixture(scope="module", params=["day", "random"])
def case(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A log, its schema with rows split by day or at random, and what is prepared of it."""
    schema = Schema.from_toml(source / SCHEMA_FILE, stored=True)
    if request.param == "random":
        schema = Schema.from_dict(schema.to_dict() | {"split": {"by": "random"}})
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(source, out, schema, row_group_rows=100)
    return source, schema, contents(out)


def test_the_bounds_of_memory_do_not_matter(case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(history, "NOTED_ROWS", 150)
    monkeypatch.setattr(tables, "HELD", 200)
    folder, schema, whole = case
    prepare(folder, tmp_path / "out", schema, row_group_rows=100)
    assert contents(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_done_before_an_interruption_is_not_done_again(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, schema, whole = case
    for stage in STAGES:
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, tmp_path / "out", schema, interrupted_at(stage, 2), row_group_rows=100)
        assert not (tmp_path / "out").exists()
    read: list[Path] = []
    monkeypatch.setattr("lt4rec_sparse.recsys.data.dealt._deal_file", lambda *a: read.append(a[0]) or _deal_file(*a))
    told: list[tuple[str, int, int]] = []
    prepare(folder, tmp_path / "out", schema, lambda *step: told.append(step), row_group_rows=100)
    assert contents(tmp_path / "out") == whole
    assert not read and "fit" not in {stage for stage, *_ in told}
    assert next(done for stage, done, _ in told if stage == "encode") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_new_times_of_the_same_files_are_noted_and_nothing_is_done_again(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, schema = make()
    read: list[Path] = []
    monkeypatch.setattr("lt4rec_sparse.recsys.data.dealt._deal_file", lambda *a: read.append(a[0]) or _deal_file(*a))
    for moment in (1, 2):
        os.utime(folder / "log.csv", ns=(moment, moment))
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, tmp_path / "out", schema, interrupted_at("encode", moment))
        begun = json.loads((tmp_path / ".out.unfinished" / "scratch" / "begun.json").read_text())
        assert begun["files"]["log.csv"]["changed_ns"] == moment
    assert len(read) == 1


def test_work_on_other_contents_or_another_schema_is_thrown_away(make: Any, tmp_path: Path) -> None:
    folder, schema = make()
    for stage in STAGES:
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, tmp_path / "out", schema, interrupted_at(stage, 1))
        rows = (folder / "log.csv").read_bytes()
        (folder / "log.csv").write_bytes(rows + rows.splitlines(keepends=True)[-1])
    other = Schema.from_dict(schema.to_dict() | {"duplicates": "drop"})
    prepare(folder, tmp_path / "out", other)
    prepare(folder, tmp_path / "anew", other)
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


def test_an_error_of_the_data_leaves_nothing(make: Any, log: Any, tmp_path: Path) -> None:
    folder, schema = make(log | {"click": [1, 1, 1, 1, 0, 0]})
    with pytest.raises(DataError, match="none of task 'cvr'"):
        prepare(folder, tmp_path / "out", schema)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# A child is killed at its n-th write that reaches the disk, and the next one goes on, to be killed later, until one
# ends by itself.
KILLED = """
import os, signal, sys
from pathlib import Path
from lt4rec_sparse import files
from lt4rec_sparse.recsys.data import prepare

def child(steps):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    left, sync = [steps], files._sync
    def counted(path):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)
    files._sync = counted
    prepare(Path(sys.argv[1]), Path(sys.argv[2]), row_group_rows=100)
    os._exit(0)

steps = 1
while (ended := child(steps)) == signal.SIGKILL:
    steps += 5
print(steps, ended)
"""


@pytest.mark.heavy
def test_processes_that_are_killed_one_after_another_change_nothing(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps, ended = map(int, done.stdout.split())
    assert steps > 30 and ended == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    prepare(source, tmp_path / "whole", row_group_rows=100)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
