"""Finding a data set and reading its files as typed columns."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data import DataError, kuairand_schema, open_source, read_candidates
from lt4rec_sparse.recsys.data.reading import read_file
from lt4rec_sparse.recsys.data.source import RawType, raw_types

BAGS = RawType(pa.list_(pa.int64()), "|")


def read(path: Path, **types: RawType) -> dict[str, list[Any]]:
    table = pa.Table.from_batches(list(read_file(path, types, list(types))))
    return table.to_pydict()


def test_folder_without_a_data_set_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wanted schema\.toml, or KuaiRand's log_standard_\*\.csv there or in data/"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="got no folder"):
        open_source(tmp_path / "absent")


def test_kuairand_is_known_by_its_files(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    names = ["log_standard_a_part2.csv", "log_standard_a_part1.csv", "log_random_a.csv", "user_features_a.csv"]
    for name in [*names, "video_features_basic_a.csv", "video_features_statistic_a.csv"]:
        (data / name).touch()
    source = open_source(tmp_path)
    assert source.schema == kuairand_schema()
    assert [path.name for path in source.log] == ["log_standard_a_part1.csv", "log_standard_a_part2.csv"]
    assert [path.name for join in source.joins for path in join] == [
        "user_features_a.csv",
        "video_features_basic_a.csv",
    ]


def test_own_schema_wins_over_kuairand(tmp_path: Path, make: Callable[..., tuple[Path, Schema]]) -> None:
    folder, _ = make()
    (folder / "log_standard_a.csv").touch()
    (folder / "schema.toml").write_text("name = 1")
    with pytest.raises(ValueError, match=r"schema\.toml: schema: key 'files' is absent"):
        open_source(folder)


def test_missing_files_are_named(tmp_path: Path, make: Callable[..., tuple[Path, Schema]]) -> None:
    folder, schema = make(joins=[{"files": ["videos_*.csv"], "on": "video"}])
    with pytest.raises(DataError, match=r"got no file 'videos_\*\.csv'"):
        open_source(folder, schema)


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_is_no_regular_file_is_refused_and_not_read(
    tmp_path: Path, make: Callable[..., tuple[Path, Schema]], kind: str
) -> None:
    folder, schema = make()
    odd = folder / "log_2.csv"
    if kind == "device":
        odd.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.mkdir()
    with pytest.raises(DataError, match=r"log_2\.csv: got a folder, a device or a pipe, wanted a regular file"):
        open_source(folder, schema)
    with pytest.raises(DataError, match=r"log_2\.csv: got a folder, a device or a pipe, wanted a regular file"):
        read_candidates(odd, schema)


@pytest.mark.parametrize("pattern", ["../log.csv", "a/../../log.csv", "..", "/log.csv", ""])
def test_patterns_do_not_leave_the_folder(make: Callable[..., tuple[Path, Schema]], pattern: str) -> None:
    folder, schema = make(files={"log": [pattern]})
    with pytest.raises(DataError, match=r"got file pattern .*, wanted one relative to the folder and within it"):
        open_source(folder, schema)


def test_a_link_to_a_regular_file_is_read(tmp_path: Path, make: Callable[..., tuple[Path, Schema]]) -> None:
    folder, schema = make()
    (folder / "log.csv").rename(tmp_path / "elsewhere.csv")
    (folder / "log.csv").symlink_to(tmp_path / "elsewhere.csv")
    assert open_source(folder, schema).log == (folder / "log.csv",)


def test_states_follow_size_time_and_bytes(make: Callable[..., tuple[Path, Schema]]) -> None:
    folder, schema = make()
    source = open_source(folder, schema)
    assert source.files == (folder / "log.csv", folder / "users.csv")
    first = source.states({})
    assert list(first) == ["log.csv", "users.csv"]
    assert source.states(first) == first
    os.utime(folder / "log.csv", ns=(1, 1))
    later = source.states(first)
    assert later["log.csv"] == first["log.csv"] | {"changed_ns": 1}
    assert later["users.csv"] == first["users.csv"]
    # A known digest is believed as long as size and time are the same.
    known = {"log.csv": later["log.csv"] | {"digest": "believed"}}
    assert source.states(known)["log.csv"]["digest"] == "believed"
    with (folder / "log.csv").open("ab") as file:
        file.write(b"\n")
    assert source.states(first)["log.csv"]["digest"] != first["log.csv"]["digest"]


def test_csv_and_parquet_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,name,size,bag\n3.0,7,1,1| 2|\n,,NaN,\n9007199254740993,"x,y",2.5,3\n')
    table = pa.table(
        {
            "id": pa.array([3, None, 9007199254740993], pa.uint64()),
            "name": pa.array(["7", None, "x,y"]).dictionary_encode(),
            "size": pa.array([1.0, float("nan"), 2.5], pa.float32()),
            "bag": pa.array([[1, 2], None, [None, 3]], pa.list_(pa.int32())),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    types = {"id": RawType(pa.int64()), "name": RawType(pa.string()), "size": RawType(pa.float64()), "bag": BAGS}
    from_csv, from_parquet = read(tmp_path / "a.csv", **types), read(tmp_path / "a.parquet", **types)
    assert from_csv["size"] == from_parquet["size"] == [1.0, None, 2.5]
    assert from_csv["name"] == from_parquet["name"] == ["7", None, "x,y"]
    assert from_csv["bag"] == from_parquet["bag"] == [[1, 2], [], [3]]
    assert from_parquet["id"] == [3, None, 9007199254740993]


def test_large_ids_keep_their_last_digit(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id\n9007199254740993\n")
    assert read(tmp_path / "a.csv", id=RawType(pa.int64())) == {"id": [9007199254740993]}


@pytest.mark.parametrize(
    ("text", "types", "message"),
    [
        ("id\nx1\n", {"id": RawType(pa.int64())}, r"a\.csv: column 'id': .*'x1'.*, wanted int64"),
        ("id\n1.5\n", {"id": RawType(pa.int64())}, r"a\.csv: column 'id': .*1\.5.*, wanted int64"),
        ("size\nbig\n", {"size": RawType(pa.float64())}, r"a\.csv: column 'size': .*'big'.*, wanted double"),
        ("bag\n1|x\n", {"bag": BAGS}, r"a\.csv: column 'bag': .*'x'.*, wanted list<item: int64>"),
        ("id,b\n1\n", {"id": RawType(pa.int64())}, r"a\.csv: got .*Expected 2 columns, got 1.*wanted CSV"),
        ("", {"id": RawType(pa.int64())}, r"a\.csv: got .*wanted CSV"),
    ],
)
def test_wrong_csv_is_named(tmp_path: Path, text: str, types: dict[str, RawType], message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "a.csv", **types)
    assert "\n" not in str(caught.value)


def test_wrong_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"a\.parquet: got .*wanted Parquet"):
        read(path, id=RawType(pa.int64()))
    pq.write_table(pa.table({"id": [1.5], "pair": [{"a": 1}]}), path)
    with pytest.raises(DataError, match="column 'id': got double, wanted string"):
        read(path, id=RawType(pa.string()))
    with pytest.raises(DataError, match="column 'pair': got struct<a: int64>, wanted values"):
        list(read_file(path, {}, ["pair"]))


def test_one_column_has_one_type(make: Callable[..., tuple[Path, Schema]]) -> None:
    _, schema = make(slices=[{"name": "s", "column": "video", "value": "1"}])
    with pytest.raises(DataError, match="column 'video' is used as int64 and as string"):
        raw_types(schema)
