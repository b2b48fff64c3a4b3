"""Candidates from a file are encoded as the training data was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from lt4rec_sparse.recsys.data import DataError, prepare, read_candidates

CANDIDATES = {
    "video": [1, None, 9],
    "tags": ["a, b", None, "zzz"],
    "town": ["Ulm", None, "Bonn"],
    "length": [10.0, None, 0.0],
    "past_count": [3, 0, None],
    "past_rate": [0.5, None, 1.0],
    "past_video": ["1,2", "", "2"],
    "past_tags": ["a", "b,a", ""],
}


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_candidates_are_encoded_as_given_directly(make: Callable[..., Any], tmp_path: Path, name: str) -> None:
    encoder = prepare(*_split(make(), tmp_path)).encoder
    table = pa.table(CANDIDATES)
    path = tmp_path / name
    pq.write_table(table, path) if name.endswith("parquet") else pyarrow.csv.write_csv(table, path)
    from_file, direct = encoder.encode(read_candidates(path, encoder.schema)[0]), encoder.encode(CANDIDATES)
    assert torch.equal(from_file.single, direct.single)
    assert torch.equal(from_file.multi_values, direct.multi_values)
    assert torch.equal(from_file.multi_offsets, direct.multi_offsets)


def test_absent_feature_is_named_and_no_rows_are_fine(make: Callable[..., Any], tmp_path: Path) -> None:
    encoder = prepare(*_split(make(), tmp_path)).encoder
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(CANDIDATES).slice(0, 0), path)
    features, kept = read_candidates(path, encoder.schema, ["video"])
    assert encoder.encode(features).batch == len(kept) == 0
    pq.write_table(pa.table(CANDIDATES).drop_columns(["town"]), path)
    with pytest.raises(DataError, match=r"rows\.parquet: column 'town' is absent, wanted every feature of the model"):
        read_candidates(path, encoder.schema)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_columns_are_kept_as_they_are(make: Callable[..., Any], tmp_path: Path, name: str) -> None:
    schema = prepare(*_split(make(), tmp_path)).schema
    table = pa.table(CANDIDATES | {"request": ["r1", "r1", "r2"], "position": [2, 1, 0]})
    path = tmp_path / name
    pq.write_table(table, path) if name.endswith("parquet") else pyarrow.csv.write_csv(table, path)
    features, kept = read_candidates(path, schema, ["request", "video", "position", "request"])
    assert kept.column_names == ["request", "video", "position"]
    assert kept["request"].to_pylist() == ["r1", "r1", "r2"]
    assert kept["video"].to_pylist() == [1, None, 9]
    assert [int(position) for position in kept["position"].to_pylist()] == [2, 1, 0]
    assert features.keys() == CANDIDATES.keys()
    with pytest.raises(DataError, match="column 'ghost' is absent, wanted one of video, tags"):
        read_candidates(path, schema, ["ghost"])


def _split(made: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Path, Any]:
    folder, schema = made
    return folder, tmp_path / "out", schema
