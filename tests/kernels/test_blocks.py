"""The engine's path for blocks of 16 outputs x 4 inputs, as test_cpu.py for the others."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.networks import (
    BLOCK_KERNELS,
    Kernel,
    MaskedLayer,
    Task,
    exact_reference,
    is_shared,
    pack_tasks,
    pack_together,
    prepack,
    random_block_mask,
    random_layer,
    random_task,
    rounded_to_bf16,
    steps_of,
    tiles,
    with_every_activation,
)
from kernels.test_cpu import Case, assert_case, assert_exact_with_nan, assert_same_bits, integers_like, normal_like
from kernels.test_engine_layout import ALIGNMENT, COMBINED, SHARED, Blob, padded, read_blocks
from kernels.test_guard_pages import Pages
from oracle import assert_exact, assert_rounding, mlp_reference

from lt4rec_sparse.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")

OPERANDS = {"fp32": None, "bf16": torch.bfloat16}
PANELS = (512, 2048)  # inputs of float32 and bfloat16, of int8
# Of rows of the batch: the kernels' 4, 5, 6, 12 and 24, and the 48 that one thread takes at a time.
BATCH_EDGES = (0, *range(1, 27), 35, 36, 37, 47, 48, 49, 95, 96, 97, 145)
SMALL = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 31, 32, 33, 48, 49, 65)

of_every_kernel = pytest.mark.parametrize("kernel", BLOCK_KERNELS, ids="-".join, indirect=True)


def kernels_of(*precisions: str) -> pytest.MarkDecorator:
    kernels = [kernel for kernel in BLOCK_KERNELS if kernel.precision in precisions]
    return pytest.mark.parametrize("kernel", kernels, ids="-".join, indirect=True)


block_task = functools.partial(random_task, draw_mask=random_block_mask)


def exact_case(tasks: Sequence[Task], x: torch.Tensor, precision: str) -> Case:
    wanted = exact_reference(x, tasks, precision, in_blocks=True)
    return Case(tasks, prepack(tasks, precision, ("blocks",)), x, wanted)


# --- Sizes ---


@functools.cache
def case_of_size(precision: str, in_features: int, out_features: int) -> Case:
    task = block_task((in_features, out_features, 3), density=0.5, seed=in_features + out_features)
    return exact_case([task], integers_like(19, in_features), precision)


@of_every_kernel
@pytest.mark.parametrize("in_features", SMALL)
def test_sizes_around_groups_and_quads_are_exact(kernel: Kernel, in_features: int) -> None:
    for out_features in SMALL:
        for rows in (1, 2, 19):
            assert_case(kernel, case_of_size(kernel.precision, in_features, out_features), rows=rows)


@functools.cache
def case_of_panels(precision: str, in_features: int) -> Case:
    task = block_task((in_features, 70, 2), density=0.2, seed=in_features)
    return exact_case([task], integers_like(31, in_features), precision)


@of_every_kernel
@pytest.mark.parametrize("in_features", [n for p in PANELS for n in (p - 1, p, p + 1, 2 * p, 3 * p + 6)])
def test_sizes_around_panels_are_exact(kernel: Kernel, in_features: int) -> None:
    for rows in (1, 3, 6, 31):
        assert_case(kernel, case_of_panels(kernel.precision, in_features), rows=rows)


@functools.cache
def case_of_pieces(precision: str) -> Case:
    """Weights that take several pieces of the second cache."""
    return exact_case([block_task((1030, 640), 0.9, seed=3)], integers_like(14, 1030), precision)


@of_every_kernel
def test_weights_in_several_pieces_are_exact(kernel: Kernel) -> None:
    for rows in (1, 7, 14):
        assert_case(kernel, case_of_pieces(kernel.precision), rows=rows)


@functools.cache
def case_of_several_tasks(precision: str) -> Case:
    shapes = ((140, 40, 131, 3), (140, 5), (140, 9, 1), (140, 66, 17, 18, 33, 2))
    tasks = [block_task(shape, density=0.3, seed=10 * t) for t, shape in enumerate(shapes)]
    # Values in {-1, 0, 1} keep five layers of sums exact in float32.
    tasks = [[layer._replace(weight=layer.weight.sign()) for layer in task] for task in tasks]
    return exact_case(tasks, integers_like(145, 140).sign(), precision)


@of_every_kernel
def test_every_batch_size_serves_all_tasks_exactly(kernel: Kernel) -> None:
    case = case_of_several_tasks(kernel.precision)
    for batch in BATCH_EDGES:
        assert_case(kernel, case, rows=batch)


@functools.cache
def case_of_much_work(precision: str) -> Case:
    task = block_task((400, 320, 37, 3), density=1.0, seed=1)
    task = [layer._replace(weight=layer.weight.sign()) for layer in task]
    return exact_case([task], integers_like(129, 400).sign(), precision)


@of_every_kernel
@pytest.mark.parametrize("threads", (1, 2, 3, 64))
def test_every_number_of_threads_is_exact(kernel: Kernel, threads: int) -> None:
    for batch in (16, 17, 33, 64, 65, 129):
        assert_case(kernel, case_of_much_work(kernel.precision), rows=batch, threads=threads)


@of_every_kernel
def test_a_layer_may_have_many_outputs(kernel: Kernel) -> None:
    layer = random_layer(random_block_mask(70_001, 9, 0.5, seed=1), "relu", seed=2)
    assert_case(kernel, exact_case([[layer]], integers_like(2, 9), kernel.precision))


# --- Masks ---


def masks_that_hurt(out_features: int = 70, in_features: int = 300) -> dict[str, torch.Tensor]:
    empty = torch.zeros(out_features, in_features, dtype=torch.bool)
    masks = {name: empty.clone() for name in ("last", "first", "one group", "one quad", "stairs", "one block")}
    masks["last"][:, 296:] = True
    masks["first"][:, :4] = True
    masks["one group"][32:48] = True
    masks["one quad"][:, 100:104] = True
    masks["one block"][64:, 296:] = True
    for group in range(5):  # sums that are added in turn are of very different lengths
        masks["stairs"][16 * group : 16 * group + 16, : 4 * 15 * group] = True
    return {**masks, "dead": empty, "full": ~empty}


@functools.cache
def case_of_mask(precision: str, name: str, activation: str) -> Case:
    mask = masks_that_hurt()[name]
    return exact_case([[random_layer(mask, activation, seed=8)]], integers_like(11, mask.shape[1]), precision)


@of_every_kernel
@pytest.mark.parametrize("activation", ("none", "relu"))
@pytest.mark.parametrize("name", masks_that_hurt())
def test_masks_that_hurt_are_exact(kernel: Kernel, name: str, activation: str) -> None:
    for rows in (1, 2, 4, 11):
        assert_case(kernel, case_of_mask(kernel.precision, name, activation), rows=rows)


# --- Tasks that share weights of the first layer ---


def tasks_that_share(count: int, overlap: float, features: Sequence[int], **options: bool) -> list[Task]:
    """All tasks keep `overlap` of the first layer, and each of them a little more; the second one ends with it."""
    common = random_block_mask(features[1], features[0], overlap, seed=0)
    draw = random_layer(torch.ones_like(common), "relu", 0, **options)
    tasks = []
    for t in range(count):
        mask = common | random_block_mask(features[1], features[0], 0.15, seed=1 + t)
        first = draw._replace(weight=draw.weight * mask, mask=mask, bias=None if t == 2 else draw.bias + t)
        rest = block_task(features[1:], 0.4, 10 * t, **options)
        rest = [layer._replace(input_scale=0.3, input_zero_point=7 * t) for layer in rest]
        tasks.append([first._replace(activation="none")] if t == 1 else [first, *rest])
    return tasks


@functools.cache
def case_that_shares(precision: str, overlap: float, count: int) -> Case:
    case = exact_case(tasks_that_share(count, overlap, (1130, 65, 18, 2)), integers_like(21, 1130), precision)
    assert is_shared(case.prepacked) == (count > 1)
    return case


@of_every_kernel
@pytest.mark.parametrize("count", (1, 2, 3, 4))
@pytest.mark.parametrize("overlap", (0.3, 1.0), ids=("partly", "fully"))
def test_tasks_that_share_weights_are_exact(kernel: Kernel, overlap: float, count: int) -> None:
    for rows in (1, 21):
        assert_case(kernel, case_that_shares(kernel.precision, overlap, count), rows=rows)


@of_every_kernel
def test_what_is_shared_counts_once(kernel: Kernel) -> None:
    tasks = tasks_that_share(3, 0.5, (101, 40, 1))
    common = functools.reduce(torch.logical_and, [task[0].mask for task in tasks]).sum().item()
    kept = sum(layer.mask.sum().item() for task in tasks for layer in task)
    facts = cpu.describe(prepack(tasks, kernel.precision, ("blocks",)))
    assert facts.nnz == kept
    assert kept - 2 * common >= facts.multiply_adds > 0  # pairs may share too
    assert facts.block_multiply_adds >= facts.multiply_adds


@kernels_of("int8")
@pytest.mark.parametrize("change", ("values", "planes"))
def test_weights_at_other_addresses_are_not_shared(kernel: Kernel, change: str) -> None:
    tasks = tasks_that_share(2, 0.6, (60, 16, 3))
    packed = pack_tasks(tasks, in_blocks=True)
    first = packed[1][0]
    copied = first._replace(**{change: getattr(first, change).clone()})
    prepacked = cpu.prepack_layers([packed[0], [copied, *packed[1][1:]]], kernel.precision, ("blocks",))
    assert not is_shared(prepacked)
    x = integers_like(9, 60)
    wanted = [exact_reference(x, [task], kernel.precision, in_blocks=True) for task in tasks]
    assert_exact(kernel.run(x, prepacked), torch.cat(wanted, dim=1))


# --- Numbers ---


@functools.cache
def random_networks() -> dict[str, list[Task]]:
    return {
        "deep": [block_task((301, 140, 60, 1), 0.3, seed=13, head="sigmoid", integers=False)],
        "shared": tasks_that_share(3, 0.3, (300, 70, 20, 2), integers=False),
        "activations": [with_every_activation(lambda widths: block_task(widths, 0.5, 5, integers=False), 1100)],
    }


@functools.cache
def case_of_random_numbers(precision: str, name: str) -> Case:
    """A network, an `x`, and what the readable kernel computes for all rows at once."""
    tasks = random_networks()[name]
    x = normal_like(145, tasks[0][0].mask.shape[1], seed=14)
    prepacked = prepack(tasks, precision, ("blocks",))
    with cpu.forced_isa("scalar"):
        return Case(tasks, prepacked, x, Kernel(precision, "blocks", "scalar").run(x, prepacked))


@pytest.mark.parametrize("precision", OPERANDS)
@pytest.mark.parametrize("name", random_networks())
def test_the_readable_kernel_is_as_right_as_its_precision(precision: str, name: str) -> None:
    case = case_of_random_numbers(precision, name)
    at = 0
    for task in case.tasks:
        reference = mlp_reference(case.x, [layer.dense() for layer in task], operands=OPERANDS[precision])
        outputs = len(task[-1].mask)
        assert_rounding(case.wanted[:, at : at + outputs], reference)
        at += outputs


@of_every_kernel
@pytest.mark.parametrize("name", random_networks())
def test_a_score_does_not_depend_on_who_else_is_in_the_request(kernel: Kernel, name: str) -> None:
    case = case_of_random_numbers(kernel.precision, name)
    for batch, threads in [*((batch, 1) for batch in BATCH_EDGES), (65, 2), (145, 2), (145, 3)]:
        assert_same_bits(kernel.run(case.x[:batch], case.prepacked, threads), case.wanted[:batch])
        auto = kernel._replace(path="auto").run(case.x[:batch], case.prepacked, threads)
        assert_same_bits(auto, case.wanted[:batch])
    for row in (1, 100, 144):
        assert_same_bits(kernel.run(case.x[row : row + 1], case.prepacked), case.wanted[row : row + 1])


@kernels_of("int8")
def test_int8_is_exact_for_any_numbers(kernel: Kernel) -> None:
    for seed in range(3):
        tasks = tasks_that_share(3, 0.3, (203, 50, 20, 3), integers=False)
        assert_case(kernel, exact_case(tasks, 5 * normal_like(23, 203, seed=seed), "int8"))


@kernels_of("int8")
@pytest.mark.parametrize("pair", ((1.0, 0.0), (0.5, 0.5), (0.5, -0.5), (-1.0, 1 / 127), (0.503, 0.497), (1e-30, 1e-30)))
def test_pairs_of_weights_do_not_saturate(kernel: Kernel, pair: tuple[float, float]) -> None:
    weight = torch.tensor(pair).repeat(16, 32)
    steps = (weight / steps_of(weight, in_blocks=True)[:, None]).round().abs().unflatten(1, (-1, 2)).sum(-1)
    assert steps.max() <= 128
    layer = MaskedLayer(weight, torch.ones_like(weight, dtype=torch.bool), None, "none", 1.0, 0)
    x = torch.full((3, 64), 1e9)  # 255 once quantised
    x[1] = 0
    assert_case(kernel, exact_case([[layer]], x, "int8"))


@of_every_kernel
@pytest.mark.parametrize("poison", (torch.inf, -torch.inf, torch.nan))
def test_poison_reaches_exactly_the_rows_that_keep_it(kernel: Kernel, poison: float) -> None:
    """Padding of the last quad and of the last group meets none, nor do the layers behind."""
    x = integers_like(53, 53)
    x.fill_diagonal_(poison)  # each column in a row of the batch of its own
    for tasks in (
        [block_task((53, 38), 0.3, seed=9)],
        [block_task((53, 21, 35, 6), 0.3, seed=2), block_task((53, 3), 0.5, seed=3)],
        tasks_that_share(3, 0.3, (53, 41, 13, 2)),
    ):
        case = exact_case(tasks, x, kernel.precision)
        assert_exact_with_nan(kernel.run(x, case.prepacked), case.wanted)


@kernels_of("fp32")
def test_float32_keeps_denormals(kernel: Kernel) -> None:
    task = block_task((40, 30, 5), 0.5, seed=13)
    task = [layer._replace(bias=layer.bias * 2.0**-149) for layer in task]
    assert_case(kernel, exact_case([task], integers_like(8, 40) * 2.0**-149, "fp32"))


@kernels_of("bf16")
def test_bfloat16_takes_denormals_for_zeros(kernel: Kernel) -> None:
    mask = random_block_mask(40, 40, 0.5, seed=11) & (torch.arange(40) < 32)[:, None]  # the last have a bias alone
    layer = random_layer(mask, "none", seed=12)
    tiny = 2.0**-130
    for weight, bias, x in itertools.product((1, tiny), (1, tiny, None), (1, tiny)):
        small = layer._replace(weight=layer.weight * weight, bias=None if bias is None else layer.bias * bias)
        inputs = integers_like(9, 40) * x
        products = rounded_to_bf16(inputs) @ rounded_to_bf16(small.weight).T
        wanted = products if bias is None else products + torch.where(small.bias.abs() < 2.0**-126, 0.0, small.bias)
        assert_exact(kernel.run(inputs, prepack([[small]], "bf16", ("blocks",))), wanted)


@kernels_of("bf16")
def test_bfloat16_takes_a_denormal_sum_for_zero_at_once(kernel: Kernel) -> None:
    mask = random_block_mask(20, 40, 0.6, seed=14)
    layer = random_layer(mask, "none", seed=15, bias=False)
    layer = layer._replace(weight=layer.weight * 2.0**-64)  # a product is 2^-128 times up to 9; 4 is normal
    x = integers_like(9, 40) * 2.0**-64
    wanted = torch.zeros(9, 20)
    for column in (quad + i for quad in range(0, 40, 4) for i in (1, 0, 3, 2)):  # the order of x86's instruction
        total = wanted.double() + x[:, column, None].double() * layer.weight[:, column].double()
        total = torch.where(total.abs() < 2.0**-126, 0.0, total).float()
        wanted = torch.where(mask[:, column], total, wanted)
    assert wanted.any()
    assert_exact(kernel.run(x, prepack([[layer]], "bf16", ("blocks",))), wanted)


@settings(max_examples=40)
@given(
    batch=st.integers(0, 100),
    widths=st.lists(st.integers(1, 150), min_size=2, max_size=4),
    density=st.sampled_from((0.0, 0.1, 0.4, 1.0)),
    threads=st.integers(1, 4),
    has_bfloat16_x=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("precision", cpu.PRECISIONS)
def test_any_mlp_is_exact_and_has_one_blob(
    precision: str, batch: int, widths: list[int], density: float, threads: int, has_bfloat16_x: bool, seed: int
) -> None:
    task = block_task(widths, density, seed)
    task = [layer._replace(weight=layer.weight.sign()) for layer in task]
    x = integers_like(batch, widths[0], seed=seed).sign()
    case = exact_case([task], x.bfloat16() if has_bfloat16_x else x, precision)
    assert torch.equal(prepack([task], precision, ("blocks",)), case.prepacked)
    for kernel in BLOCK_KERNELS:
        if kernel.precision == precision:
            with cpu.forced_isa(kernel.isa):
                assert_case(kernel, case, threads=threads)


# --- Memory ---


@of_every_kernel
@pytest.mark.parametrize("in_features", (33, 36))  # copied first, and read where it stands
def test_rows_may_be_strided(kernel: Kernel, in_features: int) -> None:
    layer = random_layer(random_block_mask(19, in_features, 0.4, seed=15), "relu", seed=16)
    prepacked = prepack([[layer]], kernel.precision, ("blocks",))
    wide = integers_like(40, 50)
    for x in (wide[:, 7 : 7 + in_features], wide[::3, :in_features], wide[3:4, :in_features].expand(20, in_features)):
        for x_of_dtype in (x, x.bfloat16() if x.stride(0) > in_features else x):
            buffer = torch.full((len(x), 30), torch.nan)
            cpu.sparse_mlp(x_of_dtype, prepacked, buffer[:, 5:24], threads=2, path="blocks")
            assert_exact(buffer[:, 5:24], exact_reference(x, [[layer]], kernel.precision, in_blocks=True))
            assert buffer[:, :5].isnan().all()
            assert buffer[:, 24:].isnan().all()


@functools.cache
def pages() -> tuple[Pages, Pages, Pages]:
    return Pages(1 << 20), Pages(1 << 18), Pages(1 << 16)


@of_every_kernel
@pytest.mark.parametrize("at", ("end", "start"))
@pytest.mark.parametrize("in_features", (63, 64))
def test_nothing_is_touched_out_of_place(kernel: Kernel, in_features: int, at: str) -> None:
    tasks = [block_task((in_features, *rest), 0.4, seed=t) for t, rest in enumerate(((81, 2), (1,), (16, 33, 7)))]
    case = exact_case(tasks, integers_like(50, in_features), kernel.precision)
    blob_pages, x_pages, out_pages = pages()
    prepacked = blob_pages.hold(case.prepacked, at)
    for batch in range(1, 51):
        x = case.x[:batch].bfloat16() if batch % 3 == 0 else case.x[:batch]
        apart = 5 * (batch % 2)
        x = x_pages.hold(x, at, row_stride=in_features + apart)
        out = out_pages.hold(torch.full((batch, 10), torch.nan), at, row_stride=10 + apart)
        cpu.sparse_mlp(x, prepacked, out, threads=1 + batch % 2, path="blocks")
        assert_exact(out, case.wanted[:batch])


# --- The blob, byte by byte ---


def networks() -> dict[str, list[Task]]:
    return {
        "one weight": [[random_layer(torch.ones(1, 1, dtype=torch.bool), "none", seed=1)]],
        "deep": [block_task((300, 140, 66, 17, 1), 0.25, seed=1, head="sigmoid", integers=False)],
        "panels": [block_task((2 * PANELS[-1] + 7, 70, 3), 0.1, seed=1, integers=False)],
        "dead": [[random_layer(torch.zeros(5, 260, dtype=torch.bool), "relu", seed=1)]],
        "full": [block_task((129, 130, 2), 1.0, seed=1, integers=False)],
        "shared": tasks_that_share(3, 0.3, (PANELS[-1] + 30, 40, 20, 3), integers=False),
    }


@pytest.mark.parametrize("precision", cpu.PRECISIONS)
@pytest.mark.parametrize("name", networks())
def test_the_blob_holds_each_block_once_and_in_order(name: str, precision: str) -> None:
    tasks = networks()[name]
    blob = Blob(prepack(tasks, precision, ("blocks",)))
    header = blob.header
    assert (header.layouts, header.bytes) == (4, len(blob.bytes))
    assert (header.slice_bytes, header.table_bytes) == (0, 0)
    assert header.nnz == sum(int(layer.mask.sum()) for task in tasks for layer in task)
    of_tasks = iter([layer for task in tasks for layer in task])
    multiply_adds = stored = at_parts = 0
    parts: list[np.ndarray] = []
    for record in blob.records:
        bias = blob.section(record.bias, "<f4", padded(record.out_features))
        steps = None
        if precision == "int8" and record.kind != SHARED:
            steps = blob.section(record.scale, "<f4", padded(record.out_features))
        if record.kind == COMBINED:
            layer = next(of_tasks)
            chosen = [parts[part] for part in blob.parts(record)]
            assert not any(record[record._fields.index("block_slices") : record._fields.index("scale")])
            assert_holds(sum(chosen), layer, precision, tasks, is_first=True)
        else:
            dense, of_record = read_blocks(blob, record, precision)
            stored += of_record
            if precision == "int8":
                zero_point = tasks[0][0].input_zero_point if record.kind == SHARED else record.zero_point
                for at, zero in ((record.start, 0), (record.signed_start, 128)):
                    start = blob.section(at, "<i4", padded(record.out_features))
                    assert np.array_equal(start, (zero - zero_point) * dense.astype("i4").sum(1))
            if record.kind == SHARED:
                parts = np.split(dense, len(dense) // record.part_features)
                at_parts = len(parts)
                multiply_adds += int(np.count_nonzero(dense))
                assert not bias.any()
                continue
            layer = next(of_tasks)
            multiply_adds += int(layer.mask.sum())
            assert_holds(dense, layer, precision, tasks, is_first=layer is tasks[0][0])
        wanted = torch.zeros(len(bias)) if layer.bias is None else layer.bias
        assert np.array_equal(bias[: record.out_features], wanted[: record.out_features].numpy())
        assert not bias[record.out_features :].any()
        if steps is not None and record.kind != COMBINED:
            scale = (steps_of(layer.weight, in_blocks=True).double() * layer.input_scale).float()
            assert np.array_equal(steps[: record.out_features], scale.numpy())
    assert header.block_multiply_adds == stored
    assert (at_parts > 0) == (name == "shared")
    if precision != "int8":  # where no kept weight is 0
        assert header.multiply_adds == multiply_adds
    end = of_blocks = 0
    for first, past, kind in sorted(blob.sections):
        assert first == -(-end // ALIGNMENT) * ALIGNMENT, "a section begins where the one before it ends"
        assert not blob.bytes[end:first].any(), "zeros fill the gap between two sections"
        of_blocks += (-(-(past - first) // ALIGNMENT) * ALIGNMENT) if kind == "block" else 0
        end = past
    assert header.block_bytes == of_blocks
    assert not blob.bytes[end:].any()


def assert_holds(dense: np.ndarray, layer: MaskedLayer, precision: str, tasks: list[Task], is_first: bool) -> None:
    rows, columns = layer.mask.shape
    assert not dense[rows:].any()
    if precision == "int8":
        steps = steps_of(layer.weight, in_blocks=True)
        if is_first:  # in common
            steps = torch.stack([steps_of(task[0].weight, in_blocks=True) for task in tasks]).amax(0)
        wanted = torch.where(steps[:, None] > 0, (layer.weight / steps[:, None]).round(), 0.0).to(torch.int8).numpy()
    elif precision == "bf16":
        kept = torch.where(layer.mask, layer.weight, 0.0)
        wanted = (rounded_to_bf16(kept).view(torch.int32) >> 16).short().numpy().view("<u2")
    else:
        wanted = layer.weight.numpy()
    assert np.array_equal(dense[:rows, :columns], wanted)


# --- The door ---


def one_layer(out_features: int = 17, in_features: int = 37) -> cpu.PackLayer:
    mask = random_block_mask(out_features, in_features, 0.6, seed=2)
    return pack_together([random_layer(mask, "relu", seed=1, integers=False)], in_blocks=True)[0]


def without_zeros(layer: cpu.PackLayer) -> cpu.PackLayer:
    return layer._replace(values=layer.values.masked_fill(layer.values == 0, 1.0))


def flipped(layer: cpu.PackLayer, bit: int) -> cpu.PackLayer:
    assert layer.planes is not None
    planes = layer.planes.clone()
    planes.view(-1)[bit // 8] ^= 1 << bit % 8
    return layer._replace(planes=planes)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (one_layer()._replace(values=torch.ones(3, 4, 16)), r"values: got shape \(3, 4, 16\), wanted \(3, 16, 4\)"),
        (one_layer()._replace(planes=torch.zeros(1, 17, 5, dtype=torch.uint8)), r"planes: got shape \(1, 17, 5\)"),
        (flipped(one_layer(), 3), "planes: got .*, wanted as many kept weights as there are values"),
        (flipped(one_layer(), 14), "padding of planes: got"),
        (without_zeros(one_layer()), "values beyond the edge: got 1, wanted of these, exactly 0"),
        (random_layer(random_block_mask(17, 37, 0.6, 2), "relu", 1).pack(), "is_blocks: got 0"),
        (one_layer()._replace(task=1), "task: got 1, wanted 0 or more, below 1"),
    ],
)
def test_what_is_not_in_blocks_is_refused(layer: cpu.PackLayer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.prepack_layers([[layer]], "fp32", ("blocks",))


def test_blocks_stand_alone() -> None:
    with pytest.raises(ValueError, match=r"layouts: got .*, wanted blocks alone, or some of tables, slices"):
        cpu.prepack_layers([[one_layer()]], "fp32", ("blocks", "tables"))
    with pytest.raises(ValueError, match="is_blocks: got 1"):
        cpu.prepack_layers([[one_layer()]], "fp32", ("tables",))
    blob = cpu.prepack_layers([[one_layer()]], "fp32", ("blocks",))
    out = torch.empty(3, 17)
    for path in cpu.UNSTRUCTURED:
        with pytest.raises(ValueError, match=rf"path: got '{path}', wanted what the blob was prepacked for"):
            cpu.sparse_mlp(torch.ones(3, 37), blob, out, path=path)
    tables = prepack([random_task((37, 17), 0.5, seed=1)], "fp32")
    with pytest.raises(ValueError, match="path: got 'blocks', wanted what the blob was prepacked for"):
        cpu.sparse_mlp(torch.ones(3, 37), tables, out, path="blocks")


@settings(max_examples=60)
@given(data=st.data(), precision=st.sampled_from(cpu.PRECISIONS))
def test_any_planes_and_values_are_refused_or_computed(data: st.DataObject, precision: str) -> None:
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    groups, quads = -(-rows // 16), -(-columns // 4)
    drawn = data.draw(st.binary(min_size=groups * -(-quads // 8), max_size=groups * -(-quads // 8)))
    planes = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).reshape(1, groups, -1)
    count = sum(bin(byte).count("1") for byte in drawn) + data.draw(st.sampled_from((0, 0, 0, 1, -1)))
    values = torch.ones(max(0, count), 16, 4)
    layer = cpu.PackLayer(values, planes, 0, None, columns, rows, "relu", 0.5, 3)
    try:
        blob = cpu.prepack_layers([[layer]], precision, ("blocks",))
    except ValueError as error:
        assert any(word in str(error) for word in ("planes", "values"))
    else:
        mask = torch.from_numpy(np.unpackbits(planes.numpy(), axis=-1, bitorder="little")[0, :, :quads]).bool()
        kept = mask.repeat_interleave(16, 0).repeat_interleave(4, 1)[:rows, :columns]
        assert torch.equal(tiles(kept)[..., 0, 0], mask)
        x, out = integers_like(2, columns), torch.empty(2, rows)
        cpu.sparse_mlp(x, blob, out)
        masked = MaskedLayer(kept.float(), kept, None, "relu", 0.5, 3)
        assert_exact(out, exact_reference(x, [[masked]], precision, in_blocks=True))
