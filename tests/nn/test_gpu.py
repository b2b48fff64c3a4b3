"""Serving on a GPU: every way to run a layer, the plan, the buckets. Interpreted on the CPU where there is no GPU."""

import copy
import dataclasses
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import Layer, assert_exact, assert_rounding, mlp_reference

from lt4rec_sparse import FrozenNetwork, Mask, MaskedLinear, MaskedMLP, Plan, SparseMLP, freeze
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.lottery import project_to_2_4, prune_by_magnitude
from lt4rec_sparse.network import DenseLayer
from lt4rec_sparse.nn.plan.plan import Segment

pytest.importorskip("triton", reason="Triton is not installed")

from lt4rec_sparse.nn import gpu
from lt4rec_sparse.nn.gpu import GraphExecutor, measure_plan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TASKS = ("ctr", "cvr")
PRECISIONS = ["fp16", "fp32", *(["bf16"] if DEVICE.type == "cuda" else [])]


def frozen(width=37, hidden=(48, 32, 16), tasks=TASKS, density=0.3, seed=0, sigmoid=False, mask=None, integers=True):
    """A frozen MLP; with small integers all activations are exact in every precision."""
    generator = torch.Generator().manual_seed(seed)
    mlp = MaskedMLP(width, hidden, tasks=tasks)
    for parameter in mlp.parameters():
        if integers:
            # Few and small, so that no activation of three layers reaches 256, above which bfloat16 is not exact.
            parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).float()
        else:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    shapes = {name: tuple(weight.shape) for name, weight in mlp.masked_weights().items()}
    for task in tasks:
        random = Mask.random(shapes, {n: round(a * b * density) for n, (a, b) in shapes.items()}, generator)
        mlp.set_mask(random if mask is None else mask(mlp, task), task)
    return freeze(mlp, sigmoid=sigmoid)


def rows(batch, width=37, seed=1):
    return torch.randint(-1, 2, (batch, width), generator=torch.Generator().manual_seed(seed)).float()


def sparse_few(mlp, task):
    """Masks with few weights per neuron: sums stay small."""
    generator = torch.Generator().manual_seed(len(task) + TASKS.index(task) if task in TASKS else 0)
    return Mask({n: torch.rand(w.shape, generator=generator) < 4 / w.shape[1] for n, w in mlp.masked_weights().items()})


def blocks(mlp, task):
    weights = {name: weight * (1 + TASKS.index(task)) for name, weight in mlp.masked_weights().items()}
    full = Mask.full({name: tuple(weight.shape) for name, weight in weights.items()})
    return prune_by_magnitude(weights, full, full.nnz // 3, "block16")


def neurons(mlp, task):
    full = Mask.full({name: tuple(weight.shape) for name, weight in mlp.masked_weights().items()})
    return prune_by_magnitude(mlp.masked_weights(), full, full.nnz // 4, "neuron")


def chain_through(segment, layers):
    """Dense layers before a segment and after it."""
    dense = [Segment("dense", segment.precision, i, i) for i in range(layers)]
    return (*dense[: segment.first], segment, *dense[segment.last + 1 :])


def ways_of(mlp, precision):
    return gpu.Ways(mlp.network, precision, DEVICE)


def every_way(mlp, precision):
    ways = ways_of(mlp, precision)
    for segment in ways.segments:
        yield str(segment), ways.network(chain_through(segment, len(ways.layers)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tasks", [("ctr",), TASKS, ("ctr", "cvr", "like")])
def test_every_way_to_run_a_layer_is_exact_on_integers(tasks, precision):
    mlp = frozen(tasks=tasks, mask=sparse_few)
    x = rows(21)
    wanted = mlp(x)
    assert wanted.abs().max() < 256
    names = []
    for name, network in every_way(mlp, precision):
        assert_exact(network(x.to(DEVICE)).cpu(), wanted)
        names.append(name.rsplit(" ", 1)[0].removesuffix(f" {precision}"))
    assert {"dense", "tail dense"} <= set(names)
    assert ("tail premasked" in names) == (precision != "fp32")  # the fused tail is for 16 bits


@pytest.mark.parametrize("precision", PRECISIONS)
def test_widths_that_need_no_padding_are_exact_too(precision):
    mlp = frozen(128, (64, 64, 32), mask=sparse_few)
    for _, network in every_way(mlp, precision):
        assert_exact(network(rows(64, 128).to(DEVICE)).cpu(), mlp(rows(64, 128)))


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "fp32"])
def test_blocks_are_a_way_where_the_masks_have_blocks(precision):
    mlp = frozen(mask=blocks, seed=3)
    x = rows(21)
    found = dict(every_way(mlp, precision))
    names = [name for name in found if name.startswith("block16")]
    assert names
    for name in names:
        assert_exact(found[name](x.to(DEVICE)).cpu(), mlp(x))
    assert not any(name.startswith("block") for name, _ in every_way(frozen(), precision))
    assert not any(name.startswith("block") for name, _ in every_way(mlp, "fp32"))  # the kernel is for 16 bits


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_left_of_pruned_neurons_runs_compact(precision):
    mlp = frozen(mask=neurons, seed=3)
    x = rows(9)
    network = dict(every_way(mlp, precision))[f"compact {precision} 0-3"]
    assert_exact(network(x.to(DEVICE)).cpu(), mlp(x))
    assert not any(name.startswith("compact") for name, _ in every_way(frozen(density=0.9), precision))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU: torch's semi-structured product needs one")
def test_two_of_four_runs_on_the_sparse_tensor_cores():
    def two_of_four(mlp, task):
        return project_to_2_4(mlp.masked_weights(), sparse_few(mlp, task))

    mlp = frozen(128, (128, 64, 32), mask=two_of_four)
    x = rows(64, 128)
    names = []
    for name, network in every_way(mlp, "bf16"):
        if name.startswith("2:4"):
            assert_exact(network(x.to(DEVICE)).cpu(), mlp(x))
            names.append(name)
    assert names


@pytest.mark.parametrize("sigmoid", [False, True])
def test_every_way_is_within_the_rounding_bound(sigmoid):
    mlp = frozen(sigmoid=sigmoid, integers=False)
    x = torch.randn(21, 37, generator=torch.Generator().manual_seed(1))
    oracle = [[Layer(*mlp.network.layer(i, task)) for i in range(mlp.network.depth)] for task in TASKS]
    for _, network in every_way(mlp, "fp32"):
        y = network(x.to(DEVICE)).cpu()
        for t, layers in enumerate(oracle):
            assert_rounding(y[:, t : t + 1], mlp_reference(x, layers))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_way_takes_no_rows(precision):
    for _, network in every_way(frozen(mask=blocks, seed=3), precision):
        assert network(torch.empty(0, 37, device=DEVICE)).shape == (0, 2)


def test_autocast_leaves_a_network_as_it_is():
    mlp = frozen(integers=False)
    x = torch.randn(5, 37, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for _, network in every_way(mlp, "fp32"):
        wanted = network(x)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            assert_exact(network(x), wanted)


def test_a_plan_for_other_masks_is_refused_where_it_would_be_wrong():
    ways = ways_of(frozen(128, (128, 64)), "fp16")
    with pytest.raises(ValueError, match="2:4: got masks that keep more than two of four"):
        ways.run(Segment("2:4", "fp16", 0, 0))
    with pytest.raises(ValueError, match="block32: got tasks with weights of their own"):
        ways.run(Segment("block32", "fp16", 2, 2))


def served_by(mlp, plan=None, **arguments):
    executor = GraphExecutor(mlp.network, plan, device=DEVICE, **arguments)
    return SparseMLP(mlp.network, executor.precision, executor)


def test_requests_of_any_size_go_through_buckets():
    mlp = frozen(mask=sparse_few)
    served = served_by(mlp, precision="fp32", batch_sizes=(4, 16))
    for batch in (16, 3, 4, 5, 1, 0, 40):  # smaller ones after larger ones: rows of an earlier request are there
        assert_exact(served(rows(batch, seed=batch)).cpu(), mlp(rows(batch, seed=batch)))
    x = rows(6).view(2, 3, 37)
    assert_exact(served(x).cpu(), mlp(x))
    assert_exact(served(x, "cvr").cpu(), mlp(x, "cvr"))
    out = torch.full((6, 4), torch.nan)
    served.score_into(rows(6), out[:, 1:3])
    assert_exact(out[:, 1:3], mlp(rows(6)))
    assert served.prepacked_nbytes.keys() == {"dense"} and served.prepacked_nbytes["dense"] > 0
    assert served.nbytes == mlp.nbytes


def test_bytes_are_told_by_kernel_and_once_for_all_buckets():
    mlp = frozen(mask=sparse_few)
    one, two = (
        GraphExecutor(mlp.network, precision="fp16", batch_sizes=sizes, device=DEVICE) for sizes in ((4,), (4, 16))
    )
    assert one.prepacked_nbytes == two.prepacked_nbytes and one.prepacked_nbytes.keys() == {"dense", "tail premasked"}
    # Two tasks' first layers 48 x 64 and their biases, in 16 bits.
    assert one.prepacked_nbytes["dense"] == 2 * 2 * 48 * (64 + 1)


def test_a_result_is_the_callers():
    served = served_by(frozen(mask=sparse_few), precision="fp32", batch_sizes=(4,))
    first = served(rows(4, seed=1))
    kept = first.clone()
    served(rows(4, seed=2))
    assert_exact(first, kept)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda served: pickle.loads(pickle.dumps(served))])
def test_a_copy_serves_from_graphs_of_its_own(copied):
    mlp = frozen(mask=sparse_few)
    served = served_by(mlp, precision="fp32", batch_sizes=(4,))
    other = copied(served)
    del served
    gc.collect()
    assert_exact(other(rows(6)).cpu(), mlp(rows(6)))


def test_requests_from_several_threads_do_not_mix():
    mlp = frozen(mask=sparse_few)
    served = served_by(mlp, precision="fp32", batch_sizes=(4, 8))
    batches = [rows(1 + i % 9, seed=i) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        for x, y in zip(batches, pool.map(served, batches), strict=True):
            assert_exact(y.cpu(), mlp(x))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU: streams and graphs need one")
def test_executors_share_no_stream():
    mlp = frozen(mask=sparse_few)
    branched = [Segment("dense", "fp16", 0, 0), Segment("tail branches", "fp16", 1, 3)]
    ways = [ways_of(mlp, "fp16") for _ in range(2)]
    sides = [{side.stream_id for side in way.run(branched[1]).sides} for way in ways]
    assert len(sides[0]) == len(sides[1]) == 1 and sides[0].isdisjoint(sides[1])
    assert gpu._timing_stream(DEVICE) is gpu._timing_stream(DEVICE)
    x = rows(8).to(DEVICE)
    for way in ways:
        assert_exact(way.network(tuple(branched))(x).cpu(), mlp(x.cpu()))


def test_a_network_without_heads_is_served():
    layer = MaskedLinear(37, 10, tasks=TASKS)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(1)
    for task in TASKS:
        layer.set_mask(torch.rand(10, 37, generator=generator) < 0.3, task)
    linear = freeze(layer)
    wanted = torch.cat([layer(rows(5), task) for task in TASKS], dim=1)
    assert_exact(served_by(linear, precision="fp16", batch_sizes=(8,))(rows(5)).cpu(), wanted)
    for _, network in every_way(linear, "fp16"):
        assert_exact(network(rows(5).to(DEVICE)).cpu(), wanted)


def test_heads_of_several_outputs_are_served_and_different_activations_refused():
    mlp = MaskedMLP(37, (32, 16), out_features=3, tasks=TASKS)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=torch.Generator().manual_seed(0)))
    for task in TASKS:
        mlp.set_mask(sparse_few(mlp, task), task)
    network = freeze(mlp).network
    for _, way in every_way(freeze(mlp), "fp16"):
        assert_exact(way(rows(5).to(DEVICE)).cpu(), mlp(rows(5)))
    heads = {**network.heads, "cvr": DenseLayer(*network.heads["cvr"][:2], "sigmoid")}
    with pytest.raises(ValueError, match="heads: got activations none, sigmoid, wanted one for all tasks"):
        GraphExecutor(FrozenNetwork(network.hidden, heads), device=DEVICE)
    hidden = tuple(layer._replace(activation="gelu") for layer in network.hidden)
    with pytest.raises(ValueError, match="layer 0: got activation gelu, wanted one of none, relu, sigmoid on a GPU"):
        GraphExecutor(FrozenNetwork(hidden, network.heads), device=DEVICE)


@pytest.fixture
def short(monkeypatch):
    """One round of timing: the interpreter is slow, and its times mean nothing."""
    if DEVICE.type != "cuda":
        monkeypatch.setattr(gpu, "ROUNDS_ALONE", 1)
        monkeypatch.setattr(gpu, "ROUNDS", 1)


def test_a_plan_is_measured_printed_saved_and_served(tmp_path, short):
    mlp = frozen(20, (32, 16), mask=blocks, seed=3)
    plan = measure_plan(mlp.network, (1, 5), "fp16", DEVICE)
    assert [batch.batch for batch in plan.batches] == [1, 5]
    for batch in plan.batches:
        names = [timed.name for timed in batch.chains]
        assert "dense" in names and len(names) > 2
    text = str(plan)
    assert "* " in text and " dense " in text and "tail premasked" in text
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    served = served_by(mlp, plan)
    assert served.precision == "fp16"
    assert_exact(served(rows(7, 20)).cpu(), mlp(rows(7, 20)))


def test_the_opponent_wins_where_it_is_faster():
    mlp = frozen()
    segments = ways_of(mlp, "fp16").segments
    chains = gpu._chains({s: (1.0 if s.kernel == "dense" else 5.0) for s in segments})
    assert chains["dense"] == tuple(Segment("dense", "fp16", i, i) for i in range(4))
    assert "mixed" not in chains  # the best mixture is dense
    assert {segment.kernel for segment in chains["tail premasked"]} <= {"tail premasked", "dense"}
    short_tail = Segment("tail premasked", "fp16", 2, 3)
    fast_tail = {s: (0.5 if s == short_tail else 1.0 if s.kernel == "dense" else 5.0) for s in segments}
    assert gpu._chains(fast_tail)["mixed"] == (*chains["dense"][:2], short_tail)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "int8"}, "precision: got 'int8', wanted one of bf16, fp16, fp32"),
        ({"batch_sizes": (4, 4)}, r"batch_sizes: got \(4, 4\), wanted at least one, ascending from 1"),
        ({"batch_sizes": ()}, r"batch_sizes: got \(\)"),
    ],
)
def test_bad_arguments(change, message):
    good = {"precision": "fp32", "batch_sizes": (1,), "device": DEVICE}
    with pytest.raises(ValueError, match=message):
        GraphExecutor(frozen().network, **(good | change))
    with pytest.raises(ValueError, match=message):
        measure_plan(frozen().network, **(good | change))


@pytest.mark.parametrize(
    ("x", "out", "error", "message"),
    [
        (torch.ones(2, 36), torch.ones(2, 2), ValueError, r"x: got shape \(2, 36\), wanted \[rows, 37\]"),
        (torch.ones(37), torch.ones(2), ValueError, r"x: got shape \(37,\)"),
        (torch.ones(2, 37).long(), torch.ones(2, 2), TypeError, "x: got torch.int64, wanted a floating dtype"),
        (torch.ones(2, 37), torch.ones(2, 3), ValueError, r"out: got torch.float32 \(2, 3\), wanted .*\(2, 2\)"),
        (torch.ones(2, 37), torch.ones(2, 2).half(), ValueError, "out: got torch.float16"),
    ],
)
def test_what_does_not_fit_the_executor_is_refused(x, out, error, message):
    executor = GraphExecutor(frozen().network, precision="fp32", batch_sizes=(1,), device=DEVICE)
    with pytest.raises(error, match=message):
        executor.run(x, out)


def test_a_plan_of_another_machine_is_refused(short):
    mlp = frozen(20, (16,))
    plan = measure_plan(mlp.network, (1,), "fp32", DEVICE)
    other = dataclasses.replace(plan, machine=plan.machine._replace(engine="GPU of tomorrow"))
    with pytest.raises(InputError, match="plan: got one for engine GPU of tomorrow"):
        GraphExecutor(mlp.network, other, device=DEVICE)
