import pytest
import torch
from oracle import Bounded, assert_rounding
from recsys.models.samples import FIELDS, SIZES, features, reached, with_integers
from recsys.models.test_gate import naive_mixture, roundings

from lt4rec_sparse.recsys.models import build


def new(hidden=(8, 6, 4), **options):
    return build("mmoe", FIELDS, SIZES, ("ctr", "cvr"), hidden, 3, **options)


def test_equals_a_naive_implementation():
    model = with_integers(new(experts=3, expert=(5,), tower=()))
    x = model.inputs(features()).detach()
    # Of integers, what the experts say and the gates' logits are exact; then come the mixture and the head.
    outputs = [expert(x).detach() for expert in model.experts]
    for task in model.tasks:
        head = model.towers[task].head
        weight, bias = head.weight.detach().double(), head.bias.detach().double()
        mixture = naive_mixture(x, model.gates[task].linear.weight, outputs)  # of outputs that are not negative
        magnitude = mixture @ weight.abs().T + bias.abs()
        bound = (roundings(3) + 5 + 1) * 2.0**-24 * magnitude
        assert_rounding(model(features(), task).detach(), Bounded(mixture @ weight.T + bias, bound))


def test_defaults_and_options():
    model = new()
    assert [tuple(layer.out_features for layer in e.layers) for e in model.experts] == [(4, 3)] * 4
    assert [layer.out_features for layer in model.towers["ctr"].layers] == [4]
    model = new(experts=2, expert=[5, 2], tower=[7])
    assert [tuple(layer.out_features for layer in e.layers) for e in model.experts] == [(5, 2)] * 2


def test_a_task_reaches_every_expert_and_its_own_gate_and_tower():
    model = new()
    names = reached(model, model(features(), "ctr").sum())
    assert {name.split(".")[1] for name in names if name.startswith("experts.")} == {"0", "1", "2", "3"}
    assert {name.split(".")[1] for name in names if name.startswith(("gates.", "towers."))} == {"ctr"}


@pytest.mark.parametrize("options", [{"experts": 0}, {"expert": ()}])
def test_bad_input_is_named(options):
    with pytest.raises(ValueError, match=r"experts: got .*, wanted at least one, with a layer"):
        new(**options)


def test_equal_gates_give_the_mean():
    model = with_integers(new(experts=4, expert=(5,), tower=()))
    for gate in model.gates.values():
        torch.nn.init.zeros_(gate.linear.weight)
    x = model.inputs(features())
    mean = torch.stack([expert(x) for expert in model.experts]).sum(0) / 4
    assert torch.equal(model(features(), "ctr"), model.towers["ctr"](mean))
