import pytest
import torch
from oracle import assert_exact
from recsys.models.samples import FIELDS, SIZES, features, with_integers
from torch import nn

from lt4rec_sparse.masks import Mask
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models import CROSSES, MODELS, SparseSharing, build, mlp_multiply_adds
from lt4rec_sparse.recsys.models.inputs import TaskInputs

TASKS = ("ctr", "cvr")
K = 4 * 3 + 6  # out_features of the inputs


def new(name, tasks=TASKS, hidden=(8, 4), **options):
    return build(name, FIELDS, SIZES, tasks, hidden, 3, **options)


def test_sparse_sharing_has_the_state_names_of_saved_runs():
    model = new("sparse_sharing")
    assert set(model.state_dict()) == {
        "inputs.embedding",
        *(f"mlp.layers.{i}.{part}" for i in (0, 1) for part in ("weight", "bias", "masks", "mask_tasks")),
        *(f"mlp.heads.{task}.{part}" for task in TASKS for part in ("weight", "bias")),
    }


def test_starts_as_the_class_does_after_its_inputs():
    torch.manual_seed(3)
    by_hand = SparseSharing(CrossedEmbeddings(FIELDS, SIZES, 3), TASKS, (8, 4)).state_dict()
    torch.manual_seed(3)
    built = new("sparse_sharing").state_dict()
    assert all(torch.equal(built[name], by_hand[name]) for name in by_hand)


def test_a_single_task_is_sparse_sharing_of_one():
    assert isinstance(new("single_task", ("ctr",)), SparseSharing)
    with pytest.raises(ValueError, match="tasks of single_task: got ctr, cvr, wanted one"):
        new("single_task")


@pytest.mark.parametrize("tasks", [1, 2, 8])
@pytest.mark.parametrize("name", MODELS)
def test_default_widths_stay_within_twice_hard_sharing(name, tasks):
    if name == "single_task" and tasks > 1:
        return

    def size(model: nn.Module) -> int:
        return sum(p.numel() for n, p in model.named_parameters() if not n.startswith("inputs."))

    names, hidden = [f"task_{i}" for i in range(tasks)], (64, 32, 16)
    assert size(new(name, names, hidden)) <= 2 * size(new("hard_sharing", names, hidden))


MULTIPLY_ADDS = {
    "hard_sharing": 2 * (K * 8 + 8 * 4 + 4),
    "sparse_sharing": 2 * (K * 8 + 8 * 4 + 4),
    "shared_bottom": K * 8 + 2 * (8 * 4 + 4),
    "mmoe": 4 * K * 4 + 2 * (4 * K + 4 * 4 + 4),
    # Two levels: experts of 4, own gates over 3 and a shared one over 4, towers.
    "ple": 4 * (K * 4 + 4 * 4) + 2 * (3 * K + 3 * 4) + 4 * K + 2 * (4 * 4 + 4),
    "esmm": 2 * (K * 8 + 8 * 4 + 4),
    "aitm": 2 * (K * 8 + 8 * 4 + 4) + 4 * 4 + 2 * 3 * 4 * 4,  # the attention's layers run on two vectors
}


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_by_hand(name):
    assert mlp_multiply_adds(new(name)) == MULTIPLY_ADDS[name]


def test_only_kept_weights_count_task_by_task():
    model = new("sparse_sharing")
    first, second = torch.zeros(8, K, dtype=torch.bool), torch.zeros(4, 8, dtype=torch.bool)
    first[:, 0] = first[:2, 1] = second[:3, 5] = True
    model.mlp.set_mask(Mask({"layers.0": first, "layers.1": second}), "cvr")
    assert mlp_multiply_adds(model) == K * 8 + 8 * 4 + 10 + 3 + 2 * 4
    first[5] = False  # what reads this neuron reads a constant
    model.mlp.set_mask(Mask({"layers.0": first, "layers.1": second}), "cvr")
    assert mlp_multiply_adds(model) == K * 8 + 8 * 4 + 9 + 0 + 2 * 4


def test_what_tasks_share_runs_once_a_view():
    views = K + 4 * 2
    once = new("shared_bottom", cross="wide_deep")
    assert mlp_multiply_adds(once) == 12 * 8 + 2 * (8 * 4 + 4)
    assert mlp_multiply_adds(new("shared_bottom", exclusive_dim=2)) == 2 * (views * 8 + 8 * 4 + 4)


def test_counting_leaves_the_model_as_it_was():
    model = new("aitm")
    before = model(features())
    mlp_multiply_adds(model)
    assert torch.equal(model(features()), before)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("exclusive_dim", [0, 2])
@pytest.mark.parametrize("cross", CROSSES)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "single_task"])
def test_sparse_gradients_are_those_of_all_embeddings_and_are_the_dense_ones(name, cross, exclusive_dim):
    torch.manual_seed(0)
    model = new(name, cross=cross, exclusive_dim=exclusive_dim, sparse_gradients=True)
    plain = new(name, cross=cross, exclusive_dim=exclusive_dim)
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        with_integers(each.inputs)
        views = each.inputs(features(), TASKS) if isinstance(each.inputs, TaskInputs) else each.inputs(features())
        parts = [*views[0].values(), *views[1].values()] if isinstance(views, tuple) else [views]
        sum(part.sum() for part in parts).backward()
    for parameter, dense in zip(model.inputs.parameters(), plain.inputs.parameters(), strict=True):
        assert parameter.grad.is_sparse
        assert not dense.grad.is_sparse
        assert_exact(parameter.grad.to_dense(), dense.grad)
    model.zero_grad()
    model(features()).sum().backward()
    assert all(p.grad is None or p.grad.is_sparse for p in model.inputs.parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dcn", {}, "model: got 'dcn', wanted one of single_task, hard_sharing"),
        ("aitm", {"hidden": ()}, r"hidden: got \(\), wanted at least one width, each at least 1"),
        ("ple", {"hidden": (4, 0)}, r"hidden: got \(4, 0\), wanted at least one width"),
        ("mmoe", {"cross": "fm"}, "cross: got 'fm', wanted one of dlrm, wide_deep, deepfm"),
        ("mmoe", {"exclusive_dim": -1}, "exclusive_dim: got -1, wanted at least 0"),
    ],
)
def test_bad_input_is_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        new(name, **options)
