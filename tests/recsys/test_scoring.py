"""Record batches score as their rows do by themselves; and so do files on Ray and on Spark."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serve.models import small_ranker

from lt4rec_sparse import Ranker, save
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.artefact import load
from lt4rec_sparse.recsys import scoring
from lt4rec_sparse.recsys.scoring import score, score_file

ROWS = 40


def candidates(seed: int = 0) -> pa.RecordBatch:
    rng = np.random.default_rng(seed)
    lists = [[int(n) for n in rng.integers(6, size=rng.integers(4))] for _ in range(ROWS)]
    columns = {
        "row": pa.array(range(ROWS), pa.int64()),
        "item": pa.array([None if n == 5 else int(n) for n in rng.integers(6, size=ROWS)], pa.int32()),
        "age": pa.array(rng.choice(["20-30", "30-40", ""], ROWS)),
        "length": pa.array(rng.random(ROWS), pa.float32()),
        "tags": pa.array([[f"t{n}" for n in part] for part in lists]),
        "seller": pa.array(rng.integers(40, size=ROWS)),
        "similar": pa.array(lists, pa.list_(pa.int64())),
    }
    return pa.RecordBatch.from_pydict(columns)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save(small_ranker(), path)
    return path


def test_rows_of_a_batch_score_as_in_a_file_and_one_by_one(model: Path, tmp_path: Path) -> None:
    batch = candidates()
    scored = score(batch, model, ("row", "age"))
    assert scored.schema.names == ["row", "age", "ctr", "cvr"]
    assert scored.schema.field("ctr").type == pa.float32()
    assert pa.Table.from_batches(score(batch.slice(i, 1), model, ("row", "age")) for i in range(ROWS)) == (
        pa.Table.from_batches([scored])
    )
    pq.write_table(pa.table(batch), tmp_path / "in.parquet")
    score_file(load(model), tmp_path / "in.parquet", tmp_path / "out.parquet", ("row", "age"))
    assert pq.read_table(tmp_path / "out.parquet") == pa.Table.from_batches([scored])
    assert score(batch.slice(0, 0), model, ("row",)).num_rows == 0
    assert score(batch.slice(0, 0), model, ("row",)).schema == score(batch, model, ("row",)).schema


def test_the_model_is_loaded_once_and_again_when_its_file_is_replaced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def counted(path: str) -> Ranker:
        loaded.append(path)
        return load(path)

    monkeypatch.setattr(scoring, "load", counted)
    scoring._loaded.cache_clear()
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(model.read_bytes())
    scored = pickle.loads(pickle.dumps(partial(score, model=str(copy))))
    for seed in range(3):
        scored(candidates(seed))
    assert loaded == [str(copy)]
    save(small_ranker(), copy)
    scored(candidates())
    assert loaded == [str(copy)] * 2


@pytest.mark.parametrize(
    ("change", "keep", "message"),
    [
        (lambda batch: batch.drop_columns(["age"]), (), "batch: column 'age' is absent, wanted every feature"),
        (lambda batch: batch, ("day",), "batch: column 'day' is absent, wanted one of row, item"),
        (lambda batch: batch, ("ctr",), "--keep: got 'ctr', the name of a task"),
        (lambda batch: batch.set_column(1, "item", batch["age"]), (), "batch: column 'item': .*, wanted int64"),
    ],
)
def test_what_does_not_fit_is_refused(model: Path, change: Any, keep: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        score(change(candidates()), model, keep)
    assert "\n" not in str(caught.value)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")  # of Ray's and Spark's own
@pytest.mark.parametrize("engine", ["ray", "pyspark"])
def test_files_score_alike_on_a_cluster(
    model: Path, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not find_spec(engine):
        pytest.skip(f"no {engine}: pip install {engine}")
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    (tmp_path / "in").mkdir()
    for part in range(3):
        pq.write_table(pa.table(candidates(part)), tmp_path / "in" / f"{part}.parquet")
    example = importlib.import_module(f"examples.score_on_{engine.removeprefix('py')}")
    try:
        example.score_files(str(model), str(tmp_path / "in"), str(tmp_path / "out"), ("row", "item"))
    finally:
        if engine == "ray":
            importlib.import_module("ray").shutdown()
        elif (session := importlib.import_module("pyspark.sql").SparkSession.getActiveSession()) is not None:
            session.stop()
    found = pq.read_table(tmp_path / "out").sort_by([("row", "ascending"), ("ctr", "ascending")])
    wanted = pa.Table.from_batches(score(candidates(part), model, ("row", "item")) for part in range(3))
    assert found.equals(wanted.sort_by([("row", "ascending"), ("ctr", "ascending")]))
