"""Tables of other libraries as a data set: what is written reads as the table was, however it came."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import Column, Files, Join, Schema, SchemaError, Task
from lt4rec_sparse.recsys.data import DataError, open_source, table_folder
from lt4rec_sparse.recsys.data.casts import plain
from lt4rec_sparse.recsys.data.reading import read_file
from lt4rec_sparse.recsys.data.source import RawType
from lt4rec_sparse.recsys.data.table_folder import write_tables

SCHEMA = {"columns": [{"name": "x"}], "tasks": [{"name": "buy", "kind": "binary", "label": "bought"}]}
LOG = pa.table({"x": ["a", "b", None, "a"], "bought": [0, 1, 1, 0], "key": [1, 2, 3, 1]})
SIDE = pa.table({"key": [1, 2], "town": ["Ulm", None]})


class Stream:
    """A table of a library of which nothing but the interface is known."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._table.__arrow_c_stream__(requested_schema)


def framed(name: str, table: pa.Table) -> Any:
    if name == "pandas":
        return pytest.importorskip("pandas", reason="pandas is not installed").DataFrame(table.to_pydict())
    if name == "polars":
        return pytest.importorskip("polars", reason="polars is not installed").from_arrow(table)
    return pytest.importorskip("duckdb", reason="duckdb is not installed").from_arrow(table)


def given_as(form: str, table: pa.Table, folder: Path) -> Any:
    made = folder / f"{table.column_names[-1]}.parquet"
    if form in ("path", "text", "dataset"):
        pq.write_table(table, made)
    match form:
        case "table":
            return table
        case "batch":
            return table.combine_chunks().to_batches()[0]
        case "reader":
            return pa.RecordBatchReader.from_batches(table.schema, iter(table.to_batches(max_chunksize=1)))
        case "stream":
            return Stream(table)
        case "dataset":
            return pyarrow.dataset.dataset(made)
        case "path":
            return made
        case "text":
            return str(made)
        case "csv":
            pyarrow.csv.write_csv(table, made.with_suffix(".csv"))
            return made.with_suffix(".csv")
    return framed(form, table)


FORMS = ("table", "batch", "reader", "stream", "dataset", "path", "text", "csv", "pandas", "polars", "duckdb")


def read_log(folder: Path) -> dict[str, list[Any]]:
    """Return what the readers of files read."""
    (path,) = open_source(folder).log
    return pa.Table.from_batches(list(read_file(path, {}, ["x", "bought", "key"]))).to_pydict()


@pytest.mark.parametrize("form", FORMS)
def test_a_table_reads_as_it_was_in_every_form(tmp_path: Path, form: str) -> None:
    write_tables(given_as(form, LOG, tmp_path), SCHEMA, {"key": given_as(form, SIDE, tmp_path)}, tmp_path / "t", False)
    wanted = LOG.to_pydict()
    if form == "csv":
        wanted = {name: [None if v is None else str(v) for v in values] for name, values in wanted.items()}
    assert read_log(tmp_path / "t") == wanted
    (side,) = open_source(tmp_path / "t").joins[0]
    assert side.is_symlink() == (form in ("path", "text", "csv"))


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.xls").touch()
    for path in (tmp_path / "absent.csv", tmp_path, tmp_path / "odd.xls"):
        with pytest.raises(DataError, match=rf"^table: got '{path}', wanted a file, \.base, \.csv, "):
            write_tables(path, SCHEMA, {}, tmp_path / "t", False)


@given(st.lists(st.integers(1, 9), min_size=1), st.lists(st.integers(1, 9), min_size=1))
def test_files_of_equal_rows_are_equal_however_they_were_cut(
    tmp_path_factory: pytest.TempPathFactory, first: list[int], second: list[int]
) -> None:
    rows = sum(first)
    table = pa.table({"x": [str(i) for i in range(rows)], "bought": [i % 2 for i in range(rows)]})

    def cut(lengths: list[int]) -> Iterator[pa.RecordBatch]:
        ends = [0]
        while ends[-1] < rows:
            ends += [ends[-1] + lengths[(len(ends) - 1) % len(lengths)]]
        for begin, end in pairwise(ends):
            yield from table.slice(begin, end - begin).to_batches()

    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_folder, "ROW_GROUP_ROWS", 4)
        for name, lengths in (("one", first), ("two", second)):
            reader = pa.RecordBatchReader.from_batches(table.schema, cut(lengths))
            write_tables(reader, SCHEMA, {}, folder / name, False)
    one, two = folder / "one" / "log.parquet", folder / "two" / "log.parquet"
    assert one.read_bytes() == two.read_bytes()
    with pq.ParquetFile(one) as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert set(groups[:-1]) <= {4}
    assert pq.read_table(one).equals(table)


def test_a_long_stream_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made of a batch is on its way to the disk before the next but few are asked for."""
    monkeypatch.setattr(table_folder, "ROW_GROUP_ROWS", 100)
    made, written = [], []
    write_table = pq.ParquetWriter.write_table

    def noted(writer: Any, table: Any) -> None:
        written.append((len(made), table.num_rows))
        write_table(writer, table)

    def batches() -> Iterator[pa.RecordBatch]:
        for number in range(40):
            made.append(number)
            yield pa.record_batch({"x": ["a"] * 50, "bought": [number % 2] * 50})

    monkeypatch.setattr(pq.ParquetWriter, "write_table", noted)
    schema = pa.schema({"x": pa.string(), "bought": pa.int64()})
    write_tables(pa.RecordBatchReader.from_batches(schema, batches()), SCHEMA, {}, tmp_path, False)
    assert written == [(2 * group, 100) for group in range(1, 21)]


D = Decimal
KINDS: dict[str, pa.Array] = {
    "dictionary": pa.array(["a", "b", None]).dictionary_encode(),
    "large dictionary": pa.array(["a", "b", None], pa.large_string()).dictionary_encode(),
    "dictionary of lists": pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), pa.array([["x"], ["y", "z"]])),
    "dictionary of views": pa.DictionaryArray.from_arrays(
        pa.array([1, 0, None]), pa.array(["a", "b"], pa.string_view())
    ),
    "large text": pa.array(["a", "b", None], pa.large_string()),
    "views of text": pa.array(["a", "a long text that is beside", None], pa.string_view()),
    "views of bytes": pa.array([b"a", b"b", None], pa.binary_view()),
    "runs": pc.run_end_encode(pa.array([1, 1, None])),
    "decimal": pa.array([D("1.5"), D("2.0"), None], pa.decimal128(20, 1)),
    "large decimal": pa.array([D("1.5"), D("2.0"), None], pa.decimal256(50, 1)),
    "half floats": pa.array([1.5, 2.0, None], pa.float16()),
    "large lists": pa.array([["a"], None, ["b", None]], pa.large_list(pa.large_string())),
    "views of lists": pa.array([["a", "b"], None, ["c"]], pa.list_view(pa.string())),
    "large views of lists": pa.array([[1, 2], None, [3]], pa.large_list_view(pa.int32())),
    "lists of two": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2)),
    "lists of dictionaries": pa.array([["a"], None, ["b"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    "JSON": pa.array(["{}", "[]", None], pa.json_()) if hasattr(pa, "json_") else pa.nulls(3),
    "small booleans": pa.array([1, 0, None], pa.bool8()) if hasattr(pa, "bool8") else pa.nulls(3),
    "nulls": pa.nulls(3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_types_of_arrow_keep_their_values(tmp_path: Path, kind: str) -> None:
    column = KINDS[kind]
    for part in (column, column.slice(1), column.slice(0, 0)):
        assert plain(part).to_pylist() == part.to_pylist()
        plain(part).validate(full=True)
        assert plain(plain(part)).type == plain(part).type
    write_tables(Stream(pa.table({"x": column, "bought": [0, 1, 0]})), SCHEMA, {}, tmp_path, False)
    (batch,) = read_file(tmp_path / "log.parquet", {}, ["x"])
    assert batch["x"].to_pylist() == column.to_pylist()


@pytest.mark.parametrize("kind", ["views of lists", "large views of lists", "lists of two", "half floats", "JSON"])
def test_files_of_such_types_read_alike(tmp_path: Path, kind: str) -> None:
    """Arrow writes them to Parquet and reads them back; a cast of its own would lose lists after a missing one."""
    column = KINDS[kind]
    pq.write_table(pa.table({"x": column}), tmp_path / "a.parquet")
    is_list = pa.types.is_nested(column.type)
    wanted = RawType(pa.list_(pa.string()) if is_list else pa.string(), "|")
    if kind == "half floats":
        wanted = RawType(pa.float64())
    (batch,) = read_file(tmp_path / "a.parquet", {"x": wanted}, ["x"])
    texts = [[str(value) for value in bag or ()] for bag in column.to_pylist()] if is_list else column.to_pylist()
    assert batch["x"].to_pylist() == texts


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([{"a": 1}]), r"got struct<a: int64>"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), r"got map<string, int64>"),
        (pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])]), r"got sparse_union<0: int64=0>"),
        (pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16))), r"got extension<arrow.uuid>"),
    ],
    ids=lambda value: value[4:15] if isinstance(value, str) else "",
)
def test_what_is_neither_values_nor_lists_is_one_line(tmp_path: Path, column: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^table: column 'x': {message}.*, wanted values or lists of values$"):
        write_tables(pa.table({"x": column, "bought": [1]}), SCHEMA, {}, tmp_path, False)
    assert not list(tmp_path.iterdir())


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    for what in (7, {"x": [1]}, [LOG]):
        with pytest.raises(InputError, match=r"^table: got .* of type \w+, wanted a table with __arrow_c_stream__"):
            write_tables(what, SCHEMA, {}, tmp_path, False)
    with pytest.raises(InputError, match=r"^joins\['key'\]: got None of type NoneType, wanted a table"):
        write_tables(LOG, SCHEMA, {"key": None}, tmp_path, False)
    with pytest.raises(InputError, match=r"^joins: got \[.*\], wanted a mapping of key columns to tables$"):
        write_tables(LOG, SCHEMA, [("key", 7)], tmp_path, False)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"^table: got no row, wanted a table$"):
        write_tables(LOG.slice(0, 0), SCHEMA, {}, tmp_path, False)

    def torn() -> Iterator[pa.RecordBatch]:
        yield from LOG.to_batches()
        raise ValueError("the connection\nis gone")

    with pytest.raises(DataError, match=r"^table: got .*the connection is gone.*, wanted a table"):
        write_tables(Stream(pa.RecordBatchReader.from_batches(LOG.schema, torn())), SCHEMA, {}, tmp_path, False)


# What was begun


def test_of_a_folder_that_was_begun_nothing_may_change(tmp_path: Path) -> None:
    write_tables(LOG, SCHEMA, {"key": SIDE}, tmp_path, False)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write_tables(Stream(LOG), Schema.from_toml(tmp_path / "schema.toml"), {"key": Stream(SIDE)}, tmp_path, True)
    other = LOG.set_column(0, "x", pa.array(["a", "b", None, "c"]))
    for log, side, schema in ((other, SIDE, SCHEMA), (LOG, SIDE.slice(1), SCHEMA), (LOG, [SIDE, SIDE], SCHEMA)):
        with pytest.raises(
            DataError, match=r"got another table than the one in .*, wanted the same, or another folder"
        ):
            write_tables(log, schema, {"key": side}, tmp_path, True)
    with pytest.raises(DataError, match=r"^schema: got another than .*schema.toml, wanted the same, or another folder"):
        write_tables(LOG, SCHEMA | {"duplicates": "drop"}, {"key": SIDE}, tmp_path, True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_before_that_tables_take_the_place_of_others(tmp_path: Path) -> None:
    pyarrow.csv.write_csv(LOG, tmp_path / "made.csv")
    write_tables(tmp_path / "made.csv", SCHEMA, {"key": [SIDE, SIDE]}, tmp_path / "t", False)
    write_tables(LOG, SCHEMA, {"key": SIDE}, tmp_path / "t", False)
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"log.parquet", "side_0.parquet", "schema.toml"}


# Schemas


def test_a_schema_of_files_is_one_of_the_tables(tmp_path: Path) -> None:
    schema = Schema(
        "shop",
        Files(("*.csv",), ";", missing=("", "-")),
        None,
        None,
        (Column("x"),),
        (Task("buy", "binary", "bought"),),
        joins=(Join(("towns.csv",), "key"), Join(("more.csv",), "key")),
    )
    more = pa.table({"key": [1], "size": [2.0]})
    write_tables(LOG, schema, {"key": [SIDE, more]}, tmp_path, False)
    found = open_source(tmp_path)
    assert [path.name for path in found.files] == ["log.parquet", "side_0.parquet", "side_1.parquet"]
    assert found.schema.name == "shop"
    assert found.schema.files.missing == ("", "-")
    with pytest.raises(InputError, match="joins: got no table for the key 'key' of the schema, wanted one"):
        write_tables(LOG, schema, {"key": SIDE}, tmp_path, False)


@pytest.mark.parametrize(
    ("keys", "columns", "kind"),
    [
        ([1, 2], [{"name": "x"}], "int"),
        (["1", "2"], [{"name": "x"}], "string"),
        ([1, 2], [{"name": "x"}, {"name": "key"}], "string"),
        (["1", "2"], [{"name": "x"}, {"name": "key", "type": "int"}], "int"),
    ],
)
def test_a_key_that_the_schema_does_not_name_is_added(
    tmp_path: Path, keys: list[Any], columns: list[Any], kind: str
) -> None:
    side = pa.table({"key": keys, "town": ["Ulm", "Bonn"]})
    write_tables(LOG, SCHEMA | {"columns": columns}, {"key": side}, tmp_path, False)
    assert open_source(tmp_path).schema.joins == (Join(("side_0.parquet",), "key", kind),)


def test_a_wrong_schema_is_named(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="schema 'log': key 'tasks' is absent"):
        write_tables(LOG, {"columns": [{"name": "x"}]}, {}, tmp_path, False)


def test_without_a_schema_one_is_drafted_with_the_keys_that_are_named(tmp_path: Path) -> None:
    rows = 60
    log = pa.table({"a_id": list(range(3)) * 20, "b_id": list(range(4)) * 15, "is_click": [0, 1, 1] * 20})
    # Larger than the log; and each row is found by either column.
    side = pa.table({"a_id": list(range(3)), "b_id": list(range(3)), "text": [str(i) * 500 for i in range(3)]})
    for key in ("a_id", "b_id"):
        write_tables(log, None, {key: side}, tmp_path / key, False)
        schema = open_source(tmp_path / key).schema
        assert (schema.files.log, schema.joins) == (("log.parquet",), (Join(("side_0.parquet",), key),))
        assert [task.name for task in schema.tasks] == ["is_click"]
    assert log.num_rows == rows
    (tmp_path / "log.txt").write_text("a_id;is_click\n" + "1;0\n2;1\n1;1\n2;0\n" * 15)
    write_tables(tmp_path / "log.txt", None, {}, tmp_path / "csv", False)
    assert open_source(tmp_path / "csv").schema.files == Files(("log.txt",), ";", missing=("",))
    with pytest.raises(DataError, match=r"joins: got the key 'text', wanted a column of the log whose values are once"):
        write_tables(log, None, {"text": side}, tmp_path / "text", False)


def test_a_path_takes_the_place_of_no_table_that_something_was_made_of(tmp_path: Path) -> None:
    folder, other = tmp_path / "t", tmp_path / "other.parquet"
    write_tables(LOG, SCHEMA, {}, folder, False)
    before = (folder / "log.parquet").read_bytes()
    write_tables(folder / "log.parquet", SCHEMA, {}, folder, True)  # the file itself
    pq.write_table(LOG.slice(1), other)
    with pytest.raises(DataError, match=r"table: got another table than the one in .*, wanted the same"):
        write_tables(other, SCHEMA, {}, folder, True)
    other.write_bytes(before)
    write_tables(other, SCHEMA, {}, folder, True)
    assert (folder / "log.parquet").read_bytes() == before and not (folder / "log.parquet").is_symlink()


def test_a_file_that_was_moved_is_named(tmp_path: Path) -> None:
    folder, file = tmp_path / "t", tmp_path / "log.parquet"
    pq.write_table(LOG, file)
    write_tables(file, SCHEMA, {}, folder, False)
    moved = file.rename(tmp_path / "moved.parquet")
    with pytest.raises(DataError, match=r"a link to .*log.parquet, which is gone, wanted it to lead to the same file"):
        write_tables(moved, SCHEMA, {}, folder, True)


def test_a_table_that_is_there_already_stays_and_a_link_to_it_does_not(tmp_path: Path) -> None:
    path = tmp_path / "t" / "log.parquet"
    write_tables(LOG, SCHEMA, {}, path.parent, False)
    before = path.stat()
    for is_begun in (False, True):
        write_tables(LOG, SCHEMA, {}, path.parent, is_begun)
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    path.symlink_to(path.rename(tmp_path / "other.parquet"))
    write_tables(LOG, SCHEMA, {}, path.parent, False)
    assert not path.is_symlink() and {file.name for file in path.parent.iterdir()} == {path.name, "schema.toml"}
