import json
from dataclasses import replace
from importlib import import_module
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Layer, assert_exact, assert_rounding, mlp_reference, small_integers

from lt4rec_sparse import Mask, MaskedLinear, MaskedMLP, Ranker, SparseMLP, freeze, save
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.lottery import random_masks
from lt4rec_sparse.network import PRECISIONS, QuantizationParameters
from lt4rec_sparse.nn.plan import Plan, measure
from lt4rec_sparse.nn.plan.plan import DENSE_KERNELS, BatchPlan, Segment, TimedChain
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.stopwatch import Timing

measurement = import_module("lt4rec_sparse.nn.plan.measure")  # the package has a function of this name
needs_engine = pytest.mark.skipif(not cpu.is_available(), reason=f"no engine: {cpu.absence_reason()}")

TASKS = ("ctr", "cvr", "like")
BATCHES = (0, 1, 7, 65)


class Clock:
    """A stopwatch that runs everything once and says what the test wants: `us` of a name, else 2 us."""

    def __init__(self):
        self.us = {}

    def __call__(self, calls, **settings):
        for call in calls.values():
            call()
        return {name: Timing(us, us * 0.9, us * 1.1) for name in calls for us in [self.us.get(str(name), 2.0)]}


@pytest.fixture
def stopwatch(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measurement, "interleaved", clock)
    return clock


def integer_mlp(n_tasks, widths=(20, 12, 6), density=0.4, sigmoid=False):
    """Small integers everywhere: every precision, int8 with steps of 1 too, gives the same scores."""
    tasks, generator = TASKS[:n_tasks], torch.Generator().manual_seed(n_tasks)
    masked = MaskedMLP(widths[0], widths[1:], tasks=tasks)
    for parameter in masked.parameters():
        parameter.data = small_integers(*parameter.shape, generator=generator).clamp(-1, 1)
    shapes = masked.mask(tasks[0]).shapes
    for task in tasks:
        nnz = {name: round(rows * columns * density) for name, (rows, columns) in shapes.items()}
        masked.set_mask(Mask.random(shapes, nnz, generator), task)
    frozen = freeze(masked, sigmoid=sigmoid)
    steps = [QuantizationParameters(1.0, zero_point) for zero_point in (8, *[0] * (len(widths) - 1))]
    return masked, SparseMLP(frozen.network.with_quantization(dict.fromkeys(tasks, steps)))


def reference(masked, task, x, accumulate=torch.float32, head="none"):
    mask, layers = masked.mask(task), masked.masked_layers()
    hidden = [Layer(y.weight.detach() * mask[f"layers.{i}"], y.bias.detach(), "relu") for i, y in enumerate(layers)]
    last = Layer(masked.heads[task].weight.detach(), masked.heads[task].bias.detach(), head)
    return mlp_reference(x, [*hidden, last], accumulate)


def with_chain(plan, *chain, batch=1):
    """The plan with one batch size, whose winner is `chain`."""
    timing = Timing(1.0, 1.0, 1.0)
    return replace(plan, batches=(BatchPlan(batch, (TimedChain("mixed", chain, timing),), ()),))


def all_chains(plan):
    """Every way through the network of the segments that the plan has timed."""
    segments = [segment for segment, _ in plan.batches[0].segments]
    layers = 1 + max(segment.last for segment in segments)
    chains = []
    for n in range(layers):
        for cuts in combinations(range(1, layers), n):
            spans = list(zip((0, *cuts), (*cuts, layers), strict=True))
            chains += product(*([s for s in segments if (s.first, s.last + 1) == span] for span in spans))
    return chains


@pytest.mark.parametrize(
    "widths, n_tasks, precision", [((20, 12, 6), 3, "fp32"), ((20, 12, 6), 1, "bf16"), ((20, 12), 2, "int8")]
)
def test_every_chain_gives_the_scores(stopwatch, widths, n_tasks, precision):
    masked, frozen = integer_mlp(n_tasks, widths)
    plan = measure(frozen.network, (1,), precision)
    chains = all_chains(plan)
    assert {segment for chain in chains for segment in chain} == dict(plan.batches[0].segments).keys()
    generator = torch.Generator().manual_seed(0)
    inputs = [small_integers(batch, 20, generator=generator) for batch in BATCHES]
    for chain in chains:
        planned = frozen.planned(with_chain(plan, *chain))
        for x in inputs:
            y = planned(x)
            out = torch.full_like(y, torch.nan)
            planned.score_into(x, out)
            assert_exact(out, y)
            assert_exact(planned(x.T.contiguous().T), y)
            assert_exact(planned(x.bfloat16()), y.bfloat16())  # integers of few bits
            if any(segment.precision == "int8" for segment in chain):
                # A scale of the weights is no power of two, and costs a rounding of float32.
                for t, task in enumerate(masked.tasks):
                    assert_rounding(y[:, t : t + 1], reference(masked, task, x))
            else:
                assert_exact(y, masked(x).detach())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_chain_stays_within_rounding(stopwatch, precision):
    masked, _ = integer_mlp(2)
    generator = torch.Generator().manual_seed(0)
    for parameter in masked.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    frozen = freeze(masked, sigmoid=True)
    plan = measure(frozen.network, (1,), precision)
    accumulate = torch.float32 if precision == "fp32" else torch.bfloat16
    x = torch.randn(33, 20, generator=generator)
    for chain in all_chains(plan):
        y = frozen.planned(with_chain(plan, *chain))(x)
        for t, task in enumerate(masked.tasks):
            assert_rounding(y[:, t : t + 1], reference(masked, task, x, accumulate, "sigmoid"))


@settings(max_examples=15)
@given(us=st.lists(st.integers(1, 1000), min_size=40, max_size=40))
def test_the_mixture_is_the_fastest_sum_of_segments(us):
    _, frozen = integer_mlp(2, widths=(5, 4, 3))
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "interleaved", clock)
        segments = measure(frozen.network, (1,), "bf16").batches[0].segments
        clock.us = {str(segment): float(x) for (segment, _), x in zip(segments, us, strict=False)}
        plan = measure(frozen.network, (1,), "bf16")

    def total(chain):
        return sum(clock.us[str(segment)] for segment in chain)

    def is_joined(chain):  # neighbours in the engine are always one segment
        return not any(a[:2] == b[:2] and a.kernel == "sparse" for a, b in zip(chain[:-1], chain[1:], strict=True))

    fastest = min(total(chain) for chain in all_chains(plan) if is_joined(chain))
    assert min(total(x.chain) for x in plan.batches[0].chains) == fastest


@needs_engine
@pytest.mark.parametrize("fastest", ["sparse fp32", "dense fp32", "sparse bf16", "dense bf16", "sparse int8", "mixed"])
def test_the_fastest_measured_wins(stopwatch, fastest):
    if fastest == "dense bf16" and not measurement.dense_kernels("bf16"):
        pytest.skip("no bfloat16 arithmetic on this CPU")
    _, frozen = integer_mlp(2)
    # Dense layers are fast alone, bf16 more so, so that no two ways are the same: the mixture ends in the engine.
    lowest = "bf16" if measurement.dense_kernels("bf16") else "fp32"
    layer_us = {f"dense {lowest} 0": 0.1, f"dense {lowest} 1": 0.1, "dense fp32 2": 0.5, "sparse fp32 2": 0.2}
    stopwatch.us = {**layer_us, fastest: 1.0}
    plan = measure(frozen.network, (1, 8), "int8")
    for batch in plan.batches:
        times = [x.timing.median_us for x in batch.chains]
        assert times == sorted(times)
        assert batch.chains[0].name == fastest
        assert {x.name for x in batch.chains} >= {"sparse fp32", "dense fp32", "sparse bf16", "sparse int8"}


@needs_engine
def test_every_layout_is_measured_and_the_fastest_served(stopwatch):
    """The engine's own choice follows from thresholds; a plan knows better."""
    _, frozen = integer_mlp(2)
    x = small_integers(7, 20, generator=torch.Generator().manual_seed(0))
    for precision, layouts in {
        "fp32": cpu.UNSTRUCTURED,
        "bf16": cpu.UNSTRUCTURED,
        "int8": ("tables", "slices"),
    }.items():
        for layout in layouts:
            stopwatch.us = {f"{layout} {precision}": 1.0}
            plan = measure(frozen.network, (7,), precision)
            assert plan.batches[0].chains[0].name == f"{layout} {precision}"
            planned = frozen.planned(plan)
            assert_exact(planned(x), frozen.to_precision(precision)(x))


@needs_engine
def test_a_network_in_blocks_has_one_layout(stopwatch):
    masked = MaskedMLP(64, (32, 16), tasks=("t",))
    shapes = masked.mask("t").shapes
    masked.set_mask(random_masks(shapes, 0.5, ("t",), torch.Generator().manual_seed(0), "16x4")["t"], "t")
    frozen = freeze(masked)
    plan = measure(frozen.network, (1,))
    assert not {segment.kernel for segment, _ in plan.batches[0].segments} & {"blocks", *cpu.UNSTRUCTURED}
    with pytest.raises(InputError, match="plan: got slices in fp32, wanted what the network has: blocks"):
        frozen.planned(with_chain(plan, Segment("slices", "fp32", 0, 2)))


@needs_engine
@pytest.mark.parametrize("dense_us, winner", [(1.0, "sparse fp32"), (0.99, "sparse fp32"), (0.95, "dense fp32")])
def test_a_tie_goes_to_the_engine(stopwatch, dense_us, winner):
    stopwatch.us = {"sparse fp32": 1.0, "dense fp32": dense_us}
    plan = measure(integer_mlp(1)[1].network, (1,))
    assert plan.batches[0].chains[0].name == winner


@needs_engine
def test_only_the_precisions_allowed_are_candidates(stopwatch):
    _, frozen = integer_mlp(2)
    for i, precision in enumerate(PRECISIONS):
        segments = measure(frozen.network, (1,), precision).batches[0].segments
        assert {segment.precision for segment, _ in segments} == set(PRECISIONS[: i + 1])
        assert not any(s.kernel in DENSE_KERNELS and s.precision == "bf16" and s.last == 2 for s, _ in segments)


def test_the_real_stopwatch_plans_and_the_plan_reads_well():
    masked, frozen = integer_mlp(2)
    plan = measure(frozen.network, (1, 8))
    x = small_integers(9, 20, generator=torch.Generator().manual_seed(0))
    assert_exact(frozen.planned(plan)(x), masked(x).detach())
    text = str(plan)
    assert "20 -> 12 -> 6 -> 1, densities 40%, 40%, 100%, tasks 2, precision fp32" in text
    assert text.count("*") == 2
    assert text.count("dense fp32 ") >= 2


@needs_engine
def test_a_batch_follows_the_nearest_size_by_ratio(stopwatch):
    _, frozen = integer_mlp(1, density=0.05)
    plan = measure(frozen.network, (1,))
    sparse = with_chain(plan, Segment("sparse", "fp32", 0, 2), batch=1).batches
    dense = with_chain(plan, *(Segment("dense", "fp32", i, i) for i in range(3)), batch=64).batches
    planned = frozen.planned(replace(plan, batches=sparse + dense))
    # A dense product multiplies a pruned weight by Inf, the engine does not.
    column = int((~frozen.network.hidden[0].weight.union().any(0)).nonzero()[0])
    for batch, is_dense in ((1, False), (8, False), (9, True), (64, True), (1000, True)):
        x = torch.zeros(batch, 20)
        x[:, column] = torch.inf
        assert bool(planned(x).isnan().any()) == is_dense
    assert planned(torch.zeros(0, 20)).shape == (0, 1)


def test_one_task_and_any_leading_dimensions(stopwatch):
    masked, frozen = integer_mlp(3)
    planned = frozen.planned(measure(frozen.network, (1,)))
    x = small_integers(2, 3, 20, generator=torch.Generator().manual_seed(0))
    assert_exact(planned(x), torch.cat([masked(x, task) for task in TASKS], dim=-1).detach())
    for t, task in enumerate(TASKS):
        assert_exact(planned(x, task), planned(x)[..., t : t + 1])
    with pytest.raises(ValueError, match="task: got 'share', wanted one of ctr, cvr, like"):
        planned(x, "share")
    with pytest.raises(ValueError, match=r"x: got shape \(2, 5\), wanted \[batch, 20\]"):
        planned(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"x: got torch.float64, wanted torch.float32"):
        planned(x.double())
    for name in ("network", "tasks", "in_features", "out_features", "nbytes"):
        assert getattr(planned, name) == getattr(frozen, name)


def test_a_linear_layer_is_planned_too(stopwatch):
    layer = MaskedLinear(9, 4, tasks=("a", "b"))
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = small_integers(*parameter.shape, generator=generator)
    layer.set_mask(torch.rand(4, 9, generator=generator) < 0.4, "a")
    frozen, x = freeze(layer), small_integers(5, 9, generator=generator)
    plan = measure(frozen.network, (1,))
    for chain in all_chains(plan):
        y = frozen.planned(with_chain(plan, *chain))(x)
        assert_exact(y, torch.cat([layer(x, "a"), layer(x, "b")], dim=1).detach())


def test_heads_of_different_activations(stopwatch):
    _, frozen = integer_mlp(2)
    network = frozen.network
    heads = {
        task: head._replace(activation=a)
        for (task, head), a in zip(network.heads.items(), ("none", "relu"), strict=True)
    }
    mlp = SparseMLP(replace(network, heads=heads))
    plan = measure(mlp.network, (1,))
    x = small_integers(5, 20, generator=torch.Generator().manual_seed(0))
    for chain in all_chains(plan):
        assert_exact(mlp.planned(with_chain(plan, *chain))(x), mlp(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_segment_and_no_measurement(monkeypatch, dtype):
    torch.manual_seed(0)
    frozen, x, clock = freeze(MaskedMLP(64, (32, 16), tasks=TASKS[:2])), torch.randn(7, 64), Clock()

    def timed(calls, **settings):
        assert not torch.is_autocast_enabled("cpu")
        return clock(calls, **settings)

    monkeypatch.setattr(measurement, "interleaved", timed)
    with torch.autocast("cpu", dtype):
        plan = measure(frozen.network, (7,), "bf16")
    for chain in all_chains(plan):
        planned, out = frozen.planned(with_chain(plan, *chain)), torch.full((2, 7, 2), torch.nan)
        planned.score_into(x, out[0])
        with torch.autocast("cpu", dtype):
            planned.score_into(x, out[1])
            assert_exact(planned(x), out[0].to(dtype))
        assert_exact(out[1], out[0])


def test_a_ranker_serves_by_a_plan(stopwatch, small_log, tmp_path):
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(small_log.encoder.fields, small_log.encoder.table_sizes, dim=4, std=0.3)
    frozen = freeze(MaskedMLP(inputs.out_features, (16, 8), tasks=("ctr", "cvr")), sigmoid=True)
    stopwatch.us = {"dense fp32": 1.0}
    planned = frozen.planned(measure(frozen.network, (1, 64)))
    plain, ranker = Ranker(small_log.encoder, inputs, frozen), Ranker(small_log.encoder, inputs, planned)
    batch = next(iter(small_log.stream("test", 64, shuffle=False).epoch(0)))
    assert_exact(ranker.score_encoded(batch.features), planned(inputs(batch.features)))
    save(plain, tmp_path / "plain.safetensors")
    save(ranker, tmp_path / "planned.safetensors")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "planned.safetensors").read_bytes()


@needs_engine
def test_a_segment_is_prepacked_once_for_all_batch_sizes(stopwatch):
    _, frozen = integer_mlp(2)
    stopwatch.us = {"sparse fp32": 1.0}
    planned = frozen.planned(measure(frozen.network, (1, 8, 64)))
    x = torch.zeros(64, 20)
    for batch in (1, 8, 64):
        assert_exact(planned(x[:batch]), frozen(x[:batch]))
    (nbytes,) = planned.prepacked_nbytes.values()
    assert nbytes == sum(frozen.prepacked_nbytes.values())


def test_without_the_engine_only_dense_candidates_exist(stopwatch, monkeypatch):
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    with pytest.warns(RuntimeWarning, match="run dense in torch"):
        masked, frozen = integer_mlp(2)
    plan = measure(frozen.network, (1,), "bf16")
    assert plan.machine.engine == "reference"
    assert all(segment.kernel != "sparse" for segment, _ in plan.batches[0].segments)
    x = small_integers(5, 20, generator=torch.Generator().manual_seed(0))
    assert_exact(frozen.planned(plan)(x), masked(x).detach())


def test_save_and_load(stopwatch, tmp_path):
    _, frozen = integer_mlp(2)
    stopwatch.us = {"dense fp32": 1.0, "dense fp32 1": 0.25}
    plan = measure(frozen.network, (1, 64), "int8")
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert str(loaded) == str(plan)
    x = small_integers(5, 20, generator=torch.Generator().manual_seed(0))
    assert_exact(frozen.planned(loaded)(x), frozen.planned(plan)(x))


def test_a_file_that_is_no_plan_is_refused(stopwatch, tmp_path):
    path = tmp_path / "plan.json"
    measure(integer_mlp(1)[1].network, (1, 8)).save(path)
    whole = json.loads(path.read_text())
    gap = json.loads(path.read_text())
    del gap["batches"][0]["contestants"][0]["chain"][0]
    damaged = ["", "[]", path.read_text()[:-9], json.dumps({**whole, "batches": []}), json.dumps(gap)]
    damaged += [json.dumps({**whole, "batches": whole["batches"][::-1]}), json.dumps({**whole, "machine": {"cpu": 1}})]
    damaged += ["[" * 100_000, json.dumps({**whole, "version": True}), f'{{"version": {"9" * 5000}}}']
    for segment in ({"last": 10**18}, {"first": -1}, {"kernel": "dense"}, {"kernel": "magic"}, {"precision": "fp8"}):
        other = json.loads(json.dumps(whole))
        other["batches"][0]["contestants"][0]["chain"][0].update(segment)
        damaged.append(json.dumps(other))
    damaged += [json.dumps({**whole, "batches": ["1"]}), json.dumps({**whole, "precision": "x" * 10_000})]
    for microseconds in (0, -1, float("nan"), float("inf"), 10**400):
        other = json.loads(json.dumps(whole))
        other["batches"][0]["contestants"][0]["timing"]["median_us"] = microseconds
        damaged.append(json.dumps(other))
    for text in damaged:
        path.write_text(text)
        with pytest.raises(InputError, match=r"plan.json: got no plan .*, wanted what Plan.save wrote") as caught:
            Plan.load(path)
        assert len(str(caught.value)) < 1_000
    path.write_text(json.dumps({**whole, "version": 2}))
    with pytest.raises(ValueError, match="got a plan of version 2, wanted 1: measure again"):
        Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"in_features": 19}, "plan: got one for in_features 19, wanted 20"),
        ({"out_features": (12, 5, 1)}, r"plan: got one for out_features \(12, 5, 1\), wanted \(12, 6, 1\)"),
        ({"tasks": 3}, "plan: got one for tasks 3, wanted 2"),
        ({"densities": (0.4, 0.5, 1.0)}, "plan: got one for densities"),
        ({"engine": "sse2"}, "plan: got one for engine sse2, wanted"),
        ({"threads": 1000}, "plan: got one for threads 1000, wanted"),
        ({"torch": "1.0"}, "plan: got one for torch 1.0, wanted"),
    ],
)
def test_a_plan_of_another_network_or_machine_is_refused(stopwatch, changes, message):
    _, frozen = integer_mlp(2)
    plan = measure(frozen.network, (1,))
    machine = {k: v for k, v in changes.items() if k in plan.machine._fields}
    network = {k: v for k, v in changes.items() if k in plan.network._fields}
    other = replace(plan, machine=plan.machine._replace(**machine), network=plan.network._replace(**network))
    with pytest.raises(ValueError, match=message + ".*: measure again"):
        frozen.planned(other)


def test_a_density_may_drift_a_little(stopwatch):
    plan = measure(integer_mlp(2, density=0.4)[1].network, (1,))
    integer_mlp(2, density=0.42)[1].planned(plan)
    with pytest.raises(ValueError, match=r"plan: got one for densities .*0\.4.*, wanted .*0\.2"):
        integer_mlp(2, density=0.2)[1].planned(plan)


@needs_engine
def test_a_plan_is_of_one_instruction_set(stopwatch):
    _, frozen = integer_mlp(1)
    plan = measure(frozen.network, (1,))
    other = next((isa for isa in cpu.supported_isas() if isa != cpu.isa()), None)
    if other is None:
        pytest.skip("only one instruction set")
    with cpu.forced_isa(other), pytest.raises(ValueError, match=f"plan: got one for engine .*, wanted {other}"):
        frozen.planned(plan)


@pytest.mark.parametrize("sizes", [(), (0,), (8, 1), (8, 8)])
def test_batch_sizes_that_do_not_ascend_are_refused(sizes):
    with pytest.raises(ValueError, match=r"batch_sizes: got \(.*\), wanted at least one, ascending from 1"):
        measure(integer_mlp(1)[1].network, sizes)


def test_what_cannot_be_planned_is_refused(stopwatch):
    masked, frozen = integer_mlp(1)
    with pytest.raises(ValueError, match="precision: got 'fp16', wanted one of fp32, bf16, int8"):
        measure(frozen.network, (1,), "fp16")
    with pytest.raises(ValueError, match="network: got one without quantisation parameters, wanted a calibrated one"):
        measure(freeze(masked).network, (1,), "int8")
