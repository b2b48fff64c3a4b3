"""A frozen network in the engine: prepacked from values and bit planes, each layout when a batch first needs it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from kernels.networks import MaskedLayer, is_shared, pack_bits, random_mask
from kernels.networks import prepack as prepack_tasks
from oracle import assert_exact, small_integers
from torch import Tensor

from lt4rec_sparse.formats import SharedWeight
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.network import DenseLayer, FrozenNetwork, QuantizationParameters, SparseLayer

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")

WIDTHS = (90, 40, 33)
TASKS = ("click", "watch", "buy")
LARGE = 4096  # rows: enough for slices wherever they are the faster path
QUANTIZATION = {
    task: (QuantizationParameters(0.05, 117), QuantizationParameters(0.3, t), QuantizationParameters(0.5, 5 * t))
    for t, task in enumerate(TASKS)
}
precisions = pytest.mark.parametrize("precision", cpu.PRECISIONS)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frozen_network(
    dtype: torch.dtype = torch.float32, has_heads: bool = True, has_bias: bool = True, quantized: bool = True
) -> FrozenNetwork:
    hidden = []
    for i, (columns, rows) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False)):
        common = random_mask(rows, columns, 0.3, seed=i)
        masks = {task: common | random_mask(rows, columns, 0.2, seed=10 * i + t) for t, task in enumerate(TASKS)}
        weight = SharedWeight.from_dense(normal(rows, columns, seed=i).to(dtype), masks)
        hidden.append(SparseLayer(weight, normal(rows, seed=20 + i).to(dtype) if has_bias else None, "relu"))
    heads = {
        task: DenseLayer(
            normal(2, WIDTHS[-1], seed=30 + t).to(dtype), normal(2, seed=40 + t) if has_bias else None, "sigmoid"
        )
        for t, task in enumerate(TASKS)
    }
    quantization = {task: of_task[: 2 + has_heads] for task, of_task in QUANTIZATION.items()}
    return FrozenNetwork(tuple(hidden), heads if has_heads else {}, quantization if quantized else None)


def packed_by_hand(network: FrozenNetwork) -> list[list[cpu.PackLayer]]:
    """The same layers by `to_dense` and the masks: weights that are shared hold the same tensors."""
    assert network.quantization is not None
    shared = []
    for layer in network.hidden:
        masks = torch.stack([layer.weight.mask(task) for task in network.tasks])
        shared.append((layer.weight.to_dense().float()[masks.any(dim=0)], pack_bits(masks)))
    tasks = []
    for t, task in enumerate(network.tasks):
        layers = []
        for i, parameters in enumerate(network.quantization[task]):
            weight, bias, activation, _ = network.layer(i, task)
            values, planes = shared[i] if i < len(shared) else (weight.flatten(), None)
            plane = t if planes is not None else 0
            layers.append(
                cpu.PackLayer(values, planes, plane, bias, weight.shape[1], weight.shape[0], activation, *parameters)
            )
        tasks.append(layers)
    return tasks


@precisions
@pytest.mark.parametrize("layouts", (("tables",), ("slices",), cpu.UNSTRUCTURED), ids="-".join)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(("has_heads", "has_bias"), ((True, True), (True, False), (False, True)))
def test_a_network_is_prepacked_as_its_layers_are(
    precision: str, layouts: tuple[str, ...], dtype: torch.dtype, has_heads: bool, has_bias: bool
) -> None:
    network = frozen_network(dtype, has_heads, has_bias)
    blob = cpu.prepack(network, precision, layouts)
    assert is_shared(blob)
    assert torch.equal(blob, cpu.prepack_layers(packed_by_hand(network), precision, layouts))


@precisions
def test_a_network_is_prepacked_as_its_tasks_are(precision: str) -> None:
    network = frozen_network()
    assert network.quantization is not None
    tasks = []
    for task, of_task in network.quantization.items():
        layers = [network.layer(i, task) for i in range(network.depth)]
        tasks.append(
            [
                MaskedLayer(layer.weight, network.mask(i, task), layer.bias, layer.activation, *of_task[i])
                for i, layer in enumerate(layers)
            ]
        )
    assert torch.equal(cpu.prepack(network, precision, cpu.UNSTRUCTURED), prepack_tasks(tasks, precision))


@precisions
def test_some_tasks_and_some_layers_are_a_network_too(precision: str) -> None:
    network = frozen_network().span(0, 1, ("buy", "click"))
    assert torch.equal(cpu.prepack(network, precision), cpu.prepack_layers(packed_by_hand(network), precision))


@pytest.mark.parametrize("of", (cpu.prepack, cpu.Executor), ids=("prepack", "executor"))
def test_int8_needs_quantisation_parameters(of: type[cpu.Executor]) -> None:
    network = frozen_network(quantized=False)
    with pytest.raises(ValueError, match="network: got one without quantisation parameters, wanted a calibrated one"):
        of(network, "int8")
    for precision in ("fp32", "bf16"):
        of(network, precision)


def test_a_precision_that_does_not_exist_is_refused() -> None:
    for use in (cpu.prepack, cpu.Executor):
        with pytest.raises(ValueError, match="precision: got 'fp16', wanted one of fp32, bf16, int8"):
            use(frozen_network(), "fp16")


def run(executor: cpu.Executor | cpu.Prepacked, x: Tensor) -> Tensor:
    out = torch.full((len(x), 2 * len(TASKS)), torch.nan)
    executor.run(x, out)
    return out


@precisions
def test_an_executor_prepacks_the_layouts_that_it_needs(precision: str) -> None:
    network = frozen_network()
    executor = cpu.Executor(network, precision)
    assert executor.prepacked_nbytes == {}
    whole = cpu.Prepacked(cpu.prepack(network, precision))
    sizes: dict[str, int] = {}
    for batch in (0, 1, 2, LARGE, 1):
        path = whole.path_for(batch)
        sizes[path] = cpu.prepack(network, precision, (path,)).nbytes
        run(executor, normal(batch, WIDTHS[0], seed=batch))
        assert executor.prepacked_nbytes == sizes
    assert set(sizes) == set(whole.facts.layouts)


@precisions
def test_an_executor_keeps_to_the_layout_that_it_is_given(precision: str) -> None:
    network = frozen_network()
    for layout in cpu.describe(cpu.prepack(network, precision, cpu.UNSTRUCTURED)).layouts:
        whole, executor = cpu.Executor(network, precision), cpu.Executor(network, precision, layout)
        for held in (executor, copy.deepcopy(executor), pickle.loads(pickle.dumps(executor))):
            for batch in (1, LARGE, 5):
                x = normal(batch, WIDTHS[0], seed=batch)
                assert_exact(run(held, x), run(whole, x))
                assert list(held.prepacked_nbytes) == [layout]


@precisions
def test_an_executor_yields_what_both_layouts_do(precision: str) -> None:
    network = frozen_network()
    executor, prepacked = cpu.Executor(network, precision), cpu.Prepacked(cpu.prepack(network, precision))
    for batch in (0, 1, 5, 16, 33, 70, LARGE):
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(batch, WIDTHS[0], seed=batch).to(dtype)
            assert_exact(run(executor, x).view(torch.int32), run(prepacked, x).view(torch.int32))


@precisions
def test_a_tensor_that_the_engine_does_not_read_itself_takes_the_checked_way(precision: str) -> None:
    executor = cpu.Executor(frozen_network(), precision)
    for batch in (1, 5, LARGE):
        x = normal(batch, WIDTHS[0], seed=batch)
        assert_exact(run(executor, torch.nn.Parameter(x, requires_grad=False)), run(executor, x))


@precisions
def test_an_executor_prepacks_once(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, x = cpu.Executor(frozen_network(), precision), normal(LARGE, WIDTHS[0], seed=1)
    wanted = [run(executor, x[:batch]) for batch in (3, LARGE)]
    monkeypatch.delattr(cpu, "prepack")
    for y in wanted:
        assert_exact(run(executor, x[: len(y)]), y)


@precisions
@pytest.mark.parametrize("how", ("deepcopy", "pickle"))
def test_a_copy_of_an_executor_prepacks_for_itself(how: str, precision: str) -> None:
    executor, x = cpu.Executor(frozen_network(), precision), normal(3, WIDTHS[0], seed=1)
    wanted = run(executor, x)
    copied = copy.deepcopy(executor) if how == "deepcopy" else pickle.loads(pickle.dumps(executor))
    assert (copied.precision, copied.network.tasks) == (precision, TASKS)
    assert copied.prepacked_nbytes == {}
    for layer in executor.network.hidden:
        layer.weight.values.zero_()
    assert_exact(run(copied, x), wanted)
    assert list(copied.prepacked_nbytes) == [cpu.Prepacked(cpu.prepack(copied.network, precision)).path_for(3)]


@precisions
@pytest.mark.parametrize("how", ("deepcopy", "pickle"))
def test_a_copy_of_a_prepacked_network_holds_its_own_memory(how: str, precision: str) -> None:
    blob, x = cpu.prepack(frozen_network(), precision), normal(3, WIDTHS[0], seed=1)
    prepacked = cpu.Prepacked(blob)
    wanted = run(prepacked, x)
    copied = copy.deepcopy(prepacked) if how == "deepcopy" else pickle.loads(pickle.dumps(prepacked))
    blob.zero_()
    assert_exact(run(copied, x), wanted)
    assert copied.facts == cpu.describe(cpu.prepack(frozen_network(), precision))


@precisions
@pytest.mark.parametrize("density", (0.1, 0.4, 0.95))
def test_the_layout_follows_from_the_batch_the_density_and_the_instruction_set(precision: str, density: float) -> None:
    """Small batches take tables and large ones slices; where most is kept, blocks that are filled."""
    mask = random_mask(64, 160, density, seed=1)
    layer = MaskedLayer(torch.randn(64, 160), mask, None, "none")
    prepacked = cpu.Prepacked(prepack_tasks([[layer]], precision, None))
    touched = 64 * int(mask.view(4, 16, 40, 4).any(dim=3).any(dim=1).sum())
    assert prepacked.facts.filled_multiply_adds == (0 if precision == "int8" else touched)
    paths = [prepacked.path_for(batch) for batch in range(200)]
    assert set(paths) == set(prepacked.facts.layouts)
    is_avx2 = cpu.isa().startswith("avx2")
    has_bf16 = precision == "bf16" and cpu.isa().endswith("bf16")
    smallest = "slices" if is_avx2 else "tables"  # AVX2 looks up a table by gathers
    if precision == "int8":  # where no instruction multiplies 8 bits, floats are faster than 16
        wanted = ("tables", "tables" if "vnni" in cpu.isa() or cpu.isa() in ("avx512_bf16", "neon") else "slices")
    elif density == 0.95 and not has_bf16:
        wanted = ("filled", "filled")
    else:
        wanted = ("filled" if is_avx2 and density == 0.4 else smallest, "slices")
    assert (paths[1], paths[-1]) == wanted
    for batch in (0, 1, 3, LARGE):
        one = cpu.describe(prepack_tasks([[layer]], precision, None, batch))
        assert one.layouts == (paths[min(batch, 199)],)


def test_few_rows_take_filled_blocks_sooner_where_these_fit_the_cache() -> None:
    paths = []
    for rows in (64, 2048):  # filled 256 KB, and 8 MB
        layer = MaskedLayer(torch.randn(rows, 1024), random_mask(rows, 1024, 0.3, seed=1), None, "none")
        paths.append(cpu.describe(prepack_tasks([[layer]], "fp32", None, batch=1)).layouts[0])
    assert paths == (["filled", "slices"] if cpu.isa().startswith("avx2") else paths[:1] * 2)


def test_what_is_pruned_away_in_whole_blocks_is_not_filled() -> None:
    mask = torch.zeros(40, 30, dtype=torch.bool)
    mask[17, 5] = mask[39, 29] = True  # blocks of 16 x 4, the second one over both edges
    facts = cpu.describe(prepack_tasks([[MaskedLayer(torch.randn(40, 30), mask, None, "none")]], "fp32"))
    assert (facts.multiply_adds, facts.filled_multiply_adds) == (2, 2 * 64)


def test_a_batch_is_a_number_of_rows() -> None:
    with pytest.raises(ValueError, match="batch: got -1, wanted 0 or more"):
        cpu.prepack(frozen_network(), batch=-1)


@precisions
def test_an_executor_refuses_what_the_engine_refuses(precision: str) -> None:
    executor = cpu.Executor(frozen_network(), precision)
    x = small_integers(2, WIDTHS[0], generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 89\), wanted \[batch, 90\]"):
        executor.run(x[:, 1:], torch.empty(2, 6))
    with pytest.raises(ValueError, match=r"out: got shape \(2, 5\), wanted \[2, 6\]"):
        executor.run(x, torch.empty(2, 5))
