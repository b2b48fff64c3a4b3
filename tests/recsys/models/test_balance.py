import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.recsys.models import UncertaintyWeights, pcgrad
from lt4rec_sparse.recsys.models.balance import without_conflicts

U = 2.0**-53
KINDS = {"ctr": "binary", "cvr": "ratio"}


def new() -> UncertaintyWeights:
    return UncertaintyWeights(("ctr", "cvr"), KINDS)


def test_at_first_a_cross_entropy_counts_whole_and_a_squared_error_half():
    balance = new()
    assert balance({"ctr": torch.tensor(3.0), "cvr": torch.tensor(5.0)}).item() == 3.0 + 2.5


def test_gradients_by_hand():
    balance = new()
    ctr, cvr = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    balance({"ctr": ctr, "cvr": cvr}).backward()
    assert (ctr.grad.item(), cvr.grad.item()) == (1.0, 0.5)
    assert balance.hundredths["ctr"].grad.item() == 100 * (-3.0 + 0.5)
    assert balance.hundredths["cvr"].grad.item() == 100 * (-2.5 + 0.5)


def test_an_epoch_finds_the_noise():
    """At a constant loss the least of `c exp(-s) loss + s / 2` is at `s = log(2 c loss)`."""
    balance = new()
    adam = torch.optim.Adam(balance.parameters(), 1e-3)
    for _ in range(147):
        adam.zero_grad()
        balance({"ctr": torch.tensor(0.6), "cvr": torch.tensor(0.1)}).backward()
        adam.step()
    found = {task: (-100 * s).exp().item() for task, s in balance.hundredths.items()}
    assert found == pytest.approx({"ctr": 0.5 / 0.6, "cvr": 1 / 0.1}, rel=0.1)


def test_a_batch_without_a_task_leaves_its_weight_alone():
    balance = new()
    balance({"ctr": torch.tensor(3.0)}).backward()
    assert balance.hundredths["cvr"].grad is None


def generator():
    return torch.Generator().manual_seed(0)


def vectors(low, tasks=2):
    """A vector of integers for each task, whose sums and products are exact in float64."""
    one = st.lists(st.integers(low, 9), min_size=5, max_size=5)
    return st.lists(one, min_size=tasks, max_size=tasks).map(lambda v: torch.tensor(v, dtype=torch.float64))


def in_parts(gradients):
    """The same vectors over two parameters, one of them a matrix."""
    return [[row[:1], row[1:].view(2, 2)] for row in gradients]


@given(vectors(0, tasks=3))
def test_without_conflict_it_is_the_sum(gradients):
    (combined,) = pcgrad([[row] for row in gradients], generator())
    assert torch.equal(combined, gradients.sum(0))


@given(vectors(-9))
def test_two_tasks_no_longer_pull_against_each_other(gradients):
    (a,), (b,) = without_conflicts([[row] for row in gradients], generator())
    before = gradients[0] @ gradients[1]
    if before >= 0:
        assert torch.equal(torch.stack([a, b]), gradients)
    for own, other in ((a, gradients[1]), (b, gradients[0]), (a, b)):
        # A projected element is behind four roundings, of terms that are no larger than the vectors' largest together;
        # the check itself multiplies and adds five of them.
        size = gradients.norm(dim=1).sum()
        assert own @ other >= -(4 + 4 + 5) * 5 * U * size**2


@given(vectors(-9))
def test_all_parameters_are_one_vector(gradients):
    (whole,) = pcgrad([[row] for row in gradients], generator())
    first, second = pcgrad(in_parts(gradients), generator())
    assert torch.equal(torch.cat([first, second.flatten()]), whole)


def test_opposite_gradients_vanish():
    gradient = [torch.tensor([3.0, -4.0]), torch.tensor([[1.0]])]
    combined = pcgrad([gradient, [-part for part in gradient]], generator())
    assert all(not part.any() for part in combined)


def test_the_seed_decides_and_nothing_is_changed_in_place():
    torch.manual_seed(0)
    gradients = [[torch.randn(6)] for _ in range(4)]
    before = [parts[0].clone() for parts in gradients]
    one, two = pcgrad(gradients, generator()), pcgrad(gradients, generator())
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(parts[0], copy) for parts, copy in zip(gradients, before, strict=True))
