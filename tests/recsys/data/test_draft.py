"""Schemas that are drafted from files: what they guess, what they leave out, and that what they write runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data import DataError, SimulatorConfig, prepare, simulate
from lt4rec_sparse.recsys.data.draft import draft_schema, explained
from lt4rec_sparse.recsys.data.seen import Seen, form_of
from tests.test_cli import invoke, refusal

ROWS = 600
RNG = np.random.default_rng(0)


def drafted(folder: Path) -> tuple[Schema, str]:
    """Draft, and prepare by the draft, which must work."""
    text = draft_schema(folder)
    (folder / "schema.toml").write_text(text, encoding="utf-8")
    schema = Schema.from_toml(folder / "schema.toml")
    prepare(folder, folder.parent / f"{folder.name}_prepared")
    (folder / "schema.toml").unlink()
    return schema, text


def shop(**changes: Any) -> dict[str, Any]:
    """A log of ten days with users, items of a side table, and a column that is the label by another name."""
    rng = np.random.default_rng(1)
    click = rng.integers(0, 2, ROWS)
    return {
        "user_id": rng.integers(0, 90, ROWS),
        "item_id": rng.integers(0, 50, ROWS),
        "time": 1_700_000_000 + np.sort(rng.integers(0, 10 * 86_400, ROWS)),
        "hour": rng.integers(0, 24, ROWS),
        "price": np.where(rng.random(ROWS) < 0.8, 0, rng.lognormal(size=ROWS)),
        "country": rng.choice(["NA", "DE", "FR"], ROWS),
        "currency": ["EUR"] * ROWS,
        "request": [f"r{i}" for i in range(ROWS)],
        "is_click": click,
        "landing": np.where(click == 1, "product", "list"),
        "dwell_time": click * rng.integers(1, 100, ROWS),
    } | changes


def write(folder: Path, name: str, columns: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    table = pa.table(columns)
    (pq.write_table if name.endswith("parquet") else pyarrow.csv.write_csv)(table, folder / name)
    return folder


@pytest.mark.parametrize("name", ["log.csv", "log.parquet"])
def test_a_shops_log(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "shop", name, shop())
    write(folder, "items.csv", {"item_id": range(50), "brand": [f"b{i % 7}" for i in range(50)]})
    schema, text = drafted(folder)
    assert schema.time is not None and (schema.time.timestamp, schema.time.unit) == ("time", "s")
    assert schema.group is not None and (schema.group.column, schema.group.type) == ("user_id", "int")
    assert [(join.files, join.on, join.type) for join in schema.joins] == [(("items.csv",), "item_id", "int")]
    assert [(task.name, task.kind, task.label) for task in schema.tasks] == [("is_click", "binary", "is_click")]
    assert schema.outcomes == ("landing", "dwell_time")
    kinds = {column.name: (column.kind, column.type, column.encoding) for column in schema.columns}
    single = ("single", "string", "vocabulary")
    assert kinds == {
        "item_id": ("single", "int", "vocabulary"),
        "hour": ("single", "int", "vocabulary"),
        "price": ("dense", "string", "nonzero_buckets"),
        "country": single,
        "brand": single,
    }
    assert schema.files.missing == ("",)
    for said in (
        "# - left out: landing explains 100% of is_click: known only after it, or the same",
        "# - left out: dwell_time",
        "# - left out: currency, the same in every row: 'EUR'",
        "# - left out: request, another value in every row (600 values)",
        "# - country holds codes of two letters: NA is one of them and not missing",
        'name = "country"  # 3 values',
    ):
        assert said in text, said


def test_splits_are_those_of_files_or_of_a_column(tmp_path: Path) -> None:
    folder = write(tmp_path / "files", "train.csv", shop())
    write(folder, "test.csv", shop())
    schema, _ = drafted(folder)
    assert (schema.split.by, schema.split.train, schema.split.test) == ("files", ("train.csv",), ("test.csv",))
    folder = write(tmp_path / "column", "log.csv", shop(split=["train", "valid", "test"] * (ROWS // 3)))
    schema, _ = drafted(folder)
    assert (schema.split.by, schema.split.column, schema.split.validation) == ("column", "split", ("valid",))


def test_a_table_without_a_header_time_or_users(tmp_path: Path) -> None:
    lines = [f"{i % 2}\t{i % 5}\tw{i % 3}\t{i / 7:.3f}" for i in range(ROWS)]
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "u.data").write_text("\n".join(lines) + "\n")
    schema, text = drafted(tmp_path / "table")
    assert schema.files.delimiter == "\t" and schema.files.names == tuple(f"column_{i}" for i in range(1, 5))
    assert (schema.time, schema.group, schema.split_by) == (None, None, "random")
    assert [task.label for task in schema.tasks] == ["column_1"]
    assert "column_1, a guess: it has two values" in text


@pytest.mark.parametrize(
    ("labels", "positive"),
    [(["yes", "no", "no"], ("yes",)), ([True, False, False], ()), (["b", "a", "a"], ("b",)), ([2, 1, 1], ("2",))],
)
def test_labels_of_texts_and_booleans(tmp_path: Path, labels: list[Any], positive: tuple[str, ...]) -> None:
    for name in ("log.csv", "log.parquet"):
        folder = write(tmp_path / name.replace(".", "_"), name, {"x": [1, 2, 3, 4] * 150, "bought": labels * 200})
        schema, _ = drafted(folder)
        assert [(task.label, task.positive) for task in schema.tasks] == [("bought", positive)]


def test_ratings_and_days_in_words(tmp_path: Path) -> None:
    columns = {
        "rating": [1, 5, 3, 4] * 150,
        "film": RNG.integers(0, 60, ROWS),
        "day": ["13/01/2024", "02/02/2024"] * 300,
    }
    schema, text = drafted(write(tmp_path / "films", "log.csv", columns))
    assert [(task.kind, task.divide_by) for task in schema.tasks] == [("ratio", 5)]
    assert schema.time is not None and (schema.time.day, schema.time.format) == ("day", "%d/%m/%Y")
    assert schema.split_by == "random" and "so few days are no splits" in text


def test_missing_values_among_numbers_are_spelled(tmp_path: Path) -> None:
    columns = {"size": ["\\N", "1.5", "2.5"] * 200, "colour": ["red", "NULL", "blue"] * 200, "click": [0, 1] * 300}
    schema, text = drafted(write(tmp_path / "log", "log.csv", columns))
    assert schema.files.missing == ("", "NULL", "\\N")
    assert 'name = "size"  # 2 values, 33% missing' in text


def test_the_simulated_log_hides_its_truth(tmp_path: Path) -> None:
    simulate(SimulatorConfig(users=300, videos=120, impressions=9_000, days=6), tmp_path / "log")
    (tmp_path / "log" / "schema.toml").unlink()
    for path in (tmp_path / "log" / "log").iterdir():
        path.rename(tmp_path / "log" / path.name)
    schema, _ = drafted(tmp_path / "log")
    names = {column.name for column in schema.columns}
    assert {"tags", "category", "hour", "tab"} <= names and not {"long_view", "play_time_ms"} & names
    assert len(schema.joins) == 2 and schema.group is not None and schema.group.column == "user_id"


@given(st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_a_random_column_explains_nothing_and_a_copy_all(values: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, 2000).astype(np.float64)
    random = Seen("x", "int", pa.array(rng.integers(0, values, 2000)), values)
    copy = Seen("x", "number", pa.array(label * 3 + rng.random(2000)), 2000)
    # The estimate's standard deviation is at most (2 values)^1/2 / 2000: six of it.
    assert abs(explained(random, label)) < 6 * (2 * values) ** 0.5 / 2000
    assert explained(copy, label) > 0.95
    gaps = Seen("x", "int", pa.array([1 if y else None for y in label]), 1)  # that it is there says it
    assert explained(gaps, label) == 1


@pytest.mark.parametrize(
    ("text", "delimiter", "names", "encoding"),
    [
        (b"a,b\n1,2\n", None, (), "utf8"),
        (b"a;b\n1,5;2\n", ";", (), "utf8"),
        (b"a|b,c\n1|2\n", "|", (), "utf8"),
        (b"1,2\n3,4\n", None, ("column_1", "column_2"), "utf8"),
        ("n\tort\n1\tKöln\n".encode("latin-1"), "\t", (), "latin-1"),
        (b"a\n1\n", None, (), "utf8"),
    ],
)
def test_forms_are_found(
    tmp_path: Path, text: bytes, delimiter: str | None, names: tuple[str, ...], encoding: str
) -> None:
    (tmp_path / "a.csv").write_bytes(text)
    assert form_of(tmp_path / "a.csv")[:3] == (delimiter, names, encoding)


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got no files of tables, wanted \.parquet, \.csv"):
        draft_schema(tmp_path)
    write(tmp_path, "log.csv", {"x": [1, 2, 3], "y": [4, 5, 6]})
    with pytest.raises(DataError, match="got no column of two values, wanted one: it would be the label"):
        draft_schema(tmp_path)
    write(tmp_path, "log.csv", {"x": [1, 1, 1], "y": [0, 1, 1]})
    with pytest.raises(DataError, match="got no column that can be a feature"):
        draft_schema(tmp_path)


def test_the_command_writes_a_new_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "shop", "log.csv", shop())
    printed = invoke("schema", folder).stdout
    out = folder / "schema.toml"
    assert invoke("schema", folder, "--out", out).stdout == f"{out}: read it, then lt4rec-sparse run --data {folder}\n"
    assert out.read_text() == printed
    assert refusal("schema", folder, "--out", out) == f"--out: got {str(out)!r}, which is there, wanted a new file"
    assert "wanted a file in a folder that exists" in refusal("schema", folder, "--out", tmp_path / "no" / "x.toml")
