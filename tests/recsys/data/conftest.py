"""A small log written as files, so that every test says only what is special about its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data import SimulatorConfig, prepare, simulate
from lt4rec_sparse.recsys.data.prepare import Prepared

SCHEMA: dict[str, Any] = {
    "name": "small",
    "files": {"log": ["log*"]},
    "joins": [{"files": ["users.*"], "on": "user"}],
    "time": {"day": "day", "order": "moment"},
    "group": {"column": "user"},
    "split": {"test_days": 1, "validation_days": 1},
    "columns": [
        {"name": "video", "type": "int"},
        {"name": "tags", "kind": "multi"},
        {"name": "town"},
        {"name": "length", "kind": "dense", "buckets": 4},
    ],
    "tasks": [
        {"name": "ctr", "kind": "binary", "label": "click"},
        {"name": "cvr", "kind": "ratio", "label": "play", "divide_by": "length", "rows": ["click"]},
    ],
    "histories": [{"name": "past", "when": "click", "columns": ["video", "tags"], "length": 2, "rates": True}],
    "slices": [{"name": "video_1", "column": "video", "value": 1}],
}
USERS = {"user": [1, 2], "town": ["Ulm", None]}

Log = dict[str, list[Any]]


@pytest.fixture
def log() -> Log:
    """Six rows on three days; user 3 is in no side table."""
    return {
        "user": [1, 2, 1, 3, 1, 2],
        "video": [1, 2, 2, 1, 3, 1],
        "day": [1, 1, 2, 2, 3, 3],
        "moment": [10, 11, 20, 21, 30, 31],
        "tags": ["a,b", "", "b", "a , b", "a", "c"],
        "length": [10.0, 0.0, 10.0, 20.0, 10.0, 10.0],
        "click": [1, 1, 1, 1, 1, 1],
        "play": [5.0, 5.0, 20.0, 5.0, -1.0, 2.5],
    }


def write(path: Path, columns: Log) -> None:
    """Write columns as CSV or Parquet, by the name."""
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        pyarrow.csv.write_csv(table, path)


@pytest.fixture
def make(tmp_path: Path, log: Log) -> Callable[..., tuple[Path, Schema]]:
    """Write a log (and the users) into a folder; return the folder and its schema with changes."""

    def folder_of(rows: Log | None = None, users: Log | None = None, name: str = "log.csv", **changes: Any) -> Any:
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        write(folder / name, rows or log)
        write(folder / "users.csv", users or USERS)
        return folder, Schema.from_dict({**SCHEMA, **changes})

    return folder_of


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "log"
    simulate(SimulatorConfig(users=300, videos=120, impressions=9_000, days=6), folder)
    return folder


@pytest.fixture(scope="session")
def prepared(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(simulated, tmp_path_factory.mktemp("prepared") / "out", row_group_rows=500)


@pytest.fixture(scope="session")
def kuairand() -> Path:
    beside = Path(__file__).parents[4] / "shared" / "data" / "KuaiRand-Pure"
    folder = Path(os.environ.get("LT4REC_SPARSE_KUAIRAND", beside))
    if not folder.is_dir():
        pytest.skip(f"no KuaiRand at {folder}: set LT4REC_SPARSE_KUAIRAND")
    return folder
