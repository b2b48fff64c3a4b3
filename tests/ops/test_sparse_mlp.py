import copy
import pickle
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Bounded, Layer, assert_exact, assert_rounding, linear_reference, mlp_reference, small_integers

from lt4rec_sparse import ops
from lt4rec_sparse.formats import SharedWeight
from lt4rec_sparse.kernels import cpu, reference


def sparse_problem(widths, tasks=("ctr", "cvr"), density=0.3, seed=0, integers=False):
    """A frozen MLP a task: paths for `prepack`, and the same layers for the oracle."""
    generator = torch.Generator().manual_seed(seed)
    paths, oracle = {task: [] for task in tasks}, {task: [] for task in tasks}
    for i, (k, n) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        make = small_integers if integers else lambda *s, generator: torch.randn(*s, generator=generator) / s[-1] ** 0.5
        weight, bias = make(n, k, generator=generator), make(n, generator=generator)
        masks = {task: torch.rand(n, k, generator=generator) < density for task in tasks}
        activation = "relu" if i < len(widths) - 2 else "none"
        layer = ops.SparseLayer(SharedWeight.from_dense(weight, masks), bias, activation)
        for task in tasks:
            paths[task].append((layer, task))
            oracle[task].append(Layer(weight * masks[task], bias, activation))
    return list(paths.values()), list(oracle.values())


needs_engine = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")


@needs_engine
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    batch=st.integers(0, 70),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_sparse_mlp_is_within_the_rounding_bound(widths, batch, density, seed):
    paths, oracle = sparse_problem(widths, density=density, seed=seed)
    x = torch.randn(batch, widths[0], generator=torch.Generator().manual_seed(seed))
    outputs = 2 * widths[-1]
    for y in (ops.sparse_mlp(x, ops.prepack(paths), outputs), ops.sparse_mlp_dense(x, paths)):
        for i, layers in enumerate(oracle):
            assert_rounding(y[:, i * widths[-1] : (i + 1) * widths[-1]], mlp_reference(x, layers))


@needs_engine
def test_sparse_mlp_takes_strided_rows_and_columns():
    paths, _ = sparse_problem([6, 5, 1], integers=True)
    prepacked = ops.prepack(paths)
    wide = small_integers(9, 12, generator=torch.Generator().manual_seed(1))
    for x in (wide[:, 3:9], wide[:, ::2], wide[:, :6].T.contiguous().T):
        assert_exact(ops.sparse_mlp(x, prepacked, 2), ops.sparse_mlp(x.contiguous(), prepacked, 2))


@needs_engine
def test_opcheck_sparse_mlp():
    paths, _ = sparse_problem([6, 5, 1])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.lt4rec_sparse.sparse_mlp, (torch.randn(4, 6), ops.prepack(paths), 2), test_utils=tests
    )


@needs_engine
def test_sparse_mlp_has_no_backward_pass():
    paths, _ = sparse_problem([6, 5, 1])
    y = ops.sparse_mlp(torch.randn(4, 6, requires_grad=True), ops.prepack(paths), 2)
    with pytest.raises(RuntimeError, match="wanted inference only"):
        y.sum().backward()


@needs_engine
def test_sparse_mlp_refuses_what_it_cannot_read():
    prepacked = ops.prepack(sparse_problem([6, 5, 1])[0])
    with pytest.raises(ValueError, match=r"x: got shape \(6,\), wanted \[batch, in_features\]"):
        ops.sparse_mlp(torch.ones(6), prepacked, 2)
    with pytest.raises(TypeError, match=r"x: got torch\.float64 on cpu"):
        ops.sparse_mlp(torch.ones(2, 6, dtype=torch.float64), prepacked, 2)


# Lower precisions, whose specification is the reference


def codes_of(paths, seed=0):
    """Codes that reach the ends for some activations; the tasks count `x` alike."""
    draw = random.Random(seed)
    codes = [[ops.Codes(draw.uniform(0.001, 0.02), draw.randrange(256)) for _ in path] for path in paths]
    return [[codes[0][0], *of_task[1:]] for of_task in codes]


def engine_and_reference(x, paths, precision, codes=None):
    outputs = sum(path[-1][0].weight.shape[0] for path in paths)
    engine = ops.sparse_mlp(x, ops.prepack(paths, precision, codes), outputs)
    return engine, ops.sparse_mlp_dense(x, paths, precision, codes)


@needs_engine
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(1, 80), st.integers(1, 40)),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_bf16_is_within_the_rounding_bound_of_rounded_operands(shape, density, seed):
    batch, k, n = shape
    paths, oracle = sparse_problem([k, n], density=density, seed=seed)
    x = torch.randn(batch, k, generator=torch.Generator().manual_seed(seed))
    for y in engine_and_reference(x, paths, "bf16"):
        for i, ((weight, bias, _),) in enumerate(oracle):
            wanted = linear_reference(x.bfloat16().float(), weight.bfloat16(), bias, torch.float32)
            assert_rounding(y[:, n * i : n * (i + 1)], wanted)


@needs_engine
def test_bf16_is_exact_where_it_rounds_nothing():
    # Sums of 20 small integers at most: hidden activations below 256 are bfloat16s.
    paths, oracle = sparse_problem([20, 31, 3], density=0.7, integers=True)
    x = small_integers(70, 20, generator=torch.Generator().manual_seed(1))
    for y in engine_and_reference(x, paths, "bf16"):
        for i, layers in enumerate(oracle):
            assert_exact(y[:, 3 * i : 3 * i + 3], mlp_reference(x, layers).value.float())


def test_the_bf16_reference_counts_denormals_as_zero():
    layer = reference.DenseLayer(torch.full((1, 1), 2.0**100), None, "none")
    x = torch.tensor([[2.0**-126], [2.0**-127]])
    assert reference.sparse_mlp(x, [[layer]], "bf16").tolist() == [[2.0**-26], [0.0]]
    if cpu.is_available():
        weight = SharedWeight.from_dense(layer.weight, {"all": torch.ones(1, 1, dtype=torch.bool)})
        paths = [[(ops.SparseLayer(weight, None, "none"), "all")]]
        assert_exact(*engine_and_reference(x, paths, "bf16"))


@needs_engine
@given(
    widths=st.lists(st.integers(1, 90), min_size=2, max_size=4),
    batch=st.integers(0, 40),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_int8_is_exactly_the_reference(widths, batch, density, seed):
    paths, _ = sparse_problem(widths, ("task",), density, seed)
    x = torch.randn(batch, widths[0], generator=torch.Generator().manual_seed(seed))
    assert_exact(*engine_and_reference(x, paths, "int8", codes_of(paths, seed)))


@needs_engine
@pytest.mark.parametrize("tasks", [("a", "b"), ("a", "b", "c")])
def test_int8_is_exactly_the_reference_where_tasks_share_products(tasks):
    paths, _ = sparse_problem([300, 24, 17, 1], tasks, density=0.7)
    assert cpu.describe(ops.prepack(paths, "int8", codes_of(paths))).layers == 3 * len(tasks) + 1
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    assert_exact(*engine_and_reference(x, paths, "int8", codes_of(paths)))


def test_the_int8_reference_by_hand():
    # Codes 0 to 255 of [-1, 1.55]: 0.5 is code 150, 9 is 255, -9 is 0. The largest weight is 127 steps of 0.25.
    layer = reference.DenseLayer(
        torch.tensor([[31.75, -0.6], [0.0, 0.0]]), torch.tensor([1.0, 2.0]), "relu", (0.01, 100)
    )
    x = torch.tensor([[0.5, 0.0], [9.0, 0.5], [-9.0, 0.5]])
    codes = torch.tensor([[50, 0], [155, 50], [-100, 50]])
    wanted = [127 * a - 2 * b for a, b in codes.tolist()]
    y = reference.sparse_mlp(x, [[layer]], "int8")
    assert_rounding(
        y[:, :1], Bounded(torch.tensor(wanted)[:, None].double().mul(0.0025).add(1).relu(), 1e-6 * torch.ones(3, 1))
    )
    assert y[:, 1].tolist() == [2.0, 2.0, 2.0]


@needs_engine
def test_int8_makes_nan_of_nan_and_ends_of_infinities():
    paths, _ = sparse_problem([9, 6, 1], ("task",), density=1.0)
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    x[0, 3], x[1, 0], x[2, 8] = float("nan"), float("inf"), float("-inf")
    engine, wanted = engine_and_reference(x, paths, "int8", codes_of(paths))
    for y in (engine, wanted):
        assert y.isnan().squeeze(1).tolist() == [True, False, False, False, False, False]
    assert_exact(engine[1:], wanted[1:])
    x[1, 0], x[2, 8] = 1e30, -1e30
    assert_exact(engine_and_reference(x, paths, "int8", codes_of(paths))[0][1:], wanted[1:])


@pytest.mark.parametrize("precision", ops.PRECISIONS)
def test_a_bfloat16_x_is_widened(precision):
    paths, _ = sparse_problem([33, 20, 2])
    codes = codes_of(paths)
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_exact(*(ops.sparse_mlp_dense(v, paths, precision, codes) for v in (x, x.float())))
    if cpu.is_available():
        prepacked = ops.prepack(paths, precision, codes)
        assert_exact(*(ops.sparse_mlp(v, prepacked, 4) for v in (x, x.float())))


@pytest.mark.parametrize("make", [ops.prepack, lambda *rest: ops.sparse_mlp_dense(torch.ones(2, 6), *rest)])
def test_precisions_that_cannot_be_are_refused(make):
    paths, _ = sparse_problem([6, 5, 1])
    with pytest.raises(ValueError, match="precision: got 'fp8', wanted one of fp32, bf16, int8"):
        make(paths, "fp8")
    with pytest.raises(ValueError, match="codes: got None, wanted codes for each task and layer, as int8 needs them"):
        make(paths, "int8")
    with pytest.raises(ValueError, match=r"codes: got .* for x, wanted the same for all tasks"):
        make(paths, "int8", [[ops.Codes(scale, 0), ops.Codes(1.0, 0)] for scale in (1.0, 2.0)])


@needs_engine
@pytest.mark.parametrize("precision", ops.PRECISIONS)
def test_sparse_mlp_out_writes_what_sparse_mlp_returns(precision):
    paths, _ = sparse_problem([40, 9, 3])
    prepacked = ops.prepack(paths, precision, codes_of(paths))
    x = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))[:, 5:45]
    buffer = torch.full((5, 10), float("nan"))
    ops.sparse_mlp_out(x, prepacked, buffer[:, 2:8])
    assert_exact(buffer[:, 2:8], ops.sparse_mlp(x, prepacked, 6))
    assert buffer[:, [0, 1, 8, 9]].isnan().all()
    with pytest.raises(ValueError, match=r"^out: got"):
        ops.sparse_mlp_out(x, prepacked, buffer[:4, :6])


@needs_engine
def test_a_copy_of_a_network_reads_its_own_memory():
    paths, _ = sparse_problem([40, 9, 3])
    network, x = ops.Network(ops.prepack(paths)), torch.randn(5, 40)
    wanted, out = ops.sparse_mlp(x, network._prepacked, 6), torch.empty(5, 6)
    copies = [copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    network._prepacked.zero_()
    for one in copies:
        one.sparse_mlp(x, out)
        assert_exact(out, wanted)


def test_the_reference_reads_what_the_engine_reads():
    paths, _ = sparse_problem([6, 5, 1])
    with pytest.raises(TypeError, match=r"x: got torch\.float64, wanted torch\.float32 or torch\.bfloat16"):
        ops.sparse_mlp_dense(torch.ones(2, 6, dtype=torch.float64), paths)


def test_layer_inputs_are_the_activations_between_layers():
    (path, _), (oracle, _) = sparse_problem([30, 20, 7, 1])
    x = torch.randn(9, 30, generator=torch.Generator().manual_seed(0))
    first, *hidden = ops.layer_inputs(x, path)
    assert first is x
    assert len(hidden) == 2
    for i, h in enumerate(hidden, 1):
        assert_rounding(h, mlp_reference(x, oracle[:i]))


def test_without_the_engine_one_warning_says_so(monkeypatch):
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    paths, _ = sparse_problem([6, 5, 1])
    with pytest.warns(RuntimeWarning, match="sparse MLPs run dense in torch"):
        assert ops.prepack(paths) is None


def test_reference_activations():
    layer = reference.DenseLayer(torch.eye(2), None, "sigmoid")
    assert_exact(reference.sparse_mlp(torch.zeros(1, 2), [[layer]]), torch.full((1, 2), 0.5))
