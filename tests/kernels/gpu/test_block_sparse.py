"""The block-sparse kernel against the oracle, interpreted or on a GPU, and its prepacked weight.

On a GPU bfloat16 stands for 16 bits, as whose code float16's is, and float16 elsewhere: the interpreter's product of
bfloat16 is wrong.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st
from lt4rec_sparse.kernels.gpu.tiles import Tile
from oracle import Layer, assert_exact, assert_rounding, mlp_reference, small_integers
from torch import Tensor

from lt4rec_sparse.kernels.gpu import block_sparse
from lt4rec_sparse.kernels.gpu.block_sparse import BlockWeight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16

# batch, in_features, out_features, starts, lengths of the tasks, tasks of one program
CASES = {
    "one task": (37, 80, 32, (0,), (37,), 1),
    "one row, one weight": (1, 1, 1, (0,), (1,), 1),
    "odd shapes": (19, 77, 45, (0,), (19,), 1),
    "two tasks share their rows": (20, 72, 20, (0, 0), (20, 20), 1),
    "two tasks together": (20, 72, 24, (0, 0), (20, 20), 2),
    "overlapping rows": (30, 56, 18, (0, 12), (20, 18), 1),
    "separate rows, one task without": (40, 50, 20, (0, 25, 25), (25, 0, 15), 1),
    "no row at all": (0, 33, 20, (0, 0), (0, 0), 1),
    "four tasks in two pairs": (24, 40, 20, (0, 0, 8, 8), (24, 24, 16, 16), 2),
}
# Shapes are the same code in every dtype: float32 goes through a few of them.
SINGLE = ("odd shapes", "two tasks together")
EXACT = [(case, HALF) for case in CASES] + [(case, torch.float32) for case in SINGLE]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, integers: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (small_integers if integers else torch.randn)(*shape, generator=generator).to(DEVICE, dtype)


def block_masks(tasks: int, n: int, k: int, block: int, density: float, seed: int) -> Tensor:
    rows, columns = -(-n // block), -(-k // block)
    kept = torch.rand(tasks, rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    return kept.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :n, :k].to(DEVICE)


def masks_of(tasks: int, n: int, k: int, density: float, seed: int) -> Tensor:
    return (torch.rand(tasks, n, k, generator=torch.Generator().manual_seed(seed)) < density).to(DEVICE)


def forward(
    x: Tensor,
    packed: BlockWeight,
    bias: Tensor | None,
    starts: tuple[int, ...],
    lengths: tuple[int, ...],
    activation: str = "none",
) -> Tensor:
    y = torch.empty(sum(lengths), packed.shape[0], dtype=x.dtype, device=x.device)
    block_sparse.forward_into(x, packed, bias, y, starts, lengths, activation, "ieee")
    return y


def exact(
    x: Tensor, weight: Tensor, masks: Tensor, bias: Tensor, starts: tuple[int, ...], lengths: tuple[int, ...]
) -> Tensor:
    """What integers must yield, with a ReLU."""
    parts = []
    for t, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        rows = x[start : start + length].double()
        y = rows @ torch.where(masks[t], weight.double(), 0).T
        parts.append((y + (bias[t] if bias.dim() == 2 else bias).double()).relu())
    return torch.cat(parts).to(x.dtype)


@pytest.mark.parametrize("block", block_sparse.BLOCKS)
@pytest.mark.parametrize(("case", "dtype"), EXACT, ids=lambda value: str(value).removeprefix("torch."))
def test_integers_are_exact(case: str, block: int, dtype: torch.dtype) -> None:
    batch, k, n, starts, lengths, together = CASES[case]
    x, weight = draw(batch, k, seed=0, dtype=dtype), draw(n, k, seed=1)
    bias = draw(len(starts), n, seed=2, dtype=dtype)
    masks = block_masks(len(starts), n, k, block, 0.5, seed=3)
    packed = BlockWeight.from_dense(weight, masks, block, dtype, together)
    assert_exact(forward(x, packed, bias, starts, lengths, "relu"), exact(x, weight, masks, bias, starts, lengths))


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("block", "activation"), [(16, "sigmoid"), (32, "none")])
def test_rounding_stays_in_its_bound(block: int, activation: str, dtype: torch.dtype) -> None:
    x, weight = draw(21, 90, seed=0, dtype=dtype, integers=False), draw(50, 90, seed=1, dtype=dtype, integers=False)
    bias, mask = draw(50, seed=2, dtype=dtype, integers=False), block_masks(1, 50, 90, block, 0.6, seed=3)
    packed = BlockWeight.from_dense(weight, mask, block, dtype)
    y = forward(x, packed, bias, (0,), (21,), activation)
    layer = Layer((weight * mask[0]).cpu(), bias.cpu(), activation)
    assert_rounding(y.cpu(), mlp_reference(x.cpu(), [layer]))


@pytest.mark.parametrize("block", block_sparse.BLOCKS)
@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("together", [1, 2])
def test_every_tile_of_the_table_is_exact(together: int, tile: int, block: int) -> None:
    x, weight, bias = draw(66, 75, seed=0, dtype=HALF), draw(20, 75, seed=1), draw(2, 20, seed=2)
    masks = block_masks(2, 20, 75, block, 0.6, seed=3)
    packed = BlockWeight.from_dense(weight, masks, block, HALF, together)
    y = torch.empty(132, 20, dtype=HALF, device=DEVICE)
    chosen = block_sparse.TILES["16", block * together][tile]
    ranges = ([0, 0], [0, 66], [66, 66])
    block_sparse.block_sparse_launch(x, packed, bias, y, *ranges, "relu", "ieee", chosen).run()
    assert_exact(y, exact(x, weight, masks, bias, (0, 0), (66, 66)))


@settings(max_examples=10)
@given(
    # Two of each of what a kernel is compiled for.
    st.integers(1, 40),
    st.sampled_from([33, 69]),
    st.sampled_from([18, 49]),
    st.sampled_from([1, 4]),
    st.sampled_from([16, 32]),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_masks_of_any_kind_are_exact(
    batch: int, k: int, n: int, tasks: int, block: int, density: float, is_together: bool, seed: int
) -> None:
    together = tasks if is_together and tasks in (2, 4) and tasks * block <= block_sparse.MAX_COLUMNS else 1
    x, weight, bias = draw(batch, k, seed=seed), draw(n, k, seed=seed + 1), draw(n, seed=seed + 2)
    masks = masks_of(tasks, n, k, density, seed=seed + 3)
    packed = BlockWeight.from_dense(weight, masks, block, torch.float32, together)
    ranges = ((0,) * tasks, (batch,) * tasks)
    assert_exact(forward(x, packed, bias, *ranges, "relu"), exact(x, weight, masks, bias, *ranges))


@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid"])
def test_a_row_of_blocks_with_none_kept_is_the_activation_of_the_bias(activation: str) -> None:
    mask = torch.zeros(1, 40, 50, dtype=torch.bool, device=DEVICE)
    packed = BlockWeight.from_dense(draw(40, 50, seed=1), mask, 32, torch.float32)
    assert (len(packed.values), packed.density) == (0, 0.0)
    bias = draw(40, seed=2)
    y = forward(draw(3, 50, seed=0), packed, bias, (0,), (3,), activation)
    layer = Layer(torch.zeros(40, 50), bias.cpu(), activation)
    assert_rounding(y.cpu(), mlp_reference(torch.zeros(3, 50), [layer]))


def test_no_bias_adds_nothing() -> None:
    x, weight, masks = draw(5, 40, seed=0), draw(20, 40, seed=1), block_masks(1, 20, 40, 16, 0.5, seed=2)
    packed = BlockWeight.from_dense(weight, masks, 16, torch.float32)
    wanted = exact(x, weight, masks, torch.zeros(20, device=DEVICE), (0,), (5,))
    assert_exact(forward(x, packed, None, (0,), (5,), "relu"), wanted)


@pytest.mark.parametrize("masks", [block_masks(2, 40, 70, 16, 0.5, 3), masks_of(2, 40, 70, 0.3, 3)], ids=["b", "w"])
def test_a_pruned_nan_contributes_nothing(masks: Tensor) -> None:
    x, weight, bias = draw(9, 70, seed=0), draw(40, 70, seed=1), draw(40, seed=2)
    poisoned = torch.where(masks.any(0), weight, torch.nan)
    packed = BlockWeight.from_dense(poisoned, masks, 16, torch.float32)
    y = forward(x, packed, bias, (0, 0), (9, 9), "relu")
    assert_exact(y, exact(x, weight, masks, bias, (0, 0), (9, 9)))


def test_an_x_that_only_pruned_blocks_see_may_be_nan() -> None:
    """Entries beyond the end of a row of blocks read no column in their place."""
    x, weight, bias = draw(9, 96, seed=0), draw(20, 96, seed=1), draw(20, seed=2)
    mask = torch.zeros(1, 20, 96, dtype=torch.bool, device=DEVICE)
    mask[:, :, 32:48] = True
    wanted = exact(x, weight, mask, bias, (0,), (9,))
    x[:, :32] = x[:, 48:] = torch.nan
    assert_exact(forward(x, BlockWeight.from_dense(weight, mask, 16, torch.float32), bias, (0,), (9,), "relu"), wanted)


def test_nan_in_a_kept_block_reaches_the_result() -> None:
    x, weight = draw(3, 32, seed=0), draw(16, 32, seed=1)
    x[1, 20] = torch.nan
    packed = BlockWeight.from_dense(weight, torch.ones(1, 16, 32, dtype=torch.bool, device=DEVICE), 16, torch.float32)
    y = forward(x, packed, None, (0,), (3,), "relu")
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("layout", ["wide rows", "transposed", "every other column", "wide y"])
def test_strides_do_not_matter(layout: str) -> None:
    x, weight, bias = draw(12, 48, seed=0), draw(20, 48, seed=1), draw(20, seed=2)
    masks = block_masks(1, 20, 48, 16, 0.5, seed=3)
    y = torch.empty(12, 20, device=DEVICE)
    if layout == "wide rows":
        x = torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, :48]
    elif layout == "transposed":
        x = x.T.contiguous().T
    elif layout == "every other column":
        x = x.repeat_interleave(2, dim=1)[:, ::2]
    else:
        y = torch.empty(12, 31, device=DEVICE)[:, 3:23]
    packed = BlockWeight.from_dense(weight, masks, 16, torch.float32)
    block_sparse.forward_into(x, packed, bias, y, (0,), (12,), "relu", "ieee")
    assert_exact(y, exact(x, weight, masks, bias, (0,), (12,)))


@pytest.mark.parametrize("together", [1, 2])
def test_more_tasks_than_a_launch_takes(together: int) -> None:
    tasks = 10
    x, weight, bias = draw(30, 20, seed=0), draw(18, 20, seed=1), draw(tasks, 18, seed=2)
    masks = block_masks(tasks, 18, 20, 16, 0.5, seed=3)
    starts = tuple(t // together * 2 for t in range(tasks))
    lengths = tuple(t // together % 3 * 5 for t in range(tasks))
    packed = BlockWeight.from_dense(weight, masks, 16, torch.float32, together)
    assert_exact(forward(x, packed, bias, starts, lengths, "relu"), exact(x, weight, masks, bias, starts, lengths))


def test_equal_calls_give_equal_bits_and_rows_do_not_see_each_other() -> None:
    x, weight = draw(20, 64, seed=0, integers=False), draw(32, 64, seed=1, integers=False)
    packed = BlockWeight.from_dense(weight, block_masks(1, 32, 64, 16, 0.5, seed=2), 16, torch.float32)
    y = forward(x, packed, None, (0,), (20,))
    assert_exact(forward(x, packed, None, (0,), (20,)), y)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    assert_exact(forward(x[order], packed, None, (0,), (20,)), y[order])


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("block", block_sparse.BLOCKS)
def test_a_weight_comes_back(block: int, together: int) -> None:
    weight, masks = draw(70, 90, seed=1, integers=False), masks_of(4, 70, 90, 0.01, seed=2)
    packed = BlockWeight.from_dense(weight, masks, block, torch.float32, together)
    for t, mask in enumerate(masks):
        assert_exact(packed.to_dense(t), weight * mask)


def test_equal_blocks_of_several_tasks_stand_once() -> None:
    weight = draw(32, 64, seed=1, integers=False)
    masks = torch.ones(3, 32, 64, dtype=torch.bool, device=DEVICE)
    masks[1, :16, :16] = False  # a whole block
    masks[2, 20, 40] = False  # one weight
    packed = BlockWeight.from_dense(weight, masks, 16, torch.float16)
    assert packed.values.shape == (8 + 1, 16, 16)
    assert packed.crow.tolist() == [[0, 4, 8], [8, 11, 15], [15, 19, 23]]
    assert packed.col.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]
    assert packed.place.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 1, 2, 3, 4, 5, 6, 8, 0, 1, 2, 3, 4, 5, 7, 8]
    assert packed.density == 23 / 24
    assert packed.nbytes == 9 * 16 * 16 * 2 + 4 * (9 + 23 + 23)


def test_tasks_together_list_a_block_once() -> None:
    weight, masks = draw(16, 48, seed=1), torch.zeros(2, 16, 48, dtype=torch.bool, device=DEVICE)
    masks[0, :, :32] = masks[1, :, 16:] = True
    packed = BlockWeight.from_dense(weight, masks, 16, torch.float32, together=2)
    assert packed.crow.tolist() == [[0, 3]]
    assert packed.col.tolist() == [0, 1, 2]
    assert packed.place.tolist() == [[0, -1], [1, 1], [-1, 2]]


def test_kept_nan_and_zeros_of_both_signs_stand_as_they_are() -> None:
    weight = torch.zeros(16, 16, device=DEVICE)
    weight[0, :3] = torch.tensor([torch.nan, -0.0, 0.0])
    packed = BlockWeight.from_dense(weight, torch.ones(2, 16, 16, dtype=torch.bool, device=DEVICE), 16, torch.float32)
    assert len(packed.values) == 1
    assert torch.equal(packed.to_dense(1).view(torch.int32), weight.view(torch.int32))


def test_every_tile_takes_whole_blocks() -> None:
    for (_, columns), tiles in block_sparse.TILES.items():
        for tile in tiles:
            assert tile.block_n == columns
            for block in block_sparse.BLOCKS:
                if columns // block in (1, 2, 4):
                    assert tile.block_k % block == 0


def test_a_batch_gets_the_tallest_tile_that_fills_the_gpu() -> None:
    def tile(rows: int) -> Tile:
        return block_sparse.block_sparse_tile(rows, 64, 32, torch.bfloat16, "ieee")

    assert [tile(rows).block_m for rows in (1, 32, 256, 512, 8192)] == [16, 16, 64, 256, 256]
    assert block_sparse.block_sparse_tile(8192, 64, 32, torch.bfloat16, "ieee", is_aligned=False).block_m == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(20)}, r"weight: got torch.float32 \(20,\), wanted .* \[out_features, in_features\]"),
        ({"weight": torch.ones(0, 30)}, r"weight: got torch.float32 \(0, 30\)"),
        ({"weight": torch.ones(20, 30).double()}, "weight: got torch.float64"),
        (
            {"masks": torch.ones(20, 30, dtype=torch.bool)},
            r"masks: got torch.bool \(20, 30\), wanted .*\[tasks, 20, 30",
        ),
        ({"masks": torch.ones(2, 30, 20, dtype=torch.bool)}, r"masks: got torch.bool \(2, 30, 20\)"),
        ({"masks": torch.ones(0, 20, 30, dtype=torch.bool)}, "wanted .* of at least one task"),
        ({"masks": torch.ones(2, 20, 30)}, "masks: got torch.float32"),
        ({"masks": torch.ones(2, 20, 30, dtype=torch.bool, device="meta")}, "masks: got device meta"),
        ({"block": 8}, "block: got 8, wanted one of 16, 32, 64"),
        ({"dtype": torch.int8}, "dtype: got torch.int8"),
        ({"together": 4}, "together: got 4, wanted 1, 2 or 4, a divisor of the 2 tasks, at most 8"),
        ({"together": 0}, "together: got 0"),
        (
            {"masks": torch.ones(4, 20, 30, dtype=torch.bool), "block": 64, "together": 4},
            "together: got 4, .* at most 2",
        ),
    ],
)
def test_a_wrong_argument_of_from_dense_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    arguments = {
        "weight": torch.ones(20, 30),
        "masks": torch.ones(2, 20, 30, dtype=torch.bool),
        "block": 16,
        "dtype": torch.float16,
    }
    with pytest.raises(ValueError, match=message):
        BlockWeight.from_dense(**{**arguments, **change})


def test_what_the_weight_does_not_fit_is_refused() -> None:
    masks = torch.ones(2, 20, 30, dtype=torch.bool, device=DEVICE)
    packed = BlockWeight.from_dense(draw(20, 30, seed=1), masks, 16, torch.float16, together=2)
    with pytest.raises(ValueError, match=r"x: got torch\.float32, wanted torch\.float16"):
        forward(draw(8, 30, seed=0), packed, None, (0, 0), (8, 8))
    with pytest.raises(ValueError, match=r"starts and lengths: got .* wanted the same rows"):
        forward(draw(8, 30, seed=0, dtype=torch.float16), packed, None, (0, 4), (4, 4))
