"""The block-sparse kernel against the oracle, interpreted or on a GPU, and its prepacked weight.

16 bits are bfloat16 on a GPU, since float16 runs the same code, and float16 elsewhere: the interpreter's product of
bfloat16 is wrong.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Layer, assert_exact, assert_rounding, mlp_reference, small_integers
from torch import Tensor

from lt4rec_sparse.kernels.gpu import block_sparse
from lt4rec_sparse.kernels.gpu.block_sparse import BlockWeight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16

# tasks, rows of each, in_features, out_features, whether all tasks read the same x, tasks of one program
CASES = {
    "one task": (1, 37, 80, 32, True, 1),
    "one row, one weight": (1, 1, 1, 1, True, 1),
    "odd shapes": (1, 19, 77, 45, True, 1),
    "two tasks share their rows": (2, 20, 72, 20, True, 1),
    "two tasks together": (2, 20, 72, 24, True, 2),
    "two tasks apart": (2, 30, 56, 18, False, 1),
    "no row at all": (2, 0, 33, 20, True, 1),
    "four tasks in two pairs": (4, 24, 40, 20, True, 2),
    "ten tasks apart": (10, 5, 20, 18, False, 1),
    # Rows that start at 16 bytes are loaded by other code, and several steps of a loop overlap: what real widths run.
    "aligned": (2, 64, 256, 64, True, 2),
    "aligned apart": (2, 64, 128, 128, False, 1),
}


def draw(*shape: int, seed: int, integers: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (small_integers if integers else torch.randn)(*shape, generator=generator).to(DEVICE, HALF)


def block_masks(tasks: int, n: int, k: int, block: int, density: float, seed: int) -> Tensor:
    rows, columns = -(-n // block), -(-k // block)
    kept = torch.rand(tasks, rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    return kept.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :n, :k].to(DEVICE)


def masks_of(tasks: int, n: int, k: int, density: float, seed: int) -> Tensor:
    return (torch.rand(tasks, n, k, generator=torch.Generator().manual_seed(seed)) < density).to(DEVICE)


def forward(x: Tensor, packed: BlockWeight, bias: Tensor | None, activation: str = "none") -> Tensor:
    y = torch.empty(packed.tasks, x.shape[1], packed.shape[0], dtype=x.dtype, device=x.device)
    block_sparse.block_sparse_launch(x, packed, bias, y, activation).run()
    return y


def exact(x: Tensor, weight: Tensor, masks: Tensor, bias: Tensor) -> Tensor:
    """The result that integers must give, with a ReLU."""
    masked = torch.where(masks, weight.double(), 0)
    bias = bias.double()[:, None] if bias.dim() == 2 else bias.double()
    return (x.double() @ masked.mT + bias).relu().to(x.dtype)


def to_dense(packed: BlockWeight, task: int) -> Tensor:
    """A task's weight by the definition of the layout."""
    n, k = packed.shape
    dense = torch.zeros(-(-n // packed.block) * packed.block, -(-k // packed.block) * packed.block)
    group, member = divmod(task, packed.together)
    for row in range(-(-n // packed.block)):
        for entry in range(int(packed.crow[group, row]), int(packed.crow[group, row + 1])):
            place, column = int(packed.place[entry, member]), int(packed.col[entry])
            if place >= 0:
                rows, columns = (slice(i * packed.block, (i + 1) * packed.block) for i in (row, column))
                dense[rows, columns] = packed.values[place].cpu().float()
    return dense[:n, :k].to(packed.values)


@pytest.mark.parametrize("block", block_sparse.BLOCKS)
@pytest.mark.parametrize("case", CASES)
def test_integers_are_exact(case: str, block: int) -> None:
    tasks, rows, k, n, is_shared, together = CASES[case]
    x, weight, bias = draw(1 if is_shared else tasks, rows, k, seed=0), draw(n, k, seed=1), draw(tasks, n, seed=2)
    masks = block_masks(tasks, n, k, block, 0.5, seed=3)
    packed = BlockWeight.from_dense(weight, masks, block, HALF, together)
    assert_exact(forward(x, packed, bias, "relu"), exact(x, weight, masks, bias))


@pytest.mark.parametrize(("block", "activation"), [(16, "sigmoid"), (32, "none")])
def test_rounding_stays_in_its_bound(block: int, activation: str) -> None:
    x, weight, bias = (draw(*shape, seed=i, integers=False) for i, shape in enumerate(((1, 21, 90), (50, 90), (50,))))
    mask = block_masks(1, 50, 90, block, 0.6, seed=3)
    y = forward(x, BlockWeight.from_dense(weight, mask, block, HALF), bias, activation)
    layer = Layer((weight * mask[0]).cpu(), bias.cpu(), activation)
    assert_rounding(y[0].cpu(), mlp_reference(x[0].cpu(), [layer]))


@pytest.mark.parametrize("block", block_sparse.BLOCKS)
@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("together", [1, 2])
def test_every_tile_of_the_table_is_exact(together: int, tile: int, block: int) -> None:
    x, weight, bias = draw(1, 66, 75, seed=0), draw(20, 75, seed=1), draw(2, 20, seed=2)
    masks = block_masks(2, 20, 75, block, 0.6, seed=3)
    packed = BlockWeight.from_dense(weight, masks, block, HALF, together)
    y = torch.empty(2, 66, 20, dtype=HALF, device=DEVICE)
    chosen = block_sparse.TILES[block * together][tile]
    block_sparse.block_sparse_launch(x, packed, bias, y, "relu", chosen).run()
    assert_exact(y, exact(x, weight, masks, bias))


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
    rows: int, k: int, n: int, tasks: int, block: int, density: float, is_together: bool, seed: int
) -> None:
    together = tasks if is_together and tasks * block <= block_sparse.MAX_COLUMNS else 1
    x, weight, bias = draw(1, rows, k, seed=seed), draw(n, k, seed=seed + 1), draw(n, seed=seed + 2)
    masks = masks_of(tasks, n, k, density, seed=seed + 3)
    packed = BlockWeight.from_dense(weight, masks, block, HALF, together)
    assert_exact(forward(x, packed, bias, "relu"), exact(x, weight, masks, bias))


@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid"])
def test_a_row_of_blocks_with_none_kept_is_the_activation_of_the_bias(activation: str) -> None:
    mask = torch.zeros(1, 40, 50, dtype=torch.bool, device=DEVICE)
    packed = BlockWeight.from_dense(draw(40, 50, seed=1), mask, 32, HALF)
    assert len(packed.values) == len(packed.col) == 0
    bias = draw(40, seed=2)
    y = forward(draw(1, 3, 50, seed=0), packed, bias, activation)
    layer = Layer(torch.zeros(40, 50, dtype=HALF), bias.cpu(), activation)
    assert_rounding(y[0].cpu(), mlp_reference(torch.zeros(3, 50, dtype=HALF), [layer]))


def test_no_bias_adds_nothing() -> None:
    x, weight, masks = draw(1, 5, 40, seed=0), draw(20, 40, seed=1), block_masks(1, 20, 40, 16, 0.5, seed=2)
    packed = BlockWeight.from_dense(weight, masks, 16, HALF)
    assert_exact(forward(x, packed, None, "relu"), exact(x, weight, masks, torch.zeros(20, device=DEVICE)))


@pytest.mark.parametrize("masks", [block_masks(2, 40, 70, 16, 0.5, 3), masks_of(2, 40, 70, 0.3, 3)], ids=["b", "w"])
def test_a_pruned_nan_contributes_nothing(masks: Tensor) -> None:
    x, weight, bias = draw(1, 9, 70, seed=0), draw(40, 70, seed=1), draw(40, seed=2)
    packed = BlockWeight.from_dense(torch.where(masks.any(0), weight, torch.nan), masks, 16, HALF)
    assert_exact(forward(x, packed, bias, "relu"), exact(x, weight, masks, bias))


def test_an_x_that_only_pruned_blocks_see_may_be_nan() -> None:
    """Entries beyond the end of a row of blocks read no column in their place."""
    x, weight, bias = draw(1, 9, 96, seed=0), draw(20, 96, seed=1), draw(20, seed=2)
    mask = torch.zeros(1, 20, 96, dtype=torch.bool, device=DEVICE)
    mask[:, :, 32:48] = True
    wanted = exact(x, weight, mask, bias)
    x[:, :, :32] = x[:, :, 48:] = torch.nan
    assert_exact(forward(x, BlockWeight.from_dense(weight, mask, 16, HALF), bias, "relu"), wanted)


def test_nan_in_a_kept_block_reaches_the_result() -> None:
    x, weight = draw(1, 3, 32, seed=0), draw(16, 32, seed=1)
    x[0, 1, 20] = torch.nan
    packed = BlockWeight.from_dense(weight, torch.ones(1, 16, 32, dtype=torch.bool, device=DEVICE), 16, HALF)
    (y,) = forward(x, packed, None, "relu")
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("layout", ["wide rows", "wide y"])
def test_strides_do_not_matter(layout: str) -> None:
    x, weight, bias = draw(1, 12, 48, seed=0), draw(20, 48, seed=1), draw(20, seed=2)
    masks = block_masks(1, 20, 48, 16, 0.5, seed=3)
    y = torch.empty(1, 12, 20, dtype=HALF, device=DEVICE)
    if layout == "wide rows":
        x = torch.cat([x, torch.full_like(x, torch.nan)], dim=2)[:, :, :48]
    else:
        y = torch.empty(1, 12, 31, dtype=HALF, device=DEVICE)[:, :, 3:23]
    packed = BlockWeight.from_dense(weight, masks, 16, HALF)
    block_sparse.block_sparse_launch(x, packed, bias, y, "relu").run()
    assert_exact(y, exact(x, weight, masks, bias))


def test_equal_calls_give_equal_bits_and_rows_do_not_see_each_other() -> None:
    # The interpreter's products are NumPy's, whose order of summation depends on where a row stands: integers there.
    integers = DEVICE.type == "cpu"
    x, weight = draw(1, 20, 64, seed=0, integers=integers), draw(32, 64, seed=1, integers=integers)
    packed = BlockWeight.from_dense(weight, block_masks(1, 32, 64, 16, 0.5, seed=2), 16, HALF)
    y = forward(x, packed, None)
    assert_exact(forward(x, packed, None), y)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    assert_exact(forward(x[:, order], packed, None), y[:, order])


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("block", block_sparse.BLOCKS)
def test_a_weight_comes_back(block: int, together: int) -> None:
    weight, masks = draw(70, 90, seed=1, integers=False), masks_of(4, 70, 90, 0.01, seed=2)
    packed = BlockWeight.from_dense(weight, masks, block, HALF, together)
    for t, mask in enumerate(masks):
        assert_exact(to_dense(packed, t), weight * mask)


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
    assert sum(part.nbytes for part in packed[4:]) == 9 * 16 * 16 * 2 + 4 * (9 + 23 + 23)


def test_tasks_together_list_a_block_once() -> None:
    weight, masks = draw(16, 48, seed=1), torch.zeros(2, 16, 48, dtype=torch.bool, device=DEVICE)
    masks[0, :, :32] = masks[1, :, 16:] = True
    packed = BlockWeight.from_dense(weight, masks, 16, HALF, together=2)
    assert packed.crow.tolist() == [[0, 3]]
    assert packed.col.tolist() == [0, 1, 2]
    assert packed.place.tolist() == [[0, -1], [1, 1], [-1, 2]]


def test_kept_nan_and_zeros_of_both_signs_stand_as_they_are() -> None:
    weight = torch.zeros(16, 16, device=DEVICE, dtype=HALF)
    weight[0, :3] = torch.tensor([torch.nan, -0.0, 0.0])
    packed = BlockWeight.from_dense(weight, torch.ones(2, 16, 16, dtype=torch.bool, device=DEVICE), 16, HALF)
    assert packed.place.tolist() == [[0], [0]]
    assert torch.equal(packed.values.view(torch.int16), weight.view(torch.int16)[None])


def test_every_tile_takes_whole_blocks() -> None:
    for columns, tiles in block_sparse.TILES.items():
        for tile in tiles:
            assert tile.block_n == columns
            for block in block_sparse.BLOCKS:
                if columns // block in (1, 2, 4):
                    assert tile.block_k % block == 0


def test_a_batch_gets_the_tallest_tile_that_fills_the_gpu_and_no_tall_one_without_alignment() -> None:
    masks = torch.ones(1, 2048, 64, dtype=torch.bool)
    packed = BlockWeight.from_dense(torch.ones(2048, 64), masks, 32, HALF)

    def tile(rows: int, stride: int = 64) -> int:
        x = torch.empty(1, rows, stride, dtype=HALF, device="meta")[:, :, :64]
        y = torch.empty(1, rows, 2048, dtype=HALF, device="meta")
        return int(block_sparse.block_sparse_launch(x, packed, None, y, "none").constants["BLOCK_M"])

    assert [tile(rows) for rows in (1, 32, 256, 512, 8192)] == [16, 16, 64, 256, 256]
    assert tile(8192, stride=65) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 8}, "block: got 8, wanted one of 16, 32, 64"),
        ({"dtype": torch.float32}, "dtype: got torch.float32, wanted float16 or bfloat16"),
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
