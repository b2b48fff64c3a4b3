"""A request in the engine: the ids of the encoder, and scores that do not depend on how columns come."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import threading
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Layer, assert_exact, assert_rounding, mlp_reference
from rankers import COLUMNS, COMMON, ROWS, columns_of, make

from lt4rec_sparse import FrozenNetwork, Ranker, SparseMLP, ops
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.network import DenseLayer
from lt4rec_sparse.ranker.request import common_inputs, split_network

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")

RANKER, IN_ORDER = make(), make(context=False)


def engine_of(ranker: Ranker) -> ops.RequestEngine:
    engine = ranker._request_engine()
    assert engine is not None
    return engine


def by_ids(ranker: Ranker, columns: dict[str, Any]) -> torch.Tensor:
    """What the engine makes of the ids of the encoder."""
    features = ranker.encoder.encode(columns)
    scores = engine_of(ranker).score_ids(features.single, features.multi_values, features.multi_offsets)
    assert scores is not None
    return scores


def test_scores_are_those_of_the_two_parts_within_rounding() -> None:
    rows = [{name: values[i % 3] for name, values in COLUMNS.items()} for i in range(50)]
    for ranker in (RANKER, IN_ORDER, make(kind="fp16"), make(kind="int8"), make(dim=16), make(blocks=True)):
        features = ranker.encoder.encode(columns_of(rows))
        x = ranker.inputs(features)
        scores = ranker.score_encoded(features)
        for t, task in enumerate(ranker.tasks):
            dense = [ranker.mlp.network.layer(i, task) for i in range(ranker.mlp.network.depth)]
            layers = [Layer(layer.weight, layer.bias, layer.activation, layer.slope) for layer in dense]
            assert_rounding(scores[:, t : t + 1], mlp_reference(x, layers))


def test_inputs_in_common_are_split_and_none_is_lost() -> None:
    for ranker in (RANKER, make(blocks=True)):
        flags = [field.column in COMMON for field in ranker.encoder.fields]
        is_common = common_inputs(flags, ranker.inputs.dim)
        split = split_network(ranker.mlp.network, is_common)
        both = torch.cat([split.common_columns, split.own_columns])
        assert_exact(both.sort().values, torch.arange(len(is_common)))
        assert is_common[split.common_columns].all()
        if ranker is RANKER:
            assert not is_common[split.own_columns].any()
        whole, common, own = ranker.mlp.network.hidden[0].weight, split.common, split.own
        assert common is not None
        for task in ranker.tasks:
            parts = [common.hidden[0].weight.mask(task), own.hidden[0].weight.mask(task)]
            assert_exact(torch.cat(parts, 1), whole.mask(task)[:, both])


def test_without_anything_in_common_the_network_is_whole() -> None:
    features = IN_ORDER.encoder.encode(COLUMNS)
    split = split_network(IN_ORDER.mlp.network, torch.zeros(IN_ORDER.mlp.in_features, dtype=torch.bool))
    assert split.common is None and split.own is IN_ORDER.mlp.network
    assert_exact(IN_ORDER.score_encoded(features), by_ids(IN_ORDER, COLUMNS))


@settings(deadline=None)
@given(ROWS)
def test_lists_are_read_as_the_encoder_reads_them(rows: list[dict[str, Any]]) -> None:
    columns = columns_of(rows)
    scores = engine_of(RANKER).score(columns)
    if any(isinstance(v, int) and abs(v) > 1e300 for v in columns["age"]):
        assert scores is None
    else:
        assert scores is not None
        assert_exact(scores, by_ids(RANKER, columns))


@settings(deadline=None)
@given(ROWS, st.sets(st.sampled_from(sorted(COMMON))))
def test_what_is_given_once_changes_no_bit(rows: list[dict[str, Any]], once: set[str]) -> None:
    columns = columns_of(rows)
    for name in once:
        columns[name] = columns[name][:1] * len(rows)
    wanted = by_ids(RANKER, columns)
    context = {name: columns.pop(name)[:1] for name in once}
    for got in (engine_of(RANKER).score(columns, context), engine_of(RANKER).score(columns | context)):
        assert got is not None
        assert_exact(got, wanted)


@settings(deadline=None)
@given(ROWS, st.data())
def test_arrays_are_read_as_lists_are(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    columns = columns_of(rows)
    columns["age"] = [0.0 if isinstance(v, int) else v for v in columns["age"]]
    wanted = by_ids(RANKER, columns)
    arrays: dict[str, Any] = {}
    for name, values in columns.items():
        step = data.draw(st.sampled_from([1, 2, -1]))
        array = np.empty(len(values), object)
        array[:] = values
        if name in ("price", "age"):
            array = np.array([np.nan if v is None else v for v in values], np.float64)
        elif name in ("video", "seller") and all(v is not None for v in values):
            array = np.array(values, np.int64)
        elif name in ("shop", "colour") and all(v is not None and "\0" not in v for v in values):
            array = np.array(values, "U")
        if name in ("tags", "seen", "words"):
            arrays[name] = values
            if data.draw(st.booleans()):
                flat = [v for row in values for v in row or ()]
                items = np.empty(len(flat), object)
                items[:] = flat
                offsets = np.cumsum([0, *(len(row or ()) for row in values)])
                arrays[name] = items, offsets.astype(data.draw(st.sampled_from([np.int32, np.int64])))
        else:
            apart = np.repeat(array, 2) if step == 2 else array[::-1].copy() if step == -1 else array
            arrays[name] = apart[::step]
    scores = engine_of(RANKER).score(arrays)
    assert scores is not None
    assert_exact(scores, wanted)


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"])
def test_numbers_of_every_width_are_read(dtype: str) -> None:
    numbers = np.array([1, 2, 3, 100, 5], dtype)
    columns = {name: values + values[:2] for name, values in COLUMNS.items()}
    wanted = by_ids(RANKER, columns | dict.fromkeys(("video", "seller", "price", "age"), numbers))
    scores = engine_of(RANKER).score(columns | dict.fromkeys(("video", "seller", "price", "age"), numbers))
    assert scores is not None
    assert_exact(scores, wanted)


ARROW = {
    "video": [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.float64(), pa.dictionary(pa.int8(), pa.int64())],
    "price": [pa.float32(), pa.float64()],
    "colour": [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int16(), pa.string())],
    "tags": [pa.list_(pa.string()), pa.large_list(pa.large_string())],
    "seen": [pa.list_(pa.int64()), pa.large_list(pa.int16())],
    "shop": [pa.string(), pa.string_view()],
    "seller": [pa.int64(), pa.uint8()],
    "words": [pa.list_(pa.string())],
    "age": [pa.float64(), pa.int32()],
}


@settings(deadline=None)
@given(ROWS, st.data())
def test_arrow_is_read_as_lists_are(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    columns = columns_of(rows)
    for name in ("video", "seller"):
        columns[name] = [v if v is None else abs(v) % 100 for v in columns[name]]
    columns["seen"] = [[v if v is None else v % 100 for v in row] for row in columns["seen"]]
    columns["price"] = [v if v is None or v != v else round(v * 4) / 4 if abs(v) < 4 else 1.0 for v in columns["price"]]
    columns["age"] = [None if v is None or v != v or abs(v) > 9 else round(v) for v in columns["age"]]
    for name in ("colour", "shop", "tags", "words"):  # UTF-8 has no surrogates
        text = json.dumps(columns[name], ensure_ascii=False).encode(errors="replace").decode()
        columns[name] = json.loads(text)
    wanted = by_ids(RANKER, columns)
    given_columns: dict[str, Any] = {}
    for name, values in columns.items():
        array = pa.array(values, data.draw(st.sampled_from(ARROW[name])))
        if data.draw(st.booleans()):
            array = pa.concat_arrays([array.slice(0, 0), array, array])[len(array) :]  # with an offset
        cut = data.draw(st.integers(0, len(array)))
        is_chunked = data.draw(st.booleans())
        given_columns[name] = pa.chunked_array([array[:cut], array[cut:]]) if is_chunked else array
    scores = engine_of(RANKER).score(given_columns)
    assert scores is not None
    assert_exact(scores, wanted)


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="ab, \t|\x1c\x85\u3000é1\uff12-+_", max_size=12), st.sampled_from(["tags", "seen", "words"]))
def test_a_bag_as_text_is_split_as_the_encoder_splits_it(text: str, name: str) -> None:
    columns = COLUMNS | {name: [text, None, text]}
    scores = engine_of(RANKER).score(columns)
    if scores is not None:
        assert_exact(scores, by_ids(RANKER, columns))
    elif name != "seen":
        pytest.fail(f"{text!r} is not read")


@pytest.mark.parametrize("text", ["9223372036854775807", "-9223372036854775808", "000000000000000000005", "+7", "-0"])
def test_ints_of_64_bits_are_read_from_text(text: str) -> None:
    columns = COLUMNS | {"seen": [f"1, {text} ", None, text]}
    scores = engine_of(RANKER).score(columns)
    assert scores is not None
    assert_exact(scores, by_ids(RANKER, columns))


@pytest.mark.parametrize("text", ["9223372036854775808", "+-7", "--7", "+", "-", "1.0", "0x1", "1e3"])
def test_what_is_no_int_of_64_bits_is_no_part_of_a_bag(text: str) -> None:
    assert engine_of(RANKER).score(COLUMNS | {"seen": [text, None, "1"]}) is None
    with pytest.raises(InputError, match="column 'seen'"):
        RANKER.score(COLUMNS | {"seen": [text, None, "1"]})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("video", [1, True, 2]),
        ("video", [1, 2**64, 2]),
        ("video", [1, 1.5, 2]),
        ("video", ["1", 1, 1]),
        ("video", np.array([1, 2**63, 2], np.uint64)),
        ("video", np.array([1.0, np.inf, 2.0])),
        ("video", np.array([True, False, True])),
        ("video", np.array([[1], [2], [3]])),
        ("video", 7),
        ("video", "123"),
        ("price", ["1", 1, 1]),
        ("price", [True, 1, 1]),
        ("colour", [1, "a", "b"]),
        ("colour", np.array([b"a", b"b", b"c"])),
        ("tags", ["a", 7, "b"]),
        ("tags", [["a", 7], [], []]),
        ("tags", (np.array(["a"], object), np.array([0, 1, 2, 1]))),
        ("tags", (np.array(["a"], object), np.array([1, 1, 1, 1]))),
        ("seen", ["1,x", "2", "3"]),
        ("seen", [[1.5], [], []]),
        ("video", [1, 2]),
        ("tags", [[], []]),
        ("video", pa.array([True, False, True])),
        ("colour", pa.array([1, 2, 3])),
    ],
)
def test_what_the_engine_does_not_read_is_refused_by_name(name: str, values: Any) -> None:
    columns = COLUMNS | {name: values}
    assert engine_of(RANKER).score(columns) is None
    with pytest.raises(InputError, match=name if name != "price" or len(values) == 3 else "column"):
        RANKER.score(columns)


def test_what_only_python_reads_is_scored_all_the_same() -> None:
    wanted = RANKER.score(COLUMNS)
    for columns in (
        COLUMNS | {"video": [np.int64(1), None, np.float64(77)]},
        COLUMNS | {"colour": [np.str_("red"), None, "mauve"]},
        COLUMNS | {"price": np.array([0.3, np.nan, 9], np.float16).astype(">f4")},
    ):
        assert engine_of(RANKER).score(columns) is None
        scores = RANKER.score(columns)
        assert (scores["cvr"] == wanted["cvr"]).all() or "price" in columns


@pytest.mark.parametrize("mask", [[False, True, False], [False, False, False], [True, True, True], np.ma.nomask])
def test_masked_values_are_missing(mask: Any) -> None:
    numbers = np.ma.masked_array([1, 5, 77], mask)
    texts = np.ma.masked_array(np.array(["red", "b", "mauve"], object), mask)
    columns = COLUMNS | {"video": numbers, "price": numbers.astype(float), "colour": texts}
    wide = mask if mask is np.ma.nomask else np.repeat(mask, 2)[:5]
    for masked in (columns, columns | {"video": np.ma.masked_array([1, 9, 5, 9, 77], wide)[::2]}):
        scores = engine_of(RANKER).score(masked)
        assert scores is not None
        assert_exact(scores, by_ids(RANKER, masked))
    two = np.ma.masked_array([[1, 2], [3, 4], [5, 6]], np.ma.nomask)
    assert engine_of(RANKER).score(COLUMNS | {"video": two}) is None


def test_a_lone_surrogate_is_a_value_like_any_other() -> None:
    for name, values in (("colour", ["\ud800", "a", "b"]), ("shop", ["\ud800", "a", "b"])):
        columns = COLUMNS | {name: values}
        assert engine_of(RANKER).score(columns) is None
        assert (RANKER.score(columns)["ctr"] == by_ids(RANKER, columns).numpy()[:, 0]).all()
        array = np.array(values, "U")
        scores = engine_of(RANKER).score(columns | {name: array})
        assert scores is not None
        assert_exact(scores, by_ids(RANKER, columns))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_a_candidates_scores_do_not_depend_on_its_request(precision: str, blocks: bool, kind: str) -> None:
    ranker = make(precision=precision, blocks=blocks, kind=kind)
    rows = [{name: values[(i + j) % 3] for j, (name, values) in enumerate(COLUMNS.items())} for i in range(9)]
    columns = columns_of([rows[i % 9] for i in range(300)])
    for name in COMMON:
        columns[name] = columns[name][:1] * 300
    context = {name: columns[name][:1] for name in COMMON}
    own = {name: values for name, values in columns.items() if name not in COMMON}
    wanted = ranker._score(columns, None, None)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert (ranker._score(own, context, None) == wanted).all()
            assert (ranker.score_encoded(ranker.encoder.encode(columns)).numpy() == wanted).all()
            for first, last in ((0, 1), (0, 7), (5, 21), (100, 165)):
                part = {name: values[first:last] for name, values in own.items()}
                assert (ranker._score(part, context, None) == wanted[first:last]).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("dim", [1, 3, 16, 300])
def test_inputs_are_those_of_the_module(kind: str, dim: int) -> None:
    """One output per input: an MLP that passes its inputs on shows what the engine made of them."""
    ranker = make(kind=kind, dim=dim, context=False)
    features = ranker.encoder.encode(COLUMNS)
    assert_exact(
        ranker.score_encoded(features),
        cpu_scores(ranker, chained(ranker.inputs.embed(features))),
    )


def chained(embedded: torch.Tensor) -> torch.Tensor:
    """The inputs, each dot product a chain of fused multiply-adds: in float64, rounded after each step."""
    batch, n, dim = embedded.shape
    dots = torch.zeros(batch, n, n)
    for d in range(dim):
        e = embedded[:, :, d].double()
        dots = (dots.double() + e[:, :, None] * e[:, None, :]).float()
    first, second = torch.triu_indices(n, n, offset=1)
    return torch.cat([embedded.flatten(1), dots[:, first, second]], 1)


def cpu_scores(ranker: Ranker, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(x), ranker.mlp.out_features)
    ranker.mlp.score_into(x, out)
    return out


def test_many_rows_are_scored_as_few() -> None:
    for ranker in (RANKER, IN_ORDER):
        many = {name: values * 2000 for name, values in COLUMNS.items()}  # in several pieces
        for columns in (many, many | {name: COLUMNS[name][:1] for name in COMMON}):
            few = {name: values[:3] if len(values) > 3 else values for name, values in columns.items()}
            assert (ranker.score(columns)["cvr"].reshape(2000, 3) == ranker.score(few)["cvr"]).all()


def test_a_planned_rankers_inputs_are_the_engines() -> None:
    plan = RANKER.mlp.measure_plan(batch_sizes=(1, 4))
    planned = RANKER.planned(plan)
    x = engine_of(planned).inputs(COLUMNS)
    assert x is not None
    assert_exact(x, chained(planned.inputs.embed(planned.encoder.encode(COLUMNS))))
    context = {name: values[:1] for name, values in COLUMNS.items() if name in COMMON}
    own = {name: values for name, values in COLUMNS.items() if name not in COMMON}
    once = engine_of(planned).inputs(own, context)
    assert once is not None
    assert (planned._score(own, context, None) == cpu_scores(planned, once).numpy()).all()
    assert (planned.score(COLUMNS)["ctr"] == cpu_scores(planned, x).numpy()[:, 0]).all()
    assert (planned.score(COLUMNS | {"video": [np.int64(1), None, 77]})["ctr"] == planned.score(COLUMNS)["ctr"]).all()


def test_a_network_of_heads_alone_is_served() -> None:
    heads = {task: DenseLayer(torch.randn(1, RANKER.mlp.in_features), None, "sigmoid") for task in RANKER.tasks}
    ranker = Ranker(RANKER.encoder, RANKER.inputs, SparseMLP(FrozenNetwork((), heads)).eval())
    scores = engine_of(ranker).score(COLUMNS)
    assert scores is not None
    assert_exact(scores, cpu_scores(ranker, chained(ranker.inputs.embed(ranker.encoder.encode(COLUMNS)))))


def test_any_mapping_holds_columns() -> None:
    context = {name: values[:1] for name, values in COLUMNS.items() if name in COMMON}
    own = {name: values for name, values in COLUMNS.items() if name not in COMMON}
    wanted = RANKER.rank(own, context)
    ranked = RANKER.rank(MappingProxyType(own), MappingProxyType(context))
    assert (ranked.rank_scores == wanted.rank_scores).all()
    assert (RANKER.score(MappingProxyType(COLUMNS))["ctr"] == RANKER.score(COLUMNS)["ctr"]).all()


def test_what_is_prepacked_is_counted() -> None:
    ranker = make()
    assert ranker.prepacked_nbytes == 0
    ranker.score(COLUMNS)
    assert ranker.prepacked_nbytes == engine_of(ranker).prepacked_nbytes > 0


def test_given_vectors_stand_in_for_a_column() -> None:
    vectors = torch.randn(3, 5)
    columns = {name: values for name, values in COLUMNS.items() if name != "video"}
    scores = RANKER.score(columns, {"video": vectors})
    read = engine_of(RANKER).score(columns, None, {"video": vectors})
    assert read is not None
    assert (scores["ctr"] == read[:, 0].numpy()).all()
    once = RANKER.score(columns, {"video": vectors[:1]})
    assert (once["ctr"][0] == scores["ctr"][0]).all() and (once["ctr"][1:] != scores["ctr"][1:]).all()
    rows = RANKER.inputs.table("video")
    place = [field.column for field in RANKER.encoder.fields].index("video")
    ids = RANKER.encoder.encode(COLUMNS).single[:, place]
    assert (RANKER.score(columns, {"video": rows[ids]})["ctr"] == RANKER.score(COLUMNS)["ctr"]).all()


def test_ids_beyond_a_table_are_refused() -> None:
    features = RANKER.encoder.encode(COLUMNS)
    for wrong in (-1, 10**6):
        features.single[0, 0] = wrong
        with pytest.raises((IndexError, RuntimeError)):
            RANKER.score_encoded(features)


def test_requests_of_several_threads_do_not_meet() -> None:
    ranker, failures = make(precision="fp32"), []
    requests = [{name: values * (3 + i) for name, values in COLUMNS.items()} for i in range(8)]
    wanted = [by_ids(ranker, columns) for columns in requests]

    def score(i: int) -> None:
        for _ in range(50):
            scores = engine_of(ranker).score(requests[i])
            if scores is None or not torch.equal(scores, wanted[i]):
                failures.append(i)

    threads = [threading.Thread(target=score, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Reentrant(np.ndarray):
    """An Arrow array that scores another request while it is read."""

    def __arrow_c_array__(self, requested_schema: Any = None) -> Any:
        assert RANKER.score({name: values * 2 for name, values in COLUMNS.items()})
        return pa.array([1, None, 77]).__arrow_c_array__()


def test_a_request_within_a_request() -> None:
    scores = engine_of(RANKER).score(COLUMNS | {"video": np.zeros(3).view(Reentrant)})
    assert scores is not None
    assert_exact(scores, by_ids(RANKER, COLUMNS))


def test_a_ranker_that_changes_is_read_anew() -> None:
    ranker = make()
    before = ranker.score(COLUMNS)["ctr"]
    other = make(precision="fp32", blocks=True)
    ranker.mlp = other.mlp
    assert (ranker.score(COLUMNS)["ctr"] != before).any()
    assert (ranker.score(COLUMNS)["ctr"] == other.score(COLUMNS)["ctr"]).all()


def test_embeddings_that_change_are_read_anew() -> None:
    ranker = make()
    before = ranker.score(COLUMNS)["ctr"]
    ranker.inputs.embedding.data = ranker.inputs.embedding.data.flip(0)
    after = ranker.score(COLUMNS)["ctr"]
    assert (after != before).all()
    assert (after == by_ids(ranker, COLUMNS)[:, 0].numpy()).all()
    ranker.inputs.double()  # which the engine does not read, and which no MLP takes
    with pytest.raises(ValueError, match=r"x: got torch\.float64"):
        ranker.score(COLUMNS)


def test_copies_score_alike_and_nothing_stays_behind() -> None:
    ranker = make()
    wanted = ranker.score(COLUMNS)["ctr"]
    for copied in (copy.deepcopy(ranker), pickle.loads(pickle.dumps(ranker))):
        assert (copied.score(COLUMNS)["ctr"] == wanted).all()
    engine = engine_of(ranker)
    assert engine.prepacked_nbytes > 0
    blobs = engine._blobs
    del engine, ranker, copied
    gc.collect()
    assert all("RequestEngine" not in type(holder).__name__ for holder in gc.get_referrers(blobs))


def test_no_rows() -> None:
    empty: dict[str, Any] = {name: [] for name in COLUMNS}
    assert RANKER.score(empty)["ctr"].shape == (0,)
    context = {name: COLUMNS[name][:1] for name in COMMON}
    assert len(RANKER.rank({name: [] for name in COLUMNS if name not in COMMON}, context)) == 0


def test_a_table_is_scored_as_its_columns() -> None:
    arrays = {name: pa.array(values) for name, values in COLUMNS.items()}
    wanted = RANKER.score(COLUMNS)["ctr"]
    for table in (pa.table(arrays), pa.RecordBatch.from_pydict(arrays)):
        assert (RANKER.score(table)["ctr"] == wanted).all()
        context = {name: values[:1] for name, values in COLUMNS.items() if name in COMMON}
        ranked = RANKER.rank(table.select([name for name in COLUMNS if name not in COMMON]), context)
        assert sorted(ranked.rows.tolist()) == [0, 1, 2]
    with pytest.raises(InputError, match="columns: got int, wanted a dict of columns"):
        RANKER.score(7)


def test_arrow_is_read_without_the_engine_too() -> None:
    for array in (pa.array([1, None, 77]), pa.chunked_array([[1], [None, 77]])):
        features = RANKER.encoder.encode(COLUMNS | {"video": array, "seen": pa.array(COLUMNS["seen"])})
        assert_exact(features.single, RANKER.encoder.encode(COLUMNS).single)
        assert_exact(features.multi_values, RANKER.encoder.encode(COLUMNS).multi_values)
