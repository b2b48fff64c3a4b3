"""The command line: what it answers to good input, and its one line to bad input, after which nothing has changed."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

import lt4rec_sparse
from lt4rec_sparse import cli, ops
from lt4rec_sparse.cli import app
from lt4rec_sparse.network import PRECISIONS
from lt4rec_sparse.nn import Plan, SparseMLP
from lt4rec_sparse.ranker import Ranker, load, save
from lt4rec_sparse.ranker.store import FeatureStore
from lt4rec_sparse.recsys import frozen
from lt4rec_sparse.recsys import run as run_module
from lt4rec_sparse.recsys.data import Prepared, SimulatorConfig, prepare
from lt4rec_sparse.recsys.data.days import partition
from lt4rec_sparse.recsys.data.rows import RowReader
from lt4rec_sparse.recsys.data.source import open_source

TINY = (
    "--masks",
    "tickets",
    "--hidden",
    "16,8",
    "--embedding-dim",
    4,
    "--rounds",
    1,
    "--epochs",
    1,
    "--batch-size",
    1024,
    "--learning-rate",
    0.001,
)


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="lt4rec-sparse")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # what a user would see as a traceback
    return result


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(*arguments):
    """Return the one line that bad input is answered with, after `lt4rec-sparse: `."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = [line for line in result.stderr.splitlines() if not re.search(r": \d+ of \d+", line)]  # stages before it
    assert line == result.stderr.splitlines()[-1]
    assert line.startswith("lt4rec-sparse: ")
    return line.removeprefix("lt4rec-sparse: ")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished `run` without data of the user's; tests do not change it."""
    out, threads = tmp_path_factory.mktemp("runs") / "run", torch.get_num_threads()
    torch.set_num_threads(1)  # several only wait for each other over so small a model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "interleaved", partial(frozen.interleaved, rounds=1, round_us=1.0))
        small = partial(SimulatorConfig, users=300, videos=120, impressions=9_000, days=6)
        patch.setattr(run_module, "SimulatorConfig", small)
        result = invoke("run", "--out", out, *TINY)
    torch.set_num_threads(threads)
    assert result.exit_code == 0
    verdict, left = result.stdout.splitlines()
    assert verdict.startswith("Serve ")
    assert left == f"{out}/report.md, report.html, model.safetensors, metrics.jsonl"
    told = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    lines = [line for line in result.stderr.splitlines() if line not in told]
    assert result.stderr.splitlines() == [*lines, *told]
    assert any(line.startswith("warning: few steps: every model takes ") for line in told)
    assert told[-1].startswith("warning: one seed: ")
    assert all(re.fullmatch(r".+: \d+ of \d+(, about .+ left)?", line) for line in lines)
    assert lines[:2] == ["simulate: 0 of 1", "simulate: 1 of 1"]
    assert lines[-1] == "freeze and measure: 1 of 1"
    return out


# Good input


def test_run_without_data_simulates_some(finished):
    report = (finished / "report.md").read_text()
    assert report.startswith("# LT4REC, sparse: simulated click log\n")
    assert "The best values that the planted truth allows" in report
    assert (finished / "simulated" / "schema.toml").is_file()


def test_simulate_writes_a_data_set(tmp_path):
    assert invoke("simulate", tmp_path / "a" / "log", "--impressions", 500, "--seed", 3).exit_code == 0
    folder = tmp_path / "a" / "log"
    assert sorted(path.name for path in folder.iterdir()) == [
        "log",
        "schema.toml",
        "truth.json",
        "users.parquet",
        "videos.parquet",
    ]
    assert pq.read_table(folder / "log").num_rows >= 500
    before = contents(folder)
    assert invoke("simulate", folder, "--impressions", 500, "--seed", 3).exit_code == 0
    assert contents(folder) == before


def candidates_of(source_folder, days, scratch):
    """Return the rows of these days as candidates, every history of theirs included."""
    source = open_source(source_folder)
    scratch.mkdir()
    log = partition(source, scratch, 1 << 20, lambda stage, done, total: None)
    parts = RowReader(source, log).read(frozenset(days))
    return pa.concat_tables(pa.table({name: arrow(column) for name, column in part.features.items()}) for part in parts)


def arrow(column):
    if isinstance(column, tuple):
        return pa.ListArray.from_arrays(pa.array(column[1], pa.int32()), pa.array(column[0]))
    return pa.array(np.ma.getdata(column), mask=np.ma.getmaskarray(column), from_pandas=True)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_scores_of_a_file_are_those_of_training(finished, tmp_path, kind):
    prepared = Prepared.load(finished / "data")
    test = prepared.counts["test"]
    table = candidates_of(finished / "simulated", test["days"], tmp_path / "scratch")
    path = tmp_path / f"candidates.{kind}"
    if kind == "parquet":
        pq.write_table(table.append_column("of no feature", pa.nulls(len(table))), path)
    else:
        bags = {name: table[name].to_pylist() for name in table.column_names if pa.types.is_list(table[name].type)}
        texts = {name: [",".join(map(str, bag)) for bag in column] for name, column in bags.items()}
        pyarrow.csv.write_csv(pa.table({name: texts.get(name, table[name]) for name in table.column_names}), path)
    out = tmp_path / "scores.parquet"
    assert invoke("score", finished / "model.safetensors", path, out, "--keep", "").exit_code == 0
    scores = pq.read_table(out)
    assert scores.column_names == ["ctr", "cvr"]
    (batch,) = prepared.stream("test", test["rows"], shuffle=False).epoch(0)
    served = load(finished / "model.safetensors").score_encoded(batch.features).numpy()
    assert np.array_equal(np.stack([column.to_numpy() for column in scores.columns], 1), served)


def test_measures_a_plan_and_scores_by_it(finished, tmp_path):
    model, plan, out = finished / "model.safetensors", tmp_path / "plan.json", tmp_path / "scores.parquet"
    measured = invoke("plan", model, plan, "--batch", "1", "--batch", "3")
    assert measured.exit_code == 0
    assert str(Plan.load(plan)) in measured.stdout
    prepared = Prepared.load(finished / "data")
    table = candidates_of(finished / "simulated", prepared.counts["test"]["days"], tmp_path / "scratch")
    pq.write_table(table, tmp_path / "candidates.parquet")
    assert invoke("score", model, tmp_path / "candidates.parquet", out, "--plan", plan).exit_code == 0
    (batch,) = prepared.stream("test", len(table), shuffle=False).epoch(0)
    served = load(model).planned(Plan.load(plan)).score_encoded(batch.features).numpy()
    assert np.array_equal(np.stack([column.to_numpy() for column in pq.read_table(out).columns], 1), served)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "3", "--batch", "1"), "batch_sizes: got (3, 1), wanted at least one, ascending from 1"),
        (("--precision", "fp8"), "precision: got 'fp8', wanted one of fp32, bf16, int8"),
        (("--device", "tpu"), "device: got 'tpu', wanted cpu or cuda"),
    ],
)
def test_a_plan_that_cannot_be_measured_is_refused(finished, tmp_path, arguments, message):
    line = refusal("plan", finished / "model.safetensors", tmp_path / "plan.json", *arguments)
    assert line == message
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_scores_in_a_precision(finished, tmp_path, precision):
    prepared = Prepared.load(finished / "data")
    table = candidates_of(finished / "simulated", prepared.counts["test"]["days"], tmp_path / "scratch")
    path, out = tmp_path / "candidates.parquet", tmp_path / "scores.parquet"
    pq.write_table(table, path)
    assert invoke("score", finished / "model.safetensors", path, out, "--precision", precision).exit_code == 0
    (batch,) = prepared.stream("test", len(table), shuffle=False).epoch(0)
    served = load(finished / "model.safetensors", precision).score_encoded(batch.features).numpy()
    scores = pq.read_table(out)
    assert np.array_equal(np.stack([column.to_numpy() for column in scores.columns], 1), served)


def test_no_candidates_have_no_scores(finished, tmp_path):
    table = candidates_of(finished / "simulated", ["2024-01-06"], tmp_path / "scratch")
    pq.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    assert (
        invoke("score", finished / "model.safetensors", tmp_path / "none.parquet", tmp_path / "s.parquet").exit_code
        == 0
    )
    assert pq.read_table(tmp_path / "s.parquet").num_rows == 0


def test_export_writes_the_engine_file_of_a_precision(finished, tmp_path):
    model, out = finished / "model.safetensors", tmp_path / "model.engine"
    for precision in PRECISIONS:
        result = invoke("export", model, out, "--precision", precision)
        assert (result.exit_code, result.stderr) == (0, "")
        load(model, precision).to_engine_file(tmp_path / "wanted")
        assert out.read_bytes() == (tmp_path / "wanted").read_bytes()
        assert result.stdout == f"{out}: {out.stat().st_size:,} bytes\n"


def test_export_refuses_what_is_not_there(uncalibrated, tmp_path):
    out = tmp_path / "model.engine"
    assert "int8" in refusal("export", uncalibrated, out, "--precision", "int8")
    assert "precision: got 'fp8'" in refusal("export", uncalibrated, out, "--precision", "fp8")
    assert "OUT: got" in refusal("export", uncalibrated, tmp_path / "absent" / "model.engine")
    assert not out.exists()


def test_inspect_shows_what_an_artefact_holds(finished):
    ranker = load(finished / "model.safetensors")
    result = invoke("inspect", finished / "model.safetensors")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "tasks: ctr, cvr"
    fields = lines[1].removeprefix("fields: ").split(", ")
    assert set(fields) == {column.name for column in ranker.encoder.schema.features}
    network = ranker.mlp.network
    density = network.hidden[1].weight.mask("ctr").float().mean().item()
    assert lines[3].startswith(f"layer 1: 16 -> 8, kept by ctr {density:.1%}, cvr ")
    assert lines[4] == f"MLP: {network.nbytes:,} bytes; prepacked in memory, for the batch sizes in use:"
    for line, kind in zip(lines[5:8], PRECISIONS, strict=True):
        sizes = [f"{nbytes:,} as {layout}" for layout, nbytes in ops.layout_nbytes(network, kind).items()]
        assert line == f"  {kind}: {', '.join(sizes) or 'no engine'}"
    assert lines[8] == "calibrated for int8: yes"
    assert lines[9] == f"embeddings: {ranker.inputs.embedding.numel() * 4:,} bytes"
    assert lines[10:] == ["trained until: 2024-01-02"]


def test_inspect_says_how_embeddings_are_held_and_which_are_elsewhere(finished, tmp_path):
    ranker = load(finished / "model.safetensors")
    table = next(iter(ranker.encoder.table_sizes))
    save(ranker, tmp_path / "model", "int8", without=[table])
    rows, dim = ranker.inputs.embedding.shape
    lines = invoke("inspect", tmp_path / "model").stdout.splitlines()
    assert lines[9] == f"embeddings: {(rows - ranker.encoder.table_sizes[table]) * (dim + 4):,} bytes in int8"
    assert lines[10:] == [f"embeddings that must be given: {table}", "trained until: 2024-01-02"]


@pytest.fixture
def uncalibrated(finished, tmp_path):
    ranker = load(finished / "model.safetensors")
    save(Ranker(ranker.encoder, ranker.inputs, SparseMLP(ranker.mlp.network.with_quantization(None))), tmp_path / "old")
    return tmp_path / "old"


def test_inspect_says_if_an_artefact_is_not_calibrated(uncalibrated):
    lines = invoke("inspect", uncalibrated).stdout.splitlines()
    assert [line.split(":")[0].strip() for line in lines[5:8]] == ["fp32", "bf16", "calibrated for int8"]
    assert lines[7] == "calibrated for int8: no"


COMMANDS = (
    "run",
    "update",
    "experiment",
    "simulate",
    "candidates",
    "features",
    "score",
    "plan",
    "export",
    "inspect",
    "diff",
)


def test_help_names_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in (*COMMANDS, "--version", "--install-completion"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    parameters = typer.main.get_command(app).commands[command].params
    assert len(parameters) > 1 or command == "inspect"
    for parameter in parameters:
        assert len(parameter.help.split()) >= 3, parameter.name


def test_the_version_is_the_packages():
    assert invoke("--version").stdout == f"lt4rec-sparse {lt4rec_sparse.__version__}\n"


def test_lines_of_progress_come_first_last_and_now_and_then(monkeypatch):
    now, lines = iter([0, 1, 6, 7, 20, 3000, 3001, 3002, 3003]), []
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(now))
    progress = cli.Lines(lines.append)
    for done in (0, 1, 2, 3, 4, 5, 1000, 1000):
        progress("train", done, 1000)
    progress("write", 1, 1)
    assert lines == [
        "train: 0 of 1000",
        "train: 2 of 1000, about 50 min left",
        "train: 4 of 1000, about 83 min left",
        "train: 5 of 1000, about 165.8 h left",
        "train: 1000 of 1000",
        "write: 1 of 1",
    ]


def test_a_quiet_command_shows_its_result_only(tmp_path, monkeypatch):
    def report(data, out, settings, progress, resources):
        progress("train", 1, 2)
        return run_module.Finished(out / "report.md", "Serve this.")

    monkeypatch.setattr(run_module, "run", report)
    assert invoke("run", "--out", tmp_path).stderr == "train: 1 of 2\n"
    result = invoke("run", "--out", tmp_path, "-q")
    assert (result.stderr, result.stdout.split(",")[0]) == ("", f"Serve this.\n{tmp_path}/report.md")
    monkeypatch.setattr(run_module, "run", lambda *a: run_module.Finished(tmp_path, "Serve this.", ("none: here.",)))
    assert invoke("run", "--out", tmp_path, "-q").stderr == "warning: none: here.\n"


def test_help_imports_nothing_that_computes():
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from lt4rec_sparse.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'numpy', 'pyarrow', 'matplotlib', 'safetensors')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "16,x"], "--hidden: got '16,x', wanted widths such as 512,256,128"),
        (["--hidden", ""], "--hidden: got '', wanted widths"),
        (["--hidden", "16,0"], r"hidden: got \(16, 0\), wanted at least one width, each at least 1"),
        (["--hidden", "-16"], r"hidden: got \(-16,\), wanted"),
        (["--density", "0"], "density: got 0.0, wanted more than 0 and less than 1"),
        (["--density", "1.5"], "density: got 1.5, wanted more than 0 and less than 1"),
        (["--density", "nan"], "density: got nan, wanted more than 0 and less than 1"),
        (["--learning-rate", "inf"], "--learning-rate: got 'inf', wanted finite numbers"),
        (["--embedding-dim", "1000000000"], "Invalid value for '--embedding-dim': got 1000000000, wanted 1 to 4,096"),
        (["--hidden", "99999999999"], "--hidden: got '99999999999', wanted widths of at most 65536"),
        (["--density", "few"], "Invalid value for '--density': "),
        (["--seeds", "0"], "seeds: got 0, wanted at least 1"),
        (["--seeds", "two"], "Invalid value for '--seeds': "),
        (["--rounds", "0"], "rounds: got 0, wanted at least 1"),
        (["--masks", "some"], "masks: got 'some', wanted one of best, random, tickets"),
        (["--epochs", "0"], "epochs: got 0, wanted at least 1"),
        (["--patience", "-1"], "patience: got -1, wanted 0 or more epochs"),
        (["--schedule", "step"], "schedule: got 'step', wanted one of constant, linear, cosine"),
        (["--warm-up-steps", "-1"], "warm_up_steps: got -1, wanted 0 or more"),
        (["--weight-decay", "nan"], "weight_decay: got nan, wanted 0 or more, and finite"),
        (["--clip-norm", "-0.5"], "clip_norm: got -0.5, wanted 0 or more, and finite"),
        (["--ema", "1"], "ema: got 1.0, wanted at least 0 and less than 1"),
        (["--top-k", "-1"], "top_k: got -1, wanted 0 or more"),
        (["--batch-size", "0"], "batch_size: got 0, wanted at least 1"),
        (["--learning-rate", "-1"], "learning_rate: got -1.0, wanted more than 0"),
        (["--embedding-dim", "0"], "Invalid value for '--embedding-dim': got 0, wanted 1 to 4,096"),
        (["--embeddings", "int4"], "embeddings: got 'int4', wanted one of fp32, fp16, int8"),
        (["--depth", "3"], "No such option: --depth"),
        (["surplus"], "unexpected extra argument.*surplus"),
    ],
)
def test_a_wrong_argument_of_run_is_named(small_folder, tmp_path, arguments, message):
    line = refusal("run", "--data", small_folder, "--out", tmp_path / "out", *arguments)
    assert re.search(message, line)
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "16,0"], r"hidden: got \(16, 0\), wanted at least one width, each at least 1"),
        (["--epochs", "0"], "epochs: got 0, wanted at least 1"),
        (["--patience", "-1"], "patience: got -1, wanted 0 or more epochs"),
        (["--schedule", "step"], "schedule: got 'step', wanted one of constant, linear, cosine"),
        (["--warm-up-steps", "-1"], "warm_up_steps: got -1, wanted 0 or more"),
        (["--weight-decay", "nan"], "weight_decay: got nan, wanted 0 or more, and finite"),
        (["--clip-norm", "-0.5"], "clip_norm: got -0.5, wanted 0 or more, and finite"),
        (["--ema", "1"], "ema: got 1.0, wanted at least 0 and less than 1"),
        (["--top-k", "-1"], "top_k: got -1, wanted 0 or more"),
        (["--batch-size", "-1"], "batch_size: got -1, wanted at least 1"),
        (["--seeds", "0"], "seeds: got 0, wanted at least 1"),
        (["--cross", "dcn"], "cross: got 'dcn', wanted one of dlrm, wide_deep, deepfm"),
        (["--precision", "int8"], "--precision: got 'int8', wanted one of auto, fp32, bf16"),
        (["--workers", "0"], "Invalid value for '--workers': got 0, wanted 1 to 1,024"),
        (["--workers", "-1"], "Invalid value for '--workers': got -1, wanted 1 to"),
        (["--embedding-dim", "1000000000"], "Invalid value for '--embedding-dim': got 1000000000, wanted 1 to 4,096"),
        (["--hidden", "99999999999"], "--hidden: got '99999999999', wanted widths of at most 65536"),
        (["--exclusive-dim", "1000000000"], "Invalid value for '--exclusive-dim': got 1000000000, wanted 1 to"),
        (["--cvr-scale", "nan"], "Invalid value for '--cvr-scale': got nan, wanted a finite number"),
        (["--wider", "nan"], "Invalid value for '--wider': got nan, wanted 0 to 16"),
        (["--wider", "1e9"], "Invalid value for '--wider': got 1000000000.0, wanted 0 to 16"),
        (["--conflict", "60000,nan,0.2,0.2,5"], "--conflict: got '60000,nan,0.2,0.2,5', wanted five numbers"),
        (["--conflict", "60000,0.1,0.2,0.2,inf"], "--conflict: got '60000,0.1,0.2,0.2,inf', wanted five numbers"),
        (["--loss", "ctr"], "--loss: got ctr, wanted pairs such as ctr=focal, at most one per task"),
        (["--loss", "ctr=bce", "--loss", "ctr=mse"], "--loss: got ctr=bce ctr=mse, wanted"),
        (["--loss", "ctr=hinge"], "loss: got 'hinge', wanted one of bce, focal, mse"),
        (["--conflict", "60000,0.1"], "--conflict: got '60000,0.1', wanted five numbers such as"),
        (["--conflict", "-1,0.1,0.2,0.2,5"], "--conflict: got '-1,0.1,0.2,0.2,5', wanted five numbers"),
        (["--wider", "0"], "wider: got 0.0, wanted more than 0"),
        (["--cvr-scale", "-2"], "cvr_scale: got -2.0, wanted more than 0"),
        (["--exclusive-dim", "0"], "Invalid value for '--exclusive-dim': got 0, wanted 1 to 4,096"),
    ],
)
def test_a_wrong_argument_of_experiment_is_named(small_folder, tmp_path, arguments, message):
    line = refusal("experiment", "table2", "--data", small_folder, "--out", tmp_path / "out", *arguments)
    assert re.search(message, line)
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment", "table2"], "--data: got none, wanted a folder with a log"),
        (["experiment", "regimes", "--data", "{tmp}"], "--data: got .* for regimes, wanted none"),
        (["experiment", "regimes", "--top-k", "3"], "regimes: got options of networks or training, wanted none"),
        (["experiment", "regimes", "--epochs", "3"], "regimes: got options of networks or training, wanted none"),
        (
            ["experiment", "table2", "--data", "{tmp}", "--impressions", "9"],
            "--impressions: got 9 with --data, wanted none",
        ),
        (["experiment", "table2", "--data", "{tmp}", "--patience", "-1"], "patience: got -1, wanted 0 or more epochs"),
        (["simulate"], "Missing argument"),
        (
            ["simulate", "{tmp}/log", "--impressions", "10"],
            "Invalid value for '--impressions': got 10, wanted 100 to 1,000,000,000",
        ),
        (["simulate", "{tmp}/log", "--conflict", "1.5"], r"conflict: got 1.5, wanted a number in \[0, 1\]"),
        (["simulate", "{tmp}/log", "--conflict", "nan"], r"conflict: got nan, wanted a number in \[0, 1\]"),
        (
            ["simulate", "{tmp}/log", "--impressions", "9999999999999"],
            "Invalid value for '--impressions': got 9999999999999, wanted",
        ),
        (
            ["simulate", "{tmp}/log", "--planted-fields", "9999999"],
            "Invalid value for '--planted-fields': got 9999999, wanted 0 to 1,000",
        ),
        (["simulate", "{tmp}/log", "--seed", "-1"], "seed: got -1, wanted at least 0"),
        (["score", "{tmp}/model.safetensors"], "Missing argument"),
        (["train"], "No such command 'train'"),
    ],
)
def test_a_wrong_argument_of_another_command_is_named(tmp_path, arguments, message):
    assert re.search(message, refusal(*(argument.format(tmp=tmp_path) for argument in arguments)))
    assert not contents(tmp_path)


def test_simulate_replaces_nothing_of_the_users(tmp_path):
    (tmp_path / "file").write_text("thesis")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("thesis")
    before = contents(tmp_path)
    assert "file: got files without truth.json, wanted" in refusal("simulate", tmp_path / "file")
    assert "folder: got files without truth.json, wanted" in refusal("simulate", folder)
    assert "File exists" in refusal("simulate", tmp_path / "file" / "below")
    assert contents(tmp_path) == before
    for text in ('{"whose": "not ours"}', "[", "[" * 100_000, "\xff"):
        (folder / "truth.json").write_text(text, encoding="latin-1")
        before = contents(tmp_path)
        line = refusal("simulate", folder)
        assert "truth.json: got " in line and line.endswith("wanted a new, an empty or an earlier folder")
        assert contents(tmp_path) == before


# Bad data: each case changes one thing of a good folder


def log_files(folder):
    return sorted((folder / "log").glob("*.parquet"))


def edited(path, change):
    pq.write_table(change(pq.read_table(path)), path)


def with_column(name, values):
    """Return a table's change: a column replaced, or added, with `values(old column or rows)`."""

    def change(table):
        if name in table.column_names:
            return table.set_column(table.column_names.index(name), name, values(table[name]))
        return table.append_column(name, values(table))

    return change


def with_schema(old, new):
    def change(folder):
        text = (folder / "schema.toml").read_text()
        assert old in text
        (folder / "schema.toml").write_text(text.replace(old, new, 1))

    return change


def in_log(change, *files):
    def change_folder(folder):
        for index in files or range(len(log_files(folder))):
            edited(log_files(folder)[index], change)

    return change_folder


def twice(table):
    return pa.Table.from_arrays([*table.columns, table["tab"]], names=[*table.column_names, "tab"])


def note_of_another_type(folder):
    in_log(with_column("note", lambda table: pa.array([1] * len(table))), 0, 2, 3, 4, 5)(folder)
    in_log(with_column("note", lambda table: pa.array(["one"] * len(table))), 1)(folder)


def zeroes_within(folder):
    content = log_files(folder)[2].read_bytes()
    log_files(folder)[2].write_bytes(content[:1_000] + bytes(2_000) + content[3_000:])


def as_csv(header, row=""):
    def change(folder):
        (folder / "log.csv").write_bytes(f"{header}\n{row}\n".encode("latin-1"))
        with_schema('log = ["log/*.parquet"]', 'log = ["log.csv"]')(folder)

    return change


def outcome_as_a_feature(folder):
    with (folder / "schema.toml").open("a") as file:
        file.write('\n[[columns]]\nname = "play_time_ms"\nkind = "dense"\n')


NAN = float("nan")
BAD_DATA = {
    "no schema": (lambda folder: (folder / "schema.toml").unlink(), "log: got no data set, wanted schema.toml, or"),
    "no TOML": (lambda folder: (folder / "schema.toml").write_text("name =\n= 1\n"), r"schema\.toml: Invalid value"),
    "unknown key": (
        with_schema("rates = true", "rate = true"),
        r"schema\.toml: .*'clicked': key 'rate' is unknown, wanted one of name, when",
    ),
    "outcome as a feature": (outcome_as_a_feature, r"schema\.toml: column 'play_time_ms': .*is an outcome, wanted"),
    "no files": (with_schema('log = ["log/*.parquet"]', "log = []"), "log: got an empty list of files, wanted"),
    "files elsewhere": (
        with_schema("log/*.parquet", "/log/*.parquet"),
        r"log: got file pattern '/log/\*\.parquet', wanted one relative",
    ),
    "files outside": (
        with_schema("log/*.parquet", "../*/*.parquet"),
        r"log: got file pattern '\.\./\*/\*\.parquet', wanted one relative to the folder and within it",
    ),
    "an endless file": (
        lambda folder: (folder / "log" / "zero.parquet").symlink_to("/dev/zero"),
        r"zero\.parquet: got a folder, a device or a pipe, wanted a regular file",
    ),
    "a pipe": (
        lambda folder: os.mkfifo(folder / "log" / "pipe.parquet"),
        r"pipe\.parquet: got a folder, a device or a pipe, wanted a regular file",
    ),
    "TOML nested too deeply": (
        lambda folder: (folder / "schema.toml").write_text("a = " + "[" * 100_000),
        r"schema\.toml: got TOML nested too deeply, wanted a schema",
    ),
    "hash beyond int32": (
        with_schema('name = "author_id"', 'name = "author_id"\nencoding = "hash"\nsize = 4611686018427387904'),
        r"schema\.toml: column 'author_id': got hash of .*size=4611686018427387904, wanted",
    ),
    "absent files": (with_schema("videos.parquet", "films.parquet"), r"log: got no file 'films\.parquet', wanted"),
    "garbage": (
        lambda folder: log_files(folder)[2].write_bytes(b"garbage" * 100),
        r"log/2024-01-03\.parquet: got .*, wanted Parquet",
    ),
    "empty file": (lambda folder: (folder / "users.parquet").write_bytes(b""), r"users\.parquet: got .*wanted Parquet"),
    "truncated": (
        lambda folder: os.truncate(log_files(folder)[2], 5_000),
        r"log/2024-01-03\.parquet: got .*, wanted Parquet",
    ),
    "zeroes within": (zeroes_within, r"log/2024-01-03\.parquet: got .*, wanted Parquet"),
    "CSV of another encoding": (as_csv("user_id,caf\xe9"), r"log\.csv: got .*utf-8.*, wanted CSV"),
    "CSV of one endless line": (as_csv("x" * 200_000), r"log\.csv: got field larger than .*, wanted CSV"),
    "CSV with a short row": (as_csv("user_id,date", "1"), r"log\.csv: got .*Expected 2 columns, got 1.*, wanted CSV"),
    "column absent from the log": (
        in_log(lambda table: table.drop_columns(["is_click"])),
        r"log/2024-01-01\.parquet: column 'is_click' is absent, wanted it in the log \(label of ctr\)",
    ),
    "column absent from one file": (
        in_log(lambda table: table.drop_columns(["hour"]), 3),
        r"log/2024-01-04\.parquet: column 'hour' is in one of this and 2024-01-01\.parquet, wanted the same",
    ),
    "column absent everywhere": (
        lambda folder: edited(folder / "users.parquet", lambda table: table.drop_columns(["segment"])),
        r"log: column 'segment' is absent, wanted it in one of .*users\.parquet",
    ),
    "column twice": (in_log(twice), r"2024-01-01\.parquet: column 'tab': got two of this name, wanted one"),
    "types that differ": (
        note_of_another_type,
        r"2024-01-02\.parquet: column 'note': got string, wanted int64 as in the log's first file",
    ),
    "side table without rows": (
        lambda folder: edited(folder / "users.parquet", lambda table: table.slice(0, 0)),
        r"log: users\.parquet: got no row, wanted a side table",
    ),
    "label out of range": (
        in_log(with_column("is_click", lambda column: pa.array([7] * len(column))), 1),
        r"2024-01-02\.parquet: column 'is_click': got 7.0, wanted 0 or 1 for task 'ctr'",
    ),
    "label of another type": (
        in_log(with_column("is_click", lambda column: pa.array(["yes"] * len(column))), 1),
        r"2024-01-02\.parquet: column 'is_click': .*'yes'.*, wanted double",
    ),
    "no label in a split": (
        in_log(with_column("is_click", lambda column: pa.array([NAN] * len(column))), 4, 5),
        r"split 'test': got \d+ rows and none of task 'ctr', wanted some of every task",
    ),
    "too few days": (
        lambda folder: [path.unlink() for path in log_files(folder)[4:]],
        r"split: got 4 days \(2024-01-01, .*\), wanted more than 4: 2 to validate, 2 to test, at least 1 to train on",
    ),
    "no date": (
        lambda folder: edited(
            folder / "videos.parquet", with_column("upload_date", lambda column: pa.array(["May"] * len(column)))
        ),
        "column 'upload_date': got 'May', wanted a date such as",
    ),
    "task of no name": (with_schema('name = "ctr"', 'name = "c.tr"'), "task 'c.tr': got a name"),
}


@pytest.mark.parametrize(("change", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_is_named_and_leaves_nothing(small_folder, tmp_path, change, message):
    folder = shutil.copytree(small_folder, tmp_path / "log")
    change(folder)
    before = contents(tmp_path)
    assert re.search(message, refusal("run", "--data", folder, "--out", tmp_path / "runs" / "out", *TINY))
    assert contents(tmp_path) == before


def test_no_folder_is_no_data(tmp_path):
    (tmp_path / "file").touch()
    before = contents(tmp_path)
    for name in ("absent", "file"):
        line = refusal("run", "--data", tmp_path / name, "--out", tmp_path / "out")
        assert line == f"{tmp_path / name}: got no folder, wanted a data set"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("missing", [None, NAN])
def test_a_missing_label_takes_a_row_from_its_task_only(small_folder, tmp_path, missing):
    folder = shutil.copytree(small_folder, tmp_path / "log")
    whole = prepare(folder, tmp_path / "whole").counts["train"]

    def without_labels_by_day(table):
        labels = [1.0 if hour < 12 else missing for hour in table["hour"].to_pylist()]
        return with_column("is_click", lambda column: pa.array(labels, pa.float64(), from_pandas=False))(table)

    in_log(without_labels_by_day, 0, 1)(folder)
    part = prepare(folder, tmp_path / "part").counts["train"]
    assert part["rows"] == whole["rows"]
    table = pa.concat_tables([pq.read_table(path) for path in log_files(folder)[:2]])
    distinct = table.group_by(table.column_names).aggregate([])
    mornings = sum(hour < 12 for hour in distinct["hour"].to_pylist())
    assert part["tasks"]["ctr"] == {"rows": mornings, "label_mean": 1}


def test_a_side_table_row_without_a_key_is_nobodys(small_folder, tmp_path):
    folder = shutil.copytree(small_folder, tmp_path / "log")
    # Beyond 2^53 a float does not tell one id from the next, and a missing key would make floats of them.
    far = pa.scalar(1 << 60, pa.int64())
    shift = with_column("user_id", lambda column: pc.add(column.cast(pa.int64()), far))
    in_log(shift)(folder)
    edited(folder / "users.parquet", shift)
    nobody = {name: pa.nulls(2, kind) for name, kind in zip(*_layout(folder / "users.parquet"), strict=True)}
    prepare(folder, tmp_path / "whole")
    edited(folder / "users.parquet", lambda table: pa.concat_tables([table, pa.table(nobody)]))
    prepare(folder, tmp_path / "part")
    whole, part = (Prepared.load(tmp_path / name).stream("test", 1 << 20).epoch(0) for name in ("whole", "part"))
    assert torch.equal(next(whole).features.single, next(part).features.single)


def _layout(path):
    schema = pq.read_schema(path)
    return schema.names, schema.types


def test_an_unknown_tracker_is_refused(tmp_path):
    for command in (("run",), ("experiment", "tickets", "--data", tmp_path)):
        line = refusal(*command, "--out", tmp_path / "out", "--tracker", "wandb")
        assert line == "tracker: got 'wandb', wanted one of none, tensorboard, mlflow"
    assert not (tmp_path / "out").exists()


def test_out_of_other_settings_is_refused_and_kept(finished):
    before = contents(finished)
    line = refusal("run", "--out", finished, *TINY, "--density", "0.5")
    assert line == f"{finished}/config.json: got density = 0.1, wanted 0.5; choose another --out"
    line = refusal("run", "--data", finished / "simulated", "--out", finished, *TINY, "--rounds", "2")
    assert "got rounds = 1, wanted 2" in line
    assert contents(finished) == before


def test_out_that_is_no_run_is_refused_and_kept(small_folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").touch()
    before = contents(tmp_path)
    line = refusal("run", "--data", small_folder, "--out", tmp_path / "file")
    assert line == f"{tmp_path / 'file'}: got a file, wanted a folder for the run"
    line = refusal("run", "--data", small_folder, "--out", tmp_path)
    assert line == f"{tmp_path / 'data'}: got files without prepared.json, wanted a new, an empty or an earlier folder"
    assert contents(tmp_path) == before


# Bad artefacts and candidates


def truncated(content):
    return content[:-1_000]


def altered(content):
    return content[:-1_000] + bytes([content[-1_000] ^ 1]) + content[-999:]


def foreign(content):
    return b"This is no artefact."


@pytest.mark.parametrize("command", ["inspect", "score"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncated, "model: got a damaged file .*, wanted an artefact"),
        (altered, r"model: the contents do not match their checksum \(tensor '.*'\), wanted an artefact"),
        (foreign, "model: got a damaged file .*, wanted an artefact"),
        (None, "model: no such file, wanted an artefact"),
    ],
)
def test_a_bad_artefact_is_refused(finished, tmp_path, command, change, message):
    path = tmp_path / "model"
    if change:
        path.write_bytes(change((finished / "model.safetensors").read_bytes()))
    before = contents(tmp_path)
    rest = () if command == "inspect" else (tmp_path / "candidates.parquet", tmp_path / "scores.parquet")
    assert re.search(message, refusal(command, path, *rest))
    assert contents(tmp_path) == before


def test_inspect_refuses_other_safetensors(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    line = refusal("inspect", tmp_path / "other.safetensors")
    assert line.endswith("other.safetensors: got safetensors of another kind, wanted an artefact (model.safetensors)")
    assert "got a folder, a device or a pipe, wanted an artefact" in refusal("inspect", tmp_path)


@pytest.fixture(scope="module")
def candidates(finished, tmp_path_factory):
    return candidates_of(finished / "simulated", ["2024-01-06"], tmp_path_factory.mktemp("candidates") / "scratch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "candidates.parquet: got .*, wanted Parquet"),
        (lambda table: b"garbage" * 10, "candidates.parquet: got .*, wanted Parquet"),
        (
            lambda table: table.drop_columns(["category"]),
            "candidates.parquet: column 'category' is absent, wanted every feature of the model",
        ),
        (
            with_column("hour", lambda column: pa.array([f"video {i}" for i in range(len(column))])),
            "candidates.parquet: column 'hour': .*'video \\d+'.*, wanted int64",
        ),
        (
            with_column("tags", lambda column: pa.array(np.arange(len(column)))),
            "candidates.parquet: column 'tags': .*wanted list<item: string>",
        ),
        (twice, "candidates.parquet: column 'tab': got two of this name, wanted one"),
    ],
    ids=["missing", "garbage", "column absent", "another type", "no list", "column twice"],
)
def test_bad_candidates_are_named(finished, candidates, tmp_path, change, message):
    path = tmp_path / "candidates.parquet"
    if change:
        table = change(candidates)
        path.write_bytes(table) if isinstance(table, bytes) else pq.write_table(table, path)
    before = contents(tmp_path)
    line = refusal("score", finished / "model.safetensors", path, tmp_path / "scores.parquet")
    assert re.search(message, line)
    assert contents(tmp_path) == before


def test_a_precision_that_cannot_be_is_refused(finished, uncalibrated, candidates, tmp_path):
    pq.write_table(candidates, tmp_path / "candidates.parquet")
    before = contents(tmp_path)
    rest = (tmp_path / "candidates.parquet", tmp_path / "scores.parquet", "--precision")
    line = refusal("score", finished / "model.safetensors", *rest, "fp8")
    assert line == "precision: got 'fp8', wanted one of fp32, bf16, int8"
    line = refusal("score", uncalibrated, *rest, "int8")
    assert line == f"{uncalibrated}: got no quantisation parameters, wanted an artefact that is calibrated for int8"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_scores_come_with_the_columns_that_are_kept(finished, candidates, tmp_path, kind):
    table = candidates.append_column("request", pa.array([f"r{i}" for i in range(len(candidates))]))
    path, out = tmp_path / "candidates.parquet", tmp_path / f"scores.{kind}"
    pq.write_table(table, path)
    assert invoke("score", finished / "model.safetensors", path, out, "--keep", "request, hour").exit_code == 0
    scores = pq.read_table(out) if kind == "parquet" else pyarrow.csv.read_csv(out)
    assert scores.column_names == ["request", "hour", "ctr", "cvr"]
    assert scores.select(["request", "hour"]).to_pydict() == table.select(["request", "hour"]).to_pydict()
    plain = tmp_path / "plain.parquet"
    assert invoke("score", finished / "model.safetensors", path, plain, "--keep", "").exit_code == 0
    plain = pq.read_table(plain)
    for task in plain.column_names:  # a float32 is printed with as many digits as tell it from the next
        assert np.array_equal(np.float32(scores[task].to_numpy()), plain[task].to_numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s.parquet", "--keep", "ghost"], "candidates.parquet: column 'ghost' is absent, wanted one of "),
        (["s.parquet", "--keep", "ctr"], "--keep: got 'ctr', the name of a task, wanted columns of other names"),
        (
            ["s.csv", "--keep", "tags"],
            "column 'tags': got lists, wanted an OUT that ends in .parquet for them",
        ),
        (["s.txt"], "OUT: got 's.txt', wanted a name that ends in .csv or .parquet"),
        (["s"], "OUT: got 's', wanted a name that ends in .csv or .parquet"),
    ],
)
def test_what_cannot_be_written_is_refused(finished, candidates, tmp_path, arguments, message):
    pq.write_table(candidates, tmp_path / "candidates.parquet")
    before = contents(tmp_path)
    out, *rest = arguments
    line = refusal("score", finished / "model.safetensors", tmp_path / "candidates.parquet", tmp_path / out, *rest)
    assert message in line
    assert contents(tmp_path) == before


def test_a_plan_and_another_precision_are_refused(finished, candidates, tmp_path):
    pq.write_table(candidates, tmp_path / "candidates.parquet")
    model, plan, out = finished / "model.safetensors", tmp_path / "plan.json", tmp_path / "s.parquet"
    assert invoke("plan", model, plan, "--batch", "1").exit_code == 0
    arguments = ("score", model, tmp_path / "candidates.parquet", out, "--plan", plan, "--precision")
    line = refusal(*arguments, "bf16")
    assert (
        line
        == "--precision: got bf16 beside a plan that was measured for fp32, wanted the same, or one of the two options"
    )
    assert not out.exists()
    assert invoke(*arguments, "fp32").exit_code == 0


def test_scores_need_a_place(finished, candidates, tmp_path):
    pq.write_table(candidates, tmp_path / "candidates.parquet")
    before = contents(tmp_path)
    for out in (tmp_path, tmp_path / "absent" / "scores.parquet", Path(tmp_path / "candidates.parquet" / "scores")):
        line = refusal("score", finished / "model.safetensors", tmp_path / "candidates.parquet", out)
        assert line == f"OUT: got '{out}', wanted a file in a folder that exists"
    assert contents(tmp_path) == before


def read_back(path):
    """Return a table of a file whose bytes are those that its name says."""
    is_parquet = path.read_bytes()[:4] == b"PAR1"
    assert is_parquet == (path.suffix == ".parquet")
    return pq.read_table(path) if is_parquet else pyarrow.csv.read_csv(path)


def test_scores_come_with_the_ids_of_the_candidates(finished, candidates, tmp_path):
    """The group, keys and what is no feature; but nothing that has a task's name."""
    extra = {"user_id": range(len(candidates)), "ctr": [0.5] * len(candidates), "note": ["x"] * len(candidates)}
    for name, values in extra.items():
        candidates = candidates.append_column(name, pa.array(values))
    pq.write_table(candidates.append_column("bag", pa.array([[1]] * len(candidates))), tmp_path / "candidates.parquet")
    for out in (tmp_path / "s.parquet", tmp_path / "s.csv"):
        assert invoke("score", finished / "model.safetensors", tmp_path / "candidates.parquet", out).exit_code == 0
        scores = read_back(out)
        assert scores.column_names == ["user_id", "note", "ctr", "cvr"]
        assert scores["user_id"].to_pylist() == list(extra["user_id"])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_scores_of_a_log_are_those_of_training(finished, tmp_path, kind, split):
    model, out = finished / "model.safetensors", tmp_path / f"scores.{kind}"
    prepared = Prepared.load(finished / "data")
    days = () if split == "test" else ("--days", split)
    assert invoke("score", model, out, "--data", finished / "simulated", *days).exit_code == 0
    scores = read_back(out)
    assert scores.column_names == ["user_id", "video_id", "date", "ctr", "cvr"]
    assert {str(day) for day in scores["date"].to_pylist()} == {*prepared.counts[split]["days"]}
    (batch,) = prepared.stream(split, 1 << 20, shuffle=False).epoch(0)
    assert scores["user_id"].to_pylist() == batch.groups.tolist()
    served = load(model).score_encoded(batch.features).numpy()
    assert np.array_equal(np.float32(np.stack([scores[task].to_numpy() for task in ("ctr", "cvr")], 1)), served)


@pytest.fixture
def url(finished):
    """The URL of the log of `finished`, in a memory that stands for a remote side."""
    system = fsspec.filesystem("memory")
    for path in (finished / "simulated").rglob("*"):
        if path.is_file():
            system.pipe_file(f"/bucket/shop/{path.relative_to(finished / 'simulated')}", path.read_bytes())
    yield "memory://bucket/shop"
    system.store.clear()


def test_data_at_a_url_are_those_of_the_folder(finished, url, requests, tmp_path):
    model = finished / "model.safetensors"
    for command in (("score", model), ("candidates", model, requests), ("features", model)):
        written = []
        for data in (finished / "simulated", url):
            out = tmp_path / ("features.safetensors" if command[0] == "features" else "out.parquet")
            assert invoke(*command, out, "--data", data, "-q").exit_code == 0
            written.append(out.read_bytes())
            out.unlink()
        assert written[0] == written[1]
    assert not [path for path in tmp_path.iterdir() if path != requests], "copies are removed"
    differences = [invoke("diff", model, model, "--data", data, "-q").stdout for data in (finished / "simulated", url)]
    assert differences[0] == differences[1]
    updated = []
    for data in (finished / "simulated", url):
        out = tmp_path / ("remote" if data == url else "local")
        assert invoke("update", model, "--data", data, "--out", out, "--batch-size", 512, "-q").exit_code == 0
        updated.append((out / "model.safetensors").read_bytes())
    assert updated[0] == updated[1]


def test_a_schema_is_drafted_from_a_url(url, tmp_path):
    system = fsspec.filesystem("memory")
    system.pipe_file("/bucket/people/people.csv", b"town,rich\n" + b"Ulm,1\nBonn,0\nUlm,0\n" * 40)
    drafted = invoke("schema", "memory://bucket/people", "--out", tmp_path / "schema.toml")
    assert 'name = "people"' in (tmp_path / "schema.toml").read_text()
    assert drafted.stdout.strip().endswith("lt4rec-sparse run --data memory://bucket/people")


def test_a_url_whose_package_is_absent_is_named(tmp_path, monkeypatch):
    known = importlib.import_module("fsspec.registry").known_implementations
    monkeypatch.setitem(known, "cloud", {"class": "no_such_package.System", "err": "Install cloudfs to access clouds"})
    line = "cloud://shop: got no package for it, wanted one: Install cloudfs to access clouds"
    assert refusal("run", "--data", "cloud://shop", "--out", tmp_path / "out") == line
    assert refusal("schema", "cloud://shop") == line
    assert refusal("experiment", "table2", "--data", "cloud://shop", "--out", tmp_path / "out") == line
    assert not contents(tmp_path)


def test_scores_of_named_days_with_columns_of_the_log(finished, tmp_path):
    model, out, data = finished / "model.safetensors", tmp_path / "s.parquet", finished / "simulated"
    days = ("--days", "2024-01-06, 2024-01-02", "--keep", "time_ms,is_click,date")
    assert invoke("score", model, out, "--data", data, *days).exit_code == 0
    scores = pq.read_table(out)
    assert scores.column_names == ["time_ms", "is_click", "date", "ctr", "cvr"]
    assert scores["date"].unique().to_pylist() == ["2024-01-02", "2024-01-06"]  # in the order of the log
    assert {*scores["is_click"].to_pylist()} == {0, 1}


@pytest.fixture
def requests(finished, tmp_path):
    """The first rows of the last day, without what was known only afterwards, and no order."""
    log = pq.read_table(finished / "simulated" / "log" / "2024-01-06.parquet")
    known = [name for name in log.column_names if name not in ("is_click", "long_view", "play_time_ms")]
    known = log.select([name for name in known if not name.startswith("truth")])
    path = tmp_path / "requests.csv"
    pyarrow.csv.write_csv(known.take(np.random.default_rng(0).permutation(len(known))[:200]), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_raw_requests_are_scored_as_the_log_is(finished, requests, tmp_path, kind):
    model, data, made = finished / "model.safetensors", finished / "simulated", tmp_path / f"candidates.{kind}"
    result = invoke("candidates", model, requests, made, "--data", data)
    assert (result.exit_code, result.stdout) == (0, "")
    assert invoke("score", model, made, tmp_path / "scores.csv").exit_code == 0
    scores = read_back(tmp_path / "scores.csv")
    keys, asked = ["time_ms", "user_id", "video_id"], read_back(requests)
    assert scores.select(keys).to_pydict() == asked.select(keys).to_pydict()
    assert invoke("score", model, tmp_path / "log.csv", "--data", data, "--keep", ",".join(keys)).exit_code == 0
    of_log = {tuple(row[key] for key in keys): row for row in read_back(tmp_path / "log.csv").to_pylist()}
    for row in scores.to_pylist():
        known = of_log[tuple(row[key] for key in keys)]
        assert (row["ctr"], row["cvr"]) == (known["ctr"], known["cvr"])


def test_an_update_says_what_changed_and_serves(finished, tmp_path):
    model, data, out = finished / "model.safetensors", finished / "simulated", tmp_path / "update"
    result = invoke("update", model, "--data", data, "--out", out, "--batch-size", 256, "-q")
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()
    assert re.fullmatch(r"on \S+: ctr AUC 0\.\d{5} before, 0\.\d{5} after; cvr MSE .* before, .* after", first)
    assert second == f"{out / 'model.safetensors'}, report.md, results.json"
    assert load(model).encoder.until < load(out / "model.safetensors").encoder.until
    assert invoke("score", out / "model.safetensors", tmp_path / "s.csv", "--data", data, "-q").exit_code == 0
    message = refusal("update", out / "model.safetensors", "--data", data, "--out", tmp_path / "next")
    assert message.startswith("--days: got 1 days after ")
    assert not (tmp_path / "next").exists()


def test_a_diff_says_what_differs_and_copies_are_equal(finished, tmp_path):
    model, data, out = finished / "model.safetensors", finished / "simulated", tmp_path / "other.safetensors"
    shutil.copy(model, out)
    assert invoke("diff", model, out).stdout == "equal: A and B have the same bytes\n"
    ranker = load(model)
    save(ranker, out, "int8")
    result = invoke("diff", model, out, "--data", data, "-q", "--top-k", 3)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["embeddings", "fp32", "int8"] in lines
    assert ["file", f"{model.stat().st_size:,}", f"{out.stat().st_size:,}"] in lines
    assert next(line for line in lines if line[:1] == ["layers.0"])[4:6] == ["0.0000", "0.0000"]
    told = json.loads(invoke("diff", model, out, "--data", data, "-q", "--top-k", 3, "--json").stdout)
    assert told["equal"] is False and told["facts"] == [["embeddings", "fp32", "int8"]]
    assert told["scores"]["k"] == 3 and set(told["scores"]["tasks"]) == {"ctr", "cvr"}
    assert told["scores"]["tasks"]["ctr"]["mean"] < 0.01
    assert set(told["layers"]["layers.0"]["masks"]) == {"ctr", "cvr"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--days", "test"], "--days: got 'test' without --data, wanted both"),
        (["--top-k", "0"], "--top-k: got 0, wanted at least 1"),
        (["--requests", "a.csv", "--data", "b"], "diff: got --requests and --data, wanted one of them"),
        (["--requests", "none.csv"], "none.csv"),
    ],
)
def test_a_diff_that_cannot_be_is_refused(finished, options, message):
    assert message in refusal("diff", finished / "model.safetensors", finished / "model.safetensors", *options)


def test_what_requests_lack_is_named(finished, requests, tmp_path):
    asked = read_back(requests).drop_columns(["tab", "date"])
    pyarrow.csv.write_csv(asked, requests)
    rest = (tmp_path / "candidates.csv", "--data", finished / "simulated", "--at", "2024-01-07", "-q")
    result = invoke("candidates", finished / "model.safetensors", requests, *rest)
    assert result.exit_code == 0
    assert result.stderr == f"missing in every row, since {requests} has none: tab\n"


def test_a_store_of_features_completes_requests(finished, tmp_path):
    model, out = finished / "model.safetensors", tmp_path / "features.safetensors"
    result = invoke("features", model, out, "--data", finished / "simulated", "-q")
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()
    ranker = load(model)
    store = FeatureStore.open(out, ranker.encoder.schema)
    assert first == f"{out}: {len(store.columns)} features by user_id, video_id"
    assert second == f"as of 2024-01-07; a request brings user_id, video_id, {', '.join(store.absent)}"
    own = {name: [None] * 3 for name in store.absent}
    ranked = ranker.rank(*store.complete({"video_id": [1, 2, 10**6], **own}, {"user_id": [3]}))
    assert sorted(ranked.rows.tolist()) == [0, 1, 2]
    result = invoke("features", model, out, "--data", finished / "simulated", "-q", "--at", "2024-01-03")
    assert result.exit_code == 0
    store.reload()
    assert store.day == "2024-01-03"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "{model}", "{tmp}/s.csv"], "s.csv, wanted CANDIDATES and OUT"),
        (
            ["score", "{model}", "a.csv", "{tmp}/s.csv", "--data", "{data}"],
            "s.csv, wanted OUT alone beside --data",
        ),
        (["score", "{model}", "a.csv", "{tmp}/s.csv", "--days", "test"], "--days: got 'test' without --data"),
        (["score", "{model}", "{tmp}/s.txt", "--data", "{data}"], "OUT: got 's.txt', wanted a name that ends in"),
        (["score", "{model}", "{tmp}/s.CSV", "--data", "{data}"], "OUT: got 's.CSV', wanted a name that ends in"),
        (
            ["score", "{model}", "{tmp}/s.csv", "--data", "{data}", "--days", "monday"],
            "--days: got 'monday', wanted train",
        ),
        (["score", "{model}", "{tmp}/s.csv", "--data", "{data}", "--days", ","], "--days: got ',', wanted train, "),
        (
            ["score", "{model}", "{tmp}/s.csv", "--data", "{data}", "--keep", "ghost"],
            "column 'ghost' is absent, wanted",
        ),
        (["score", "{model}", "{tmp}/s.csv", "--data", "{data}", "--keep", "ctr"], "--keep: got 'ctr', the name of a"),
        (["score", "{model}", "{tmp}/s.csv", "--data", "{tmp}/none"], "none: got no folder, wanted a data set"),
        (["candidates", "{model}", "{tmp}/r.csv", "{tmp}/c.csv"], "Missing option '--data'"),
        (["candidates", "{model}", "{tmp}/none.csv", "{tmp}/c.csv", "--data", "{data}"], "none.csv"),
        (["candidates", "{model}", "{tmp}/r.csv", "{tmp}/c.txt", "--data", "{data}"], "OUT: got 'c.txt', wanted"),
        (["candidates", "{model}", "{tmp}/r.csv", "{tmp}/none/c.csv", "--data", "{data}"], "in a folder that exists"),
        (
            ["features", "{model}", "{tmp}/f", "--data", "{data}", "--at", "6 May"],
            "--at: got day '6 May', wanted one in the form of the log's days, such as 2024-01-",
        ),
        (["features", "{model}", "{tmp}/none/f", "--data", "{data}"], "wanted a file in a folder that exists"),
    ],
)
def test_wrong_features_and_scores_are_refused_and_nothing_is_left(finished, tmp_path, arguments, message):
    (tmp_path / "r.csv").write_text("user_id,video_id\n1,2\n")
    before = contents(tmp_path)
    places = {"model": finished / "model.safetensors", "data": finished / "simulated", "tmp": tmp_path}
    assert message in refusal(*(argument.format(**places) for argument in arguments))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "{tmp}/model.csv", "{tmp}/r.csv", "{tmp}/r.csv"],
        ["score", "{tmp}/model.csv", "{tmp}/r.csv", "{tmp}/../{name}/model.csv"],
        ["candidates", "{tmp}/model.csv", "{tmp}/r.csv", "{tmp}/r.csv", "--data", "{tmp}"],
        ["features", "{tmp}/model.csv", "{tmp}/model.csv", "--data", "{tmp}"],
        ["plan", "{tmp}/model.csv", "{tmp}/model.csv"],
    ],
)
def test_no_result_takes_the_place_of_what_it_is_made_of(finished, tmp_path, arguments):
    shutil.copy(finished / "model.safetensors", tmp_path / "model.csv")
    (tmp_path / "r.csv").write_text("user_id,video_id\n1,2\n")
    before = contents(tmp_path)
    line = refusal(*(argument.format(tmp=tmp_path, name=tmp_path.name) for argument in arguments))
    assert re.fullmatch("OUT: got '.+', which is read, wanted another file", line)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("taken", ["log/2024-01-02.parquet", "videos.parquet"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "{model}", "{taken}", "--data", "{data}"],
        ["candidates", "{model}", "{tmp}/r.csv", "{taken}", "--data", "{data}"],
        ["features", "{model}", "{taken}", "--data", "{data}"],
    ],
)
def test_no_result_takes_the_place_of_a_file_of_the_data(finished, tmp_path, arguments, taken):
    data = shutil.copytree(finished / "simulated", tmp_path / "data")
    (tmp_path / "r.csv").write_text("user_id,video_id,date\n1,2,2024-01-03\n")
    places = {"model": finished / "model.safetensors", "tmp": tmp_path, "data": data}
    before = contents(tmp_path)
    for out in (data / taken, data / "log" / ".." / taken):
        line = refusal(*(argument.format(taken=out, **places) for argument in arguments))
        assert line == f"OUT: got {str(out)!r}, which is read, wanted another file"
        assert contents(tmp_path) == before


def test_scores_do_not_take_the_place_of_the_plan(finished, candidates, tmp_path):
    pq.write_table(candidates, tmp_path / "candidates.parquet")
    model, plan = finished / "model.safetensors", tmp_path / "plan.csv"
    assert invoke("plan", model, plan, "--batch", "1").exit_code == 0
    before = contents(tmp_path)
    line = refusal("score", model, tmp_path / "candidates.parquet", plan, "--plan", plan)
    assert line == f"OUT: got {str(plan)!r}, which is read, wanted another file"
    assert contents(tmp_path) == before


def refused_at_once(monkeypatch, *arguments):
    """Return the line of a refusal that comes before any row of a log, of candidates or of requests is read."""

    def read(*_):
        raise AssertionError("rows were read")

    monkeypatch.setattr("lt4rec_sparse.recsys.data.days.deal_log", read)
    monkeypatch.setattr("lt4rec_sparse.recsys.scoring.read_candidates", read)
    monkeypatch.setattr("lt4rec_sparse.recsys.data.complete_requests", read)
    return refusal(*arguments)


@pytest.mark.parametrize(
    ("out", "keep", "message"),
    [
        ("s.parquet", "ghost", "column 'ghost' is absent, wanted one of "),
        ("s.csv", "user_id,bag", "column 'bag': got lists, wanted an OUT that ends in .parquet for them"),
    ],
)
def test_columns_of_a_log_that_cannot_be_kept_are_refused_before_it_is_read(
    finished, tmp_path, monkeypatch, out, keep, message
):
    data = shutil.copytree(finished / "simulated", tmp_path / "data")
    in_log(with_column("bag", lambda table: pa.array([[1]] * len(table))))(data)
    rest = (finished / "model.safetensors", tmp_path / out, "--data", data, "--keep", keep)
    assert message in refused_at_once(monkeypatch, "score", *rest)


def test_lists_of_candidates_that_cannot_be_kept_are_refused_before_they_are_read(
    finished, candidates, tmp_path, monkeypatch
):
    model, path, out = finished / "model.safetensors", tmp_path / "candidates.parquet", tmp_path / "s.csv"
    pq.write_table(candidates.append_column("bag", pa.array([[1]] * len(candidates))), path)
    for name in ("tags", "bag"):
        line = refused_at_once(monkeypatch, "score", model, path, out, "--keep", name)
        assert line == f"column {name!r}: got lists, wanted an OUT that ends in .parquet for them"


def test_lists_of_requests_that_csv_cannot_hold_are_refused_before_the_log_is_read(finished, tmp_path, monkeypatch):
    asked = {"user_id": [1], "video_id": [2], "date": ["2024-01-03"], "bag": [[1]]}
    pq.write_table(pa.table(asked), tmp_path / "r.parquet")
    rest = (finished / "model.safetensors", tmp_path / "r.parquet", tmp_path / "c.csv", "--data")
    line = refused_at_once(monkeypatch, "candidates", *rest, finished / "simulated")
    assert line == "column 'bag': got lists, wanted an OUT that ends in .parquet for them"


def test_features_are_listed_without_reading_the_file_again(finished, tmp_path, monkeypatch):
    def opened(*_):
        raise AssertionError("the file was read again")

    monkeypatch.setattr(FeatureStore, "open", opened)
    rest = ("--data", finished / "simulated", "-q")
    assert invoke("features", finished / "model.safetensors", tmp_path / "features.safetensors", *rest).exit_code == 0
