"""csrc/lt4rec.h through ctypes: columns as Python has them in, arrays out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lt4rec_sparse.kernels import cpu

OK, BAD_FILE, CANNOT_READ, BAD_ISA, BAD_ARGUMENT, BAD_TYPE, BAD_VALUE, BAD_ROWS, NOT_SET = range(9)
INTS, STRINGS, DOUBLES = range(3)
MESSAGE_BYTES = 512
POINTER, INT64 = ctypes.c_void_p, ctypes.c_int64


class String(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char_p), ("size", ctypes.c_size_t)]


class ModelFacts(ctypes.Structure):
    _fields_ = [
        ("fields", INT64),
        ("tasks", INT64),
        ("dim", INT64),
        ("precision", ctypes.c_int),
        ("isa", ctypes.c_char_p),
    ]


class FieldFacts(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p)] + [
        (name, ctypes.c_int) for name in ("type", "is_bag", "is_common", "wants_vectors")
    ]


class RankingOrder(ctypes.Structure):
    _fields_ = [("powers", POINTER), ("factor", POINTER), ("factor_power", ctypes.c_double)]


SIGNATURES = {
    "open": [ctypes.c_char_p, POINTER, ctypes.c_char_p],
    "open_memory": [POINTER, ctypes.c_size_t, POINTER, ctypes.c_char_p],
    "close": [POINTER],
    "describe": [POINTER, POINTER],
    "describe_field": [POINTER, INT64, POINTER],
    "task_name": [POINTER, INT64, POINTER],
    "find_field": [POINTER, ctypes.c_char_p, POINTER],
    "find_task": [POINTER, ctypes.c_char_p, POINTER],
    "request_new": [POINTER, POINTER],
    "request_free": [POINTER],
    "begin": [POINTER, INT64],
    "set_ints": [POINTER, INT64, POINTER, POINTER, INT64],
    "set_doubles": [POINTER, INT64, POINTER, POINTER, INT64],
    "set_strings": [POINTER, INT64, POINTER, POINTER, INT64],
    "set_int_bags": [POINTER, INT64, POINTER, POINTER, POINTER, INT64],
    "set_string_bags": [POINTER, INT64, POINTER, POINTER, POINTER, INT64],
    "set_vectors": [POINTER, INT64, POINTER, INT64],
    "score": [POINTER, ctypes.c_int, POINTER],
    "rank": [POINTER, ctypes.c_int, POINTER, INT64, POINTER, POINTER, POINTER, POINTER],
}


class CError(Exception):
    """A status that is not OK; the message is the library's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Library:
    """The functions of lt4rec.h, without their prefix; the engine of the Python package has them too."""

    def __init__(self, path: str | Path | None = None) -> None:
        self._library = ctypes.CDLL(str(path or cpu.engine().__file__))
        for name, arguments in SIGNATURES.items():
            function = getattr(self._library, f"lt4rec_{name}")
            function.argtypes, function.restype = arguments, ctypes.c_int
            setattr(self, name, function)
        for name, argument in {"status_text": ctypes.c_int, "message": POINTER}.items():
            function = getattr(self._library, f"lt4rec_{name}")
            function.argtypes, function.restype = [argument], ctypes.c_char_p
            setattr(self, name, function)


class Model:
    def __init__(self, source: str | Path | bytes, library: Library | None = None) -> None:
        self.library = library or Library()
        handle, message = POINTER(), ctypes.create_string_buffer(MESSAGE_BYTES)
        if isinstance(source, bytes):
            self._bytes = np.frombuffer(source + bytes(-len(source) % 8), np.uint64).copy()
            status = self.library.open_memory(self._bytes.ctypes.data, len(source), ctypes.byref(handle), message)
        else:
            status = self.library.open(str(source).encode(), ctypes.byref(handle), message)
        if status != OK:
            raise CError(status, message.value.decode())
        self.handle = handle
        self.facts = ModelFacts()
        assert self.library.describe(handle, ctypes.byref(self.facts)) == OK
        self.fields: dict[str, FieldFacts] = {}
        for i in range(self.facts.fields):
            facts = FieldFacts()
            assert self.library.describe_field(handle, i, ctypes.byref(facts)) == OK
            self.fields[facts.name.decode()] = facts
        name = ctypes.c_char_p()
        self.tasks = []
        for i in range(self.facts.tasks):
            assert self.library.task_name(handle, i, ctypes.byref(name)) == OK
            self.tasks.append(name.value.decode())

    @contextmanager
    def request(self, rows: int) -> Iterator[Request]:
        request = Request(self)
        try:
            request.begin(rows)
            yield request
        finally:
            assert self.library.request_free(request.handle) == OK

    def score(self, columns: Mapping[str, Any], rows: int, threads: int = 1) -> np.ndarray:
        with self.request(rows) as request:
            request.set_columns(columns)
            return request.score(threads)

    def close(self) -> None:
        assert self.library.close(self.handle) == OK


class Request:
    def __init__(self, model: Model) -> None:
        self.model, self.library, self.handle = model, model.library, POINTER()
        assert self.library.request_new(model.handle, ctypes.byref(self.handle)) == OK
        self._vectors: list[np.ndarray] = []

    def check(self, status: int) -> None:
        if status != OK:
            raise CError(status, self.library.message(self.handle).decode())

    def begin(self, rows: int) -> None:
        self.rows = rows
        self._vectors = []
        self.check(self.library.begin(self.handle, rows))

    def set_columns(self, columns: Mapping[str, Any]) -> None:
        for name in self.model.fields:
            self.set(name, columns[name])

    def set(self, name: str, values: Any) -> None:
        field, place = self.model.fields[name], list(self.model.fields).index(name)
        if isinstance(values, np.ndarray) and values.ndim == 2:
            self._vectors.append(np.ascontiguousarray(values, np.float32))
            self.check(self.library.set_vectors(self.handle, place, self._vectors[-1].ctypes.data, len(values)))
            return
        texts = field.is_bag and all(isinstance(v, str) or v is None for v in values) and any(values)
        flat, offsets = values, None
        if field.is_bag and not texts:
            flat = [v for row in values for v in row or ()]
            offsets = np.cumsum([0, *(len(row or ()) for row in values)], dtype=np.int64)
        valid = np.array([v is not None for v in flat], np.uint8)
        if field.type == STRINGS or texts:
            encoded = [("" if v is None else v).encode("utf-8", "surrogatepass") for v in flat]
            array: Any = (String * len(flat))(*(String(text, len(text)) for text in encoded))
            pointer, kind = ctypes.addressof(array), "string"
        else:
            is_double = field.type == DOUBLES
            array = np.array([0 if v is None else v for v in flat], np.float64 if is_double else np.int64)
            pointer, kind = array.ctypes.data, "double" if is_double else "int"
        validity = None if valid.all() else valid.ctypes.data
        if offsets is None:
            call = getattr(self.library, f"set_{kind}s")
            self.check(call(self.handle, place, pointer, validity, len(values)))
        else:
            call = getattr(self.library, f"set_{kind}_bags")
            self.check(call(self.handle, place, pointer, validity, offsets.ctypes.data, len(values)))

    def score(self, threads: int = 1) -> np.ndarray:
        scores = np.full((self.rows, self.model.facts.tasks), np.nan, np.float32)
        self.check(self.library.score(self.handle, threads, scores.ctypes.data))
        return scores

    def rank(
        self,
        k: int,
        powers: list[float] | None = None,
        factor: list[float] | None = None,
        factor_power: float = 1.0,
        threads: int = 1,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        best = max(0, min(k, self.rows))
        rows, rank_scores = np.full(best, -1), np.full(best, np.nan)
        scores, count = np.full((best, self.model.facts.tasks), np.nan, np.float32), INT64()
        of_tasks, of_rows = (None if x is None else np.array(x, np.float64) for x in (powers, factor))
        order = RankingOrder(
            None if of_tasks is None else of_tasks.ctypes.data,
            None if of_rows is None else of_rows.ctypes.data,
            factor_power,
        )
        status = self.library.rank(
            self.handle,
            threads,
            ctypes.byref(order),
            k,
            rows.ctypes.data,
            rank_scores.ctypes.data,
            scores.ctypes.data,
            ctypes.byref(count),
        )
        self.check(status)
        assert count.value == best
        return rows, rank_scores, scores
