import pytest
import torch
from oracle import assert_exact
from recsys.models.samples import FIELDS, SIZES, TASKS, features, naive_vectors, reached, with_integers

from lt4rec_sparse.recsys.models.multiview import MultiviewEmbeddings


def views(**widths):
    return with_integers(MultiviewEmbeddings(FIELDS, SIZES, TASKS, **{"dim": 3, "exclusive_dim": 2} | widths))


def test_equals_the_cross_over_joined_vectors():
    inputs = views()
    seen = inputs(features(), TASKS)
    assert list(seen) == list(TASKS)
    for task in TASKS:
        own = naive_vectors(inputs.exclusive[task].embedding)
        rows = []
        for shared, exclusive in zip(naive_vectors(inputs.shared.embedding), own, strict=True):
            joined = [torch.cat(pair) for pair in zip(shared, exclusive, strict=True)]
            dots = [joined[i] @ joined[j] for i in range(4) for j in range(i + 1, 4)]
            rows.append(torch.cat([*shared, *exclusive, torch.stack(dots)]))
        assert_exact(seen[task].detach(), torch.stack(rows).detach())
        assert seen[task].shape[1] == inputs.out_features == 4 * 5 + 6


def test_a_task_reaches_its_own_embeddings_and_the_shared_ones():
    inputs = views()
    names = reached(inputs, inputs(features(), ("cvr",))["cvr"].sum())
    assert names == {"shared.embedding", "exclusive.cvr.embedding"}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="exclusive_dim: got 0, wanted at least 1"):
        views(exclusive_dim=0)
