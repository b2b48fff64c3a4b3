import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Layer, assert_exact, assert_rounding, mlp_reference, small_integers

from lt4rec_sparse import FrozenNetwork, Mask, MaskedLinear, MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.formats import SharedWeight
from lt4rec_sparse.lottery import prune_by_magnitude
from lt4rec_sparse.network import DenseLayer, SparseLayer
from lt4rec_sparse.nn.compaction import Compacted
from lt4rec_sparse.nn.compaction import compact as compact_network


def masked_mlp(widths, n_tasks, density, dead, seed):
    """An MLP whose masks have random single weights, and of each layer a share `dead` of dead rows and columns."""
    torch.manual_seed(seed)
    mlp = MaskedMLP(widths[0], widths[1:], tasks=tuple(f"task{i}" for i in range(n_tasks)))
    for task in mlp.tasks:
        layers = {}
        for name, weight in mlp.masked_weights().items():
            n, k = weight.shape
            lives = (torch.rand(n, 1) >= dead) & (torch.rand(1, k) >= dead)
            layers[name] = lives & (torch.rand(n, k) < density)
        mlp.set_mask(Mask(layers), task)
    return mlp


def oracle_layers(mlp, task, head="none"):
    mask = mlp.mask(task)
    layers = [Layer(x.weight.detach() * mask[f"layers.{i}"], x.bias.detach(), "relu") for i, x in enumerate(mlp.layers)]
    return [*layers, Layer(mlp.heads[task].weight.detach(), mlp.heads[task].bias.detach(), head)]


def compact(mlp: SparseMLP) -> Compacted:
    return compact_network(mlp.network)


def frozen_again(compacted, t):
    """Make one task of what was compacted a frozen MLP of its own; its masks are the weights that are not zero."""
    *hidden, head = compacted.tasks[t]
    layers = [SparseLayer(SharedWeight.from_dense(w, {"task": w != 0}), *rest) for w, *rest in hidden]
    return SparseMLP(FrozenNetwork(tuple(layers), {"task": DenseLayer(*head)}))


networks = given(
    widths=st.lists(st.integers(1, 24), min_size=2, max_size=5),
    n_tasks=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.05, 0.2, 1.0]),
    dead=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 2**31),
)


@networks
@pytest.mark.parametrize("sigmoid", [False, True])
def test_compacted_equals_masked_within_rounding(widths, n_tasks, density, dead, seed, sigmoid):
    mlp = masked_mlp(widths, n_tasks, density, dead, seed)
    x = torch.randn(7, widths[0])
    y = compact(freeze(mlp, sigmoid=sigmoid))(x)
    for i, task in enumerate(mlp.tasks):
        reference = mlp_reference(x, oracle_layers(mlp, task, "sigmoid" if sigmoid else "none"))
        assert_rounding(y[:, i : i + 1], reference)


@networks
def test_compacted_is_exact_on_integers(widths, n_tasks, density, dead, seed):
    mlp = masked_mlp(widths[:3], n_tasks, density, dead, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in mlp.parameters():
        parameter.data = small_integers(*parameter.shape, generator=generator).clamp(-1, 1)
    x = small_integers(9, widths[0], generator=generator)
    assert_exact(compact(freeze(mlp))(x), mlp(x).detach())


@networks
def test_compacting_twice_is_compacting_once(widths, n_tasks, density, dead, seed):
    once = compact(freeze(masked_mlp(widths, n_tasks, density, dead, seed)))
    read = torch.zeros(len(once.columns), dtype=torch.bool)
    for t, (_, *rest) in enumerate(once.widths):
        twice = compact(frozen_again(once, t))
        assert twice.widths == [(len(twice.columns), *rest)]
        read[twice.columns] = True
    # Each column is read by some task, or it is the one that stands for none.
    assert read.all() or len(read) == 1


@networks
def test_what_is_left_is_alive(widths, n_tasks, density, dead, seed):
    compacted = compact(freeze(masked_mlp(widths, n_tasks, density, dead, seed)))
    for layers in compacted.tasks:
        for below, above in zip(layers[:-1], layers[1:], strict=True):
            is_zero_neuron = below.weight.shape[0] == 1 and not below.weight.any() and not above.weight.any()
            assert is_zero_neuron or ((below.weight != 0).any(1) & (above.weight != 0).any(0)).all()
        assert all(part.dtype == torch.float32 and part.is_contiguous() for layer in layers for part in layer[:2])


def test_neurons_pruned_whole_leave_the_widths_that_were_kept():
    torch.manual_seed(0)
    mlp = MaskedMLP(40, hidden=(32, 16, 8), tasks=("ctr", "cvr"))
    for seed, task in enumerate(mlp.tasks):
        torch.manual_seed(seed)
        weights = {name: torch.randn_like(weight) for name, weight in mlp.masked_weights().items()}
        full = mlp.mask(task)
        mlp.set_mask(prune_by_magnitude(weights, full, round(full.nnz * 0.3), "neuron"), task)
    compacted = compact(freeze(mlp))
    assert torch.equal(compacted.columns, torch.arange(40))
    for task, left in zip(mlp.tasks, compacted.widths, strict=True):
        widths = [int(kept.any(1).sum()) for kept in mlp.mask(task).values()]
        assert widths != [32, 16, 8]
        assert left == (40, *widths, 1)
    assert compacted.multiply_adds < 0.3 * compacted.multiply_adds_before


def test_single_weights_at_half_density_leave_nothing_dead():
    mlp = masked_mlp((64, 48, 32), 2, 0.5, 0.0, 0)
    compacted = compact(freeze(mlp))
    assert compacted.widths == [compacted.widths_before] * 2 == [(64, 48, 32, 1)] * 2
    for task, layers in zip(mlp.tasks, compacted.tasks, strict=True):
        for layer, (weight, bias, *_) in zip(layers, oracle_layers(mlp, task), strict=True):
            assert_exact(layer.weight, weight)
            assert_exact(layer.bias, bias)


def test_an_input_goes_only_where_no_task_reads_it():
    torch.manual_seed(0)
    mlp = MaskedMLP(4, hidden=(3,), tasks=("a", "b"))
    kept = torch.ones(2, 3, 4, dtype=torch.bool)
    kept[0, :, [0, 1]] = False
    kept[1, :, [0, 2]] = False
    for task, plane in zip(mlp.tasks, kept, strict=True):
        mlp.set_mask(Mask({"layers.0": plane}), task)
    compacted = compact(freeze(mlp))
    assert compacted.columns.tolist() == [1, 2, 3]
    assert compacted.widths == [(3, 3, 1)] * 2
    x = torch.randn(5, 4)
    y = compacted(x)
    x[:, 0] = float("nan")
    assert torch.equal(compacted(x), y)  # what is dropped is not read


def test_an_input_read_by_dead_neurons_alone_goes():
    mlp = MaskedMLP(3, hidden=(2, 2))
    first = torch.tensor([[True, False, True], [False, True, False]])
    mlp.set_mask(Mask({"layers.0": first, "layers.1": torch.tensor([[True, False], [True, False]])}))
    compacted = compact(freeze(mlp))
    assert compacted.columns.tolist() == [0, 2]
    assert compacted.widths == [(2, 1, 2, 1)]


def chain_of_constants(sigmoid=False):
    """Layers of width 2; in the first two neuron 0 is a constant, in the second because it reads that of the first."""
    mlp = MaskedMLP(2, hidden=(2, 2))
    first = torch.tensor([[False, False], [True, True]])
    second = torch.tensor([[True, False], [True, True]])
    mlp.set_mask(Mask({"layers.0": first, "layers.1": second}))
    with torch.no_grad():
        mlp.layers[0].weight.copy_(torch.tensor([[9.0, 9.0], [1.0, 2.0]]))
        mlp.layers[0].bias.copy_(torch.tensor([3.0, 0.5]))
        mlp.layers[1].weight.copy_(torch.tensor([[2.0, 9.0], [5.0, 7.0]]))
        mlp.layers[1].bias.copy_(torch.tensor([-1.0, 4.0]))
        mlp.heads["task"].weight.copy_(torch.tensor([[10.0, 1.0]]))
        mlp.heads["task"].bias.fill_(0.25)
    return mlp


def test_constants_are_folded_upwards():
    (layers,) = compact(freeze(chain_of_constants())).tasks
    assert [layer.weight.tolist() for layer in layers] == [[[1.0, 2.0]], [[7.0]], [[1.0]]]
    # 4 + 5 relu(3); and 0.25 + 10 relu(-1 + 2 relu(3)).
    assert [layer.bias.tolist() for layer in layers] == [[0.5], [19.0], [50.25]]
    assert [layer.activation for layer in layers] == ["relu", "relu", "none"]


def test_a_constant_that_relu_stops_adds_nothing():
    mlp = chain_of_constants()
    with torch.no_grad():
        mlp.layers[0].bias[0] = -3.0
    (layers,) = compact(freeze(mlp)).tasks
    assert [layer.bias.tolist() for layer in layers] == [[0.5], [4.0], [0.25]]


def test_what_does_not_read_an_infinite_constant_stays_finite():
    mlp = chain_of_constants()
    mlp.set_mask(Mask({"layers.0": mlp.mask()["layers.0"], "layers.1": torch.tensor([[False, False], [False, True]])}))
    with torch.no_grad():
        mlp.layers[0].bias[0] = float("inf")
    (layers,) = compact(freeze(mlp)).tasks
    assert [layer.bias.tolist() for layer in layers] == [[0.5], [4.0], [0.25]]


def test_folded_constants_are_rounded_once():
    mlp = MaskedMLP(1, hidden=(65,))
    kept = torch.zeros(65, 1, dtype=torch.bool)
    kept[64] = True
    mlp.set_mask(Mask({"layers.0": kept}))
    with torch.no_grad():
        mlp.layers[0].bias.fill_(1.0)
        mlp.heads["task"].weight.fill_(2.0**-26)  # each too small for 1 in float32, 64 of them not
        mlp.heads["task"].bias.fill_(1.0)
    assert compact(freeze(mlp)).tasks[0][-1].bias.item() == 1 + 2.0**-20


def test_a_kept_weight_of_zero_is_alive():
    mlp = MaskedMLP(3, hidden=(2,))
    mlp.layers[0].weight.data.zero_()
    assert compact(freeze(mlp)).widths == [(3, 2, 1)]


@pytest.mark.parametrize("n_tasks", [1, 2, 3])
def test_empty_masks_leave_one_zero_neuron_per_layer(n_tasks):
    mlp = masked_mlp((6, 5, 4), n_tasks, 0.0, 0.0, 0)
    compacted = compact(freeze(mlp))
    assert compacted.columns.tolist() == [0]
    assert compacted.widths == [(1, 1, 1, 1)] * n_tasks
    assert not any(layer.weight.any() or layer.bias.any() for layers in compacted.tasks for layer in layers[:-1])
    x = torch.randn(3, 6)
    assert torch.equal(compacted(x), compacted(-x))
    for i, task in enumerate(mlp.tasks):
        assert_rounding(compacted(x)[:, i : i + 1], mlp_reference(x, oracle_layers(mlp, task)))


def test_one_layer_has_only_inputs_to_lose():
    layer = MaskedLinear(5, 3, bias=False, tasks=("a", "b"))
    kept = torch.ones(3, 5, dtype=torch.bool)
    kept[:, 1] = kept[2] = False
    for task in layer.tasks:
        layer.set_mask(kept, task)
    frozen = freeze(layer)
    compacted = compact(frozen)
    assert compacted.columns.tolist() == [0, 2, 3, 4]
    assert compacted.widths == [(4, 3)] * 2
    x = small_integers(4, 5, generator=torch.Generator().manual_seed(0))
    layer.weight.data.round_()
    assert_exact(compact(freeze(layer))(x), freeze(layer)(x))


def test_a_summary_names_tasks_widths_and_what_is_left():
    text = str(compact(freeze(chain_of_constants())))
    assert text == "task: 2-2-2-1 -> 2-1-1-1\nmultiply-adds: 10 -> 4, 40.0%"


@networks
def test_slopes_per_output_are_those_of_the_kept_neurons(widths, n_tasks, density, dead, seed):
    """Exact: integers, and slopes that are powers of two."""
    mlp = masked_mlp(widths[:3], n_tasks, density, dead, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in mlp.parameters():
        parameter.data = small_integers(*parameter.shape, generator=generator).clamp(-1, 1)

    def sloped(layer, features):
        exponents = torch.randint(-3, 2, (features,), generator=generator)
        return layer._replace(activation="leaky_relu", slope=-(2.0**exponents))

    plain = freeze(mlp).network
    hidden = tuple(sloped(layer, layer.weight.shape[0]) for layer in plain.hidden)
    heads = {task: sloped(head, len(head.weight)) for task, head in plain.heads.items()}
    frozen = SparseMLP(FrozenNetwork(hidden, heads))
    x = small_integers(9, widths[0], generator=generator)
    assert_exact(compact(frozen)(x), frozen(x))


def test_autocast_does_not_round_what_was_compacted():
    compacted, x = compact(freeze(masked_mlp((24, 16), 2, 0.5, 0.0, 0))), torch.randn(5, 24)
    wanted = compacted(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_exact(compacted(x), wanted)
