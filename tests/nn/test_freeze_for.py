"""`freeze` for a precision, an example and batch sizes: what each call then computes in, and what is refused."""

import pytest
import torch
from oracle import assert_exact
from pruned_models import Residual, pruned
from torch import nn

from lt4rec_sparse import MaskedMLP, SparseMLP, freeze, report
from lt4rec_sparse.nn.observe import batch_of, calls_of, inputs_of


def tower() -> nn.Module:
    return nn.Sequential(pruned(24, 16), nn.GELU(), pruned(16, 8), nn.Softmax(-1), pruned(8, 4))


class ByName(nn.Module):
    """Two inputs by name; one layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.layer = pruned(8, 8)

    def forward(self, *, left, right):
        return self.layer(left) + self.layer(right)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_every_call_computes_in_the_precision(precision):
    model, x = tower(), torch.randn(50, 24)
    frozen = freeze(model, precision=precision, example=x)
    plain = freeze(model)
    first = plain[0].calibrated(x).to_precision(precision)
    last = plain[4].calibrated(plain[:4](x)).to_precision(precision)
    assert [call.precision for call in calls_of(frozen).values()] == [precision] * 2
    assert_exact(frozen[0](x), first(x))
    h = plain[:4](x)
    if precision == "bf16":
        assert_exact(frozen[4](h), last(h))
    else:  # calibrated on what reaches it in the frozen model in fp32
        assert frozen[4].network.quantization == last.network.quantization


def test_bf16_needs_no_example():
    frozen = freeze(tower(), precision="bf16")
    assert {call.precision for call in calls_of(frozen).values()} == {"bf16"}


def test_a_layer_that_runs_twice_is_calibrated_on_both():
    left, right = torch.rand(4, 8), -torch.rand(6, 8)
    frozen = freeze(ByName(), precision="int8", example={"left": left, "right": right[:4]})
    wanted = freeze(ByName()).layer.calibrated(torch.cat([left, right[:4]]))
    assert frozen.layer.network.quantization == wanted.network.quantization
    found = inputs_of(frozen, {"left": left, "right": right[:4]})
    assert [len(x) for x in found["layer"]] == [4, 4]
    assert report(frozen, {"left": left, "right": right[:4]}).entries[0].rows == 4


def test_batch_sizes_are_those_of_the_model():
    model = nn.Sequential(Residual(16), nn.Flatten(), pruned(5 * 16, 3))
    frozen = freeze(model, example=torch.randn(2, 5, 16), batch_sizes=(1, 4))
    x = torch.randn(3, 5, 16)
    plans = {name: call._given.plan for name, call in calls_of(frozen).items()}
    assert {name: [b.batch for b in plan.batches] for name, plan in plans.items()} == {
        "0.wide": [5, 20],
        "0.narrow": [5, 20],
        "2": [1, 4],
    }
    torch.testing.assert_close(frozen(x), freeze(model)(x), rtol=1e-5, atol=1e-6)


def test_a_masked_mlp_is_prepared_too():
    frozen = freeze(MaskedMLP(8, (6, 4), tasks=("a", "b")), sigmoid=True, precision="int8", example=torch.randn(90, 8))
    assert isinstance(frozen, SparseMLP)
    assert frozen.precision == "int8"


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = pruned(8, 8), pruned(8, 8)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp16"}, "precision: got 'fp16', wanted one of fp32, bf16, int8"),
        ({"precision": "int8"}, "example: got None, wanted an input of the model"),
        ({"batch_sizes": (1,)}, "example: got None, wanted an input of the model"),
        (
            {"precision": "int8", "example": torch.randn(3, 8)},
            "example: got one that does not reach unused, wanted one that runs every layer",
        ),
        ({"example": torch.randn(3, 8), "batch_sizes": (4, 1)}, "batch_sizes: got .4, 1., wanted"),
        ({"example": torch.randn(3, 8), "batch_sizes": ()}, "batch_sizes: got .., wanted"),
        ({"example": torch.randn(3, 8), "batch_sizes": (0,)}, "batch_sizes: got .0,., wanted"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        freeze(Skips(), **arguments)


def test_an_example_has_rows():
    assert batch_of((torch.tensor(1.0), torch.ones(3, 2))) == 3
    for bad in (torch.tensor(1.0), (), "text", torch.ones(0, 2)):
        with pytest.raises(ValueError, match=r"example: got .*, wanted a tensor of at least one row"):
            batch_of(bad)


def test_a_call_becomes_only_one_of_its_form():
    with pytest.raises(ValueError, match=r"other: got a network of widths 8-4, .*, wanted widths 8-8"):
        freeze(pruned(8, 8)).become(freeze(pruned(8, 4)))
