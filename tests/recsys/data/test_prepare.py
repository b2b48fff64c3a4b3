"""From files to a prepared folder: what every row becomes, what is refused, and that nothing of the future is seen."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import Schema, Split
from lt4rec_sparse.recsys.data import Batch, DataError, Prepared, prepare
from lt4rec_sparse.recsys.data.days import partition
from lt4rec_sparse.recsys.data.joined import SideTable
from lt4rec_sparse.recsys.data.prepare import load_encoder
from lt4rec_sparse.recsys.data.rows import RowReader, Rows
from lt4rec_sparse.recsys.data.source import open_source
from lt4rec_sparse.recsys.data.splits import split_days

Log = dict[str, list[Any]]
Make = Callable[..., tuple[Path, Schema]]


def rows_of(folder: Path, schema: Schema, scratch: Path, batch_rows: int = 100) -> list[Rows]:
    """Return every row of the log, before encoding."""
    source = open_source(folder, schema)
    scratch.mkdir()
    log = partition(source, scratch, batch_rows, lambda stage, done, total: None)
    return list(RowReader(source, log).read(frozenset(log.days)))


def test_days_that_only_enter_histories_are_joined_with_nothing_else(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[tuple[int, set[str]]] = []
    lookup = SideTable.lookup

    def noted(side: SideTable, keys: Any, *names: Any) -> dict[str, Any]:
        columns = lookup(side, keys, *names)
        looked_up.append((len(keys), {*columns}))
        return columns

    monkeypatch.setattr(SideTable, "lookup", noted)
    histories = [{"name": "past", "when": "click", "columns": ["video", "town"], "length": 2}]
    users = {"user": [1, 2], "town": ["Ulm", None], "age": [30, 40]}
    columns = [{"name": "video", "type": "int"}, {"name": "town"}, {"name": "age", "type": "int"}]
    folder, schema = make(users=users, histories=histories, columns=columns)
    source = open_source(folder, schema)
    log = partition(source, tmp_path, 100, lambda stage, done, total: None)
    (rows,) = RowReader(source, log).read(frozenset(["3"]))
    assert looked_up == [(2, {"town"}), (2, {"town"}), (2, {"town", "age"})]
    assert rows.features["past_town"][0].tolist() == ["Ulm", "Ulm"]
    assert rows.features["age"].tolist() == [30, 40]


def only_batch(prepared: Prepared, split: str) -> Batch:
    (batch,) = prepared.stream(split, 1 << 20, shuffle=False).epoch(0)
    return batch


def test_small_log_by_hand(make: Make, tmp_path: Path) -> None:
    first, second, third = rows_of(*make(), tmp_path / "scratch")
    assert [rows.day for rows in (first, second, third)] == ["1", "2", "3"]
    assert first.columns["group"].tolist() == [1, 2]
    assert second.features["town"].tolist() == ["Ulm", None]  # user 3 is in no side table
    assert second.features["tags"][0].tolist() == ["b", "a", "b"]
    assert second.features["tags"][1].tolist() == [0, 1, 3]
    # Day 1 has no past; day 2 knows day 1; day 3 the last two clicks of each.
    assert first.features["past_video"][1].tolist() == [0, 0, 0]
    assert second.features["past_video"][0].tolist() == [1]
    assert third.features["past_video"][0].tolist() == [1, 2, 2]
    assert third.features["past_video"][1].tolist() == [0, 2, 3]
    assert third.features["past_tags"][0].tolist() == ["a", "b", "b"]
    assert third.features["past_count"].tolist() == [2, 1]
    assert np.isnan(first.features["past_rate"]).all()
    # A length of 0, and a negative play time, leave the ratio only; a ratio over 1 is cut.
    assert first.columns["member.ctr"].tolist() == [True, True]
    assert first.columns["member.cvr"].tolist() == [True, False]
    assert second.columns["label.cvr"].tolist() == [1.0, 0.25]
    assert third.columns["member.cvr"].tolist() == [False, True]
    assert third.columns["slice.video_1"].tolist() == [False, True]


def test_vocabulary_is_of_the_training_days(make: Make, tmp_path: Path) -> None:
    folder, schema = make()
    prepared = prepare(folder, tmp_path / "out", schema)
    assert prepared.encoder.table_sizes["video"] == 2 + 2  # videos 1 and 2 of day 1
    test = only_batch(prepared, "test")
    assert test.features.single[:, 0].tolist() == [1, 2]  # video 3 is unseen
    assert prepared.counts["train"] == {
        "days": ["1"],
        "rows": 2,
        "tasks": {"ctr": {"rows": 2, "label_mean": 1.0}, "cvr": {"rows": 1, "label_mean": 0.5}},
    }


@pytest.mark.parametrize("batch_rows", [1, 2, 100])
def test_chunks_do_not_matter(make: Make, tmp_path: Path, batch_rows: int) -> None:
    folder, schema = make()
    whole = prepare(folder, tmp_path / "whole", schema)
    parts = prepare(folder, tmp_path / "parts", schema, row_group_rows=batch_rows)
    for split in ("train", "validation", "test"):
        a, b = only_batch(whole, split), only_batch(parts, split)
        assert torch.equal(a.features.single, b.features.single)
        assert torch.equal(a.features.multi_values, b.features.multi_values)
        assert torch.equal(a.features.multi_offsets, b.features.multi_offsets)
        assert torch.equal(a.labels["cvr"], b.labels["cvr"])


def test_csv_and_parquet_prepare_alike(make: Make, tmp_path: Path) -> None:
    folder, schema = make()
    from_csv = only_batch(prepare(folder, tmp_path / "csv", schema), "test")
    (folder / "log.csv").unlink()
    make(name="log.parquet")
    from_parquet = only_batch(prepare(folder, tmp_path / "parquet", schema), "test")
    assert torch.equal(from_csv.features.single, from_parquet.features.single)
    assert torch.equal(from_csv.features.multi_values, from_parquet.features.multi_values)


def test_exact_duplicates_of_a_day_are_dropped(make: Make, log: Log, tmp_path: Path) -> None:
    twice = {name: values + values[:2] for name, values in log.items()}
    twice["note"] = [0] * 6 + [0, 1]  # the last one differs in a column that nobody reads
    folder, schema = make(twice, duplicates="drop")
    counts = prepare(folder, tmp_path / "out", schema).counts
    assert (counts["rows_read"], counts["duplicates"], counts["train"]["rows"]) == (8, 1, 3)


def test_duplicates_across_files_and_in_lists_are_dropped(make: Make, log: Log, tmp_path: Path) -> None:
    log |= {"tags": [["a", "b"], [], ["b"], ["a", "b"], ["a"], ["c"]]}
    make(log, name="log_1.parquet")
    folder, schema = make(log, name="log_2.parquet", duplicates="drop")
    assert prepare(folder, tmp_path / "out", schema).counts["duplicates"] == 6


def test_days_are_sorted_as_numbers_and_rows_by_moment(make: Make, log: Log, tmp_path: Path) -> None:
    backwards = {name: values[::-1] for name, values in log.items()}
    backwards["day"] = [day + 8 for day in backwards["day"]]  # 9, 10, 11
    rows = rows_of(*make(backwards), tmp_path / "scratch")
    assert [part.day for part in rows] == ["9", "10", "11"]
    assert rows[0].columns["group"].tolist() == [1, 2]


def test_day_of_a_timestamp_in_its_zone(make: Make, log: Log, tmp_path: Path) -> None:
    hour = 3_600_000
    log["moment"] = [0, 15 * hour, 16 * hour, 39 * hour, 40 * hour, 41 * hour]  # UTC+8 turns the day at 16:00
    time = {"timestamp": "moment", "unit": "ms", "utc_offset_hours": 8}
    rows = rows_of(*make(log, time=time), tmp_path / "scratch")
    assert [part.day for part in rows] == ["1970-01-01", "1970-01-02", "1970-01-03"]
    assert all(len(part.columns["group"]) == 2 for part in rows)


def test_derived_days_since_a_date(make: Make, log: Log, tmp_path: Path) -> None:
    log |= {"day": [20240229] * 2 + [20240301] * 2 + [20240302] * 2}
    log["made"] = ["2024-02-28", None, "20240228", "2024-03-02", "2023-03-02", "2024-03-02 10:00:00"]
    columns = [{"name": "age", "kind": "dense"}]
    derived = [{"name": "age", "days_since": "made"}]
    rows = rows_of(*make(log, columns=columns, derived=derived, histories=[]), tmp_path / "scratch")
    ages = np.concatenate([part.features["age"] for part in rows])
    assert np.array_equal(ages, [1, np.nan, 2, -1, 366, 0], equal_nan=True)


def test_string_groups_have_histories_too(make: Make, log: Log, tmp_path: Path) -> None:
    log |= {"user": ["a", "b", "a", "c", "a", "b"]}
    changes = {
        "group": {"column": "user", "type": "string"},
        "joins": [{"files": ["users.csv"], "on": "user", "type": "string"}],
    }
    folder, schema = make(log, users={"user": ["a", "b"], "town": ["Ulm", "Bonn"]}, **changes)
    third = rows_of(folder, schema, tmp_path / "scratch")[-1]
    assert third.features["past_video"][0].tolist() == [1, 2, 2]
    assert third.features["town"].tolist() == ["Ulm", "Bonn"]


def test_explicit_days(make: Make, tmp_path: Path) -> None:
    folder, schema = make(split={"train": ["2"], "validation": ["1"], "test": ["3"]})
    assert prepare(folder, tmp_path / "out", schema).counts["validation"]["days"] == ["1"]
    with pytest.raises(DataError, match="split 'test': got day '4', wanted one of 1, 2"):
        split_days(("1", "2"), Split(train=("1",), validation=("2",), test=("4",)))


# Nothing of the future is seen

VARIED = ("user", "video", "tags", "length", "click", "play")
NUMBERS = st.lists(st.integers(0, 3), min_size=12, max_size=12)


def log_of(numbers: dict[str, list[int]]) -> Log:
    return {
        "user": [number % 2 for number in numbers["user"]],
        "video": numbers["video"],
        "day": [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4],
        "moment": list(range(12)),
        "tags": ["a" * number for number in numbers["tags"]],
        "length": [float(number) for number in numbers["length"]],
        "click": [number % 2 for number in numbers["click"]],
        "play": [float(number) for number in numbers["play"]],
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=st.fixed_dictionaries(dict.fromkeys(VARIED, NUMBERS)), row=st.integers(0, 11))
def test_no_value_of_a_day_changes_a_feature_of_that_day_or_before(
    make: Make, numbers: dict[str, list[int]], row: int
) -> None:
    before, after = log_of(numbers), log_of(numbers)
    after["click"][row], after["play"][row] = 1 - after["click"][row], after["play"][row] + 1
    seen = []
    for variant in (before, after):
        with tempfile.TemporaryDirectory() as folder:
            seen.append(rows_of(*make(variant), Path(folder) / "scratch"))
    for rows, changed in zip(*seen, strict=True):
        if int(rows.day) <= before["day"][row]:
            assert flat(rows) == flat(changed)


def flat(rows: Rows) -> dict[str, list[Any]]:
    """Return the features as lists of text, in which NaN equals NaN."""
    features = rows.features.items()
    parts = {name: column if isinstance(column, tuple) else (column,) for name, column in features}
    return {name: [list(map(repr, part)) for part in column] for name, column in parts.items()}


# What is refused


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("click", [0, 1, 2, 0, 0, 0], r"log\.csv: column 'click': got 2.0, wanted 0 or 1 for task 'ctr'"),
        ("click", ["0", "1", "no", "0", "0", "0"], r"log\.csv: column 'click': .*'no'.*, wanted double"),
        ("user", [1, None, 1, 1, 1, 1], r"log\.csv: column 'user': got a missing value"),
        ("day", [1, None, 2, 2, 3, 3], r"log\.csv: column 'day': got a missing day"),
        ("day", [1, 1, 1, 2, 2, 2], "got 2 days .1, 2., wanted more than 2"),
        ("video", ["1", "x", "1", "1", "1", "1"], r"log\.csv: column 'video': .*'x'.*, wanted int64"),
        ("click", [1, 1, 1, 1, 0, 0], "split 'test': got 2 rows and none of task 'cvr'"),
    ],
)
def test_wrong_value_is_named(
    make: Make, log: Log, tmp_path: Path, column: str, values: list[Any], message: str
) -> None:
    folder, schema = make(log | {column: values})
    with pytest.raises(DataError, match=message) as caught:
        prepare(folder, tmp_path / "out", schema)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_missing_label_leaves_the_task_only(make: Make, log: Log, tmp_path: Path) -> None:
    folder, schema = make(log | {"play": [5.0, 5.0, None, 5.0, 1.0, 1.0]})
    second = rows_of(folder, schema, tmp_path / "scratch")[1]
    assert second.columns["member.cvr"].tolist() == [False, True]
    assert second.columns["member.ctr"].tolist() == [True, True]


def test_plain_ratio_and_weights(make: Make, log: Log, tmp_path: Path) -> None:
    tasks = [{"name": "like", "kind": "ratio", "label": "liked", "weight": "importance"}]
    log |= {"liked": [0.0, 0.5, 1.0, 0.5, 0.5, 0.5], "importance": [2.0, None, 0.0, 1.0, 1.0, 1.0]}
    first = rows_of(*make(log, tasks=tasks), tmp_path / "scratch")[0]
    assert first.columns["weight.like"].tolist() == [2.0, 0.0]
    assert first.columns["member.like"].tolist() == [True, False]
    log["liked"][3] = 1.5
    folder, schema = make(log, tasks=tasks)
    with pytest.raises(DataError, match=r"column 'liked': got 1.5, wanted a ratio in \[0, 1\] for task 'like'"):
        prepare(folder, tmp_path / "out", schema)
    log["liked"][3], log["importance"][3] = 0.5, -1.0
    folder, schema = make(log, tasks=tasks)
    with pytest.raises(
        DataError, match=r"column 'importance': got -1\.0, wanted a finite weight of at least 0 for task"
    ):
        prepare(folder, tmp_path / "out", schema)


INF = float("inf")


@pytest.mark.parametrize("play", [INF, -INF, float("nan"), None])
@pytest.mark.parametrize("length", [INF, -INF, float("nan"), None, 10.0])
def test_an_infinite_play_time_or_duration_counts_as_missing(
    make: Make, log: Log, tmp_path: Path, play: float | None, length: float | None
) -> None:
    changed = {"play": [play, *log["play"][1:]], "length": [length, *log["length"][1:]]}
    folder, schema = make(log | changed | {"length": [length, 10.0, 10.0, 20.0, 10.0, 10.0]}, carried=["play"])
    first = rows_of(folder, schema, tmp_path / "scratch")[0]
    assert first.columns["member.cvr"].tolist() == [False, True]
    assert first.columns["label.cvr"].tolist() == [0, 0.5]
    assert np.isnan(first.columns["value.play"][0])
    prepare(folder, tmp_path / "out", schema)
    json.loads((tmp_path / "out" / "prepared.json").read_text(), parse_constant=pytest.fail)


def test_a_finite_ratio_beyond_every_float_is_cut_to_1(make: Make, log: Log, tmp_path: Path) -> None:
    changed = {"play": [1e308, *log["play"][1:]], "length": [1e-308, *log["length"][1:]]}
    first = rows_of(*make(log | changed), tmp_path / "scratch")[0]
    assert first.columns["label.cvr"].tolist() == [1, 0]


def test_an_infinite_row_filter_counts_as_missing(make: Make, log: Log, tmp_path: Path) -> None:
    tasks = [{"name": "like", "kind": "binary", "label": "click", "rows": ["shown"]}]
    first = rows_of(*make(log | {"shown": [INF, 1.0] * 3}, tasks=tasks), tmp_path / "scratch")[0]
    assert first.columns["member.like"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("click", INF, "column 'click': got inf, wanted 0 or 1 for task 'ctr'"),
        ("liked", INF, r"column 'liked': got inf, wanted a ratio in \[0, 1\] for task 'like'"),
        ("importance", INF, "column 'importance': got inf, wanted a finite weight of at least 0 for task 'like'"),
        ("importance", 1e300, r"column 'importance': got 1e\+300, wanted a finite weight"),
    ],
)
def test_infinite_labels_and_weights_are_refused(
    make: Make, log: Log, tmp_path: Path, column: str, value: float, message: str
) -> None:
    like = {"name": "like", "kind": "ratio", "label": "liked", "weight": "importance"}
    log |= {"liked": [0.5] * 6, "importance": [1.0] * 6, "click": [1.0] * 6}
    log[column][2] = value
    folder, schema = make(log, tasks=[{"name": "ctr", "kind": "binary", "label": "click"}, like])
    with pytest.raises(DataError, match=message):
        prepare(folder, tmp_path / "out", schema)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"columns": [{"name": "ghost"}], "histories": []},
            r"column 'ghost' is absent, wanted it in one of log\.csv, users",
        ),
        ({"group": {"column": "ghost"}}, r"log\.csv: column 'ghost' is absent, wanted it in the log .group."),
        ({"joins": [{"files": ["users.csv"], "on": "video"}]}, r"users\.csv: column 'video' is absent, wanted the key"),
    ],
)
def test_absent_column_is_named(make: Make, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder, schema = make(**changes)
    with pytest.raises(DataError, match=message):
        prepare(folder, tmp_path / "out", schema)


def test_key_twice_in_a_side_table(make: Make, tmp_path: Path) -> None:
    folder, schema = make(users={"user": [1, 2, 1], "town": ["a", "b", "c"]})
    with pytest.raises(DataError, match=r"users\.csv: column 'user': got key 1 twice, wanted each once"):
        prepare(folder, tmp_path / "out", schema)


def test_files_of_the_log_must_agree(make: Make, log: Log, tmp_path: Path) -> None:
    make(name="log_a.csv")
    folder, schema = make({**log, "extra": [0] * 6}, name="log_b.csv")
    with pytest.raises(DataError, match=r"log_b\.csv: column 'extra' is in one of this and log_a\.csv"):
        prepare(folder, tmp_path / "out", schema)


def test_empty_log(make: Make, log: Log, tmp_path: Path) -> None:
    folder, schema = make()
    (folder / "log.csv").write_text(",".join(log) + "\n")
    with pytest.raises(DataError, match=r"log\.csv: got no row"):
        prepare(folder, tmp_path / "out", schema)


# The folder


def test_prepared_once_is_kept_until_something_changes(make: Make, log: Log, tmp_path: Path) -> None:
    folder, schema = make()
    stages: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        assert 1 <= done <= total
        stages.append(stage)

    prepare(folder, tmp_path / "out", schema, progress)
    assert list(dict.fromkeys(stages)) == ["read log", "order days", "fit", "encode"]
    stages.clear()
    prepare(folder, tmp_path / "out", schema, progress)
    assert stages == []
    make(log | {"video": [4] * 6})
    prepare(folder, tmp_path / "out", schema, progress)
    assert stages


def test_files_are_the_same_if_their_bytes_are(make: Make, tmp_path: Path) -> None:
    folder, schema = make()
    out = tmp_path / "out"
    prepare(folder, out, schema)
    part = out / "train" / "part-00000.parquet"
    written, moment = part.stat().st_mtime_ns, (folder / "log.csv").stat().st_mtime_ns + 10**9
    os.utime(folder / "log.csv", ns=(moment, moment))
    prepare(folder, out, schema, replace=False)
    assert part.stat().st_mtime_ns == written
    files = json.loads((out / "prepared.json").read_text())["files"]
    assert files["log.csv"]["changed_ns"] == moment
    # One byte differs, and the size is the same.
    (folder / "log.csv").write_bytes((folder / "log.csv").read_bytes().replace(b"2.5", b"3.5"))
    with pytest.raises(DataError, match=r"out: got data of other files, contents, schema or version than .*, wanted"):
        prepare(folder, out, schema, replace=False)
    prepare(folder, out, schema)
    assert part.stat().st_mtime_ns != written


def test_more_or_fewer_files_are_others(make: Make, tmp_path: Path) -> None:
    folder, schema = make()
    out = tmp_path / "out"
    prepare(folder, out, schema)
    shutil.copy(folder / "log.csv", folder / "log_2.csv")
    with pytest.raises(DataError, match="got data of other files"):
        prepare(folder, out, schema, replace=False)
    (folder / "log_2.csv").unlink()
    assert prepare(folder, out, schema, replace=False).counts["rows_read"] == 6


def test_files_as_they_were_are_not_read_again(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, schema = make()
    prepare(folder, tmp_path / "out", schema)
    monkeypatch.setattr("lt4rec_sparse.recsys.data.source.file_digest", None)
    prepare(folder, tmp_path / "out", schema, replace=False)


def test_carried_columns_come_as_they_are(make: Make, log: Log, tmp_path: Path) -> None:
    # An outcome, a feature, a derived column, one of a side table, and one that is nothing else.
    carried = ["play", "length", "age", "rank", "moment"]
    log["play"][2], log["made"] = None, ["2024-02-28"] * 6
    log["day"] = [20240229] * 2 + [20240301] * 2 + [20240302] * 2
    users = {"user": [1, 2], "town": ["Ulm", None], "rank": [0.1, 2**53 - 1.0]}
    folder, schema = make(log, users, carried=carried, derived=[{"name": "age", "days_since": "made"}])
    prepared = prepare(folder, tmp_path / "out", schema)
    assert not {"play", "age", "rank", "moment"} & {field.column for field in prepared.encoder.fields}
    values = [only_batch(prepared, split).values for split in ("train", "validation", "test")]
    assert all(list(part) == carried and part["play"].dtype == torch.float64 for part in values)
    whole = {name: torch.cat([part[name] for part in values]).tolist() for name in carried}
    assert np.array_equal(whole["play"], [5, 5, np.nan, 5, -1, 2.5], equal_nan=True)
    assert (whole["length"], whole["moment"], whole["age"]) == (log["length"], log["moment"], [1, 1, 2, 2, 3, 3])
    assert np.array_equal(whole["rank"], [0.1, 2**53 - 1, 0.1, np.nan, 0.1, 2**53 - 1], equal_nan=True)


def test_a_schema_carries_numbers_that_are_there(make: Make, tmp_path: Path) -> None:
    folder, schema = make(carried=["ghost"])
    with pytest.raises(DataError, match="column 'ghost' is absent"):
        prepare(folder, tmp_path / "out", schema)
    folder, schema = make(carried=["town"])
    with pytest.raises(DataError, match="column 'town' is used as string and as double"):
        prepare(folder, tmp_path / "out", schema)


def test_extra_tasks_are_prepared(make: Make, log: Log, tmp_path: Path) -> None:
    tasks = [*make()[1].to_dict()["tasks"], {"name": "like", "kind": "binary", "label": "liked", "extra": True}]
    folder, schema = make(log | {"liked": [0, 1, 0, 1, 0, 1]}, tasks=tasks)
    prepared = prepare(folder, tmp_path / "out", schema)
    assert [task.name for task in prepared.schema.tasks if task.extra] == ["like"]
    assert prepared.counts["test"]["tasks"]["like"] == {"rows": 2, "label_mean": 0.5}
    assert only_batch(prepared, "test").labels["like"].tolist() == [0.0, 1.0]


def test_foreign_folder_is_not_replaced(make: Make, tmp_path: Path) -> None:
    folder, schema = make()
    with pytest.raises(DataError, match=r"source: got files without prepared\.json"):
        prepare(folder, folder, schema)
    (tmp_path / "out").mkdir()
    assert prepare(folder, tmp_path / "out", schema).schema == schema


def test_prepared_folder_of_another_version(make: Make, tmp_path: Path) -> None:
    folder, schema = make()
    out = prepare(folder, tmp_path / "out", schema).folder
    content = json.loads((out / "prepared.json").read_text())
    (out / "prepared.json").write_text(json.dumps(content | {"version": 0}))
    with pytest.raises(DataError, match=r"got prepared\.json of version 0, wanted 2"):
        Prepared.load(out)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prepared.json", "{", r"prepared\.json: got no JSON"),
        ("prepared.json", "[" * 100_000, r"prepared\.json: got JSON nested too deeply"),
        ("prepared.json", '{"version": 2}', r"prepared\.json: fingerprint: got None, wanted a str"),
        ("encoder.safetensors", "garbage", r"encoder\.safetensors: got a damaged file"),
        ("encoder.safetensors", None, r"encoder\.safetensors: got a damaged file .*No such file"),
    ],
)
def test_a_damaged_file_is_named(make: Make, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    folder, schema = make()
    path = prepare(folder, tmp_path / "out", schema).folder / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        prepare(folder, tmp_path / "out", schema)
    assert "\n" not in str(caught.value)


def test_damaged_states_of_files_are_unknown(make: Make, tmp_path: Path) -> None:
    folder, schema = make()
    path = prepare(folder, tmp_path / "out", schema).folder / "prepared.json"
    whole = json.loads(path.read_text())
    for damaged in ({"size_bytes": "few"}, "few"):
        path.write_text(json.dumps(whole | {"files": whole["files"] | {"log.csv": damaged}}))
        prepare(folder, tmp_path / "out", schema)
        assert json.loads(path.read_text()) == whole


def test_others_may_read_what_is_prepared(make: Make, tmp_path: Path) -> None:
    folder, schema = make()
    out = prepare(folder, tmp_path / "out", schema).folder
    (tmp_path / "beside").touch()
    modes = {path.stat().st_mode for path in out.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "beside").stat().st_mode}


def test_what_a_dead_process_prepared_is_removed(make: Make, tmp_path: Path) -> None:
    folder, schema = make()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = tmp_path / f".out.{socket.gethostname()}.{int(dead.stdout)}.tmp"
    (left / "scratch").mkdir(parents=True)
    prepare(folder, tmp_path / "out", schema)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_encoder_is_stored(make: Make, tmp_path: Path) -> None:
    folder, schema = make()
    prepared = prepare(folder, tmp_path / "out", schema)
    stored = load_encoder(prepared.folder)
    assert stored.schema == schema
    assert stored.table_sizes == prepared.encoder.table_sizes


def test_an_encoder_whose_tables_are_empty_is_stored(make: Make, log: Log, tmp_path: Path) -> None:
    """Constant, missing and rare values of the only training day leave nothing to fit."""
    columns = [
        {"name": "video", "type": "int", "min_count": 9},
        {"name": "tags", "kind": "multi", "min_count": 9},
        {"name": "town", "min_count": 9},
        {"name": "length", "kind": "dense"},
    ]
    folder, schema = make(log | {"length": [10.0] * 6}, columns=columns)
    prepared = prepare(folder, tmp_path / "out", schema)
    assert set(prepared.encoder.table_sizes.values()) == {2}
    assert load_encoder(prepared.folder).table_sizes == prepared.encoder.table_sizes


def test_columns_of_a_part(make: Make, tmp_path: Path) -> None:
    folder, schema = make()
    part = pq.read_schema(prepare(folder, tmp_path / "out", schema).folder / "train" / "part-00000.parquet")
    assert part.names[:3] == ["feature.video", "feature.town", "feature.length"]
    assert part.field("feature.video").type == pa.int32()
    assert part.field("feature.past_tags").type.value_type == pa.int32()
    assert part.field("member.cvr").type == pa.bool_()
    assert part.field("group").type == pa.int64()
