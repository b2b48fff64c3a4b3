"""Histories: the last rows of strictly earlier days, against a naive implementation."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.data.history import PastRows
from lt4rec_sparse.features import History

EVENT = st.tuples(
    st.integers(-2, 3),
    st.one_of(st.none(), st.integers(0, 5)),
    st.lists(st.sampled_from(["a", "b", "c"]), max_size=3),
)
DAYS = st.lists(st.lists(EVENT, max_size=8), max_size=5)
GROUPS = np.array([0, 3, -2, 9, 0], np.int64)


@given(DAYS, st.integers(1, 4))
def test_histories_equal_a_naive_implementation(
    days: list[list[tuple[int, int | None, list[str]]]], length: int
) -> None:
    past = PastRows(History("past", "click", ("video", "tags"), length))
    seen: dict[int, list[tuple[int | None, list[str]]]] = {}
    for day in days:
        bags = past.bags(GROUPS)
        for row, group in enumerate(GROUPS.tolist()):
            kept = seen.get(group, [])[-length:]
            wanted = {
                "video": [video for video, _ in kept if video is not None],
                "tags": [tag for _, tags in kept for tag in tags],
            }
            for name, (values, offsets) in bags.items():
                assert values[offsets[row] : offsets[row + 1]].tolist() == wanted[name]
        columns = {
            "video": pa.array([video for _, video, _ in day], pa.int64()),
            "tags": pa.array([tags for _, _, tags in day], pa.list_(pa.string())),
        }
        past.add_day(np.array([group for group, _, _ in day], np.int64), columns)
        for group, video, tags in day:
            seen.setdefault(group, []).append((video, tags))
