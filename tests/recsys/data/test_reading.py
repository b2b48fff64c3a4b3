"""Files as other people write them: delimiters, headers, compression, missing values, times, labels, large ids."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import Schema, SchemaError
from lt4rec_sparse.recsys.data import DataError, open_source, read_candidates
from lt4rec_sparse.recsys.data.days import partition
from lt4rec_sparse.recsys.data.reading import Form, column_names, read_file
from lt4rec_sparse.recsys.data.rows import RowReader, Rows
from lt4rec_sparse.recsys.data.source import RawType
from lt4rec_sparse.recsys.data.written import csv_table

INT, TEXT, NUMBER = RawType(pa.int64()), RawType(pa.string()), RawType(pa.float64())
SCHEMA: dict[str, Any] = {
    "name": "odd",
    "files": {"log": ["log*"]},
    "columns": [{"name": "land"}, {"name": "size", "kind": "dense"}],
    "tasks": [{"name": "buy", "kind": "binary", "label": "bought"}],
}


def read(path: Path, form: Form | None = None, **types: RawType) -> dict[str, list[Any]]:
    batches = list(read_file(path, types, list(types), form or Form()))
    return pa.Table.from_batches(batches).to_pydict()


def rows_of(folder: Path, **changes: Any) -> list[Rows]:
    """Return the rows of a log by day, in the order of the days."""
    source = open_source(folder, Schema.from_dict(SCHEMA | changes))
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    log = partition(source, scratch, 64, lambda stage, done, total: None)
    return list(RowReader(source, log).read(frozenset(log.days)))


@pytest.mark.parametrize(
    ("name", "text", "form"),
    [
        ("a.tsv", "id\tname\n1\tx,y\n2\tz\n", Form()),
        ("a.csv", "id;name\n1;x,y\n2;z\n", Form(delimiter=";")),
        ("a.txt", "1|x,y\n2|z\n", Form(delimiter="|", names=("id", "name"))),
        ("u.data", '1,"x,y"\n2,z\n', Form(names=("id", "name"))),
        ("bom.csv", '\ufeffid,name\n1,"x,y"\n2,z\n', Form()),
    ],
)
def test_delimiters_and_headers(tmp_path: Path, name: str, text: str, form: Form) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert column_names(tmp_path / name, form) == ["id", "name"]
    assert read(tmp_path / name, form, id=INT, name=TEXT) == {"id": [1, 2], "name": ["x,y", "z"]}


@pytest.mark.parametrize("ending", ["csv.gz", "csv.zst", "csv.bz2", "tsv.gz"])
def test_compressed_files(tmp_path: Path, ending: str) -> None:
    text = "id,name\n1,x\n" if "csv" in ending else "id\tname\n1\tx\n"
    with pa.output_stream(str(tmp_path / f"a.{ending}"), compression="detect") as stream:
        stream.write(text.encode())
    assert read(tmp_path / f"a.{ending}", id=INT, name=TEXT) == {"id": [1], "name": ["x"]}


def test_an_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("id,name\n1,Köln\n".encode("latin-1"))
    assert read(tmp_path / "a.csv", Form(encoding="latin-1"), name=TEXT) == {"name": ["Köln"]}
    with pytest.raises(DataError, match=r"a\.csv: got .*, wanted CSV .*, in UTF-8, or the name of its encoding"):
        read(tmp_path / "a.csv", name=TEXT)
    with pytest.raises(DataError, match=r"a\.csv: got unknown encoding: latin-77"):
        read(tmp_path / "a.csv", Form(encoding="latin-77"), name=TEXT)


@pytest.mark.parametrize(
    ("name", "content", "form", "message"),
    [
        ("a.csv", b"u;v\n1;2\n", Form(), r"got one column 'u;v', wanted columns cut at ',', or delimiter = ';' in"),
        ("a.csv", b"u\tv\n1\t2\n", Form(), r"or delimiter = '\\t' in .files"),
        ("a.csv", b"1,2,3\n", Form(names=("u", "v")), r"got 3 columns, wanted 2 as in names of .files"),
        ("a.csv.gz", b"u,v\n1,2\n", Form(), r"a\.csv\.gz: got .*, wanted CSV"),
    ],
)
def test_what_is_odd_about_a_file_is_named(tmp_path: Path, name: str, content: bytes, form: Form, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, form, u=INT)


def test_a_first_line_that_is_no_header_is_shown(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("de,1.5,0\n")
    with pytest.raises(DataError, match=r"'bought' is absent.*; its first line is de, 1\.5, 0: if that is no header"):
        rows_of(tmp_path)
    (found,) = rows_of(tmp_path, files={"log": ["log*"], "names": ["land", "size", "bought"]})
    assert found.features["land"].tolist() == ["de"]


def test_side_tables_have_forms_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("7;0\n8;1\n")
    (tmp_path / "lands").write_text("7|NA|1.5\n8|-|2\n")
    join = {"files": ["lands"], "on": "id", "delimiter": "|", "names": ["id", "land", "size"]}
    files = {"log": ["log.csv"], "delimiter": ";", "names": ["id", "bought"], "missing": ["", "-"]}
    (found,) = rows_of(tmp_path, files=files, joins=[join])
    assert found.features["land"].tolist() == ["NA", None]
    (found,) = rows_of(tmp_path, files=files, joins=[join | {"missing": ["NA"]}])
    assert found.features["land"].tolist() == [None, "-"]


@given(
    missing=st.lists(st.sampled_from(["", "NA", "-", "nan", "null"]), unique=True),
    texts=st.lists(st.sampled_from(["", "NA", "-", "nan", "null", "de", None]), min_size=1),
)
def test_missing_means_the_same_in_csv_and_parquet(
    tmp_path_factory: pytest.TempPathFactory, missing: list[str], texts: list[str | None]
) -> None:
    folder, form = tmp_path_factory.mktemp("missing"), Form(missing=tuple(missing))
    known = ["de" if text is None else text for text in texts]  # CSV has no null of its own
    (folder / "a.csv").write_text("n,land\n" + "".join(f"1,{text}\n" for text in known))
    pq.write_table(pa.table({"land": known}), folder / "a.parquet")
    wanted = [None if text in missing else text for text in known]
    assert read(folder / "a.csv", form, land=TEXT) == read(folder / "a.parquet", form, land=TEXT) == {"land": wanted}
    pq.write_table(pa.table({"land": pa.array(texts, pa.string()).dictionary_encode()}), folder / "b.parquet")
    assert read(folder / "b.parquet", form, land=TEXT)["land"] == [None if t in missing else t for t in texts]


def test_a_country_code_na_stays_and_candidates_read_as_the_log(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("land,size,bought\nNA,,0\n,1,1\n")
    (usual,) = rows_of(tmp_path)
    assert usual.features["land"].tolist() == [None, None]
    files = {"log": ["log*"], "missing": [""]}
    (found,) = rows_of(tmp_path, files=files)
    assert found.features["land"].tolist() == ["NA", None]
    schema = Schema.from_dict(SCHEMA | {"files": files})
    assert read_candidates(tmp_path / "log.csv", schema)[0]["land"].tolist() == ["NA", None]
    table = pa.table({"land": ["NA", None], "size": [1.0, None]})
    assert csv_table(schema, table).equals(table)
    with pytest.raises(InputError, match="column 'land': got 'NA', which CSV cannot hold"):
        csv_table(Schema.from_dict(SCHEMA), table)
    with pytest.raises(InputError, match="column 'land': got None, which CSV cannot hold"):
        csv_table(Schema.from_dict(SCHEMA | {"files": {"log": ["log*"], "missing": ["-"]}}), table)


def test_an_empty_number_is_missing_whatever_stands_for_missing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,size,id\n1,,\n2,nan, \n3,2.5,7\n")
    found = read(tmp_path / "a.csv", Form(missing=("-",)), size=NUMBER, id=INT)
    assert found == {"size": [None, None, 2.5], "id": [None, None, 7]}
    with pytest.raises(DataError, match=r"column 'size': got '-', wanted double .*missing in .files"):
        (tmp_path / "a.csv").write_text("size\n-\n")
        read(tmp_path / "a.csv", size=NUMBER)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1), st.sampled_from(["5.0", "5.", "+5", "5e0", " 5 "]))
def test_no_spelling_of_a_number_merges_ids(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], five: str
) -> None:
    path = tmp_path_factory.mktemp("ids") / "a.csv"
    path.write_text("id\n" + "".join(f"{number}\n" for number in ids) + f"{five}\n")
    assert read(path, id=INT)["id"] == [*ids, 5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            pa.array([2**63], pa.uint64()),
            r"got 9223372036854775808, wanted int64 .type = .string. reads ids",
        ),
        (pa.array([2.0**60]), r"got 1\.15.*e\+18 in a column of floats, which hold no id above 2\^53 exactly"),
        (pa.array(["9223372036854775808"]), r"got '9223372036854775808', wanted int64 .type = .string"),
        (pa.array(["1e400000000"]), "got '1e400000000', wanted int64"),
    ],
)
def test_ids_that_int64_does_not_hold_are_refused_or_texts(tmp_path: Path, values: Any, message: str) -> None:
    pq.write_table(pa.table({"id": values}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.parquet", id=INT)
    if not pa.types.is_floating(values.type):
        assert read(tmp_path / "a.parquet", id=TEXT)["id"] == [str(values[0].as_py())]


def test_a_number_that_float64_does_not_hold_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"size": [2**53 + 1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="got 9007199254740993, which no float64 holds exactly, wanted double"):
        read(tmp_path / "a.parquet", size=NUMBER)


MOMENT = datetime(2024, 1, 13, 22, 30, 15, 250_000, tzinfo=timezone.utc)
EPOCH = MOMENT.timestamp()


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        ([int(EPOCH * 1000)], "ms"),
        ([int(EPOCH * 1000) * 10**6], "ns"),
        ([EPOCH], "s"),
        ([EPOCH * 1000], "ms"),
        ([str(EPOCH)], "s"),
        ([str(int(EPOCH * 1000))], "ms"),
        (["2024-01-13T22:30:15.250Z"], "ms"),
        (["2024-01-14 00:30:15.25+02:00"], "ms"),
        (["2024-01-13T17:00:15.250-0530"], "ms"),
        (["2024-01-13T22:30:15.250"], "ms"),
        (pa.array([MOMENT], pa.timestamp("us", "Asia/Tokyo")), "s"),
        (pa.array([MOMENT.replace(tzinfo=None)], pa.timestamp("ns")), "s"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_moment_is_the_same_however_it_is_written(tmp_path: Path, values: Any, unit: str) -> None:
    pq.write_table(pa.table({"t": values}), tmp_path / "a.parquet")
    wanted = RawType(pa.timestamp("us"), unit=unit)
    assert read(tmp_path / "a.parquet", t=wanted)["t"] == [MOMENT.replace(tzinfo=None)]


@pytest.mark.parametrize(
    ("zone", "day"),
    [
        (None, "2024-01-13"),
        ("Asia/Kolkata", "2024-01-14"),
        ("America/New_York", "2024-01-13"),
        ("+01:29", "2024-01-13"),
        ("+01:30", "2024-01-14"),
        ("-22:31", "2024-01-12"),
    ],
)
def test_the_day_is_that_of_the_zone(tmp_path: Path, zone: str | None, day: str) -> None:
    (tmp_path / "log.csv").write_text(f"land,size,bought,t\nde,1,0,{EPOCH}\n")
    time = {"timestamp": "t", "unit": "s"} | ({} if zone is None else {"zone": zone})
    assert [rows.day for rows in rows_of(tmp_path, time=time)] == [day]


def test_formats_of_days_and_times(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        "land,size,bought,day,t,born\nde,1,0,01/02/2024,31.01.2024 23:30 +0000,30/01/2024\n"
        "fr,1,0,15/01/2024,15.01.2024 08:00 +0200,\n"
    )
    of_days = {"time": {"day": "day", "format": "%d/%m/%Y"}}
    age = {"name": "age", "days_since": "born", "format": "%d/%m/%Y"}
    columns = [{"name": "land"}, {"name": "age", "kind": "dense"}]
    found = rows_of(tmp_path, **of_days, derived=[age], columns=columns)
    assert [rows.day for rows in found] == ["2024-01-15", "2024-02-01"]
    assert found[1].features["age"].tolist() == [2.0]
    time = {"timestamp": "t", "format": "%d.%m.%Y %H:%M %z", "zone": "+01:00"}
    assert [rows.day for rows in rows_of(tmp_path, time=time)] == ["2024-01-15", "2024-02-01"]
    with pytest.raises(DataError, match=r"'day': got day '01/02/2024', which does not sort as text, wanted its format"):
        rows_of(tmp_path, time={"day": "day"})
    with pytest.raises(DataError, match=r"column 'day': got '01/02/2024', not in the format '%Y', wanted string"):
        rows_of(tmp_path, time={"day": "day", "format": "%Y"})


@pytest.mark.parametrize(
    ("value", "time", "message"),
    [
        (
            EPOCH,
            {"timestamp": "t"},
            r"got 1705185015\.25, which in 'ms' is of the year 1970 and in 's' is not: unit",
        ),
        (int(EPOCH * 1000), {"timestamp": "t", "unit": "us"}, "is of the year 1970 and in 'ms' is not: unit = 'ms'"),
        ("13/01/2024", {"timestamp": "t"}, r"column 't': .*'13/01/2024'.*wanted an epoch, ISO 8601 such as"),
        (
            EPOCH,
            {"timestamp": "t", "unit": "s", "zone": "Mars/Base"},
            r"time: got zone='Mars/Base', wanted a name such as",
        ),
    ],
)
def test_a_wrong_time_is_named(tmp_path: Path, value: Any, time: dict[str, Any], message: str) -> None:
    (tmp_path / "log.csv").write_text(f"land,size,bought,t\nde,1,0,{value}\n")
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path, time=time)


def test_small_epochs_of_made_up_logs_are_read(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("land,size,bought,t\nde,1,0,0\nfr,1,0,86400000\n")
    assert [rows.day for rows in rows_of(tmp_path, time={"timestamp": "t"})] == ["1970-01-01", "1970-01-02"]


LABELS: list[tuple[Callable[[list[Any]], Any], dict[str, Any]]] = [
    (lambda labels: [["no", "yes"][label] if label is not None else None for label in labels], {"positive": ["yes"]}),
    (lambda labels: [["-", "a"][label] if label is not None else None for label in labels], {"positive": ["a", "b"]}),
    (lambda labels: labels, {"positive": ["1"], "negative": ["0"]}),
    (lambda labels: [bool(label) if label is not None else None for label in labels], {}),
    (lambda labels: [["False", "TRUE"][label] if label is not None else None for label in labels], {}),
]


@pytest.mark.parametrize(("written", "task"), LABELS)
def test_labels_are_texts_and_booleans_too(tmp_path: Path, written: Any, task: dict[str, Any]) -> None:
    """Also where they filter the rows of another task, or make a history."""
    table = pa.table({"land": ["a"] * 4, "size": [1.0] * 4, "bought": written([1, 0, None, 1]), "paid": [5, 5, 5, 25]})
    pq.write_table(table, tmp_path / "log.parquet")
    buy = SCHEMA["tasks"][0] | task
    pay = {"name": "pay", "kind": "ratio", "label": "paid", "divide_by": 10, "rows": ["bought"]}
    (found,) = rows_of(tmp_path, tasks=[buy, pay])
    assert found.columns["label.buy"].tolist() == [1, 0, 0, 1]
    assert found.columns["member.buy"].tolist() == [True, True, False, True]
    assert found.columns["member.pay"].tolist() == [True, False, False, True]
    assert found.columns["label.pay"].tolist() == [0.5, 0, 0, 1]


def test_two_tasks_may_read_one_text(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("land,size,state\nde,1,single\nfr,1,married\nfr,1,divorced\n")
    tasks = [{"name": name, "kind": "binary", "label": "state", "positive": [name]} for name in ("single", "married")]
    (found,) = rows_of(tmp_path, tasks=tasks, columns=[{"name": "land"}])
    assert found.columns["label.single"].tolist() == [1, 0, 0]
    assert found.columns["label.married"].tolist() == [0, 1, 0]
    tasks.append({"name": "x", "kind": "binary", "label": "size", "rows": ["state"]})
    with pytest.raises(DataError, match="row filter of 'x': tasks read column 'state' in 2 ways, wanted one"):
        rows_of(tmp_path, tasks=tasks, columns=[{"name": "land"}])


def test_a_label_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("land,size,bought\nde,1,yes\nfr,1,maybe\n")
    task = SCHEMA["tasks"][0] | {"positive": ["yes"], "negative": ["no"]}
    with pytest.raises(DataError, match="column 'bought': got 'maybe', wanted one of yes, no for task 'buy'"):
        rows_of(tmp_path, tasks=[task])
    with pytest.raises(DataError, match=r"column 'bought': got 'yes', wanted double .a label of other texts: positive"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": {"log": ["a"], "delimiter": ";;"}}, "files: got delimiter=';;', wanted one sign"),
        ({"files": {"log": ["a"], "names": ["a", "a"]}}, "files: got 'a' twice in names"),
        ({"time": {"day": "d", "zone": "UTC"}}, "got zone='UTC', wanted it with a timestamp"),
        ({"tasks": [{"name": "b", "kind": "binary", "label": "b", "negative": ["x"]}]}, "got negative alone"),
        ({"tasks": [{"name": "b", "kind": "ratio", "label": "b", "positive": ["x"]}]}, "got positive in a ratio task"),
        ({"tasks": [{"name": "b", "kind": "ratio", "label": "b", "divide_by": 0}]}, "wanted a number above 0"),
        (
            {"tasks": [{"name": "b", "kind": "binary", "label": "b", "positive": ["x"], "negative": ["x"]}]},
            "got 'x' twice in positive and negative",
        ),
    ],
)
def test_a_wrong_description_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        Schema.from_dict(SCHEMA | changes)


def test_a_gzipped_log_runs_through(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "log.csv.gz", "wt") as file:
        file.write("land,size,bought\nde,1,0\nfr,2,1\n")
    (found,) = rows_of(tmp_path)
    assert found.columns["label.buy"].tolist() == [0, 1]
