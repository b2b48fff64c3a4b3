"""A day that is cut to pieces on disk comes out as one that is sorted and compared in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data import ordered as module
from lt4rec_sparse.recsys.data.dealt import Dealing, Dealt
from lt4rec_sparse.recsys.data.ordered import in_chunks, ordered

# Few values each: rows of one moment and equal rows are frequent. Both zeros, and 2^53 + 1, are values of their own.
ROW = st.tuples(
    st.sampled_from([None, 0.0, -0.0, 1.0, 2.0, 2.5, 1e18]),
    st.sampled_from([None, 0, 1, (1 << 53) + 1]),
    st.sampled_from([None, "", "a", "b\x1fc"]),
    st.sampled_from([[], ["a"], ["a", "b"]]),
)
TYPES = {"moment": pa.float64(), "id": pa.int64(), "text": pa.string(), "tags": pa.list_(pa.string())}
LAYOUT = pa.schema(TYPES)


def schema_of(has_order: bool, drops: bool) -> Schema:
    time = {"day": "day", "order": "moment"} if has_order else {"day": "day"}
    tasks = [{"name": "ctr", "kind": "binary", "label": "click"}]
    columns = [{"name": "text"}]
    duplicates = "drop" if drops else "keep"
    log = {"name": "small", "files": {"log": ["log*"]}, "time": time, "tasks": tasks, "columns": columns}
    return Schema.from_dict(log | {"duplicates": duplicates})


def dealt(rows: list[Any], batch_rows: int, folder: Path) -> Dealt:
    with Dealing(folder) as dealing:
        for first in range(0, len(rows), batch_rows):
            columns = zip(*rows[first : first + batch_rows], strict=True)
            arrays = [pa.array(column, kind) for column, kind in zip(columns, TYPES.values(), strict=True)]
            dealing.write("day", pa.RecordBatch.from_arrays(arrays, schema=LAYOUT))
    return dealing.dealt()["day"]


@given(st.lists(ROW, min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 300), st.booleans(), st.booleans())
def test_pieces_do_not_matter(rows: list[Any], batch_rows: int, piece_bytes: int, has_order: bool, drops: bool) -> None:
    schema = schema_of(has_order, drops)
    with tempfile.TemporaryDirectory() as folder:
        day = dealt(rows, batch_rows, Path(folder))
        whole = pa.concat_tables(ordered(day, schema, LAYOUT.names, Path(folder) / "whole"))
        with patch.object(module, "PIECE_BYTES", piece_bytes):
            pieces = pa.concat_tables(ordered(day, schema, LAYOUT.names, Path(folder) / "pieces"))
        assert {path.name for path in Path(folder).iterdir()} == {"0.arrow"}
    assert list(map(repr, pieces.to_pylist())) == list(map(repr, whole.to_pylist()))  # which tells -0.0 from 0.0
    naive = [dict(zip(TYPES, row, strict=True)) for row in rows]
    if drops:
        naive = [row for place, row in enumerate(naive) if repr(row) not in map(repr, naive[:place])]
    if has_order:
        naive.sort(key=lambda row: (row["moment"] is None, row["moment"] or 0.0))
    assert list(map(repr, whole.to_pylist())) == list(map(repr, naive))


@pytest.mark.parametrize("present", [[], [7], [7, 3, 3], list(range(20))])
def test_moments_that_are_missing_in_many_rows_are_last(tmp_path: Path, present: list[int]) -> None:
    rows = [(None if i not in present else float(-i), i, "text", []) for i in range(20)]
    day = dealt(rows, 5, tmp_path)
    with patch.object(module, "PIECE_BYTES", 100), patch.object(module, "SAMPLES", 2):
        ids = pa.concat_tables(ordered(day, schema_of(True, False), LAYOUT.names, tmp_path / "pieces"))["id"]
    assert ids.to_pylist() == [*sorted(set(present), reverse=True), *(i for i in range(20) if i not in present)]


def test_rows_that_differ_in_bytes_alone_are_kept(tmp_path: Path) -> None:
    layout = pa.schema({**TYPES, "raw": pa.binary()})
    with Dealing(tmp_path) as dealing:
        columns = [[None] * 6, [1] * 6, ["t"] * 6, [[]] * 6, [b"\xff", b"\xfe", b"\xff", None, b"\xfe", None]]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, layout, strict=True)]
        dealing.write("day", pa.RecordBatch.from_arrays(arrays, schema=layout))
    day = dealing.dealt()["day"]
    with patch.object(module, "PIECE_BYTES", 20):
        kept = pa.concat_tables(ordered(day, schema_of(False, True), layout.names, tmp_path / "pieces"))
    assert kept["raw"].to_pylist() == [b"\xff", b"\xfe", None]


@given(st.lists(st.integers(0, 12), max_size=8), st.integers(1, 10))
def test_chunks_have_the_rows_in_order_and_are_full_but_for_the_last(sizes: list[int], rows: int) -> None:
    firsts = [sum(sizes[:place]) for place in range(len(sizes))]
    tables = [pa.table({"id": pa.array(range(a, a + n), pa.int64())}) for a, n in zip(firsts, sizes, strict=True)]
    chunks = list(in_chunks(iter(tables), rows))
    assert [value for chunk in chunks for value in chunk["id"].to_pylist()] == list(range(sum(sizes)))
    assert all(len(chunk) == rows for chunk in chunks[:-1])
    assert all(0 < len(chunk) <= rows and chunk["id"].num_chunks == 1 for chunk in chunks)


def test_days_beyond_the_files_that_a_process_may_open_are_refused(make: Any, log: Any, tmp_path: Path) -> None:
    from lt4rec_sparse.recsys.data import DataError, dealt, prepare

    folder, schema = make()
    with (
        patch.object(dealt, "MAX_DAYS", 2),
        pytest.raises(DataError, match=r"log\.csv: got more than 2 days, wanted a column of days"),
    ):
        prepare(folder, tmp_path / "out", schema)
