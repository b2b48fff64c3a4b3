import torch
from recsys.models.samples import FIELDS, SIZES, features, reached

from lt4rec_sparse.recsys.models import build, entire_space, loss_of


def new():
    torch.manual_seed(0)
    return build("esmm", FIELDS, SIZES, ("ctr", "cvr"), (8, 4), 3)


def test_the_conversion_tower_learns_from_rows_that_nobody_clicked():
    model = new()
    click, conversion = model(features()).T
    names = reached(model, entire_space(click, conversion, torch.zeros(4), torch.ones(4)))
    assert names == {name for name, _ in model.named_parameters()}
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "cvr" in name]
    assert any(bool(gradient.any()) for gradient in gradients)


def test_a_click_teaches_the_conversion_tower_nothing():
    model = new()
    loss = loss_of("binary")(model(features(), "ctr").squeeze(1), torch.ones(4), torch.ones(4))
    names = reached(model, loss)
    assert not [name for name in names if "cvr" in name]
    assert "inputs.embedding" in names
