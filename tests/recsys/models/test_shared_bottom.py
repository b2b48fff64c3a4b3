import pytest
import torch
from recsys.models.samples import FIELDS, SIZES, features, reached

from lt4rec_sparse.recsys.models import build


def new(hidden=(8, 6, 4), **options):
    return build("shared_bottom", FIELDS, SIZES, ("ctr", "cvr"), hidden, 3, **options)


@pytest.mark.parametrize(("shared_layers", "bottom", "tower"), [(None, 2, 1), (1, 1, 2), (3, 3, 0)])
def test_layers_below_are_shared(shared_layers, bottom, tower):
    model = new(shared_layers=shared_layers)
    assert len(model.bottom.layers) == bottom
    assert {len(model.towers[task].layers) for task in model.tasks} == {tower}
    x = model.inputs(features())
    assert torch.equal(model(features(), "cvr"), model.towers["cvr"](model.bottom(x)))


def test_a_task_reaches_the_bottom_and_its_tower():
    model = new()
    names = reached(model, model(features(), "ctr").sum())
    assert {name.split(".")[1] for name in names if name.startswith("towers.")} == {"ctr"}
    assert any(name.startswith("bottom.") for name in names)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="shared_layers: got 4, wanted 1 to 3"):
        new(shared_layers=4)
    with pytest.raises(ValueError, match="hidden: got no layer"):
        new(hidden=())
