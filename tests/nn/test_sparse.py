import copy
import gc
import pickle
import warnings

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given
from hypothesis import strategies as st
from oracle import Layer, assert_exact, assert_rounding, mlp_reference, small_integers

from lt4rec_sparse import Mask, MaskedLinear, MaskedMLP, SparseLinear, SparseMLP, freeze, ops
from lt4rec_sparse.kernels import cpu, reference
from lt4rec_sparse.network import PRECISIONS
from lt4rec_sparse.nn.quantization import calibrate

needs_engine = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")


def masked_mlp(widths, tasks, density, seed):
    torch.manual_seed(seed)
    mlp = MaskedMLP(widths[0], widths[1:], tasks=tasks)
    generator = torch.Generator().manual_seed(seed)
    for task in tasks:
        shapes = mlp.mask(task).shapes
        mlp.set_mask(Mask.random(shapes, {n: round(r * c * density) for n, (r, c) in shapes.items()}, generator), task)
    return mlp


def oracle_layers(mlp: MaskedMLP, task: str, head: str):
    mask = mlp.mask(task)
    layers = [Layer(x.weight.detach() * mask[f"layers.{i}"], x.bias.detach(), "relu") for i, x in enumerate(mlp.layers)]
    return [*layers, Layer(mlp.heads[task].weight.detach(), mlp.heads[task].bias.detach(), head)]


@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    n_tasks=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    batch=st.sampled_from([0, 1, 7, 8, 33, 64, 65]),
    seed=st.integers(0, 2**31),
    sigmoid=st.booleans(),
)
def test_frozen_equals_masked_for_every_task(widths, n_tasks, density, batch, seed, sigmoid):
    tasks = tuple(f"task{i}" for i in range(n_tasks))
    mlp = masked_mlp(widths, tasks, density, seed)
    frozen = freeze(mlp, sigmoid=sigmoid)
    assert isinstance(frozen, SparseMLP)
    x = torch.randn(batch, widths[0], generator=torch.Generator().manual_seed(seed))
    y = frozen(x)
    for i, task in enumerate(tasks):
        reference = mlp_reference(x, oracle_layers(mlp, task, "sigmoid" if sigmoid else "none"))
        assert_rounding(y[:, i : i + 1], reference)
        logits = mlp(x, task).detach()
        assert_rounding(torch.sigmoid(logits) if sigmoid else logits, reference)


def test_the_papers_mlp_is_exact_on_integers():
    mlp = masked_mlp((256, 64, 32, 16), ("ctr", "cvr"), 0.2, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in mlp.parameters():
        parameter.data = small_integers(*parameter.shape, generator=generator).clamp(-1, 1)
    x = small_integers(100, 256, generator=generator)
    assert_exact(freeze(mlp)(x), mlp(x).detach())


def test_masked_linear_freezes_too():
    layer = MaskedLinear(9, 4, tasks=("a", "b"))
    layer.set_mask(torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.4, "a")
    frozen = freeze(layer)
    assert isinstance(frozen, SparseLinear)
    x = torch.randn(5, 9)
    for i, task in enumerate(("a", "b")):
        reference = mlp_reference(x, [Layer(layer.weight.detach() * layer.mask(task), layer.bias.detach(), "none")])
        assert_rounding(frozen(x)[:, 4 * i : 4 * i + 4], reference)


def test_masked_layers_inside_a_model_are_replaced_and_the_model_is_left_alone():
    model = torch.nn.ModuleDict({"tower": torch.nn.Sequential(MaskedMLP(6, (5, 4)), torch.nn.Sigmoid())})
    frozen = freeze(model)
    assert isinstance(frozen["tower"][0], SparseMLP)
    assert isinstance(model["tower"][0], MaskedMLP)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in model.parameters())


class Twice(torch.nn.Module):
    """One layer under two names, and once more in a plain list."""

    def __init__(self):
        super().__init__()
        self.a = MaskedLinear(4, 4)
        self.b = self.a
        self.others = [self.a]

    def forward(self, x):
        return self.others[0](self.b(self.a(x)))


def test_every_reference_to_a_layer_is_replaced_and_the_source_stays_trainable():
    model = Twice()
    for parameter in model.parameters():
        parameter.data = small_integers(*parameter.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    frozen = freeze(model)
    assert isinstance(frozen.a, SparseLinear)
    assert frozen.a is frozen.b is frozen.others[0]
    assert model.a.weight.requires_grad
    x = small_integers(2, 3, 4, generator=torch.Generator().manual_seed(1))
    assert_exact(frozen(x), model(x).detach())


class TwoLayers(torch.nn.Module):
    """Not an `nn.Sequential`: nothing tells what is between its layers."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(self.first(x)).relu()


def test_modules_that_torch_pruned_a_little_are_copied_beside_masked_ones():
    dense = torch.nn.Linear(5, 3)
    torch.nn.utils.prune.l1_unstructured(dense, "weight", 0.4)
    model = TwoLayers(MaskedLinear(4, 5), dense)
    for parameter in model.parameters():
        parameter.data = small_integers(*parameter.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    frozen, x = freeze(model), small_integers(7, 4, generator=torch.Generator().manual_seed(1))
    wanted = model(x).detach()
    assert_exact(frozen(x), wanted)
    assert (frozen.second.weight_mask == dense.weight_mask).all()
    dense.weight_orig.data.zero_()
    assert_exact(frozen(x), wanted)


def test_one_task_of_all():
    mlp = masked_mlp((12, 7, 5), ("ctr", "cvr"), 0.5, 0)
    frozen, x = freeze(mlp), torch.randn(3, 12)
    for i, task in enumerate(mlp.tasks):
        assert_exact(frozen(x, task), frozen(x)[:, i : i + 1])
    with pytest.raises(ValueError, match="task: got 'like', wanted one of ctr, cvr"):
        frozen(x, "like")


def test_freezing_copies_the_weights():
    mlp = MaskedMLP(6, (5, 4))
    frozen, x = freeze(mlp), torch.ones(2, 6)
    before = frozen(x).clone()
    for parameter in mlp.parameters():
        parameter.data.zero_()
    assert_exact(frozen(x), before)


def test_without_the_engine_the_reference_serves_the_same(monkeypatch):
    mlp = masked_mlp((20, 9, 5), ("ctr", "cvr"), 0.4, 0)
    x = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    with pytest.warns(RuntimeWarning, match="run dense in torch"):
        frozen = freeze(mlp, sigmoid=True)
    assert list(frozen.prepacked_nbytes) == ["dense"]
    for i, task in enumerate(mlp.tasks):
        assert_rounding(frozen(x)[:, i : i + 1], mlp_reference(x, oracle_layers(mlp, task, "sigmoid")))


def wide_mlp(tasks=("ctr", "cvr"), sigmoid=False, seed=0):
    """So wide that the engine multiplies once what tasks share, as the reference of int8 has it; and calibrated."""
    frozen = freeze(masked_mlp((300, 24, 17), tasks, 0.6, seed), sigmoid)
    return frozen.calibrated(torch.randn(200, 300, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_shares_the_canonical_weights_and_leads_back(precision):
    mlp, x = wide_mlp(), torch.randn(9, 300)
    other = mlp.to_precision(precision)
    assert other.precision == precision
    assert other.network is mlp.network
    assert other.nbytes == mlp.nbytes
    assert precision in repr(other)
    assert_exact(other.to_precision("fp32")(x), mlp(x))
    assert not other.training


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [0, 1, 7, 70])
def test_scoring_into_memory_is_scoring(batch, precision, x_dtype):
    mlp = wide_mlp(sigmoid=True).to_precision(precision)
    x = torch.randn(batch, 300, generator=torch.Generator().manual_seed(0)).to(x_dtype)
    out = torch.full((batch, 4), float("nan"))
    mlp.score_into(x, out[:, 1:3])
    assert_exact(out[:, 1:3], mlp(x.float()))
    assert_exact(out[:, 1:3].to(x_dtype), mlp(x))
    assert out[:, [0, 3]].isnan().all()


def without_engine(make):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "is_available", lambda: False)
        with pytest.warns(RuntimeWarning, match="run dense in torch"):
            return make()


@needs_engine
def test_without_the_engine_int8_scores_are_the_same():
    mlp, x = wide_mlp(), torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    reference = without_engine(lambda: mlp.to_precision("int8"))
    assert list(reference.prepacked_nbytes) == ["dense"]
    assert_exact(reference(x), mlp.to_precision("int8")(x))
    out = torch.empty(20, 2)
    reference.score_into(x, out)
    assert_exact(out, reference(x))
    with pytest.raises(ValueError, match=r"out: got torch.float32 \(1, 2\), wanted torch.float32 \(20, 2\)"):
        reference.score_into(x, out[:1])


@needs_engine
def test_without_the_engine_bf16_is_as_exact_on_integers():
    mlp = masked_mlp((80, 40), ("ctr", "cvr"), 0.5, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in mlp.parameters():
        parameter.data = small_integers(*parameter.shape, generator=generator).clamp(-1, 1)
    x = small_integers(30, 80, generator=generator)  # and hidden activations below 256, which are bfloat16s
    frozen = freeze(mlp).to_precision("bf16")
    assert_exact(frozen(x), mlp(x).detach())
    assert_exact(without_engine(lambda: frozen.to_precision("bf16"))(x), mlp(x).detach())


def test_a_linear_layer_has_precisions_too():
    layer = MaskedLinear(9, 4, tasks=("a", "b"))
    layer.set_mask(torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.4, "a")
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    int8 = freeze(layer).calibrated(x).to_precision("int8")
    assert isinstance(int8, SparseLinear)
    assert set(int8.network.quantization) == {"a", "b"}
    assert int8(x).shape == (50, 8)
    assert "int8" in repr(int8)


def test_int8_wants_a_calibrated_network():
    mlp = freeze(MaskedMLP(6, (5, 4)))
    with pytest.raises(
        ValueError, match="network: got one without quantisation parameters, wanted a calibrated one for int8"
    ):
        mlp.to_precision("int8")
    with pytest.raises(ValueError, match="precision: got 'fp16', wanted one of fp32, bf16, int8"):
        mlp.to_precision("fp16")


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda mlp: pickle.loads(pickle.dumps(mlp))])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_copy_stands_on_its_own(precision, copied_by):
    mlp, x, out = wide_mlp().to_precision(precision), torch.randn(3, 300), torch.empty(3, 2)
    wanted = mlp(x)
    copied = copied_by(mlp)
    for layer in mlp.network.hidden:
        layer.weight.values.zero_()
    copied.score_into(x, out)
    assert_exact(out, wanted)
    assert_exact(copied(x), wanted)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_state_carries_the_whole_network(precision, tmp_path):
    mlp = wide_mlp().to_precision(precision)
    torch.save(mlp.state_dict(), tmp_path / "state.pt")
    other = freeze(masked_mlp((300, 24, 17), ("ctr", "cvr"), 0.1, 7))
    x = torch.randn(9, 300)
    other(x)  # prepacks what the state replaces
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.precision == precision
    assert_exact(other(x), mlp(x))


@pytest.mark.parametrize(
    ("widths", "tasks", "sigmoid"),
    [
        ((300, 24, 16), ("ctr", "cvr"), False),
        ((300, 24), ("ctr", "cvr"), False),
        ((300, 24, 17), ("cvr", "ctr"), False),
        ((300, 24, 17), ("ctr",), False),
        ((300, 24, 17), ("ctr", "cvr"), True),
    ],
)
def test_the_state_of_another_form_is_refused(widths, tasks, sigmoid):
    state = wide_mlp().state_dict()
    other, x = freeze(masked_mlp(widths, tasks, 0.3, 1), sigmoid=sigmoid), torch.randn(2, 300)
    before = other(x)
    with pytest.raises(ValueError, match=r"state: got a network of widths 300-24-17-1, tasks ctr, cvr, .*, wanted"):
        other.load_state_dict(state)
    assert_exact(other(x), before)


def test_a_state_without_the_network_is_refused():
    mlp = wide_mlp()
    with pytest.raises(RuntimeError, match="Missing key"):
        mlp.load_state_dict({})
    broken = mlp.state_dict()
    broken["_extra_state"]["tensors"]["layers.0.row_offsets"][1] += 1
    with pytest.raises(ValueError, match="row_offsets"):
        freeze(masked_mlp((300, 24, 17), ("ctr", "cvr"), 0.6, 0)).load_state_dict(broken)


@needs_engine
def test_only_what_is_used_is_prepacked():
    mlp = wide_mlp()
    assert mlp.prepacked_nbytes == {}
    mlp(torch.randn(1, 300))
    prepacked = cpu.Prepacked(cpu.prepack(mlp.network))
    assert list(mlp.prepacked_nbytes) == [prepacked.path_for(1)]
    mlp(torch.randn(70, 300))
    assert set(mlp.prepacked_nbytes) == {prepacked.path_for(batch) for batch in (1, 70)}


@needs_engine
@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_serving_one_batch_size_takes_at_most_twice_the_canonical_bytes(precision, batch):
    mlp = freeze(masked_mlp((512, 256, 128), ("task",), 0.2, 0))
    mlp = mlp.calibrated(torch.randn(64, 512)).to_precision(precision)
    mlp(torch.randn(batch, 512))
    (prepacked,) = mlp.prepacked_nbytes.values()
    assert prepacked <= 2 * mlp.nbytes


@needs_engine
@pytest.mark.parametrize("precision", PRECISIONS)
def test_compilers_and_tracers_see_one_operator(precision):
    mlp = wide_mlp().to_precision(precision)
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    wanted = mlp(x)
    exported = torch.export.export(mlp, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert torch.ops.lt4rec_sparse.sparse_mlp.default in targets
    more = torch.randn(90, 300, generator=torch.Generator().manual_seed(1))
    for module in (exported.module(), torch.compile(mlp, fullgraph=True, backend="eager")):
        assert_exact(module(x), wanted)
        assert_exact(module(more), mlp(more))
    other = wide_mlp(seed=1).to_precision(precision)
    compiled = torch.compile(mlp, fullgraph=True, backend="eager")
    compiled(x)
    mlp.load_state_dict(other.state_dict())
    assert_exact(compiled(x), other(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch says about tracing, which users still do
        traced = torch.jit.trace(mlp, (x,), check_trace=False)
    assert_exact(traced(more), mlp(more))


@needs_engine
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_of_several_is_compiled_whole(backend):
    torch.compiler.reset()
    layers = [SparseLinear.from_dense(torch.randn(8, 8) * (torch.rand(8, 8) < 0.5)) for _ in range(2)]
    model = torch.nn.Sequential(layers[0], torch.nn.LayerNorm(8), layers[1], layers[0]).requires_grad_(False)
    compiled, x = torch.compile(model, fullgraph=True, backend=backend), torch.randn(3, 8)
    assert_exact(compiled(x), model(x))
    more = torch.randn(90, 8)
    assert_exact(compiled(more), model(more))  # another layout
    copied = copy.deepcopy(model)
    for layer in (copied[0], copied[2]):
        layer.become(layer.to_precision("bf16"))
    assert_exact(torch.compile(copied, fullgraph=True, backend=backend)(x), copied(x))
    assert_exact(compiled(x), model(x))
    with pytest.raises(RuntimeError, match="wanted inference only"):
        torch.compile(layers[0], backend=backend)(torch.randn(2, 8, requires_grad=True)).sum().backward()


@needs_engine
def test_a_graph_does_not_keep_a_module_that_is_gone():
    torch.compiler.reset()
    kept, gone = (SparseLinear.from_dense(torch.eye(8)) for _ in range(2))
    with pytest.raises(RuntimeError, match="got the graph of a module that is no more"):
        ops.sparse_mlp_of(torch.ones(1, 8), "none", 8)
    copied, x = copy.deepcopy(gone), torch.ones(2, 8)
    del gone
    gc.collect()
    assert_exact(torch.compile(copied, fullgraph=True, backend="eager")(x), kept(x))


@needs_engine
def test_a_tensor_without_memory_is_refused_in_one_line():
    mlp = wide_mlp()
    with pytest.raises(ValueError, match=r"x or out: got a tensor without memory of its own, as under torch\.vmap"):
        torch.vmap(lambda row: mlp(row[None])[0])(torch.randn(6, 300))


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_scores_are_float32_whatever_the_default_dtype(dtype):
    mlp, x = wide_mlp(), torch.randn(3, 300)
    wanted = mlp(x)
    torch.set_default_dtype(dtype)
    try:
        assert_exact(mlp(x), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_result_has_the_dtype_of_x_and_is_rounded_once(precision, x_dtype):
    mlp = wide_mlp().to_precision(precision)
    x = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(0)).to(x_dtype)
    wanted = mlp(x.float()).to(x_dtype)
    torch.compiler.reset()  # forgets what other tests compiled, of which it keeps eight at most
    compiled = torch.compile(mlp, fullgraph=True, backend="eager")
    for y in (mlp(x), compiled(x), mlp(x.mT.contiguous().mT), torch.stack([mlp(part) for part in x])):
        assert_exact(y, wanted)
    assert_exact(mlp(x, "cvr"), wanted[..., 1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_decides_the_dtype_of_the_result(dtype):
    mlp, x = wide_mlp(), torch.randn(5, 300)
    wanted = mlp(x).to(dtype)
    torch.compiler.reset()
    with torch.autocast("cpu", dtype):
        assert_exact(mlp(x), wanted)
        assert_exact(torch.compile(mlp, fullgraph=True, backend="eager")(x), wanted)
    assert mlp(x).dtype == torch.float32


def test_a_meta_tensor_gives_the_shape_and_dtype_of_the_result():
    mlp = wide_mlp()
    for dtype in (torch.float32, torch.bfloat16):
        y = mlp(torch.empty(5, 300, dtype=dtype, device="meta"))
        assert (y.shape, y.dtype, y.device.type) == ((5, mlp.out_features), dtype, "meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(torch.empty(5, 300, device="meta")).dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_the_reference_or_calibration(dtype, precision):
    mlp, x = wide_mlp(), torch.randn(50, 300)
    network = calibrate(mlp.network, x)
    executor, outs = reference.Executor(network, precision), torch.full((2, 50, mlp.out_features), torch.nan)
    executor.run(x, outs[0])
    entering = list(executor.inputs(x, network.tasks[0]))
    with torch.autocast("cpu", dtype):
        executor.run(x, outs[1])
        assert calibrate(mlp.network, x).quantization == network.quantization
        for h, wanted in zip(executor.inputs(x, network.tasks[0]), entering, strict=True):
            assert_exact(h, wanted)
            assert torch.is_autocast_enabled("cpu")
    assert_exact(outs[1], outs[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_rounded_to_a_dtype_and_kept_in_it(dtype):
    masked, x = masked_mlp((300, 24, 17), ("ctr", "cvr"), 0.6, 0), torch.randn(5, 300)
    rounded = copy.deepcopy(masked)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(dtype).float()
    mlp = torch.nn.Sequential(freeze(masked))
    nbytes, values = mlp[0].nbytes, mlp[0].network.hidden[0].weight.values.nbytes
    mlp(x)
    mlp.to(dtype)
    assert mlp[0].network.hidden[0].weight.values.nbytes == values // 2
    assert mlp[0].nbytes < 0.6 * nbytes
    assert_exact(mlp(x), freeze(rounded)(x))
    assert_exact(copy.deepcopy(mlp).float()(x), mlp(x))
    other = freeze(masked_mlp((300, 24, 17), ("ctr", "cvr"), 0.1, 7))
    other.load_state_dict(mlp[0].state_dict())
    assert other.network.dtype == dtype
    assert_exact(other(x), mlp(x))


def test_dtypes_that_cannot_be_are_refused_and_change_nothing():
    mlp, x = freeze(masked_mlp((300, 24, 17), ("ctr", "cvr"), 0.6, 0)), torch.randn(2, 300)
    wanted = mlp(x)
    with pytest.raises(ValueError, match=r"dtype: got torch.float64, wanted one of torch.float32, "):
        mlp.double()
    large = SparseLinear.from_dense(torch.full((2, 2), 1e6))
    with pytest.raises(ValueError, match=r"dtype: got a weight of 1e\+06, wanted at most 65504, .* torch.float16"):
        large.half()
    assert_exact(large(torch.ones(1, 2)), torch.full((1, 2), 2e6))
    for bad in (x.double(), x.long(), x.bool()):
        with pytest.raises(ValueError, match=r"x: got torch.\w+, wanted torch.float32, torch.bfloat16, torch.float16"):
            mlp(bad)
    assert_exact(mlp(x), wanted)
    assert mlp.cpu().network.dtype == mlp.float().network.dtype == torch.float32


def test_no_rows_in_whatever_strides():
    mlp = wide_mlp()
    for x in (torch.empty_strided((0, 300), (0, 0)), torch.empty(300, 0).T, torch.empty(0, 300)[:, ::1]):
        assert mlp(x).shape == (0, 2)


def test_a_backward_pass_is_refused():
    mlp = wide_mlp()
    if ops.cpu_engine() == "reference":
        pytest.skip("the dense reference is not an operator of ours")
    with pytest.raises(RuntimeError, match="wanted inference only"):
        mlp(torch.randn(2, 300, requires_grad=True)).sum().backward()


def test_a_model_without_masked_layers_is_refused():
    with pytest.raises(ValueError, match="model: got a Linear without masked or pruned layers"):
        freeze(torch.nn.Linear(2, 2))


def test_a_wrong_width_is_named():
    mlp = freeze(MaskedMLP(6, (5, 4)))
    for x in (torch.ones(2, 5), torch.ones(2, 5, requires_grad=True)):
        with pytest.raises(ValueError, match=r"x: got shape \(2, 5\), wanted \[batch, 6\]"):
            mlp(x)
    for x in (torch.ones(3, 2, 5), torch.ones(5), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"x: got shape .*, wanted \[..., 6\]"):
            mlp(x)


def test_compressed_is_smaller_and_says_so():
    frozen = freeze(masked_mlp((256, 128, 64), ("ctr", "cvr"), 0.1, 0))
    dense = 4 * (256 * 128 + 128 * 64)
    assert frozen.nbytes < dense / 3
    assert "densities: 10.0%, 10.0%" in repr(frozen)
