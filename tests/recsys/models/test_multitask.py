import pytest
import torch
from recsys.models.samples import FIELDS, SIZES, TASKS, features, reached, with_integers

from lt4rec_sparse.masks import Mask
from lt4rec_sparse.recsys.models import CROSSES, MODELS, SparseSharing, build

SEVERAL = [name for name in MODELS if name != "single_task"]


def new(name, tasks=TASKS, **options):
    torch.manual_seed(0)
    model = build(name, FIELDS, SIZES, tasks, (8, 6, 4), 3, **options)
    if isinstance(model, SparseSharing):
        generator = torch.Generator().manual_seed(0)
        for task in tasks:
            shapes = model.mlp.mask(task).shapes
            halves = {layer: rows * columns // 2 for layer, (rows, columns) in shapes.items()}
            model.mlp.set_mask(Mask.random(shapes, halves, generator), task)
    return model


@pytest.mark.parametrize("exclusive_dim", [0, 2])
@pytest.mark.parametrize("cross", CROSSES)
@pytest.mark.parametrize("name", SEVERAL)
def test_all_tasks_at_once_are_the_tasks_one_by_one(name, cross, exclusive_dim):
    model = with_integers(new(name, cross=cross, exclusive_dim=exclusive_dim))
    logits = model(features())
    assert logits.shape == (4, len(TASKS))
    assert not torch.equal(logits[:, 0], logits[:, 1])
    for i, task in enumerate(TASKS):
        assert torch.equal(model(features(), task), logits[:, i : i + 1])


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("tasks", [("ctr",), tuple(f"task_{i}" for i in range(8))])
def test_one_task_or_eight(name, tasks):
    assert new(name, tasks)(features()).shape == (4, len(tasks))


@pytest.mark.parametrize("name", MODELS)
def test_no_rows(name):
    model = new(name, ("ctr",))
    assert model(features()[:0]).shape == (0, 1)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_task_reaches_its_own_part_of_the_inputs(name):
    model = new(name, ("ctr", "cvr"), cross="deepfm", exclusive_dim=2)
    names = reached(model, model(features(), "ctr").sum())
    assert "inputs.embeddings.shared.embedding" in names
    assert {n for n in names if n.startswith("inputs.") and "cvr" in n} == set()
    assert {"inputs.first_order.weights.ctr.embedding", "inputs.embeddings.exclusive.ctr.embedding"} <= names


@pytest.mark.parametrize("name", SEVERAL)
def test_unknown_tasks_are_named(name):
    with pytest.raises(ValueError, match="task: got 'share', wanted one of ctr, cvr, like"):
        new(name)(features(), "share")
    with pytest.raises(ValueError, match="tasks: got"):
        new(name, ("ctr", "ctr"))
