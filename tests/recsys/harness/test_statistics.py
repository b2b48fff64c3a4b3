import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.recsys.harness.statistics import (
    Difference,
    chance,
    is_better,
    is_clear,
    or_none,
    paired_difference,
    summary,
)


def test_summary_by_hand():
    three = summary([1.0, 2.0, 6.0])
    assert (three.mean, three.deviation, three.seeds) == (3.0, pytest.approx(math.sqrt(7)), 3)
    assert three.record() == {"mean": 3.0, "deviation": pytest.approx(math.sqrt(7)), "seeds": 3}


def test_differences_by_hand():
    values, base = {0: 4.0, 1: 6.0, 2: 11.0}, {2: 10.0, 1: 4.0, 0: 4.0}
    absolute = paired_difference(values, base)  # 0, 2, 1
    assert (absolute.mean, absolute.seeds) == (1.0, 3)
    assert absolute.error == pytest.approx(1 / math.sqrt(3))
    relative = paired_difference(values, base, relative=True)  # 0 %, 50 %, 10 %
    assert relative.mean == pytest.approx(20)
    assert relative.error == pytest.approx(math.sqrt(700 / 3))


@given(st.dictionaries(st.integers(0, 9), st.integers(-99, 99), min_size=2), st.integers(-99, 99))
def test_a_difference_from_oneself_is_nothing_and_a_shift_has_no_error(values, shift):
    shifted = paired_difference({seed: value + shift for seed, value in values.items()}, values)
    assert (shifted.mean, shifted.error) == (shift, 0.0)
    assert is_better(shifted, True) == (shift > 0)
    assert is_better(shifted, False) == (shift < 0)


def test_better_means_beyond_the_error_in_the_good_direction():
    gain, loss = Difference(0.2, 0.1, 5, False), Difference(-0.2, 0.1, 5, False)
    assert [is_better(gain, True), is_better(gain, False), is_better(loss, True), is_better(loss, False)] == [
        True,
        False,
        False,
        True,
    ]
    equal = Difference(0.1, 0.1, 5, False)
    assert not is_better(equal, True)


def test_a_difference_prints_as_in_the_tables():
    assert str(Difference(0.00052, 0.00018, 5, False)) == "+0.0005 ± 0.0002"
    assert str(Difference(-0.232, math.nan, 1, True)) == "-0.23 %"


def test_one_seed_has_no_error_and_is_never_better():
    one = paired_difference({0: 2.0}, {0: 1.0})
    assert one.mean == 1.0
    assert math.isnan(one.error)
    assert not is_better(one, True)
    assert json.loads(json.dumps(one.record(), allow_nan=False)) == {
        "difference": 1.0,
        "error": None,
        "seeds": 1,
        "relative": False,
    }
    assert summary([2.0]).record() == {"mean": 2.0, "deviation": None, "seeds": 1}


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_what_is_no_number_is_never_better_and_null_in_json(bad):
    difference = paired_difference({0: bad, 1: 2.0}, {0: 1.0, 1: 1.0})
    assert not is_better(difference, True)
    assert not is_better(difference, False)
    assert difference.record()["difference"] is None
    assert summary([bad, 1.0]).record() == {"mean": None, "deviation": None, "seeds": 2}


@given(st.floats(-100, 100).filter(bool), st.floats(1e-3, 100), st.integers(2, 40))
def test_chance_is_that_of_a_t_test(mean, error, seeds):
    stats = pytest.importorskip("scipy.stats")
    exact = 2 * stats.t.sf(abs(mean) / error, seeds - 1)
    # A handful of terms below 1, each rounded once or twice.
    assert abs(chance(Difference(mean, error, seeds, False)) - exact) <= 4 * seeds * np.finfo(np.float64).eps


def test_clear_is_beyond_chance_and_never_of_one_seed():
    assert is_clear(Difference(12.8, 1.0, 2, False)) and not is_clear(Difference(-12.6, 1.0, 2, False))
    assert is_clear(Difference(-4.31, 1.0, 3, True)) and not is_clear(Difference(4.30, 1.0, 3, True))
    assert is_clear(Difference(1e-9, 0.0, 2, False)) and not is_clear(Difference(0.0, 0.0, 2, False))
    assert not is_clear(Difference(5.0, math.nan, 1, False)) and not is_clear(Difference(math.nan, math.nan, 3, False))


def test_percent_of_nothing_is_no_number():
    assert math.isnan(paired_difference({0: 1.0, 1: 1.0}, {0: 0.0, 1: 1.0}, relative=True).mean)


def test_other_seeds_are_refused():
    with pytest.raises(ValueError, match=r"seeds: got \[0, 2\], wanted the base's, \[0, 1\]"):
        paired_difference({0: 1.0, 2: 1.0}, {0: 1.0, 1: 1.0})


def test_or_none():
    assert [or_none(x) for x in (1.5, math.nan, -math.inf, np.float64(2))] == [1.5, None, None, 2.0]
