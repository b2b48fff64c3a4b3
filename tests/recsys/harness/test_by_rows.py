"""Batch size and epochs that nobody asked for: few rows take small batches and several epochs."""

from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.recsys.harness.by_rows import FEW_STEPS, SMALLEST, by_rows, few_steps

ROWS = st.integers(1, 1 << 40)


@given(ROWS)
def test_no_log_gets_under_some_hundreds_of_steps(rows):
    batch_size, epochs, patience = by_rows(rows)
    per_epoch = ceil(rows / batch_size)
    assert epochs * per_epoch >= 800
    assert (epochs - 1) * per_epoch < 800, "no epoch more"
    assert few_steps(epochs * per_epoch) is None
    assert patience == (2 if epochs > 1 else 0)
    assert per_epoch >= 150 or batch_size == SMALLEST


@given(ROWS, ROWS)
def test_more_rows_take_no_smaller_batches_and_no_more_epochs(rows, more):
    few, many = by_rows(min(rows, more)), by_rows(max(rows, more))
    assert few.batch_size <= many.batch_size
    assert few.batch_size < many.batch_size or few.epochs >= many.epochs


@given(ROWS, st.integers(1, 4096), st.integers(1, 50), st.integers(0, 5))
def test_what_is_given_stays(rows, batch_size, epochs, patience):
    assert by_rows(rows, batch_size, epochs, patience) == (batch_size, epochs, patience)
    assert by_rows(rows, batch_size).batch_size == batch_size
    assert by_rows(rows, epochs=epochs) == (by_rows(rows).batch_size, epochs, 0)
    assert by_rows(rows, patience=patience).patience == patience


def test_a_long_log_trains_as_the_paper_does():
    assert by_rows(1_000_000) == (1024, 1, 0)


def test_few_steps_deserve_a_warning():
    assert few_steps(FEW_STEPS) is None
    assert few_steps(FEW_STEPS - 1).startswith("every model takes 299 steps per task at most.")
