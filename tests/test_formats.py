from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.formats import BlockWeight, SharedWeight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {4: torch.int32, 2: torch.int16}


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(BITS[t.element_size()])


def any_weight(rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern may occur: -0.0, infinities, denormals, NaN with any payload."""
    generator = torch.Generator().manual_seed(seed)
    kind = BITS[torch.empty(0, dtype=dtype).element_size()]
    info = torch.iinfo(kind)
    weight = torch.randint(info.min, info.max + 1, (rows, columns), generator=generator, dtype=torch.int64).to(kind)
    weight.view(-1)[::3] = 0  # kept zeros
    weight.view(-1)[1::5] = info.min  # -0.0
    return weight.view(dtype)


def any_mask(rows: int, columns: int, seed: int, density: float) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) < density


def block_mask(rows: int, columns: int, seed: int, density: float) -> torch.Tensor:
    """Whole blocks of 16 x 4, cut off at the edges."""
    grid = any_mask(-(-rows // 16), -(-columns // 4), seed, density)
    return grid.repeat_interleave(16, 0).repeat_interleave(4, 1)[:rows, :columns]


@pytest.mark.parametrize(("kind", "draw"), [(SharedWeight, any_mask), (BlockWeight, block_mask)])
@given(
    rows=st.integers(0, 50),
    columns=st.integers(0, 50),
    seed=st.integers(0, 2**31),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_a_round_trip_is_exact_to_the_bit_for_every_task(kind, draw, rows, columns, seed, density, dtype):
    weight = any_weight(rows, columns, seed, dtype)
    masks = {f"task{i}": draw(rows, columns, seed + i, density) for i in range(3)}
    compressed = kind.from_dense(weight, masks)
    compressed.validate()
    union = masks["task0"] | masks["task1"] | masks["task2"]
    assert compressed.nnz == int(union.sum())
    assert torch.equal(compressed.union(), union)
    assert torch.equal(bits(compressed.to_dense())[union], bits(weight)[union])
    some = compressed.select(("task2", "task0"))
    some.validate()
    assert some.tasks == ("task2", "task0") and some.nnz == int((masks["task0"] | masks["task2"]).sum())
    for task, mask in masks.items():
        assert torch.equal(compressed.mask(task), mask)
        for weights in (compressed, some) if task in some.tasks else (compressed,):
            dense = weights.to_dense(task)
            assert dense.dtype == dtype
            assert torch.equal(bits(dense)[mask], bits(weight)[mask])
            assert not bits(dense)[~mask].any()


def test_bytes_are_as_documented():
    rows, columns = 7, 19
    weight, mask = torch.randn(rows, columns), any_mask(rows, columns, 0, 0.4)
    nnz = int(mask.sum())
    assert SharedWeight.from_dense(weight, {"a": mask}).nbytes == rows * (3 + 4) + 4 * nnz
    two = SharedWeight.from_dense(weight, {"a": mask, "b": mask})
    assert two.nbytes == rows * (2 * 3 + 4) + 4 * nnz


def test_parts_that_do_not_agree_are_refused():
    good = SharedWeight.from_dense(torch.ones(2, 9), {"a": any_mask(2, 9, 0, 0.5)})
    with pytest.raises(ValueError, match="values: got"):
        replace(good, values=good.values[:-1]).validate()
    with pytest.raises(ValueError, match="row_offsets: wanted the running count"):
        replace(good, row_offsets=good.row_offsets + 1).validate()
    with pytest.raises(ValueError, match="bitmask: got"):
        replace(good, bitmask=good.bitmask[..., :1]).validate()


def test_from_dense_refuses_disagreeing_shapes():
    with pytest.raises(ValueError, match=r"mask: got shape \(2, 3\), wanted that of the weight, \(3, 2\)"):
        SharedWeight.from_dense(torch.ones(3, 2), {"a": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="masks: got no task"):
        SharedWeight.from_dense(torch.ones(3, 2), {})


def test_unknown_task_is_named():
    shared = SharedWeight.from_dense(torch.ones(2, 2), {"ctr": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="task: got 'cvr', wanted one of ctr"):
        shared.to_dense("cvr")


@pytest.mark.filterwarnings(
    "ignore:Sparse BSR tensor support is in beta", "ignore:Sparse invariant checks are implicitly"
)
@given(rows=st.integers(1, 4), columns=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_blocks_lead_to_torchs_bsr_and_back(rows, columns, seed):
    weight = torch.randn(16 * rows, 4 * columns, generator=torch.Generator().manual_seed(seed))
    masks = {f"task{i}": block_mask(16 * rows, 4 * columns, seed + i, 0.4) for i in range(2)}
    blocks = BlockWeight.from_dense(weight, masks)
    for task, mask in masks.items():
        bsr = blocks.to_bsr(task)
        assert torch.equal(bsr.to_dense(), weight * mask)
        back = BlockWeight.from_bsr(bsr, task)
        back.validate()
        assert torch.equal(back.mask(task), mask)
        assert torch.equal(back.to_dense(task), blocks.to_dense(task))
    assert torch.equal(blocks.to_bsr().to_dense(), blocks.to_dense())


def test_bytes_of_blocks_are_as_documented():
    masks = {"a": block_mask(40, 70, 0, 0.3), "b": block_mask(40, 70, 1, 0.3)}
    blocks = BlockWeight.from_dense(torch.randn(40, 70), masks)
    assert blocks.nbytes == 3 * (2 * 3 + 4) + 4 * blocks.values.numel()
    assert blocks.values.shape[1:] == (16, 4)


@pytest.mark.filterwarnings(
    "ignore:Sparse BSR tensor support is in beta", "ignore:Sparse invariant checks are implicitly"
)
def test_what_is_no_block_is_refused():
    mask = torch.ones(32, 8, dtype=torch.bool)
    mask[3, 5] = False
    with pytest.raises(
        ValueError, match="mask of b: got one that keeps a part of a block, wanted whole blocks of 16 x 4"
    ):
        BlockWeight.from_dense(torch.ones(32, 8), {"a": torch.ones_like(mask), "b": mask})
    ragged = BlockWeight.from_dense(torch.ones(17, 6), {"a": torch.ones(17, 6, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"values: got some beyond the edge of \(17, 6\), wanted zeros there"):
        replace(ragged, values=torch.ones_like(ragged.values)).validate()
    with pytest.raises(ValueError, match=r"weight: got shape \(17, 6\), wanted multiples of \(16, 4\)"):
        ragged.to_bsr()
    dense = torch.ones(32, 8)
    with pytest.raises(
        ValueError, match=r"weight: got torch\.strided, wanted a torch\.sparse_bsr of whole blocks of 16 x 4"
    ):
        BlockWeight.from_bsr(dense)
    with pytest.raises(ValueError, match=r"weight: got torch\.sparse_bsr of whole blocks of 4 x 4, wanted"):
        BlockWeight.from_bsr(dense.to_sparse_bsr((4, 4)))
