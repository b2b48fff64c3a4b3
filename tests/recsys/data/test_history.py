"""Histories: the last rows of strictly earlier days, against a naive implementation."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.ranker.features import History
from lt4rec_sparse.recsys.data.history import PastRows

EVENT = st.tuples(
    st.booleans(),
    st.integers(-2, 3),
    st.one_of(st.none(), st.integers(0, 5)),
    st.lists(st.sampled_from(["a", "b", "c"]), max_size=3),
)
Event = tuple[bool, int, int | None, list[str]]
DAYS = st.lists(st.lists(EVENT, max_size=8), max_size=5)
GROUPS = np.array([0, 3, -2, 9, 0], np.int64)


@given(DAYS, st.integers(1, 4))
def test_histories_equal_a_naive_implementation(days: list[list[Event]], length: int) -> None:
    past = PastRows(History("past", "click", ("video", "tags"), length))
    seen: list[Event] = []
    for day in days:
        bags, (count, rate) = past.bags(GROUPS), past.rates(GROUPS)
        for row, group in enumerate(GROUPS.tolist()):
            rows = [event for event in seen if event[1] == group]
            counted = [event for event in rows if event[0]]
            kept = counted[-length:]
            wanted = {
                "video": [video for _, _, video, _ in kept if video is not None],
                "tags": [tag for _, _, _, tags in kept for tag in tags],
            }
            for name, (values, offsets) in bags.items():
                assert values[offsets[row] : offsets[row + 1]].tolist() == wanted[name]
            assert count[row] == len(counted)
            assert rate[row] == len(counted) / len(rows) if rows else np.isnan(rate[row])
        columns = {
            "video": pa.array([video for counts, _, video, _ in day if counts], pa.int64()),
            "tags": pa.array([tags for counts, _, _, tags in day if counts], pa.list_(pa.string())),
        }
        counts = np.array([counts for counts, _, _, _ in day], np.bool_)
        past.add_day(np.array([group for _, group, _, _ in day], np.int64), counts, columns)
        seen += day


@given(DAYS, DAYS, st.integers(1, 4))
def test_a_day_may_come_in_parts_of_which_only_what_is_left_is_added(
    before: list[list[Event]], parts: list[list[Event]], length: int
) -> None:
    def past_of(days: list[list[Event]]) -> PastRows:
        past = PastRows(History("past", "click", ("video", "tags"), length))
        for day in days:
            columns = {
                "video": pa.array([video for counts, _, video, _ in day if counts], pa.int64()),
                "tags": pa.array([tags for counts, _, _, tags in day if counts], pa.list_(pa.string())),
            }
            counts = np.array([counts for counts, _, _, _ in day], np.bool_)
            past.add_day(np.array([group for _, group, _, _ in day], np.int64), counts, columns)
        return past

    together, in_parts = past_of([*before, [event for part in parts for event in part]]), past_of(before)
    in_parts.add_past(past_of(parts))
    assert in_parts.groups.tolist() == together.groups.tolist()
    for one, other in zip(in_parts.rates(GROUPS), together.rates(GROUPS), strict=True):
        assert np.array_equal(one, other, equal_nan=True)
    for name, (values, offsets) in together.bags(GROUPS).items():
        found, cuts = in_parts.bags(GROUPS)[name]
        assert found.tolist() == values.tolist() and cuts.tolist() == offsets.tolist()
