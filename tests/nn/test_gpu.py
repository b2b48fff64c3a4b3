"""Serving on a GPU: every way to run a layer, the plan, the buckets. Interpreted on the CPU where there is no GPU."""

import dataclasses

import pytest
import torch
from oracle import Layer, assert_exact, assert_rounding, mlp_reference

from lt4rec_sparse import Mask, MaskedMLP, Plan, freeze, ops
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.lottery import project_to_2_4, prune_by_magnitude
from lt4rec_sparse.nn.plan import Segment
from lt4rec_sparse.ops.sparse_mlp import _sparse_mlp_gpu

pytest.importorskip("triton", reason="Triton is not installed")

from lt4rec_sparse.kernels.gpu import gpu_network
from lt4rec_sparse.nn import gpu
from lt4rec_sparse.nn.gpu import GpuMLP, measure_plan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TASKS = ("ctr", "cvr")
PRECISIONS = ["fp16", "fp32", *(["bf16"] if DEVICE.type == "cuda" else [])]


def frozen(width=37, hidden=(48, 32, 16), tasks=TASKS, density=0.3, seed=0, sigmoid=False, mask=None, integers=True):
    """A frozen MLP; of small integers all activations are exact in every precision."""
    generator = torch.Generator().manual_seed(seed)
    mlp = MaskedMLP(width, hidden, tasks=tasks)
    for parameter in mlp.parameters():
        if integers:
            # Few and small, so that no activation of three layers reaches 256, where bfloat16 ends to be exact.
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
    """Masks with few weights a neuron: sums stay small."""
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
    return gpu.Ways(mlp, precision, DEVICE)


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
    ways = {"dense", "tail dense", "premasked", "masked", "shared", "tail premasked", "tail masked"}
    # In IEEE arithmetic, or with more planes than two, compressed weights do not leave room for a tail.
    assert ("tail shared" in names) == (precision != "fp32" and len(tasks) <= 2)
    assert ways <= set(names)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_blocks_are_a_way_where_the_masks_have_blocks(precision):
    mlp = frozen(mask=blocks, seed=3)
    x = rows(21)
    found = dict(every_way(mlp, precision))
    names = [name for name in found if name.startswith("block16")]
    assert names
    for name in names:
        assert_exact(found[name](x.to(DEVICE)).cpu(), mlp(x))
    assert not any(name.startswith("block") for name, _ in every_way(frozen(), precision))


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
    oracle = [
        [Layer(layer.weight.to_dense(task), layer.bias, layer.activation) for layer, task in path]
        for path in mlp._paths()
    ]
    for _, network in every_way(mlp, "fp32"):
        y = network(x.to(DEVICE)).cpu()
        for t, layers in enumerate(oracle):
            assert_rounding(y[:, t : t + 1], mlp_reference(x, layers))


def test_the_network_survives_being_parts_of_an_operator():
    mlp = frozen(mask=blocks, seed=3)
    x = rows(5).to(DEVICE)
    for _, network in every_way(mlp, "fp32"):
        parts, layout = gpu_network.flatten(network)
        assert gpu_network.unflatten(parts, layout)._fields == network._fields
        assert_exact(gpu_network.unflatten(parts, layout)(x), network(x))
        assert network.nbytes == sum(part.nbytes for part in parts)


@pytest.fixture
def on_this_device():
    """Without a GPU, let the GPU's serving operator run interpreted on CPU tensors."""
    if DEVICE.type == "cuda":
        yield
        return
    library = torch.library.Library("lt4rec_sparse", "IMPL")
    library.impl("sparse_mlp_gpu", _sparse_mlp_gpu, "CPU")
    yield
    library._destroy()


def test_opcheck_and_export_of_the_serving_operator(on_this_device):
    mlp = frozen()
    x = rows(5).to(DEVICE)
    parts = ops.prepack_gpu(mlp._paths(), torch.float32, DEVICE)
    assert_exact(ops.sparse_mlp_gpu(x, parts).cpu(), mlp(x.cpu()))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.lt4rec_sparse.sparse_mlp_gpu, (x, parts.parts, parts.layout, 2), test_utils=tests)

    class Served(torch.nn.Module):
        def forward(self, x):
            return ops.sparse_mlp_gpu(x, parts)

    compiled = torch.compile(Served(), fullgraph=True, backend="aot_eager")
    assert_exact(compiled(x).cpu(), mlp(x.cpu()))
    exported = torch.export.export(Served(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    assert_exact(exported.module()(rows(9).to(DEVICE)).cpu(), mlp(rows(9)))
    with pytest.raises(RuntimeError, match="wanted inference only"):
        ops.sparse_mlp_gpu(x.clone().requires_grad_(), parts).sum().backward()
    with pytest.raises(ValueError, match=r"x: got shape \(37,\), wanted \[batch, 37\]"):
        ops.sparse_mlp_gpu(x[0], parts)
    with pytest.raises(ValueError, match=r"x: got shape \(5, 30\), wanted \[batch, 37\]"):
        ops.sparse_mlp_gpu(x[:, :30], parts)
    with pytest.raises(TypeError, match=r"x: got torch\.int64"):
        ops.sparse_mlp_gpu(x.long(), parts)


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


def test_requests_of_any_size_go_through_buckets():
    mlp = frozen(mask=sparse_few)
    served = GpuMLP(mlp, precision="fp32", batch_sizes=(4, 16), device=DEVICE)
    for batch in (16, 3, 4, 5, 1, 0, 40):  # smaller ones after larger ones: rows of an earlier request are there
        assert_exact(served(rows(batch, seed=batch)).cpu(), mlp(rows(batch, seed=batch)))
    x = rows(6).view(2, 3, 37)
    assert_exact(served(x).cpu(), mlp(x))
    assert_exact(served(x, "cvr").cpu(), mlp(x, "cvr"))
    out = torch.full((6, 4), torch.nan)
    served.score_into(rows(6), out[:, 1:3])
    assert_exact(out[:, 1:3], mlp(rows(6)))
    assert served.prepacked_nbytes > 0 and served.nbytes == mlp.nbytes
    assert "batch 4, 16" in repr(served)


def test_a_result_is_the_callers():
    served = GpuMLP(frozen(mask=sparse_few), precision="fp32", batch_sizes=(4,), device=DEVICE)
    first = served(rows(4, seed=1))
    kept = first.clone()
    served(rows(4, seed=2))
    assert_exact(first, kept)


@pytest.fixture
def short(monkeypatch):
    """One round of timing: the interpreter is slow, and its times mean nothing."""
    if DEVICE.type != "cuda":
        monkeypatch.setattr(gpu, "ROUNDS_ALONE", 1)
        monkeypatch.setattr(gpu, "ROUNDS", 1)


def test_a_plan_is_measured_printed_saved_and_served(tmp_path, short):
    mlp = frozen(20, (32, 16), mask=blocks, seed=3)
    plan = measure_plan(mlp, (1, 5), "fp32", DEVICE)
    assert [batch.batch for batch in plan.batches] == [1, 5]
    for batch in plan.batches:
        names = [contestant.name for contestant in batch.contestants]
        assert "dense" in names and len(names) > 3
        assert batch.contestants[0].timing.median_us <= 1.02 * min(c.timing.median_us for c in batch.contestants)
    text = str(plan)
    assert "* " in text and " dense " in text and "tail premasked" in text
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    served = GpuMLP(mlp, plan, device=DEVICE)
    assert_exact(served(rows(7, 20)).cpu(), mlp(rows(7, 20)))


def test_the_opponent_wins_where_it_is_faster():
    mlp = frozen()
    segments = ways_of(mlp, "fp32").segments
    chains = gpu._chains({s: (1.0 if s.kernel == "dense" else 5.0) for s in segments})
    assert chains["dense"] == tuple(Segment("dense", "fp32", i, i) for i in range(4))
    assert "mixed" not in chains  # the best mixture is dense
    assert {segment.kernel for segment in chains["shared"]} <= {"shared", "tail shared", "dense"}
    fast_tail = {s: (0.5 if s.kernel == "tail masked" else 1.0) for s in segments}
    assert gpu._chains(fast_tail)["mixed"][-1].kernel == "tail masked"


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
        GpuMLP(frozen(), **(good | change))
    with pytest.raises(ValueError, match=message):
        measure_plan(frozen(), **(good | change))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 36\), wanted \[..., 37\]"):
        GpuMLP(frozen(), **good)(rows(2, 36))


def test_a_plan_of_another_machine_is_refused(short):
    mlp = frozen(20, (16,))
    plan = measure_plan(mlp, (1,), "fp32", DEVICE)
    other = dataclasses.replace(plan, machine=plan.machine._replace(engine="GPU of tomorrow"))
    with pytest.raises(InputError, match="plan: got one for engine GPU of tomorrow"):
        GpuMLP(mlp, other, device=DEVICE)
