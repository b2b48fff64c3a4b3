"""An engine file, served through csrc/lt4rec.h: the scores of `Ranker.score` to the bit, and its own rules."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from c_ranker import (
    BAD_ARGUMENT,
    BAD_FILE,
    BAD_ISA,
    BAD_ROWS,
    BAD_TYPE,
    BAD_VALUE,
    CANNOT_READ,
    NOT_SET,
    CError,
    Model,
    String,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rankers import COLUMNS, COMMON, ROWS, columns_of, make

from lt4rec_sparse import Ranker
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.ranker import engine_file

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")

PRECISIONS = ("fp32", "bf16", "int8")


def exported(ranker: Ranker, folder: Path, precision: str | None = None) -> Model:
    path = folder / "model.engine"
    ranker.to_engine_file(path, precision)
    return Model(path)


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    return make()


@pytest.fixture(scope="module")
def model(ranker: Ranker, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return exported(ranker, tmp_path_factory.mktemp("model"))


def wanted(ranker: Ranker, columns: dict[str, Any]) -> np.ndarray:
    scores = ranker.score(columns)
    return np.stack([scores[task] for task in ranker.tasks], 1)


def shown_rows(count: int) -> dict[str, list[Any]]:
    return columns_of([{name: values[(i + j) % 3] for j, (name, values) in enumerate(COLUMNS.items())}
                       for i in range(count)])  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("context", [True, False])
def test_scores_are_those_of_the_ranker_to_the_bit(
    tmp_path: Path, precision: str, blocks: bool, kind: str, context: bool
) -> None:
    ranker = make(context, kind, 5, precision, blocks)
    model = exported(ranker, tmp_path)
    for rows in (1, 3, 200):
        columns = shown_rows(rows)
        once = {name: values[:1] if name in COMMON else values for name, values in columns.items()}
        for threads in (1, 2):
            assert (model.score(columns, rows, threads) == wanted(ranker, columns)).all()
            assert (model.score(once, rows, threads) == wanted(ranker, once)).all()
    model.close()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("context", [True, False])
def test_slopes_are_in_the_file(tmp_path: Path, precision: str, blocks: bool, context: bool) -> None:
    ranker = make(context, precision=precision, blocks=blocks, activation="dice")
    model = exported(ranker, tmp_path)
    for rows in (1, 3, 70):
        columns = shown_rows(rows)
        assert (model.score(columns, rows) == wanted(ranker, columns)).all()
    model.close()


@pytest.mark.parametrize("isa", cpu.supported_isas())
def test_every_instruction_set_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranker: Ranker, isa: str
) -> None:
    monkeypatch.setenv("LT4REC_SPARSE_ISA", isa)
    model = exported(ranker, tmp_path)
    assert model.facts.isa.decode() == isa
    columns = shown_rows(70)
    assert (model.score(columns, 70) == wanted(ranker, columns)).all()
    model.close()


def test_an_instruction_set_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LT4REC_SPARSE_ISA", "none")
    with pytest.raises(CError, match="LT4REC_SPARSE_ISA: got none") as error:
        exported(make(), tmp_path)
    assert error.value.status == BAD_ISA


@settings(deadline=None)
@given(ROWS, st.integers(1, 3))
def test_values_of_every_kind_are_read_as_python_reads_them(
    ranker: Ranker, model: Model, rows: list[dict[str, Any]], threads: int
) -> None:
    columns = columns_of(rows)
    columns["age"] = [float(v) if isinstance(v, int) else v for v in columns["age"]]
    assert (model.score(columns, len(rows), threads) == wanted(ranker, columns)).all()


@settings(deadline=None)
@given(st.text(alphabet="ab, \t|\x1c\x85\u3000\u2028é1-+", max_size=12), st.sampled_from(["tags", "words"]))
def test_a_bag_as_text_is_split_as_python_splits_it(ranker: Ranker, model: Model, text: str, name: str) -> None:
    columns = COLUMNS | {name: [text, None, text]}
    assert (model.score(columns, 3) == wanted(ranker, columns)).all()


def test_ints_as_text_are_read_or_refused(ranker: Ranker, model: Model) -> None:
    columns = COLUMNS | {"seen": ["1, 2,+2", None, " -5"]}
    assert (model.score(columns, 3) == wanted(ranker, columns)).all()
    with pytest.raises(CError, match="column seen: row 1: got other text, wanted ints") as error:
        model.score(COLUMNS | {"seen": ["1", "1.5", "2"]}, 3)
    assert error.value.status == BAD_VALUE


def test_vectors_stand_in_for_a_column(tmp_path: Path, ranker: Ranker, model: Model) -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    for given_rows in (vectors, vectors[:1]):
        scores = ranker.score(COLUMNS, {"video": given_rows})
        got = model.score(COLUMNS | {"video": given_rows}, 3)
        assert (got == np.stack([scores["ctr"], scores["cvr"]], 1)).all()
    with pytest.raises(CError, match="column video: row 1: got a vector with inf") as error:
        model.score(COLUMNS | {"video": np.array([[0] * 5, [math.inf] * 5, [0] * 5])}, 3)
    assert error.value.status == BAD_VALUE


def test_a_table_that_is_elsewhere_wants_vectors(tmp_path: Path, ranker: Ranker) -> None:
    small = Ranker(ranker.encoder, ranker.inputs.without(["colour"]), ranker.mlp)
    model = exported(small, tmp_path)
    assert [name for name, field in model.fields.items() if field.wants_vectors] == ["colour"]
    vectors = np.ones((1, 5), np.float32)
    scores = small.score(COLUMNS, {"colour": vectors})
    assert (model.score(COLUMNS | {"colour": vectors}, 3)[:, 0] == scores["ctr"]).all()
    with pytest.raises(CError, match="column colour: got strings, wanted vectors") as error:
        model.score(COLUMNS, 3)
    assert error.value.status == BAD_TYPE
    model.close()


def test_no_candidates_are_no_error(model: Model) -> None:
    assert model.score({name: [] for name in COLUMNS}, 0).shape == (0, 2)
    with model.request(0) as request:
        request.set_columns({name: values[:1] for name, values in COLUMNS.items()})
        rows, *_ = request.rank(4)
        assert len(rows) == 0


def test_one_model_serves_many_threads(ranker: Ranker, model: Model) -> None:
    columns = {rows: shown_rows(rows) for rows in (1, 5, 150)}
    right = {rows: wanted(ranker, of_rows) for rows, of_rows in columns.items()}
    wrong: list[int] = []

    def serve(first: int) -> None:
        for turn in range(12):
            rows = (1, 5, 150)[(first + turn) % 3]
            if not (model.score(columns[rows], rows, 1 + turn % 2) == right[rows]).all():
                wrong.append(rows)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_request_is_used_again_and_forgets_what_it_was_given(ranker: Ranker, model: Model) -> None:
    with model.request(200) as request:
        for rows in (200, 1, 3, 200):
            request.begin(rows)
            request.set_columns(shown_rows(rows))
            assert (request.score() == wanted(ranker, shown_rows(rows))).all()
            assert (request.score(2) == wanted(ranker, shown_rows(rows))).all()
        request.begin(3)
        with pytest.raises(CError, match="column video: got nothing, wanted values of 1 row or 3") as error:
            request.score()
        assert error.value.status == NOT_SET


# --- Ranking ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 70),
    st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 2.0])] * 3),
    st.lists(st.sampled_from([0.0, 1.0, 7.5]), min_size=60, max_size=60),
)
def test_candidates_are_ranked_as_the_ranker_ranks_them(
    ranker: Ranker, model: Model, rows: int, k: int, powers: tuple[float, float, float], lengths: list[float]
) -> None:
    columns = shown_rows(rows)
    by = {"ctr": powers[0], "cvr": powers[1], "length": powers[2]}
    right = ranker.rank(columns | {"length": lengths[:rows]}, k=k, by=by)
    with model.request(rows) as request:
        request.set_columns(columns)
        order, rank_scores, scores = request.rank(k, list(powers[:2]), lengths[:rows], powers[2])
        assert (order == right.rows).all() and (rank_scores == right.rank_scores).all()
        assert (scores == np.stack([right.scores["ctr"], right.scores["cvr"]], 1)).all()
        default, *_ = request.rank(k)
        assert (default == ranker.rank(columns, k=k).rows).all()


def test_other_exponents_are_those_of_the_c_library(ranker: Ranker, model: Model) -> None:
    scores = wanted(ranker, COLUMNS)
    with model.request(3) as request:
        request.set_columns(COLUMNS)
        rows, rank_scores, _ = request.rank(3, [0.3, 1.7])
    for row, rank_score in zip(rows, rank_scores, strict=True):
        assert rank_score == math.pow(scores[row, 0], 0.3) * math.pow(scores[row, 1], 1.7)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ({"k": 0}, BAD_ARGUMENT, "k: got 0, wanted at least 1"),
        ({"k": 2, "powers": [1.0, -1.0]}, BAD_ARGUMENT, "powers: got -1 of cvr"),
        ({"k": 2, "powers": [math.nan, 1.0]}, BAD_ARGUMENT, "powers: got nan of ctr"),
        ({"k": 2, "factor": [1.0, math.inf, 1.0]}, BAD_VALUE, "factor: got inf in row 1"),
        ({"k": 2, "factor": [1.0, math.nan, 1.0]}, BAD_VALUE, "factor: got nan in row 1"),
        ({"k": 2, "factor": [1.0, 1.0, 1.0], "factor_power": -2.0}, BAD_ARGUMENT, "factor_power: got -2"),
        ({"k": 2, "factor": [1.0, 1e200, 1.0], "factor_power": 2.0}, BAD_VALUE, "rank score of row 1: got inf"),
        ({"k": 2, "threads": 0}, BAD_ARGUMENT, "threads: got 0, wanted at least 1"),
    ],
)
def test_a_wrong_ranking_is_refused(model: Model, arguments: dict[str, Any], status: int, message: str) -> None:
    with model.request(3) as request:
        request.set_columns(COLUMNS)
        with pytest.raises(CError, match=message) as error:
            request.rank(**arguments)
        assert error.value.status == status


# --- Values that are refused ------------------------------------------------------------------------------------------


def test_wrong_values_are_refused_by_name(model: Model) -> None:
    fields = list(model.fields)
    library, three = model.library, np.arange(3)
    with model.request(3) as request:
        cases = [
            (
                "set_doubles",
                "video",
                np.array([1.0, 1.5, 2.0]),
                BAD_VALUE,
                "column video: row 1: got 1.5, wanted an int",
            ),
            ("set_doubles", "video", np.array([1.0, 2.0**63, 2.0]), BAD_VALUE, "column video: row 1"),
            ("set_ints", "colour", three, BAD_TYPE, "column colour: got ints, wanted strings"),
            ("set_ints", "seen", three, BAD_TYPE, "column seen: got ints, wanted bags of ints"),
            ("set_strings", "price", three, BAD_TYPE, "column price: got strings, wanted doubles"),
        ]
        for call, name, values, status, message in cases:
            with pytest.raises(CError, match=message) as error:
                request.check(getattr(library, call)(request.handle, fields.index(name), values.ctypes.data, None, 3))
            assert error.value.status == status
        for rows in (0, 2, 4, -1):
            with pytest.raises(CError, match=f"column video: got {rows} rows, wanted 1 or 3") as error:
                request.check(library.set_ints(request.handle, fields.index("video"), three.ctypes.data, None, rows))
            assert error.value.status == BAD_ROWS
        for place in (-1, len(fields)):
            with pytest.raises(CError, match=f"field: got {place}") as error:
                request.check(library.set_ints(request.handle, place, three.ctypes.data, None, 3))
            assert error.value.status == BAD_ARGUMENT
        with pytest.raises(CError, match="column video: got NULL"):
            request.check(library.set_ints(request.handle, fields.index("video"), None, None, 3))
        with pytest.raises(CError, match="column seen: got offsets 2, 1 of row 1, wanted ascending"):
            offsets = np.array([0, 2, 1, 3])
            place = fields.index("seen")
            request.check(library.set_int_bags(request.handle, place, three.ctypes.data, None, offsets.ctypes.data, 3))


def test_text_that_is_no_utf8_is_refused(model: Model) -> None:
    with model.request(1) as request:
        request.set_columns({name: values[:1] for name, values in COLUMNS.items()})
        for text in (b"\xff", b"\xc3", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xe0\x80\x80"):
            values = (String * 1)(String(text, len(text)))
            place = list(model.fields).index("colour")
            with pytest.raises(CError, match="column colour: row 0: got other bytes, wanted UTF-8"):
                request.check(model.library.set_strings(request.handle, place, ctypes.addressof(values), None, 1))
            with pytest.raises(CError, match="column colour: got nothing"):  # what was there before is gone
                request.score()


def test_numbers_cross_over_where_they_lose_nothing(ranker: Ranker, model: Model) -> None:
    fields, right = list(model.fields), wanted(ranker, COLUMNS | {"video": [1, 2, 3], "age": [1, 2, 3]})
    with model.request(3) as request:
        request.set_columns(COLUMNS)
        doubles, ints = np.array([1.0, 2.0, 3.0]), np.array([1, 2, 3])
        request.check(model.library.set_doubles(request.handle, fields.index("video"), doubles.ctypes.data, None, 3))
        request.check(model.library.set_ints(request.handle, fields.index("age"), ints.ctypes.data, None, 3))
        assert (request.score() == right).all()


# --- Files ------------------------------------------------------------------------------------------------------------


def test_what_a_file_says_of_itself(ranker: Ranker, model: Model) -> None:
    assert model.tasks == list(ranker.tasks) and list(model.fields) == [f.column for f in ranker.encoder.fields]
    assert model.facts.dim == 5 and model.facts.precision == 0 and model.facts.isa.decode() == cpu.isa()
    assert {name for name, field in model.fields.items() if field.is_common} == set(COMMON)
    assert {name for name, field in model.fields.items() if field.is_bag} == {"tags", "seen", "words"}


def test_a_file_is_the_same_every_time_and_shares_what_tasks_share(tmp_path: Path, ranker: Ranker) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        ranker.to_engine_file(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    once = sum(layer.weight.nbytes for layer in ranker.mlp.network.hidden)
    assert paths[0].stat().st_size < 1.5 * once + ranker.inputs.nbytes + 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("precision", "message"),
    [("fp16", "precision: got 'fp16', wanted one of fp32, bf16, int8"), ("int8", "precision: got int8 of a network")],
)
def test_precisions_that_are_not_there_are_refused(
    tmp_path: Path, ranker: Ranker, precision: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ranker.to_engine_file(tmp_path / "model.engine", precision)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    ranker = make()
    with torch.no_grad():
        ranker.inputs.embedding[3, 2] = math.inf
    with pytest.raises(InputError, match="embeddings: got NaN or Inf"):
        ranker.to_engine_file(tmp_path / "model.engine")


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # to open one for reading would wait for a writer
    places = (
        (tmp_path / "absent", "No such file"),
        (tmp_path, "Invalid argument"),
        (tmp_path / "pipe", "Invalid argument"),
    )
    for path, message in places:
        with pytest.raises(CError, match=message) as error:
            Model(path)
        assert error.value.status == CANNOT_READ


def sealed(contents: bytearray) -> bytes:
    """Give a changed file its checksum."""
    at = engine_file.HEADER.fields["sha256"][1]
    contents[at : at + 32] = bytes(32)
    contents[at : at + 32] = hashlib.sha256(contents).digest()
    return bytes(contents)


def refusal(contents: bytes) -> str:
    with pytest.raises(CError) as error:
        Model(contents)
    assert error.value.status == BAD_FILE
    return str(error.value)


def test_every_changed_byte_and_every_shorter_file_is_refused(tmp_path: Path, ranker: Ranker) -> None:
    ranker.to_engine_file(tmp_path / "model.engine")
    whole = (tmp_path / "model.engine").read_bytes()
    generator = np.random.default_rng(0)
    for place in [*range(208), *generator.integers(208, len(whole), 300)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        assert refusal(bytes(damaged)).startswith(("magic", "version", "bytes", "sha256"))
    for size in [0, 1, 207, 208, *generator.integers(209, len(whole), 20)]:
        assert refusal(whole[:size]).startswith(("file", "bytes"))
    assert refusal(whole + b"\0").startswith("bytes")


RECORDS = {
    "fields": engine_file.FIELD,
    "tables": engine_file.TABLE,
    "tasks": engine_file.TASK,
    "common_layers": engine_file.LAYER,
    "own_layers": engine_file.LAYER,
}


class Editor:
    """A file whose structures can be written to."""

    def __init__(self, contents: bytes) -> None:
        self.contents = bytearray(contents)
        self.header = np.frombuffer(self.contents, engine_file.HEADER, 1)

    def records(self, section: str) -> Any:
        offset, count = (int(x) for x in self.header[section][0])
        return np.frombuffer(self.contents, RECORDS[section], count, offset)

    def of_header(self, part: str, value: Any, word: str | None = None) -> None:
        (self.header if word is None else self.header[part])[word or part] = value

    def of_record(self, section: str, place: int, part: str, value: Any, word: str | None = None) -> None:
        records = self.records(section)
        (records if word is None else records[part])[word or part][place] = value

    def of_array(self, array: Any, dtype: str, place: int, value: Any) -> None:
        np.frombuffer(self.contents, dtype, int(array["count"]), int(array["offset"]))[place] = value

    def of_array_in(self, section: str, record: int, part: str, dtype: str, place: int, value: Any) -> None:
        self.of_array(self.records(section)[part][record], dtype, place, value)

    def of_array_of(self, part: str, dtype: str, place: int, value: Any) -> None:
        self.of_array(self.header[part][0], dtype, place, value)

    def copy(self, section: str, part: str, of: int, to: int) -> None:
        self.of_record(section, to, part, self.records(section)[part][of])

    def give_two_biases(self) -> None:
        self.of_record("own_layers", 0, "bias", self.records("common_layers")["bias"][0])


EDITS: list[tuple[str, tuple[Any, ...]]] = [
    (r"version: got 3, wanted 2", ("of_header", "version", 3)),
    (r"precision: got 3", ("of_header", "precision", 3)),
    (r"rows_kind: got 3", ("of_header", "rows_kind", 3)),
    (r"dim: got 0, wanted 1 to 65536", ("of_header", "dim", 0)),
    (r"embedding: got .* whole rows", ("of_header", "dim", 7)),
    (r"fields: got 9 elements at offset .*, wanted them within", ("of_header", "fields", 2**64 - 8, "offset")),
    (r"fields: got \d+, wanted 1 to 4096", ("of_header", "fields", 2**64 - 8, "count")),
    (r"tables: got .* elements", ("of_header", "tables", 2**62, "count")),
    (r"tables: got 3, wanted an offset", ("of_header", "tables", 3, "offset")),
    (r"own_columns: got .* elements", ("of_header", "own_columns", 2**61, "count")),
    (r"common_columns and own_columns: got", ("of_header", "own_columns", 2, "count")),
    (r"scales: got 7, wanted 0", ("of_header", "scales", 7, "count")),
    (r"common_layers: got 1, wanted 2", ("of_header", "common_layers", 1, "count")),
    (r"own_layers: got no head at the end", ("of_header", "own_layers", 5, "count")),
    (r"own_layers: got 1 heads, wanted 2", ("of_header", "own_layers", 3, "count")),
    (r"fields\[0\].table: got 99", ("of_record", "fields", 0, "table", 99)),
    (r"fields\[1\].zero: got 1", ("of_record", "fields", 1, "zero", 1)),
    (r"fields\[1\].is_bag: got 2", ("of_record", "fields", 1, "is_bag", 2)),
    (r"fields\[1\].is_bag: got 0 after a bag", ("of_record", "fields", 0, "is_bag", 1)),
    (r"fields: got 9, wanted fewer", ("of_record", "fields", slice(None), "is_common", 1)),
    (r"common_columns\[0\]: .* common fields alone", ("of_record", "fields", slice(None), "is_common", 0)),
    (r"fields\[2\].name: got other bytes", ("of_record", "fields", 2, "name", 0, "count")),
    (r"fields\[2\].name: got other bytes", ("of_record", "fields", 2, "name", 3, "count")),
    (r"fields\[2\].name: got other bytes", ("of_array_in", "fields", 2, "name", "u1", 0, 255)),
    (r"fields\[2\].name: got other bytes", ("of_array_in", "fields", 2, "name", "u1", 1, 0)),
    (r"fields\[1\].name: got video, wanted another", ("copy", "fields", "name", 0, 1)),
    (r"tasks\[1\].name: got ctr, wanted another", ("copy", "tasks", "name", 0, 1)),
    (r"tables\[0\].kind: got 5", ("of_record", "tables", 0, "kind", 5)),
    (r"tables\[0\].size: got 3", ("of_record", "tables", 0, "size", 3)),
    (r"tables\[0\].size: got 1, wanted 2 to", ("of_record", "tables", 0, "size", 1)),
    (r"tables\[0\].first_row: got 900", ("of_record", "tables", 0, "first_row", 900)),
    (r"tables\[0\].first_row: got -2", ("of_record", "tables", 0, "first_row", -2)),
    (r"tables\[0\].first_row: got 9223372036854775807", ("of_record", "tables", 0, "first_row", 2**63 - 1)),
    (r"tables\[2\].offsets: got 0 at 2, wanted asc", ("of_array_in", "tables", 2, "offsets", "<i8", 2, 0)),
    (r"tables\[2\].offsets: got 999 last", ("of_array_in", "tables", 2, "offsets", "<i8", -1, 999)),
    (r"tables\[2\].offsets: got none", ("of_record", "tables", 2, "offsets", 0, "count")),
    (r"tables\[2\].keys: got other bytes in key", ("of_array_in", "tables", 2, "keys", "u1", 0, 255)),
    (r"tables\[1\].keys: got nan at 1, wanted asc", ("of_array_in", "tables", 1, "keys", "<f8", 1, math.nan)),
    (r"tables\[1\].keys: got .* at 2, wanted asc", ("of_array_in", "tables", 1, "keys", "<f8", 1, 99)),
    (r"embedding: got nan at 12", ("of_array_of", "embedding", "<f4", 12, math.nan)),
    (r"own_columns\[0\]: got -1", ("of_array_of", "own_columns", "<i8", 0, -1)),
    (r"own_columns\[\d+\]: got 7, wanted each input once", ("of_array_of", "own_columns", "<i8", 0, 7)),
    (r"common_columns\[0\]: got 0, wanted an input", ("of_array_of", "common_columns", "<i8", 0, 0)),
    (r"own_layers\[0\].in_features: got 0", ("of_record", "own_layers", 0, "in_features", 0)),
    (r"own_layers\[0\].out_features: got 4294967295", ("of_record", "own_layers", 0, "out_features", 2**32 - 1)),
    (r"own_layers\[1\].in_features: got 47, wanted 48", ("of_record", "own_layers", 1, "in_features", 47)),
    (r"own_layers\[0\].out_features: got 48, wanted 1", ("of_record", "own_layers", 0, "is_head", 1)),
    (r"own_layers\[0\].takes_bias: got 0, wanted 1", ("of_record", "own_layers", 0, "takes_bias", 0)),
    (r"own_layers\[1\].takes_bias: got 1, wanted 0", ("of_record", "own_layers", 1, "takes_bias", 1)),
    (r"own_layers\[1\].activation: got 11", ("of_record", "own_layers", 1, "activation", 11)),
    (r"own_layers\[1\].slope: got inf", ("of_record", "own_layers", 1, "slope", math.inf)),
    (r"own_layers\[1\].slopes: got some for activation 1, w", ("of_record", "own_layers", 1, "slopes", 2, "count")),
    (r"own_layers\[1\].slopes: got 0, wanted 96", ("of_record", "own_layers", 1, "activation", 10)),
    (r"own_layers\[1\].bias: got 31, wanted 32", ("of_record", "own_layers", 1, "bias", 31, "count")),
    (r"own_layers\[1\].planes: got 1, wanted", ("of_record", "own_layers", 1, "planes", 1, "count")),
    (r"own_layers\[1\].tasks: got 0", ("of_record", "own_layers", 1, "tasks", 0)),
    (r"own_layers\[1\].input_scale: got 1e-300", ("of_record", "own_layers", 1, "input_scale", 1e-300)),
    (r"own_layers\[1\].input_zero_point: got 256", ("of_record", "own_layers", 1, "input_zero_point", 256)),
    (r"own_layers\[1\].is_blocks: got 2", ("of_record", "own_layers", 1, "is_blocks", 2)),
    (r"own_layers\[1\].values: got inf at 3", ("of_array_in", "own_layers", 1, "values", "<f4", 3, math.inf)),
    (r"own_layers: layer 1: task: got 7", ("of_record", "own_layers", 1, "task", 7)),
    (r"own_layers: layer 1: planes: got", ("of_record", "own_layers", 1, "values", 5, "count")),
    (r"own_layers: layer 0: takes_bias: got 1 and a bias", ("give_two_biases",)),
    (r"common_layers\[1\].activation: got 1, wanted 0", ("of_record", "common_layers", 1, "activation", 1)),
    (r"common_layers\[0\].is_head: got 0, wanted 1", ("of_record", "common_layers", 0, "is_head", 0)),
]


@pytest.mark.parametrize(("message", "edit"), EDITS, ids=[message for message, _ in EDITS])
def test_each_rule_of_the_file_is_checked(tmp_path: Path, ranker: Ranker, message: str, edit: tuple[Any, ...]) -> None:
    ranker.to_engine_file(tmp_path / "model.engine")
    editor = Editor((tmp_path / "model.engine").read_bytes())
    name, *arguments = edit
    getattr(editor, name)(*arguments)
    got = refusal(sealed(editor.contents))
    assert re.match(message, got), got


def test_a_wrong_argument_of_open_is_named(tmp_path: Path, ranker: Ranker) -> None:
    path = tmp_path / "model.engine"
    ranker.to_engine_file(path)
    apart = np.frombuffer(b"\0" + path.read_bytes(), np.uint8)
    handle, why = ctypes.c_void_p(), ctypes.create_string_buffer(b"stale", 512)
    library = Model(path).library
    for address in (0, apart.ctypes.data + 1):
        assert library.open_memory(address, len(apart) - 1, ctypes.byref(handle), why) == BAD_ARGUMENT
        assert why.value.startswith(b"bytes, model: got NULL, or an address")
    assert library.open(None, ctypes.byref(handle), why) == BAD_ARGUMENT
    assert why.value == b"path, model: got NULL, wanted both"
