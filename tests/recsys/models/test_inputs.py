import pytest
import torch
from oracle import assert_exact
from recsys.models.samples import FIELDS, SIZES, TASKS, features, naive_vectors, with_integers

from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models import CROSSES, TaskInputs
from lt4rec_sparse.recsys.models.inputs import Seen


def new(cross, exclusive_dim=0) -> TaskInputs:
    return with_integers(TaskInputs(FIELDS, SIZES, TASKS, 3, cross, exclusive_dim))


@pytest.mark.parametrize("exclusive_dim", [0, 2])
@pytest.mark.parametrize("cross", CROSSES)
def test_shapes(cross, exclusive_dim):
    inputs = new(cross, exclusive_dim)
    seen: Seen = inputs(features(), ("like", "ctr"))
    flat = 4 * (3 + exclusive_dim)
    assert inputs.out_features == (flat + 6 if cross == "dlrm" else flat)
    assert {task: x.shape for task, x in seen.views.items()} == dict.fromkeys(("like", "ctr"), (4, inputs.out_features))
    wanted = {} if cross == "dlrm" else dict.fromkeys(("like", "ctr"), (4, 1))
    assert {task: logit.shape for task, logit in seen.logits.items()} == wanted
    assert (seen.views["like"] is seen.views["ctr"]) == (exclusive_dim == 0)


def test_dlrm_without_exclusive_embeddings_is_the_cross_of_the_served_input():
    inputs = new("dlrm")
    assert isinstance(inputs.embeddings, CrossedEmbeddings)
    assert torch.equal(inputs(features(), TASKS).views["cvr"], inputs.embeddings(features()))


@pytest.mark.parametrize("exclusive_dim", [0, 2])
def test_deepfm_adds_first_and_second_order_to_the_logit(exclusive_dim):
    inputs = new("deepfm", exclusive_dim)
    seen = inputs(features(), TASKS)
    shared = inputs.embeddings.shared if exclusive_dim else inputs.embeddings
    for task in TASKS:
        first = inputs.first_order(features(), task).double()
        logits = []
        for row, vectors in enumerate(naive_vectors(shared.embedding.detach().double())):
            if exclusive_dim:
                own = naive_vectors(inputs.embeddings.exclusive[task].embedding.detach().double())[row]
                vectors = [torch.cat(pair) for pair in zip(vectors, own, strict=True)]
            second = sum(float(vectors[i] @ vectors[j]) for i in range(4) for j in range(i + 1, 4))
            logits.append(first[row] + second)
            assert torch.equal(seen.views[task][row].double().sort().values, torch.cat(vectors).sort().values)
        assert_exact(seen.logits[task].detach(), torch.stack(logits).float().detach())


def test_wide_and_deep_adds_the_first_order_alone():
    inputs = new("wide_deep")
    seen = inputs(features(), TASKS)
    flat = torch.stack([torch.cat(vectors) for vectors in naive_vectors(inputs.embeddings.embedding)])
    for task in TASKS:
        assert torch.equal(seen.logits[task], inputs.first_order(features(), task))
        assert torch.equal(seen.views[task], flat)


def test_an_unknown_cross_is_named():
    with pytest.raises(ValueError, match="cross: got 'dcn', wanted one of dlrm, wide_deep, deepfm"):
        new("dcn")
