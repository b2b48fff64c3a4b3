"""Facts of the real data that the schema must get right."""

from __future__ import annotations

from pathlib import Path

import pyarrow.csv
import pytest
import torch

from lt4rec_sparse.recsys.data import Prepared, kuairand_schema, prepare


@pytest.fixture(scope="module")
def real(kuairand: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(kuairand, tmp_path_factory.mktemp("kuairand") / "out")


def test_duplicates_and_days(real: Prepared) -> None:
    counts = real.counts
    assert (counts["rows_read"], counts["duplicates"]) == (212_582, 5_200)
    assert counts["train"]["days"] == [*map(str, range(20220425, 20220431)), "20220501", "20220502", "20220503"]
    assert counts["validation"]["days"] == ["20220504", "20220505"]
    assert counts["test"]["days"] == ["20220506", "20220507"]
    assert sum(counts[split]["rows"] for split in ("train", "validation", "test")) == 212_582 - 5_200


def test_ratio_is_on_clicked_rows_with_a_duration(real: Prepared) -> None:
    for split in ("train", "validation", "test"):
        for batch in real.stream(split, 1 << 14, shuffle=False).epoch(0):
            assert not (batch.rows["cvr"] & (batch.labels["ctr"] == 0)).any()
            assert batch.rows["ctr"].all()
            assert batch.labels["cvr"].min() >= 0 and batch.labels["cvr"].max() <= 1
    clicks = sum(
        real.counts[split]["tasks"]["ctr"]["label_mean"] * real.counts[split]["rows"] for split in ("train", "test")
    )
    ratios = sum(real.counts[split]["tasks"]["cvr"]["rows"] for split in ("train", "test"))
    assert 0 < clicks - ratios < 3_500


def test_like_and_long_view_are_extra_and_on_every_impression(real: Prepared) -> None:
    assert [task.name for task in real.schema.tasks if task.extra] == ["like", "long_view"]
    for split in ("train", "validation", "test"):
        like, long_view = (real.counts[split]["tasks"][name] for name in ("like", "long_view"))
        assert like["rows"] == long_view["rows"] == real.counts[split]["rows"]
        assert 0.01 < like["label_mean"] < 0.03 < 0.25 < long_view["label_mean"] < 0.4


def test_carried_times_are_those_of_the_log(real: Prepared) -> None:
    (batch,) = real.stream("test", 1 << 20, shuffle=False).epoch(0)
    time, duration, played = (batch.values[name] for name in ("time_ms", "duration_ms", "play_time_ms"))
    assert (time.diff() >= 0).sum() >= len(time) - 2  # ascending within each of the two days
    member = batch.rows["cvr"]
    ratio = (played[member] / duration[member]).clamp(0, 1)
    assert torch.equal(ratio.float(), batch.labels["cvr"][member])


def test_no_feature_is_an_outcome_or_the_user() -> None:
    schema = kuairand_schema()
    names = {column.name for column in schema.features}
    assert not names & schema.forbidden
    assert {"play_time_ms", "long_view", "is_like", "is_click", "comment_stay_time"} <= schema.forbidden
    assert schema.group.column not in names
    assert not any("statistic" in pattern or "random" in pattern for join in schema.joins for pattern in join.files)


def test_every_column_of_the_log_is_a_feature_an_outcome_or_neither_by_decision(kuairand: Path) -> None:
    (path,) = kuairand.glob("data/log_standard_*.csv")
    with pyarrow.csv.open_csv(path) as reader:
        columns = set(reader.schema.names)
    schema = kuairand_schema()
    features = {column.name for column in schema.features}
    assert columns - features - schema.forbidden == {"user_id", "date", "time_ms", "is_rand"}


def test_first_day_has_no_past_and_later_days_do(real: Prepared) -> None:
    fields = [field.column for field in real.encoder.fields if field.multi]
    first = next(real.stream("train", 10_000, shuffle=False).epoch(0)).features
    lengths = first.multi_offsets.diff().view(len(fields), first.batch).sum(1)
    assert lengths[fields.index("tag")] > 0
    assert lengths[fields.index("clicked_video_id")] == 0
    test = next(real.stream("test", 10_000, shuffle=False).epoch(0)).features
    lengths = test.multi_offsets.diff().view(len(fields), test.batch).float().mean(1)
    assert lengths[fields.index("clicked_video_id")] > 1


def test_tab_0_is_a_small_slice(real: Prepared) -> None:
    (batch,) = real.stream("test", 1 << 20, shuffle=False).epoch(0)
    assert 0.05 < batch.slices["tab_0"].float().mean() < 0.15
