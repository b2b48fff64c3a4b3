import pytest
import torch

from lt4rec_sparse import MaskedMLP
from lt4rec_sparse.lottery import (
    GRANULARITIES,
    Ticket,
    best_ticket,
    level_nnz,
    one_for_all,
    prune_by_magnitude,
    random_like,
    random_uniform,
    search_tickets,
)
from lt4rec_sparse.masks import Mask


class Recorder:
    """Stands in for training: moves every weight, notes what state it was given."""

    def __init__(self, mlp: MaskedMLP, fail_at: int | None = None) -> None:
        self.mlp, self.fail_at, self.levels, self.starts = mlp, fail_at, [], []

    def __call__(self, level: int) -> dict[str, float]:
        if level == self.fail_at:
            raise KeyboardInterrupt
        self.levels.append(level)
        self.starts.append({name: p.detach().clone() for name, p in self.mlp.named_parameters()})
        generator = torch.Generator().manual_seed(level)
        for parameter in self.mlp.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator)
        return {"auc": 0.7 + 0.01 * level}


def search(folder, fail_at=None, rounds=3):
    torch.manual_seed(0)
    mlp = MaskedMLP(8, hidden=(6, 4))
    recorder = Recorder(mlp, fail_at)
    return recorder, lambda: search_tickets("ctr", mlp, mlp, recorder, rounds, 0.2, folder)


def test_every_round_rewinds_everything_and_prunes_what_was_trained(tmp_path):
    recorder, go = search(tmp_path)
    tickets = go()
    assert recorder.levels == [0, 1, 2, 3]
    for start in recorder.starts[1:]:
        assert all(torch.equal(start[name], recorder.starts[0][name]) for name in start)
    assert [t.mask.nnz for t in tickets] == [
        72,
        round(72 * 0.2 ** (1 / 3)),
        round(72 * 0.2 ** (2 / 3)),
        round(72 * 0.2),
    ]
    assert all(after.mask.is_subset(before.mask) for before, after in zip(tickets[:-1], tickets[1:], strict=True))
    trained = {f"layers.{i}": recorder.starts[0][f"layers.{i}.weight"].clone() for i in range(2)}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in recorder.starts[0].items():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.removesuffix(".weight") in trained:
            trained[name.removesuffix(".weight")] += noise
    assert tickets[1].mask == prune_by_magnitude(trained, tickets[0].mask, tickets[1].mask.nnz)


@pytest.mark.parametrize("granularity", GRANULARITIES[1:4])
def test_a_search_by_blocks_ends_in_blocks(tmp_path, granularity):
    side = int(granularity.removeprefix("block"))
    torch.manual_seed(0)
    mlp = MaskedMLP(4 * side + 3, hidden=(4 * side, 2 * side + 1))
    trained = []

    def train_and_judge(level):
        trained.append({name: weight.detach().clone() for name, weight in mlp.masked_weights().items()})
        return {"auc": 0.5}

    tickets = search_tickets("ctr", mlp, mlp, train_and_judge, 2, 0.2, tmp_path, granularity)
    for level, (before, after) in enumerate(zip(tickets[:-1], tickets[1:], strict=True)):
        nnz = level_nnz(before.mask.size, 0.2, 2, level + 1)
        assert after.mask == prune_by_magnitude(trained[level], before.mask, nnz, granularity)
        assert nnz - side**2 < after.mask.nnz <= nnz
    for kept in tickets[-1].mask.values():
        for rows in kept.split(side):
            assert all(block.all() or not block.any() for block in rows.split(side, dim=1))


def test_a_search_by_no_granularity_trains_nothing(tmp_path):
    mlp = MaskedMLP(8, hidden=(6, 4))
    with pytest.raises(ValueError, match="granularity: got 'row', wanted one of"):
        search_tickets("ctr", mlp, mlp, Recorder(mlp), 1, 0.2, tmp_path / "tickets", "row")
    assert not (tmp_path / "tickets").exists()


@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path, fail_at):
    wanted = search(tmp_path / "whole")[1]()
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "cut", fail_at)[1]()
    recorder, go = search(tmp_path / "cut")
    got = go()
    assert recorder.levels == list(range(fail_at, 4))
    assert [(t.level, t.metrics) for t in got] == [(t.level, t.metrics) for t in wanted]
    assert all(a.mask == b.mask for a, b in zip(got, wanted, strict=True))


def test_a_finished_search_trains_nothing(tmp_path):
    search(tmp_path)[1]()
    recorder, go = search(tmp_path)
    go()
    assert recorder.levels == []


def tickets_with(metric: str, values: list[float]) -> list[Ticket]:
    mask = Mask.full({"w": (1, 1)})
    return [Ticket("task", level, mask, {metric: value}) for level, value in enumerate(values)]


def test_best_ticket_goes_the_right_way_and_is_never_the_full_mask():
    assert best_ticket(tickets_with("auc", [0.9, 0.7, 0.8, 0.6]), "auc", higher_is_better=True).level == 2
    assert best_ticket(tickets_with("mse", [0.1, 0.3, 0.2, 0.25]), "mse", higher_is_better=False).level == 2


def test_a_metric_that_is_no_number_chooses_nothing():
    with pytest.raises(ValueError, match="got auc = NaN"):
        best_ticket(tickets_with("auc", [0.9, float("nan"), 0.8]), "auc", higher_is_better=True)


def test_of_equal_tickets_the_sparser_is_best():
    assert best_ticket(tickets_with("mse", [0.1, 0.2, 0.2, 0.3]), "mse", higher_is_better=False).level == 2


def test_controls_keep_what_they_promise():
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0": (10, 20), "layers.1": (5, 10)}
    tickets = {
        "ctr": Mask.random(shapes, {"layers.0": 30, "layers.1": 40}, generator),
        "cvr": Mask.random(shapes, {"layers.0": 60, "layers.1": 20}, generator),
    }
    like = random_like(tickets, generator)
    assert {t: m.layer_nnz() for t, m in like.items()} == {t: m.layer_nnz() for t, m in tickets.items()}
    assert all(like[task] != tickets[task] for task in tickets)
    uniform = random_uniform(tickets, generator)
    assert uniform["ctr"].layer_nnz() == {"layers.0": 56, "layers.1": 14}
    assert one_for_all(tickets, "ctr") == {"ctr": tickets["ctr"], "cvr": tickets["ctr"]}


@pytest.mark.parametrize("granularity", ["block16", "neuron"])
def test_controls_of_blocks_are_blocks(granularity):
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0": (64, 80), "layers.1": (32, 64)}
    weights = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    tickets = {"ctr": prune_by_magnitude(weights, Mask.full(shapes), 2200, granularity)}
    (like,) = random_like(tickets, generator, granularity).values()
    (uniform,) = random_uniform(tickets, generator, granularity).values()
    assert like.layer_nnz() == tickets["ctr"].layer_nnz()
    assert like != tickets["ctr"]
    for mask in (like, uniform):
        for kept in mask.values():
            rows, columns = (16, 16) if granularity == "block16" else (1, kept.shape[1])
            assert all(b.all() or not b.any() for row in kept.split(rows) for b in row.split(columns, dim=1))
    for name, kept in uniform.items():
        size = 256 if granularity == "block16" else kept.shape[1]
        assert 0 <= round(kept.numel() * tickets["ctr"].density) - uniform.layer_nnz()[name] < size
