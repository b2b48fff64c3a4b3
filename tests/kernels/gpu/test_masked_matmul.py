"""The Triton kernels of the masked product, forward and backward, against the oracle: interpreted, or on a GPU.

On a GPU bfloat16 stands for 16 bits, as whose code float16's is, and float16 elsewhere: the interpreter's product of
bfloat16 is wrong. Ids with "short" are what a second Triton version is tried with.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import UNIT_ROUNDOFF, Bounded, assert_exact, assert_rounding, linear_reference, small_integers

from lt4rec_sparse.masks import pack_words

pytest.importorskip("triton", reason="Triton is not installed")

from lt4rec_sparse.kernels.gpu.device_weight import FORMATS, Weight

from lt4rec_sparse.kernels import reference
from lt4rec_sparse.kernels.gpu import mask_and_cast, masked_linear, masked_matmul, tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
DTYPES = [HALF, torch.float32]
NAMES = {torch.float16: "fp16", torch.float32: "fp32", torch.bfloat16: "bf16"}
PATHS = list(masked_linear.PATHS)

# batch, in_features, out_features, starts, lengths of the tasks
CASES = {
    "one-task-short": (37, 45, 19, (0,), (37,)),
    "one-row": (1, 130, 5, (0,), (1,)),
    "no-row": (0, 33, 5, (0,), (0,)),
    "one-feature": (5, 1, 1, (0,), (5,)),
    "two-tasks-short": (40, 141, 19, (0, 0), (40, 40)),
    "two-overlap": (70, 64, 17, (0, 25), (50, 45)),
    "two-apart": (70, 64, 17, (0, 40), (40, 30)),
    "two-one-empty": (40, 64, 17, (0, 40), (40, 0)),
    "three-tasks": (20, 31, 18, (0, 0, 0), (20, 20, 20)),
    "four-tasks": (33, 40, 20, (0, 0, 0, 0), (33, 33, 33, 33)),
    "nine-tasks": (18, 20, 9, tuple(range(0, 18, 2)), (2,) * 9),
}
# Shapes are the same code in every dtype: float32 goes through a few of them, and float16 on a GPU through one.
SINGLE = ("one-task-short", "one-feature", "two-tasks-short", "two-overlap")
EXACT = [
    *((case, HALF) for case in CASES),
    *((case, torch.float32) for case in SINGLE),
    *([("two-tasks-short", torch.float16)] if DEVICE.type == "cuda" else []),
]


class Problem:
    """One case's tensors. Small integers, whose sums are exact in float32 and results in float16; or normal numbers."""

    def __init__(
        self, batch, k, n, starts, lengths, dtype, density=0.4, integers=True, weight_dtype=torch.float32, seed=0
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            if integers:
                return small_integers(*shape, generator=generator)
            return torch.randn(*shape, generator=generator)

        self.starts, self.lengths, self.tasks = starts, lengths, len(starts)
        self.x = draw(batch, k).to(dtype).to(DEVICE)
        self.weight = draw(n, k).to(weight_dtype).to(DEVICE)
        self.bias = draw(n).to(weight_dtype).to(DEVICE)
        self.dy = draw(sum(lengths), n).to(dtype).to(DEVICE)
        self.masks = (torch.rand(self.tasks, n, k, generator=generator) < density).to(DEVICE)
        self.words = pack_words(self.masks)

    @property
    def ranges(self):
        return self.starts, self.lengths

    def forward(self, activation="relu", bias=True, precision="ieee"):
        bias = self.bias if bias else None
        parts = (self.x, self.weight, self.words, bias, *self.ranges, activation)
        return masked_matmul.forward(*parts, precision)

    def each(self):
        """Each task's rows of x, its masked weight, and its rows of dy."""
        dys = self.dy.split(list(self.lengths))
        for mask, start, length, dy in zip(self.masks, *self.ranges, dys, strict=True):
            yield self.x[start : start + length], self.weight * mask, dy

    def wanted(self, activation="relu", bias=True):
        parts = [x.double() @ w.double().T + (self.bias.double() if bias else 0) for x, w, _ in self.each()]
        y = torch.cat(parts)
        return (y.relu() if activation == "relu" else y).to(self.x.dtype)

    def wanted_dx(self):
        dx = torch.zeros(self.x.shape, dtype=torch.float64, device=DEVICE)
        for (_, w, dy), start, length in zip(self.each(), *self.ranges, strict=True):
            dx[start : start + length] += dy.double() @ w.double()
        return dx.to(self.x.dtype)

    def wanted_dw(self):
        products = [(dy.double().T @ x.double()) * m for (x, _, dy), m in zip(self.each(), self.masks, strict=True)]
        return torch.stack(products).sum(0).to(self.weight.dtype)


def problem(case, dtype, **kinds):
    return Problem(*CASES[case], dtype, **kinds)


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


@pytest.mark.parametrize(("case", "dtype"), EXACT, ids=lambda value: NAMES.get(value, value))
@pytest.mark.parametrize("path", PATHS)
def test_forward_and_gradients_are_exact_on_integers(case, dtype, path):
    p = problem(case, dtype)
    with masked_linear.forced_path(path):
        assert_exact(masked_linear.masked_linear(p.x, p.weight, p.words, p.bias, *p.ranges, "relu"), p.wanted())
        assert_exact(masked_linear.masked_linear_dgrad(p.dy, p.weight, p.words, *p.ranges, len(p.x)), p.wanted_dx())
        assert_exact(masked_linear.masked_linear_wgrad(p.dy, p.x, p.words, *p.ranges, torch.float32), p.wanted_dw())


@every_dtype
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("case", ["one-task-short", "two-tasks-short"])
def test_empty_and_full_masks(case, dtype, density):
    p = problem(case, dtype, density=density)
    assert_exact(p.forward("none", bias=False), p.wanted("none", bias=False))
    assert_exact(masked_matmul.dgrad(p.dy, p.weight, p.words, *p.ranges, len(p.x), "ieee"), p.wanted_dx())
    assert_exact(masked_matmul.wgrad(p.dy, p.x, p.words, *p.ranges, torch.float32, "ieee"), p.wanted_dw())


@every_dtype
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ["two-tasks-short", "two-overlap"])
def test_forward_is_within_the_rounding_bound(case, dtype, path):
    p = problem(case, dtype, integers=False, weight_dtype=dtype)
    with masked_linear.forced_path(path):
        y = masked_linear.masked_linear(p.x, p.weight, p.words, p.bias, *p.ranges, "none")
        dx = masked_linear.masked_linear_dgrad(p.dy, p.weight, p.words, *p.ranges, len(p.x))
        dw = masked_linear.masked_linear_wgrad(p.dy, p.x, p.words, *p.ranges, torch.float32)
    # What is summed is one long product: the tasks' gradients and masked weights side by side, in x's rows.
    dys, weights = [], []
    for (x, w, dy), rows, start in zip(p.each(), y.split(list(p.lengths)), p.starts, strict=True):
        assert_rounding(rows, linear_reference(x, w, p.bias, torch.float32))
        dys.append(torch.nn.functional.pad(dy, (0, 0, start, len(p.x) - start - len(dy))))
        weights.append(w)
    assert_rounding(dx, linear_reference(torch.cat(dys, 1), torch.cat(weights).T, None, torch.float32))
    products = [linear_reference(dy.T, x.T, None, torch.float32) for x, _, dy in p.each()]
    value, bound = (
        sum(t * mask for t, mask in zip(part, p.masks, strict=True)) for part in zip(*products, strict=True)
    )
    # A sum over the tasks rounds once for each of them, relative to no more than the parts together.
    parts = sum(product.value.abs() for product in products)
    assert_rounding(dw, Bounded(value, bound + p.tasks * UNIT_ROUNDOFF[torch.float32] * parts))


def every_tile():
    for table in ("FORWARD", "DGRAD", "WGRAD"):
        for kind, entries in getattr(tiles, table).items():
            for i, tile in enumerate(entries):
                for tasks in (1, 2) if i == 0 else (2,):
                    yield pytest.param(table, kind, tile, tasks, id=f"{table}-{kind}-{tile.block_m}-{tasks}")


@pytest.mark.parametrize(("table", "kind", "tile", "tasks"), list(every_tile()))
def test_every_tile_of_the_tables_is_exact(table, kind, tile, tasks):
    dtype = HALF if kind == "16" else torch.float32
    precision = "tf32" if kind == "tf32" else "ieee"
    # One tile and a bit in the directions that it cuts, two steps and a bit in that of its loop.
    m, n, k = (size + 3 for size in (tile.block_m, tile.block_n // (2 if tasks == 2 else 1), tile.block_k))
    starts, lengths = (0,) * tasks, (m,) * tasks
    p = Problem(m, min(k, 131), n, starts, lengths, dtype)
    y_starts = [m * t for t in range(tasks)]
    if table == "FORWARD":
        weight = Weight("masked", tuple(p.weight.shape), p.weight, p.words, None, tasks)
        y = p.x.new_empty(m * tasks, n)
        masked_matmul.forward_launch(p.x, weight, p.bias, y, starts, y_starts, lengths, "relu", precision, tile).run()
        assert_exact(y, p.wanted())
    elif table == "DGRAD":
        dx = torch.empty_like(p.x)
        masked_matmul.dgrad_launch(p.dy, p.weight, p.words, dx, starts, y_starts, lengths, precision, tile).run()
        assert_exact(dx, p.wanted_dx())
    else:
        dw = torch.empty(3, *p.weight.shape, device=DEVICE)
        masked_matmul.wgrad_launch(p.dy, p.x, p.words, dw, starts, y_starts, lengths, precision, tile).run()
        assert_exact(dw.sum(0), p.wanted_dw())


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, "16") for case in ("one-task-short", "two-tasks-short", "two-apart", "three-tasks", "four-tasks")),
        *(("two-tasks-short", kind) for kind in tiles.COMPRESSED if kind != "16"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same(case, format, kind):
    dtype = HALF if kind == "16" else torch.float32
    p = problem(case, dtype)
    weight = Weight.prepack(p.weight, p.masks, format, dtype, DEVICE)
    table = tiles.COMPRESSED if format == "shared" else tiles.FORWARD
    biases = torch.stack([p.bias + t for t in range(p.tasks)])
    wanted = torch.cat([x.double() @ w.double().T + b.double() for (x, w, _), b in zip(p.each(), biases, strict=True)])
    y_starts = [sum(p.lengths[:t]) for t in range(p.tasks)]
    # The largest tile takes the compiler longest: one case of each kind.
    for tile in {table[kind][0 if case == "two-tasks-short" else -1], table[kind][-1]}:
        y = p.x.new_empty(sum(p.lengths), p.weight.shape[0])
        ranges = (p.starts, y_starts, p.lengths)
        precision = "tf32" if kind == "tf32" else "ieee"
        masked_matmul.forward_launch(p.x, weight, biases, y, *ranges, "none", precision, tile).run()
        assert_exact(y, wanted.to(dtype))


def test_a_compressed_weight_is_as_small_as_promised():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 512, 1024, generator=generator) < 0.1
    weight = Weight.prepack(torch.randn(512, 1024), masks, "shared", torch.bfloat16, DEVICE)
    # 16 bits a value of the union, a bit a weight and task, a quarter of a bit for the offsets.
    assert weight.nbytes == 2 * int(masks.any(0).sum()) + 512 * 1024 * 2 // 8 + 512 * 1024 // 32
    with pytest.raises(ValueError, match="got 2 of a compressed weight"):
        weight.of_tasks(slice(0, 1))


@every_dtype
def test_sigmoid_is_within_the_bound_of_its_argument(dtype):
    p = problem("two-tasks-short", dtype)
    weight = Weight.prepack(p.weight / 8, p.masks, "masked", dtype, DEVICE)
    y = p.x.new_empty(sum(p.lengths), p.weight.shape[0], dtype=torch.float32)
    masked_matmul.forward_into(p.x, weight, None, y, *p.ranges, "sigmoid", "ieee")
    for (x, w, _), rows in zip(p.each(), y.split(list(p.lengths)), strict=True):
        z = linear_reference(x, w / 8, None, torch.float32)
        # exp, sum and quotient round within an ulp each; a GPU's exp2 within two
        assert_rounding(rows, z._replace(value=z.value.sigmoid(), bound=z.bound / 4 + 8 * 2.0**-24))


@pytest.mark.parametrize("path", PATHS)
def test_a_pruned_weight_contributes_nothing_even_if_it_is_nan(path):
    p = problem("two-tasks-short", HALF)
    poisoned = torch.where(p.masks.any(0), p.weight, torch.nan)
    only = p.masks[0] & ~p.masks[1]  # kept by the first task alone: NaN for neither
    with masked_linear.forced_path(path):
        y = masked_linear.masked_linear(p.x, poisoned, p.words, p.bias, *p.ranges, "relu")
        dx = masked_linear.masked_linear_dgrad(p.dy, poisoned, p.words, *p.ranges, len(p.x))
    assert only.any()
    assert_exact(y, p.wanted())
    assert_exact(dx, p.wanted_dx())


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, of the interpreter
@pytest.mark.parametrize("path", PATHS)
def test_nan_and_infinity_spread_as_in_torch(path):
    p = problem("one-task-short", torch.float32, density=1.0)
    p.x[3, 4], p.x[5, 6] = torch.nan, torch.inf
    with masked_linear.forced_path(path):
        y = masked_linear.masked_linear(p.x, p.weight, p.words, p.bias, *p.ranges, "relu")
    wanted = torch.relu(p.x @ p.weight.T + p.bias)
    assert torch.equal(y.isnan(), wanted.isnan()) and y.isnan().any()
    assert_exact(y.nan_to_num(), wanted.nan_to_num())


def test_rows_may_be_strided_and_masks_bool():
    p = problem("two-overlap", HALF)
    wide = torch.nn.functional.pad(p.x, (3, 5))
    for x in (wide[:, 3 : 3 + p.x.shape[1]], p.x.T.contiguous().T):
        assert not x.is_contiguous()
        assert_exact(masked_linear.masked_linear(x, p.weight, p.masks, p.bias, *p.ranges, "relu"), p.wanted())


@settings(max_examples=20)
@given(
    # The widths are alike to the compiler: no multiples of 16.
    shape=st.tuples(st.integers(1, 40), st.sampled_from([21, 70]), st.sampled_from([9, 40])),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4),
    density=st.sampled_from([0.1, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_any_ranges_give_what_the_reference_gives(shape, cuts, density, seed):
    batch, k, n = shape
    starts = tuple(int(a * batch) for a, _ in cuts)
    lengths = tuple(int(b * (batch - start)) for start, (_, b) in zip(starts, cuts, strict=True))
    p = Problem(batch, k, n, starts, lengths, torch.float32, density, seed=seed)
    forward = (p.x, p.weight, p.words, p.bias, *p.ranges, "relu")
    with masked_linear.forced_path("triton"):
        assert_exact(masked_linear.masked_linear(*forward), reference.masked_linear(*forward))
        dgrad = (p.dy, p.weight, p.words, *p.ranges, batch)
        assert_exact(masked_linear.masked_linear_dgrad(*dgrad), reference.masked_linear_dgrad(*dgrad))
        wgrad = (p.dy, p.x, p.words, *p.ranges, torch.float32)
        assert_exact(masked_linear.masked_linear_wgrad(*wgrad), reference.masked_linear_wgrad(*wgrad))


@every_dtype
def test_the_same_input_gives_the_same_bits_twice(dtype):
    p = problem("two-tasks-short", dtype, integers=False)
    wgrad = (p.dy, p.x, p.words, *p.ranges, torch.float32, "ieee")
    assert torch.equal(p.forward(), p.forward())
    assert torch.equal(masked_matmul.wgrad(*wgrad), masked_matmul.wgrad(*wgrad))


def test_masks_are_multiplied_in_and_cast_in_one_kernel():
    p = problem("two-tasks-short", HALF)
    masked, k = mask_and_cast.mask_and_cast(p.weight, p.words, HALF), p.weight.shape[1]
    assert_exact(masked[:, :, :k], (p.weight * p.masks).to(HALF))
    assert masked.stride(1) % 8 == 0  # rows start at 16 bytes, for cuBLAS
    assert masked.shape[2] > k and not masked[:, :, k:].any()


def test_the_path_is_chosen_by_shape(monkeypatch):
    p = problem("one-task-short", HALF)
    taken = []
    monkeypatch.setattr(masked_matmul, "forward", lambda *parts: taken.append("triton"))
    monkeypatch.setattr(mask_and_cast, "forward", lambda *parts: taken.append("cublas"))
    many = tiles.CUBLAS_ROWS
    for rows, k, n in ((1, 64, 16), (many - 1, 64, 16), (many, 64, 16), (1, 65, 16), (1, 64, 17)):
        masked_linear.masked_linear(torch.ones(1, k), torch.ones(n, k), p.words, p.bias, (0,), (rows,), "relu")
    assert taken == ["triton", "triton", "cublas", "cublas", "cublas"]
    with (
        pytest.raises(ValueError, match="path: got 'cuda', wanted one of triton, cublas"),
        masked_linear.forced_path("cuda"),
    ):
        pass
