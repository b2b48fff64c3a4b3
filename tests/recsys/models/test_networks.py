import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Bounded, Layer, assert_rounding, mlp_reference, small_integers
from recsys.models.samples import FIELDS, SIZES, TASKS, features, reached, with_integers
from torch import nn

from lt4rec_sparse import freeze
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models import CROSSES, MODELS, HardSharing, SparseSharing, build, entire_space, loss_of
from lt4rec_sparse.recsys.models.networks import MLP, Extraction, Gate, Transfer

SEVERAL = [name for name in MODELS if name != "single_task"]


def new(name, tasks=TASKS, hidden=(8, 6, 4), **options):
    torch.manual_seed(0)
    model = build(name, FIELDS, SIZES, tasks, hidden, 3, **options)
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
    assert model(features().take(torch.arange(0))).shape == (0, 1)


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


@pytest.mark.parametrize("kind", [SparseSharing, HardSharing])
def test_a_frozen_model_answers_as_the_trained_one(small_log, kind):
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(small_log.encoder.fields, small_log.encoder.table_sizes, dim=4)
    model = kind(inputs, ("ctr", "cvr"), (16, 8)).eval()
    mlps = {task: model.mlp if kind is SparseSharing else model.mlps[task] for task in model.tasks}
    generator = torch.Generator().manual_seed(0)
    for task, mlp in mlps.items():
        half = {name: kept.numel() // 2 for name, kept in mlp.mask(task).items()}
        mlp.set_mask(Mask.random(mlp.mask(task).shapes, half, generator), task)
    frozen = freeze(model)
    features = next(small_log.stream("test", 50, shuffle=False).epoch(0)).features
    with torch.no_grad():
        x = model.inputs(features)
    for i, (task, mlp) in enumerate(mlps.items()):
        layers = [
            Layer((layer.weight * layer.mask(task)).detach(), layer.bias.detach(), "relu")
            for layer in mlp.masked_layers()
        ]
        head = mlp.heads[task]
        reference = mlp_reference(x, [*layers, Layer(head.weight.detach(), head.bias.detach(), "none")])
        for y in (frozen(features, task), frozen(features)[:, i : i + 1], model(features, task).detach()):
            assert_rounding(y, reference)


# The parts


def test_an_mlp_equals_the_reference_and_starts_as_torchs_linear():
    torch.manual_seed(0)
    linears = [nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 1)]
    torch.manual_seed(0)
    mlp, x = MLP(5, (4, 3), head=1), torch.randn(6, 5)
    layers = [
        Layer(linear.weight.detach(), linear.bias.detach(), activation)
        for linear, activation in zip(linears, ("relu", "relu", "none"), strict=True)
    ]
    assert_rounding(mlp(x).detach(), mlp_reference(x, layers))


def test_without_a_head_an_mlp_ends_in_relu():
    assert (MLP(5, (4,))(torch.randn(6, 5)) >= 0).all()
    assert len(list(MLP(5, (), head=1).parameters())) == 2


def naive_mixture(x, weight, experts):
    """In float64, row by row."""
    weight, rows = weight.detach(), []
    for b in range(x.shape[0]):
        logits = [float(w.double() @ x[b].double()) for w in weight]
        powers = [torch.tensor(z - max(logits), dtype=torch.float64).exp() for z in logits]
        share = [p / sum(powers) for p in powers]
        rows.append(sum(s * expert[b].double() for s, expert in zip(share, experts, strict=True)))
    return torch.stack(rows)


def roundings(experts):
    """Of a mixture of exact outputs by exact logits: two exps of an ulp, a sum, a quotient, a product, a sum."""
    return 2 * 2 + experts + 1 + 1 + experts


@given(st.integers(1, 5), st.integers(0, 1000))
def test_a_gate_equals_a_naive_mixture(n, seed):
    generator = torch.Generator().manual_seed(seed)
    gate = with_integers(Gate(3, n), seed)
    x = small_integers(4, 3, generator=generator)
    experts = [small_integers(4, 2, generator=generator) for _ in range(n)]
    value = naive_mixture(x, gate.linear.weight, experts)
    magnitude = naive_mixture(x, gate.linear.weight, [expert.abs() for expert in experts])
    assert_rounding(gate(x, experts).detach(), Bounded(value, roundings(n) * 2.0**-24 * magnitude))


def assert_equals(y, model, task, experts, gate):
    """A model's logits are its tower's head over a naive mixture of the experts' outputs, which are exact."""
    x = model.inputs(features()).detach()
    outputs = [expert(x).detach() for expert in experts]  # not negative
    head = model.towers[task].head
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    mixture = naive_mixture(x, gate.linear.weight, outputs)
    bound = (roundings(len(experts)) + 5 + 1) * 2.0**-24 * (mixture @ weight.abs().T + bias.abs())
    assert_rounding(y.detach(), Bounded(mixture @ weight.T + bias, bound))


# MMoE and PLE; of one hidden width half is the experts', and a tower is a head alone


def test_mmoe_equals_a_naive_implementation():
    model = with_integers(new("mmoe", hidden=(10,)))
    for task in model.tasks:
        assert_equals(model(features(), task), model, task, model.experts, model.gates[task])


def test_widths_of_mmoe():
    model = new("mmoe")
    assert [tuple(layer.out_features for layer in e.layers) for e in model.experts] == [(4, 3)] * 4
    assert [layer.out_features for layer in model.towers["ctr"].layers] == [4]


def test_mmoe_with_equal_gates_gives_the_mean():
    model = with_integers(new("mmoe", hidden=(10,)))
    for gate in model.gates.values():
        torch.nn.init.zeros_(gate.linear.weight)
    x = model.inputs(features())
    mean = torch.stack([expert(x) for expert in model.experts]).sum(0) / 4
    assert torch.equal(model(features(), "ctr"), model.towers["ctr"](mean))


def test_a_task_reaches_every_expert_and_its_own_gate_and_tower():
    model = new("mmoe")
    names = reached(model, model(features(), "ctr").sum())
    assert {name.split(".")[1] for name in names if name.startswith("experts.")} == {"0", "1", "2", "3"}
    assert {name.split(".")[1] for name in names if name.startswith(("gates.", "towers."))} == {"ctr"}


@pytest.mark.parametrize("last", [True, False])
def test_a_level_of_ple_equals_a_naive_implementation(last):
    model = with_integers(new("ple", hidden=(10,)))
    level = with_integers(Extraction(model.inputs.out_features, (5,), TASKS, last))
    x = model.inputs(features())
    mixed, shared = level(dict.fromkeys(TASKS, x), x)
    for task in TASKS:
        experts = [*level.own[task], *level.shared]
        assert_equals(model.towers[task](mixed[task]), model, task, experts, level.gates[task])
    if last:
        assert shared is x
    else:
        everything = [*(expert for task in TASKS for expert in level.own[task]), *level.shared]
        assert_equals(model.towers["ctr"](shared), model, "ctr", everything, level.shared_gate)


def test_ple_is_its_levels_one_after_another():
    model = new("ple")
    first, last = model.levels
    x = model.inputs(features())
    of_task, shared = first(dict.fromkeys(TASKS, x), x)
    mixed, _ = last(of_task, shared)
    assert torch.equal(model(features(), "cvr"), model.towers["cvr"](mixed["cvr"]))
    assert reached(model, model(features()).sum()) == {name for name, _ in model.named_parameters()}


def test_an_expert_of_ple_learns_from_its_task_alone_at_the_last_level():
    model = new("ple", ("ctr", "cvr"))
    names = reached(model, model(features(), "ctr").sum())
    of_cvr = {name for name in names if ".cvr." in name}
    assert of_cvr, "the first level's experts of the other task go through the shared gate"
    assert all(name.startswith("levels.0.own.cvr.") for name in of_cvr)
    assert any(name.startswith("levels.0.shared_gate") for name in names)


# Shared bottom, ESMM, AITM


def test_layers_below_are_shared():
    model = new("shared_bottom")
    assert len(model.bottom.layers) == 2
    assert {len(model.towers[task].layers) for task in model.tasks} == {1}
    x = model.inputs(features())
    assert torch.equal(model(features(), "cvr"), model.towers["cvr"](model.bottom(x)))
    names = reached(model, model(features(), "ctr").sum())
    assert {name.split(".")[1] for name in names if name.startswith("towers.")} == {"ctr"}
    assert any(name.startswith("bottom.") for name in names)


def test_the_conversion_tower_learns_from_rows_that_nobody_clicked():
    model = new("esmm", ("ctr", "cvr"))
    click, conversion = model(features()).T
    names = reached(model, entire_space(click, conversion, torch.zeros(4), torch.ones(4)))
    assert names == {name for name, _ in model.named_parameters()}
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "cvr" in name]
    assert any(bool(gradient.any()) for gradient in gradients)


def test_a_click_teaches_the_conversion_tower_nothing():
    model = new("esmm", ("ctr", "cvr"))
    loss = loss_of("binary")(model(features(), "ctr").squeeze(1), torch.ones(4), torch.ones(4))
    names = reached(model, loss)
    assert not [name for name in names if "cvr" in name]
    assert "inputs.embedding" in names


def test_transfer_equals_a_naive_attention():
    width = 4  # whose square root is exact, as the logits of integers then are
    transfer = with_integers(Transfer(width), seed=1)
    generator = torch.Generator().manual_seed(2)
    p, q = (small_integers(6, width, generator=generator) for _ in range(2))
    value, magnitude = torch.zeros(6, width, dtype=torch.float64), torch.zeros(6, width, dtype=torch.float64)
    for row in range(6):
        seen = [u[row].double() for u in (p, q)]
        parts = []
        for u in seen:
            v, k, query = (
                layer.weight.detach().double() @ u + layer.bias.detach().double()
                for layer in (transfer.value, transfer.key, transfer.query)
            )
            parts.append((float(query @ k) / width**0.5, v))
        largest = max(score for score, _ in parts)
        powers = [torch.tensor(score - largest, dtype=torch.float64).exp() for score, _ in parts]
        for power, (_, v) in zip(powers, parts, strict=True):
            value[row] += power / sum(powers) * v
            magnitude[row] += power / sum(powers) * v.abs()
    # Two exps of an ulp, their sum, a quotient, a product, a sum of two.
    assert_rounding(transfer(p, q).detach(), Bounded(value, (2 * 2 + 2 + 1 + 1 + 2) * 2.0**-24 * magnitude))


def test_later_tasks_train_earlier_towers_and_never_the_other_way_round():
    model = new("aitm")
    names = reached(model, model(features(), "ctr").sum())
    assert {name.split(".")[1] for name in names if not name.startswith("inputs.")} == {"ctr"}
    assert not [name for name in names if name.startswith(("handed.", "transfers."))]
    names = reached(model, model(features(), "cvr").sum())
    of_cvr = {".".join(name.split(".")[:2]) for name in names if not name.startswith("inputs.")}
    assert of_cvr == {"towers.ctr", "towers.cvr", "handed.ctr", "transfers.cvr", "heads.cvr"}


def test_each_tower_sees_its_own_view():
    model = new("aitm", exclusive_dim=2)
    names = reached(model, model(features(), "cvr").sum())
    exclusive = {name.split(".")[3] for name in names if ".exclusive." in name}
    assert exclusive == {"ctr", "cvr"}
