import math
from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt4rec_sparse.recsys.models import entire_space, loss_of
from lt4rec_sparse.recsys.models.losses import focal, joint_logits

U = 2.0**-53
ONE = torch.ones(1, dtype=torch.float64)
logits_up_to_30 = st.floats(-30, 30)


def test_losses_by_hand():
    logits, labels = torch.zeros(2), torch.tensor([1.0, 0.0])
    weights = torch.tensor([3.0, 1.0])
    assert loss_of("binary")(logits, labels, weights).item() == pytest.approx(0.6931471805599453)
    assert loss_of("ratio")(logits, torch.tensor([0.5, 0.0]), weights).item() == pytest.approx(0.25 / 4)
    # (0.75 * 3 + 0.25 * 1) / 4 of a row at p = 1/2, where the loss is (1/2)^2 log 2
    assert loss_of("binary", "focal")(logits, labels, weights).item() == pytest.approx(2.5 / 4 * math.log(2) / 4)


def test_a_loss_may_be_named_for_either_kind():
    assert loss_of("ratio", "bce") is loss_of("binary")
    assert loss_of("binary", "mse") is loss_of("ratio")


def test_rows_of_weight_zero_do_not_count():
    loss = loss_of("ratio")
    one = loss(torch.tensor([2.0]), torch.tensor([0.1]), torch.tensor([1.0]))
    two = loss(torch.tensor([2.0, 9.0]), torch.tensor([0.1, 0.0]), torch.tensor([1.0, 0.0]))
    assert torch.equal(one, two)
    assert loss(torch.tensor([2.0]), torch.tensor([0.1]), torch.tensor([0.0])).item() == 0.0


@pytest.mark.parametrize(
    ("label", "by_hand"), [(1.0, -0.75 * 0.2**2 * math.log(0.8)), (0.0, -0.25 * 0.8**2 * math.log(0.2))]
)
def test_focal_counts_a_well_predicted_row_little(label, by_hand):
    logit = torch.tensor([math.log(4)])  # p = 0.8
    assert focal(logit, torch.tensor([label]), torch.ones(1)).item() == pytest.approx(by_hand)


@given(logits_up_to_30, st.floats(0, 1))
def test_focal_of_gamma_zero_and_alpha_one_half_is_half_the_cross_entropy(logit, label):
    z, y = torch.tensor([logit], dtype=torch.float64), torch.tensor([label], dtype=torch.float64)
    half_focal = focal(z, y, ONE, alpha=0.5, gamma=0.0)
    half = loss_of("binary")(z, y, ONE) / 2
    # Each is a sum of at most three terms no larger than |z| + log 2, each behind at most eight roundings.
    assert abs((half_focal - half).item()) <= 2 * 3 * 8 * U * (abs(logit) + math.log(2))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_focal_has_a_gradient_where_a_probability_is_0_or_1(logit, gamma):
    logits = torch.tensor([logit, logit], requires_grad=True)
    focal(logits, torch.tensor([0.0, 1.0]), torch.ones(2), gamma=gamma).backward()
    assert torch.isfinite(logits.grad).all()


@given(logits_up_to_30, logits_up_to_30)
def test_joint_logits_are_those_of_the_product(first, second):
    getcontext().prec = 60
    a, b = (1 / (1 + (-Decimal(z)).exp()) for z in (first, second))
    exact = (a * b / (1 - a * b)).ln()
    z = joint_logits(torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)).item()
    # Terms are logarithms of sigmoids, no larger than |z| + log 2; each passes at most eight roundings within an ulp.
    terms = 2 * (abs(first) + math.log(2)) + 2 * (abs(second) + math.log(2))
    assert abs(Decimal(z) - exact) <= Decimal(2 * 8 * U * terms)


def test_the_entire_space_is_the_loss_of_the_product():
    p = torch.sigmoid(torch.tensor(0.5)) * torch.sigmoid(torch.tensor(-1.0))
    logits = torch.tensor([0.5, 0.5]), torch.tensor([-1.0, -1.0])
    labels, weights = torch.tensor([0.3, 0.0]), torch.tensor([1.0, 3.0])
    by_hand = -(0.3 * p.log() + 0.7 * (1 - p).log() + 3 * (1 - p).log()) / 4
    assert entire_space(*logits, labels, weights).item() == pytest.approx(by_hand.item())


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("click", [-300.0, 300.0])
@pytest.mark.parametrize("conversion", [-300.0, 300.0])
def test_the_entire_space_is_finite_everywhere(click, conversion, label):
    logits = torch.tensor([[click], [conversion]], requires_grad=True)
    loss = entire_space(logits[0], logits[1], torch.tensor([label]), torch.ones(1))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
