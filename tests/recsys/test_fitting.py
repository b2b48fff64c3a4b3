"""`fit`: tables in, a ranker out, which is the one that a run serves."""

import io
import json
import shutil

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker import Ranker, load
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys import Fitted, fit, frozen
from lt4rec_sparse.recsys.data import DataError
from lt4rec_sparse.recsys.harness import starts
from lt4rec_sparse.recsys.harness.settings import RunSettings
from lt4rec_sparse.recsys.harness.study import Resources
from lt4rec_sparse.recsys.run import MODEL, run
from lt4rec_sparse.recsys.training import train

ROWS = 1_200
# A few steps only, of which every call warns.
HOW = {
    "hidden": [6],
    "embedding_dim": 2,
    "masks": "random",
    "density": 0.3,
    "granularity": "weight",
    "epochs": 1,
    "batch_size": 128,
    "dtype": "float32",
}
SCHEMA = {
    "columns": [{"name": "item", "type": "int"}, {"name": "town"}, {"name": "age", "kind": "dense"}],
    "tasks": [
        {"name": "buy", "kind": "binary", "label": "bought"},
        {"name": "stars", "kind": "ratio", "label": "rating", "divide_by": 5},
    ],
}
CANDIDATES = {"item": [1, 2, 99], "town": ["Ulm", None, "Bonn"], "age": [20.0, None, 50.0]}

pytestmark = pytest.mark.filterwarnings("ignore:every model takes:RuntimeWarning")


def log(rows=ROWS, seed=0):
    draw = np.random.default_rng(seed)
    item, age = draw.integers(0, 20, rows), draw.integers(18, 80, rows)
    bought = draw.random(rows) < 0.2 + 0.6 * (item % 2)
    return pa.table({"item": item, "age": age, "bought": bought.astype(int), "rating": draw.integers(1, 6, rows)})


ITEMS = pa.table({"item": range(20), "town": ["Ulm", "Bonn", None, "Köln"] * 5})


def assert_same_scores(one, other):
    for task, scores in one.score(CANDIDATES).items():
        np.testing.assert_array_equal(scores, other.score(CANDIDATES)[task])


@pytest.fixture(scope="module", autouse=True)
def short():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "ROUNDS", 1)
        patch.setattr(frozen, "ROUND_US", 1.0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run folder, and the ranker that came of it; tests do not change it but for what `run` adds."""
    out = tmp_path_factory.mktemp("fitted") / "out"
    torch.use_deterministic_algorithms(True)
    ranker = fit(log(), SCHEMA, joins={"item": ITEMS}, out=out, **HOW)
    torch.use_deterministic_algorithms(False)
    return out, ranker


def test_it_returns_the_ranker_of_the_artefact_and_its_metrics(fitted):
    out, ranker = fitted
    assert isinstance(ranker, Ranker)
    assert ranker.tasks == ("buy", "stars")
    assert_same_scores(ranker, load(out / MODEL))
    assert set(ranker.metrics) == {"validation", "test"}
    assert {task: list(metrics) for task, metrics in ranker.metrics["test"].items()} == {
        "buy": ["auc", "log_loss", "calibration"],
        "stars": ["mse", "calibration"],
    }
    assert ranker.schema == Schema.from_toml(out / "table" / "schema.toml")


@pytest.mark.heavy
def test_it_is_what_a_run_of_the_folder_serves(fitted):
    out, ranker = fitted
    artefact = (out / MODEL).read_bytes()
    trained = {path: path.stat().st_mtime_ns for path in (out / "trials").iterdir()}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in HOW.items()}
    run(out / "table", out, RunSettings(**given), resources=Resources(executor="here"))
    results = json.loads((out / "results.json").read_text())
    (record,) = (record for record in results["records"] if record["masks"])
    assert {split: record[split]["all"] for split in ("validation", "test")} == ranker.metrics
    assert (out / MODEL).read_bytes() == artefact
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert len(results["rows"]) > 1


def test_it_goes_on_where_it_stopped_and_trains_nothing_twice(fitted, monkeypatch):
    out, ranker = fitted
    monkeypatch.setattr(starts, "train", lambda *arguments, **rest: pytest.fail("trained again"))
    again = fit(log(), SCHEMA, joins={"item": ITEMS}, out=out, **HOW)
    assert again.metrics == ranker.metrics
    assert_same_scores(again, ranker)


def test_a_call_that_stops_underway_is_continued(fitted, tmp_path):
    class StopError(Exception):
        """A power failure."""

    def stop(stage, done, total):
        if (stage, done) == ("models: train", 1):
            raise StopError

    with pytest.raises(StopError):
        fit(log(), SCHEMA, joins={"item": ITEMS}, out=tmp_path, progress=stop, **HOW)
    assert (tmp_path / "config.json").exists()
    assert not (tmp_path / MODEL).exists()
    assert_same_scores(fit(log(), SCHEMA, joins={"item": ITEMS}, out=tmp_path, **HOW), fitted[1])


def test_another_log_in_the_place_of_one_is_fitted_as_it_is(tmp_path):
    fit(log(), SCHEMA, joins={"item": ITEMS}, out=tmp_path / "out", **HOW)
    shutil.rmtree(tmp_path / "out")
    others = pa.table({"item": [1_000 + i for i in range(20)], "town": ["Ulm", "Graz"] * 10})
    moved = log().set_column(0, "item", pc.add(log()["item"], 1_000))
    ranker = fit(moved, SCHEMA, joins={"item": others}, out=tmp_path / "out", **HOW)
    assert ranker.encoder.table("item").keys.min() >= 1_000


def test_other_tables_schemas_and_settings_are_refused_and_nothing_changes(fitted):
    out, _ = fitted
    kept = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    for message, table, schema, changes in (
        (r"^table: got another table than", log(seed=1), SCHEMA, {}),
        (r"^schema: got another than", log(), SCHEMA | {"duplicates": "drop"}, {}),
        (r"config.json: got density = 0.3, wanted 0.5; choose another --out", log(), SCHEMA, {"density": 0.5}),
    ):
        with pytest.raises(InputError, match=message):
            fit(table, schema, joins={"item": ITEMS}, out=out, **HOW | changes)
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == kept


def test_without_a_folder_it_leaves_nothing_and_gives_the_same(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    state = torch.get_rng_state()
    ranker = fit(log(), SCHEMA, joins={"item": ITEMS}, **HOW)
    assert_same_scores(ranker, fitted[1])
    assert not list(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers stay as they were"


def test_a_folder_a_file_and_a_table_give_the_same(fitted, tmp_path):
    wide = log().append_column("town", ITEMS["town"].take(log()["item"]))
    pq.write_table(wide, tmp_path / "log.parquet")
    schema = Schema.from_dict({"name": "shop", "files": {"log": ["*.parquet"]}, **SCHEMA})
    (tmp_path / "schema.toml").write_text(schema.to_toml())
    wanted = fit(wide, SCHEMA, **HOW)
    for table, schema in (
        (tmp_path, None),
        (str(tmp_path / "log.parquet"), str(tmp_path / "schema.toml")),
    ):
        found = fit(table, schema, **HOW)
        assert found.metrics == wanted.metrics
        assert_same_scores(found, wanted)


@pytest.fixture
def url():
    """A table and its data set in a memory that stands for a remote side: the URL of their folder."""
    system, buffer = fsspec.filesystem("memory"), io.BytesIO()
    pq.write_table(log().append_column("town", ITEMS["town"].take(log()["item"])), buffer)
    system.pipe_file("/bucket/shop/log.parquet", buffer.getvalue())
    schema = Schema.from_dict({"name": "shop", "files": {"log": ["*.parquet"]}, **SCHEMA})
    system.pipe_file("/bucket/shop/schema.toml", schema.to_toml().encode())
    yield "memory://bucket/shop"
    system.store.clear()


def test_a_folder_and_a_file_at_a_url_give_the_same(fitted, url, tmp_path):
    for place, schema, out in ((url, None, tmp_path / "one"), (f"{url}/log.parquet", SCHEMA, tmp_path / "two")):
        assert_same_scores(fit(place, schema, out=out, **HOW), fitted[1])
    assert {path.name for path in (tmp_path / "one" / "copy").iterdir()} == {"log.parquet", "schema.toml"}
    assert {path.name for path in (tmp_path / "two" / "table").iterdir()} == {"log.parquet", "schema.toml"}


@pytest.mark.heavy
def test_a_run_on_a_url_goes_on_with_its_copies(url, tmp_path):
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in HOW.items()}
    fit(url, out=tmp_path, **HOW)
    copied = (tmp_path / "copy" / "log.parquet").stat().st_ino
    run(url, tmp_path, RunSettings(**given), resources=Resources(executor="here"))
    assert json.loads((tmp_path / "results.json").read_text())["data"]["name"] == "shop"
    assert (tmp_path / "copy" / "log.parquet").stat().st_ino == copied
    fsspec.filesystem("memory").pipe_file("/bucket/shop/log.parquet", b"other")
    with pytest.raises(DataError, match="got data of other files"):
        run(url, tmp_path, RunSettings(**given), resources=Resources(executor="here"))


def test_without_a_schema_the_columns_are_guessed(tmp_path):
    table = log().rename_columns(["item_id", "age", "is_click", "stars"])
    pq.write_table(table, tmp_path / "log.parquet")
    of_table = fit(table, **HOW)
    of_folder = fit(tmp_path, out=tmp_path / "out", **HOW)
    assert of_table.tasks == of_folder.tasks == ("is_click", "stars")
    assert of_folder.metrics == of_table.metrics
    assert Schema.from_toml(tmp_path / "out" / "schema.toml") == of_folder.schema


def test_the_best_masks_are_chosen_as_by_a_run(tmp_path, monkeypatch):
    epochs = []

    def counted(*arguments, **rest):
        epochs.append(arguments)
        return train(*arguments, **rest)

    monkeypatch.setattr(starts, "train", counted)
    found = fit(log(), SCHEMA, joins={"item": ITEMS}, out=tmp_path, **HOW | {"masks": "best", "rounds": 1})
    losses = {}
    for path in (tmp_path / "trials").glob("*.json"):
        record = json.loads(path.read_text())
        metrics = record["validation"]["all"]
        losses[path.stem] = metrics["buy"]["log_loss"], metrics["stars"]["mse"], metrics
    least = [min(found) for found in zip(*((loss, mse) for loss, mse, _ in losses.values()), strict=True)]
    best = min(losses.values(), key=lambda loss: loss[0] / least[0] + loss[1] / least[1])
    assert found.metrics["validation"] == best[2]
    # Two baselines where the tickets start, a level of each task, random masks, the best tickets and the last ones.
    assert len(epochs) <= 2 + 2 + 3


def test_few_steps_are_warned_of():
    with pytest.warns(RuntimeWarning, match="every model takes 8 steps per task at most") as caught:
        fit(log(), SCHEMA, joins={"item": ITEMS}, **HOW)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epoch": 1}, "^settings: got 'epoch', wanted one of base_rates, batch_size, "),
        ({"hidden": []}, r"^hidden: got \(\), wanted at least one width"),
        ({"masks": "all"}, "^masks: got 'all', wanted one of best, random, tickets"),
        ({"tasks": ["like"]}, "^tasks: got like, wanted some of buy, stars"),
        ({"joins": {"item": ITEMS.slice(0, 0)}}, r"^joins\['item'\]: got no row, wanted a table"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        fit(log(), SCHEMA, **{"joins": {"item": ITEMS}, **HOW, **arguments})
    assert "\n" not in str(caught.value)


def test_side_tables_of_a_folder_are_those_of_its_schema(tmp_path):
    with pytest.raises(InputError, match=r"joins: got side tables beside the folder .*, wanted them in its schema"):
        fit(tmp_path, joins={"item": ITEMS})
    with pytest.raises(DataError, match="got no files of tables, wanted"):
        fit(tmp_path, **HOW)


def test_a_fitted_ranker_travels(fitted):
    other = fitted[1].to_precision("bf16")
    assert isinstance(fitted[1], Fitted)
    assert type(other) is Ranker
