"""Cases for pytest-benchmark, one layer at a time, to compare two builds or two machines; and the suites' short forms.

`pytest tests/test_benchmarks.py -n0 --benchmark-enable --benchmark-save=before`, then with `--benchmark-compare`. They
rank nothing: the interleaved ratios of `python -m bench cpu` do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels.networks import PATHS, Kernel, exact_reference, prepack, random_layer, random_mask
from oracle import Bounded, assert_exact, assert_rounding, linear_reference, mlp_reference
from serve.models import small_ranker

from bench import daily, record, served, serving, tables
from bench.__main__ import main
from bench.cpu import PRECISIONS, ratio, speed_table
from bench.training import embedding_steps
from lt4rec_sparse import MaskedMLP, Ranker, freeze, ops, save
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings

ROOT = Path(__file__).parents[1]
IN_FEATURES, OUT_FEATURES = 1024, 512
OPERANDS = {"fp32": None, "bf16": torch.bfloat16}

needs_engine = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")


@needs_engine
@pytest.mark.parametrize("density", [0.2, 0.05])
@pytest.mark.parametrize("batch", [1, 8, 64, 256])
@pytest.mark.parametrize(
    ("precision", "path"),
    PATHS,
)
def test_one_sparse_layer(benchmark: Any, precision: str, path: Any, batch: int, density: float) -> None:
    """One layer of the engine, one thread."""
    mask = random_mask(OUT_FEATURES, IN_FEATURES, density, seed=0)
    layer = random_layer(mask, "relu", seed=1, integers=False)
    prepacked = prepack([[layer]], precision)
    x = torch.randn(batch, IN_FEATURES, generator=torch.Generator().manual_seed(2))
    benchmark.extra_info |= {"isa": cpu.isa(), "density": density}
    y = benchmark(Kernel(precision, path, cpu.isa()).run, x, prepacked)
    if precision == "int8":
        assert_exact(y, exact_reference(x, [[layer]], precision))
    else:
        assert_rounding(y, mlp_reference(x, [layer.dense()], operands=OPERANDS[precision]))


@pytest.mark.parametrize("batch", [256, 1024])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_masked_linear(benchmark: Any, direction: str, batch: int) -> None:
    """A layer in training, or both of its gradients."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT_FEATURES, IN_FEATURES, generator=generator, requires_grad=True)
    mask = torch.rand(OUT_FEATURES, IN_FEATURES, generator=generator) < 0.2
    x = torch.randn(batch, IN_FEATURES, generator=generator, requires_grad=True)
    effective = weight.detach() * mask
    if direction == "forward":
        y = benchmark(ops.masked_linear, x.detach(), weight.detach(), mask)
        assert_rounding(y, linear_reference(x.detach(), effective, None, torch.float32))
        return
    y = ops.masked_linear(x, weight, mask)
    dy = torch.randn(y.shape, generator=generator)
    dx, dw = benchmark(torch.autograd.grad, y, (x, weight), dy, retain_graph=True)
    assert_rounding(dx, linear_reference(dy, effective.T, None, torch.float32))
    kept = linear_reference(dy.T, x.detach().T, None, torch.float32)
    assert_rounding(dw[mask], Bounded(kept.value[mask], kept.bound[mask]))
    assert_exact(dw[~mask], torch.zeros_like(dw[~mask]))


def case(**medians: float) -> dict[str, Any]:
    """A case of one batch, from medians by name; names say kind and precision."""
    kinds = {name: name.split("_") for name in medians}
    calls = {n: {"kind": kinds[n][0], "precision": kinds[n][1], "median_us": us} for n, us in medians.items()}
    return {"threads": 1, "sparsity": 0.9, "batch": 8, "contestants": calls}


def test_a_ratio_is_the_best_dense_opponents_to_the_engine_in_this_precision_or_a_finer_one() -> None:
    measured = case(ours_fp32=2.0, ours_bf16=8.0, dense_fp32_slow=9.0, dense_fp32=6.0, dense_bf16=4.0, sparse_fp32=1.0)
    assert ratio(measured, "fp32") == 3.0
    assert ratio(measured, "bf16") == 2.0


def test_a_precision_that_no_opponent_has_leaves_its_cells_empty() -> None:
    result = {"cases": [case(ours_fp32=2.0, ours_bf16=8.0, ours_int8=1.0, dense_fp32=6.0)]}
    cells = [speed_table(result, precision).splitlines()[-1] for precision in PRECISIONS]
    assert cells == ["| 1 | 90% | 3.0 |", "| 1 | 90% |  |", "| 1 | 90% |  |"]


def bench(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_engine
@pytest.mark.bench_short
def test_the_cpu_suites_run_in_their_short_form() -> None:
    printed = bench("cpu", "--short")
    assert "### Single weights, against dense fp32" in printed and "ours int8" in printed and "torch fp32" in printed
    assert "### Blocks of 16 x 4, against dense int8" in printed and "blocks bf16" in printed
    assert "raised" not in printed  # a reason for an absence that we would not know of
    assert "ours bf16" in bench("no-amx", "--short", ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")


@needs_engine
@pytest.mark.bench_short
def test_the_suites_of_wide_layers_and_of_the_default_run_in_their_short_forms() -> None:
    assert "| 64 x 32 | 2 | 90% |" in bench("wide", "--short")
    printed = bench("default", "--short")
    assert "| 2 | 20% |" in printed and "The chosen layout takes at most" in printed


@needs_engine
@pytest.mark.bench_short
def test_the_suite_of_whole_networks_runs_in_its_short_form() -> None:
    printed = bench("networks", "--short")
    assert "| DLRM | 2 | 1 |" in printed and "torch compiled fp32" in printed
    assert "raised" not in printed  # a reason for an absence that we would not know of


@pytest.mark.bench_short
def test_the_suite_of_sparse_training_runs_in_its_short_form() -> None:
    printed = bench("sparse-training", "--short")
    assert all(f"| {way}, 90% |" in printed for way in ("blocks", "single weights")), printed


@pytest.mark.bench_short
def test_the_training_suite_runs_in_its_short_form(small_log: Any) -> None:
    measured = json.loads(bench("training", str(small_log.folder), "--short"))
    assert set(measured["steps"]["rows_per_second"]) >= {"lt4rec_sparse, fp32", "lt4rec_sparse, bf16"}
    assert measured["search"]["ours_s"] > 0 and measured["search"]["plain_s"] > 0
    assert {part["steps"] for part in measured["joint"]} == {"dense", "kept weights alone"}
    assert len(measured["embeddings"]["timings_us"]) == 3


@pytest.mark.bench_short
def test_the_daily_suite_runs_in_its_short_form(small_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["daily", str(small_folder), "--short"]) == 0
    measured = json.loads(capsys.readouterr().out)
    (of_day,) = measured["seeds"]["0"]
    assert of_day["day"] == measured["days"][3] and of_day["grown"] > 0
    assert list(of_day["metrics"]) == ["alone", "updated", "anew"]
    lines = daily.daily_table(measured).splitlines()
    assert lines[2].startswith(f"| {of_day['day']} | {of_day['metrics']['alone']['ctr']['auc']:.4f} |")
    assert lines[3].startswith("| mean |") and "ctr AUC, updated against alone: " in lines[-1]


@pytest.mark.bench_short
def test_the_suite_of_long_logs_runs_in_its_short_form() -> None:
    measured = json.loads(bench("prepare", "--short"))
    assert list(measured["stage_seconds"]) == ["read log", "order days", "fit", "encode"]
    assert measured["imported_bytes"] < measured["high_water_bytes"] < 1 << 30
    assert measured["prepared_bytes"] > 0 and measured["video_ids"] > 2


@needs_engine
@pytest.mark.bench_short
def test_the_suite_of_servers_runs_in_its_short_form(tmp_path: Path) -> None:
    save(small_ranker(), tmp_path / "model.safetensors")
    *printed, soaked = bench("serving", str(tmp_path), "--short").splitlines()
    for name in ("engine fp32", "engine int8", "dense torch fp32", "dense ONNX Runtime int8"):
        assert sum(line.startswith(f"| {name} |") for line in printed) == 1
    counts = json.loads(soaked)
    assert counts["lost"] == counts["wrong"] == 0 and counts["answered"] > 0 and counts["refused"] > 0


@pytest.mark.bench_short
def test_the_suite_of_several_processes_runs_in_its_short_form(small_log: Any) -> None:
    (case,) = json.loads(bench("processes", str(small_log.folder), "--short"))
    assert len(case["one_ms"]) == len(case["two_ms"]) == 1 and min(*case["one_ms"], *case["two_ms"]) > 0


def test_a_run_of_servers_ends_within_its_time_and_drops_a_model_after_two_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(small_ranker(), tmp_path / "model.safetensors")
    now, asked = [0.0], []

    def case(url: str, bodies: Any, rate: float, seconds: float, seed: int, core: int) -> dict[str, Any]:
        now[0] += seconds + serving.OVERHEAD_S
        asked.append((url, round(rate), seconds))
        tries = sum(name == url and at == round(rate) for name, at, _ in asked)
        is_slow = url == "dense torch fp32" or (url == "engine fp32" and tries == 1)
        late_ms = 4.1 if url == "engine int8" and rate > 30 else 3.9
        return {"rate": rate, "p50_ms": 1.0, "p99_ms": 20.1 if is_slow else 19.9, "failed": 0, "late_ms": late_ms}

    @contextmanager
    def named(artefact: Path, model: Any, core: int) -> Any:
        yield next(name for name, known in serving.MODELS.items() if known is model)

    ranker = small_ranker()
    monkeypatch.setattr(serving, "server", named)
    monkeypatch.setattr(serving, "_case", case)
    monkeypatch.setattr(serving, "load", lambda path: ranker)
    monkeypatch.setattr(serving, "best", lambda url, body: ranker.rank(given[0], k=serving.K).rows.tolist())
    given = [serving.columns(serving.examples.made(ranker.encoder, 1, serving.CANDIDATES)[0])]
    monkeypatch.setattr(serving.time, "monotonic", lambda: now[0])
    measured = serving.measure(tmp_path / "model.safetensors", serving.Load())
    assert 600 < now[0] <= serving.Load().budget_s < 12 * 60
    rates = {name: [at for url, at, _ in asked if url == name] for name in serving.MODELS}
    assert rates["dense torch fp32"] == [20, 20] and rates["engine int8"] == [20, 26, 34, 34]
    assert rates["engine fp32"][:4] == [20, 20, 26, 26] and rates["dense ONNX Runtime int8"][:3] == [20, 26, 34]
    page = serving.table_of(measured)
    assert "| dense torch fp32 | < 20 |" in page and "| engine int8 | ≥ 26 |" in page


@needs_engine
@pytest.mark.parametrize("loader", ["dense_torch", "dense_onnx_int8"])
def test_an_opponent_of_the_server_takes_its_inputs_from_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    if loader == "dense_onnx_int8":
        pytest.importorskip("onnxruntime", reason="the runtime is an extra")
    ranker = small_ranker()
    save(ranker, tmp_path / "model.safetensors")
    (request,) = serving.examples.made(ranker.encoder, 1, serving.CANDIDATES)
    opponent = getattr(served, loader)(str(tmp_path / "model.safetensors"), "fp32")
    monkeypatch.delattr(type(opponent.encoder), "encode")
    best, wanted = (of.rank(served.columns(request), k=serving.K).rows.tolist() for of in (opponent, ranker))
    assert len({*best} & {*wanted}) >= serving.AGREED


def test_a_record_of_training_may_lack_large_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    older = next(iter(record.read("training").values()))
    older.pop("embeddings", None)
    newer = older | {"embeddings": embedding_steps((50, 4), rounds=1)}
    pages = []
    for found in (older, newer):
        monkeypatch.setattr(record, "read", lambda name, found=found: {"a processor": found})
        pages.append(tables.SECTIONS["training"]())
    assert pages[1].startswith(pages[0])
    assert "1,024 rows of a table of 50 x 4" in pages[1] and "SparseAdam" in pages[1]
    assert "SparseAdam" not in pages[0]


@pytest.mark.bench_short
def test_the_suite_of_requests_runs_in_its_short_form(
    small_log: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(small_log.encoder.fields, small_log.encoder.table_sizes, dim=4)
    mlp = freeze(MaskedMLP(inputs.out_features, (8,), tasks=("ctr", "cvr")), sigmoid=True)
    ranker = Ranker(small_log.encoder, inputs, mlp.calibrated(torch.randn(100, inputs.out_features)))
    save(ranker, tmp_path / "model.safetensors")
    (tmp_path / "data").symlink_to(small_log.folder)
    measured = json.loads(bench("request", str(tmp_path), "--short"))
    timed = measured["artefacts"]["model.safetensors"]["1"]["timings_us"]
    assert list(timed) == ["1", "256", "1024"] and measured["in_common"] > 0
    monkeypatch.setattr(record, "read", lambda name: measured)
    page = tables.SECTIONS["request"]()
    assert "| ours: rank, int8 |" in page and "| onnxruntime, int8 |" in page


@pytest.mark.bench_short
def test_the_suite_of_embeddings_runs_in_its_short_form(small_log: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(small_log.encoder.fields, small_log.encoder.table_sizes, dim=4)
    mlp = MaskedMLP(inputs.out_features, (8,), tasks=("ctr", "cvr"))
    save(Ranker(small_log.encoder, inputs, freeze(mlp, sigmoid=True)), tmp_path / "model.safetensors")
    (tmp_path / "data").symlink_to(small_log.folder)
    measured = json.loads(bench("embeddings", str(tmp_path), "--short"))
    assert list(measured["judged"]) == ["fp32", "fp16", "int8"]
    fp32, fp16, int8 = (of_kind["embedding_bytes"] for of_kind in measured["judged"].values())
    assert (fp16 * 2, int8 * 2) == (fp32, fp32), "four numbers and a scale per row"
