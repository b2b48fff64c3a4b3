"""The fused tail of an MLP against the oracle: interpreted, or on a GPU.

On a GPU bfloat16 stands for 16 bits, as whose code float16's is, and float16 elsewhere: the interpreter's product of
bfloat16 is wrong. Widths are constants of the kernel: cases that share them share a compilation.
"""

import pytest
import torch
from oracle import Layer, assert_exact, assert_rounding, mlp_reference, small_integers

from lt4rec_sparse.masks import pack_words

pytest.importorskip("triton", reason="Triton is not installed")

from lt4rec_sparse.kernels.gpu.device_weight import FORMATS, Weight
from lt4rec_sparse.kernels.gpu.tiles import MULTIPROCESSORS, Tile, arithmetic

from lt4rec_sparse.kernels.gpu import fused_tail
from lt4rec_sparse.kernels.gpu.fused_tail import Tail

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
DTYPES = [HALF, torch.float32]
NAMES = {torch.float16: "fp16", torch.float32: "fp32", torch.bfloat16: "bf16"}
# For all formats. Two chunks are from 129 neurons on. Products in IEEE float32 are unrolled: of 16 rows, for more of
# them take the compiler a quarter of a minute.
TILES = {HALF: Tile(64, 128, 128, 4, 1), torch.float32: Tile(16, 128, 128, 8, 1)}

# tasks, rows, widths, density of each task's mask, with biases
CASES = {
    "two-layers": (2, 17, (128, 64, 32, 1), 0.3, True),
    "one-layer": (2, 17, (128, 64, 1), 0.3, True),
    "one-task": (1, 20, (64, 32, 16, 1), 0.3, True),
    "three-tasks": (3, 5, (32, 64, 2), 0.3, True),
    "four-tasks": (4, 5, (64, 32, 1), 0.3, True),
    "odd-two-layers": (2, 18, (100, 37, 5, 3), 0.5, True),
    "odd-one-layer": (2, 18, (37, 5, 3), 0.5, True),
    "all-ones": (1, 2, (1, 1, 1, 1), 1.0, True),
    "one-row-no-bias": (2, 1, (40, 20, 10, 1), 0.5, False),
    "63-rows": (2, 63, (40, 20, 10, 1), 0.5, True),
    "65-rows": (2, 65, (40, 20, 10, 1), 0.5, True),
    "no-row": (2, 0, (40, 20, 10, 1), 0.5, True),
    "empty-masks": (2, 6, (40, 20, 10, 1), 0.0, True),
    "full-masks-four-out": (2, 6, (40, 20, 10, 4), 1.0, True),
    "two-chunks": (1, 6, (16, 140, 12, 1), 0.3, True),
    "two-chunks-one-layer": (1, 6, (16, 140, 3), 0.3, True),
}
# Shapes are the same code in every dtype: float32 goes through a few of them.
SINGLE = ("odd-two-layers", "odd-one-layer", "empty-masks")
EXACT = [(case, dtype) for dtype in DTYPES for case in (SINGLE if dtype == torch.float32 else CASES)]


class Problem:
    """One case's tensors: small integers whose sums are exact in float32 and in the dtype, or normal numbers."""

    def __init__(self, tasks, rows, widths, density, has_bias, dtype, integers=True, shared_bias=False, seed=0):
        self.generator = generator = torch.Generator().manual_seed(seed)

        def draw(*shape, width=1):
            if integers:
                return small_integers(*shape, generator=generator).sign()
            return torch.randn(*shape, generator=generator) / width**0.5

        *ins, last, out = widths
        shapes = list(zip([*ins[1:], last], ins, strict=True))
        self.tasks, self.rows, self.widths, self.dtype = tasks, rows, widths, dtype
        self.h = draw(tasks, rows, widths[0]).to(dtype).to(DEVICE)
        self.weights = [draw(*shape, width=shape[1]).to(dtype).to(DEVICE) for shape in shapes]
        self.masks = [(torch.rand(tasks, *shape, generator=generator) < density).to(DEVICE) for shape in shapes]
        bias_shapes = [(n,) if shared_bias else (tasks, n) for n, _ in shapes]
        self.biases = tuple(draw(*shape).to(DEVICE) if has_bias else None for shape in bias_shapes)
        self.head = draw(tasks, out, last, width=last).to(dtype).to(DEVICE)
        self.head_bias = draw(tasks, out).to(DEVICE) if has_bias else None

    def tail(self, formats, activation="none"):
        formats = [formats] * len(self.weights) if isinstance(formats, str) else formats
        hidden = tuple(packed(*parts) for parts in zip(self.weights, self.masks, formats, strict=True))
        return Tail(hidden, self.biases, self.head, self.head_bias, activation)

    def scores(self, tail, precision="ieee", tile=None):
        scores = torch.empty(self.rows, self.tasks * self.widths[-1], device=DEVICE)
        fused_tail.fused_tail_launch(self.h, tail, scores, precision, tile or TILES[self.dtype]).run()
        return scores

    def references(self, activation="none", accumulate=torch.float32):
        """Each task's scores, to be compared with its columns."""
        for t in range(self.tasks):
            layers = [
                Layer(weight * mask[t], bias if bias is None or bias.dim() == 1 else bias[t], "relu")
                for weight, mask, bias in zip(self.weights, self.masks, self.biases, strict=True)
            ]
            layers.append(Layer(self.head[t], None if self.head_bias is None else self.head_bias[t], activation))
            yield mlp_reference(self.h[t], layers, accumulate, self.dtype)

    def exact(self):
        """All scores; fails where an activation would not be exact, so that the problem and not the kernel is wrong."""
        wanted = []
        for t in range(self.tasks):
            a = self.h[t].double()
            for weight, mask, bias in zip(self.weights, self.masks, self.biases, strict=True):
                a = (a @ (weight * mask[t]).double().T + (0 if bias is None else bias.expand(self.tasks, -1)[t])).relu()
                assert not a.numel() or a.max() <= 2**8  # what bfloat16 holds
            wanted.append(a @ self.head[t].double().T + (0 if self.head_bias is None else self.head_bias[t]))
        return torch.cat(wanted, 1).float()


def packed(weight, mask, format):
    tasks, shape = len(mask), tuple(weight.shape)
    if format == "premasked":
        return Weight(format, shape, weight * mask, None, None, tasks)
    if format == "masked":
        # What a mask drops must not be looked at.
        return Weight(format, shape, torch.where(mask.any(0), weight, torch.nan), pack_words(mask), None, tasks)
    union = mask.any(0)
    groups = torch.nn.functional.pad(union, (0, -shape[1] % 128)).view(shape[0], -1, 128).sum(2)
    starts = groups.flatten().cumsum(0).view_as(groups) - groups
    values = torch.cat([weight[union], weight.new_full((1,), torch.nan)])  # an empty union has an address, too
    return Weight(format, shape, values, pack_words(mask), starts.to(torch.int32), tasks)


@pytest.mark.parametrize("case, dtype", EXACT, ids=lambda value: NAMES.get(value, value))
def test_it_is_exact_in_every_format(case, dtype):
    problem = Problem(*CASES[case], dtype)
    wanted = problem.exact()
    for format in FORMATS:
        assert_exact(problem.scores(problem.tail(format)), wanted)


@pytest.mark.parametrize(
    "case, activation, dtype",
    [
        ("two-layers", "sigmoid", HALF),
        ("one-layer", "none", HALF),
        ("odd-one-layer", "sigmoid", torch.float32),
        ("two-chunks", "none", torch.float32),
    ],
    ids=lambda value: NAMES.get(value, value),
)
def test_formats_agree_in_every_bit_and_keep_the_rounding_bound(case, dtype, activation):
    problem = Problem(*CASES[case], dtype, integers=False)
    scores, *others = [problem.scores(problem.tail(format, activation)) for format in FORMATS]
    for columns, reference in zip(scores.chunk(problem.tasks, 1), problem.references(activation), strict=True):
        assert_rounding(columns, reference)
    for other in others:
        assert_exact(other, scores)


def test_each_layer_has_its_own_format():
    problem = Problem(*CASES["two-layers"], torch.float32)
    wanted = problem.exact()
    for formats in (("premasked", "shared"), ("shared", "masked"), ("masked", "premasked")):
        assert_exact(problem.scores(problem.tail(formats)), wanted)


@pytest.mark.parametrize("kind", ["16", "tf32", "fp32"])
def test_every_tile_of_the_tables_is_exact(kind):
    dtype = HALF if kind == "16" else torch.float32
    problem = Problem(1, 17, (60, 140, 20, 1), 0.3, True, dtype)
    wanted = problem.exact()
    for table, format in ((fused_tail.TILES, "masked"), (fused_tail.COMPRESSED, "shared")):
        for tile in table.get(kind, ()):
            assert_exact(problem.scores(problem.tail(format), "tf32" if kind == "tf32" else "ieee", tile), wanted)


def test_a_bias_may_be_of_all_tasks():
    problem = Problem(*CASES["two-layers"], torch.float32, shared_bias=True)
    assert_exact(problem.scores(problem.tail("masked")), problem.exact())


def test_the_head_may_be_float32_beside_16_bits():
    problem = Problem(*CASES["two-layers"], HALF, integers=False)
    tail = problem.tail("masked")
    assert_exact(problem.scores(tail._replace(head=tail.head.float())), problem.scores(tail))


def test_rows_do_not_depend_on_the_batch():
    problem = Problem(*CASES["65-rows"], HALF, integers=False)
    scores = problem.scores(problem.tail("masked"))
    single = Problem(*CASES["65-rows"], HALF, integers=False)
    single.rows, single.h = 1, problem.h[:, 64:65].contiguous()
    assert_exact(single.scores(single.tail("masked")), scores[64:65])


def test_rows_of_h_may_stand_apart():
    problem = Problem(*CASES["one-row-no-bias"], torch.float32)
    wanted = problem.exact()
    tasks, rows, width = problem.h.shape
    wide = torch.full((rows, tasks, width + 3), torch.nan, device=DEVICE)  # a row of one task beside that of the next
    wide[:, :, :width] = problem.h.transpose(0, 1)
    problem.h = wide[:, :, :width].transpose(0, 1)
    assert_exact(problem.scores(problem.tail("premasked")), wanted)


def test_nothing_beside_the_scores_is_written():
    problem = Problem(*CASES["odd-two-layers"], torch.float32)
    room = torch.full((problem.rows + 2, problem.tasks * 3 + 4), -7.0, device=DEVICE)
    fused_tail.fused_tail_into(problem.h, problem.tail("masked"), room[1:-1, :-4], "ieee")
    assert_exact(room[1:-1, :-4], problem.exact())
    assert (room[0] == -7).all() and (room[-1] == -7).all() and (room[:, -4:] == -7).all()


def test_nan_stays_nan_and_in_its_row():
    problem = Problem(*CASES["two-layers"], torch.float32)
    wanted = problem.exact()
    problem.h[0, 2, 5] = torch.nan
    problem.masks[0][0, :, 5] = True  # read by every neuron of task 0
    scores, others = problem.scores(problem.tail("premasked")), torch.arange(problem.rows) != 2
    assert scores[2, 0].isnan()
    assert_exact(scores[:, 1], wanted[:, 1])
    assert not scores[others].isnan().any()


def test_the_tile_is_the_largest_that_keeps_a_third_of_the_gpu_busy():
    rows = {fused_tail.tail_tile(m, 2, torch.float16, "ieee").block_m: m for m in (256, 1024, 2048, 8192)}
    assert rows == {16: 256, 32: 1024, 64: 2048, 128: 8192}
    single = fused_tail.tail_tile(1024, 2, torch.float32, "ieee")
    assert single.block_m == 16 or 1024 // single.block_m * 2 >= MULTIPROCESSORS * 3 // 4
    assert fused_tail.tail_tile(0, 1, torch.float16, "ieee").block_m == 16


@pytest.mark.parametrize(
    "dtype, precision", [(torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
)
def test_what_fits(dtype, precision):
    assert fused_tail.fits((512, 256, 128, 1), dtype, precision)
    assert fused_tail.fits((5000, 256, 4), dtype, precision)
    for widths in ((512, 257, 128, 1), (512, 256, 129, 1), (512, 256, 128, 5), (512, 0, 1), (512, 1), (9, 8, 7, 6, 1)):
        assert not fused_tail.fits(widths, dtype, precision)
    is_spilling = arithmetic(dtype, precision) == "fp32"
    assert fused_tail.fits((512, 256, 128, 1), dtype, precision, is_compressed=True) != is_spilling
