"""A feature store: what goes in comes out by key, unknown keys are missing, and a reload is all or nothing."""

import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse import checked_file
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker import ArtefactError
from lt4rec_sparse.ranker.features import Column, Schema
from lt4rec_sparse.ranker.features import raw as raw_columns
from lt4rec_sparse.ranker.features.tables import hash64
from lt4rec_sparse.ranker.store import FeatureStore, FeatureTable, write_features
from lt4rec_sparse.ranker.store.columns import from_arrays, from_raw
from lt4rec_sparse.ranker.store.file import KIND

SCHEMA = Schema.from_dict(
    {
        "name": "shop",
        "context": ["age"],
        "files": {"log": ["log.csv"]},
        "joins": [{"files": ["items.csv"], "on": "item"}, {"files": ["shops.csv"], "on": "shop", "type": "string"}],
        "time": {"day": "date"},
        "group": {"column": "user", "type": "string"},
        "columns": [
            {"name": "item", "type": "int"},
            {"name": "brand", "type": "int"},
            {"name": "colour"},
            {"name": "price", "kind": "dense"},
            {"name": "tags", "kind": "multi"},
            {"name": "sizes", "kind": "multi", "type": "int"},
            {"name": "city"},
            {"name": "hour", "type": "int"},
            {"name": "age"},
        ],
        "tasks": [{"name": "ctr", "kind": "binary", "label": "is_click"}],
        "histories": [{"name": "clicked", "when": "is_click", "columns": ["item", "colour"], "rates": True}],
    }
)
ITEMS = FeatureTable(
    "item",
    [7, 3, 9],
    {
        "brand": [1, None, 2**60 + 1],
        "colour": ["red", None, "blue"],
        "price": [1.5, None, -0.0],
        "tags": [["a", "b"], [], ["b"]],
        "sizes": [[1], [2, 3], []],
    },
)
SHOPS = FeatureTable("shop", ["x", "", "y"], {"city": ["Ulm", None, "Bonn"]})
USERS = FeatureTable(
    "user",
    hash64(np.array(["eve", "bob"], object)).view(np.int64),
    {
        "clicked_count": [3, 0],
        "clicked_rate": [0.25, None],
        "clicked_item": [[7, 9, 7], []],
        "clicked_colour": [["red"], []],
    },
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "features.safetensors"
    write_features(path, SCHEMA, [ITEMS, SHOPS, USERS], "2022-05-01")
    return path


def listed(raw):
    """Return a raw column row by row, None where missing."""
    if isinstance(raw, tuple):
        values, offsets = raw
        return [values[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    return [None if value != value else value for value in np.ma.asarray(raw).tolist()]


def test_ids_become_features(path):
    store = FeatureStore.open(path, SCHEMA)
    candidates, context = store.complete(
        {"item": [9, 7, 4, None], "hour": [1, 2, 3, 4]}, {"user": ["eve"], "shop": ["x"]}
    )
    assert {name: listed(raw) for name, raw in candidates.items()} == {
        "item": [9, 7, 4, None],
        "hour": [1, 2, 3, 4],
        "brand": [2**60 + 1, 1, None, None],
        "colour": ["blue", "red", None, None],
        "price": [0.0, 1.5, None, None],
        "tags": [["b"], ["a", "b"], [], []],
        "sizes": [[], [1], [], []],
    }
    assert {name: listed(raw) for name, raw in context.items()} == {
        "user": ["eve"],
        "shop": ["x"],
        "city": ["Ulm"],
        "clicked_count": [3.0],
        "clicked_rate": [0.25],
        "clicked_item": [[7, 9, 7]],
        "clicked_colour": [["red"]],
    }


def test_a_user_without_a_past_has_a_count_of_none(path):
    _, context = FeatureStore.open(path).complete({"item": []}, {"user": ["new"], "shop": [None]})
    assert {name: listed(context[name]) for name in USERS.columns} == {
        "clicked_count": [0.0],
        "clicked_rate": [None],
        "clicked_item": [[]],
        "clicked_colour": [[]],
    }
    assert listed(context["city"]) == [None]


def test_it_says_what_it_has_and_what_a_request_brings(path):
    store = FeatureStore.open(path)
    assert store.day == "2022-05-01"
    assert store.absent == ("item", "hour", "age")
    assert store.columns == {
        **dict.fromkeys(ITEMS.columns, "item"),
        "city": "shop",
        **dict.fromkeys(USERS.columns, "user"),
    }


def test_what_a_request_has_stays_and_keys_are_wanted_for_the_rest(path):
    store = FeatureStore.open(path)
    own = {name: [[]] if name in ("tags", "sizes") else [None] for name in ITEMS.columns}
    candidates, context = store.complete(own, {"user": ["eve"], "city": ["Bonn"]})
    assert candidates == own and context["city"] == ["Bonn"]
    with pytest.raises(InputError, match="column 'item': got nothing, wanted keys: 'brand' is found by it"):
        store.complete({"hour": [1]}, {"user": ["eve"], "shop": ["x"]})
    with pytest.raises(InputError, match="column 'item': got 'seven'"):
        store.complete({"item": ["seven"]}, {"user": ["eve"], "shop": ["x"]})
    with pytest.raises(InputError, match="column 'item': got 7 "):
        store.complete({"item": 7}, {"user": ["eve"], "shop": ["x"]})


class Frame:
    """A table such as a data frame: columns by name, and no mapping."""

    def __init__(self, columns):
        self.columns, self._values = list(columns), columns

    def __getitem__(self, name):
        return self._values[name]


@pytest.mark.parametrize("table", [pa.table, pa.RecordBatch.from_pydict, Frame])
def test_a_request_may_be_of_tables_as_for_a_ranker(path, table):
    request = {"item": [9, 7, 4], "hour": [1, 2, 3]}, {"user": ["eve"], "shop": ["x"]}
    store = FeatureStore.open(path)
    made = store.complete(*map(table, request))
    for part, wanted in zip(made, store.complete(*request), strict=True):
        assert list(part) == list(wanted)
        for name, values in part.items():
            plain = values.to_pylist() if isinstance(values, pa.Array | pa.ChunkedArray) else listed(values)
            assert plain == listed(wanted[name])
    for wrong in ((3,), (request[0], 3)):
        with pytest.raises(InputError, match="columns: got int, wanted a dict of columns, a record batch or a data"):
            store.complete(*wrong)


def test_keys_of_candidates_may_be_users(path):
    candidates, _ = FeatureStore.open(path).complete({"item": [7, 7], "user": ["bob", "eve"]}, {"shop": ["x"]})
    assert listed(candidates["clicked_item"]) == [[], [7, 9, 7]]


INTS, FLOATS = st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False)
VALUES = {
    Column("c", type="int"): st.none() | INTS,
    Column("c"): st.none() | st.text(max_size=3),
    Column("c", "dense"): st.none() | FLOATS,
    Column("c", "multi", "int"): st.lists(INTS, max_size=3),
    Column("c", "multi"): st.lists(st.text(max_size=3), max_size=3),
}


@given(st.sampled_from(list(VALUES)).flatmap(lambda c: st.tuples(st.just(c), st.lists(VALUES[c]))), st.data())
def test_rows_of_a_column_are_what_was_stored(stored, data):
    column, values = stored
    made = from_raw(column, values)
    rows = np.array(data.draw(st.lists(st.integers(0, len(values)), min_size=1)), np.int64)
    wanted = [*values, [] if column.kind == "multi" else None]
    for one in (made, from_arrays(column, made.to_arrays())):
        assert len(one) == len(wanted)
        taken = one.take(rows, bool((rows < len(values)).all()))
        assert listed(taken) == [wanted[row] for row in rows]
        read, _ = raw_columns.bags(column, taken) if column.kind == "multi" else raw_columns.single(column, taken)
        direct = [wanted[row] for row in rows]
        again, _ = raw_columns.bags(column, direct) if column.kind == "multi" else raw_columns.single(column, direct)
        assert read.tolist() == again.tolist()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (FeatureTable("colour", ["red"], {}), "key: got 'colour', wanted one of item, shop, user"),
        (FeatureTable("item", [1, 1], {}), "keys of 'item': got one twice, wanted each once"),
        (FeatureTable("shop", ["x", "x"], {}), "keys of 'shop': got one twice, wanted each once"),
        (FeatureTable("user", np.array([5, 5]), {}), "keys of 'user': got one twice, wanted each once"),
        (FeatureTable("item", [1, None], {}), "keys of 'item': got a missing one, wanted values"),
        (FeatureTable("item", ["a"], {}), "column 'item': got 'a'"),
        (
            FeatureTable("item", [1], {"weight": [1]}),
            "column 'weight': got no feature, wanted one of the schema 'shop'",
        ),
        (FeatureTable("item", [1], {"age": ["x", "y"]}), "column 'age': got 2 rows, wanted 1, one per key"),
        (FeatureTable("item", [1], {"hour": ["x"]}), "column 'hour': got 'x'"),
        (FeatureTable("user", ["x"], {"brand": [1]}), "column 'brand': got it in two tables, wanted it in one"),
    ],
)
def test_wrong_tables_are_refused_and_nothing_is_written(tmp_path, table, message):
    with pytest.raises(InputError, match=message):
        write_features(tmp_path / "features.safetensors", SCHEMA, [ITEMS, table])
    assert not [*tmp_path.iterdir()]


def other_schema():
    return Schema.from_dict(SCHEMA.to_dict() | {"name": "shop 2", "histories": []})


def test_features_of_another_schema_are_refused(path):
    with pytest.raises(InputError, match=r"features of a model with another schema \('shop'\), wanted them for this"):
        FeatureStore.open(path, other_schema())


def test_a_reload_takes_the_new_file_and_a_bad_one_changes_nothing(path):
    store = FeatureStore.open(path)
    request = {"item": [7]}, {"user": ["eve"], "shop": ["x"]}
    before = store.complete(*request)[1]["clicked_count"].tolist()
    good = path.read_bytes()
    write_features(path, SCHEMA, [ITEMS, USERS], "2022-05-02")
    with pytest.raises(InputError, match="column 'city': got nothing by 'shop', wanted what is replaced"):
        store.reload()
    write_features(path, other_schema(), [FeatureTable("item", [7], {"brand": [1]})])
    with pytest.raises(InputError, match="with another schema"):
        store.reload()
    for bad in (good[:-1], good[:100], b"", bytes([*good[:-1], good[-1] ^ 1])):
        path.write_bytes(bad)
        with pytest.raises(ArtefactError, match=r"features\.safetensors: "):
            store.reload()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        store.reload()
    assert (store.day, store.complete(*request)[1]["clicked_count"].tolist()) == ("2022-05-01", before)
    write_features(path, SCHEMA, [ITEMS, SHOPS, users_with(8)], "2022-05-02")
    store.reload()
    assert store.day == "2022-05-02" and store.complete(*request)[1]["clicked_count"].tolist() == [8.0]


def users_with(count):
    return FeatureTable("user", USERS.keys, {**USERS.columns, "clicked_count": [count, count]})


def items_with(price):
    return FeatureTable("item", ITEMS.keys, {**ITEMS.columns, "price": [price] * 3})


def test_a_request_sees_the_old_features_or_the_new_ones(tmp_path):
    """Each file has one number in two tables; a request never finds two."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        write_features(path, SCHEMA, [items_with(float(number)), SHOPS, users_with(number)])
    store, seen, wrong, done = FeatureStore.open(paths[0]), set(), [], threading.Event()

    def read():
        while not done.is_set():
            candidates, context = store.complete({"item": [7, 3]}, {"user": ["bob"], "shop": ["x"]})
            seen.add(candidates["price"][0])
            if {*candidates["price"].tolist()} != {*context["clicked_count"].tolist()}:
                wrong.append((candidates, context))

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(10_000):
        store.reload(paths[turn % 2])
        if len(seen) == 2 and turn > 20:
            break
    done.set()
    reader.join()
    assert seen == {0.0, 1.0} and not wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"day": 3}, "day: got 3, wanted text or null"),
        ({"tables": {}}, "tables: got {}, wanted a list"),
        ({"tables": [{"key": "colour", "hashed": False, "columns": []}]}, "key: got 'colour'"),
        ({"tables": [{"key": "item", "hashed": True, "columns": []}]}, "hashed: got True"),
        ({"tables": [{"key": "item", "hashed": False, "columns": ["ghost"]}]}, "wanted a key and columns that are"),
        ({"tables": [3]}, "table 0: got 3"),
        ({"tables": [{"key": "item", "hashed": False, "columns": ["colour"]}]}, "column 'colour': places: got nothing"),
        ({"tables": [{"key": "item", "hashed": False, "columns": ["brand"] * 2}]}, "column 'brand': "),
        ({"schema": {}}, "schema"),
        ({"version": 2}, "version 2, wanted 1"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(path, changes, message):
    rewritten(path, changes, {})
    with pytest.raises(ArtefactError, match=message.replace("{", r"\{")):
        FeatureStore.open(path)


def rewritten(path: Path, changes, arrays) -> None:
    meta, tensors = checked_file.read(path, KIND, "a file of features", (1,))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, change in arrays.items():
        change(tensors[name])
    checked_file.write(path, KIND, json.loads(json.dumps(meta)) | changes, tensors)


@pytest.mark.parametrize(
    ("array", "change", "message"),
    [
        ("0.1.places", lambda places: places.fill_(2), "column 'colour': places: got 2 to 2, wanted -1 to 1"),
        ("0.3.starts", lambda starts: starts.fill_(1), "column 'tags': starts: got no ascending cut of 3 values"),
        ("0.3.item.places", lambda places: places.fill_(-1), "column 'tags': item: got a missing value in a bag"),
        ("0.4.item.missing", lambda missing: missing.fill_(1), "column 'sizes': item: got a missing value in a bag"),
        ("0.key.keys", lambda keys: keys.fill_(7), "keys of 'item': keys: got 7 twice, wanted each"),
        ("1.key.bytes", lambda text: text.fill_(ord("x")), "keys of 'shop': keys: got 'x' twice, wanted each once"),
    ],
)
def test_arrays_that_would_be_read_beyond_their_ends_are_refused(path, array, change, message):
    rewritten(path, {}, {array: change})
    with pytest.raises(ArtefactError, match=message):
        FeatureStore.open(path)
