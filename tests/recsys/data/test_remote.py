"""Data sets at URLs: in fsspec's memory, which stands for any remote side."""

from __future__ import annotations

import builtins
import importlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import whole_file
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data import DataError, open_source, prepare, remote
from lt4rec_sparse.recsys.data.remote import data_name, is_folder, local_data, local_tables, located
from lt4rec_sparse.recsys.data.table_folder import write_tables

SHOP = "/bucket/odd [name]/shop"
URL = f"memory:/{SHOP}"

Store = Callable[[str, str | bytes], None]


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


@pytest.fixture
def uploaded(memory: Any, make: Callable[..., tuple[Path, Schema]]) -> tuple[Path, Schema]:
    """A data set that is in a folder and at the URL, but for one more file there."""
    folder, schema = make()
    (folder / "schema.toml").write_text(schema.to_toml())
    for path in folder.iterdir():
        memory.pipe_file(f"{SHOP}/{path.name}", path.read_bytes())
    memory.pipe_file("/bucket/odd [name]/shop/unused.csv", b"a\n1\n")
    return folder, schema


def put(memory: Any, name: str, content: bytes) -> None:
    memory.pipe_file(f"{SHOP}/{name}", content)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_places() -> None:
    assert located("s3://bucket/shop/") == "s3://bucket/shop"
    assert located("shop") == Path("shop")
    assert located("") == Path()
    assert located("file:///a%20b/shop") == Path("/a b/shop")
    assert located("c:/shop") == Path("c:/shop")
    assert data_name("s3://bucket/shop/") == "shop"
    assert data_name("s3://bucket") == "bucket"
    assert data_name(Path(os.sep) / "logs" / "shop") == "shop"
    assert is_folder("s3://bucket/shop")
    assert not is_folder("s3://bucket/shop.csv.gz")


def test_a_folder_is_used_where_it_is(uploaded: tuple[Path, Schema], tmp_path: Path) -> None:
    folder, _ = uploaded
    assert local_data(str(folder), tmp_path / "copy") == folder
    assert local_data(f"file://{folder}", tmp_path / "copy") == folder
    assert local_tables(folder, tmp_path) == folder
    assert not (tmp_path / "copy").exists()


def test_the_files_that_the_schema_names_are_copied(uploaded: tuple[Path, Schema], tmp_path: Path) -> None:
    folder, schema = uploaded
    assert local_data(URL, tmp_path / "copy") == tmp_path / "copy"
    assert contents(tmp_path / "copy") == contents(folder)
    assert open_source(tmp_path / "copy").schema == schema


def test_a_schema_that_is_given_names_them(memory: Any, uploaded: tuple[Path, Schema], tmp_path: Path) -> None:
    _, schema = uploaded
    put(memory, "schema.toml", b"no schema")
    with pytest.raises(InputError, match=r"schema.toml: "):
        local_data(URL, tmp_path / "copy")
    local_data(URL, tmp_path / "copy", schema)
    assert set(contents(tmp_path / "copy")) == {"schema.toml", "log.csv", "users.csv"}


def test_files_may_be_in_data_and_below(memory: Any, tmp_path: Path) -> None:
    put(memory, "schema.toml", b'files = {log = ["part/*.csv"]}\nname = "x"\ncolumns = [{name = "a"}]\n'
        b'tasks = [{name = "b", kind = "binary", label = "c"}]\n')  # fmt: skip
    for name in ("data/part/2.csv", "data/part/1.csv", "data/other/3.csv"):
        put(memory, name, b"a,c\n1,0\n")
    source = open_source(local_data(URL, tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in source.log] == ["data/part/1.csv", "data/part/2.csv"]


def test_kuairand_is_known_by_its_files(memory: Any, tmp_path: Path) -> None:
    for name in ("log_standard_a.csv", "user_features_a.csv", "video_features_basic_a.csv", "log_random_a.csv"):
        put(memory, f"data/{name}", b"a\n")
    local_data(URL, tmp_path)
    assert set(contents(tmp_path / "data")) == {
        "log_standard_a.csv", "user_features_a.csv", "video_features_basic_a.csv"
    }  # fmt: skip


def test_only_what_changed_is_copied_again(
    memory: Any, uploaded: tuple[Path, Schema], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    get_file = type(memory).get_file

    def noted(system: Any, source: str, target: str, **rest: Any) -> Any:
        copied.append(source.rpartition("/")[2])
        return get_file(system, source, target, **rest)

    monkeypatch.setattr(type(memory), "get_file", noted)
    copy = tmp_path / "copy"
    local_data(URL, copy)
    assert sorted(copied) == ["log.csv", "schema.toml", "users.csv"]
    copied.clear()
    local_data(URL, copy)
    assert not copied
    put(memory, "users.csv", b"user,town\n1,Ulm\n")
    local_data(URL, copy)
    assert copied == ["users.csv"]
    assert (copy / "users.csv").read_bytes() == b"user,town\n1,Ulm\n"
    copied.clear()
    (copy / "log.csv").unlink()
    local_data(URL, copy)
    assert copied == ["log.csv"]
    copied.clear()
    for name in ("schema.toml", "log.csv", "users.csv"):
        memory.cp_file(f"{SHOP}/{name}", f"/bucket/other/{name}")
    local_data("memory://bucket/other", copy)
    assert len(copied) == 3, "another URL"


def test_a_file_that_is_gone_is_gone(memory: Any, uploaded: tuple[Path, Schema], tmp_path: Path) -> None:
    put(memory, "log_2.csv", b"x")
    local_data(URL, tmp_path / "copy")
    assert "log_2.csv" in contents(tmp_path / "copy")
    memory.rm_file(f"{SHOP}/log_2.csv")
    local_data(URL, tmp_path / "copy")
    assert "log_2.csv" not in contents(tmp_path / "copy")


def test_it_is_prepared_as_the_folder_is(memory: Any, uploaded: tuple[Path, Schema], tmp_path: Path) -> None:
    folder, schema = uploaded
    stages: list[str] = []
    here, there = tmp_path / "here", tmp_path / "there"
    prepare(folder, here)
    for _ in range(2):
        stages.clear()
        prepare(URL, there, progress=lambda stage, done, total: stages.append(stage))
        assert prepare(URL, there).schema == schema
    assert set(stages) == {"copy files"}, "the second time nothing is read"
    parts = {path.relative_to(here): path.read_bytes() for path in here.rglob("*.parquet")}
    assert {path.relative_to(there): path.read_bytes() for path in there.rglob("*.parquet")} == parts
    memory.pipe_file(f"{SHOP}/log.csv", (folder / "log.csv").read_bytes())  # later, and the same
    prepare(URL, there, replace=False)
    put(memory, "log.csv", (folder / "log.csv").read_bytes() + b"\n")
    with pytest.raises(DataError, match="got data of other files"):
        prepare(URL, there, replace=False)


def test_a_table_at_a_url_is_copied(memory: Any, uploaded: tuple[Path, Schema], tmp_path: Path) -> None:
    folder, schema = uploaded
    tables = f"{URL}/log.csv", {"user": f"{URL}/users.csv"}
    write_tables(tables[0], schema, tables[1], tmp_path / "table", False)
    write_tables(tables[0], schema, tables[1], tmp_path / "table", True)
    assert {path.name for path in tmp_path.glob("table/*")} == {"log.csv", "side_0.csv", "schema.toml"}
    assert (tmp_path / "table" / "side_0.csv").read_bytes() == (folder / "users.csv").read_bytes()
    with pytest.raises(DataError, match=r"table: got 'memory://bucket/shop', wanted a file, "):
        write_tables("memory://bucket/shop", schema, {}, tmp_path / "table", False)


def test_a_copy_is_known_from_what_took_its_place(memory: Any, tmp_path: Path) -> None:
    memory.pipe_file("/bucket/log.csv", b"a\n1\n")
    copy, url = tmp_path / "t" / "log.csv", "memory://bucket/log.csv"
    remote.copy_file(url, copy)
    assert remote.is_copy(url, copy)
    with whole_file(copy) as temporary:
        temporary.write_bytes(b"a\n2\n")
    assert not remote.is_copy(url, copy)
    remote.copy_file(url, copy)
    assert copy.read_bytes() == b"a\n1\n"


def test_files_that_another_process_is_copying_stay(memory: Any, uploaded: tuple[Path, Schema], tmp_path: Path) -> None:
    underway = tmp_path / "copy" / ".log.csv.host.12.1.tmp" / "log.csv"
    underway.parent.mkdir(parents=True)
    underway.write_bytes(b"half")
    (tmp_path / "copy.json").write_text("{}")
    local_data(URL, tmp_path / "copy")
    assert underway.read_bytes() == b"half"


def test_a_folder_of_other_files_is_refused(uploaded: tuple[Path, Schema], tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"copy: got files without copy.json, wanted a new, an empty or an earlier"):
        local_data(URL, tmp_path / "copy")
    assert (tmp_path / "copy" / "mine.txt").read_text() == "mine"


def test_all_tables_are_copied_for_a_draft(memory: Any, uploaded: tuple[Path, Schema], tmp_path: Path) -> None:
    folder = local_tables(URL, tmp_path)
    assert folder.name == "shop"
    assert set(contents(folder)) == {"log.csv", "users.csv", "unused.csv"}
    with pytest.raises(DataError, match="memory://bucket/empty: got no files of tables, wanted"):
        local_tables("memory://bucket/empty", tmp_path)


# What is refused


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"^memory://bucket/.*/shop: got no data set, wanted schema.toml, or KuaiRand's log_standard_\*\.csv"),
        ({"schema.toml": b""}, r"^.*/schema.toml: schema: key 'name' is absent"),
        ({"log.csv": None}, r"^memory://bucket/odd \[name\]/shop: got no file 'log\*', wanted one there or in data/"),
    ],
)
def test_a_wrong_url_is_one_line(
    memory: Any, uploaded: tuple[Path, Schema], tmp_path: Path, files: dict[str, bytes | None], message: str
) -> None:
    if not files:
        memory.store.clear()
    for name, content in files.items():
        if content is None:
            memory.rm_file(f"{SHOP}/{name}")
        else:
            put(memory, name, content)
    with pytest.raises(InputError, match=message) as caught:
        local_data(URL, tmp_path / "copy")
    assert "\n" not in str(caught.value)


def test_a_key_that_leaves_the_folder_is_refused(memory: Any, uploaded: tuple[Path, Schema], tmp_path: Path) -> None:
    _, schema = uploaded
    found = {f"{SHOP}/../up.csv": {"type": "file", "size": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(memory), "glob", lambda system, path, **rest: found)
        with pytest.raises(DataError, match=r"got file pattern '../up.csv', wanted one relative to the folder"):
            local_data(URL, tmp_path / "copy", schema)


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.import_module("fsspec.registry").known_implementations
    absent = {"class": "no_such_package.System", "err": "Install cloudfs to access the cloud"}
    monkeypatch.setitem(known, "cloud", absent)
    with pytest.raises(InputError, match=r"^cloud://a: got no package for it, wanted one: Install cloudfs to access"):
        local_data("cloud://a", tmp_path / "copy")
    with pytest.raises(DataError, match=r"^odd://a: got ValueError: Protocol not known: odd, wanted a folder that can"):
        local_data("odd://a", tmp_path / "copy")
    importing = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "fsspec":
            raise ModuleNotFoundError("No module named 'fsspec'", name="fsspec")
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"^s3://a: got no fsspec, wanted it: pip install 'lt4rec-sparse\[remote\]'"):
        local_data("s3://a", tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_what_breaks_underway_is_one_line_and_no_part_of_a_file_is_left(
    memory: Any, uploaded: tuple[Path, Schema], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DeniedError(Exception):
        """An error of a package that nobody here knows."""

    def denied(system: Any, source: str, target: str, **rest: Any) -> None:
        Path(target).write_bytes(b"half of ")
        raise DeniedError("the token\nhas expired")

    monkeypatch.setattr(type(memory), "get_file", denied)
    with pytest.raises(DataError, match=r"shop: got DeniedError: the token has expired, wanted a folder that can be"):
        local_data(URL, tmp_path / "copy")
    monkeypatch.setattr(type(memory), "get_file", lambda system, source, target, **rest: Path(target).write_bytes(b"a"))
    with pytest.raises(DataError, match=r"shop/schema.toml: got 1 bytes, wanted \d+"):
        local_data(URL, tmp_path / "copy")
    assert not contents(tmp_path / "copy")


def test_a_file_that_cannot_be_asked_for_is_not_taken_for_absent(
    memory: Any, uploaded: tuple[Path, Schema], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `truth.json` a simulated log would be read in another way."""
    info = type(memory).info

    def lost(system: Any, path: str, **rest: Any) -> Any:
        if path.endswith("truth.json"):
            raise ConnectionError("no route")
        return info(system, path, **rest)

    monkeypatch.setattr(type(memory), "info", lost)
    with pytest.raises(DataError, match="shop: got ConnectionError: no route, wanted a folder that can be read"):
        local_data(URL, tmp_path / "copy")


def test_times_of_reading_are_no_change(memory: Any, uploaded: tuple[Path, Schema], tmp_path: Path) -> None:
    system = type(memory)
    info = system.info
    reads = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "info", lambda memory, path, **rest: info(memory, path) | {"atime": reads.write("x")})
        local_data(URL, tmp_path / "copy")
        before = {path: path.stat().st_ino for path in (tmp_path / "copy").iterdir()}
        patch.setattr(system, "info", lambda memory, path, **rest: info(memory, path) | {"atime": 7})
        local_data(URL, tmp_path / "copy")
        assert {path: path.stat().st_ino for path in (tmp_path / "copy").iterdir()} == before
    assert "atime" not in (tmp_path / "copy.json").read_text()
    assert remote.READ_TIMES
