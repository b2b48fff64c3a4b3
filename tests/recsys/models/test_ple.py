import pytest
import torch
from oracle import Bounded, assert_rounding
from recsys.models.samples import FIELDS, SIZES, TASKS, features, reached, with_integers
from recsys.models.test_gate import naive_mixture, roundings

from lt4rec_sparse.recsys.models import build


def new(tasks=TASKS, hidden=(8, 6, 4), **options):
    return build("ple", FIELDS, SIZES, tasks, hidden, 3, **options)


def test_one_level_equals_a_naive_implementation():
    model = with_integers(new(levels=1, task_experts=2, shared_experts=1, expert=(5,), tower=()))
    x = model.inputs(features()).detach()
    (level,) = model.levels
    for task in model.tasks:
        outputs = [expert(x).detach() for expert in [*level.own[task], *level.shared]]
        head = model.towers[task].head
        weight, bias = head.weight.detach().double(), head.bias.detach().double()
        mixture = naive_mixture(x, level.gates[task].linear.weight, outputs)
        magnitude = mixture @ weight.abs().T + bias.abs()
        bound = (roundings(3) + 5 + 1) * 2.0**-24 * magnitude
        assert_rounding(model(features(), task).detach(), Bounded(mixture @ weight.T + bias, bound))


def test_two_levels_by_means():
    # Four experts at a task's gate and eight at the shared one, equal gates: means of integers are exact.
    model = with_integers(new(levels=2, task_experts=2, shared_experts=2, expert=(5,), tower=()))
    first, last = model.levels
    for name, parameter in model.named_parameters():
        if "gate" in name:
            torch.nn.init.zeros_(parameter)
    x = model.inputs(features())
    own = {task: [expert(x) for expert in first.own[task]] for task in TASKS}
    shared = [expert(x) for expert in first.shared]
    of_all = torch.stack([*own["ctr"], *own["cvr"], *own["like"], *shared]).sum(0) / 8
    of_cvr = torch.stack([*own["cvr"], *shared]).sum(0) / 4
    outputs = [expert(of_cvr) for expert in last.own["cvr"]] + [expert(of_all) for expert in last.shared]
    assert torch.equal(model(features(), "cvr"), model.towers["cvr"](torch.stack(outputs).sum(0) / 4))


def test_exclusive_experts_learn_from_their_task_alone_at_the_last_level():
    model = new(("ctr", "cvr"))
    names = reached(model, model(features(), "ctr").sum())
    of_cvr = {name for name in names if ".cvr." in name}
    assert of_cvr, "the first level's experts of the other task go through the shared gate"
    assert all(name.startswith("levels.0.own.cvr.") for name in of_cvr)
    assert any(name.startswith("levels.0.shared_gate") for name in names)
    model = new(("ctr", "cvr"), levels=1)
    assert not [name for name in reached(model, model(features(), "ctr").sum()) if ".cvr." in name]


def test_every_parameter_is_reached_by_some_task():
    model = new(levels=3)
    assert reached(model, model(features()).sum()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 0}, "levels: got 0, wanted at least 1"),
        ({"task_experts": 0}, "task_experts: got 0, wanted at least 1"),
        ({"shared_experts": 0}, "shared_experts: got 0, wanted at least 1"),
        ({"expert": ()}, "expert: got no layer, wanted at least one width"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        new(**options)
