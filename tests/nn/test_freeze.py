"""`freeze` of any module: what is pruned is compressed, what is between is fused, all else is as it was."""

import copy

import pytest
import torch
from pruned_models import Residual, assert_serves, in_blocks, pruned
from torch import nn
from torch.nn.utils import prune

from lt4rec_sparse import BlockWeight, MaskedLinear, MaskedMLP, SparseLinear, SparseMLP, freeze, report, unfreeze
from lt4rec_sparse.nn.copying import copy_of
from lt4rec_sparse.nn.fused import FusedSequential


def kinds(model: nn.Module) -> list[str]:
    return [type(child).__name__ for child in model.children()]


def test_layers_anywhere_are_compressed():
    model = nn.ModuleList([Residual(16), Residual(16)])
    model = nn.Sequential(*model, nn.Linear(16, 2))
    frozen = freeze(model)
    for block in list(frozen)[:2]:
        assert (type(block.wide), type(block.narrow)) == (SparseLinear, SparseLinear)
        assert isinstance(block.attention, nn.MultiheadAttention)
    assert type(frozen[2]) is nn.Linear
    assert_serves(model, frozen, torch.randn(3, 5, 16))


@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        ([pruned(9, 6), nn.GELU(), pruned(6, 4), nn.Tanh()], ["SparseMLP", *["Absorbed"] * 3]),
        # A small layer joins; one alone does not.
        ([pruned(90, 60), nn.SiLU(), nn.Linear(60, 2)], ["SparseMLP", "Absorbed", "Absorbed"]),
        ([pruned(9, 6), nn.ReLU(), nn.Linear(6, 60)], ["SparseLinear", "Absorbed", "Linear"]),
        ([nn.Linear(9, 60), nn.ReLU(), pruned(60, 4)], ["Linear", "ReLU", "SparseLinear"]),
        (
            [pruned(9, 6), nn.ReLU(), nn.Linear(6, 60), nn.ReLU(), pruned(60, 6)],
            ["SparseLinear", "Absorbed", "Linear", "ReLU", "SparseLinear"],
        ),
        ([nn.Flatten(), pruned(9, 6), nn.Softmax(1)], ["Flatten", "SparseLinear", "Softmax"]),
        ([pruned(9, 6), nn.ReLU(), nn.BatchNorm1d(6)], ["SparseLinear", "Absorbed", "BatchNorm1d"]),
        ([pruned(9, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.ReLU()], ["SparseLinear", "Absorbed", "BatchNorm1d", "ReLU"]),
        ([nn.BatchNorm1d(9), pruned(9, 6), nn.BatchNorm1d(6), nn.ELU()], ["SparseLinear", *["Absorbed"] * 3]),
        ([nn.Dropout(), pruned(9, 6), nn.ReLU(), nn.ReLU()], ["SparseLinear", "Absorbed", "Absorbed", "ReLU"]),
        ([nn.ReLU(), pruned(9, 6), nn.Sequential(nn.ReLU(), pruned(6, 3))], ["ReLU", "SparseLinear", "Sequential"]),
        ([pruned(9, 6), nn.PReLU(6), pruned(6, 3)], ["SparseMLP", "Absorbed", "Absorbed"]),
        ([MaskedLinear(9, 6), nn.ReLU(), pruned(6, 3)], ["SparseMLP", "Absorbed", "Absorbed"]),
        ([nn.BatchNorm1d(9, track_running_stats=False), pruned(9, 6)], ["BatchNorm1d", "SparseLinear"]),
    ],
)
def test_what_is_between_layers_is_fused(parts, kept):
    model = nn.Sequential(*parts)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) and module.running_var is not None:
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_()
    frozen = freeze(model)
    assert kinds(frozen) == [{"Sequential": "FusedSequential"}.get(kind, kind) for kind in kept]
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    assert_serves(model, frozen, torch.randn(7, first.in_features))


def test_blocks_are_run_with_the_dense_layers_between():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), in_blocks(64, 64), nn.ReLU(), nn.Linear(64, 32))
    frozen = freeze(model)
    assert kinds(frozen) == ["SparseMLP", *["Absorbed"] * 4]
    assert all(isinstance(layer.weight, BlockWeight) for layer in frozen[0].network.hidden)
    assert_serves(model, frozen, torch.randn(5, 64))


def test_zeros_of_a_layer_that_is_not_pruned_are_kept():
    model = nn.Sequential(in_blocks(64, 64), nn.ReLU(), nn.Linear(64, 16))
    with torch.no_grad():
        model[2].weight[3, 5] = 0
    assert freeze(model)[0].network.is_in_blocks


def test_a_layer_that_is_referred_to_from_several_places():
    shared, alone = pruned(8, 8), pruned(8, 8, seed=3)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(nn.Softmax(1), shared, nn.ReLU()), alone)
    model.also = nn.ModuleDict({"shared": shared})
    frozen = freeze(model)
    assert_serves(model[:4], frozen[:4].eval(), torch.randn(3, 8))
    assert isinstance(frozen.also["shared"], SparseLinear)
    activation = nn.Tanh()
    model = nn.Sequential(pruned(8, 8), activation, nn.Softmax(1), activation)
    assert kinds(freeze(model)) == ["SparseLinear", "Absorbed", "Softmax", "Tanh"]
    assert_serves(model, freeze(model), torch.randn(3, 8))


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class OwnNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + 1


class OwnDropout(nn.Dropout):
    def forward(self, x):
        return super().forward(x) + 1


class OwnReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("module", [OwnNorm(8), OwnDropout(), OwnReLU()], ids=lambda module: type(module).__name__)
def test_a_module_with_a_forward_of_its_own_is_neither_folded_nor_dropped(module):
    model = nn.Sequential(pruned(8, 8), module, pruned(8, 2))
    frozen = freeze(model)
    assert kinds(frozen) == ["SparseLinear", type(module).__name__, "SparseLinear"]
    assert_serves(model, frozen, torch.randn(3, 8))
    with pytest.raises(ValueError, match=f"1: got a {type(module).__name__}, wanted Linear"):
        SparseMLP.from_sequential(model)


def hooked() -> nn.Linear:
    linear = pruned(8, 8)
    linear.register_forward_hook(lambda module, args, y: y + 1)
    return linear


def own() -> nn.Linear:
    linear = Own(8, 8)
    with torch.no_grad():
        linear.weight[:, :6] = 0
    return linear


@pytest.mark.parametrize("make", [hooked, own, lambda: pruned(8, 8, 0.4)], ids=["hook", "own forward", "barely pruned"])
def test_what_cannot_be_compressed_is_left_as_it_is(make):
    model = nn.Sequential(pruned(8, 8), nn.Softmax(1), make(), nn.Softmax(1))
    frozen = freeze(model)
    assert kinds(frozen) == ["SparseLinear", "Softmax", type(model[2]).__name__, "Softmax"]
    assert_serves(model, frozen, torch.randn(3, 8))
    with pytest.raises(
        ValueError, match=r"model: got a \w+ without masked or pruned layers, wanted .* of which 50% is"
    ):
        freeze(make())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_of_16_bits_are_compressed(dtype):
    model = nn.Sequential(pruned(9, 6), nn.GELU(), pruned(6, 4), nn.Softmax(-1)).to(dtype)
    frozen, x = freeze(model), torch.randn(3, 9).to(dtype)
    assert kinds(frozen) == ["SparseMLP", "Absorbed", "Absorbed", "Softmax"]
    assert frozen[0].network.dtype == frozen(x).dtype == dtype
    exact = freeze(copy.deepcopy(model).float())[0](x.float())
    torch.testing.assert_close(frozen[0](x), exact.to(dtype), rtol=0, atol=0)
    (entry,) = report(frozen, x).entries
    assert entry.microseconds > 0


@pytest.mark.parametrize("to", [torch.float64, torch.device("meta")])
def test_layers_of_other_dtypes_and_devices_are_left(to):
    model = nn.Sequential(pruned(8, 8), nn.Softmax(1)).to(to)
    with pytest.raises(ValueError, match="without masked or pruned layers"):
        freeze(model)
    (entry,) = report(model).entries
    assert "wanted" in entry.why_dense
    assert str(to).removeprefix("device(type=") in entry.why_dense


def test_the_model_is_as_it_was():
    model = nn.Sequential(pruned(8, 8), nn.ReLU(), nn.BatchNorm1d(8), pruned(8, 2)).train()
    before = copy.deepcopy(model.state_dict())
    frozen = freeze(model)
    assert model.training
    assert kinds(model) == ["Linear", "ReLU", "BatchNorm1d", "Linear"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = torch.randn(3, 8)
    wanted = frozen(x)
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(frozen(x), wanted)


def test_a_module_alone_is_compressed():
    linear = pruned(8, 8)
    frozen = freeze(linear)
    assert type(frozen) is SparseLinear
    assert_serves(linear, frozen, torch.randn(3, 8))
    sequential = nn.Sequential(linear, nn.GELU(), pruned(8, 2))
    assert type(freeze(sequential)[0]) is SparseMLP


def transformer(depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
    for linear in (layer.linear1, layer.linear2, layer.self_attn.out_proj):
        prune.random_unstructured(linear, "weight", 0.8)
        prune.remove(linear, "weight")
    return layer if depth == 0 else nn.TransformerEncoder(layer, depth)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")  # torch's word about its own layer
@pytest.mark.parametrize("depth", [0, 2])
def test_a_transformer_of_torch_computes_through_its_sparse_layers(depth, monkeypatch):
    """In eval it has a fast path that reads the weights, and an attention that reads the weight of its output."""
    model = transformer(depth)
    frozen = freeze(model)
    layers = frozen.layers if depth else [frozen]
    for layer in layers:
        assert (type(layer.linear1), type(layer.linear2)) == (SparseMLP, nn.Identity)
        assert not isinstance(layer.self_attn.out_proj, SparseLinear)
    x = torch.randn(3, 5, 16)
    with torch.inference_mode():
        assert_serves(model, frozen, x)
    calls = []
    forward = SparseMLP.forward
    monkeypatch.setattr(SparseMLP, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    with torch.inference_mode():
        frozen(x)
    assert len(set(map(id, calls))) == len(layers)


def squared(z):
    return z.relu() ** 2


def doubled(module, arguments, y):
    return 2 * y


class OwnFeedForward(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return super()._ff_block(x) + 1


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, OwnFeedForward])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU(), torch.tanh, squared, nn.Softmax(-1)])
@pytest.mark.parametrize("dense", ["none", "linear2", "hook"])
def test_the_feed_forward_part_of_torchs_layers(kind, activation, dense):
    torch.manual_seed(0)
    layer = kind(16, 2, 48, activation=activation, batch_first=True, norm_first=True)
    for name in {"linear1", "linear2"} - {dense}:
        prune.random_unstructured(getattr(layer, name), "weight", 0.8)
        prune.remove(getattr(layer, name), "weight")
    if dense == "hook":
        layer.dropout.register_forward_hook(doubled)
    frozen, x = freeze(layer), torch.randn(3, 5, 16)
    is_one_call = kind is not OwnFeedForward and not callable_of_ours(activation) and dense == "none"
    assert isinstance(frozen.linear1, SparseLinear) != is_one_call
    assert_serves(Memory(layer), Memory(frozen).eval(), x)
    if kind is not OwnFeedForward:  # torch's fast path does not call what a subclass has of its own
        assert_serves(Memory(layer), Memory(unfreeze(frozen).requires_grad_(False)).eval(), x)
    assert layer.activation is not frozen.activation or not is_one_call


def callable_of_ours(activation):
    return activation is squared or isinstance(activation, nn.Softmax)


class Memory(nn.Module):
    """A layer with the memory that a decoder reads."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __deepcopy__(self, memo):
        return Memory(copy_of(self.layer))

    def forward(self, x):
        return self.layer(x, x.flip(1)) if isinstance(self.layer, nn.TransformerDecoderLayer) else self.layer(x)


def test_weight_and_bias_can_be_read():
    linear = pruned(8, 4)
    frozen = freeze(linear)
    assert torch.equal(frozen.weight, linear.weight)
    assert torch.equal(frozen.bias, linear.bias)
    assert SparseLinear.from_dense(torch.eye(3)).bias is None
    several = freeze(MaskedLinear(3, 2, tasks=("a", "b")))
    with pytest.raises(AttributeError, match="weight"):
        several.weight  # noqa: B018  (to read it is the test)


def test_a_weight_that_a_layer_shares_stays_the_others():
    """As an output layer that shares the weight of an embedding: the layer is compressed, the table is as it was."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(20, 8), pruned(8, 20)
            self.table.weight = self.out.weight

        def forward(self, ids):
            return self.out(self.table(ids).tanh())

    model, ids = Tied(), torch.tensor([[3, 1], [19, 0]])
    frozen = freeze(model)
    assert type(frozen.out) is SparseLinear
    assert torch.equal(frozen.table.weight, model.table.weight)
    assert_serves(model, frozen, ids)


def test_weights_in_any_order_in_memory():
    model = nn.Sequential(pruned(24, 16), nn.ReLU(), pruned(16, 8))
    for linear in (model[0], model[2]):
        linear.weight = nn.Parameter(linear.weight.T.contiguous().T)
        linear.bias = nn.Parameter(linear.bias.repeat_interleave(2)[::2])
    assert not model[0].weight.is_contiguous()
    assert_serves(model, freeze(model), torch.randn(24, 3).T)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_kept(value):
    """A kept weight that is not finite counts; a pruned one does not meet an activation that is not."""
    model = nn.Sequential(pruned(8, 6), nn.Identity())
    with torch.no_grad():
        row, column = model[0].weight.nonzero()[0]
        model[0].weight[row, column] = value
        model[0].bias[5] = value
    frozen, x = freeze(model), torch.rand(3, 8) + 0.5
    torch.testing.assert_close(frozen(x), model(x).detach(), equal_nan=True)
    x[0, 0] = value
    reads = model[0].weight[:, 0] != 0
    assert torch.equal(frozen(x)[0][:5].isfinite(), ~(reads | (torch.arange(6) == row))[:5])
    int8 = freeze(model, precision="int8", example=torch.rand(9, 8))
    with pytest.raises(ValueError, match="finite"):
        int8(x)


@pytest.mark.parametrize("where", ["layer", "mlp", "inner", "head"])
def test_masked_modules_with_hooks_stay_masked(where):
    layer, mlp = MaskedLinear(8, 8), MaskedMLP(8, (6, 4), tasks=("a", "b"))
    layer.set_mask(torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.3)
    hooked = {"layer": layer, "mlp": mlp, "inner": mlp.layers[1], "head": mlp.heads["b"]}[where]
    hooked.register_forward_hook(doubled)
    model = nn.Sequential(pruned(8, 8), nn.Softmax(-1), layer, nn.ReLU(), mlp)
    frozen = freeze(model)
    assert [isinstance(frozen[i], SparseMLP) for i in (0, 2, 4)] == [True, where != "layer", where == "layer"]
    assert_serves(model, frozen, torch.randn(3, 8))
    if where == "layer":
        assert "got a hook" in report(frozen).entries[1].why_dense


class ByParts(nn.Module):
    """Reads an `nn.Sequential` part by part, and what is between."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(pruned(9, 9), nn.GELU(), pruned(9, 9))

    def forward(self, x):
        h = self.parts[1](self.parts[0](x))
        return self.parts[2](h + x)


def test_what_a_call_absorbed_refuses_to_be_called_alone():
    model, x = ByParts(), torch.randn(3, 9)
    frozen = freeze(model)
    assert type(frozen.parts) is FusedSequential
    with pytest.raises(RuntimeError, match="Absorbed: got a call of a part that the call before it computes"):
        frozen(x)
    assert_serves(model, freeze(model, trace=True), x)
    assert_serves(model.parts, frozen.parts, x)


class Doubled(MaskedLinear):
    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs)


class Probabilities(MaskedMLP):
    def forward(self, x, task=None):
        return super().forward(x, task).sigmoid()


def with_own_head() -> nn.Module:
    mlp = MaskedMLP(8, (6, 8))
    mlp.heads["task"] = Doubled(8, 1)
    return mlp


@pytest.mark.parametrize("make", [lambda: Doubled(8, 8), lambda: Probabilities(8, (6, 8)), with_own_head])
def test_masked_modules_with_a_forward_of_their_own_stay(make):
    model = nn.Sequential(pruned(8, 8), nn.Softmax(-1), make())
    frozen = freeze(model)
    assert not any(isinstance(part, SparseMLP) for part in frozen[2].modules())
    assert_serves(model, frozen, torch.randn(3, 8))


@pytest.mark.parametrize("kind", ["linear", "sequential", "norm", "activation"])
def test_a_forward_that_is_set_on_a_module_is_called(kind):
    model = nn.Sequential(pruned(8, 8), nn.Sequential(pruned(8, 8), nn.BatchNorm1d(8), nn.ReLU()), pruned(8, 8))
    part = {"linear": model[0], "sequential": model[1], "norm": model[1][1], "activation": model[1][2]}[kind]
    own = type(part).forward
    model.eval()
    part.forward = lambda x: 2 * own(part, x)
    for trace in (False, True):
        frozen, x = freeze(model, trace=trace), torch.randn(3, 8)
        torch.testing.assert_close(frozen(x), model(x).detach(), rtol=1e-5, atol=1e-6)


def test_the_head_of_an_mlp_is_read_as_it_computes():
    mlp = MaskedMLP(8, (6, 4), tasks=("a", "b"))
    prune.random_unstructured(mlp.heads["a"], "weight", 0.5)
    with torch.no_grad():
        mlp.heads["a"].weight_orig.mul_(3)  # as a step does: the attribute is that of the last call
    mlp.heads["b"] = MaskedLinear(4, 1, bias=False)
    mlp.heads["b"].set_mask(torch.tensor([[True, False, True, False]]))
    x = torch.randn(3, 8)
    frozen = freeze(mlp)
    torch.testing.assert_close(frozen(x), mlp(x).detach())


def test_pruned_norms_and_slopes_are_read_as_the_next_call_does():
    model = nn.Sequential(pruned(8, 8), nn.BatchNorm1d(8), nn.PReLU(8), pruned(8, 8)).eval()
    for part in model[1:3]:
        prune.l1_unstructured(part, "weight", 0.5)
        with torch.no_grad():
            part.weight_orig.mul_(3)
    frozen, x = freeze(model), torch.randn(3, 8)
    torch.testing.assert_close(frozen(x), model(x).detach(), rtol=1e-5, atol=1e-6)


def test_calls_that_were_made_before_stay_as_they_are():
    model, x = nn.Sequential(pruned(8, 8), nn.Softmax(-1), pruned(8, 8)), torch.rand(50, 8)
    model[2] = freeze(model[2], precision="int8", example=x)
    frozen = freeze(model)
    assert (frozen[0].precision, frozen[2].precision) == ("fp32", "int8")
    model[2] = freeze(pruned(8, 8)).planned(freeze(pruned(8, 8)).measure_plan(batch_sizes=(1,)))
    assert freeze(model)[2]._given is not None


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = pruned(8, 8)

    def forward(self, x):
        x = x * 1
        x += 100 * self.layer(x)
        return x


def test_an_example_is_seen_as_it_entered():
    x = torch.rand(50, 8)
    frozen = freeze(InPlace(), precision="int8", example=x)
    assert frozen.layer.network.quantization == frozen.layer.calibrated(x).network.quantization


@pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True:UserWarning", "ignore:The PyTorch API of nested:UserWarning"
)
@pytest.mark.parametrize("sparse", [("linear1", "linear2"), ("linear2",)])
def test_an_encoder_takes_padding(sparse):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    for layer in model.layers[1:]:
        for name in sparse:
            prune.random_unstructured(getattr(layer, name), "weight", 0.8)
            prune.remove(getattr(layer, name), "weight")
    x, padded = torch.randn(3, 5, 16), torch.arange(5)[None] >= torch.tensor([[5], [3], [2]])
    wanted = model(x, src_key_padding_mask=padded).detach()
    for frozen in (freeze(model), unfreeze(freeze(model))):
        with torch.inference_mode():
            y = frozen(x, src_key_padding_mask=padded)
        torch.testing.assert_close(y[~padded], wanted[~padded], rtol=1e-5, atol=1e-5)


def test_layers_that_no_format_holds_are_left():
    empty, sparse = nn.Linear(8, 8), nn.Linear(8, 8)
    empty.weight = nn.Parameter(torch.empty(0, 8))
    frozen = freeze(nn.Sequential(pruned(8, 8), nn.Softmax(-1), empty))
    assert type(frozen[2]) is nn.Linear
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse(), requires_grad=False)
    assert ["sparse_coo" in entry.why_dense for entry in report(nn.Sequential(sparse, nn.Linear(8, 8))).entries] == [
        True,
        False,
    ]
