"""An experiment end to end, small: its records, its page, and that nothing is done twice."""

import json
import re

import pytest
import torch

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.experiments import serving_times, starts
from lt4rec_sparse.experiments.experiment import EXPERIMENTS, Resources, run_experiment
from lt4rec_sparse.experiments.regimes import Regimes, run_regimes
from lt4rec_sparse.experiments.trials import Training
from lt4rec_sparse.stopwatch import interleaved

TRAINING = Training(hidden=(16, 8), embedding_dim=2, batch_size=2048)
HERE = Resources(executor="here")


@pytest.fixture(scope="module", autouse=True)
def short():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving_times, "interleaved", lambda calls: interleaved(calls, rounds=1, round_us=1.0))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments") / "log"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_writes_its_page(small_folder, out, name, monkeypatch):
    seeds = 2 if name == "cheap" else 1
    report = run_experiment(name, small_folder, out, seeds, TRAINING, HERE)
    text = report.read_text(encoding="utf-8")
    records = json.loads((report.parent / "records.json").read_text(encoding="utf-8"))
    assert all(title in text for title in records["rows"].values())
    for picture in re.findall(r"\((plots/\w+\.png)\)", text):
        assert (report.parent / picture).stat().st_size > 0
    assert 'src="plots/' not in (report.parent / "report.html").read_text(encoding="utf-8"), "pictures stand within"
    trained = {(record["row"], record["seed"], tuple(record["trial"]["tasks"])) for record in records["records"]}
    assert {row for row, _, _ in trained} == set(records["rows"])
    assert {seed for _, seed, _ in trained} == set(range(seeds))
    assert "nan" not in text.lower().replace("nan ", " ")
    # A second time nothing is trained.
    monkeypatch.setattr(starts, "train", None)
    assert run_experiment(name, small_folder, out, seeds, TRAINING, HERE).read_text(encoding="utf-8").startswith("# ")


def test_regimes_are_mapped(tmp_path):
    regimes = Regimes(3_000, (0.2, 0.5), (0.5,), TRAINING)
    report = run_regimes(tmp_path / "map", 1, regimes, executor="here")
    records = json.loads((report.parent / "records.json").read_text(encoding="utf-8"))
    assert [(cell["click_rate"], cell["conflict"]) for cell in records["cells"]] == [(0.2, 0.5), (0.5, 0.5)]
    for cell in records["cells"]:
        found = cell["recovery"][0]
        assert found["way"] == "tickets"
        assert set(found["density"]["ctr"]) == {"shared", "click", "watch", "noise"}
        assert len(cell["differences"]["hard_sharing"]) == 1
    assert (report.parent / "plots" / "regimes.png").stat().st_size > 0


def test_what_is_no_experiment_is_refused(small_folder, tmp_path):
    with pytest.raises(InputError, match="experiment: got 'table9', wanted one of table2"):
        run_experiment("table9", small_folder, tmp_path, 1)
    with pytest.raises(InputError, match="seeds: got 0, wanted at least 1"):
        run_experiment("table2", small_folder, tmp_path, 0)
