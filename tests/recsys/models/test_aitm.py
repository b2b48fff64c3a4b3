import pytest
import torch
from oracle import Bounded, assert_rounding, small_integers
from recsys.models.samples import FIELDS, SIZES, TASKS, features, reached, with_integers

from lt4rec_sparse.recsys.models import build
from lt4rec_sparse.recsys.models.aitm import Transfer


def new(hidden=(8, 4), **options):
    return build("aitm", FIELDS, SIZES, TASKS, hidden, 3, **options)


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
    model = new()
    names = reached(model, model(features(), "ctr").sum())
    assert {name.split(".")[1] for name in names if not name.startswith("inputs.")} == {"ctr"}
    assert not [name for name in names if name.startswith(("handed.", "transfers."))]
    names = reached(model, model(features(), "cvr").sum())
    of_cvr = {".".join(name.split(".")[:2]) for name in names if not name.startswith("inputs.")}
    assert of_cvr == {"towers.ctr", "towers.cvr", "handed.ctr", "transfers.cvr", "heads.cvr"}


def test_each_tower_sees_its_own_view():
    model = new(exclusive_dim=2)
    names = reached(model, model(features(), "cvr").sum())
    exclusive = {name.split(".")[3] for name in names if ".exclusive." in name}
    assert exclusive == {"ctr", "cvr"}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="hidden: got no layer, wanted at least one width"):
        new(hidden=())
