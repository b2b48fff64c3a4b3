import torch
from oracle import assert_exact
from recsys.models.samples import FIELDS, SIZES, TASKS, features, naive_vectors, reached, with_integers

from lt4rec_sparse.recsys.models.first_order import FirstOrder


def test_equals_a_naive_sum_over_fields():
    wide = with_integers(FirstOrder(FIELDS, SIZES, TASKS))
    for task in TASKS:
        rows = [torch.stack(vectors).sum(0) for vectors in naive_vectors(wide.weights[task].embedding)]
        assert_exact(wide(features(), task).detach(), torch.stack(rows).detach())


def test_starts_at_zero_and_reaches_its_task_alone():
    wide = FirstOrder(FIELDS, SIZES, TASKS)
    logits = wide(features(), "cvr")
    assert torch.equal(logits, torch.zeros(4, 1))
    assert reached(wide, logits.sum()) == {"weights.cvr.embedding"}
