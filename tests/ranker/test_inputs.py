import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_exact, small_integers

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings

FIELDS = [("video", "video", False), ("tags", "tag", True), ("past", "video", True), ("hour", "hour", False)]
SIZES = {"video": 5, "tag": 4, "hour": 3}


def naive(inputs: CrossedEmbeddings, single, bags) -> torch.Tensor:
    """Row by row, field by field; single-valued fields first."""
    starts = {"video": 0, "tag": 5, "hour": 9}
    rows = []
    for row, ids in enumerate(single):
        embedded = [inputs.embedding[starts[t] + i] for t, i in zip(("video", "hour"), ids, strict=True)]
        for table, field in zip(("tag", "video"), bags, strict=True):
            values = [inputs.embedding[starts[table] + i] for i in field[row]]
            embedded.append(torch.stack(values).mean(0) if values else torch.zeros(inputs.dim))
        dots = [embedded[i] @ embedded[j] for i in range(4) for j in range(i + 1, 4)]
        rows.append(torch.cat([*embedded, torch.stack(dots)]))
    return torch.stack(rows) if rows else torch.zeros(0, inputs.out_features)


def encoded(single, bags) -> EncodedFeatures:
    lengths = [len(bag) for field in bags for bag in field]
    return EncodedFeatures(
        torch.tensor(single, dtype=torch.int32).view(-1, 2),
        torch.tensor([i for field in bags for bag in field for i in bag], dtype=torch.int32),
        torch.tensor([0, *lengths]).cumsum(0),
    )


# One or two values per bag, so that a mean of small integers is exact.
rows = st.lists(
    st.tuples(
        st.tuples(st.integers(0, 4), st.integers(0, 2)),
        st.lists(st.integers(0, 3), max_size=2),
        st.lists(st.integers(0, 4), max_size=2),
    ),
    max_size=6,
)


@given(rows)
def test_equals_a_naive_implementation(batch):
    inputs = CrossedEmbeddings(FIELDS, SIZES, dim=3)
    inputs.embedding.data = small_integers(12, 3, generator=torch.Generator().manual_seed(0))
    single, bags = [row[0] for row in batch], [[row[1] for row in batch], [row[2] for row in batch]]
    assert_exact(inputs(encoded(single, bags)).detach(), naive(inputs, single, bags).detach())


@given(rows)
def test_the_gradient_equals_autograds_through_a_naive_implementation(batch):
    inputs = CrossedEmbeddings(FIELDS, SIZES, dim=3)
    inputs.embedding.data = small_integers(12, 3, generator=torch.Generator().manual_seed(0))
    single, bags = [row[0] for row in batch], [[row[1] for row in batch], [row[2] for row in batch]]
    upstream = small_integers(len(batch), inputs.out_features, generator=torch.Generator().manual_seed(1))
    found = []
    for x in (inputs(encoded(single, bags)), naive(inputs, single, bags)):
        inputs.embedding.grad = None
        if batch:
            x.backward(upstream)
            found.append(inputs.embedding.grad)
    if batch:
        assert_exact(*found)


def test_one_field_has_nothing_to_cross():
    inputs = CrossedEmbeddings([("hour", "hour", False)], SIZES, dim=3)
    features = EncodedFeatures(
        torch.tensor([[2], [0]]), torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    )
    x = inputs(features)
    x.sum().backward()
    assert torch.equal(x, inputs.embedding[[11, 9]])
    assert inputs.embedding.grad.sum() == 6


def test_autocast_is_kept_out_of_the_cross():
    inputs, features = CrossedEmbeddings(FIELDS, SIZES, dim=3), encoded([(1, 2), (4, 0)], [[[1], []], [[0, 3], [2]]])
    gradients = []
    for is_enabled in (False, True):
        inputs.embedding.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            x = inputs(features)
        x.square().sum().backward()
        gradients.append((x.detach(), inputs.embedding.grad))
    (plain, plain_grad), (cast, cast_grad) = gradients
    assert cast.dtype == torch.float32
    assert_exact(cast, plain)
    assert_exact(cast_grad, plain_grad)


def test_width():
    assert CrossedEmbeddings(FIELDS, SIZES, dim=3).out_features == 4 * 3 + 6


def test_a_field_without_a_table_size_is_named():
    with pytest.raises(ValueError, match=r"without sizes for tables \['tag'\]"):
        CrossedEmbeddings(FIELDS, {"video": 5, "hour": 3})


# Rounded embeddings


@pytest.mark.parametrize("kind", ["fp16", "int8"])
@given(rows)
def test_rounded_embeddings_are_looked_up_pooled_and_crossed_as_the_floats_that_they_are(kind, batch):
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(FIELDS, SIZES, dim=3)
    rounded = inputs.rounded(kind)
    dense = rounded.rounded("fp32")
    assert (inputs.kind, rounded.kind, dense.kind) == ("fp32", kind, "fp32")
    features = features_of(batch)
    assert_exact(rounded(features), dense(features).detach())
    if kind == "fp16":
        assert_exact(dense.embedding.detach(), inputs.embedding.detach().half().float())


def test_rounding_changes_nothing_where_nothing_is_to_round():
    inputs = CrossedEmbeddings(FIELDS, SIZES, dim=3)
    int8 = inputs.rounded("int8")
    assert int8.rounded("int8") is int8
    assert (inputs.nbytes, inputs.rounded("fp16").nbytes, int8.nbytes) == (12 * 3 * 4, 12 * 3 * 2, 12 * (3 + 4))
    with pytest.raises(InputError, match="embeddings: got 'int4', wanted one of fp32, fp16, int8"):
        inputs.rounded("int4")


# Vectors from elsewhere, and tables that are not here


COLUMNS = ("video", "hour", "tags", "past")  # as `embed` orders them
TABLES = dict(zip(COLUMNS, ("video", "hour", "tag", "video"), strict=True))


def features_of(batch) -> EncodedFeatures:
    return encoded([single for single, _, _ in batch], [[row[1] for row in batch], [row[2] for row in batch]])


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@given(rows, st.sets(st.sampled_from(COLUMNS)), st.sets(st.sampled_from(COLUMNS)), st.booleans())
def test_given_vectors_stand_in_for_the_ids_of_their_columns(kind, batch, columns, once, drop):
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(FIELDS, SIZES, dim=3).rounded(kind)
    features = features_of(batch)
    whole = inputs.embed(features).detach()
    given = {column: whole[:, COLUMNS.index(column)].clone() for column in columns}
    for column in columns & once if len(batch) else ():
        given[column] = given[column][:1]
        whole[:, COLUMNS.index(column)] = given[column]
    tables = (
        {TABLES[c] for c in COLUMNS if all(o in columns for o in COLUMNS if TABLES[o] == TABLES[c])} if drop else ()
    )
    served = inputs.without(tables)
    assert served.embedding.nbytes <= inputs.embedding.nbytes
    assert_exact(served.embed(features, given).detach(), whole)
    assert served(features, given).shape == (len(batch), inputs.out_features)


def test_a_gradient_reaches_vectors_that_are_given():
    inputs = CrossedEmbeddings(FIELDS, SIZES, dim=3)
    vectors = torch.randn(1, 3, requires_grad=True)
    features = encoded([[0, 0], [1, 2]], [[[1], []], [[0], [1]]])
    inputs(features, {"hour": vectors}).sum().backward()
    assert vectors.grad.abs().sum() > 0
    assert inputs.embedding.grad[9:].abs().sum() == 0, "no hour was looked up"


def test_a_table_is_what_was_trained_wherever_it_goes():
    inputs = CrossedEmbeddings(FIELDS, SIZES, dim=3)
    assert_exact(inputs.table("tag"), inputs.embedding.detach()[5:9])
    kept = inputs.without(["video"])
    assert_exact(kept.table("hour"), inputs.table("hour"))
    assert_exact(kept.embedding.detach(), inputs.embedding.detach()[5:])
    assert_exact(inputs.rounded("int8").table("hour"), inputs.rounded("int8").rounded("fp32").table("hour"))
    assert not kept.without(["tag", "hour"]).nbytes
    assert_exact(kept.without(["video"]).embedding.detach(), kept.embedding.detach())
    with pytest.raises(InputError, match="table: got 'video', wanted one of tag, hour"):
        kept.table("video")
    for make in (lambda: inputs.without(["user"]), lambda: inputs.table("user")):
        with pytest.raises(InputError, match="table: got 'user', wanted one of video, tag, hour"):
            make()
    with pytest.raises(InputError, match="table: got 'user', wanted one of video, tag, hour"):
        CrossedEmbeddings(FIELDS, SIZES, dim=3, absent=["user"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"user": torch.zeros(2, 3)}, "embeddings: got column 'user', wanted one of video, tags, past, hour"),
        ({"hour": torch.zeros(3)}, r"embeddings of 'hour': got shape \[3\], wanted \[2, 3\] or \[1, 3\]"),
        ({"hour": torch.zeros(2, 4)}, r"embeddings of 'hour': got shape \[2, 4\], wanted \[2, 3\]"),
        ({"hour": torch.zeros(3, 3)}, r"embeddings of 'hour': got shape \[3, 3\], wanted \[2, 3\]"),
        ({"hour": torch.zeros(2, 3).double()}, "embeddings of 'hour': got torch.float64, wanted one of torch.float32"),
        ({"hour": torch.full((2, 3), torch.nan)}, "embeddings of 'hour': got NaN or Inf, wanted finite numbers"),
        (
            {"video": torch.zeros(2, 3)},
            r"embeddings of 'past': got none, wanted \[2, 3\], since table 'video' is absent",
        ),
        ({}, r"embeddings of 'video': got none, wanted \[2, 3\], since table 'video' is absent here"),
    ],
)
def test_vectors_that_cannot_be_are_refused(given, message):
    inputs = CrossedEmbeddings(FIELDS, SIZES, dim=3, absent=["video"] if "video" in given or not given else [])
    with pytest.raises(InputError, match=message):
        inputs(encoded([[0, 0], [1, 2]], [[[1], []], [[0], [1]]]), given)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_grown_inputs_embed_old_ids_as_before_and_new_ones_as_unseen_or_anew(kind):
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(FIELDS, SIZES, dim=3).rounded(kind)
    sizes = {"video": 7, "tag": 4, "hour": 6}
    old = encoded([[4, 2], [1, 1], [0, 1]], [[[3], [], [1, 1]], [[2, 4], [1], []]])
    new = encoded([[4, 2], [6, 5], [0, 3]], [[[3], [], [1, 1]], [[2, 4], [5], []]])  # 1, unseen, where it was not known
    assert_exact(inputs.grown(sizes, None)(new).detach(), inputs(old).detach())
    drawn = inputs.grown(sizes, torch.Generator().manual_seed(1))
    for table, rows in inputs.tables().items():
        grown = drawn.table(table)
        assert_exact(grown[: len(rows)], rows)
        assert len(grown) == sizes[table] and len(grown.unique(dim=0)) == sizes[table]
    again = inputs.grown(sizes, torch.Generator().manual_seed(1))
    assert_exact(drawn.embedding.detach(), again.embedding.detach())
    assert drawn.embedding.requires_grad and drawn.kind == "fp32"


def test_new_rows_are_drawn_as_initial_ones_are():
    torch.manual_seed(0)
    inputs = CrossedEmbeddings([("a", "a", False)], {"a": 2}, dim=4)
    grown = inputs.grown({"a": 5}, torch.Generator().manual_seed(7)).embedding.detach()[2:]
    torch.manual_seed(7)
    assert_exact(grown, CrossedEmbeddings([("a", "a", False)], {"a": 3}, dim=4).embedding.detach())


def test_inputs_that_cannot_grow_are_refused():
    inputs = CrossedEmbeddings(FIELDS, SIZES, dim=3)
    for sizes, message in (
        ({**SIZES, "tag": 3}, "table 'tag': got 3 rows, wanted at least 4"),
        ({"video": 5, "tag": 4}, "tables: got video, tag, wanted video, tag, hour"),
    ):
        with pytest.raises(InputError, match=f"^{message}$"):
            inputs.grown(sizes, None)
    with pytest.raises(InputError, match="embeddings: got none of table tag"):
        inputs.without(["tag"]).grown(SIZES, None)
