"""Chains that only a forward shows: they are fused where torch.fx can trace it, and nothing changes where it cannot."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact
from pruned_models import pruned
from torch import fx, nn

from lt4rec_sparse import SparseLinear, SparseMLP, freeze, load_module, report, save_module, unfreeze
from lt4rec_sparse.nn.fused import FusedSequential
from lt4rec_sparse.nn.observe import calls_of
from lt4rec_sparse.nn.traced import FUNCTIONS, with_sequentials


class Written(nn.Module):
    """Two pruned layers, and what a forward writes between and around them."""

    def __init__(self, between, amount=0.8):
        super().__init__()
        self.a, self.b, self.between = pruned(12, 16, amount, 1), pruned(16, 4, amount, 2), between

    def forward(self, x):
        return self.b(self.between(self.a(x))) + 1


BETWEEN = {
    "relu": F.relu,
    "relu in place": lambda z: F.relu(z, inplace=True),
    "torch.relu": torch.relu,
    "method": lambda z: z.relu(),
    "sigmoid": torch.sigmoid,
    "sigmoid method": lambda z: z.sigmoid(),
    "tanh": torch.tanh,
    "tanh method": lambda z: z.tanh(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda z: F.gelu(z, approximate="tanh"),
    "hardswish": F.hardswish,
    "leaky": lambda z: F.leaky_relu(z, 0.3),
    "leaky by default": F.leaky_relu,
    "elu": lambda z: F.elu(z, alpha=0.5),
    "dropout": lambda z: F.relu(F.dropout(z, 0.5, training=False)),
    "module": nn.GELU(),
    "modules": nn.Sequential(nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout()),
    "nothing": lambda z: z,
}


def assert_serves(model, frozen, x):
    torch.testing.assert_close(frozen(x), copy.deepcopy(model).eval()(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_what_is_written_between_layers_is_fused(between):
    model, x = Written(between), torch.randn(5, 12)
    frozen = freeze(model, trace=True)
    assert isinstance(frozen, fx.GraphModule)
    (call,) = calls_of(frozen).values()
    assert call.network.depth == 2
    assert_serves(model, frozen, x)
    assert type(model) is Written
    assert type(model.a) is nn.Linear
    assert len(calls_of(freeze(model))) == 2  # only where it is asked for


OTHERWISE = {
    "softmax": lambda z: F.softmax(z, -1),
    "in place": lambda z: z.relu_(),
    "read twice": lambda z: z * torch.sigmoid(z),
    "dropout at inference": lambda z: F.dropout(z, 0.0),
    "a slope that is computed": lambda z: F.leaky_relu(z, z.shape[-1] / 100),
    "scaled": lambda z: F.relu(z) * 2,
}


@pytest.mark.parametrize("between", OTHERWISE.values(), ids=OTHERWISE)
def test_what_cannot_be_fused_is_computed_as_it_is_written(between):
    model = Written(between)
    frozen = freeze(model, trace=True)
    assert [call.network.depth for call in calls_of(frozen).values()] == [1, 1]
    assert_serves(model, frozen, torch.randn(5, 12))


class Choosing(Written):
    def forward(self, x):
        return self.b(F.relu(self.a(x))) if x.sum() > 0 else self.b(self.a(x))


class WithDefault(Written):
    def forward(self, x, mask=None):
        y = self.b(F.relu(self.a(x)))
        return y if mask is None else y * mask


class Many(Written):
    def forward(self, *xs):
        return self.b(F.relu(self.a(xs[0])))


class Counting(Written):
    def forward(self, x):
        return self.b(F.relu(self.a(x[: len(x)])))


@pytest.mark.parametrize("kind", [Choosing, WithDefault, Many, Counting])
def test_what_cannot_be_traced_stays_what_it_is(kind):
    model = kind(None)
    frozen = freeze(model, trace=True)
    assert type(frozen) is kind
    for x in (torch.ones(3, 12), -torch.ones(2, 12)):
        assert_serves(model, frozen, x)


def test_a_hook_within_keeps_a_module_from_being_traced():
    class Inner(Written):
        pass

    model = nn.Sequential(nn.Flatten(), Inner(F.gelu), nn.Softmax(-1))
    model[1].register_forward_hook(lambda module, arguments, y: y * 2)
    frozen, x = freeze(model, trace=True), torch.randn(4, 12)
    assert type(frozen[1]) is Inner
    assert_serves(model, frozen, x)


class Outer(nn.Module):
    """Cannot be traced, and has parts that can; one layer that is used twice, and parts without anything pruned."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Written(F.gelu), Written(F.silu)
        self.dense = Written(F.relu, amount=0.0)
        self.again = pruned(12, 12)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, twice=True):
        x = self.again(x).relu()
        x = self.again(x).tanh() if twice else x
        return self.first(x) + self.second(x) * self.scale + self.dense(x)


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = pruned(12, 12)

    def forward(self, x):
        return F.gelu(self.layer(F.relu(self.layer(x)))) + self.layer(x)


def test_the_parts_of_what_cannot_be_traced_are():
    model, x = Outer(), torch.randn(3, 12)
    frozen = freeze(model, trace=True)
    assert type(frozen) is Outer
    assert [type(part) for part in (frozen.dense, frozen.again)] == [Written, SparseLinear]
    assert {name: call.network.depth for name, call in calls_of(frozen).items()} == {
        "first.a.0": 2,
        "second.a.0": 2,
        "again": 1,
    }
    assert_serves(model, frozen, x)
    torch.testing.assert_close(frozen(x, False), model(x, False).detach())
    assert [entry.name for entry in report(frozen, x).entries][:2] == ["first.a.0", "second.a.0"]


def test_a_layer_in_several_chains():
    model, x = Again(), torch.randn(3, 12)
    frozen = freeze(model, trace=True)
    assert sorted(call.network.depth for call in calls_of(frozen).values()) == [1, 2]
    assert_serves(model, frozen, x)


def test_a_trace_is_copied_stored_and_led_back(tmp_path):
    model, x = Outer(), torch.randn(3, 12)
    saved = freeze(model, trace=True, precision="bf16")
    for again in (copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        assert_exact(again(x), saved(x))
    save_module(saved, tmp_path / "net.safetensors")
    for into in (Outer(), saved, Outer().to("meta")):
        loaded = load_module(tmp_path / "net.safetensors", into)
        assert_exact(loaded(x), saved(x))
        assert loaded.state_dict().keys() == saved.state_dict().keys()
    assert_serves(model, unfreeze(saved), x)

    class Other(Outer):
        def __init__(self):
            super().__init__()
            self.second = WithDefault(None)

    with pytest.raises(ValueError, match=r"second: got a model that torch.fx does not trace there"):
        load_module(tmp_path / "net.safetensors", Other())


def test_everything_that_is_fused_as_a_module_is_known_as_a_function():
    z = torch.linspace(-3, 3, 7)
    made = [make() for function, make in FUNCTIONS.items() if function is not F.dropout]
    assert {type(module) for module in made} == {
        *(nn.ReLU, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.ELU)
    }
    for function, make in FUNCTIONS.items():
        if function is not F.dropout:
            wanted = getattr(z, function)() if isinstance(function, str) else function(z)
            assert_exact(make()(z), wanted)


def test_nothing_to_gather_leaves_the_model():
    model = nn.Sequential(Written(lambda z: F.softmax(z, -1)), nn.Linear(4, 4))
    assert type(with_sequentials(model)[0]) is Written
    assert isinstance(freeze(nn.Sequential(pruned(8, 8), nn.ReLU(), pruned(8, 4)), trace=True)[0], SparseMLP)


class Blocks(nn.Module):
    """What its forward shows is between its parts; within them it is written, or in an `nn.Sequential`."""

    def __init__(self, crosses):
        super().__init__()
        self.crosses = crosses
        self.written = Written(F.gelu)
        self.sequential = nn.Sequential(pruned(4, 12, seed=3), nn.ReLU(), pruned(12, 4, seed=4))

    def forward(self, x):
        h = self.written(x)
        return self.sequential(h) if self.crosses else self.sequential(h).softmax(-1) * h


@pytest.mark.parametrize("crosses", [True, False])
def test_the_smallest_module_that_shows_a_chain_is_traced(crosses):
    model, x = Blocks(crosses), torch.randn(3, 12)
    frozen = freeze(model, trace=True)
    assert type(frozen) is Blocks  # nothing of what it shows itself can be fused: a sum, a product
    assert isinstance(frozen.written, fx.GraphModule)
    assert type(frozen.sequential) is FusedSequential
    assert_serves(model, frozen, x)


class Follows(Blocks):
    def forward(self, x):
        return self.sequential(F.relu(self.written.b(self.written.a(x))))


def test_a_chain_across_parts_is_fused_where_it_is_shown():
    model, x = Follows(True), torch.randn(3, 12)
    frozen = freeze(model, trace=True)
    assert isinstance(frozen, fx.GraphModule)
    assert [call.network.depth for call in calls_of(frozen).values()] == [4]
    assert_serves(model, frozen, x)


class Counted(Written):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.b(F.relu(self.a(x)))


class Kept(Written):
    def forward(self, x):
        self.last = self.b(F.relu(self.a(x)))
        return self.last if x.sum() > 0 else -self.last


class OwnError(Exception):
    pass


class Raising(Written):
    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            raise OwnError
        return self.b(F.relu(self.a(x)))


@pytest.mark.parametrize("kind", [Counted, Kept, Raising])
def test_a_forward_that_does_more_than_compute_stays(kind):
    model, x = kind(None), torch.rand(3, 12)
    frozen = freeze(model, trace=True)
    assert type(frozen) is kind
    assert not any(isinstance(value, fx.Proxy) for value in vars(frozen).values())
    assert_serves(model, frozen, x)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = pruned(12, 16), pruned(16, 16)

    def forward(self, x):
        return self.b(F.gelu(self.a(x))) @ self.a.weight


def test_a_weight_that_is_read_too_is_read():
    model, x = Autoencoder(), torch.randn(3, 12)
    frozen = freeze(model, trace=True)
    assert [call.network.depth for call in calls_of(frozen).values()] == [2]
    assert_serves(model, frozen, x)
