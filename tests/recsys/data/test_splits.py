"""Which rows train, validate and test: without days, by a hash, a column or files; logs without a time or a group."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.ranker.features import Schema, SchemaError
from lt4rec_sparse.recsys.data import DataError, Prepared, complete_requests, open_source, prepare, take_snapshot
from lt4rec_sparse.recsys.data.batches import SPLITS
from lt4rec_sparse.recsys.data.days import partition
from lt4rec_sparse.recsys.data.rows import RowReader
from tests.recsys.data.conftest import write

Make = Callable[..., tuple[Path, Schema]]
HISTORY = {"name": "h", "when": "click", "columns": ["item"]}
PLAIN: dict[str, Any] = {
    "name": "plain",
    "files": {"log": ["log*"]},
    "columns": [{"name": "item", "type": "int"}, {"name": "user", "type": "int"}],
    "tasks": [{"name": "ctr", "kind": "binary", "label": "click"}],
}
ROWS = 400


def plain_log(folder: Path, name: str = "log.csv", rows: int = ROWS, **more: list[Any]) -> Path:
    """Write a log without time and group, in which `item` is the row's place."""
    folder.mkdir(exist_ok=True)
    columns = {
        "item": range(rows),
        "user": [row % 40 for row in range(rows)],
        "click": [row % 3 % 2 for row in range(rows)],
    }
    write(folder / name, {key: list(values) for key, values in (columns | more).items()})
    return folder


def items(folder: Path, scratch: Path, **changes: Any) -> dict[str, list[int]]:
    """Return the items of every split, in order."""
    source = open_source(folder, Schema.from_dict(PLAIN | changes))
    scratch.mkdir(exist_ok=True)
    found: dict[str, list[int]] = {split: [] for split in SPLITS}
    for rows in RowReader(source, partition(source, scratch, 64, lambda stage, done, total: None)).read():
        found[rows.split] += rows.features["item"].tolist()
    return found


def test_a_log_without_time_is_split_at_random_by_rows(tmp_path: Path) -> None:
    folder = plain_log(tmp_path / "log", rows=4000)
    found = items(folder, tmp_path / "scratch")
    assert sorted(chain(*found.values())) == list(range(4000))
    assert all(rows == sorted(rows) for rows in found.values())  # the order of the files
    # Within five standard deviations of the shares.
    assert all(abs(len(found[split]) - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5 for split in ("validation", "test"))
    other = items(folder, tmp_path / "scratch", split={"by": "random", "seed": 1})
    shares = items(folder, tmp_path / "scratch", split={"test_share": 0.3, "validation_share": 0.2})
    assert other != found and set(found["test"]) < set(shares["test"])
    assert abs(len(set(other["test"]) & set(found["test"])) - 40) < 5 * 40**0.5  # seeds are independent


def test_the_split_of_a_row_is_the_same_for_ever(tmp_path: Path) -> None:
    found = items(plain_log(tmp_path / "log", rows=30), tmp_path / "scratch")
    assert (found["validation"], found["test"]) == ([16, 27], [10, 19, 25, 29])
    split = {"by": "hash", "column": "user"}
    columns = [{"name": "item", "type": "int"}, {"name": "user"}]
    found = items(tmp_path / "log", tmp_path / "scratch", columns=columns, split=split)
    assert (found["validation"], found["test"]) == ([3, 8, 13, 14, 25], [1])


def test_the_split_does_not_depend_on_how_rows_are_cut_into_files(tmp_path: Path) -> None:
    whole = items(plain_log(tmp_path / "one"), tmp_path / "scratch")
    for part, first in enumerate((0, 150, 300)):
        rows = range(first, min(first + 150, ROWS))
        columns = {"item": list(rows), "user": [row % 40 for row in rows], "click": [row % 3 % 2 for row in rows]}
        plain_log(tmp_path / "many", f"log_{part}.parquet", **columns)
    assert items(tmp_path / "many", tmp_path / "scratch") == whole


@given(st.integers(0, 2**63 - 1), st.booleans())
def test_a_hash_puts_no_user_into_two_splits(tmp_path_factory: pytest.TempPathFactory, seed: int, text: bool) -> None:
    folder = plain_log(tmp_path_factory.mktemp("hash") / "log", name="log.parquet")
    columns = [{"name": "item", "type": "int"}, {"name": "user", "type": "string" if text else "int"}]
    split = {"by": "hash", "column": "user", "seed": seed, "test_share": 0.3, "validation_share": 0.3}
    found = items(folder, folder.parent / "scratch", columns=columns, split=split)
    users = [{item % 40 for item in rows} for rows in found.values()]
    assert set.union(*users) == set(range(40)) and sum(map(len, users)) == 40


def test_a_column_names_the_split(tmp_path: Path) -> None:
    names = [("train", "train", "validation", "test")[row % 4] for row in range(ROWS)]
    folder = plain_log(tmp_path / "log", fold=names)
    found = items(folder, tmp_path / "scratch", split={"by": "column", "column": "fold"})
    assert [{item % 4 for item in rows} for rows in found.values()] == [{0, 1}, {2}, {3}]
    plain_log(folder, fold=[row % 4 for row in range(ROWS)])  # numbers, of which lists name the texts
    lists = {"train": ["0", "1"], "validation": ["3"], "test": ["2"]}
    found = items(folder, tmp_path / "scratch", split={"by": "column", "column": "fold", **lists})
    assert [{item % 4 for item in rows} for rows in found.values()] == [{0, 1}, {3}, {2}]


def test_without_a_validation_split_some_training_rows_are_drawn(tmp_path: Path) -> None:
    folder = plain_log(tmp_path / "log", fold=["a" if row % 4 else "b" for row in range(ROWS)])
    split = {"by": "column", "column": "fold", "train": ["a"], "test": ["b"], "validation_share": 0.5}
    found = items(folder, tmp_path / "scratch", split=split)
    assert {item % 4 for item in found["test"]} == {0} and len(found["test"]) == ROWS // 4
    assert abs(len(found["validation"]) - 150) < 5 * 75**0.5
    assert {item % 4 for item in found["validation"] + found["train"]} == {1, 2, 3}


def test_files_are_splits(tmp_path: Path) -> None:
    for name in ("log_a.csv", "log_b.csv", "log_test.csv"):
        plain_log(tmp_path / "log", name, rows=100)
    split = {"by": "files", "train": ["log_a*"], "validation": ["log_b.csv"], "test": ["*_test.csv"]}
    assert [len(rows) for rows in items(tmp_path / "log", tmp_path / "scratch", split=split).values()] == [100] * 3
    with pytest.raises(DataError, match=r"log_b\.csv: got a file of the log in no split, wanted it in train, val"):
        items(tmp_path / "log", tmp_path / "scratch", split={"by": "files", "train": ["log_a*"], "test": ["*_test*"]})
    with pytest.raises(DataError, match=r"log_b\.csv: got it in two splits, wanted it in one"):
        items(tmp_path / "log", tmp_path / "scratch", split=split | {"train": ["log_[ab]*"]})
    with pytest.raises(DataError, match=r"split 'test': got no file 'ghost' of the log"):
        items(tmp_path / "log", tmp_path / "scratch", split=split | {"test": ["ghost"]})


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (["train"] * 3 + [""], r"log\.csv: column 'fold': got a missing value, wanted one in every row"),
        (["train"] * 3 + ["dev"], r"column 'fold': got split 'dev', wanted one of train, validation, test"),
    ],
)
def test_a_split_that_is_not_named_is_refused(tmp_path: Path, fold: list[str], message: str) -> None:
    folder = plain_log(tmp_path / "log", rows=4, fold=fold)
    with pytest.raises(DataError, match=message):
        items(folder, tmp_path / "scratch", split={"by": "column", "column": "fold"})
    with pytest.raises(DataError, match=r"column 'ghost' is absent, wanted it in the log .split."):
        items(folder, tmp_path / "scratch", split={"by": "hash", "column": "ghost"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": {"by": "day"}}, "split: got by='day' without .time., wanted 'random', 'hash', 'column' or 'files'"),
        ({"split": {"train": ["a"], "validation": ["b"], "test": ["c"]}}, "got lists without `by`"),
        (
            {"split": {"by": "random", "column": "user"}},
            "got by='random' and column='user', wanted a column",
        ),
        ({"split": {"by": "hash"}}, "got by='hash' and column=None"),
        ({"split": {"by": "files"}}, "got by='files' without lists"),
        ({"split": {"by": "files", "train": ["a"]}}, "got some of the lists train, test, wanted both"),
        ({"split": {"by": "random", "train": ["a"], "test": ["b"], "validation": ["c"]}}, "wanted none by 'random'"),
        ({"split": {"test_share": 0.5, "validation_share": 0.5}}, "wanted shares above 0 that sum to less than 1"),
        ({"split": {"seed": -1}}, "got seed=-1, wanted 0 to"),
        (
            {"histories": [HISTORY]},
            "'h': got a log without .time. and .group.",
        ),
        (
            {"histories": [HISTORY], "time": {"day": "day"}},
            "'h': got a log without .group., wanted both",
        ),
        ({"derived": [{"name": "age", "days_since": "born"}]}, "derived 'age': got a log without .time."),
    ],
)
def test_what_needs_days_or_groups_is_refused_without(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        Schema.from_dict(PLAIN | changes)


def test_stored_schemas_keep_their_meaning(tmp_path: Path) -> None:
    schema = Schema.from_dict(PLAIN)
    assert schema.duplicates == "keep" and Schema.from_stored(schema.to_stored()) == schema
    older = schema.to_stored()
    del older["duplicates"]  # a schema of before duplicates could be kept
    assert Schema.from_stored(older).duplicates == "drop"
    assert "duplicates" not in Schema.from_stored(older).to_stored()
    assert set(older["split"]) == {"test_days", "validation_days", "train", "validation", "test"}
    (tmp_path / "schema.toml").write_text(schema.to_toml())
    assert Schema.from_toml(tmp_path / "schema.toml") == schema


def test_rows_of_a_day_may_be_in_several_splits(make: Make, log: dict[str, Any], tmp_path: Path) -> None:
    """Histories are of earlier days as ever, whatever the splits of their rows."""
    fold = ["train", "test", "validation", "train", "test", "validation"]
    tasks = [{"name": "ctr", "kind": "binary", "label": "click"}]
    folder, schema = make(log | {"fold": fold}, split={"by": "column", "column": "fold"}, tasks=tasks)
    prepared = prepare(folder, tmp_path / "out", schema)
    by_day = prepare(make(log)[0], tmp_path / "by_day", make(log)[1])
    assert [prepared.counts[split]["days"] for split in SPLITS] == [["1", "2"], ["2", "3"], ["1", "3"]]
    assert prepared.counts["split_by"] == "by column fold" and "split_by" not in by_day.counts
    counts = {}
    for name, found in (("rows", prepared), ("days", by_day)):
        tables = [pq.read_table(path).to_pylist() for path in sorted(found.folder.glob("*/part-*.parquet"))]
        counts[name] = {(row["day"], row["group"]): len(row["feature.past_video"]) for rows in tables for row in rows}
    assert counts["rows"] == counts["days"] and sum(counts["rows"].values()) > 0


def test_duplicates_stay_unless_the_schema_drops_them(tmp_path: Path) -> None:
    folder = plain_log(tmp_path / "log", "log_1.parquet")
    plain_log(folder, "log_2.parquet")
    kept = items(folder, tmp_path / "scratch")
    assert sum(map(len, kept.values())) == 2 * ROWS
    dropped = items(folder, tmp_path / "scratch", duplicates="drop")
    assert sorted(chain(*dropped.values())) == list(range(ROWS))  # and so no row is in two splits
    told: list[tuple[str, int, int]] = []
    schema = Schema.from_dict(PLAIN | {"duplicates": "drop"})
    counts = prepare(folder, tmp_path / "out", schema, lambda *step: told.append(step)).counts
    assert counts["duplicates"] == ROWS and ("duplicates dropped", ROWS, 2 * ROWS) in told


def test_a_log_without_group_has_none_when_prepared(tmp_path: Path) -> None:
    prepared: Prepared = prepare(plain_log(tmp_path / "log"), tmp_path / "out", Schema.from_dict(PLAIN))
    batches = list(prepared.stream("train", 64).epoch(0))
    assert all(batch.groups is None for batch in batches)
    assert sum(batch.batch for batch in batches) == prepared.counts["train"]["rows"]
    assert prepared.counts["train"]["days"] == []
    both = type(batches[0]).cat(batches[:2])
    assert both.groups is None and both.take(torch.arange(3)).groups is None


def test_requests_of_a_log_without_time_and_group(tmp_path: Path) -> None:
    folder = plain_log(tmp_path / "log")
    write(folder / "users.csv", {"user": [0, 1], "town": ["Ulm", "Bonn"]})
    columns = [*PLAIN["columns"], {"name": "town"}]
    schema = Schema.from_dict(PLAIN | {"columns": columns, "joins": [{"files": ["users.csv"], "on": "user"}]})
    source = open_source(folder, schema)
    write(tmp_path / "requests.csv", {"user": [1, 5], "item": [7, 8]})
    made = complete_requests(source, tmp_path / "requests.csv", None, tmp_path / "scratch")
    assert made.table["town"].to_pylist() == ["Bonn", None]
    with pytest.raises(DataError, match=r"--at: got '1', wanted none: the log has no \[time\]"):
        complete_requests(source, tmp_path / "requests.csv", "1", tmp_path / "scratch")
    taken = take_snapshot(source, None, tmp_path / "scratch")
    assert (taken.day, [table.key for table in taken.tables]) == (None, ["user"])
    with pytest.raises(DataError, match=r"--at: got '1', wanted none"):
        take_snapshot(source, "1", tmp_path / "scratch")
