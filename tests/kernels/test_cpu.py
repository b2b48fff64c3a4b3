"""The CPU engine against the dense masked model: every precision, path, instruction set and number of threads."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.networks import (
    ISAS,
    KERNELS,
    PATHS,
    RUNNABLE_ISAS,
    Kernel,
    MaskedLayer,
    Task,
    exact_reference,
    fused_multiply_add,
    is_shared,
    pack_tasks,
    pack_together,
    prepack,
    random_layer,
    random_mask,
    random_task,
    rounded_to_bf16,
    with_every_activation,
)
from oracle import UNIT_ROUNDOFF, Bounded, assert_exact, assert_rounding, mlp_reference, small_integers
from torch import Tensor

from lt4rec_sparse.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")

OPERANDS = {"fp32": None, "bf16": torch.bfloat16}
# Around the sizes of csrc/engine.h: MAX_ROWS 16, tiles of 8, 16, 32 and 64 rows.
BATCH_EDGES = (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)
# GROUP 16 and four of them, one group more, gaps and windows of 16, 32 and 64 features, blocks of 128.
FEATURE_EDGES = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 81, 127, 128, 129, 257)


def kernels_of(*precisions: str) -> pytest.MarkDecorator:
    kernels = [kernel for kernel in KERNELS if kernel.precision in precisions]
    return pytest.mark.parametrize("kernel", kernels, ids="-".join, indirect=True)


class Case(NamedTuple):
    """A network, an `x`, and what it yields exactly."""

    tasks: Sequence[Task]
    prepacked: Tensor
    x: Tensor
    wanted: Tensor


def exact_case(tasks: Sequence[Task], x: Tensor, precision: str) -> Case:
    return Case(tasks, prepack(tasks, precision), x, exact_reference(x, tasks, precision))


def assert_case(kernel: Kernel, case: Case, rows: int | None = None, threads: int = 1) -> None:
    assert_exact(kernel.run(case.x[:rows], case.prepacked, threads), case.wanted[:rows])


def assert_same_bits(y: Tensor, other: Tensor, path: str = "tables") -> None:
    if path == "filled":  # the fillers leave a zero's sign open
        y, other = y + 0.0, other + 0.0
    assert_exact(y.view(torch.int32), other.view(torch.int32))


def integers_like(*shape: int, seed: int = 0) -> Tensor:
    return small_integers(*shape, generator=torch.Generator().manual_seed(seed))


def normal_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("isa", ISAS)
def test_an_instruction_set_has_a_kernel_for_every_precision(isa: str) -> None:
    if isa not in RUNNABLE_ISAS:
        pytest.skip(f"this machine does not run {isa}, or LT4REC_SPARSE_ISA holds the engine below it")
    with cpu.forced_isa(isa):
        assert cpu.isa() == isa
        assert {kernel.precision for kernel in KERNELS if kernel.isa == isa} == set(cpu.PRECISIONS)


def test_the_reference_of_int8_rounds_once() -> None:
    fmaf = ctypes.CDLL(None).fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    a, b = normal_like(4000, seed=1), normal_like(4000, seed=2)
    # Next to the product, far from it, and where a sum in float64 is rounded to a tie of float32.
    c = torch.cat(
        [-(a * b)[:1000], normal_like(1000, seed=3) * 2.0**30, normal_like(1000, seed=4) * 2.0**-60, a[3000:]]
    )
    a[3000:], b[3000:] = 1 + 2.0**-23, (1 + 2.0**-23) * 2.0**-25
    y = fused_multiply_add(a, b, c)
    assert y.tolist() == [fmaf(*abc) for abc in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    assert (y != a.double() * b.double() + c.double()).any()


# --- Sizes ---


SMALL = range(1, 34)


@functools.cache
def case_of_small_heads(precision: str, in_features: int) -> Case:
    """A head of each small size, every second one with a bias; cut from one layer, which has one reference."""
    has_bias = torch.cat([torch.full((out_features,), out_features % 2 == 0) for out_features in SMALL])
    mask = random_mask(len(has_bias), in_features, 0.4, seed=in_features)
    layer = random_layer(mask, "relu" if in_features % 2 else "none", seed=in_features)
    layer = layer._replace(bias=layer.bias * has_bias)
    weight, mask, bias, *others = layer
    tasks = [
        [MaskedLayer(*part[:2], part[2] if len(part[2]) % 2 == 0 else None, *others)]
        for part in zip(*(rows.split(list(SMALL)) for rows in (weight, mask, bias)), strict=True)
    ]
    x = integers_like(max(SMALL), in_features)
    return Case(tasks, prepack(tasks, precision), x, exact_reference(x, [[layer]], precision))


@pytest.mark.parametrize("in_features", SMALL)
def test_every_small_size_is_exact(kernel: Kernel, in_features: int) -> None:
    case = case_of_small_heads(kernel.precision, in_features)
    for batch in (0, *SMALL):
        assert_case(kernel, case, rows=batch)


@functools.cache
def case_of_two_layers(precision: str, in_features: int, out_features: int) -> Case:
    task = random_task((in_features, out_features, 5), density=0.2, seed=in_features + out_features)
    return exact_case([task], integers_like(19, in_features), precision)


@pytest.mark.parametrize("in_features", FEATURE_EDGES)
def test_features_around_groups_gaps_windows_and_blocks_are_exact(kernel: Kernel, in_features: int) -> None:
    for out_features in FEATURE_EDGES:
        assert_case(kernel, case_of_two_layers(kernel.precision, in_features, out_features))


@functools.cache
def case_of_several_tasks(precision: str) -> Case:
    shapes = ((140, 40, 131, 3), (140, 5), (140, 9, 1), (140, 66, 17, 18, 33, 2))
    tasks = [random_task(shape, density=0.3, seed=10 * t) for t, shape in enumerate(shapes)]
    # Values in {-1, 0, 1} keep five layers of sums exact in float32.
    tasks = [[layer._replace(weight=layer.weight.sign()) for layer in task] for task in tasks]
    return exact_case(tasks, integers_like(257, 140).sign(), precision)


def test_every_batch_size_serves_all_tasks_exactly(kernel: Kernel) -> None:
    case = case_of_several_tasks(kernel.precision)
    for batch in (*range(34), *BATCH_EDGES):
        assert_case(kernel, case, rows=batch)


@functools.cache
def case_of_much_work(precision: str) -> Case:
    """Enough work for a second thread from 16 rows on, also in int8."""
    task = random_task((400, 320, 37, 3), density=1.0, seed=1)
    task = [layer._replace(weight=layer.weight.sign()) for layer in task]
    return exact_case([task], integers_like(129, 400).sign(), precision)


@pytest.mark.parametrize("threads", (1, 2, 3, 64))
def test_every_number_of_threads_is_exact(kernel: Kernel, threads: int) -> None:
    case = case_of_much_work(kernel.precision)
    for batch in (16, 17, 33, 64, 65, 129):
        assert_case(kernel, case, rows=batch, threads=threads)


# --- Masks ---


def masks_that_hurt(out_features: int = 21, in_features: int = 300) -> dict[str, Tensor]:
    empty = torch.zeros(out_features, in_features, dtype=torch.bool)
    masks = {name: empty.clone() for name in ("last", "first", "skewed", "ahead", "middle", "ends", "stairs", "one")}
    masks["last"][:, -1] = True
    masks["first"][:, 0] = True
    masks["skewed"][3] = True  # one full row among empty ones
    masks["ahead"][:, 250:] = True  # row 7 has columns in every window, and all others wait for it
    masks["ahead"][7] = True
    masks["middle"][:, 128:256] = True  # nothing in the first block, which brings the bias, nor in the last, with ReLU
    masks["ends"][:, (0, -1)] = True
    masks["stairs"] |= torch.arange(in_features) < 14 * torch.arange(out_features)[:, None]
    masks["one"][20, 299] = True
    return {**masks, "dead": empty, "full": ~empty}


@functools.cache
def case_of_mask(precision: str, name: str, activation: str) -> Case:
    mask = masks_that_hurt()[name]
    return exact_case([[random_layer(mask, activation, seed=8)]], integers_like(11, mask.shape[1]), precision)


@pytest.mark.parametrize("activation", ("none", "relu"))
@pytest.mark.parametrize("name", masks_that_hurt())
def test_masks_that_hurt_are_exact(kernel: Kernel, name: str, activation: str) -> None:
    assert_case(kernel, case_of_mask(kernel.precision, name, activation))


def test_a_dead_layer_passes_on_its_bias_alone(kernel: Kernel) -> None:
    for dead in range(3):
        task = random_task((40, 35, 70, 3), density=0.5, seed=5)
        mask = torch.zeros_like(task[dead].mask)
        task[dead] = random_layer(mask, task[dead].activation, seed=6)
        assert_case(kernel, exact_case([task], integers_like(20, 40), kernel.precision))


@functools.cache
def case_of_skewed_rows(precision: str, seed: int) -> Case:
    density = torch.rand(150, 1, generator=torch.Generator().manual_seed(seed)) ** 6  # most rows nearly empty
    masks = [torch.rand(150, 150, generator=torch.Generator().manual_seed(seed + i)) < density for i in range(2)]
    task = [random_layer(masks[0], "relu", seed), random_layer(masks[1][:65], "none", seed + 1)]
    return exact_case([task], integers_like(17, 150), precision)


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_very_different_lengths_are_exact(kernel: Kernel, seed: int) -> None:
    assert_case(kernel, case_of_skewed_rows(kernel.precision, seed))


# --- Tasks that share weights of the first layer ---


def tasks_that_share(
    count: int,
    overlap: float,
    features: Sequence[int],
    *,
    heads: Sequence[int] = (),
    integers: bool = True,
    seed: int = 0,
) -> list[Task]:
    """All tasks keep `overlap` of the first layer, and each of them a little more; the tasks in `heads` end with it."""
    common = random_mask(features[1], features[0], overlap, seed)
    draw = random_layer(torch.ones_like(common), "relu", seed, integers=integers)
    tasks = []
    for t in range(count):
        mask = common | (random_mask(features[1], features[0], 0.15, seed + 1 + t) if overlap < 1 else common)
        bias = integers_like(features[1], seed=seed + t)
        first = draw._replace(weight=draw.weight * mask, mask=mask, bias=None if t == 2 else bias)
        rest = random_task(features[1:], 0.4, seed + 10 * t, integers=integers)
        rest = [layer._replace(input_scale=0.3, input_zero_point=7 * t) for layer in rest]
        tasks.append([first._replace(activation=("none", "relu")[t % 2])] if t in heads else [first, *rest])
    return tasks


@functools.cache
def cases_that_share(precision: str, overlap: float, count: int) -> list[Case]:
    cases = []
    for out_features, heads in itertools.product((16, 33, 65), ((), (1, 2), (0, 1, 2, 3))):
        tasks = tasks_that_share(count, overlap, (130, out_features, 18, 2), heads=heads)
        cases.append(exact_case(tasks, integers_like(21, 130), precision))
        assert is_shared(cases[-1].prepacked) == (count > 1 and overlap > 0)
    return cases


@pytest.mark.parametrize("count", (1, 2, 3, 4))
@pytest.mark.parametrize("overlap", (0.0, 0.4, 1.0), ids=("apart", "partly", "fully"))
def test_tasks_that_share_weights_are_exact(kernel: Kernel, overlap: float, count: int) -> None:
    for case in cases_that_share(kernel.precision, overlap, count):
        assert_case(kernel, case)


def test_what_is_shared_counts_once(kernel: Kernel) -> None:
    tasks = tasks_that_share(3, 0.5, (100, 40, 1))
    common = functools.reduce(torch.logical_and, [task[0].mask for task in tasks]).sum().item()
    kept = sum(layer.mask.sum().item() for task in tasks for layer in task)
    facts = cpu.describe(prepack(tasks, kernel.precision))
    assert (facts.nnz, facts.multiply_adds) == (kept, kept - 2 * common)


def tasks_of_sets(
    features: Sequence[int], shares: dict[tuple[int, ...], float], *, integers: bool = True
) -> list[Task]:
    """Each set of tasks keeps its share of the first layer's columns, and no other task keeps them."""
    in_features, out_features = features[:2]
    draw = random_layer(torch.ones(out_features, in_features, dtype=torch.bool), "relu", seed=1, integers=integers)
    masks = {t: torch.zeros_like(draw.mask) for of_set in shares for t in of_set}
    order = torch.randperm(in_features, generator=torch.Generator().manual_seed(2))
    for of_set, columns in zip(shares, order.split([round(s * in_features) for s in shares.values()]), strict=True):
        for t in of_set:
            masks[t][:, columns] = True
    return [
        [
            draw._replace(weight=draw.weight * mask, mask=mask),
            *random_task(features[1:], 0.5, seed=t, integers=integers),
        ]
        for t, mask in sorted(masks.items())
    ]


# Of a hundred columns. Parts for abc, ab and bc save more than their sums cost; ac has too few columns for a part.
PAIRS = {(0, 1, 2): 0.36, (0, 1): 0.24, (1, 2): 0.2, (0, 2): 0.05, (0,): 0.05, (2,): 0.1}
# ab saves the most where it takes its weights of abc as well; those of c then stand among c's own.
PAIR_FIRST = {(0, 1, 2): 0.3, (0, 1): 0.3, (1, 2): 0.2, (0,): 0.1, (2,): 0.1}
# More tasks than `owners_of` keeps a table for; some of them keep nothing of their own, the last one nothing at all.
MANY = {tuple(range(10)): 0.2, (0, 1, 2, 3): 0.2, (4, 5): 0.2, (6, 7, 8): 0.2, (9,): 0.1, (0, 9): 0.1, (10,): 0.0}
# Too little in common for any set of tasks.
LITTLE = {(0, 1, 2): 0.1, (0, 1): 0.05, (1, 2): 0.05, (0,): 0.3, (1,): 0.3, (2,): 0.2}
EACH_WITH_EACH = dict.fromkeys(itertools.combinations(range(5), 2), 1 / 10)


class SharedSets(NamedTuple):
    shares: dict[tuple[int, ...], float]
    in_features: int
    saved: float  # of the columns: multiply-adds that sharing saves in each row


SETS = {
    "pairs": SharedSets(PAIRS, 100, 2 * 0.36 + 0.24 + 0.2),
    "a pair first": SharedSets(PAIR_FIRST, 100, 0.6 + 0.2),
    "many": SharedSets(MANY, 100, 9 * 0.2 + 3 * 0.2 + 0.2 + 2 * 0.2),
    "none pays": SharedSets(LITTLE, 100, 0),
    "more sets than parts": SharedSets(EACH_WITH_EACH, 400, 8 / 10),
    "more tasks than a set has bits": SharedSets({tuple(range(65)): 1.0}, 40, 0),
}


@functools.cache
def case_of_sets(name: str, precision: str) -> Case:
    shares, in_features, saved = SETS[name]
    tasks = tasks_of_sets((in_features, 24, 3), shares)
    case = exact_case(tasks, integers_like(37, in_features), precision)
    facts = cpu.describe(case.prepacked)
    assert facts.nnz - facts.multiply_adds == round(24 * saved * in_features)
    return case


@pytest.mark.parametrize("name", SETS)
def test_any_tasks_may_share_a_part_exactly(kernel: Kernel, name: str) -> None:
    for rows in (1, 8, 37):
        assert_case(kernel, case_of_sets(name, kernel.precision), rows=rows)


@kernels_of("fp32")
def test_parts_may_have_more_rows_than_16_bits_name(kernel: Kernel) -> None:
    weight = integers_like(21_665, 17)
    layer = MaskedLayer(weight, torch.ones_like(weight, dtype=torch.bool), None, "none")
    case = exact_case([[layer], [layer]], integers_like(2, 17), "fp32")
    assert is_shared(case.prepacked)  # two parts of their own and one in common
    assert_case(kernel, case)


@functools.cache
def case_of_shared_random_numbers(precision: str, seed: int) -> Case | RoundedCase:
    tasks = tasks_that_share(3, 0.3, (200, 48, 20, 3), integers=False, seed=seed)
    x = normal_like(33, 200, seed=seed)
    case = exact_case(tasks, x, precision) if precision == "int8" else rounded_case(tasks, x, precision)
    assert is_shared(case.prepacked)
    return case


@pytest.mark.parametrize("seed", range(3))
def test_shared_weights_are_as_right_as_their_precision(kernel: Kernel, seed: int) -> None:
    case = case_of_shared_random_numbers(kernel.precision, seed)
    if isinstance(case, Case):
        assert_case(kernel, case)
    else:
        assert_rounded_case(kernel, case)


@pytest.mark.parametrize("change", ("values", "planes", "both", "one of three"))
def test_weights_at_other_addresses_are_not_shared(kernel: Kernel, change: str) -> None:
    tasks = tasks_that_share(3, 0.6, (60, 16, 3))
    packed = pack_tasks(tasks)
    assert is_shared(cpu.prepack_layers(packed, kernel.precision, cpu.UNSTRUCTURED))
    first = packed[2][0]
    assert first.planes is not None
    if change == "one of three":
        first = tasks[2][0].pack()
    if change != "planes":
        first = first._replace(values=first.values.clone())
    if change in ("planes", "both"):
        first = first._replace(planes=first.planes.clone())
    prepacked = cpu.prepack_layers([*packed[:2], [first, *packed[2][1:]]], kernel.precision, cpu.UNSTRUCTURED)
    assert not is_shared(prepacked)
    x = integers_like(9, 60)
    # In int8 the first two tasks still have their rows' scales in common, the third has its own.
    wanted = [exact_reference(x, of_weight, kernel.precision) for of_weight in (tasks[:2], tasks[2:])]
    assert_exact(kernel.run(x, prepacked), torch.cat(wanted, dim=1))


@pytest.mark.parametrize("change", ("value", "sign of zero", "rows"))
def test_weights_that_differ_are_separate(kernel: Kernel, change: str) -> None:
    tasks = tasks_that_share(2, 1.0, (40, 16, 3))
    first = tasks[1][0]
    if change == "value":
        tasks[1] = [first._replace(weight=first.weight + 4.0), *tasks[1][1:]]
    elif change == "sign of zero":
        tasks = [
            [task[0]._replace(weight=torch.full((16, 40), s)), *task[1:]]
            for task, s in zip(tasks, (0.0, -0.0), strict=True)
        ]
    else:
        tasks[1] = random_task((40, 17, 3), 1.0, seed=1)
    case = exact_case(tasks, integers_like(9, 40), kernel.precision)
    assert not is_shared(case.prepacked)
    assert_case(kernel, case)


def test_a_dense_layer_is_one_that_keeps_everything(kernel: Kernel) -> None:
    tasks = [random_task((33, 20, 3), 1.0, seed=1), random_task((33, 18), 1.0, seed=2)]
    packed = pack_tasks(tasks)
    dense = [[layer._replace(planes=None) for layer in task] for task in packed]
    of_dense, of_packed = (cpu.prepack_layers(of, kernel.precision, cpu.UNSTRUCTURED) for of in (dense, packed))
    assert torch.equal(of_dense, of_packed)
    assert_case(kernel, exact_case(tasks, integers_like(9, 33), kernel.precision))


def test_a_dense_layer_is_not_shared(kernel: Kernel) -> None:
    first = pack_together(2 * [random_layer(torch.ones(16, 40, dtype=torch.bool), "none", seed=1)])
    assert is_shared(cpu.prepack_layers([[layer] for layer in first], kernel.precision, cpu.UNSTRUCTURED))
    dense = [[layer._replace(planes=None)] for layer in first]
    assert not is_shared(cpu.prepack_layers(dense, kernel.precision, cpu.UNSTRUCTURED))


def test_planes_of_tasks_that_are_not_asked_for_do_not_show(kernel: Kernel) -> None:
    tasks = tasks_that_share(4, 0.4, (90, 20, 3), integers=False)
    some = [tasks[3], tasks[1]]
    packed = pack_tasks(tasks)
    prepacked = cpu.prepack_layers([packed[3], packed[1]], kernel.precision, cpu.UNSTRUCTURED)
    assert is_shared(prepacked)
    assert torch.equal(prepacked, prepack(some, kernel.precision))


# --- Random numbers ---


class RoundedCase(NamedTuple):
    """A network, an `x`, and what each task yields within a bound."""

    prepacked: Tensor
    x: Tensor
    wanted: Sequence[Bounded]


def rounded_case(tasks: Sequence[Task], x: Tensor, precision: str) -> RoundedCase:
    """In int8 the tasks' heads have a sigmoid."""
    prepacked = prepack(tasks, precision)
    if precision == "int8":
        wanted = exact_reference(x, [without_sigmoid(task) for task in tasks], "int8")
        widths = [len(task[-1].mask) for task in tasks]
        return RoundedCase(prepacked, x, [sigmoid_of_exact(of_task) for of_task in wanted.split(widths, dim=1)])
    layers = [[layer.dense() for layer in task] for task in tasks]
    return RoundedCase(prepacked, x, [mlp_reference(x, task, operands=OPERANDS[precision]) for task in layers])


def assert_rounded_case(kernel: Kernel, case: RoundedCase, threads: int = 1) -> None:
    y = kernel.run(case.x, case.prepacked, threads)
    widths = [wanted.value.shape[1] for wanted in case.wanted]
    for of_task, wanted in zip(y.split(widths, dim=1), case.wanted, strict=True):
        assert_rounding(of_task, wanted)


@functools.cache
def case_of_ranking(precision: str, density: float) -> RoundedCase:
    features = (1024, 512, 256, 128, 1)
    tasks = [random_task(features, density, seed, "sigmoid", integers=False) for seed in (20, 30)]
    return rounded_case(tasks, normal_like(70, 1024, seed=2), precision)


@pytest.mark.parametrize("density", (0.2, 0.1))
def test_a_ranking_mlp_is_as_right_as_its_precision(kernel: Kernel, density: float) -> None:
    assert_rounded_case(kernel, case_of_ranking(kernel.precision, density), threads=2)


def without_sigmoid(task: Task) -> Task:
    return [*task[:-1], task[-1]._replace(activation="none")]


def sigmoid_of_exact(v: Tensor) -> Bounded:
    """The sigmoid's own rounding, as in `oracle.mlp_reference`."""
    value = v.double().sigmoid()
    return Bounded(value, torch.full_like(value, 3 * 2 * UNIT_ROUNDOFF[torch.float32]))


@kernels_of("int8")
@pytest.mark.parametrize(
    ("scale", "zero_point"), ((1.0, 0), (1.0, 255), (0.01, 128), (1e-3, 1), (7e-38, 3), (2e38, 200))
)
def test_int8_is_exact_for_all_quantisation_parameters(kernel: Kernel, scale: float, zero_point: int) -> None:
    quantization = {"input_scale": scale, "input_zero_point": zero_point}
    first = random_task((90, 70), 0.4, seed=1, integers=False)[0]
    for task in (
        [first._replace(**quantization)],
        [
            first._replace(activation="none"),
            random_layer(random_mask(9, 70, 0.4, seed=2), "relu", seed=3)._replace(**quantization),
        ],
    ):
        assert_case(kernel, exact_case([task], normal_like(20, 90, seed=4), "int8"))


@functools.cache
def case_of_extreme_sums(zero_point: int) -> Case:
    weight = torch.tensor([[1.0], [-1.0], [1.0]]).repeat(1, 32768)
    weight[2, ::2] = -1
    layer = MaskedLayer(weight, torch.ones(3, 32768, dtype=torch.bool), None, "none", 1.0, zero_point)
    x = torch.tensor([[-1000.0], [1000.0], [0.0]]).repeat(1, 32768)
    return exact_case([[layer]], x, "int8")


@pytest.mark.parametrize("zero_point", (0, 128, 255))
@pytest.mark.parametrize(
    "kernel", [k for k in KERNELS if (k.precision, k.path) == ("int8", "tables")], ids="-".join, indirect=True
)
def test_int8_sums_reach_their_limits_exactly(kernel: Kernel, zero_point: int) -> None:
    assert_case(kernel, case_of_extreme_sums(zero_point))


@pytest.mark.parametrize("zero_point", (0, 128, 255))
@kernels_of("int8")
def test_int8_takes_slices_up_to_the_largest_sum_that_a_float_holds(kernel: Kernel, zero_point: int) -> None:
    """255 * (518 * 127 + 7) is 2^24 - 1; one step more of a weight is too much."""
    for last, layouts in ((7.0, ("tables", "slices")), (8.0, ("tables",))):
        weight = torch.full((2, 519), 127.0)
        weight[:, -1] = last
        weight[1] *= -1
        layer = MaskedLayer(weight, torch.ones(2, 519, dtype=torch.bool), None, "none", 1.0, zero_point)
        x = torch.tensor([[-1000.0], [1000.0], [0.0]]).repeat(1, 519)
        case = exact_case([[layer]], x, "int8")
        facts = cpu.describe(case.prepacked)
        assert facts.layouts == layouts
        assert cpu.describe(prepack([[layer]], "int8", ("slices",))).layouts == layouts[-1:]
        if kernel.path in layouts:
            assert_case(kernel, case)


@kernels_of("fp32", "bf16")
def test_a_sigmoid_between_layers_keeps_the_zeros_of_the_tile(kernel: Kernel) -> None:
    first, second = random_mask(131, 20, 0.5, seed=3), random_mask(6, 131, 0.3, seed=4)
    task = [
        random_layer(first, "sigmoid", seed=5, integers=False),
        random_layer(second, "none", seed=6, integers=False),
    ]
    x = normal_like(9, 20, seed=7)
    reference = mlp_reference(x, [layer.dense() for layer in task], operands=OPERANDS[kernel.precision])
    assert_rounding(kernel.run(x, prepack([task], kernel.precision)), reference)


@kernels_of("int8")
def test_a_sigmoid_between_layers_of_int8_is_exact_where_it_is_flat(kernel: Kernel) -> None:
    mask = random_mask(131, 20, 0.5, seed=3)
    first = MaskedLayer(mask * 1.0, mask, None, "sigmoid", 1e3, 100)
    second = random_layer(random_mask(6, 131, 0.3, seed=4), "none", seed=6)
    second = second._replace(input_scale=0.01, input_zero_point=9)
    x = integers_like(9, 20) * 1e3
    h = x @ first.weight.T
    assert ((h == 0) | (h.abs() >= 1e3)).all()  # where the sigmoid in float32 is 0, 1/2 or 1
    assert_exact(kernel.run(x, prepack([[first, second]], "int8")), exact_reference(h.sigmoid(), [[second]], "int8"))


def test_a_sigmoid_after_a_shared_layer_is_as_right_as_its_precision(kernel: Kernel) -> None:
    tasks = [[task[0]._replace(activation="sigmoid"), *task[1:]] for task in tasks_that_share(2, 1.0, (40, 33, 2))]
    x = integers_like(9, 40)
    if kernel.precision == "int8":  # sums so large, or 0, that the sigmoid in float32 is 0, 1/2 or 1
        first = {"bias": None, "input_scale": 1e3, "input_zero_point": 100}
        tasks = [[task[0]._replace(weight=task[0].weight.sign(), **first), *task[1:]] for task in tasks]
        x = x * 1e3
    prepacked = prepack(tasks, kernel.precision)
    assert is_shared(prepacked)
    for y, task in zip(kernel.run(x, prepacked).split(2, dim=1), tasks, strict=True):
        if kernel.precision == "int8":
            h = exact_reference(x, [without_sigmoid(task[:1])], "int8")  # every weight is 1 or -1: so is each scale
            assert ((h == 0) | (h.abs() >= 900)).all()
            assert_exact(y, exact_reference(h.sigmoid(), [task[1:]], "int8"))
        else:
            layers = [layer.dense() for layer in task]
            assert_rounding(y, mlp_reference(x, layers, operands=OPERANDS[kernel.precision]))


def test_sigmoid_is_within_its_bound_and_saturates(kernel: Kernel) -> None:
    layer = MaskedLayer(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), None, "sigmoid", 120 / 127, 128)
    prepacked = prepack([[layer]], kernel.precision)
    x = torch.linspace(-120, 120, 4001)[:, None]
    y = kernel.run(x, prepacked)
    if kernel.precision == "int8":
        assert_rounding(y, sigmoid_of_exact(exact_reference(x, [without_sigmoid([layer])], "int8")))
    else:
        assert_rounding(y, mlp_reference(x, [layer.dense()], operands=OPERANDS[kernel.precision]))
    limits = torch.tensor([[-torch.inf], [-1e30], [1e30], [torch.inf]])
    assert kernel.run(limits, prepacked).tolist() == [[0], [0], [1], [1]]
    assert kernel.run(torch.tensor([[torch.nan]]), prepacked).isnan().all()


# --- Infinities, NaN, denormals, zeros ---


POISONS = (torch.inf, -torch.inf, torch.nan)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("activation", ("none", "relu"))
def test_a_poisoned_activation_reaches_exactly_the_rows_that_keep_it(
    kernel: Kernel, activation: str, poison: float
) -> None:
    x = integers_like(130, 130)
    x.fill_diagonal_(poison)  # each column in a row of the batch of its own
    layer = random_layer(random_mask(38, 130, 0.1, seed=9), activation, seed=10)
    case = exact_case([[layer]], x, kernel.precision)
    assert_exact_with_nan(kernel.run(x, case.prepacked), case.wanted)
    if kernel.precision != "int8":
        assert (case.wanted.isfinite() | layer.mask.T).all()


@pytest.mark.parametrize("poison", POISONS)
def test_poison_passes_through_hidden_and_shared_layers(kernel: Kernel, poison: float) -> None:
    x = integers_like(50, 50)
    x.fill_diagonal_(poison)
    for tasks in (
        [random_task((50, 40, 35, 6), 0.15, seed=2), random_task((50, 3), 0.3, seed=3)],
        tasks_that_share(3, 0.3, (50, 40, 12, 2), heads=(1,)),
    ):
        case = exact_case(tasks, x, kernel.precision)
        assert_exact_with_nan(kernel.run(x, case.prepacked), case.wanted)


def assert_exact_with_nan(y: Tensor, wanted: Tensor) -> None:
    """As `assert_exact`, with NaN where NaN is wanted and nowhere else."""
    assert torch.equal(y.isnan(), wanted.isnan())
    assert_exact(
        y.nan_to_num(nan=0.5, posinf=torch.inf, neginf=-torch.inf),
        wanted.nan_to_num(nan=0.5, posinf=torch.inf, neginf=-torch.inf),
    )


def test_a_kept_zero_meets_its_activation(kernel: Kernel) -> None:
    layer = random_layer(random_mask(20, 30, 0.5, seed=1), "none", seed=2)
    zero = layer._replace(weight=torch.zeros(20, 30))
    x = torch.full((3, 30), torch.inf)
    y = kernel.run(x, prepack([[zero]], kernel.precision))
    assert torch.equal(y.isnan(), (zero.mask.any(dim=1) & (kernel.precision != "int8")).expand(3, 20))


@kernels_of("fp32", "bf16")
def test_a_nan_among_the_weights_reaches_its_row_alone(kernel: Kernel) -> None:
    layer = random_layer(torch.ones(20, 30, dtype=torch.bool), "relu", seed=1)
    layer.weight[7, 11] = torch.nan
    y = kernel.run(integers_like(3, 30), prepack([[layer]], kernel.precision))
    assert torch.equal(y.isnan(), (torch.arange(20) == 7).expand(3, 20))


@kernels_of("fp32")
def test_float32_keeps_denormals(kernel: Kernel) -> None:
    layer = random_layer(random_mask(16, 40, 0.5, seed=11), "relu", seed=12, bias=False)
    assert_case(kernel, exact_case([[layer]], integers_like(8, 40) * 2.0**-149, "fp32"))
    # Between layers too, and as a bias.
    task = random_task((40, 30, 5), 0.3, seed=13)
    task = [layer._replace(bias=layer.bias * 2.0**-149) for layer in task]
    assert_case(kernel, exact_case([task], integers_like(8, 40) * 2.0**-149, "fp32"))


@kernels_of("bf16")
def test_bfloat16_takes_denormals_for_zeros(kernel: Kernel) -> None:
    mask = random_mask(40, 40, 0.5, seed=11) & (torch.arange(40) < 20)[:, None]  # half of the rows have a bias alone
    layer = random_layer(mask, "none", seed=12)
    tiny = 2.0**-130
    for weight, bias, x in itertools.product((1, tiny), (1, tiny, None), (1, tiny)):
        small = layer._replace(weight=layer.weight * weight, bias=None if bias is None else layer.bias * bias)
        inputs = integers_like(9, 40) * x
        products = rounded_to_bf16(inputs) @ rounded_to_bf16(small.weight).T
        wanted = products if bias is None else products + torch.where(small.bias.abs() < 2.0**-126, 0.0, small.bias)
        assert_exact(kernel.run(inputs, prepack([[small]], "bf16")), wanted)


@kernels_of("bf16")
def test_bfloat16_takes_a_denormal_sum_for_zero_at_once(kernel: Kernel) -> None:
    mask = random_mask(20, 40, 0.6, seed=14)
    layer = random_layer(mask, "none", seed=15, bias=False)
    layer = layer._replace(weight=layer.weight * 2.0**-64)  # a product is 2^-128 times up to 9; 4 is normal
    x = integers_like(9, 40) * 2.0**-64
    wanted = torch.zeros(9, 20)
    for column in range(40):
        total = wanted.double() + x[:, column, None].double() * layer.weight[:, column].double()
        total = torch.where(total.abs() < 2.0**-126, 0.0, total).float()
        wanted = torch.where(mask[:, column], total, wanted)
    assert wanted.any()
    assert_exact(kernel.run(x, prepack([[layer]], "bf16")), wanted)


def tiny_case_of_much_work() -> tuple[Task, Tensor]:
    """Enough work for several threads, with products that are denormal, or nearly so."""
    task = random_task((300, 130, 40), 0.5, seed=3, integers=False)
    task = [layer._replace(weight=layer.weight * 2.0**-60, bias=layer.bias * 2.0**-127) for layer in task]
    return task[:1], normal_like(64, 300, seed=4) * 2.0**-64


@kernels_of("bf16")
def test_every_thread_of_bfloat16_takes_denormals_for_zeros(kernel: Kernel) -> None:
    task, x = tiny_case_of_much_work()
    prepacked = prepack([task], "bf16")
    with cpu.forced_isa("scalar"):
        wanted = Kernel("bf16", "tables", "scalar").run(x, prepacked)
    assert (wanted == 0).any()
    assert (wanted != 0).any()
    for threads in (1, 2):
        assert_same_bits(kernel.run(x, prepacked, threads), wanted, kernel.path)


@kernels_of("bf16")
def test_denormals_are_numbers_again_after_a_call(kernel: Kernel) -> None:
    task, x = tiny_case_of_much_work()
    blobs = {precision: prepack([task], precision) for precision in ("bf16", "fp32")}
    in_float32 = kernel._replace(precision="fp32")
    before = in_float32.run(x, blobs["fp32"], threads=2)
    assert ((before != 0) & (before.abs() < 2.0**-126)).any()
    for threads in (1, 2):
        kernel.run(x, blobs["bf16"], threads)
        assert (torch.tensor([2.0**-140]) * 2).item() == 2.0**-139
        assert_same_bits(in_float32.run(x, blobs["fp32"], threads=2), before)


@kernels_of("fp32", "bf16")
def test_the_largest_numbers_overflow_alike(kernel: Kernel) -> None:
    # A product beyond float32, and a sum that brings it back: the multiply-add rounds once.
    for second in (-3.0e38, 3.0e38):
        layer = MaskedLayer(
            torch.tensor([[2.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([second]), "none"
        )
        x = torch.tensor([[3.0e38, 1.0], [-3.0e38, 1.0], [1e38, 0.0]])
        operand = rounded_to_bf16 if kernel.precision == "bf16" else torch.clone
        sums = (operand(x)[:, :1].double() * 2 + layer.bias.double()).float() + operand(x)[:, 1:]
        assert_exact(kernel.run(x, prepack([[layer]], kernel.precision)), sums)


@kernels_of("bf16")
def test_bfloat16_rounds_to_even_and_to_infinity(kernel: Kernel) -> None:
    x = (1 + torch.arange(-40, 40) * 2.0**-11).reshape(-1, 1)  # every eighth is a bfloat16, some are ties
    x = torch.cat([x, -x, torch.tensor([[3.3961775e38], [3.3895314e38], [-3.4028235e38]])])
    layer = MaskedLayer(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), None, "none")
    identity = [layer, layer]
    for task in ([layer], identity):
        assert_exact(kernel.run(x, prepack([task], "bf16")), x.bfloat16().float())


def test_zeros_have_the_same_sign_on_every_path(kernel: Kernel) -> None:
    mask = random_mask(40, 30, 0.05, seed=3)  # rows of a group and of a slice have no weight, or are padded
    bias = torch.where(torch.arange(40) % 2 == 0, 0.0, -0.0)
    prepacked = prepack([[MaskedLayer(mask * 1e-30, mask, bias, "none")]], kernel.precision)
    for x in (torch.zeros(5, 30), torch.full((5, 30), -1e-30)):  # whose products are -0
        y = kernel.run(x, prepacked)
        with cpu.forced_isa("scalar"):
            assert_same_bits(y, kernel._replace(path="tables").run(x, prepacked), kernel.path)


# --- What a row's result depends on ---


def random_networks() -> dict[str, list[Task]]:
    return {
        "deep": [random_task((300, 140, 60, 1), 0.2, seed=13, head="sigmoid", integers=False)],
        "shared": tasks_that_share(3, 0.3, (300, 70, 20, 2), integers=False, seed=13, heads=(1,)),
        "pairs": tasks_of_sets((300, 70, 2), PAIRS, integers=False),
        "many": tasks_of_sets((300, 20, 1), MANY, integers=False),
        "activations": [with_every_activation(lambda widths: random_task(widths, 0.4, 13, integers=False), 300)],
    }


@functools.cache
def case_of_random_numbers(precision: str, name: str) -> Case:
    """A network, an `x`, and what the readable kernel computes for all rows at once."""
    tasks, x = random_networks()[name], normal_like(257, 300, seed=14)
    prepacked = prepack(tasks, precision)
    with cpu.forced_isa("scalar"):
        return Case(tasks, prepacked, x, Kernel(precision, "tables", "scalar").run(x, prepacked))


@pytest.mark.parametrize("name", random_networks())
def test_a_score_does_not_depend_on_who_else_is_in_the_request(kernel: Kernel, name: str) -> None:
    case = case_of_random_numbers(kernel.precision, name)
    for (batch, threads), path in itertools.product(
        [*((batch, 1) for batch in (*range(34), *BATCH_EDGES)), (65, 2), (257, 2), (257, 3)], (kernel.path, "auto")
    ):
        y = kernel._replace(path=path).run(case.x[:batch], case.prepacked, threads)
        assert_same_bits(y, case.wanted[:batch])
    for row in (1, 100, 256):
        assert_same_bits(kernel.run(case.x[row : row + 1], case.prepacked), case.wanted[row : row + 1])


@settings(max_examples=20)
@given(batch=st.integers(1, 80), seed=st.integers(0, 2**31))
@pytest.mark.parametrize(("precision", "path"), PATHS)
def test_permuted_rows_yield_permuted_rows(precision: str, path: str, batch: int, seed: int) -> None:
    case = case_of_random_numbers(precision, "shared")
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    kernel = Kernel(precision, path, cpu.isa())
    assert_same_bits(kernel.run(case.x[order], case.prepacked), kernel.run(case.x[:batch], case.prepacked)[order])


@settings(max_examples=20)
@given(batch=st.integers(0, 80), seed=st.integers(0, 2**31), poison=st.sampled_from((1.0, *POISONS)))
@pytest.mark.parametrize(("precision", "path"), PATHS)
def test_one_candidate_more_leaves_the_others_as_they_are(
    precision: str, path: str, batch: int, seed: int, poison: float
) -> None:
    case = case_of_random_numbers(precision, "shared")
    kernel = Kernel(precision, path, cpu.isa())
    more = torch.cat([case.x[:batch], normal_like(1, 300, seed=seed) * poison])
    assert_same_bits(kernel.run(more, case.prepacked)[:batch], case.wanted[:batch])


@settings(max_examples=40)
@given(
    batch=st.integers(0, 140),
    widths=st.lists(st.integers(1, 150), min_size=2, max_size=4),
    density=st.sampled_from((0.0, 0.05, 0.3, 1.0)),
    threads=st.integers(1, 4),
    has_bfloat16_x=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("precision", ("fp32", "bf16", "int8"))
def test_any_mlp_is_exact_and_has_one_blob(
    precision: str, batch: int, widths: list[int], density: float, threads: int, has_bfloat16_x: bool, seed: int
) -> None:
    # Values in {-1, 0, 1} keep four layers of sums exact in float32.
    task = random_task(widths, density, seed)
    task = [layer._replace(weight=layer.weight.sign()) for layer in task]
    x = integers_like(batch, widths[0], seed=seed).sign()
    case = exact_case([task], x.bfloat16() if has_bfloat16_x else x, precision)
    assert torch.equal(prepack([task], precision), case.prepacked)
    for kernel in KERNELS:
        if kernel.precision == precision:
            with cpu.forced_isa(kernel.isa):
                assert_case(kernel, case, threads=threads)


# --- Strides and dtypes ---


def test_rows_may_be_strided(kernel: Kernel) -> None:
    layer = random_layer(random_mask(19, 33, 0.4, seed=15), "relu", seed=16)
    prepacked = prepack([[layer]], kernel.precision)
    wide = integers_like(40, 50)
    for x in (wide[:, 7:40], wide[::3, :33], wide[3:4, :33].expand(20, 33), wide.as_strided((40, 33), (2, 1), 3)):
        for x_of_dtype in (x, x.bfloat16() if x.stride(0) > 33 else x):
            buffer = torch.full((len(x), 30), torch.nan)
            cpu.sparse_mlp(x_of_dtype, prepacked, buffer[:, 5:24], threads=2, path=kernel.path)
            assert_exact(buffer[:, 5:24], exact_reference(x, [[layer]], kernel.precision))
            assert buffer[:, :5].isnan().all()
            assert buffer[:, 24:].isnan().all()


def test_bfloat16_input_is_float32_input_of_these_values(kernel: Kernel) -> None:
    case = case_of_random_numbers(kernel.precision, "shared")
    x = case.x.bfloat16()
    for batch in (1, 5, 16, 33, 64, 70):
        y = kernel.run(x[:batch].float(), case.prepacked)
        assert_same_bits(kernel.run(x[:batch], case.prepacked), y)
        wide = torch.full((batch, 311), torch.nan, dtype=torch.bfloat16)
        wide[:, 3:303] = x[:batch]
        assert_same_bits(kernel.run(wide[:, 3:303], case.prepacked), y)


def test_columns_of_one_feature_may_have_any_stride(kernel: Kernel) -> None:
    layer = MaskedLayer(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), None, "none", 1.0, 9)
    prepacked = prepack([[layer]], kernel.precision)
    x, out = integers_like(20, 7)[:, 3:4], torch.full((20, 5), torch.nan)
    cpu.sparse_mlp(x, prepacked, out[:, 2:3], path=kernel.path)
    assert_exact(out[:, 2:3], x)
