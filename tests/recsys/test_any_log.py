"""Logs of other kinds, from the command line: what runs, what its report says, and what is scored."""

import shutil
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from lt4rec_sparse import freeze
from lt4rec_sparse.paper import pages
from lt4rec_sparse.ranker import Ranker, load, save
from lt4rec_sparse.recsys import frozen
from lt4rec_sparse.recsys.data import prepare
from lt4rec_sparse.recsys.harness import laboratory, starts, trials
from tests.test_cli import invoke, refusal

TINY = ("--masks", "random", "--hidden", "8", "--embedding-dim", 2, "--batch-size", 64, "-q")
SCHEMA = """
name = "plain"
files = {log = ["log.csv"]}
columns = [{name = "colour"}, {name = "size", kind = "dense"}]
tasks = [{name = "buy", kind = "binary", label = "bought"}]
"""


def quick_run(monkeypatch, data, out, *arguments):
    """Run with the shortest timings there are."""
    monkeypatch.setattr(frozen, "interleaved", partial(frozen.interleaved, rounds=1, round_us=1.0))
    result = invoke("run", "--data", data, "--out", out, *TINY, *arguments)
    assert result.exit_code == 0
    return result


@pytest.fixture
def plain(tmp_path):
    """A table without a day and a user, of which two rows are one."""
    rng, folder = np.random.default_rng(0), tmp_path / "plain"
    folder.mkdir()
    (folder / "schema.toml").write_text(SCHEMA)
    size = rng.normal(size=600)
    size[1] = size[0]
    columns = {"colour": ["red"] * 300 + ["blue"] * 300, "size": size, "bought": (size > 0).astype(int)}
    pyarrow.csv.write_csv(pa.table(columns), folder / "log.csv")
    return folder


def test_a_table_without_days_and_users_runs_and_is_scored(plain, tmp_path, monkeypatch):
    quick_run(monkeypatch, plain, tmp_path / "run")
    report = (tmp_path / "run" / "report.md").read_text()
    assert "600 impressions. 2 input fields" in report
    assert "Rows are split at random by rows (seed 0, 10% test, 10% validate)." in report
    assert "There is no GAUC, NDCG or hit rate: the log has no group" in report
    assert "gauc" not in report and "ndcg@" not in report and "test days" not in report and "on the test rows" in report
    model = tmp_path / "run" / "model.safetensors"
    assert invoke("score", model, tmp_path / "scores.parquet", "--data", plain, "-q").exit_code == 0
    scored = pq.read_table(tmp_path / "scores.parquet")
    assert scored.column_names == ["bought", "buy"]
    prepared = sum(len(pq.read_table(path)) for path in (tmp_path / "run" / "data" / "test").iterdir())
    assert 0 < len(scored) == prepared < 600
    kept = ("--keep", "colour,size", "--days", "train")
    assert invoke("score", model, tmp_path / "train.parquet", "--data", plain, *kept, "-q").exit_code == 0
    train = pq.read_table(tmp_path / "train.parquet")
    again = load(model).score({name: train[name].to_pylist() for name in ("colour", "size")})
    assert np.array_equal(again["buy"], train["buy"].to_numpy())
    assert refusal("score", model, tmp_path / "no.csv", "--data", plain, "--days", "1") == (
        "--days: got '1', wanted train, validation, test: the log has no [time]"
    )


def test_dropped_duplicates_are_told(plain, tmp_path, monkeypatch):
    (plain / "schema.toml").write_text('duplicates = "drop"\n' + SCHEMA)
    monkeypatch.setattr(frozen, "interleaved", partial(frozen.interleaved, rounds=1, round_us=1.0))
    result = invoke("run", "--data", plain, "--out", tmp_path / "run", *TINY[:-1])
    assert "duplicates dropped: 1 of 600" in result.stderr.splitlines()
    assert "600 impressions, of which 1 duplicates were dropped." in (tmp_path / "run" / "report.md").read_text()


def test_a_drafted_schema_runs(plain, tmp_path, monkeypatch):
    (plain / "schema.toml").unlink()
    assert invoke("schema", plain, "--out", plain / "schema.toml").exit_code == 0
    quick_run(monkeypatch, plain, tmp_path / "run")
    assert "on the test rows" in (tmp_path / "run" / "report.md").read_text()


def test_the_replay_of_table3_wants_users(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(starts, "train", lambda *args, **kwargs: 0.0)
    shutil.copytree(plain, tmp_path / "copy")
    names = ["play_time_ms", "duration_ms", "time_ms"]
    log = pyarrow.csv.read_csv(plain / "log.csv")
    for name in names:
        log = log.append_column(name, pa.array(range(len(log))))
    pyarrow.csv.write_csv(log, tmp_path / "copy" / "log.csv")
    text = SCHEMA.replace('name = "plain"', f'name = "plain"\ncarried = {names}')
    (tmp_path / "copy" / "schema.toml").write_text(text)
    arguments = ("--data", tmp_path / "copy", "--out", tmp_path / "out", "--executor", "here", "--seeds", 1, *TINY[2:])
    assert invoke("experiment", "table3", *arguments).exit_code == 0
    report = (tmp_path / "out" / "table3" / "report.md").read_text()
    reason = "got a log without [group], wanted the user of each row: a request is one user's"
    assert f"- {pages.REPLAY} is left out: {reason}." in report and "gauc" not in report


def test_raw_numbers_and_vectors_are_trained_on_and_scored(plain, tmp_path):
    rng = np.random.default_rng(1)
    size, view = rng.normal(size=600), rng.normal(size=(600, 2))
    texts = [f"{a!r} {b!r}" if i % 5 else None for i, (a, b) in enumerate(view.tolist())]
    columns = {"colour": ["red", "blue"] * 300, "size": size, "view": texts}
    columns |= {"bought": (size + view[:, 1] > 0).astype(int)}
    pyarrow.csv.write_csv(pa.table(columns), plain / "log.csv")
    as_number = '"dense", encoding = "standardised"}, {name = "view", kind = "vector", size = 2, separator = " "}'
    (plain / "schema.toml").write_text(SCHEMA.replace('"dense"}', as_number))
    lab = laboratory.Laboratory(prepare(plain, tmp_path / "prepared"), tmp_path / "lab")
    training = trials.Training(epochs=8, batch_size=32, hidden=(16,), embedding_dim=2, learning_rate=0.03)
    trial = trials.Trial("sparse_sharing", ("buy",), 0, training)
    assert lab.run(trial)["test"]["all"]["buy"]["auc"] > 0.9  # size and view alone tell
    model = lab.model(trial)
    ranker = Ranker(lab.prepared.encoder, model.inputs, freeze(model.mlp, sigmoid=True))
    path = tmp_path / "model.safetensors"
    save(ranker, path)
    assert "numbers (inputs): size (1), view (3)" in invoke("inspect", path).stdout
    out = tmp_path / "scores.parquet"
    assert invoke("score", path, out, "--data", plain, "-q").exit_code == 0
    batches = lab.prepared.stream("test", 1000, shuffle=False).epoch(0)
    of_batches = load(path).score_encoded(next(batches).features)[:, 0].tolist()
    assert pq.read_table(out)["buy"].to_pylist() == of_batches
    candidates = tmp_path / "candidates.csv"
    pyarrow.csv.write_csv(pa.table(columns).drop_columns("bought"), candidates)
    assert invoke("score", path, candidates, out, "-q").exit_code == 0
    assert pq.read_table(out)["buy"].to_pylist() == load(path).score(pa.table(columns))["buy"].tolist()
