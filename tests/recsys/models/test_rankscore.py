import math

import pytest
import torch

from lt4rec_sparse.recsys.models.rankscore import rank_score


def test_scores_by_hand():
    pctr, pcvr, length = torch.tensor([0.5, 0.25]), torch.tensor([0.5, 1.0]), torch.tensor([4.0, 16.0])
    assert rank_score(pctr, pcvr, length).tolist() == [1.0, 4.0]
    assert rank_score(pctr, pcvr, length, a=2, b=0, c=0.5).tolist() == [0.5, 0.25]


def test_an_exponent_of_zero_removes_its_factor():
    zero, half = torch.zeros(1), torch.full((1,), 0.5)
    assert rank_score(zero, half, zero, a=0, c=0).tolist() == [0.5]


def test_a_video_of_no_length_comes_last():
    half = torch.full((1,), 0.5)
    assert rank_score(half, half, torch.zeros(1)).item() == 0.0


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
        ({"video_length": torch.tensor([1.0, -1.0])}, "video_length: got 1 values of 2 that are NaN or negative"),
        ({"video_length": torch.tensor([1.0, math.nan])}, "video_length: got 1 values of 2 that are NaN or negative"),
        ({"video_length": torch.tensor([1.0, math.inf])}, "video_length: got 1 values of 2 that are NaN or negative"),
        ({"b": -1.0}, "b: got -1.0, wanted a finite exponent of at least 0"),
        ({"c": math.nan}, "c: got nan, wanted a finite exponent"),
    ],
)
def test_what_cannot_be_scored_is_named(change, message):
    given = {"pctr": torch.ones(2), "pcvr": torch.ones(2), "video_length": torch.ones(2)} | change
    with pytest.raises(ValueError, match=message):
        rank_score(**given)
