import pytest
import torch

from lt4rec_sparse.ranking import loss_of


def test_losses_by_hand():
    logits, labels = torch.zeros(2), torch.tensor([1.0, 0.0])
    weights = torch.tensor([3.0, 1.0])
    assert loss_of("binary")(logits, labels, weights).item() == pytest.approx(0.6931471805599453)
    assert loss_of("ratio")(logits, torch.tensor([0.5, 0.0]), weights).item() == pytest.approx(0.25 / 4)


def test_rows_of_weight_zero_do_not_count():
    loss = loss_of("ratio")
    one = loss(torch.tensor([2.0]), torch.tensor([0.1]), torch.tensor([1.0]))
    two = loss(torch.tensor([2.0, 9.0]), torch.tensor([0.1, 0.0]), torch.tensor([1.0, 0.0]))
    assert torch.equal(one, two)
    assert loss(torch.tensor([2.0]), torch.tensor([0.1]), torch.tensor([0.0])).item() == 0.0


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind: got 'count', wanted one of binary, ratio"):
        loss_of("count")
