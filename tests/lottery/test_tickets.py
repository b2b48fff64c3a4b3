from itertools import pairwise

import pytest
import torch

from lt4rec_sparse import MaskedMLP
from lt4rec_sparse.lottery import GRANULARITIES, Ticket, best_ticket, prune_by_magnitude, search_tickets
from lt4rec_sparse.lottery.pruning import tile_shape
from lt4rec_sparse.masks import Mask


def assert_shrinking(tickets):
    for before, after in pairwise(tickets):
        assert all((before.mask[name] | ~kept).all() for name, kept in after.mask.items())


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
    assert_shrinking(tickets)
    trained = {f"layers.{i}": recorder.starts[0][f"layers.{i}.weight"].clone() for i in range(2)}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in recorder.starts[0].items():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.removesuffix(".weight") in trained:
            trained[name.removesuffix(".weight")] += noise
    assert tickets[1].mask == prune_by_magnitude(trained, tickets[0].mask, tickets[1].mask.nnz)


@pytest.mark.parametrize("granularity", GRANULARITIES[2:-1])
def test_a_search_by_blocks_ends_in_blocks(tmp_path, granularity):
    high, wide = tile_shape(granularity, (1, 1))
    torch.manual_seed(0)
    mlp = MaskedMLP(4 * wide + 3, hidden=(4 * high, 2 * high + 1))
    trained = []

    def train_and_judge(level):
        trained.append({name: weight.detach().clone() for name, weight in mlp.masked_weights().items()})
        return {"auc": 0.5}

    tickets = search_tickets("ctr", mlp, mlp, train_and_judge, 2, 0.2, tmp_path, granularity)
    for level, (before, after) in enumerate(zip(tickets[:-1], tickets[1:], strict=True)):
        nnz = round(before.mask.size * 0.2 ** ((level + 1) / 2))
        assert after.mask == prune_by_magnitude(trained[level], before.mask, nnz, granularity)
        assert nnz - high * wide < after.mask.nnz <= nnz
    for kept in tickets[-1].mask.values():
        for rows in kept.split(high):
            assert all(block.all() or not block.any() for block in rows.split(wide, dim=1))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_search_layer_by_layer_keeps_the_same_share_of_each(tmp_path, granularity):
    torch.manual_seed(0)
    mlp = MaskedMLP(8, hidden=(6, 4))
    # Of ten rounds the first ask for more than half of the weights, and 2:4 has less alive already.
    tickets = search_tickets("ctr", mlp, mlp, Recorder(mlp), 10, 0.2, tmp_path, granularity, "layer")
    assert_shrinking(tickets)
    for ticket in tickets:
        density = 0.2 ** (ticket.level / 10)
        wanted = {"layers.0": round(48 * density), "layers.1": round(24 * density)}
        if granularity == "weight":
            assert ticket.mask.layer_nnz() == wanted
        if granularity == "2:4" and ticket.level:
            allowed = {"layers.0": 24, "layers.1": 16}  # 2 of the last 2 of 6
            assert ticket.mask.layer_nnz() == {name: min(nnz, allowed[name]) for name, nnz in wanted.items()}


def test_every_level_begins_at_the_start_that_is_given(tmp_path):
    torch.manual_seed(0)
    mlp = MaskedMLP(8, hidden=(6, 4))
    start = {
        name: value + 1 if value.is_floating_point() else value.clone() for name, value in mlp.state_dict().items()
    }
    kept = {name: value.clone() for name, value in start.items()}
    start["layers.0.masks"][:] = False  # the start's masks are ignored
    recorder = Recorder(mlp)
    tickets = search_tickets("ctr", mlp, mlp, recorder, 2, 0.2, tmp_path, start=start)
    assert [ticket.mask.nnz for ticket in tickets] == [72, round(72 * 0.2**0.5), round(72 * 0.2)]
    for at_level in recorder.starts:
        assert all(torch.equal(value, kept[name]) for name, value in at_level.items())


def test_a_search_by_no_scope_trains_nothing(tmp_path):
    mlp = MaskedMLP(8, hidden=(6, 4))
    with pytest.raises(ValueError, match="scope: got 'row', wanted one of global, layer"):
        search_tickets("ctr", mlp, mlp, Recorder(mlp), 1, 0.2, tmp_path / "tickets", scope="row")
    assert not (tmp_path / "tickets").exists()


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
