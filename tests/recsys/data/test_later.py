"""Later days for a model that is there: which rows they are, what their ids mean, and which logs are refused."""

import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data import DataError, prepare
from lt4rec_sparse.recsys.data.later import open_later, prepare_later

DAYS = [f"2024-01-0{day}" for day in range(1, 7)]
TASKS = ("ctr", "cvr")


@pytest.fixture(scope="module")
def source(simulated, prepared):
    return open_later(simulated, prepared.schema)


@pytest.fixture(scope="module")
def later(source, prepared, tmp_path_factory):
    """The days after those that the model was trained on, 1 and 2."""
    return prepare_later(source, tmp_path_factory.mktemp("later") / "out", prepared.encoder, TASKS, None)


def rows_of(prepared, *splits):
    tables = [pq.read_table(path) for split in splits for path in sorted((prepared.folder / split).glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]


def test_training_days_are_those_after_the_last_that_trained(prepared, later):
    assert prepared.encoder.until == DAYS[1]
    assert [later.counts[split]["days"] for split in ("train", "validation", "test")] == [DAYS[2:5], DAYS[5:], []]
    assert later.encoder.until == DAYS[4]


def test_rows_are_those_of_a_first_training_but_for_ids_that_were_unseen(prepared, later):
    """With the past of all earlier days, in the same order."""
    before, now = rows_of(prepared, "validation", "test"), rows_of(later, "train", "validation")
    assert len(before) == len(now) > 0
    grown = 0
    for old, new in zip(before, now, strict=True):
        for name, value in old.items():
            pairs = zip(value, new[name], strict=True) if isinstance(value, list) else [(value, new[name])]
            for a, b in pairs:
                assert a == b or (name.startswith("feature.") and a == 1 and b > 1)
                grown += a != b
    assert grown > 0


def test_a_day_trains_in_the_order_of_its_rows(later):
    days = [pq.read_table(path)["day"].unique().to_pylist() for path in sorted((later.folder / "train").iterdir())]
    assert days == [[day] for day in DAYS[2:5]]
    batches = list(later.stream("train", 64, shuffle=False).epoch(0))
    moments = torch.cat([batch.values["time_ms"] for batch in batches])
    assert len(moments) == later.counts["train"]["rows"] and bool((moments.diff() >= 0).all())


@pytest.mark.parametrize(
    ("days", "validation", "train", "held"),
    [
        ("2024-01-03..2024-01-05", None, DAYS[2:4], DAYS[4:5]),
        ("2024-01-03,2024-01-05", "2024-01-06", [DAYS[2], DAYS[4]], DAYS[5:]),
        (None, "2024-01-05..2024-01-06", DAYS[2:4], DAYS[4:]),
    ],
)
def test_days_can_be_named(source, prepared, tmp_path, days, validation, train, held):
    found = prepare_later(source, tmp_path / "out", prepared.encoder, TASKS, days, validation)
    assert [found.counts[split]["days"] for split in ("train", "validation")] == [train, held]


@pytest.mark.parametrize(
    ("until", "days", "validation", "message"),
    [
        (
            DAYS[1],
            "2024-01-02..2024-01-04",
            None,
            "--days: got '2024-01-02', wanted days after '2024-01-02', the last ",
        ),
        (DAYS[1], "2024-01-03", None, "--days: got '2024-01-03', wanted at least one to train on, and later ones to"),
        (DAYS[4], None, None, "--days: got 1 days after '2024-01-05', wanted at least one to train on"),
        (DAYS[5], None, None, "--days: got 0 days after '2024-01-06', wanted at least one to train on"),
        (None, None, None, "--days: got none, wanted some: the model does not say which days it was trained on"),
        ("20240102", None, None, "--days: got day '20240102', wanted one in the form of the log's days"),
        (DAYS[1], "2024-01-07", None, "--days: got '2024-01-07', wanted days of 2024-01-01 to 2024-01-06"),
        (DAYS[1], "2024-01-05..2024-01-03", None, "--days: got '2024-01-05..2024-01-03', wanted the earlier day first"),
        (DAYS[1], " , ", None, "--days: got ' , ', wanted days of"),
        (DAYS[1], "2024-01-03..2024-01-04", "2024-01-04", "--validation-days: got '2024-01-04', wanted days after '"),
        (DAYS[1], "2024-01-03", "never", "--validation-days: got 'never', wanted days of"),
    ],
)
def test_days_that_cannot_be_are_refused_and_nothing_is_left(
    source, prepared, tmp_path, until, days, validation, message
):
    encoder = type(prepared.encoder).from_arrays(*prepared.encoder.to_arrays())
    encoder.until = until
    with pytest.raises(DataError) as caught:
        prepare_later(source, tmp_path / "out", encoder, TASKS, days, validation)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_it_is_prepared_anew_for_another_model_or_other_days_alone(source, prepared, later):
    made = []

    def again(encoder, days=None, replace=True):
        made.clear()
        return prepare_later(
            source, later.folder, encoder, TASKS, days, progress=lambda *step: made.append(step), replace=replace
        )

    again(prepared.encoder)
    assert not made
    for encoder, days in ((prepared.encoder, "2024-01-03..2024-01-04"), (later.encoder, "2024-01-03..2024-01-06")):
        with pytest.raises(DataError, match="wanted the same"):
            again(encoder, days, replace=False)


def changed(schema, **changes):
    return Schema.from_dict({**schema.to_dict(), **changes})


def renamed(parts, name, **changes):
    return [{**part, **changes} if part["name"] == name else part for part in parts]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {"columns": renamed(s["columns"], "video_id", min_count=9)},
            "column 'video_id': got min_count = 3, ",
        ),
        (lambda s: {"columns": [*s["columns"], {"name": "extra"}]}, "column 'extra': got none, wanted it, as in the"),
        (
            lambda s: {"columns": [c for c in s["columns"] if c["name"] != "tab"], "context": []},
            "column 'tab': got one",
        ),
        (
            lambda s: {"tasks": renamed(s["tasks"], "cvr", divide_by=3)},
            "task 'cvr': got divide_by = 'duration_ms', wan",
        ),
        (lambda s: {"tasks": s["tasks"][:1]}, "task 'cvr': got one, wanted none, as in the model"),
        (lambda s: {"histories": renamed(s["histories"], "clicked", length=3)}, "history 'clicked': got length = 10"),
        (lambda s: {"duplicates": "keep"}, "duplicates: got 'drop', wanted 'keep', as in the model"),
        (lambda s: {"time": {**s["time"], "order": None}}, "time: got Time("),
    ],
)
def test_a_log_of_another_schema_is_refused_in_one_line(simulated, prepared, change, message):
    schema = prepared.schema
    with pytest.raises(DataError) as caught:
        open_later(simulated, changed(schema, **change(schema.to_dict())))
    assert str(caught.value).startswith(f"{simulated}: {message}") and "\n" not in str(caught.value)


def test_what_no_model_reads_may_differ(simulated, prepared, tmp_path):
    """How files are written, how rows were split, what reports show."""
    schema = replace(prepared.schema, name="other", slices=(), carried=())
    assert open_later(simulated, schema).schema.slices
    folder = shutil.copytree(simulated, tmp_path / "plain")
    (folder / "schema.toml").unlink()
    assert open_later(folder, schema).schema.name == "other"


def test_a_log_without_days_is_refused(tmp_path, make):
    folder, schema = make(time=None, group=None, histories=[], slices=[], split={})
    assert prepare(folder, tmp_path / "out", schema).encoder.until is None
    with pytest.raises(DataError, match=r"got a log without \[time\], wanted one with days"):
        open_later(folder, schema)
