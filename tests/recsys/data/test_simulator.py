"""The simulator: a data set like any other, with a known truth to compare a model with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data import DataError, Prepared, SimulatorConfig, prepare, simulate
from lt4rec_sparse.recsys.data.planted import draw_fields, field_kinds, signals
from lt4rec_sparse.recsys.data.simulator import WATCH_CONCENTRATION, long_view_share

SMALL = SimulatorConfig(users=200, videos=80, impressions=4_000, days=6)
PLANTED = SimulatorConfig(
    users=2_000,
    videos=1_000,
    impressions=30_000,
    days=6,
    click_rate=0.41,
    watch_rate=0.4,
    conflict=0.25,
    planted_fields=2,
    request_size=5,
)
# Columns of `SMALL`'s files, as they were before logs could have planted fields, requests or a watch rate.
DIGEST = "dc69d68bd066e69b42f0b6670e423cc6"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "log"
    simulate(PLANTED, folder)
    return folder


def correlation(folder: Path) -> float:
    table = pq.read_table(folder / "log")
    clicks, watches = table["truth_click"].to_numpy(), table["truth_watch"].to_numpy()
    return float(np.corrcoef(clicks, watches)[0, 1])


def test_same_seed_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        simulate(SMALL, tmp_path / name)
    simulate(SimulatorConfig(**{**vars(SMALL), "seed": 1}), tmp_path / "c")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert (tmp_path / "a" / "users.parquet").read_bytes() != (tmp_path / "c" / "users.parquet").read_bytes()


def test_a_default_log_is_for_ever_the_same(tmp_path: Path) -> None:
    simulate(SMALL, tmp_path)
    total = hashlib.blake2b(digest_size=16)
    for name in ("users.parquet", "videos.parquet", "log"):
        table = pq.read_table(tmp_path / name)
        for column in table.column_names:
            # Machines may differ in the last bit of an exponential.
            values = [round(value, 6) if isinstance(value, float) else value for value in table[column].to_pylist()]
            total.update(f"{column} {values}\n".encode())
    assert total.hexdigest() == DIGEST


def test_truth_is_well_above_trivial(tmp_path: Path) -> None:
    truth = simulate(SimulatorConfig(impressions=60_000), tmp_path / "log")
    assert truth == json.loads((tmp_path / "log" / "truth.json").read_text())
    assert 0.75 < truth["ctr_auc"] < 0.82
    assert truth["cvr_mse"] < 0.6 * truth["constant"]["cvr_mse"]


@pytest.mark.parametrize("click_rate", [0.05, 0.5])
def test_click_rate_is_as_wanted(tmp_path: Path, click_rate: float) -> None:
    simulate(SimulatorConfig(**{**vars(SMALL), "impressions": 20_000, "click_rate": click_rate}), tmp_path / "log")
    table = pq.read_table(tmp_path / "log" / "log")
    assert table["truth_click"].to_numpy().mean() == pytest.approx(click_rate, abs=0.01)
    assert table["is_click"].to_numpy().mean() == pytest.approx(click_rate, abs=0.02)


def test_shared_and_conflict_set_how_the_tasks_go_together(tmp_path: Path) -> None:
    shared = {}
    for name, options in {"same": (1.0, 0.0), "half": (0.5, 0.0), "opposed": (0.0, 1.0)}.items():
        config = SimulatorConfig(**{**vars(SMALL), "shared": options[0], "conflict": options[1]})
        simulate(config, tmp_path / name)
        shared[name] = correlation(tmp_path / name)
    assert shared["same"] > 0.9 > shared["half"] > 0.2 > -0.9 > shared["opposed"]


# The watch rate


def test_long_view_share_is_what_the_watch_ratio_is_drawn_from() -> None:
    means, draws = np.array([0.02, 0.3, 0.5, 0.8, 0.97]), 100_000
    shares = long_view_share(means)
    a = WATCH_CONCENTRATION * means[:, None]
    drawn = (np.random.default_rng(0).beta(a, WATCH_CONCENTRATION - a, (5, draws)) > 0.6).mean(1)
    assert (np.abs(drawn - shares) <= 5 * np.sqrt(shares * (1 - shares) / draws)).all()
    assert long_view_share(np.array([0.0, 1.0])).tolist() == [0.0, 1.0]
    assert (np.diff(long_view_share(np.linspace(0, 1, 101))) > 0).all()


@pytest.mark.parametrize("watch_rate", [0.1, 0.4])
def test_watch_rate_is_as_wanted(tmp_path: Path, watch_rate: float) -> None:
    simulate(replace(SMALL, impressions=20_000, click_rate=0.41, watch_rate=watch_rate), tmp_path)
    table = pq.read_table(tmp_path / "log")
    clicked, long = (table[name].to_numpy() > 0 for name in ("is_click", "long_view"))
    error = np.sqrt(watch_rate * (1 - watch_rate) / clicked.sum())
    assert abs(long[clicked].mean() - watch_rate) < 4 * error
    assert not long[~clicked].any()


# Requests


def test_a_request_shows_different_videos_to_one_user_at_one_moment(planted: Path) -> None:
    table = pq.read_table(planted / "log")
    rows = {name: table[name].to_numpy() for name in ("request_id", "user_id", "video_id", "time_ms", "tab", "hour")}
    assert (np.diff(rows["request_id"]) >= 0).all()
    assert (np.diff(rows["time_ms"]) >= 0).all()
    once = np.unique(np.stack([rows["request_id"], rows["video_id"]], 1), axis=0)
    requests = PLANTED.impressions // PLANTED.request_size
    assert np.bincount(once[:, 0]).tolist() == [PLANTED.request_size] * requests
    one = np.unique(np.stack([rows[name] for name in rows if name != "video_id"], 1), axis=0)
    assert len(one) == requests


def test_requests_of_all_videos_there_are(tmp_path: Path) -> None:
    config = SimulatorConfig(users=5, videos=10, impressions=600, request_size=6)
    simulate(config, tmp_path / "log")
    with pytest.raises(ValueError, match=r"videos: got a day with \d, wanted at least the 10 of a request"):
        simulate(replace(config, request_size=10), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_request_and_its_outcomes_reach_the_batches(planted: Path, tmp_path: Path) -> None:
    prepared = prepare(planted, tmp_path / "out")
    assert prepared.counts["duplicates"] > 0
    table = pq.read_table(planted / "log")
    # A duplicate comes right after its row.
    shown = table["request_id"].to_numpy() * PLANTED.videos + table["video_id"].to_numpy()
    distinct = table.filter(np.diff(shown, prepend=-1) != 0)
    carried = ("time_ms", "play_time_ms", "duration_ms", "truth_click", "truth_watch", "request_id")
    assert prepared.schema.carried == carried
    batches = [prepared.stream(split, 1 << 20, shuffle=False).epoch(0) for split in ("train", "validation", "test")]
    parts = [next(batch).values for batch in batches]
    for name in carried:
        raw = torch.tensor(distinct[name].to_numpy(), dtype=torch.float64)
        assert torch.equal(torch.cat([part[name] for part in parts]), raw)
    requests = torch.cat([part["request_id"] for part in parts]).long().bincount()
    assert requests.unique().tolist() == [PLANTED.request_size]


# Planted fields


def test_truth_names_the_kind_of_every_feature(planted: Path, tmp_path: Path) -> None:
    fields = json.loads((planted / "truth.json").read_text())["fields"]
    schema = Schema.from_toml(planted / "schema.toml")
    assert list(fields) == [column.name for column in schema.features]
    kinds = field_kinds(PLANTED.planted_fields)
    assert len(kinds) == 2 * 4 * PLANTED.planted_fields
    assert fields == {name: kinds.get(name, "noise") for name in fields}
    assert kinds.keys() < fields.keys()
    # No feature identifies the video, which would reveal its fields.
    assert not {"video_id", "author_id", "clicked_rate", "clicked_video_id"} & fields.keys()
    assert simulate(SMALL, tmp_path)["fields"] == {}


@pytest.mark.parametrize(("shared", "kinds"), [(0.0, {"click", "watch", "noise"}), (1.0, {"shared", "noise"})])
def test_a_kind_without_a_share_is_noise(tmp_path: Path, shared: float, kinds: set[str]) -> None:
    truth = simulate(replace(SMALL, planted_fields=1, shared=shared), tmp_path)
    assert set(truth["fields"].values()) == kinds


def test_a_task_depends_on_the_fields_of_its_kinds_and_on_no_other() -> None:
    rng = np.random.default_rng(0)
    fields = draw_fields(rng, "user", 300, 2) | draw_fields(rng, "video", 200, 2)
    rows = (rng.integers(300, size=5_000), rng.integers(200, size=5_000))

    def scores(fields: dict[str, Any]) -> tuple[Any, Any]:
        users, videos = ({name: fields[name] for name in fields if name.startswith(side)} for side in ("user", "video"))
        return signals(np.random.default_rng(1), users, videos, rows, 0.5, 0.25)

    before = scores(fields)
    for name, kind in field_kinds(2).items():
        after = scores(fields | {name: rng.permutation(fields[name])})
        changed = [not np.array_equal(old, new) for old, new in zip(before, after, strict=True)]
        assert changed == [kind in ("shared", "click"), kind in ("shared", "watch")]


@pytest.mark.parametrize("conflict", [0.0, 0.25, 1.0])
def test_conflict_is_on_the_shared_fields(conflict: float) -> None:
    rng = np.random.default_rng(0)
    users, videos = draw_fields(rng, "user", 300, 2), draw_fields(rng, "video", 200, 2)
    rows = (rng.integers(300, size=5_000), rng.integers(200, size=5_000))
    click, watch = signals(rng, users, videos, rows, shared=1.0, conflict=conflict)
    # Sums of 5,000 float64: twelve digits are far less than they keep.
    assert np.corrcoef(click, watch)[0, 1] == pytest.approx(1 - 2 * conflict, abs=1e-12)
    assert [click.std(), watch.std()] == pytest.approx([1, 1], abs=1e-12)


def test_fields_explain_the_written_truth_of_their_tasks_only(planted: Path) -> None:
    """A field that does not matter says no more of a task's truth than the same codes shuffled over users or videos.

    They are exchangeable: it beats the best of 999 shuffles once in a thousand times.
    """
    rng = np.random.default_rng(0)
    log = pq.read_table(planted / "log")
    for side in ("user", "video"):
        entities, place = pq.read_table(planted / f"{side}s.parquet"), log[f"{side}_id"].to_numpy()
        counts = np.bincount(place, minlength=entities.num_rows)
        for task, kinds in {"truth_click": ("shared", "click"), "truth_watch": ("shared", "watch")}.items():
            truth = log[task].to_numpy()
            sums = np.bincount(place, truth - truth.mean(), entities.num_rows)
            for name, kind in field_kinds(PLANTED.planted_fields).items():
                if name.startswith(side):
                    codes = entities[name].to_numpy()
                    shuffled = max(_explained(rng.permutation(codes), sums, counts) for _ in range(999))
                    assert (_explained(codes, sums, counts) > shuffled) == (kind in kinds), (name, task)


def _explained(codes: Any, sums: Any, counts: Any) -> float:
    """Return the sum of squares between the values of a field, of rows summed up by user (or video)."""
    return float((np.bincount(codes, sums) ** 2 / np.bincount(codes, counts)).sum())


def test_log_has_the_flaws_of_a_real_one(prepared: Prepared, simulated: Path) -> None:
    assert 0 < prepared.counts["duplicates"] < 500
    train, test = prepared.counts["train"], prepared.counts["test"]
    clicks = train["tasks"]["ctr"]["label_mean"] * train["rows"]
    assert train["tasks"]["cvr"]["rows"] < clicks  # durations of zero
    batch = next(prepared.stream("test", test["rows"]).epoch(0))
    assert (batch.features.single[:, 0] == 1).any()  # videos of the last days
    assert (batch.features.single == 0).any()  # missing values
    assert "truth_click" in prepared.schema.forbidden


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    simulate(SMALL, tmp_path / "log")
    before = (tmp_path / "log" / "users.parquet").stat().st_mtime_ns
    simulate(SMALL, tmp_path / "log")
    assert (tmp_path / "log" / "users.parquet").stat().st_mtime_ns == before
    simulate(SimulatorConfig(**{**vars(SMALL), "seed": 1}), tmp_path / "log")
    assert (tmp_path / "log" / "users.parquet").stat().st_mtime_ns != before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(DataError, match=r"got files without truth\.json"):
        simulate(SMALL, tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"days": 4}, "days: got 4, wanted at least 5"),
        ({"conflict": 1.5}, r"conflict: got 1.5, wanted a number in \[0, 1\]"),
        ({"planted_fields": -1}, "planted_fields: got -1, wanted at least 0"),
        ({"request_size": 0}, "request_size: got 0, wanted at least 1"),
        ({"request_size": 7}, "impressions: got 80000, wanted a multiple of request_size, 7"),
        ({"watch_rate": 1.0}, r"watch_rate: got 1.0, wanted a number in \(0, 1\)"),
        ({"click_rate": 0.0}, r"click_rate: got 0.0, wanted a number in \(0, 1\)"),
    ],
)
def test_wrong_configuration(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatorConfig(**changes)  # type: ignore[arg-type]
