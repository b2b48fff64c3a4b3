"""Census-Income through its natural schema, examples/census.toml: a table without days and users."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data import prepare
from lt4rec_sparse.recsys.data.batches import SPLITS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def census() -> Path:
    beside = ROOT.parent / "shared" / "data" / "Census-Income"
    folder = Path(os.environ.get("LT4REC_SPARSE_CENSUS", beside))
    if not folder.is_dir():
        pytest.skip(f"no Census-Income at {folder}: set LT4REC_SPARSE_CENSUS")
    return folder


def test_the_schema_invents_nothing() -> None:
    schema = Schema.from_toml(ROOT / "examples" / "census.toml")
    assert (schema.time, schema.group, schema.split_by, schema.duplicates) == (None, None, "random", "keep")
    assert len(schema.columns) == 39 and not {"split", "row"} & {column.name for column in schema.columns}


def test_every_person_counts(census: Path, tmp_path: Path) -> None:
    schema = Schema.from_toml(ROOT / "examples" / "census.toml")
    prepared = prepare(census, tmp_path / "out", schema)
    counts, table = prepared.counts, pq.read_table(census / "census.parquet")
    assert (counts["rows_read"], counts["duplicates"]) == (len(table), 0)
    for task in ("income", "never_married"):
        positive = sum(counts[split]["rows"] * counts[split]["tasks"][task]["label_mean"] for split in SPLITS)
        assert round(positive) == sum(table[task].to_pylist())
    sizes = [counts[split]["rows"] for split in SPLITS]
    assert sum(sizes) == len(table)
    spread = (len(table) * 0.2 * 0.8) ** 0.5
    assert all(abs(size - 0.2 * len(table)) < 5 * spread for size in sizes[1:])
    assert prepared.encoder.table_sizes["capital_gains"] > 20  # quantiles of all values leave 4: 96 % are 0
    assert next(prepared.stream("train", 64).epoch(0)).groups is None
