"""Malformed requests get an error of the 4xx that names the field; the server lives. See `hostile`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve.hostile import Target, check, run


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    target = Target(tmp_path_factory.mktemp("hostile"))
    yield target
    target.close()


def test_thousands_of_malformed_requests_are_refused(target):
    statuses = run(target, range(3_000))
    assert set(statuses) == {200, 400} and statuses[400] > 1_500 and statuses[200] > 100


@given(seed=st.integers(min_value=1 << 32, max_value=1 << 63))
def test_any_malformed_request_is_refused(target, seed):
    check(target, seed)


@pytest.mark.heavy
def test_fifty_thousand_malformed_requests_are_refused(target):
    assert set(run(target, range(10**6, 10**6 + 50_000))) == {200, 400}
