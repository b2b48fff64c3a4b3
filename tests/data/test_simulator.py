"""The simulator: a data set like any other, with a truth that a model can be held against."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lt4rec_sparse.data import DataError, Prepared, SimulatorConfig, simulate

SMALL = SimulatorConfig(users=200, videos=80, impressions=4_000, days=6)


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
        ({"click_rate": 0.0}, r"click_rate: got 0.0, wanted a number in \(0, 1\)"),
    ],
)
def test_wrong_configuration(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatorConfig(**changes)  # type: ignore[arg-type]
