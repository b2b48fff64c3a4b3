"""The fused tail of an MLP against the oracle: interpreted, or on a GPU.

16 bits are bfloat16 on a GPU, since float16 runs the same code, and float16 elsewhere: the interpreter's product of
bfloat16 is wrong. Widths are constants of the kernel: cases that share them share a compilation.
"""

import pytest
import torch
from oracle import Layer, assert_exact, assert_rounding, mlp_reference, small_integers

pytest.importorskip("triton", reason="Triton is not installed")

from lt4rec_sparse.kernels.gpu import fused_tail
from lt4rec_sparse.kernels.gpu.fused_tail import Tail
from lt4rec_sparse.kernels.gpu.launch import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
TILE = Tile(64, 128, 128, 4, 1)  # of the cases: from 129 neurons on there are two chunks

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
    # Rows that start at 16 bytes are loaded by other code; two steps of the loop, two chunks: what real widths run.
    "aligned": (2, 64, (256, 256, 64, 1), 0.1, True),
}


class Problem:
    """One case's tensors: small integers whose sums are exact in float32 and in the dtype, or normal numbers."""

    def __init__(self, tasks, rows, widths, density, has_bias, integers=True, shared_bias=False, seed=0):
        self.generator = generator = torch.Generator().manual_seed(seed)

        def draw(*shape, width=1):
            if integers:
                return small_integers(*shape, generator=generator).sign()
            return torch.randn(*shape, generator=generator) / width**0.5

        *ins, last, out = widths
        shapes = list(zip([*ins[1:], last], ins, strict=True))
        self.tasks, self.rows, self.widths = tasks, rows, widths
        self.h = draw(tasks, rows, widths[0]).to(HALF).to(DEVICE)
        self.weights = [draw(*shape, width=shape[1]).to(HALF).to(DEVICE) for shape in shapes]
        self.masks = [(torch.rand(tasks, *shape, generator=generator) < density).to(DEVICE) for shape in shapes]
        bias_shapes = [(n,) if shared_bias else (tasks, n) for n, _ in shapes]
        self.biases = tuple(draw(*shape).to(DEVICE) if has_bias else None for shape in bias_shapes)
        self.head = draw(tasks, out, last, width=last).to(HALF).to(DEVICE)
        self.head_bias = draw(tasks, out).to(DEVICE) if has_bias else None

    def tail(self, activation="none"):
        hidden = tuple(weight * masks for weight, masks in zip(self.weights, self.masks, strict=True))
        return Tail(hidden, self.biases, self.head, self.head_bias, activation)

    def scores(self, tail, tile=TILE):
        scores = torch.empty(self.rows, self.tasks * self.widths[-1], device=DEVICE)
        fused_tail.fused_tail_launch(self.h, tail, scores, tile).run()
        return scores

    def references(self, activation="none", accumulate=torch.float32):
        """Each task's scores, to be compared with its columns."""
        for t in range(self.tasks):
            layers = [
                Layer(weight * mask[t], bias if bias is None or bias.dim() == 1 else bias[t], "relu")
                for weight, mask, bias in zip(self.weights, self.masks, self.biases, strict=True)
            ]
            layers.append(Layer(self.head[t], None if self.head_bias is None else self.head_bias[t], activation))
            yield mlp_reference(self.h[t], layers, accumulate, HALF)

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


@pytest.mark.parametrize("case", CASES)
def test_it_is_exact(case):
    problem = Problem(*CASES[case])
    assert_exact(problem.scores(problem.tail()), problem.exact())


@pytest.mark.parametrize(
    "case, activation",
    [("two-layers", "sigmoid"), ("one-layer", "none"), ("odd-one-layer", "sigmoid"), ("two-chunks", "none")],
)
def test_it_keeps_the_rounding_bound(case, activation):
    problem = Problem(*CASES[case], integers=False)
    scores = problem.scores(problem.tail(activation))
    for columns, reference in zip(scores.chunk(problem.tasks, 1), problem.references(activation), strict=True):
        assert_rounding(columns, reference)


@pytest.mark.parametrize("tile", fused_tail.TILES, ids=lambda tile: str(tile.block_m))
def test_every_tile_of_the_table_is_exact(tile):
    problem = Problem(1, 17, (60, 140, 20, 1), 0.3, True)
    assert_exact(problem.scores(problem.tail(), tile), problem.exact())


def test_a_bias_may_be_of_all_tasks():
    problem = Problem(*CASES["two-layers"], shared_bias=True)
    assert_exact(problem.scores(problem.tail()), problem.exact())


def test_the_head_may_be_float32_beside_16_bits():
    problem = Problem(*CASES["two-layers"], integers=False)
    tail = problem.tail()
    assert_exact(problem.scores(tail._replace(head=tail.head.float())), problem.scores(tail))


def test_rows_do_not_depend_on_the_batch():
    problem = Problem(*CASES["65-rows"], integers=False)
    scores = problem.scores(problem.tail())
    single = Problem(*CASES["65-rows"], integers=False)
    single.rows, single.h = 1, problem.h[:, 64:65].contiguous()
    assert_exact(single.scores(single.tail()), scores[64:65])


def test_rows_of_h_may_stand_apart():
    problem = Problem(*CASES["one-row-no-bias"])
    wanted = problem.exact()
    tasks, rows, width = problem.h.shape
    wide = torch.full((rows, tasks, width + 3), torch.nan, device=DEVICE)  # a row of one task beside that of the next
    wide[:, :, :width] = problem.h.transpose(0, 1)
    problem.h = wide[:, :, :width].transpose(0, 1)
    assert_exact(problem.scores(problem.tail()), wanted)


def test_nothing_beside_the_scores_is_written():
    problem = Problem(*CASES["odd-two-layers"])
    room = torch.full((problem.rows + 2, problem.tasks * 3 + 4), -7.0, device=DEVICE)
    fused_tail.fused_tail_launch(problem.h, problem.tail(), room[1:-1, :-4]).run()
    assert_exact(room[1:-1, :-4], problem.exact())
    assert (room[0] == -7).all() and (room[-1] == -7).all() and (room[:, -4:] == -7).all()


def test_nan_stays_nan_and_in_its_row():
    problem = Problem(*CASES["two-layers"])
    wanted = problem.exact()
    problem.h[0, 2, 5] = torch.nan
    problem.masks[0][0, :, 5] = True  # read by every neuron of task 0
    scores, others = problem.scores(problem.tail()), torch.arange(problem.rows) != 2
    assert scores[2, 0].isnan()
    assert_exact(scores[:, 1], wanted[:, 1])
    assert not scores[others].isnan().any()


def test_the_tile_is_the_largest_that_keeps_a_third_of_the_gpu_busy():
    def rows_of_tile(rows, tasks):
        h, scores = torch.empty(tasks, rows, 512, device="meta"), torch.empty(rows, tasks, device="meta")
        weights = tuple(torch.empty(tasks, n, k, device="meta") for n, k in ((256, 512), (128, 256)))
        tail = Tail(weights, (None, None), torch.empty(tasks, 1, 128, device="meta"), None, "none")
        return fused_tail.fused_tail_launch(h, tail, scores).constants["BLOCK_M"]

    assert {rows_of_tile(m, 2): m for m in (256, 1024, 2048, 8192)} == {16: 256, 32: 1024, 64: 2048, 128: 8192}
    assert rows_of_tile(0, 1) == 16


def test_what_fits():
    for dtype in (torch.float16, torch.bfloat16):
        assert fused_tail.fits((512, 256, 128, 1), dtype)
        assert fused_tail.fits((5000, 256, 4), dtype)
    assert not fused_tail.fits((512, 256, 128, 1), torch.float32)
    for widths in ((512, 257, 128, 1), (512, 256, 129, 1), (512, 256, 128, 5), (512, 0, 1), (512, 1), (9, 8, 7, 6, 1)):
        assert not fused_tail.fits(widths, torch.float16)
