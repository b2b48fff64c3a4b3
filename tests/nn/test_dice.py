"""Dice: the module by its formula, the engine on every way through it, and those of other libraries."""

import copy

import pytest
import torch
from kernels.networks import BLOCK_KERNELS, KERNELS, Kernel, prepack, random_block_mask, random_mask, random_task
from oracle import (
    UNIT_ROUNDOFF,
    Bounded,
    Layer,
    activated,
    assert_exact,
    assert_rounding,
    linear_reference,
    mlp_reference,
)
from pruned_models import assert_serves, in_blocks, pruned
from torch import nn
from torch.nn.utils import prune

from lt4rec_sparse import (
    Dice,
    SparseLinear,
    SparseMLP,
    freeze,
    from_onnx,
    load_module,
    report,
    save_module,
    to_onnx,
    unfreeze,
)
from lt4rec_sparse.checked_file import ArtefactError
from lt4rec_sparse.kernels import cpu, reference
from lt4rec_sparse.network import ACTIVATIONS, PRECISIONS, DenseLayer, FrozenNetwork, SparseLayer
from lt4rec_sparse.nn import dice, module_file
from lt4rec_sparse.nn.compaction import compact
from lt4rec_sparse.nn.dense import DenseRun

needs_engine = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")
OPERANDS = {"fp32": None, "bf16": torch.bfloat16}


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms statistics, and all parameters values, that say which feature they are of."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.running_mean.normal_(generator=generator)
            part.running_var.uniform_(0.25, 4, generator=generator)
            if part.affine:
                part.weight.data.uniform_(-2, 2, generator=generator)
                part.bias.data.normal_(generator=generator)
        elif isinstance(getattr(part, "alpha", None), nn.Parameter):
            part.alpha.data.normal_(generator=generator)
    return module.eval()


def ours(features: int, seed: int = 0) -> nn.Module:
    return drawn(Dice(features), seed)


def deep_ctr(features: int, dim: int = 2) -> nn.Module:
    """As DeepCTR-Torch has it: an affine norm, and a Sigmoid that is a module."""

    class Dice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.sigmoid, self.dim = nn.BatchNorm1d(features, eps=1e-8), nn.Sigmoid(), dim
            self.alpha = nn.Parameter(torch.zeros((features,) if dim == 2 else (features, 1)))

        def forward(self, x):
            assert x.dim() == self.dim
            gate = self.sigmoid(self.bn(x))
            return self.alpha * (1 - gate) * x + gate * x

    return drawn(Dice())


def fuxi_ctr(features: int, size: int | None = None) -> nn.Module:
    """As FuxiCTR has it: a norm without weight and bias."""

    class Dice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(features, affine=False, eps=1e-9, momentum=0.01)
            self.alpha = nn.Parameter(torch.zeros(features if size is None else size))

        def forward(self, x):
            p = torch.sigmoid(self.bn(x))
            return p * x + (1 - p) * self.alpha * x

    return drawn(Dice())


def of_rows(features: int) -> nn.Module:
    """As torch-rechub has it: the mean and the variance are those of each row's features."""

    class Dice(nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = nn.Parameter(torch.full((1,), 0.3))

        def forward(self, x):
            mean = x.mean(dim=1, keepdim=True)
            variance = ((x - mean) ** 2 + 1e-3).sum(dim=1, keepdim=True)
            gate = ((x - mean) / variance.sqrt()).sigmoid()
            return gate * x + (1 - gate) * self.alpha * x

    return Dice().eval()


KINDS = {"ours": ours, "DeepCTR-Torch": deep_ctr, "FuxiCTR": fuxi_ctr, "one alpha": lambda n: fuxi_ctr(n, 1)}


def altered(change) -> nn.Module:
    """One of FuxiCTR's of 32 features, but for something."""
    module = fuxi_ctr(32)
    change(module)
    return module


def with_forward(forward) -> nn.Module:
    made = fuxi_ctr(32)
    kind = type("Dice", (nn.Module,), {"forward": forward})
    made.__class__ = kind
    return made


def gate(self, z):
    return torch.sigmoid(self.bn(z))


LEFT = {
    "statistics of rows": (lambda: of_rows(32), "got a Dice of alpha, wanted a BatchNorm1d with running statistics"),
    "three dimensions": (lambda: deep_ctr(32, 3), r"alpha of shape \(32, 1\), wanted \(32,\) or one element"),
    "one feature of three dimensions": (lambda: deep_ctr(1, 3), r"raises a AssertionError on \[batch, 1\]"),
    "more parameters": (
        lambda: altered(lambda m: m.register_parameter("beta", nn.Parameter(torch.ones(32)))),
        "got a Dice of alpha, beta, BatchNorm1d",
    ),
    "a buffer": (lambda: altered(lambda m: m.register_buffer("scale", torch.ones(1))), "got a Dice of alpha, scale"),
    "a tensor": (lambda: altered(lambda m: setattr(m, "scale", torch.ones(1))), "got a Dice of alpha, scale"),
    "another child": (lambda: altered(lambda m: m.add_module("act", nn.Tanh())), "got a Dice of alpha, BatchNorm1d, T"),
    "two norms": (lambda: altered(lambda m: m.add_module("b", nn.BatchNorm1d(32))), "BatchNorm1d, BatchNorm1d, wanted"),
    "a norm of the batch": (
        lambda: altered(lambda m: setattr(m, "bn", nn.BatchNorm1d(32, track_running_stats=False))),
        "wanted a BatchNorm1d with running statistics",
    ),
    "a hook": (
        lambda: altered(lambda m: m.register_forward_hook(lambda *_: None)),
        "got a hook, function, wanted none",
    ),
    "a hook of the norm": (
        lambda: altered(lambda m: m.bn.register_forward_pre_hook(lambda *_: None)),
        "got a hook, function, wanted none",
    ),
    "a forward of its own": (
        lambda: altered(lambda m: setattr(m, "forward", lambda z: z)),
        "got a Dice with a forward of its own",
    ),
    "another formula": (lambda: with_forward(lambda self, z: z * gate(self, z)), "got a Dice that computes otherwise"),
    "alpha on the other side": (
        lambda: with_forward(lambda self, z: (1 - gate(self, z)) * z + gate(self, z) * self.alpha * z),
        "got a Dice that computes otherwise",
    ),
    "nearly the formula": (
        lambda: with_forward(lambda self, z: z * (self.alpha + (1 - self.alpha) * gate(self, z)) * (1 + 1e-12)),
        "got a Dice that computes otherwise",
    ),
    "bounded far out": (
        lambda: with_forward(lambda self, z: (gate(self, z) + (1 - gate(self, z)) * self.alpha) * z.clamp(-50, 50)),
        "got a Dice that computes otherwise",
    ),
    "a pair": (lambda: with_forward(lambda self, z: (z, z)), "got a Dice that computes otherwise"),
    "NaN": (lambda: altered(lambda m: m.bn.running_mean.fill_(torch.nan)), "got a Dice with NaN or infinity"),
    "a variance below 0": (
        lambda: altered(lambda m: m.bn.running_var.fill_(-1)),
        "got a Dice with NaN or infinity",
    ),
}


def model_of(activation: nn.Module, features: int = 32) -> nn.Module:
    return nn.Sequential(pruned(9, features), activation, pruned(features, 4))


# --- The module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_it_is_its_formula(training):
    module, x = ours(6).double().train(training), torch.randn(40, 6, dtype=torch.float64)
    mean, variance = module.bn.running_mean.clone(), module.bn.running_var.clone()
    if training:
        mean, variance = x.mean(0), x.var(0, unbiased=False)
    p = torch.sigmoid((x - mean) / (variance + 1e-8).sqrt())
    torch.testing.assert_close(module(x), p * x + (1 - p) * module.alpha * x, rtol=1e-12, atol=1e-12)


def test_it_is_trained():
    module = Dice(3)
    assert [name for name, _ in module.named_parameters()] == ["alpha"]
    assert_exact(module.alpha.detach(), torch.zeros(3))
    x = torch.randn(8, 3, requires_grad=True)
    module(x).square().sum().backward()
    assert (module.alpha.grad != 0).all() and x.grad.isfinite().all()
    assert (module.bn.running_mean != 0).all()
    assert torch.autograd.gradcheck(Dice(3).double(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("shape", [(3,), (4, 3, 2)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"x: got shape \(.*\), wanted \[batch, 3\]"):
        Dice(3)(torch.zeros(shape))
    with pytest.raises(ValueError, match="features: got 0, wanted at least 1"):
        Dice(0)


def test_constants_lead_back_to_their_bits():
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(3, 3000, generator=generator)
    slope[0] *= torch.logspace(-30, 30, 3000)
    slope[1] *= torch.logspace(-20, 20, 3000)[torch.randperm(3000, generator=generator)]
    slope[0, :10] = slope[1, 5:15] = 0
    module = dice.of_constants(slope)
    assert_exact(dice.constants_of(module), slope)
    usual = dice.of_constants(torch.tensor([[0.01, -1.0, 500.0], [0.1, 0.2, 0.3], [0.0, 1.0, 2.0]]))
    assert usual.bn.weight.tolist() == [1, -1, 1]  # trained on, it normalises as the one that was frozen


# --- The engine -----------------------------------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("way", [*KERNELS, *BLOCK_KERNELS], ids="-".join)
@pytest.mark.parametrize("batch", [1, 7, 70])
def test_every_kernel_applies_constants_to_their_outputs(way: Kernel, batch: int) -> None:
    """Two tasks that share most of their first layer; a gate that is open or shut is a leaky slope."""
    draw = random_block_mask if way.path == "blocks" else random_mask
    tasks = [random_task((37, 40, 24, 5), 0.5, 3, draw_mask=draw) for _ in range(2)]
    mask = draw(40, 37, 0.5, 11)
    tasks[1][0] = tasks[1][0]._replace(mask=tasks[1][0].mask & mask, weight=tasks[1][0].weight * mask)
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 37, generator=generator)
    layouts = ("blocks",) if way.path == "blocks" else cpu.UNSTRUCTURED
    made = [
        [layer._replace(activation="dice", slope=torch.randn(3, len(layer.weight), generator=generator)) for layer in t]
        for t in tasks
    ]
    with cpu.forced_isa(way.isa):
        prepacked = prepack(made, way.precision, layouts)
        y = way.run(x, prepacked)
        assert_exact(way.run(x, prepacked, threads=2), y)
        assert_exact(torch.cat([way.run(row[None], prepacked) for row in x]), y)
    with cpu.forced_isa(cpu.supported_isas()[0]):
        assert_exact(way.run(x, prepack(made, way.precision, layouts)), y)
    if way.precision != "int8":
        for t, task in enumerate(made):
            wanted = mlp_reference(x, [layer.dense() for layer in task], operands=OPERANDS[way.precision])
            assert_rounding(y[:, 5 * t : 5 * t + 5], wanted)


@needs_engine
def test_int8_is_exact_where_the_gate_is():
    """A gate of 1 leaves z: int8 of a layer with such a gate is int8 of one without an activation."""
    layer = random_task((64, 40), 0.5, 3)[0]
    open_gate = torch.stack([torch.zeros(40), torch.full((40,), 100.0), torch.arange(-20.0, 20.0)])
    x = torch.randn(70, 64)
    for path in ("tables", "slices", "blocks"):
        layouts = ("blocks",) if path == "blocks" else cpu.UNSTRUCTURED
        drawn_layer = layer if path != "blocks" else random_task((64, 40), 0.5, 3, draw_mask=random_block_mask)[0]
        y, wanted = (
            Kernel("int8", path, "").run(x, prepack([[drawn_layer._replace(activation=a, slope=s)]], "int8", layouts))
            for a, s in (("dice", open_gate), ("none", 0.0))
        )
        assert_exact(y, wanted)


@needs_engine
@pytest.mark.parametrize("slope", [0.0, torch.ones(3), torch.ones(4), torch.ones(3, 5)])
def test_constants_that_do_not_fit_do_not_reach_the_engine(slope):
    layer = random_task((6, 4), 1.0, 0)[0]._replace(activation="dice", slope=slope)
    with pytest.raises(ValueError, match=r"slope|activation 10"):
        prepack([[layer]], "fp32")


@needs_engine
@pytest.mark.parametrize("linear", [pruned, in_blocks])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [1, 70])
def test_the_engine_computes_as_the_reference(linear, precision, batch):
    x = torch.randn(max(batch, 50), 48, generator=torch.Generator().manual_seed(0))
    sequential = nn.Sequential(linear(48, 32, seed=1), ours(32), linear(32, 16, seed=2), ours(16, 1))
    mlp = SparseMLP.from_sequential(sequential).calibrated(x).to_precision(precision)
    assert mlp.network.is_in_blocks == (linear is in_blocks)
    out = torch.empty(len(x), 16)
    reference.Executor(mlp.network, precision).run(x, out)
    torch.testing.assert_close(mlp(x[:batch]), out[:batch], rtol=0.02, atol=1e-5 if precision == "fp32" else 0.02)


# --- Networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_it_is_fused(kind, training):
    activation = kind(32).train(training)
    model, x = model_of(activation), 3 * torch.randn(30, 9)
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    frozen = freeze(model)
    assert_exact(torch.get_rng_state(), before)
    assert activation.training == training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [type(part).__name__ for part in frozen] == ["SparseMLP", "Absorbed", "Absorbed"]
    assert frozen[0].network.hidden[0].activation == "dice"
    assert_serves(model, frozen, x)
    assert report(frozen).left == {}
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    z = linear_reference(x, weight, bias, torch.float32)
    alone = SparseLinear.from_linear(model[0], activation)
    slope = dice.constants_of(activation)
    assert_rounding(alone(x), activated(z, "dice", slope, UNIT_ROUNDOFF[torch.float32]))


def test_norms_are_folded_before_it():
    model = nn.Sequential(pruned(9, 32), drawn(nn.BatchNorm1d(32)), ours(32), nn.Dropout(), pruned(32, 4)).eval()
    frozen = freeze(model)
    assert type(frozen[0]) is SparseMLP
    assert_serves(model, frozen, torch.randn(20, 9))


def test_a_pruned_alpha_is_what_the_next_call_reads():
    activation = ours(32)
    prune.random_unstructured(activation, "alpha", 0.5)
    with torch.no_grad():
        activation.alpha_orig.add_(1)
    model = model_of(activation)
    frozen = freeze(model)
    assert type(frozen[0]) is SparseMLP
    x = torch.randn(5, 9)
    torch.testing.assert_close(frozen(x), model(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_another_dice_is_left_to_torch(name):
    make, reason = LEFT[name]
    activation = make()
    features = 1 if name.startswith("one feature") else 32
    model = model_of(activation, features)
    frozen = freeze(model, trace=name == "statistics of rows")
    if name == "statistics of rows":
        assert_serves(model, frozen, torch.randn(5, 9))
    assert type(frozen[1]).__name__ == "Dice"
    (why,) = report(frozen).left.values()
    assert why == report(model).left["1"]
    assert f"1: left to torch: {why}" in str(report(frozen))
    with pytest.raises(ValueError, match=f"1: .*{reason}"):
        SparseMLP.from_sequential(model)


def test_one_on_the_meta_device_has_no_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), Dice(4))
    assert report(model).left == {"1": "got a Dice on the meta device, wanted one with values"}


def test_one_of_another_width_is_refused():
    with pytest.raises(ValueError, match="activation: got a Dice with 5 slopes, wanted 4"):
        SparseLinear.from_dense(torch.eye(4), activation=ours(5))


class Tower(nn.Module):
    """Layers that a forward calls one by one, as those of recommendation libraries do."""

    def __init__(self, kind):
        super().__init__()
        self.linears = nn.ModuleList([pruned(9, 32, seed=1), pruned(32, 32, seed=2)])
        self.activations = nn.ModuleList([kind(32), kind(32)])
        self.last = pruned(32, 4)

    def forward(self, x):
        for linear, activation in zip(self.linears, self.activations, strict=True):
            x = activation(linear(x))
        return self.last(x)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_forward_that_calls_it_is_traced_and_loaded(kind, device, tmp_path):
    model, x = Tower(kind), torch.randn(20, 9)
    frozen = freeze(model, trace=True)
    (call,) = [part for part in frozen.modules() if isinstance(part, SparseMLP)]
    assert [layer.activation for layer in call.network.hidden] == ["dice", "dice", "none"]
    assert_serves(model, frozen, x)
    save_module(frozen, tmp_path / "net.safetensors")
    loaded = load_module(tmp_path / "net.safetensors", Tower(kind).to(device))
    assert_exact(loaded(x), frozen(x))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_network_is_served_saved_planned_and_led_back(kind, tmp_path, monkeypatch):
    model, x = model_of(kind(32)), torch.randn(9, 9)
    frozen = freeze(model)
    save_module(frozen, tmp_path / "net.safetensors")
    assert_exact(load_module(tmp_path / "net.safetensors", model_of(kind(32)))(x), frozen(x))
    monkeypatch.setattr(module_file, "VERSIONS", (1,))
    with pytest.raises(ArtefactError, match="got version 2, wanted 1"):
        load_module(tmp_path / "net.safetensors", model_of(kind(32)))
    other = freeze(model_of(drawn(kind(32), 5)))
    assert not torch.equal(other(x), frozen(x))
    other.load_state_dict(frozen.state_dict())
    assert_exact(other(x), frozen(x))
    again = unfreeze(frozen)[0]
    assert type(again[1]) is Dice and not again.training
    torch.testing.assert_close(again(x).detach(), model(x).detach(), rtol=1e-5, atol=1e-6)
    assert_exact(freeze(again)(x), frozen(x))
    planned = frozen[0].planned(frozen[0].measure_plan(batch_sizes=(1, 9)))
    torch.testing.assert_close(planned(x), frozen(x), rtol=1e-5, atol=1e-5)
    again.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in again.parameters())


def test_dense_layers_of_several_tasks_have_it_too():
    slope, generator = torch.randn(3, 3), torch.Generator().manual_seed(0)
    heads = {task: DenseLayer(torch.randn(3, 8, generator=generator), None, "dice", slope) for task in ("a", "b")}
    mlp, x = SparseMLP(FrozenNetwork((), heads)), torch.randn(5, 8)
    references = [mlp_reference(x, [Layer(head.weight, None, "dice", slope)]) for head in heads.values()]
    wanted = Bounded(*(torch.cat(parts, dim=1) for parts in zip(*references, strict=True)))
    assert_rounding(mlp(x), wanted)
    (together,) = DenseRun(mlp.network, 0, "dense", "fp32")([x])
    assert_rounding(together, wanted)
    assert mlp.nbytes == 2 * 4 * (3 * 8 + 3 * 3)


def test_in_16_bits_it_is_rounded_once():
    z, slope = torch.randn(50, 6).bfloat16(), torch.randn(3, 6)
    assert_exact(ACTIVATIONS["dice"](z, slope), ACTIVATIONS["dice"](z.float(), slope).bfloat16())


@pytest.mark.parametrize("dead", [False, True])
def test_compacted_it_is_that_of_the_kept_neurons(dead):
    """A neuron that reads nothing is the constant `dice(bias)`; one that nothing reads is gone."""
    first, second = pruned(9, 32, 0.5), pruned(32, 4, 0.5)
    with torch.no_grad():
        first.weight[::3] = 0
        second.weight[:, 1::3] = 0
    mlp = SparseMLP.from_sequential(nn.Sequential(first, ours(32), second))
    compacted, x = compact(mlp.network), torch.randn(20, 9)
    (layers,) = compacted.tasks
    assert layers[0].slope.shape == (3, len(layers[0].weight)) and len(layers[0].weight) == 10
    torch.testing.assert_close(compacted(x), mlp(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("slope", "message"),
    [
        (0.0, r"got slope 0.0, wanted finite torch.float32 \(3, 4\) of dice"),
        (0.5, r"got slope 0.5, wanted finite torch.float32 \(3, 4\) of dice"),
        (torch.ones(4), r"got slopes torch.float32 \(4,\), wanted finite torch.float32 \(3, 4\)"),
        (torch.ones(3, 5), r"got slopes torch.float32 \(3, 5\), wanted finite torch.float32 \(3, 4\)"),
        (torch.ones(3, 4).double(), r"got slopes torch.float64 \(3, 4\), wanted finite torch.float32 \(3, 4\)"),
        (torch.full((3, 4), torch.inf), r"wanted finite torch.float32 \(3, 4\)"),
    ],
)
def test_constants_that_cannot_be_are_refused(slope, message):
    with pytest.raises(ValueError, match=message):
        FrozenNetwork((), {"a": DenseLayer(torch.ones(4, 2), None, "dice", slope)})
    sparse = SparseLinear.from_dense(torch.eye(4)).network.hidden[0]
    with pytest.raises(ValueError, match=message):
        FrozenNetwork((SparseLayer(sparse.weight, None, "dice", slope),))


@pytest.mark.parametrize("activation", [nn.LeakyReLU(torch.nan), nn.ELU(torch.inf), nn.PReLU(16, init=torch.nan)])
def test_an_activation_with_nan_is_left_to_torch(activation):
    model = nn.Sequential(pruned(9, 16), activation, pruned(16, 4))
    kinds = [type(part).__name__ for part in freeze(model)]
    assert kinds == ["SparseLinear", type(activation).__name__, "SparseLinear"]
    with pytest.raises(ValueError, match=r"1: got a .* with NaN or infinity in it, wanted finite numbers"):
        SparseMLP.from_sequential(model)


# --- ONNX -----------------------------------------------------------------------------------------------------------


def nodes_of(graph, operator):
    return [node for node in graph.node if node.op_type == operator]


@pytest.mark.parametrize("change", ["none", "rest", "read", "order"])
def test_what_is_nearly_dice_is_left_to_onnx_runtime(change):
    pytest.importorskip("onnx")
    from onnx import numpy_helper
    from onnx_models import runtime

    mlp, x = SparseMLP.from_sequential(model_of(ours(32))), torch.randn(7, 9)
    written = to_onnx(mlp)
    graph = written.graph
    if change == "rest":  # no longer 1 - alpha
        (tensor,) = [tensor for tensor in graph.initializer if tensor.name.endswith(".rest")]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2, tensor.name))
    if change == "read":  # by an output too
        value = graph.output.add()
        value.CopyFrom(graph.output[0])
        value.name = nodes_of(graph, "Sigmoid")[0].output[0]
        value.type.tensor_type.shape.dim[1].dim_value = 32
    if change == "order":
        first = nodes_of(graph, "Mul")[0]
        first.input[0], first.input[1] = first.input[1], first.input[0]
    read = from_onnx(written)
    assert isinstance(read, SparseMLP) == (change == "none")
    y, wanted = read(x), torch.as_tensor(runtime(written, x)[0])
    torch.testing.assert_close(y if isinstance(y, torch.Tensor) else y[0], wanted)
