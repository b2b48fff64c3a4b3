"""Granularity as a setting of a run: on the command line, in a run's folder, and through to the tickets."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from lt4rec_sparse.cli import app
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.lottery import GRANULARITIES
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.recsys import frozen
from lt4rec_sparse.recsys.harness.settings import RunSettings, check_settings, pin_settings
from lt4rec_sparse.recsys.harness.study import Resources
from lt4rec_sparse.recsys.run import run

WANTED = "granularity: got 'rows', wanted one of weight, 2:4, 16x4, block4, block16, block32, block64, neuron"


def test_a_granularity_that_there_is_none_of_is_one_line(small_folder, tmp_path):
    arguments = ["run", "--data", small_folder, "--out", tmp_path / "out", "--granularity", "rows"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code, result.stderr) == (2, f"lt4rec-sparse: {WANTED}\n")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=WANTED):
        RunSettings(granularity="rows")


def test_a_run_of_another_granularity_is_refused(tmp_path):
    pin_settings(tmp_path, "log", RunSettings(granularity="block32"))
    assert check_settings(tmp_path, "log", RunSettings(granularity="block32"))
    with pytest.raises(InputError, match="got granularity = block32, wanted 16x4; choose another --out"):
        check_settings(tmp_path, "log", RunSettings())


@pytest.mark.end_to_end
def test_a_run_by_neurons_prunes_neurons(small_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "interleaved", partial(frozen.interleaved, rounds=1, round_us=1.0))
    settings = RunSettings(hidden=(16, 8), embedding_dim=4, rounds=1, epochs=1, batch_size=1024, granularity="neuron")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several only wait for each other over so small a model
    run(small_folder, tmp_path / "run", settings, resources=Resources(executor="here"))
    torch.set_num_threads(threads)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["config"]["granularity"] == "neuron"
    for task in ("ctr", "cvr"):
        (path,) = (tmp_path / "run" / "searches").glob(f"*/seed_0/{task}/level_1.mask.safetensors")
        mask = Mask.load(path)
        assert 0 < mask.density <= 0.2
        for kept in mask.values():
            assert torch.equal(kept.all(1), kept.any(1))
    for granularity in GRANULARITIES[:-1]:
        with pytest.raises(InputError, match="got granularity = neuron, wanted"):
            run(small_folder, tmp_path / "run", replace(settings, granularity=granularity))
