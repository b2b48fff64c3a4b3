"""What a batch does to a model: scales, factors, alternation, one joint step, and projected gradients."""

import pytest
import torch
from torch import Tensor, nn

from lt4rec_sparse.nn.optim import MaskedAdam
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models import HardSharing, loss_of
from lt4rec_sparse.recsys.training import Alternating, Joint, Projected, TaskLosses
from lt4rec_sparse.recsys.training.objectives import ROW_TILE

LOSSES = {"ctr": loss_of("binary"), "cvr": loss_of("ratio")}


class Gradients:
    """Stands for an optimiser: keeps the gradients of every step and moves nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.steps = model, []

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def step(self, *tasks: str) -> None:
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.steps.append((tasks, found))


@pytest.fixture
def batch(small_log):
    return next(small_log.stream("train", 64, seed=1).epoch(0))


@pytest.fixture
def model(small_log):
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(small_log.encoder.fields, small_log.encoder.table_sizes, dim=2)
    return HardSharing(inputs, ("ctr", "cvr"), (4,)).double()


def gradients(objective, model, batch) -> list[tuple[tuple[str, ...], dict[str, Tensor]]]:
    recorder = Gradients(model)
    objective.step(model, recorder, batch)
    return recorder.steps


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Two orders of summation over a batch's rows, in float64: some hundred roundings of the largest."""
    for name in got.keys() | wanted.keys():
        a, b = (d.get(name, torch.zeros(())) for d in (got, wanted))
        assert ((a - b).abs() <= 500 * torch.finfo(torch.float64).eps * max(float(b.abs().max()), 1e-300)).all(), name


def added(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = {name for part in parts for name in part}
    return {name: sum(part[name] for part in parts if name in part) for name in names}


class CountsRows(nn.Module):
    """A model whose logit of a row is one parameter; remembers how many rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.logit, self.seen = nn.Parameter(torch.zeros(())), []

    def forward(self, features, task):
        self.seen.append(features.batch)
        return self.logit.expand(features.batch, 1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_lower_dtype_runs_on_whole_tiles_of_rows_and_nothing_that_fills_them_counts(batch, dtype):
    n = int(batch.rows["cvr"].sum())
    assert 0 < n < len(batch.rows["cvr"]), "a part of the batch"
    model = CountsRows()
    ((_, found),) = gradients(Alternating(TaskLosses({"cvr": LOSSES["cvr"]}, dtype=dtype)), model, batch)
    assert model.seen == [n if dtype is None else -(-n // ROW_TILE) * ROW_TILE]
    rows = batch.rows["cvr"].nonzero().squeeze(1)
    x = torch.zeros(n, requires_grad=True)
    LOSSES["cvr"](x, batch.labels["cvr"][rows], batch.weights["cvr"][rows]).backward()
    assert abs(float(found["logit"]) - float(x.grad.double().sum())) <= n * 2.0**-24  # n terms below 1 in float32


def test_alternation_steps_each_task_on_its_own_rows(model, batch):
    steps = gradients(Alternating(TaskLosses(LOSSES)), model, batch)
    assert [tasks for tasks, _ in steps] == [("ctr",), ("cvr",)]
    assert not any(name.startswith("mlps.cvr") for name in steps[0][1])
    rows = batch.rows["cvr"]
    assert 0 < rows.sum() < len(rows), "a batch in which the second task has some rows and not all"
    logits = model(batch.features.take(rows.nonzero().squeeze(1)), "cvr").squeeze(1)
    loss = LOSSES["cvr"](logits, batch.labels["cvr"][rows], batch.weights["cvr"][rows])
    model.zero_grad(set_to_none=True)
    loss.backward()
    assert_same(steps[1][1], {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_a_joint_step_is_the_sum_of_the_tasks_steps(model, batch):
    losses = TaskLosses(LOSSES)
    ((tasks, joint),) = gradients(Joint(losses, ("ctr", "cvr")), model, batch)
    assert tasks == ()
    assert_same(joint, added([found for _, found in gradients(Alternating(losses), model, batch)]))
    both = Projected(losses, ("ctr", "cvr"), lambda parts: [torch.stack(p).sum(0) for p in zip(*parts, strict=True)])
    ((_, projected),) = gradients(both, model, batch)
    assert_same({n: g for n, g in projected.items() if g.any()}, {n: g for n, g in joint.items() if g.any()})


def test_sparse_gradients_are_not_projected(batch, small_log):
    encoder = small_log.encoder
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, dim=4, sparse_gradients=True)
    sparse = HardSharing(inputs, ("ctr", "cvr"), (8,))
    projected = Projected(TaskLosses(LOSSES), ("ctr", "cvr"), lambda gradients: gradients[0])
    with pytest.raises(ValueError, match="gradients: got a sparse one, wanted dense ones to project"):
        projected.step(sparse, MaskedAdam(sparse), batch)


def test_scales_multiply_losses(model, batch):
    plain = gradients(Alternating(TaskLosses(LOSSES)), model, batch)
    scaled = gradients(Alternating(TaskLosses(LOSSES, {"cvr": 4.0})), model, batch)  # a power of two rounds nothing
    assert all(torch.equal(scaled[0][1][name], g) for name, g in plain[0][1].items())
    assert all(torch.equal(scaled[1][1][name], 4 * g) for name, g in plain[1][1].items())


def test_factors_scale_rows_and_do_not_only_share_the_loss_out(model, batch):
    """The loss is `sum(f w l) / sum(w)`: all factors 2 double it, where weights 2 would change nothing."""
    rows = len(batch.rows["ctr"])
    plain = TaskLosses(LOSSES)(model, batch)
    doubled = TaskLosses(LOSSES, factors=lambda b: dict.fromkeys(LOSSES, torch.full((rows,), 2.0)))(model, batch)
    for task, loss in plain.items():
        assert doubled[task].item() == pytest.approx(2 * loss.item(), rel=1e-6)  # weights are float32
    alone = torch.zeros(rows)
    alone[3] = 5.0
    found = TaskLosses(LOSSES, factors=lambda b: dict.fromkeys(LOSSES, alone))(model, batch)["ctr"]
    one = batch.take(torch.tensor([3]))
    of_one = LOSSES["ctr"](model(one.features, "ctr").squeeze(1), one.labels["ctr"], one.weights["ctr"])
    assert found.item() == pytest.approx(5 * of_one.item() / batch.weights["ctr"].sum().item(), rel=1e-6)


def test_a_task_without_rows_takes_no_step(model, batch):
    unclicked = batch.take((~batch.rows["cvr"]).nonzero().squeeze(1))
    assert [tasks for tasks, _ in gradients(Alternating(TaskLosses(LOSSES)), model, unclicked)] == [("ctr",)]
    assert list(TaskLosses(LOSSES)(model, unclicked)) == ["ctr"]


def test_products_in_bfloat16_give_float32_losses_and_gradients(model, batch):
    model = model.float()
    losses = TaskLosses(LOSSES, dtype=torch.bfloat16)
    optimizer = MaskedAdam(model)
    found = Joint(losses, ("ctr", "cvr")).step(model, optimizer, batch)
    assert all(loss.dtype == torch.float32 for loss in found.values())
    assert all(p.dtype == torch.float32 for p in model.parameters())
