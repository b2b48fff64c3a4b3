"""The engine and the reference run one frozen network alike; the operator stands for the engine in a graph."""

import copy
import pickle
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Bounded, Layer, assert_exact, assert_rounding, linear_reference, mlp_reference, small_integers

from lt4rec_sparse import FrozenNetwork, ops
from lt4rec_sparse.formats import SharedWeight
from lt4rec_sparse.kernels import cpu, reference
from lt4rec_sparse.network import PRECISIONS, DenseLayer, QuantizationParameters, SparseLayer

needs_engine = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")


def sparse_problem(widths, tasks=("ctr", "cvr"), density=0.3, seed=0, integers=False):
    """A calibrated network without heads, and the same layers of each task for the oracle."""
    generator = torch.Generator().manual_seed(seed)
    hidden, oracle = [], {task: [] for task in tasks}
    for i, (k, n) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        make = small_integers if integers else lambda *s, generator: torch.randn(*s, generator=generator) / s[-1] ** 0.5
        weight, bias = make(n, k, generator=generator), make(n, generator=generator)
        masks = {task: torch.rand(n, k, generator=generator) < density for task in tasks}
        activation = "relu" if i < len(widths) - 2 else "none"
        hidden.append(SparseLayer(SharedWeight.from_dense(weight, masks), bias, activation))
        for task in tasks:
            oracle[task].append(Layer(weight * masks[task], bias, activation))
    return FrozenNetwork(tuple(hidden), {}, quantization(tasks, len(hidden), seed)), list(oracle.values())


def quantization(tasks, layers, seed=0):
    """Quantisation parameters that saturate for some activations; the tasks quantise `x` alike."""
    draw = random.Random(seed)
    found = {
        task: [QuantizationParameters(draw.uniform(0.001, 0.02), draw.randrange(256)) for _ in range(layers)]
        for task in tasks
    }
    return {task: (found[tasks[0]][0], *of_task[1:]) for task, of_task in found.items()}


def run(executor, x):
    out = torch.full((len(x), executor.network.outputs), torch.nan)
    executor.run(x, out)
    return out


def engine_and_reference(x, network, precision):
    return run(cpu.Executor(network, precision), x), run(reference.Executor(network, precision), x)


@needs_engine
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    batch=st.integers(0, 70),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_sparse_mlp_is_within_the_rounding_bound(widths, batch, density, seed):
    network, oracle = sparse_problem(widths, density=density, seed=seed)
    x = torch.randn(batch, widths[0], generator=torch.Generator().manual_seed(seed))
    operator = ops.sparse_mlp(x, ops.prepack(network), network.outputs)
    for y in (operator, *engine_and_reference(x, network, "fp32")):
        for i, layers in enumerate(oracle):
            assert_rounding(y[:, i * widths[-1] : (i + 1) * widths[-1]], mlp_reference(x, layers))


@needs_engine
def test_sparse_mlp_takes_strided_rows_and_columns():
    network, _ = sparse_problem([6, 5, 1], integers=True)
    prepacked = ops.prepack(network)
    wide = small_integers(9, 12, generator=torch.Generator().manual_seed(1))
    for x in (wide[:, 3:9], wide[:, ::2], wide[:, :6].T.contiguous().T):
        assert_exact(ops.sparse_mlp(x, prepacked, 2), ops.sparse_mlp(x.contiguous(), prepacked, 2))


@needs_engine
def test_opcheck_sparse_mlp():
    network, _ = sparse_problem([6, 5, 1])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.lt4rec_sparse.sparse_mlp, (torch.randn(4, 6), ops.prepack(network), 2), test_utils=tests
    )


@needs_engine
def test_sparse_mlp_has_no_backward_pass():
    network, _ = sparse_problem([6, 5, 1])
    y = ops.sparse_mlp(torch.randn(4, 6, requires_grad=True), ops.prepack(network), 2)
    with pytest.raises(RuntimeError, match="wanted inference only"):
        y.sum().backward()


@needs_engine
def test_sparse_mlp_refuses_what_it_cannot_read():
    prepacked = ops.prepack(sparse_problem([6, 5, 1])[0])
    with pytest.raises(ValueError, match=r"x: got shape \(6,\), wanted \[batch, in_features\]"):
        ops.sparse_mlp(torch.ones(6), prepacked, 2)
    with pytest.raises(ValueError, match=r"x: got torch\.float64 on cpu"):
        ops.sparse_mlp(torch.ones(2, 6, dtype=torch.float64), prepacked, 2)


# Lower precisions, whose specification is the reference


@needs_engine
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(1, 80), st.integers(1, 40)),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_bf16_is_within_the_rounding_bound_of_rounded_operands(shape, density, seed):
    batch, k, n = shape
    network, oracle = sparse_problem([k, n], density=density, seed=seed)
    x = torch.randn(batch, k, generator=torch.Generator().manual_seed(seed))
    for y in engine_and_reference(x, network, "bf16"):
        for i, ((weight, bias, *_),) in enumerate(oracle):
            wanted = linear_reference(x.bfloat16().float(), weight.bfloat16(), bias, torch.float32)
            assert_rounding(y[:, n * i : n * (i + 1)], wanted)


@needs_engine
def test_bf16_is_exact_where_it_rounds_nothing():
    # Sums of 20 small integers at most: hidden activations below 256 are bfloat16s.
    network, oracle = sparse_problem([20, 31, 3], density=0.7, integers=True)
    x = small_integers(70, 20, generator=torch.Generator().manual_seed(1))
    for y in engine_and_reference(x, network, "bf16"):
        for i, layers in enumerate(oracle):
            assert_exact(y[:, 3 * i : 3 * i + 3], mlp_reference(x, layers).value.float())


def one_layer(weight, bias, activation, parameters=None):
    return FrozenNetwork((), {"task": DenseLayer(weight, bias, activation)}, parameters and {"task": (parameters,)})


def test_bf16_counts_denormals_as_zero():
    network = one_layer(torch.full((1, 1), 2.0**100), None, "none")
    x = torch.tensor([[2.0**-126], [2.0**-127]])
    assert run(reference.Executor(network, "bf16"), x).tolist() == [[2.0**-26], [0.0]]
    if cpu.is_available():
        assert_exact(*engine_and_reference(x, network, "bf16"))


@needs_engine
@given(
    widths=st.lists(st.integers(1, 90), min_size=2, max_size=4),
    tasks=st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")]),
    batch=st.integers(0, 40),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_int8_is_exactly_the_reference(widths, tasks, batch, density, seed):
    network, _ = sparse_problem(widths, tasks, density, seed)
    x = torch.randn(batch, widths[0], generator=torch.Generator().manual_seed(seed))
    assert_exact(*engine_and_reference(x, network, "int8"))


@needs_engine
@pytest.mark.parametrize("tasks", [("a", "b"), ("a", "b", "c")])
def test_int8_is_exactly_the_reference_where_tasks_share_multiply_adds(tasks):
    network, _ = sparse_problem([300, 24, 17, 1], tasks, density=0.7)
    facts = cpu.describe(ops.prepack(network, "int8"))
    assert facts.multiply_adds < facts.nnz
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    assert_exact(*engine_and_reference(x, network, "int8"))


def test_the_int8_reference_by_hand():
    # 0 to 255 stand for -1 to 1.55: 0.5 is 150, 9 is 255, -9 is 0. The largest weight is 127 steps of 0.25.
    weight, bias = torch.tensor([[31.75, -0.6], [0.0, 0.0]]), torch.tensor([1.0, 2.0])
    network = one_layer(weight, bias, "relu", QuantizationParameters(0.01, 100))
    x = torch.tensor([[0.5, 0.0], [9.0, 0.5], [-9.0, 0.5]])
    quantized = torch.tensor([[50, 0], [155, 50], [-100, 50]])
    wanted = [127 * a - 2 * b for a, b in quantized.tolist()]
    y = run(reference.Executor(network, "int8"), x)
    assert_rounding(
        y[:, :1], Bounded(torch.tensor(wanted)[:, None].double().mul(0.0025).add(1).relu(), 1e-6 * torch.ones(3, 1))
    )
    assert y[:, 1].tolist() == [2.0, 2.0, 2.0]


@needs_engine
def test_int8_makes_nan_of_nan_and_ends_of_infinities():
    network, _ = sparse_problem([9, 6, 1], ("task",), density=1.0)
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    x[0, 3], x[1, 0], x[2, 8] = float("nan"), float("inf"), float("-inf")
    engine, wanted = engine_and_reference(x, network, "int8")
    for y in (engine, wanted):
        assert y.isnan().squeeze(1).tolist() == [True, False, False, False, False, False]
    assert_exact(engine[1:], wanted[1:])
    x[1, 0], x[2, 8] = 1e30, -1e30
    assert_exact(engine_and_reference(x, network, "int8")[0][1:], wanted[1:])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bfloat16_x_is_widened(precision):
    network, _ = sparse_problem([33, 20, 2])
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    executors = [reference.Executor(network, precision)]
    executors += [cpu.Executor(network, precision)] if cpu.is_available() else []
    for executor in executors:
        assert_exact(run(executor, x), run(executor, x.float()))


def test_precisions_that_cannot_be_are_refused():
    network, _ = sparse_problem([6, 5, 1])
    with pytest.raises(ValueError, match="precision: got 'fp8', wanted one of fp32, bf16, int8"):
        ops.executor(network, "fp8")
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match="network: got one without quantisation parameters, wanted a calibrated"):
            ops.executor(network.with_quantization(None), "int8", device)


@needs_engine
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_executor_writes_what_the_operator_returns(precision):
    network, _ = sparse_problem([40, 9, 3])
    x = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))[:, 5:45]
    buffer = torch.full((5, 10), float("nan"))
    executor = ops.executor(network, precision)
    executor.run(x, buffer[:, 2:8])
    assert_exact(buffer[:, 2:8], ops.sparse_mlp(x, ops.prepack(network, precision), 6))
    assert buffer[:, [0, 1, 8, 9]].isnan().all()
    with pytest.raises(ValueError, match=r"^out: got"):
        executor.run(x, buffer[:4, :6])


@needs_engine
def test_a_copy_of_what_is_prepacked_reads_its_own_memory():
    network, _ = sparse_problem([40, 9, 3])
    blob, x = ops.prepack(network), torch.randn(5, 40)
    prepacked = cpu.Prepacked(blob)
    wanted, out = ops.sparse_mlp(x, blob, 6), torch.empty(5, 6)
    copies = [copy.deepcopy(prepacked), pickle.loads(pickle.dumps(prepacked))]
    blob.zero_()
    for one in copies:
        one.run(x, out)
        assert_exact(out, wanted)


@pytest.mark.parametrize("make", [reference.Executor, cpu.Executor])
def test_every_executor_refuses_what_the_engine_does_not_read(make):
    if make is cpu.Executor and not cpu.is_available():
        pytest.skip(f"no native engine: {cpu.absence_reason()}")
    executor = make(sparse_problem([6, 5, 1])[0])
    for x, message in (
        (torch.ones(2, 6, dtype=torch.float64), r"x: got torch\.float64"),
        (torch.ones(2, 7), r"x: got shape \(2, 7\), wanted \[batch, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            executor.run(x, torch.empty(2, 2))
    with pytest.raises(ValueError, match="out: got"):
        executor.run(torch.ones(2, 6), torch.empty(1, 2))


def test_layer_inputs_are_the_activations_between_layers():
    network, (oracle, _) = sparse_problem([30, 20, 7, 1])
    x = torch.randn(9, 30, generator=torch.Generator().manual_seed(0))
    first, *hidden = ops.layer_inputs(network, x, "ctr")
    assert_exact(first, x)
    assert len(hidden) == 2
    for i, h in enumerate(hidden, 1):
        assert_rounding(h, mlp_reference(x, oracle[:i]))


def test_without_the_engine_one_warning_says_so(monkeypatch):
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    with pytest.warns(RuntimeWarning, match="sparse MLPs run dense in torch. To get it, install a C.. compiler"):
        assert isinstance(ops.executor(sparse_problem([6, 5, 1])[0]), reference.Executor)


def test_reference_activations():
    network = one_layer(torch.eye(2), None, "sigmoid")
    assert_exact(run(reference.Executor(network), torch.zeros(1, 2)), torch.full((1, 2), 0.5))
