"""Rounded rows: how far they are off, what a lookup makes of them, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_exact, small_integers

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.rows import MAX_VALUE, RoundedRows

KINDS = ("fp16", "int8")
numbers = st.floats(-(2.0**127), 2.0**127, width=32)


@given(st.lists(st.lists(numbers, min_size=3, max_size=3), max_size=5))
def test_in_int8_a_number_is_off_by_half_a_scale_at_most(rows):
    dense = torch.tensor(rows, dtype=torch.float32).view(-1, 3)
    rounded = RoundedRows.from_dense(dense, "int8")
    scales, exact = rounded.scales.double().unsqueeze(1), dense.double()
    # Half a code; the roundings of the quotient and of its product with 127; of the scale, and of what is below normal.
    bound = scales * (0.5 + MAX_VALUE * 2 * 2.0**-24) + exact.abs() * 2 * 2.0**-24 + MAX_VALUE * 2.0**-149
    assert ((rounded.to_dense().double() - exact).abs() <= bound).all()
    assert rounded.values.dtype == torch.int8


@given(st.lists(st.lists(st.floats(-65504, 65504, width=16), min_size=2, max_size=2), max_size=5))
def test_halves_are_kept_as_they_are(rows):
    dense = torch.tensor(rows, dtype=torch.float32).view(-1, 2)
    assert_exact(RoundedRows.from_dense(dense, "fp16").to_dense(), dense)


def test_values_are_kept_as_they_are():
    dense = small_integers(9, 4, generator=torch.Generator().manual_seed(0))
    dense[:, 0], dense[3] = MAX_VALUE, 0.0  # scales of 1; a row of zeros
    rounded = RoundedRows.from_dense(dense, "int8")
    assert_exact(rounded.to_dense(), dense)
    assert rounded.scales.tolist() == [0.0 if row == 3 else 1.0 for row in range(9)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 3)])
def test_a_lookup_makes_the_rows_that_it_reads(kind, shape):
    generator = torch.Generator().manual_seed(1)
    rounded = RoundedRows.from_dense(torch.randn(7, 5, generator=generator), kind)
    ids = torch.randint(7, shape, generator=generator)
    assert_exact(rounded(ids), rounded.to_dense()[ids])


def test_bytes():
    dense = torch.ones(10, 16)
    assert RoundedRows.from_dense(dense, "fp16").nbytes == 10 * 32
    assert RoundedRows.from_dense(dense, "int8").nbytes == 10 * (16 + 4)


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        (torch.zeros(3, dtype=torch.int8), torch.zeros(3), r"values: got torch.int8 \(3,\), wanted torch.int8 \[rows"),
        (torch.zeros(3, 2), torch.zeros(3), r"values: got torch.float32 \(3, 2\), wanted torch.int8"),
        (torch.zeros(3, 2, dtype=torch.int8), None, r"values: got torch.int8 \(3, 2\), wanted torch.float16"),
        (torch.zeros(3, 2, dtype=torch.int8), torch.zeros(2), r"scales: got torch.float32 \(2,\), wanted .* \(3,\)"),
        (torch.zeros(3, 2, dtype=torch.int8), torch.zeros(3).half(), "scales: got torch.float16"),
        (torch.full((3, 2), -128, dtype=torch.int8), torch.zeros(3), "values: got -128, wanted -127 to 127"),
        (torch.zeros(3, 2, dtype=torch.int8), torch.tensor([0, 0, math.nan]), "scales: got numbers from nan to nan"),
        (torch.zeros(3, 2, dtype=torch.int8), torch.tensor([0, -1.0, 0]), "scales: got numbers from -1 to 0, wanted 0"),
        (torch.zeros(3, 2, dtype=torch.int8), torch.tensor([0, 0, 3e38]), r"scales: got .* to 3e\+38, wanted 0 to 2.6"),
        (torch.full((1, 2), math.inf).half(), None, "values: got NaN or Inf among 2 numbers, wanted finite ones"),
    ],
)
def test_what_is_no_rounded_row_is_refused(values, scales, message):
    with pytest.raises(ValueError, match=message):
        RoundedRows(values, scales)


@pytest.mark.parametrize(
    ("kind", "number", "message"),
    [
        ("fp16", -65520.0, "embeddings: got a number of 65520, wanted at most 65504 in fp16"),
        *((kind, math.nan, "embeddings: got NaN or Inf among 2 numbers, wanted finite ones") for kind in KINDS),
        *((kind, -math.inf, "embeddings: got NaN or Inf among 2 numbers, wanted finite ones") for kind in KINDS),
    ],
)
def test_what_cannot_be_rounded_is_refused(kind, number, message):
    with pytest.raises(InputError, match=message):
        RoundedRows.from_dense(torch.tensor([[1.0, number]]), kind)
