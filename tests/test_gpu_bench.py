"""The GPU suites, rehearsed on the CPU: every line but a GPU's own runs, and the record says what was measured."""

import json
import os
import subprocess
import sys
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bench import gpu, gpu_peers, gpu_serving, gpu_training, record
from bench.gpu_peers import TaskLayer, opponents
from bench.gpu_stopwatch import GraphStopwatch, WallStopwatch
from lt4rec_sparse.lottery.pruning import tile_shape

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The finished process, and its record."""
    out = tmp_path_factory.mktemp("gpu") / "dry.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--dry", str(out), "--seconds", "600"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert out.exists(), done.stderr
    return done, json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.gpu_rehearsal
@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
class TestRehearsal:
    def test_every_case_ran_and_nothing_failed(self, rehearsal):
        done, result = rehearsal
        assert {name: suite["failed"] for name, suite in result["suites"].items()} == {name: [] for name in gpu.SUITES}
        assert {name: suite["dropped"] for name, suite in result["suites"].items()} == {name: [] for name in gpu.SUITES}
        assert done.returncode == 0 and gpu.is_whole(result), done.stdout
        assert result["is_dry"] and {"commit", "clean"} <= set(result["machine"])
        assert {"name", "torch", "triton", "cuda"} <= set(result["gpu"])

    def test_serving_times_every_opponent_and_has_a_ratio_to_each_kind(self, rehearsal):
        cases = rehearsal[1]["suites"]["serving"]["cases"]
        assert {case["batch"] for case in cases} == {1, 20}
        for case in cases:
            kinds = {facts["kind"] for facts in case["contestants"].values()}
            assert {"a", "b", "c", "b'", "ours"} <= kinds
            assert case["absent"] == {} and case["plan"]
            strongest = {f["kind"]: f for f in case["contestants"].values() if f.get("is_strongest")}
            assert set(strongest) == kinds and set(case["ratios"]) == kinds - {"ours"}
            engineered = [f["replayed"]["median_us"] for f in case["contestants"].values() if f["kind"] == "b'"]
            assert len(engineered) == 2 and strongest["b'"]["replayed"]["median_us"] == min(engineered)

    def test_a_training_step_is_timed_on_every_path(self, rehearsal):
        cases = {case["case"]: case for case in rehearsal[1]["suites"]["training"]["cases"]}
        first = cases["bf16 batch 20"]
        assert set(first["contestants"]) == {*gpu_training.PATHS, "eager", "torch.compile", "ours compiled"}
        assert set(first["ratios"]) == {"eager", "torch.compile"}
        assert "ours, DDP" in cases["bf16 DDP batch 20"]["contestants"]

    def test_every_kernel_has_a_fastest_tile_and_the_tables_choice_is_among_them(self, rehearsal):
        for case in rehearsal[1]["suites"]["kernels"]["cases"]:
            assert case["own"] in case["contestants"] and case["best"] in case["contestants"]
            assert case["own_over_best"] >= 1

    def test_the_tables_are_printed_last(self, rehearsal):
        done, result = rehearsal
        assert done.stdout.endswith(gpu.report(result) + "\n")
        for case in result["suites"]["serving"]["cases"]:
            assert f"| {case['network']} {case['structure']} |" in done.stdout

    def test_a_failed_step_shows_and_makes_the_record_not_whole(self, rehearsal):
        steps = [{"step": "install", "seconds": 3.0, "code": 1, "last": "no compiler"}]
        broken = {**rehearsal[1], "steps": steps}
        assert not gpu.is_whole(broken)
        assert "| install | 3 | 1 | no compiler |" in gpu.report(broken)

    def test_the_readme_shows_the_newest_record_and_no_rehearsal(self, rehearsal, tmp_path, monkeypatch):
        monkeypatch.setattr(record, "RESULTS", tmp_path)
        record.write("h200-abc", rehearsal[1])
        record.write("cpu", {"machine": {}})
        assert gpu.readme_section() == gpu.NOT_TIMED
        record.write("h200-def", {**rehearsal[1], "is_dry": False})
        assert gpu.serving_table(rehearsal[1]["suites"]["serving"]["cases"]) in gpu.readme_section()


def test_a_ratio_is_the_strongest_opponents_figure_to_ours():
    def facts(kind, us, weight_bytes, is_strongest=True):
        figures = {figure: {"median_us": us + i} for i, figure in enumerate(gpu_serving.FIGURES)}
        return {"kind": kind, "weight_bytes": weight_bytes, "is_strongest": is_strongest, **figures}

    found = gpu_serving.ratios(
        {"x": facts("ours", 1.0, 10), "y": facts("a", 4.0, 30), "z": facts("a", 2.0, 30, is_strongest=False)}
    )
    assert found == {"a": {"replayed": 4.0, "cold": 2.5, "called": 2.0, "waited": 1.75, "weight_bytes": 3.0}}


def test_a_training_ratio_is_to_our_fastest_step():
    facts = {
        name: {"called": {"median_us": us}, "peak_bytes": peak}
        for name, us, peak in (("ours", 2.0, 10), ("ours compiled", 1.0, 20), ("eager", 4.0, 30))
    }
    assert gpu_training.ratios(facts) == {"eager": {"called": 4.0, "peak_bytes": 3.0}}


def test_a_suite_has_its_share_of_what_is_left_and_leaves_the_others_their_minimum():
    waiting = list(gpu.SUITES)
    assert gpu.seconds_of_next(waiting, 1000.0) == pytest.approx(1000 * gpu.SUITES[waiting[0]])
    others = sum(gpu.MINIMUM_S[name] for name in waiting[2:])
    assert gpu.seconds_of_next(waiting[1:], others + 61.0) == 61
    assert gpu.seconds_of_next(waiting[1:], -5.0) == gpu.MINIMUM_S[waiting[1]]
    assert gpu.seconds_of_next(waiting[-1:], 99.0) == 99


def test_a_case_that_never_ends_leaves_a_record_of_those_before_it(tmp_path, monkeypatch):
    part, left = tmp_path / "part.json", []

    def measure():
        left.append(json.loads(part.read_text(encoding="utf-8")))
        return {}

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu_serving, "suite", lambda setting: iter([("first", measure), ("second", measure)]))
    assert gpu.run_suite("serving", 600, part, is_dry=True) == 0
    assert [found["dropped"] for found in left] == [["first", "second"], ["second"]]
    assert [len(found["cases"]) for found in left] == [0, 1]
    assert json.loads(part.read_text(encoding="utf-8"))["dropped"] == []


def test_steps_are_read_back_and_a_name_becomes_a_file_name(tmp_path):
    path = tmp_path / "steps.tsv"
    path.write_text("install\t12\t0\tok\nmemcheck\t3\t9\tERROR SUMMARY: 1 error\n", encoding="utf-8")
    assert gpu._steps(path)[1] == {"step": "memcheck", "seconds": 3.0, "code": 9, "last": "ERROR SUMMARY: 1 error"}
    names = {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100-sxm4-80gb", "": "gpu"}
    assert {name: gpu._slug(name) for name in names} == names


@pytest.mark.parametrize("structure", ["unstructured", "block32", "neuron"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95])
def test_masks_keep_whole_tiles_and_overlap_as_they_should(structure, sparsity):
    one, other = (mask["layers.0"] for mask in gpu_serving.masks((1024, 1024), structure, sparsity, 0))
    rows, columns = tile_shape("weight" if structure == "unstructured" else structure, (1024, 1024))
    for mask in (one, other):
        tiles = mask.view(1024 // rows, rows, 1024 // columns, columns).float().mean((1, 3))
        assert set(tiles.unique().tolist()) <= {0.0, 1.0}
        assert mask.float().mean().item() == pytest.approx(1 - sparsity, abs=0.01)
    overlap = (one & other).sum() / (one | other).sum()
    assert overlap.item() == pytest.approx(gpu_serving.OVERLAP, abs=0.03)


def test_two_to_four_masks_are_two_of_four():
    mlp, _ = gpu_serving.masked_network((32, 16, 16), "2:4", 0.5)
    for task in gpu_serving.TASKS:
        for mask in mlp.mask(task).values():
            assert mask.view(-1, 4).sum(1).max() <= 2


def test_every_case_of_the_issue_is_listed_once_and_the_goals_come_first():
    loads = gpu_serving.loads(is_dry=False)
    assert len(loads) == len(set(loads)) == 2 * 4 * 4 * 7
    assert [str(load) for load in loads[:3]] == [f"narrow unstructured 90% batch {b}" for b in (256, 2048, 8192)]
    assert str(loads[3]) == "wide block32 90% batch 8192"


@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("out_features", [1, 3])
def test_all_opponents_compute_the_same_network(tasks, out_features):
    """Small integers: exact, whatever the order of sums."""
    generator = torch.Generator().manual_seed(0)
    widths = (12, 8, 16, out_features)

    def layer(k, n, is_head):
        weight, bias = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((n, k), (n,)))
        return TaskLayer(weight, None if is_head else torch.rand(n, k, generator=generator) < 0.5, bias)

    made = [
        [layer(k, n, n == out_features) for k, n in zip(widths[:-1], widths[1:], strict=True)] for _ in range(tasks)
    ]
    x = torch.randint(-2, 3, (5, 12), generator=generator).float()
    expected, *others = [opponent.run(x) for opponent in opponents(made, "eager")]
    for logits in others:
        for got, want in zip(logits, expected, strict=True):
            assert torch.equal(got, want)


class FakeGraph:
    """Holds what was called while it was recorded, as a CUDA graph holds kernels."""

    recording = None

    def __init__(self):
        self.calls = []

    def replay(self):
        for call in self.calls:
            call()


@pytest.fixture
def fake_cuda(monkeypatch):
    """Let what drives CUDA run without it: a clock that counts work, and graphs that repeat it."""
    clock = SimpleNamespace(ms=0.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = clock.ms

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.ms - self.ms

    class Stream:
        def __init__(self, device=None, priority=0):
            pass

        def wait_stream(self, other):
            assert isinstance(other, Stream)

    @contextmanager
    def graph(made, stream):
        assert isinstance(stream, Stream)
        FakeGraph.recording = made
        yield
        FakeGraph.recording = None

    def work(ms):
        def kernel():
            clock.ms += ms

        (FakeGraph.recording.calls.append if FakeGraph.recording else lambda call: call())(kernel)

    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": FakeGraph,
        "graph": graph,
        "stream": lambda stream: nullcontext(),
        "current_stream": Stream,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 10),
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 3,
        "max_memory_allocated": lambda device: 10,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    gpu_peers._side.cache_clear()
    yield work
    gpu_peers._side.cache_clear()


def test_the_gpus_stopwatch_divides_by_its_repeats_and_takes_the_sweeps_off(fake_cuda, monkeypatch):
    stopwatch = GraphStopwatch(torch.device("cpu"))
    calls = {"short": lambda: fake_cuda(0.01), "long": lambda: fake_cuda(2.0)}
    for figure in (stopwatch.replayed, stopwatch.called):
        assert {name: timing.median_us for name, timing in figure(calls).items()} == pytest.approx(
            {"short": 10, "long": 2000}
        )
    monkeypatch.setattr(stopwatch, "_overwrite", lambda: fake_cuda(0.03))
    assert stopwatch.cold(calls)["short"].median_us == pytest.approx(10)
    assert stopwatch.waited({"idle": lambda: None})["idle"].median_us > 0
    assert stopwatch.peak_bytes(calls["short"]) == 7
    replay = stopwatch.graphed(lambda x: x + 1, torch.zeros(2))
    assert replay(torch.ones(2)).shape == (2,)
    GraphStopwatch(torch.device("cpu"))._overwrite()


def test_no_graph_is_destroyed_before_the_case_is_over(fake_cuda):
    stopwatch = GraphStopwatch(torch.device("cpu"))
    gone = []

    def call():
        # A graph that is recorded later sees those that are gone.
        gone.extend(seen() is None for seen in graphs)

    graphs = []
    for _ in range(2):
        stopwatch.replayed({"call": lambda: fake_cuda(0.1)})
        stopwatch.cold({"call": lambda: fake_cuda(0.1)})
        graphs = [weakref.ref(graph) for graph in stopwatch._graphs]
        call()
    assert len(graphs) == 8 and not any(gone)
    stopwatch.clear()
    call()
    assert all(gone[-8:])


def test_branches_compute_what_tasks_in_turn_do(fake_cuda):
    layers = [[(torch.randn(8, 4), torch.randn(8)), (torch.randn(1, 8), torch.randn(1))] for _ in range(3)]
    x = torch.randn(5, 4)
    (branches, _), (in_turn, _) = gpu_peers._branches(layers), gpu_peers._in_turn(layers)
    assert all(torch.equal(a, b) for a, b in zip(branches(x), in_turn(x), strict=True))


def test_the_stand_in_times_what_it_is_given():
    calls = []
    timings = WallStopwatch().replayed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == ["a", "b"] and timings["a"].median_us > 0


def test_a_copied_tree_without_git_has_the_commit_of_its_copier(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for name, wanted in (("abc", ("abc", True)), ("abc-dirty", ("abc", False))):
        monkeypatch.setenv(record.COMMIT, name)
        machine = record.machine()
        assert (machine["commit"], machine["clean"]) == wanted
    monkeypatch.delenv(record.COMMIT)
    assert record.machine()["commit"] == "unknown"
