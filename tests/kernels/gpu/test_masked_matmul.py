"""The Triton kernels of the masked product, forward and backward, against the oracle: interpreted, or on a GPU.

16 bits are bfloat16 on a GPU, since float16 runs the same code, and float16 elsewhere: the interpreter's product of
bfloat16 is wrong. Cases with "short" in their id also run under a second Triton version.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import UNIT_ROUNDOFF, Bounded, assert_exact, assert_rounding, linear_reference, small_integers

from lt4rec_sparse.masks import pack_words

pytest.importorskip("triton", reason="Triton is not installed")

from lt4rec_sparse.kernels import reference
from lt4rec_sparse.kernels.gpu import mask_and_cast, masked_linear, masked_matmul
from lt4rec_sparse.kernels.gpu.launch import choose_tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
DTYPES = [HALF, torch.float32]
NAMES = {torch.float16: "fp16", torch.float32: "fp32", torch.bfloat16: "bf16"}
PATHS = list(masked_linear.PATHS)

# tasks, rows of each, in_features, out_features, whether all tasks read the same x
CASES = {
    "one-task-short": (1, 37, 45, 19, True),
    "one-row": (1, 1, 130, 5, True),
    "no-row": (1, 0, 33, 5, True),
    "one-feature": (1, 5, 1, 1, True),
    "two-tasks-short": (2, 40, 141, 19, True),
    "two-apart-short": (2, 35, 64, 17, False),
    "three-tasks": (3, 20, 31, 18, True),
    "four-tasks": (4, 33, 40, 20, True),
    "six-tasks": (6, 17, 20, 9, True),
    "nine-apart": (9, 2, 20, 9, False),
    # Rows that start at 16 bytes are loaded by other code, and several steps of a loop overlap: what real widths run.
    "aligned": (2, 64, 192, 64, True),
    "aligned-apart": (2, 64, 128, 128, False),
}
# Shapes are the same code in every dtype: float32 goes through a few of them, and float16 on a GPU through one.
SINGLE = ("one-task-short", "one-feature", "two-tasks-short", "two-apart-short", "aligned")
EXACT = [
    *((case, HALF) for case in CASES),
    *((case, torch.float32) for case in SINGLE),
    *([("two-tasks-short", torch.float16)] if DEVICE.type == "cuda" else []),
]


class Problem:
    """One case's tensors. Small integers, whose sums are exact in float32 and results in float16; or normal numbers."""

    def __init__(
        self,
        tasks,
        rows,
        k,
        n,
        is_shared,
        dtype,
        density=0.4,
        integers=True,
        weight_dtype=torch.float32,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            if integers:
                return small_integers(*shape, generator=generator)
            return torch.randn(*shape, generator=generator)

        self.tasks, self.is_shared = tasks, is_shared
        self.x = draw(1 if is_shared else tasks, rows, k).to(dtype).to(DEVICE)
        self.weight = draw(n, k).to(weight_dtype).to(DEVICE)
        self.bias = draw(n).to(weight_dtype).to(DEVICE)
        self.dy = draw(tasks, rows, n).to(dtype).to(DEVICE)
        self.masks = (torch.rand(tasks, n, k, generator=generator) < density).to(DEVICE)
        self.words = pack_words(self.masks)

    def forward(self, activation="relu", bias=True, precision="ieee"):
        return masked_matmul.forward(
            self.x, self.weight, self.words, self.bias if bias else None, activation, precision
        )

    @property
    def each_x(self):
        """Each task's rows of x."""
        return self.x.expand(self.tasks, -1, -1)

    @property
    def masked(self):
        """Each task's weight."""
        return self.weight * self.masks

    def wanted(self, activation="relu", bias=True):
        y = self.each_x.double() @ self.masked.double().mT + (self.bias.double() if bias else 0)
        return (y.relu() if activation == "relu" else y).to(self.x.dtype)

    def wanted_dx(self):
        dx = self.dy.double() @ self.masked.double()
        return (dx.sum(0, keepdim=True) if self.is_shared else dx).to(self.x.dtype)

    def wanted_dw(self):
        return (self.dy.double().mT @ self.each_x.double() * self.masks).sum(0).to(self.weight.dtype)


def problem(case, dtype, **kinds):
    return Problem(*CASES[case], dtype, **kinds)


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


def three_products(p, activation="relu"):
    """The result and both gradients, by the path that is forced."""
    return (
        masked_linear.masked_linear(p.x, p.weight, p.words, p.bias, activation),
        masked_linear.masked_linear_dgrad(p.dy, p.weight, p.words, p.is_shared),
        masked_linear.masked_linear_wgrad(p.dy, p.x, p.words, torch.float32),
    )


@pytest.mark.parametrize(("case", "dtype"), EXACT, ids=lambda value: NAMES.get(value, value))
@pytest.mark.parametrize("path", PATHS)
def test_forward_and_gradients_are_exact_on_integers(case, dtype, path):
    p = problem(case, dtype)
    with masked_linear.forced_path(path):
        y, dx, dw = three_products(p)
    assert_exact(y, p.wanted())
    assert_exact(dx, p.wanted_dx())
    assert_exact(dw, p.wanted_dw())


@every_dtype
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("case", ["one-task-short", "two-tasks-short"])
def test_empty_and_full_masks(case, dtype, density):
    p = problem(case, dtype, density=density)
    assert_exact(p.forward("none", bias=False), p.wanted("none", bias=False))
    assert_exact(masked_matmul.dgrad(p.dy, p.weight, p.words, p.is_shared, "ieee"), p.wanted_dx())
    assert_exact(masked_matmul.wgrad(p.dy, p.x, p.words, torch.float32, "ieee"), p.wanted_dw())


@every_dtype
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ["two-tasks-short", "two-apart-short", "aligned"])
def test_forward_and_gradients_are_within_the_rounding_bound(case, dtype, path):
    p = problem(case, dtype, integers=False, weight_dtype=dtype)
    with masked_linear.forced_path(path):
        y, dx, dw = three_products(p, "none")
    for of_task, x, w in zip(y, p.each_x, p.masked, strict=True):
        assert_rounding(of_task, linear_reference(x, w, p.bias, torch.float32))
    if p.is_shared:  # one long product: the tasks' gradients and masked weights side by side
        wanted = linear_reference(torch.cat(list(p.dy), 1), torch.cat(list(p.masked)).T, None, torch.float32)
        assert_rounding(dx[0], wanted)
    else:
        for of_task, dy, w in zip(dx, p.dy, p.masked, strict=True):
            assert_rounding(of_task, linear_reference(dy, w.T, None, torch.float32))
    products = [linear_reference(dy.T, x.T, None, torch.float32) for dy, x in zip(p.dy, p.each_x, strict=True)]
    value, bound = (
        sum(t * mask for t, mask in zip(part, p.masks, strict=True)) for part in zip(*products, strict=True)
    )
    # A sum over the tasks rounds once per task, relative to at most the parts together.
    parts = sum(product.value.abs() for product in products)
    assert_rounding(dw, Bounded(value, bound + p.tasks * UNIT_ROUNDOFF[torch.float32] * parts))


def every_tile():
    for table in ("FORWARD", "DGRAD", "WGRAD"):
        for kind, entries in getattr(masked_matmul, table).items():
            for i, tile in enumerate(entries):
                for tasks in (1, 2) if i == 0 else (2,):
                    yield pytest.param(table, kind, tile, tasks, id=f"{table}-{kind}-{tile.block_m}-{tasks}")


@pytest.mark.parametrize(("table", "kind", "tile", "tasks"), list(every_tile()))
@pytest.mark.parametrize("is_aligned", [False, True], ids=["ragged", "aligned"])
def test_every_tile_of_the_tables_is_exact(table, kind, tile, tasks, is_aligned):
    dtype = HALF if kind == "16" else torch.float32
    precision = "tf32" if kind == "tf32" else "ieee"
    # A tile and a bit in the directions that it cuts, a step and a bit in that of its loop; or whole ones, two steps.
    sides = (tile.block_m, tile.block_n // (2 if tasks == 2 else 1), tile.block_k)
    looped = {"FORWARD": 2, "DGRAD": 1, "WGRAD": 0}[table]
    if is_aligned:
        m, n, k = (side * 2 if i == looped else side for i, side in enumerate(sides))
    else:
        m, n, k = (side + 3 for side in sides)
    p = Problem(tasks, m, min(k, 256 if is_aligned else 131), n, True, dtype)
    if table == "FORWARD":
        y = p.x.new_empty(tasks, m, n)
        masked_matmul.forward_launch(p.x, p.weight, p.words, p.bias, y, "relu", precision, tile).run()
        assert_exact(y, p.wanted())
    elif table == "DGRAD":
        dx = torch.empty_like(p.x)
        masked_matmul.dgrad_launch(p.dy, p.weight, p.words, dx, precision, tile).run()
        assert_exact(dx, p.wanted_dx())
    else:
        dw = torch.empty(3, *p.weight.shape, device=DEVICE)
        masked_matmul.wgrad_launch(p.dy, p.x, p.words, dw, precision, tile).run()
        assert_exact(dw.sum(0), p.wanted_dw())


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, "16") for case in ("one-task-short", "two-tasks-short", "two-apart-short", "three-tasks", "aligned")),
        *(("two-tasks-short", kind) for kind in ("tf32", "fp32")),
    ],
)
def test_each_task_may_have_a_bias_of_its_own(case, kind):
    dtype = HALF if kind == "16" else torch.float32
    p = problem(case, dtype)
    biases = torch.stack([p.bias + t for t in range(p.tasks)])
    wanted = p.each_x.double() @ p.masked.double().mT + biases.double()[:, None]
    # The largest tile takes the compiler longest: one case of each kind.
    tiles = masked_matmul.FORWARD[kind]
    for tile in {tiles[0 if case == "two-tasks-short" else -1], tiles[-1]}:
        y = p.x.new_empty(wanted.shape)
        precision = "tf32" if kind == "tf32" else "ieee"
        masked_matmul.forward_launch(p.x, p.weight, p.words, biases, y, "none", precision, tile).run()
        assert_exact(y, wanted.to(dtype))


@every_dtype
def test_sigmoid_is_within_the_bound_of_its_argument(dtype):
    p = problem("two-tasks-short", dtype)
    y = p.x.new_empty(p.dy.shape, dtype=torch.float32)
    masked_matmul.forward_launch(p.x, p.weight / 8, p.words, None, y, "sigmoid", "ieee").run()
    for of_task, x, w in zip(y, p.each_x, p.masked, strict=True):
        z = linear_reference(x, w / 8, None, torch.float32)
        # exp, sum and quotient round within an ulp each; a GPU's exp2 within two
        assert_rounding(of_task, z._replace(value=z.value.sigmoid(), bound=z.bound / 4 + 8 * 2.0**-24))


@pytest.mark.parametrize("path", PATHS)
def test_a_pruned_weight_contributes_nothing_even_if_it_is_nan(path):
    p = problem("two-tasks-short", HALF)
    poisoned = torch.where(p.masks.any(0), p.weight, torch.nan)
    only = p.masks[0] & ~p.masks[1]  # kept by the first task alone: NaN for neither
    with masked_linear.forced_path(path):
        y = masked_linear.masked_linear(p.x, poisoned, p.words, p.bias, "relu")
        dx = masked_linear.masked_linear_dgrad(p.dy, poisoned, p.words, p.is_shared)
    assert only.any()
    assert_exact(y, p.wanted())
    assert_exact(dx, p.wanted_dx())


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, of the interpreter
@pytest.mark.parametrize("path", PATHS)
def test_nan_and_infinity_spread_as_in_torch(path):
    p = problem("one-task-short", torch.float32, density=1.0)
    p.x[0, 3, 4], p.x[0, 5, 6] = torch.nan, torch.inf
    with masked_linear.forced_path(path):
        y = masked_linear.masked_linear(p.x, p.weight, p.words, p.bias, "relu")
    wanted = torch.relu(p.x @ p.weight.T + p.bias)
    assert torch.equal(y.isnan(), wanted.isnan()) and y.isnan().any()
    assert_exact(y.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("path", PATHS)
def test_operands_may_be_strided_and_masks_bool(path):
    p = problem("two-apart-short", HALF)
    wide = torch.nn.functional.pad(p.x, (3, 5))
    dy = p.dy.mT.contiguous().mT
    with masked_linear.forced_path(path):
        for x in (wide[:, :, 3:-5], p.x.mT.contiguous().mT, p.x.transpose(0, 1).contiguous().transpose(0, 1)):
            assert not x.is_contiguous()
            assert_exact(masked_linear.masked_linear(x, p.weight, p.masks, p.bias, "relu"), p.wanted())
            assert_exact(masked_linear.masked_linear_wgrad(dy, x, p.masks, torch.float32), p.wanted_dw())
        assert_exact(masked_linear.masked_linear_dgrad(dy, p.weight, p.masks, False), p.wanted_dx())


@settings(max_examples=2 * settings.default.max_examples // 5)  # 6, or 20 in the check
@given(
    # The widths are alike to the compiler: no multiples of 16.
    shape=st.tuples(st.integers(1, 4), st.integers(0, 40), st.sampled_from([21, 70]), st.sampled_from([9, 40])),
    is_shared=st.booleans(),
    density=st.sampled_from([0.1, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_gives_what_the_reference_gives(shape, is_shared, density, seed):
    p = Problem(*shape, is_shared, torch.float32, density, seed=seed)
    with masked_linear.forced_path("triton"):
        y, dx, dw = three_products(p)
    assert_exact(y, reference.masked_linear(p.x, p.weight, p.words, p.bias, "relu"))
    assert_exact(dx, reference.masked_linear_dgrad(p.dy, p.weight, p.words, is_shared))
    assert_exact(dw, reference.masked_linear_wgrad(p.dy, p.x, p.words, torch.float32))


@every_dtype
def test_the_same_input_gives_the_same_bits_twice(dtype):
    p = problem("two-tasks-short", dtype, integers=False)
    wgrad = (p.dy, p.x, p.words, torch.float32, "ieee")
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
    many = masked_linear.CUBLAS_ROWS
    for rows, k, n in ((1, 64, 16), (many - 1, 64, 16), (many, 64, 16), (1, 65, 16), (1, 64, 17)):
        masked_linear.masked_linear(torch.ones(1, 1, k).expand(1, rows, k), torch.ones(n, k), p.words, p.bias, "relu")
    assert taken == ["triton", "triton", "cublas", "cublas", "cublas"]
    with (
        pytest.raises(ValueError, match="path: got 'cuda', wanted one of triton, cublas"),
        masked_linear.forced_path("cuda"),
    ):
        pass


def test_the_tile_is_the_largest_that_fills_the_gpu_and_the_last_for_few_rows():
    largest, middle, small = masked_matmul.FORWARD["16"]

    def chosen(rows):
        return choose_tile(masked_matmul.FORWARD["16"], rows, lambda tile: -(-rows // tile.block_m) * 8)

    assert [chosen(rows) for rows in (1, 32, 33, 2048, 8192)] == [small, small, middle, largest, largest]
    assert choose_tile((largest, small), 100, lambda tile: 1) == largest  # the last is for few rows alone
    assert choose_tile((largest, middle, small), 100, lambda tile: 50, busy=0.3) == largest
