from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.formats import BitmapWeight, CSRWeight, SharedWeight

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


cases = given(
    rows=st.integers(0, 12),
    columns=st.integers(0, 40),
    seed=st.integers(0, 2**31),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
)


def any_mask(rows: int, columns: int, seed: int, density: float) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) < density


@pytest.mark.parametrize("form", [CSRWeight, BitmapWeight])
@cases
def test_round_trip_is_exact_to_the_bit(form, rows, columns, seed, density, dtype):
    weight, mask = any_weight(rows, columns, seed, dtype), any_mask(rows, columns, seed, density)
    compressed = form.from_dense(weight, mask)
    compressed.validate()
    dense = compressed.to_dense()
    assert dense.dtype == dtype
    assert torch.equal(bits(dense)[mask], bits(weight)[mask])
    assert not bits(dense)[~mask].any()
    assert compressed.nnz == int(mask.sum())


@cases
def test_shared_round_trip_for_every_task(rows, columns, seed, density, dtype):
    weight = any_weight(rows, columns, seed, dtype)
    masks = {f"task{i}": any_mask(rows, columns, seed + i, density) for i in range(3)}
    shared = SharedWeight.from_dense(weight, masks)
    shared.validate()
    union = masks["task0"] | masks["task1"] | masks["task2"]
    assert shared.nnz == int(union.sum())
    assert torch.equal(bits(shared.to_dense())[union], bits(weight)[union])
    for task, mask in masks.items():
        assert torch.equal(shared.mask(task), mask)
        for dense in (shared.to_dense(task), shared.csr(task).to_dense()):
            assert torch.equal(bits(dense)[mask], bits(weight)[mask])
            assert not bits(dense)[~mask].any()


def test_bytes_are_as_documented():
    rows, columns = 7, 19
    weight, mask = torch.randn(rows, columns), any_mask(rows, columns, 0, 0.4)
    nnz = int(mask.sum())
    assert CSRWeight.from_dense(weight, mask).nbytes == 4 * (rows + 1) + 8 * nnz
    assert BitmapWeight.from_dense(weight, mask).nbytes == rows * (3 + 4) + 4 * nnz
    two = SharedWeight.from_dense(weight, {"a": mask, "b": mask})
    assert two.nbytes == rows * (2 * 3 + 4) + 4 * nnz


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")  # torch says so once a process
def test_csr_parts_are_torchs():
    weight, mask = torch.randn(6, 11), any_mask(6, 11, 3, 0.5)
    theirs = weight.masked_fill(~mask, 0).to_sparse_csr()
    ours = CSRWeight.from_dense(weight, mask)
    assert torch.equal(ours.crow_indices.long(), theirs.crow_indices())
    assert torch.equal(ours.col_indices.long(), theirs.col_indices())
    assert torch.equal(ours.values, theirs.values())


@pytest.fixture
def csr() -> CSRWeight:
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])
    return CSRWeight.from_dense(torch.arange(9.0).view(3, 3), mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"col_indices": torch.tensor([0, 3, 1, 2], dtype=torch.int32)}, r"col_indices: wanted values in \[0, 3\)"),
        ({"col_indices": torch.tensor([2, 0, 1, 2], dtype=torch.int32)}, "strictly ascending"),
        ({"col_indices": torch.tensor([2, 2, 1, 2], dtype=torch.int32)}, "strictly ascending"),
        ({"crow_indices": torch.tensor([0, 3, 2, 4], dtype=torch.int32)}, "crow_indices: wanted an ascent"),
        ({"crow_indices": torch.tensor([0, 2, 2, 3], dtype=torch.int32)}, "crow_indices: wanted an ascent"),
        ({"crow_indices": torch.tensor([0, 2, 4], dtype=torch.int32)}, "crow_indices: got"),
        ({"values": torch.zeros(3)}, "col_indices: got"),
        ({"values": torch.zeros(4, dtype=torch.float64)}, "values: got torch.float64"),
    ],
)
def test_csr_validate_refuses(csr, change, message):
    csr.validate()
    with pytest.raises(ValueError, match=message):
        replace(csr, **change).validate()


def test_bitmap_validate_refuses():
    good = BitmapWeight.from_dense(torch.ones(2, 9), any_mask(2, 9, 0, 0.5))
    with pytest.raises(ValueError, match="values: got"):
        replace(good, values=good.values[:-1]).validate()
    with pytest.raises(ValueError, match="row_offsets: wanted the running count"):
        replace(good, row_offsets=good.row_offsets + 1).validate()
    with pytest.raises(ValueError, match="bitmask: got"):
        replace(good, bitmask=good.bitmask[:, :1]).validate()


def test_from_dense_refuses_disagreeing_shapes():
    with pytest.raises(ValueError, match=r"mask: got shape \(2, 3\), wanted that of the weight, \(3, 2\)"):
        CSRWeight.from_dense(torch.ones(3, 2), torch.ones(2, 3, dtype=torch.bool))


def test_unknown_task_is_named():
    shared = SharedWeight.from_dense(torch.ones(2, 2), {"ctr": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="task: got 'cvr', wanted one of ctr"):
        shared.csr("cvr")
