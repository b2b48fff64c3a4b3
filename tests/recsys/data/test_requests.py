"""Requests become what training saw: the same values for a log's own rows, and defined ones for all else."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import EncodedFeatures, Schema
from lt4rec_sparse.recsys.data import (
    Candidates,
    DataError,
    Prepared,
    complete_requests,
    open_source,
    prepare,
    read_candidates,
)
from lt4rec_sparse.recsys.data.days import partition
from lt4rec_sparse.recsys.data.rows import RowReader
from lt4rec_sparse.recsys.data.written import csv_table, written_table

from .conftest import SCHEMA, USERS, write

Make = Callable[..., tuple[Path, Schema]]
REQUESTS: dict[str, list[Any]] = {"user": [1, 2], "video": [1, 2], "day": [3, 3], "tags": ["a", "b"], "length": [1, 2]}


def completed(folder: Path, schema: Schema | None, requests: Path, at: str | None = None) -> Candidates:
    with tempfile.TemporaryDirectory() as scratch:
        return complete_requests(open_source(folder, schema), requests, at, Path(scratch))


def made_of(made: tuple[Path, Schema], requests: dict[str, Any], at: str | None = None) -> Candidates:
    path = made[0].parent / "requests.csv"
    write(path, requests)
    return completed(*made, path, at)


def encoded_through(kind: str, prepared: Prepared, table: Any, folder: Path) -> EncodedFeatures:
    path = folder / f"candidates.{kind}"
    with written_table(path) as append:
        append(csv_table(prepared.schema, table) if kind == "csv" else table)
    return prepared.encoder.encode(read_candidates(path, prepared.schema)[0])


def assert_equal(one: EncodedFeatures, other: EncodedFeatures) -> None:
    every = torch.arange(one.batch)
    for part in ("single", "multi_values", "multi_offsets"):
        assert torch.equal(getattr(one, part), getattr(other.take(every), part))


def assert_test_days_are_as_prepared(prepared: Prepared, folder: Path, log: Any, kind: str, tmp_path: Path) -> None:
    """Feed the rows of the test days as requests, in another order."""
    (batch,) = prepared.stream("test", 1 << 20, shuffle=False).epoch(0)
    assert len(log) == batch.batch
    order = np.random.default_rng(0).permutation(len(log))
    pq.write_table(log.take(order), tmp_path / "requests.parquet")
    made = completed(folder, prepared.schema, tmp_path / "requests.parquet")
    assert made.absent == ()
    assert made.table["time_ms"].to_pylist() == log["time_ms"].take(order).to_pylist()
    encoded = encoded_through(kind, prepared, made.table, tmp_path)
    assert_equal(encoded.take(torch.from_numpy(np.argsort(order))), batch.features.take(torch.arange(batch.batch)))


def distinct_rows(folder: Path, prepared: Prepared, columns: list[str], scratch: Path) -> Any:
    """Return columns of the rows of the test days, in the order of training."""
    scratch.mkdir()
    log = partition(open_source(folder), scratch, 1 << 20, lambda stage, done, total: None)
    days = prepared.counts["test"]["days"]
    return pa.Table.from_batches([batch for day in days for batch in log.read(day)]).select(columns)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_rows_of_the_test_days_become_what_was_prepared(
    simulated: Path, prepared: Prepared, tmp_path: Path, kind: str
) -> None:
    known = ["user_id", "video_id", "date", "time_ms", "hour", "tab", "duration_ms"]
    log = distinct_rows(simulated, prepared, known, tmp_path / "days")
    assert_test_days_are_as_prepared(prepared, simulated, log, kind, tmp_path)


def test_kuairands_test_days_become_what_was_prepared(kuairand: Path, tmp_path: Path) -> None:
    prepared = prepare(kuairand, tmp_path / "out")
    known = ["user_id", "video_id", "date", "time_ms", "tab", "hourmin", "duration_ms"]
    log = distinct_rows(kuairand, prepared, known, tmp_path / "days")
    assert_test_days_are_as_prepared(prepared, kuairand, log, "csv", tmp_path)


ROW = st.fixed_dictionaries(
    {
        "user": st.integers(1, 4),
        "video": st.none() | st.integers(1, 5),
        "day": st.integers(8, 12),  # as text, 9 would come last
        "tags": st.sampled_from(["a", "a,b", "", "c"]),
        "length": st.none() | st.sampled_from([1.0, 2.5]),
        "click": st.integers(0, 1),
        "play": st.sampled_from([1.0, 2.0]),
    }
)


@given(st.lists(ROW, min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_any_rows_of_a_log_become_what_training_reads(rows: list[dict[str, Any]], shuffled: random.Random) -> None:
    rows = [row | {"moment": moment} for moment, row in enumerate(sorted(rows, key=lambda row: row["day"]))]
    order = list(range(len(rows)))
    shuffled.shuffle(order)
    with tempfile.TemporaryDirectory() as name:
        folder, schema = Path(name), Schema.from_dict(SCHEMA)
        pq.write_table(pa.Table.from_pylist(rows), folder / "log.parquet")
        write(folder / "users.csv", USERS)
        known = ("user", "video", "day", "tags", "length", "moment")
        asked = pa.Table.from_pylist([{column: rows[row][column] for column in known} for row in order], LAYOUT)
        pq.write_table(asked, folder / "requests.parquet")
        made = completed(folder, schema, folder / "requests.parquet").table
        path = folder / "candidates.parquet"
        pq.write_table(made, path)
        features, _ = read_candidates(path, schema)
        (folder / "days").mkdir()
        source = open_source(folder, schema)
        log = partition(source, folder / "days", 3, lambda stage, done, total: None)
        parts = list(RowReader(source, log).read(frozenset(log.days)))
    for column in schema.features:
        wanted = [value for part in parts for value in values_of(part.features[column.name])]
        assert values_of(features[column.name]) == [wanted[row] for row in order], column.name


TYPES = {"user": pa.int64(), "video": pa.int64(), "day": pa.int64(), "tags": pa.string(), "length": pa.float64()}
LAYOUT = pa.schema({**TYPES, "moment": pa.int64()})


def values_of(raw: Any) -> list[Any]:
    """Return a raw column row by row, None where missing."""
    if isinstance(raw, tuple):
        values, offsets = raw
        return [values[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    return [None if value != value else value for value in np.ma.asarray(raw).tolist()]


def test_a_moment_before_within_and_after_the_log(make: Make) -> None:
    log = {"user": [1, 1], "video": [1, 2], "day": [10, 12], "moment": [1, 2], "tags": ["a", "b"]}
    log |= {"length": [1.0, 1.0], "click": [1, 0], "play": [1.0, 1.0]}
    table = made_of(make(log), REQUESTS | {"user": [1] * 5, "video": [1] * 5, "day": [2, 99, 10, 11, 12]} | FIVE).table
    assert table["past_count"].to_pylist() == [0, 1, 0, 1, 1]
    assert table["past_rate"].to_pylist() == [None, 0.5, None, 1.0, 1.0]
    assert table["past_video"].to_pylist() == [[], [1], [], [1], [1]]


FIVE: dict[str, list[Any]] = {"tags": ["a"] * 5, "length": [1] * 5}


def test_unknown_users_and_keys_have_missing_values_and_equal_rows_stay(make: Make) -> None:
    table = made_of(make(), REQUESTS | {"user": [77, 77], "video": [1, 1], "tags": ["a", "a"], "length": [1, 1]}).table
    assert table.num_rows == 2 and table.slice(0, 1).equals(table.slice(1, 1))
    assert table["town"].to_pylist() == [None, None]
    assert table["past_count"].to_pylist() == [0, 0] and table["past_rate"].to_pylist() == [None, None]


def test_one_day_for_all_and_ids_carried_in_front(make: Make) -> None:
    requests = {"request": ["x", "y"], **{name: values for name, values in REQUESTS.items() if name != "day"}}
    table = made_of(make(), requests, at="3").table
    assert table.column_names[:5] == ["request", "user", "video", "tags", "length"]
    assert table["request"].to_pylist() == ["x", "y"]
    assert table.drop_columns("request").equals(made_of(make(), REQUESTS).table.drop_columns("day"))


def test_what_is_not_known_is_missing_and_named(make: Make) -> None:
    made = made_of(make(), {"user": [1], "video": [1], "day": [3]})
    assert made.absent == ("tags", "length")
    assert made.table["length"].to_pylist() == [None] and not any(made.table["tags"].to_pylist())


def test_a_column_of_the_requests_takes_precedence_over_a_side_table(make: Make) -> None:
    table = made_of(make(), REQUESTS | {"town": ["Bonn", None]}).table
    assert table["town"].to_pylist() == ["Bonn", None]


def test_a_column_of_the_log_is_never_taken_from_a_side_table(make: Make) -> None:
    """Training takes the log's, which says something else: a request that lacks it has none."""
    users = USERS | {"length": [77.0, 88.0], "video": [1, 2]}
    lacking = {name: values for name, values in REQUESTS.items() if name != "length"}
    made = made_of(make(users=users), lacking)
    assert made.absent == ("length",)
    assert made.table["length"].to_pylist() == [None, None]
    assert made.table["town"].to_pylist() == ["Ulm", None]
    assert made_of(make(users=users), REQUESTS).table["length"].to_pylist() == [1.0, 2.0]


def test_the_date_of_a_derived_column_is_that_of_the_log(make: Make, log: dict[str, list[Any]]) -> None:
    dated = log | {"day": ["2024-01-02"] * 3 + ["2024-01-05"] * 3, "since": ["2024-01-01"] * 6}
    age = {"derived": [{"name": "age", "days_since": "since"}]}
    columns = [*SCHEMA["columns"], {"name": "age", "kind": "dense"}]
    made = make(dated, USERS | {"since": ["2020-01-01"] * 2}, columns=columns, **age)
    asked = {name: values for name, values in REQUESTS.items() if name != "day"}
    lacking, having = (made_of(made, asked | own, at="2024-01-06") for own in ({}, {"since": ["2024-01-04"] * 2}))
    assert lacking.absent == ("since",) and having.absent == ()
    assert lacking.table["age"].to_pylist() == [None, None] and having.table["age"].to_pylist() == [2.0, 2.0]


def test_a_history_of_a_column_that_is_nowhere_is_refused(make: Make, log: dict[str, list[Any]]) -> None:
    made = make({name: values for name, values in log.items() if name != "tags"})
    with pytest.raises(DataError, match=r"column 'tags' is absent, wanted it in one of log\.csv, users\.csv"):
        made_of(made, REQUESTS)


def test_a_model_without_histories_compares_days_too(make: Make, log: dict[str, list[Any]], tmp_path: Path) -> None:
    made = make(log | {"day": ["d1"] * 3 + ["d2"] * 3}, histories=[])
    write(made[0] / "log_2.csv", log | {"day": ["d10"] * 6})  # in a form that the first file has not
    asked = {name: values for name, values in REQUESTS.items() if name != "day"}
    for day in ("d3", "d11"):
        assert made_of(made, asked, at=day).table["town"].to_pylist() == ["Ulm", None]
    with pytest.raises(DataError, match="--at: got day 'foo', wanted one in the form of the log's days, such as d10"):
        made_of(made, asked, at="foo")
    with pytest.raises(DataError, match="column 'day': got day '3', wanted one in the form of the log's days"):
        made_of(made, asked | {"day": ["d1", "3"]})


def test_no_requests_make_no_candidates(make: Make, tmp_path: Path) -> None:
    folder, schema = make()
    pq.write_table(pa.Table.from_pylist([], LAYOUT), tmp_path / "none.parquet")
    for at, path in ((None, tmp_path / "none.parquet"), ("3", tmp_path / "none.csv")):
        (tmp_path / "none.csv").write_text("user,video\n")
        table = completed(folder, schema, path, at).table
        assert table.num_rows == 0 and {column.name for column in schema.features} <= set(table.column_names)


def test_days_of_timestamps_are_local(make: Make, log: dict[str, list[Any]]) -> None:
    hour = 3_600_000
    log["moment"] = [day * 24 * hour + 23 * hour for day in log["day"]]  # 23 h UTC is the next day there
    made = make(log, time={"timestamp": "moment", "utc_offset_hours": 2})
    asked = {name: values for name, values in REQUESTS.items() if name != "day"}
    before = made_of(made, asked | {"moment": [2 * 24 * hour + 21 * hour] * 2}).table
    after = made_of(made, asked | {"moment": [2 * 24 * hour + 22 * hour] * 2}).table
    assert before["past_count"].to_pylist() == [0, 0] and after["past_count"].to_pylist() == [1, 1]
    assert made_of(made, asked, at="1970-01-04").table["past_count"].to_pylist() == [1, 1]


@pytest.mark.parametrize(
    ("requests", "at", "message"),
    [
        ({"video": [1], "day": [3]}, None, r"requests.csv: column 'user' is absent, wanted the group"),
        ({"user": [1], "video": [1]}, None, "column 'day' is absent, wanted the day of every request in it, or --at"),
        (REQUESTS, "3", "column 'day' and --at: got both, wanted one of them"),
        (REQUESTS | {"past_rate": [0.5, 1]}, None, "column 'past_rate': got values, wanted none: it is made of the"),
        (REQUESTS | {"user": [1, None]}, None, "column 'user': got a missing value, wanted the group of every row"),
        (REQUESTS | {"day": [3, None]}, None, "column 'day': got a missing day, wanted one in every row"),
        (REQUESTS | {"day": ["3", "soon"]}, None, "column 'day': got day 'soon', wanted one in the form of the log's"),
        (REQUESTS | {"video": ["1", "two"]}, None, "column 'video': .*two.*, wanted int64"),
        ({"user": [1], "video": [1]}, "2022-05-01", "--at: got day '2022-05-01', wanted one in the form of the log's"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(
    make: Make, requests: dict[str, Any], at: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message) as refused:
        made_of(make(), requests, at)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("days", "fine", "wrong"),
    [
        (["2022-04-25", "2022-04-26"], "2022-05-01", ["20220501", "2022-5-1"]),
        (["20220425", "20220426"], "20220501", ["2022-05-01", "220501"]),
        (["8", "9"], "10", ["2022-05-01", "--8"]),
    ],
)
def test_a_day_is_written_as_in_the_log(
    make: Make, log: dict[str, list[Any]], days: list[str], fine: str, wrong: list[str]
) -> None:
    made = make(log | {"day": [days[0]] * 3 + [days[1]] * 3})
    asked = {name: values for name, values in REQUESTS.items() if name != "day"}
    assert made_of(made, asked, fine).table["past_count"].to_pylist() == [3, 2]
    for day in wrong:
        with pytest.raises(DataError, match="in the form of the log's days, such as"):
            made_of(made, asked, day)


@pytest.mark.parametrize(
    ("column", "value"),
    [("town", "NA"), ("town", ""), ("town", "Ulm\nBonn"), ("tags", ["a,b"]), ("tags", [" a"]), ("tags", ["nan"])],
)
def test_text_that_csv_would_change_is_refused(column: str, value: Any, tmp_path: Path) -> None:
    schema = Schema.from_dict(SCHEMA)
    with pytest.raises(InputError, match=f"column '{column}': got .*, which CSV cannot hold, wanted an OUT that ends"):
        csv_table(schema, pa.table({column: [value]}))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


@given(st.lists(st.tuples(st.none() | TEXT, st.lists(TEXT, max_size=3), st.none() | st.floats(allow_nan=False))))
def test_a_table_in_csv_is_read_back_equal_or_refused(rows: list[tuple[Any, list[str], float | None]]) -> None:
    schema = Schema.from_dict(SCHEMA | {"histories": []})
    towns, tags, lengths = (list(part) for part in zip(*rows, strict=True)) if rows else ([], [], [])
    types = {"town": pa.string(), "tags": pa.list_(pa.string()), "length": pa.float64(), "video": pa.int64()}
    values = {"town": towns, "tags": tags, "length": lengths, "video": list(range(len(rows)))}
    table = pa.table({name: pa.array(values[name], kind) for name, kind in types.items()})
    try:
        written = csv_table(schema, table)
    except InputError:
        return
    with tempfile.TemporaryDirectory() as name:
        for kind, of_kind in (("csv", written), ("parquet", table)):
            with written_table(Path(name) / f"rows.{kind}") as append:
                append(of_kind)
        read = [read_candidates(Path(name) / f"rows.{kind}", schema)[0] for kind in ("csv", "parquet")]
    for column in types:
        assert values_of(read[0][column]) == values_of(read[1][column]) == values[column]


def test_days_of_a_log_without_histories_are_read_in_its_form(make: Make) -> None:
    """The log has no header, another delimiter and days in a format; requests are plain CSV."""
    names = ["user", "video", "day", "click"]
    columns = [{"name": "video", "type": "int"}, {"name": "town"}]
    tasks = [{"name": "ctr", "kind": "binary", "label": "click"}]
    files = {"log": ["log.txt"], "delimiter": "|", "names": names}
    joins = [{"files": ["users.csv"], "on": "user", "delimiter": ","}]
    time = {"day": "day", "format": "%d/%m/%Y"}
    changes = {"columns": columns, "tasks": tasks, "files": files, "joins": joins, "time": time}
    made = make(histories=[], slices=[], **changes)
    (made[0] / "log.txt").write_text("1|1|25/04/2022|1\n2|1|26/04/2022|0\n")
    asked = {"user": [1, 2], "video": [1, 2]}
    assert made_of(made, asked, at="2022-05-01").table["town"].to_pylist() == ["Ulm", None]
    assert made_of(made, asked | {"day": ["01/05/2022"] * 2}).absent == ()
    with pytest.raises(DataError, match="--at: got day '7', wanted one in the form of the log's days, such as 2022-04"):
        made_of(made, asked, at="7")
    assert made_of(made, {"user": [1]}, at="2022-05-01").absent == ("video",)
