import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_exact, small_integers

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
