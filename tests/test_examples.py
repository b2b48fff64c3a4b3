"""Each script in examples/ runs as a user runs it, prints its table, and what it says of itself is true."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import Layer, assert_rounding, mlp_reference
from torch import nn

import lt4rec_sparse
from examples import fit, from_deepsparse, prune_your_own, serve_pruned
from lt4rec_sparse import SparseMLP, to_onnx
from lt4rec_sparse.formats import BlockWeight

ROOT = Path(__file__).parents[1]


def layers_of(tower: nn.Sequential) -> list[Layer]:
    linears = [layer for layer in tower if isinstance(layer, nn.Linear)]
    activations = ["relu"] * (len(linears) - 1) + ["none"]
    return [
        Layer(layer.weight.detach(), layer.bias.detach(), activation)
        for layer, activation in zip(linears, activations, strict=True)
    ]


def test_a_model_of_ones_own_learns_while_it_is_pruned_to_blocks(capsys, monkeypatch):
    frozen = []
    freeze = prune_your_own.freeze
    monkeypatch.setattr(prune_your_own, "freeze", lambda model: frozen.append(freeze(model)) or frozen[0])
    (_, dense, _), (_, pruned, _) = prune_your_own.main()
    chance = 1 / prune_your_own.CLASSES
    assert pruned > (dense + chance) / 2 > chance
    calls = [module for module in frozen[0].modules() if isinstance(module, SparseMLP)]
    assert len(calls) == 3
    for call in calls:
        assert isinstance(call.network.hidden[0].weight, BlockWeight)
        assert call.network.densities[0] <= prune_your_own.DENSITY
    assert "blocks, 10% kept, frozen" in capsys.readouterr().out


@pytest.mark.heavy
def test_a_ranker_is_fitted_to_tables_and_the_best_come_first(capsys):
    ranker = fit.main()
    printed = capsys.readouterr().out
    assert ranker.tasks == ("is_click", "long_view")
    assert "play_time_ms" not in {column.name for column in ranker.schema.features}, "it says what the label is"
    assert f"auc {ranker.metrics['test']['is_click']['auc']:.3f}" in printed
    assert re.search(r"by their rows: \[\d, \d, \d\]", printed)


def test_each_way_in_computes_what_the_pruned_network_did():
    torch.manual_seed(1)
    tower, x = serve_pruned.pruned_by_torch(), torch.randn(16, 256)
    expected = mlp_reference(x, layers_of(tower))
    assert_rounding(serve_pruned.from_module(tower)(x), expected)
    layers = layers_of(tower)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        matrices = [layer.weight.to_sparse_csr() for layer in layers]
    assert_rounding(serve_pruned.from_csr(matrices, [layer.bias for layer in layers])(x), expected)
    table = serve_pruned.main()
    assert [name for name, *_ in table] == ["torch.nn.utils.prune", "CSR matrices", "state dict"]
    dense = sum(4 * parameter.numel() for parameter in serve_pruned.network().parameters())
    assert all(0 < nbytes < dense / 2 for *_, nbytes in table)


def test_the_move_from_deepsparse_computes_the_network():
    x = torch.randn(8, 512)
    (y,) = from_deepsparse.Engine(from_deepsparse.sparsified("weight")).run([x.numpy()])
    assert isinstance(y, np.ndarray)
    assert_rounding(torch.from_numpy(y), mlp_reference(x, layers_of(from_deepsparse.sparsified("weight"))))
    names = [f"{kept}, {p}" for kept in ("single weights", "blocks 16 x 4") for p in ("fp32", "int8")]
    of_file = ["from model.onnx, fp32"] if from_deepsparse.HAS_ONNX else []
    assert list(from_deepsparse.main()) == ["dense torch", *names, *of_file]


def test_the_table_of_the_move_runs_as_written(tmp_path, monkeypatch):
    """Its right column, from top to bottom; what is no Python is prose."""
    _, _, *lines = (from_deepsparse.__doc__ or "").partition("\n\n")[2].splitlines()
    code = [line[56:] for line in lines[: lines.index("")]]
    assert sum(map(is_python, code)) == len(code) - 1
    monkeypatch.chdir(tmp_path)
    model, rows = from_deepsparse.sparsified("weight"), torch.randn(100, 512)
    if from_deepsparse.HAS_ONNX:
        to_onnx(SparseMLP.from_sequential(model), "model.onnx")
    names = {"model": model, "rows": rows, "x": rows[:3].numpy(), "torch": torch}
    names |= {name: getattr(lt4rec_sparse, name) for name in ("freeze", "from_onnx", "report")}
    threads = torch.get_num_threads()
    try:
        for line in filter(is_python, code):
            if "from_onnx" not in line or from_deepsparse.HAS_ONNX:
                exec(line, names)
    finally:
        torch.set_num_threads(threads)
    assert {call.precision for call in names["int8"].modules() if isinstance(call, SparseMLP)} == {"int8"}


def is_python(line: str) -> bool:
    try:
        compile(line, "table", "exec")
    except SyntaxError:
        return False
    return True


# Those of clusters need one: tests/recsys/test_scoring.py calls them.
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if not path.name.startswith("score_on_"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs_as_a_script_without_a_warning(path):
    command = [sys.executable, "-W", "error", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3
