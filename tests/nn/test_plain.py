"""Layers and matrices of others: what they compute is computed, what they keep is kept, all else is refused."""

import copy

import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Layer, assert_exact, assert_rounding, mlp_reference, small_integers
from torch import nn
from torch.nn.utils import parametrizations, prune

from lt4rec_sparse import BlockWeight, MaskedLinear, MaskedMLP, SharedWeight, SparseLinear, SparseMLP, freeze

# torch says so of each of its compressed layouts.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")


def pruned_linear(k: int, n: int, amount: float = 0.8, seed: int = 0, **how) -> nn.Linear:
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, **how)
    prune.random_unstructured(linear, "weight", amount)
    return linear


def reference(layers, x):
    """Return what the layers compute, by the oracle: `(weight, bias, activation)` each."""
    return mlp_reference(x, [Layer(weight, bias, activation) for weight, bias, activation in layers])


@pytest.mark.parametrize("is_permanent", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_pruned_by_torch_is_compressed(is_permanent, bias):
    linear = pruned_linear(24, 10, bias=bias)
    x = torch.randn(5, 24)
    wanted = linear(x).detach()
    if is_permanent:
        prune.remove(linear, "weight")
    sparse = SparseLinear.from_linear(linear)
    assert_rounding(sparse(x), reference([(linear.weight.detach(), linear.bias, "none")], x))
    torch.testing.assert_close(sparse(x), wanted)
    assert sparse.network.densities == pytest.approx((0.2,))
    masked = MaskedLinear.from_linear(linear, tasks=("a", "b"))
    assert torch.equal(masked.mask("a"), linear.weight != 0)
    assert torch.equal(masked.mask("b"), linear.weight != 0)
    torch.testing.assert_close(masked(x, "b"), wanted)


def test_what_torch_kept_is_kept_though_it_is_zero():
    linear = pruned_linear(8, 4, 0.5)
    with torch.no_grad():
        linear.weight_orig.fill_(0)
    assert SparseLinear.from_linear(linear).network.densities == (0.5,)
    assert MaskedLinear.from_linear(linear).mask().sum() == 16
    prune.remove(linear, "weight")
    assert SparseLinear.from_linear(linear).network.densities == (0.0,), "nothing tells them from pruned ones"


def test_a_pruned_weight_after_a_step_is_the_one_that_the_next_pass_reads():
    linear = pruned_linear(8, 4, 0.5)
    with torch.no_grad():
        linear.weight_orig += 1  # as an optimiser does; `weight` is that of the last pass still
    x = torch.randn(3, 8)
    torch.testing.assert_close(SparseLinear.from_linear(linear)(x), linear(x).detach())


def test_a_parametrisation_is_computed():
    linear = parametrizations.weight_norm(nn.Linear(8, 4))
    x = torch.randn(3, 8)
    torch.testing.assert_close(SparseLinear.from_linear(linear)(x), linear(x).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid"])
def test_a_dense_weight_is_compressed(dtype, activation):
    generator = torch.Generator().manual_seed(0)
    weight, x = (small_integers(rows, 33, generator=generator) for rows in (20, 7))
    weight, bias = (weight * (torch.rand(20, 33, generator=generator) < 0.3)).to(dtype), torch.arange(20).to(dtype)
    sparse = SparseLinear.from_dense(weight, bias, activation=activation)
    assert sparse.network.layer(0, "task").weight.dtype == torch.float32
    assert torch.equal(sparse.network.layer(0, "task").weight, weight.float())
    wanted = reference([(weight.float(), bias.float(), activation)], x)
    assert_rounding(sparse(x), wanted)
    by_mask = SparseLinear.from_dense(weight.T.contiguous().T, bias, torch.ones(20, 33, dtype=torch.bool), activation)
    assert_rounding(by_mask(x), wanted)
    assert by_mask.network.densities == (1.0,)


def test_blocks_are_recognised():
    weight = torch.zeros(32, 8)
    weight[16:, 4:] = 1.0
    assert isinstance(SparseLinear.from_dense(weight).network.hidden[0].weight, BlockWeight)
    weight[20, 5] = 0.0
    assert isinstance(SparseLinear.from_dense(weight).network.hidden[0].weight, SharedWeight)


KINDS = ("csr", "csc", "bsr", "bsc", "coo", "scipy csr", "scipy csc", "scipy bsr", "scipy coo array")


def matrix_of(kind: str, dense: torch.Tensor):
    match kind.split():
        case ["csr"]:
            return dense.to_sparse_csr()
        case ["csc"]:
            return dense.to_sparse_csc()
        case ["bsr"]:
            return dense.to_sparse_bsr((4, 2))
        case ["bsc"]:
            return dense.to_sparse_bsc((4, 2))
        case ["coo"]:
            return dense.to_sparse()
        case ["scipy", "bsr"]:
            return scipy.sparse.bsr_matrix(dense.numpy(), blocksize=(4, 2))
        case ["scipy", "coo", "array"]:
            return scipy.sparse.coo_array(dense.numpy())
        case ["scipy", name]:
            return getattr(scipy.sparse, f"{name}_matrix")(dense.numpy())
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_matrix_is_compressed(kind):
    generator = torch.Generator().manual_seed(0)
    dense = small_integers(12, 10, generator=generator) * (torch.rand(12, 10, generator=generator) < 0.2)
    sparse = SparseLinear.from_csr(matrix_of(kind, dense), torch.ones(12), "relu")
    x = small_integers(6, 10, generator=generator)
    assert_exact(sparse(x), (x @ dense.T + 1).relu())
    stored = dense != 0 if "bs" not in kind else (dense.reshape(3, 4, 5, 2) != 0).any(3).any(1)
    kept = stored if "bs" not in kind else stored.repeat_interleave(4, 0).repeat_interleave(2, 1)
    assert torch.equal(sparse.network.mask(0, "task"), kept), "of a block every entry is stored"


def test_a_stored_zero_is_kept_and_twice_stored_entries_are_added():
    with_zero = torch.sparse_csr_tensor([0, 2, 2], [0, 2], [0.0, 3.0], (2, 3), check_invariants=True)
    sparse = SparseLinear.from_csr(with_zero)
    assert sparse.network.mask(0, "task").tolist() == [[True, False, True], [False] * 3]
    assert sparse(torch.tensor([[torch.inf, 1.0, 1.0]])).isnan().tolist() == [[True, False]], "inf meets the zero"
    twice = scipy.sparse.coo_matrix(([1.0, 2.0], ([0, 0], [1, 1])), shape=(2, 3), dtype="float32")
    assert SparseLinear.from_csr(twice)(torch.ones(1, 3)).tolist() == [[3.0, 0.0]]


def test_a_block_matrix_of_16x4_runs_in_blocks():
    weight = torch.zeros(32, 8)
    weight[:16, :4] = 2.0
    sparse = SparseLinear.from_csr(weight.to_sparse_bsr((16, 4)))
    assert sparse.network.is_in_blocks
    assert_exact(sparse(torch.ones(1, 8)), torch.ones(1, 8) @ weight.T)


def normed(features: int, seed: int, **how) -> nn.BatchNorm1d:
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm1d(features, **how)
    with torch.no_grad():
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        if norm.affine:
            norm.weight.normal_(generator=generator)
            norm.bias.normal_(generator=generator)
    return norm


SEQUENTIALS = {
    "plain": lambda: [pruned_linear(9, 6), nn.ReLU(), nn.Linear(6, 2), nn.Sigmoid()],
    "nested": lambda: [
        nn.Sequential(pruned_linear(9, 6), nn.Sequential(nn.ReLU(), nn.Dropout(0.5))),
        nn.Identity(),
        pruned_linear(6, 2),
    ],
    "norm before the activation": lambda: [pruned_linear(9, 6), normed(6, 1), nn.ReLU(), nn.Linear(6, 2)],
    "norm after the activation": lambda: [pruned_linear(9, 6), nn.ReLU(), normed(6, 1), nn.Linear(6, 2, bias=False)],
    "norm first": lambda: [normed(9, 1), nn.Dropout(0.1), pruned_linear(9, 6), nn.ReLU(), nn.Linear(6, 2)],
    "norms after each other": lambda: [
        normed(9, 1),
        normed(9, 2),
        pruned_linear(9, 6),
        normed(6, 3, affine=False),
        normed(6, 4),
        nn.ReLU(),
    ],
    "no bias": lambda: [pruned_linear(9, 6, bias=False), normed(6, 1), nn.Sigmoid(), pruned_linear(6, 2, bias=False)],
    "one layer": lambda: [pruned_linear(9, 6)],
}


@pytest.mark.parametrize("name", SEQUENTIALS)
def test_a_sequential_computes_as_in_eval(name):
    sequential = nn.Sequential(*SEQUENTIALS[name]()).train()
    before = copy.deepcopy(sequential.state_dict())
    sparse = SparseMLP.from_sequential(sequential)
    x = torch.randn(11, 9, generator=torch.Generator().manual_seed(5))
    exact = nn.Sequential(*SEQUENTIALS[name]()).double().eval()(x.double())
    torch.testing.assert_close(sparse(x).double(), exact, rtol=1e-5, atol=1e-6)
    assert sequential.training
    after = sequential.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before), "the original is as it was"
    weights = [m for m in sequential.modules() if isinstance(m, nn.Linear)]
    assert len(sparse.network.hidden) == len(weights), "one call runs them all"
    for i, linear in enumerate(weights):
        assert torch.equal(sparse.network.mask(i, "task"), linear.weight != 0), "folding prunes and keeps nothing more"


@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    amount=st.sampled_from([0.0, 0.5, 0.9]),
    batch=st.sampled_from([0, 1, 5, 64]),
    seed=st.integers(0, 1000),
)
def test_any_sequential_is_computed_as_the_oracle_does(widths, amount, batch, seed):
    parts: list[nn.Module] = []
    for k, n in zip(widths[:-1], widths[1:], strict=True):
        parts += [pruned_linear(k, n, amount, seed), nn.ReLU()]
    sequential = nn.Sequential(*parts)
    x = torch.randn(batch, widths[0])
    layers = [((m.weight_orig * m.weight_mask).detach(), m.bias.detach(), "relu") for m in parts[::2]]
    assert_rounding(SparseMLP.from_sequential(sequential)(x), reference(layers, x))


ACTIVATIONS = (
    nn.ReLU(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Hardswish(),
    nn.LeakyReLU(0.2),
    nn.PReLU(init=-0.3),
    nn.ELU(1.5),
)


def test_a_module_that_is_there_twice_computes_twice():
    linear, activation = pruned_linear(8, 8, 0.5), nn.Tanh()
    sequential = nn.Sequential(linear, activation, linear, activation)
    sparse, x = SparseMLP.from_sequential(sequential), torch.randn(3, 8)
    assert len(sparse.network.hidden) == 2
    torch.testing.assert_close(sparse(x), sequential(x).detach())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_an_activation_is_fused_and_saved(activation):
    sequential = nn.Sequential(pruned_linear(9, 16), activation, pruned_linear(16, 6), activation, nn.Linear(6, 2))
    sparse = SparseMLP.from_sequential(sequential)
    x = 3 * torch.randn(7, 9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sparse(x), sequential(x).detach(), rtol=1e-5, atol=1e-5)
    other = SparseMLP.from_sequential(sequential.apply(lambda m: isinstance(m, nn.Linear) and m.bias.data.zero_()))
    assert not torch.equal(other(x), sparse(x))
    other.load_state_dict(sparse.state_dict())
    assert_exact(other(x), sparse(x))
    int8 = sparse.calibrated(x).to_precision("int8")
    torch.testing.assert_close(int8(x), sparse(x), rtol=0.1, atol=0.1)
    plan = sparse.measure_plan(batch_sizes=(1, 7))
    torch.testing.assert_close(sparse.planned(plan)(x), sparse(x), rtol=1e-5, atol=1e-5)
    layer = SparseLinear.from_linear(sequential[0], activation)
    torch.testing.assert_close(layer(x), activation(sequential[0](x)).detach(), rtol=1e-5, atol=1e-5)


def test_a_state_of_another_slope_is_refused():
    mild, steep = (SparseLinear.from_dense(torch.eye(3), activation=nn.LeakyReLU(slope)) for slope in (0.1, 0.2))
    with pytest.raises(ValueError, match=r"leaky_relu 0\.1, wanted .* leaky_relu 0\.2"):
        steep.load_state_dict(mild.state_dict())


def test_a_sequential_is_trained_on_through_masks():
    torch.manual_seed(0)
    sequential = nn.Sequential(pruned_linear(9, 6), nn.ReLU(), nn.Dropout(0.2), pruned_linear(6, 4, 0.5), nn.ReLU())
    sequential.append(nn.Linear(4, 2, bias=False))
    mlp = MaskedMLP.from_sequential(sequential, tasks=("a", "b"))
    x = torch.randn(5, 9)
    wanted = sequential.eval()(x).detach()
    for task in mlp.tasks:
        torch.testing.assert_close(mlp(x, task).detach(), wanted)
    torch.testing.assert_close(freeze(mlp)(x), torch.cat([wanted, wanted], 1))
    assert [layer.mask("a").sum().item() for layer in mlp.masked_layers()] == [11, 12]
    mlp(x).sum().backward()
    assert not mlp.layers[0].weight.grad[~mlp.layers[0].mask("a")].any()


def test_a_sequential_of_bfloat16_stays_one():
    sequential = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1)).bfloat16()
    mlp = MaskedMLP.from_sequential(sequential)
    assert {p.dtype for p in mlp.parameters()} == {torch.bfloat16}
    x = torch.randn(3, 8).bfloat16()
    torch.testing.assert_close(mlp(x), sequential(x))


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class OwnSequential(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


def hooked(hook: str) -> nn.Linear:
    linear = nn.Linear(4, 4)
    getattr(linear, f"register_forward_{hook}")(lambda module, *rest: None)
    return linear


REFUSED = {
    "own forward": (lambda: OwnForward(4, 4), "0: got a OwnForward, wanted an nn.Linear without a forward of its own"),
    "masked": (lambda: MaskedLinear(4, 4), "0: got a MaskedLinear, wanted an nn.Linear without a forward"),
    "lazy": (lambda: nn.LazyLinear(4), "0: got a LazyLinear that has no weight yet, wanted one that has run"),
    "hook": (lambda: hooked("hook"), "0: got a hook, function, wanted none: nothing would call it"),
    "pre-hook": (lambda: hooked("pre_hook"), "0: got a hook, function, wanted none"),
    "old weight norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "0: got a hook, SpectralNorm, wanted none"),
    "double": (lambda: nn.Linear(4, 4).double(), "0: got a weight of torch.float64 on cpu, wanted float32, float16"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "0: got a weight of torch.float32 on meta, wanted"),
}


# Of features that torch calls new, or old.
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_a_linear_layer_that_is_more_than_that_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message.removeprefix("0: ")):
        SparseLinear.from_linear(make())
    with pytest.raises(ValueError, match=f"^{message}"):
        SparseMLP.from_sequential(nn.Sequential(make()))
    with pytest.raises(ValueError, match=message.removeprefix("0: ")):
        MaskedLinear.from_linear(make())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([nn.ReLU()], "0: got a ReLU, wanted it right after a linear layer"),
        ([nn.Linear(2, 2), nn.ReLU(), nn.Sigmoid()], "2: got a Sigmoid, wanted it right after a linear layer"),
        ([nn.Linear(2, 2), nn.ReLU(), normed(2, 0), nn.ReLU()], "3: got a ReLU, wanted it right after a linear layer"),
        (
            [nn.Linear(2, 2), nn.Sequential(nn.Softmax(1))],
            "1.0: got a Softmax, wanted Linear, ReLU, Sigmoid, Tanh, SiLU",
        ),
        ([nn.Linear(2, 2), nn.PReLU(3)], "1: got a PReLU with 3 slopes, wanted 1 or 2"),
        ([nn.Linear(2, 2), nn.LayerNorm(2)], "1: got a LayerNorm, wanted Linear"),
        ([nn.Linear(2, 2), nn.ReLU(), normed(2, 0)], "got a BatchNorm1d after the activation of 0, wanted a linear"),
        ([nn.Linear(2, 2), normed(3, 0)], "1: got 3 features, wanted 2"),
        ([nn.BatchNorm1d(2, track_running_stats=False), nn.Linear(2, 2)], "0: got a BatchNorm1d without running stat"),
        ([nn.Dropout()], "sequential: got one without a linear layer"),
        ([], "sequential: got one without a linear layer"),
        ([nn.Linear(2, 3), nn.Linear(2, 2)], "layer 1: got in_features 2, wanted 3"),
        ([OwnSequential(nn.Linear(2, 2))], "0.: got a OwnSequential, wanted an nn.Sequential without a forward"),
    ],
)
def test_a_sequential_that_cannot_be_fused_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        SparseMLP.from_sequential(nn.Sequential(*parts))


def test_what_a_masked_mlp_cannot_be_is_refused():
    with pytest.raises(ValueError, match="got one linear layer, wanted at least two"):
        MaskedMLP.from_sequential(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="linear layer 0: got activation sigmoid, wanted relu"):
        MaskedMLP.from_sequential(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="linear layer 1: got activation sigmoid, wanted none"):
        MaskedMLP.from_sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Sigmoid()))
    with pytest.raises(ValueError, match=r"sequential: got a Linear, wanted an nn\.Sequential"):
        MaskedMLP.from_sequential(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]],), TypeError, "weight: got a list, wanted a tensor"),
        ((torch.ones(2),), ValueError, r"weight: got shape \(2,\), wanted \[out_features, in_features\]"),
        ((torch.ones(2, 0),), ValueError, r"weight: got shape \(2, 0\)"),
        ((torch.ones(2, 3, dtype=torch.int64),), ValueError, "weight: got torch.int64, wanted float32"),
        ((torch.ones(2, 3), torch.ones(3)), ValueError, r"bias: got shape \(3,\), wanted \(2,\)"),
        ((torch.ones(2, 3), torch.ones(2).double()), ValueError, "bias: got torch.float64, wanted float32"),
        ((torch.ones(2, 3), None, torch.ones(2, 3)), ValueError, "mask: got torch.float32"),
        ((torch.ones(2, 3), None, torch.ones(3, 2) > 0), ValueError, r"mask: got torch.bool \(3, 2\), wanted"),
        ((torch.ones(2, 3).to_sparse(),), ValueError, "weight: got a tensor that is torch.sparse_coo, wanted a dense"),
        ((torch.ones(2, 3), None, None, "cos"), ValueError, "got activation 'cos', wanted one of none, relu"),
        (
            (torch.ones(2, 3), None, None, "elu"),
            ValueError,
            "activation: got 'elu' without a slope, wanted nn.LeakyReLU",
        ),
        (
            (torch.ones(2, 3), None, None, nn.Softmax()),
            ValueError,
            "activation: got a Softmax, wanted one of ReLU, Sig",
        ),
    ],
)
def test_a_dense_weight_that_cannot_be_one_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SparseLinear.from_dense(*arguments)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated, and still there
def test_a_quantised_weight_is_refused():
    weight = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match=r"weight: got a tensor that is quantised torch\.qint8, wanted a dense one"):
        SparseLinear.from_dense(weight)


def test_what_is_no_sparse_matrix_is_refused():
    with pytest.raises(TypeError, match=r"matrix: got torch\.strided, wanted a sparse tensor of torch or"):
        SparseLinear.from_csr(torch.ones(2, 2))
    with pytest.raises(TypeError, match="matrix: got list, wanted a sparse tensor of torch or"):
        SparseLinear.from_csr([[1.0]])
    with pytest.raises(ValueError, match=r"weight: got torch\.float64, wanted float32"):
        SparseLinear.from_csr(scipy.sparse.eye(3, format="csr"))
