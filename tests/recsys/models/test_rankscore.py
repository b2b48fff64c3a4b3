import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.recsys.models.rankscore import log_rank_score, pctcvr, rank_score

LOGITS = st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30), st.floats(0.01, 1e5)), min_size=1, max_size=20)
EXPONENTS = st.tuples(*[st.floats(0, 3)] * 3)


def columns(rows):
    return torch.tensor(rows, dtype=torch.float64).unbind(1)


def test_scores_by_hand():
    pctr, pcvr, length = torch.tensor([0.5, 0.25]), torch.tensor([0.5, 1.0]), torch.tensor([4.0, 16.0])
    assert pctcvr(pctr, pcvr).tolist() == [0.25, 0.25]
    assert rank_score(pctr, pcvr, length).tolist() == [1.0, 4.0]
    assert rank_score(pctr, pcvr, length, a=2, b=0, c=0.5).tolist() == [0.5, 0.25]


@given(rows=LOGITS, exponents=EXPONENTS)
def test_from_logits_is_the_logarithm_of_the_product(rows, exponents):
    ctr, cvr, length = columns(rows)
    logs = log_rank_score(ctr, cvr, length, *exponents)
    product = rank_score(torch.sigmoid(ctr), torch.sigmoid(cvr), length, *exponents)
    # Each factor is rounded a few times, and an exponent multiplies its rounding; a sum of logarithms rounds its terms.
    terms = [e * x.abs() for e, x in zip(exponents, (ctr, cvr, length.log()), strict=True)]
    bound = 16 * sys.float_info.epsilon * (3 + sum(exponents) + sum(terms))
    assert bool(((logs - product.log()).abs() <= bound).all())


def test_from_logits_orders_what_underflows_as_a_product():
    ctr, cvr, length = torch.tensor([-80.0, -81.0]), torch.tensor([-80.0, -80.0]), torch.tensor([10.0, 10.0])
    product = rank_score(torch.sigmoid(ctr), torch.sigmoid(cvr), length)
    logs = log_rank_score(ctr, cvr, length)
    assert product.tolist() == [0.0, 0.0]
    assert logs[0] > logs[1]


def test_from_logits_orders_what_saturates_as_a_product():
    ctr, cvr, length = torch.tensor([40.0, 30.0]), torch.zeros(2), torch.ones(2)
    assert torch.sigmoid(ctr).tolist() == [1.0, 1.0]
    logs = log_rank_score(ctr, cvr, length, b=0, c=0)
    assert logs[0] > logs[1]


def test_an_exponent_of_zero_takes_its_factor_out():
    zero, half = torch.zeros(1), torch.full((1,), 0.5)
    assert rank_score(zero, half, zero, a=0, c=0).tolist() == [0.5]
    assert log_rank_score(zero, zero, zero, a=0, b=0, c=0).tolist() == [0.0]


def test_a_video_of_no_length_comes_last():
    half = torch.full((1,), 0.5)
    assert rank_score(half, half, torch.zeros(1)).item() == 0.0
    assert log_rank_score(half, half, torch.zeros(1)).item() == -math.inf


def test_lengths_may_be_integers_and_more_precise():
    half = torch.full((2,), 0.5)
    assert rank_score(half, half, torch.tensor([4, 8])).tolist() == [1.0, 2.0]
    assert rank_score(half, half, torch.tensor([4.0, 8.0], dtype=torch.float64)).dtype == torch.float64
    assert rank_score(half[:0], half[:0], half[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pcvr": torch.zeros(2, 1)}, r"pcvr: got shape \[2, 1\], wanted \[2\], that of pctr"),
        ({"video_length": torch.zeros(3)}, r"video_length: got shape \[3\], wanted \[2\]"),
        ({"pctr": torch.tensor([0.5, math.nan])}, "pctr: got 1 values of 2 that are NaN or outside"),
        ({"pcvr": torch.tensor([-0.1, 1.1])}, "pcvr: got 2 values of 2 that are NaN or outside"),
        ({"video_length": torch.tensor([1.0, -1.0])}, "video_length: got 1 values of 2 that are NaN, negative"),
        ({"video_length": torch.tensor([1.0, math.nan])}, "video_length: got 1 values of 2 that are NaN, negative"),
        ({"video_length": torch.tensor([1.0, math.inf])}, "video_length: got 1 values of 2 that are NaN, negative"),
        ({"b": -1.0}, "b: got -1.0, wanted a finite exponent of at least 0"),
        ({"c": math.nan}, "c: got nan, wanted a finite exponent"),
    ],
)
def test_what_cannot_be_scored_is_named(change, message):
    given = {"pctr": torch.ones(2), "pcvr": torch.ones(2), "video_length": torch.ones(2)} | change
    with pytest.raises(ValueError, match=message):
        rank_score(**given)


def test_logits_that_cannot_be_scored_are_named():
    with pytest.raises(ValueError, match="ctr_logits: got 1 values of 1 that are NaN or infinite, wanted finite"):
        log_rank_score(torch.tensor([math.nan]), torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match="cvr_logits: got 1 values of 1"):
        log_rank_score(torch.zeros(1), torch.tensor([-math.inf]), torch.ones(1))
    with pytest.raises(ValueError, match="cvr_logits: got shape"):
        log_rank_score(torch.zeros(1), torch.zeros(2), torch.ones(1))
