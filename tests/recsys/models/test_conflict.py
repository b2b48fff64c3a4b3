import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.recsys.models import Conflict

nan = math.nan
CASES = [  # ratio, clicked, duration_ms, in conflict
    (0.05, True, 60_001.0, True),
    (0.10, True, 60_001.0, False),
    (0.15, True, 60_001.0, False),
    (0.15, True, 60_000.0, True),
    (0.20, True, 60_000.0, False),
    (0.00, True, 5_000.0, True),
    (0.00, False, 5_000.0, False),
    (0.00, True, nan, False),
    (0.00, True, 0.0, False),
    (nan, True, 5_000.0, False),
]


def tensors(rows):
    ratio, clicked, duration = zip(*rows, strict=True)
    return torch.tensor(ratio), torch.tensor(clicked), torch.tensor(duration, dtype=torch.float64)


def test_thresholds_of_the_paper():
    *given_rows, expected = zip(*CASES, strict=True)
    rows = tensors(list(zip(*given_rows, strict=True)))
    click, watch = Conflict().factors(*rows)
    assert click.tolist() == torch.where(torch.tensor(expected), 0.2, 1.0).tolist()
    assert watch.tolist() == torch.where(torch.tensor(expected), 5.0, 1.0).tolist()
    assert click.dtype == watch.dtype == rows[0].dtype


row = st.tuples(st.floats(0, 1, width=32), st.booleans(), st.sampled_from([nan, 0.0, 1.0, 6e4, 7e4, 1e6]))


@given(st.lists(row, min_size=1, max_size=8))
def test_a_row_is_judged_for_itself(rows):
    whole = Conflict().factors(*tensors(rows))[1]
    assert whole.tolist() == [Conflict().factors(*tensors([row]))[1].item() for row in rows]


@given(st.lists(row, min_size=1, max_size=8))
def test_factors_of_one_change_nothing(rows):
    for factors in Conflict(click_factor=1, watch_factor=1).factors(*tensors(rows)):
        assert torch.equal(factors, torch.ones(len(rows)))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"watch_factor: got -1, wanted at least 0"):
        Conflict(watch_factor=-1)
