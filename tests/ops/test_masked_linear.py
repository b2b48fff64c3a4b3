import pytest
import torch
from oracle import assert_exact, assert_rounding, linear_reference, small_integers

from lt4rec_sparse import ops
from lt4rec_sparse.masks import pack_words

SHAPES = [(0, 3, 2), (1, 1, 1), (7, 33, 5), (64, 100, 31)]


def problem(batch, k, n, density=0.3, dtype=torch.float32, seed=0, integers=False):
    generator = torch.Generator().manual_seed(seed)
    if integers:
        x, weight = (small_integers(*shape, generator=generator, dtype=dtype) for shape in ((batch, k), (n, k)))
        bias = small_integers(n, generator=generator, dtype=dtype)
    else:
        x, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((batch, k), (n, k), (n,)))
    return x, weight, torch.rand(n, k, generator=generator) < density, bias


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_masked_linear_is_exact_on_integers(shape, density):
    x, weight, mask, bias = problem(*shape, density, integers=True)
    wanted = (x.double() @ (weight * mask).double().T + bias.double()).float()
    assert_exact(ops.masked_linear(x, weight, mask, bias), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_linear_is_within_the_rounding_bound(shape, dtype):
    x, weight, mask, bias = problem(*shape, dtype=dtype)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    y = ops.masked_linear(x, weight, mask, bias)
    assert_rounding(y, linear_reference(x, weight * mask, bias, accumulate))


def test_masked_gradients_are_exact_on_integers():
    x, weight, mask, bias = problem(9, 17, 6, integers=True)
    dy = small_integers(9, 6, generator=torch.Generator().manual_seed(5))
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    ops.masked_linear(x, weight, mask, bias).backward(dy)
    assert_exact(x.grad, dy @ (weight * mask).detach())
    assert_exact(weight.grad, (dy.T @ x.detach()) * mask)
    assert_exact(bias.grad, dy.sum(0))


def test_a_pruned_weight_contributes_nothing_even_if_it_is_nan():
    x, weight, mask, bias = problem(4, 6, 3, density=0.5, integers=True)
    poisoned = weight.masked_fill(~mask, float("nan"))
    assert_exact(ops.masked_linear(x, poisoned, mask, bias), ops.masked_linear(x, weight, mask, bias))


def test_leading_dimensions_as_in_torch_linear():
    x, weight, mask, _ = problem(12, 5, 4, integers=True)
    flat = ops.masked_linear(x, weight, mask)
    assert_exact(ops.masked_linear(x.view(3, 4, 5), weight, mask), flat.view(3, 4, 4))
    assert_exact(ops.masked_linear(x[0], weight, mask), flat[0])


def test_gradcheck_in_float64():
    x, weight, mask, bias = problem(3, 5, 4, dtype=torch.float64)
    inputs = (x.requires_grad_(), weight.requires_grad_(), mask, bias.requires_grad_())
    # Only kept weights have a gradient, by definition; the check perturbs the kept ones through a product.
    assert torch.autograd.gradcheck(ops.masked_linear, inputs)
    assert torch.autograd.gradcheck(ops.masked_linear, inputs[:3])  # without a bias
    assert torch.autograd.gradgradcheck(ops.masked_linear, inputs)


# All tasks at once: of one x that all read, or of rows of their own

every_kind_of_x = pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "apart"])
every_kind_of_mask = pytest.mark.parametrize("kind", [lambda masks: masks, pack_words], ids=["bool", "words"])


def tasks_problem(tasks, is_shared, dtype=torch.float32, weight_dtype=None, integers=True):
    x, weight, _, bias = problem(6 * tasks, 7, 5, dtype=dtype, integers=integers)
    x = x[:6] if is_shared else x.view(tasks, 6, 7)
    weight, bias = (t.to(weight_dtype or dtype) for t in (weight, bias))
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(tasks, 5, 7, generator=generator) < 0.5
    return x, weight, masks, bias, small_integers(tasks, 6, 5, generator=generator, dtype=dtype)


@every_kind_of_x
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gradcheck_of_two_tasks(is_shared, activation):
    x, weight, masks, bias, _ = tasks_problem(2, is_shared, torch.float64, integers=False)

    def apply(x, weight, bias):
        return ops.masked_linear(x, weight, masks, bias, activation)

    assert ops.masked_linear(x, weight, masks, bias).abs().min() > 1e-3  # no kink is near
    assert torch.autograd.gradcheck(apply, [t.requires_grad_() for t in (x, weight, bias)])
    assert torch.autograd.gradgradcheck(apply, [x, weight, bias])


@pytest.mark.parametrize("tasks", [1, 2, 3])
@every_kind_of_x
@every_kind_of_mask
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tasks_are_exactly_one_task_after_another(tasks, is_shared, kind, activation, dtype):
    x, weight, masks, bias, dy = tasks_problem(tasks, is_shared, dtype, torch.float32)
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    ops.masked_linear(x, weight, kind(masks), bias, activation).backward(dy)
    dense = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = dense[0] @ (dense[1] * masks).mT + dense[2]
    y = y.relu() if activation == "relu" else y
    y.backward(dy.double())
    assert_exact(ops.masked_linear(x, weight, kind(masks), bias, activation), y.to(dtype))
    for ours, wanted in zip((x, weight, bias), dense, strict=True):
        assert_exact(ours.grad, wanted.grad.to(ours.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_float32_weight_beside_16_bits_is_rounded_where_it_is_read(shape, dtype):
    x, weight, mask, bias = problem(*shape)
    x = x.to(dtype)
    y = ops.masked_linear(x, weight, mask, bias)
    assert y.dtype == dtype
    assert_rounding(y, linear_reference(x, (weight * mask).to(dtype), bias.to(dtype), torch.float32))


@every_kind_of_mask
def test_an_activation_is_that_of_the_plain_result(kind):
    x, weight, mask, bias = problem(9, 17, 6)
    plain = ops.masked_linear(x, weight, kind(mask), bias)
    assert_exact(ops.masked_linear(x, weight, kind(mask), bias, "relu"), plain.relu())
    x[2, 3] = float("nan")
    assert ops.masked_linear(x, weight, torch.ones_like(mask), bias, "relu")[2].isnan().all()


opcheck_warns = pytest.mark.filterwarnings(  # torch 2.15's opcheck reads gradients of tensors that are no leaves
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)


@opcheck_warns
@pytest.mark.parametrize("tasks", [pytest.param(1, marks=pytest.mark.heavy), 2])
@every_kind_of_x
@every_kind_of_mask
def test_opcheck_masked_linear(tasks, is_shared, kind):
    x, weight, masks, bias, dy = tasks_problem(tasks, is_shared, integers=False)
    x, masks, door = x.view(-1, 6, 7), kind(masks), torch.ops.lt4rec_sparse
    for activation in ("none", "relu"):
        inputs = (x.clone().requires_grad_(), weight.clone().requires_grad_(), masks, bias.clone().requires_grad_())
        torch.library.opcheck(door.masked_linear, (*inputs, activation))
    torch.library.opcheck(door.masked_linear_dgrad, (dy, weight, masks, is_shared))
    torch.library.opcheck(door.masked_linear_wgrad, (dy, x, masks, torch.float32))


@opcheck_warns
def test_opcheck_of_mixed_dtypes():
    x, weight, masks, bias, dy = tasks_problem(2, False, torch.bfloat16, torch.float32, integers=False)
    inputs = (x.requires_grad_(), weight.requires_grad_(), masks, bias.requires_grad_())
    torch.library.opcheck(torch.ops.lt4rec_sparse.masked_linear, (*inputs, "relu"))
    torch.library.opcheck(torch.ops.lt4rec_sparse.masked_linear_wgrad, (dy, x.detach(), masks, torch.float32))


@pytest.mark.parametrize("tasks", [1, 2])
def test_compiled_once_for_every_batch_it_is_exact(tasks):
    _, weight, masks, bias, _ = tasks_problem(tasks, True)
    weight.requires_grad_()

    def apply(x):
        return ops.masked_linear(x, weight, masks[0] if tasks == 1 else masks, bias, "relu")

    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    for rows, stance in ((8, "default"), (5, "fail_on_recompile"), (19, "fail_on_recompile")):
        gradients = []
        for function in (compiled, apply):
            x = small_integers(rows, 7, generator=torch.Generator().manual_seed(rows)).requires_grad_()
            torch._dynamo.mark_dynamic(x, 0)
            with torch.compiler.set_stance(stance):
                y = function(x)
            gradients.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
        for ours, wanted in zip(*gradients, strict=True):
            assert_exact(ours, wanted)


def under_autocast(x, weight, mask, bias, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype=dtype):
        return ops.masked_linear(x, weight, mask, bias, "relu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_and_leaves_the_gradients_in_float32(dtype):
    x, weight, mask, bias = problem(9, 17, 6, integers=True)
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    y = under_autocast(x, weight, mask, bias, dtype)
    y.backward(torch.ones_like(y))
    wanted = torch.relu(x.double() @ (weight * mask).double().T + bias.double())
    dx, dw, db = torch.autograd.grad(wanted.sum(), (x, weight, bias))
    assert_exact(y, wanted.to(dtype))
    for ours, gradient in ((x.grad, dx), (weight.grad, dw), (bias.grad, db)):
        assert_exact(ours, gradient)


def test_a_backward_pass_under_autocast_keeps_the_dtypes_of_its_forward():
    x, weight, mask, bias = problem(4, 33, 5)
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    dy = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(ops.masked_linear(x, weight, mask, bias), (x, weight, bias), dy)
    y = ops.masked_linear(x, weight, mask, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, want in zip(torch.autograd.grad(y, (x, weight, bias), dy), wanted, strict=True):
            assert_exact(got, want)


def test_autocast_ends_where_it_is_disabled_and_passes_over_float64():
    x, weight, mask, bias = problem(9, 17, 6)
    plain = ops.masked_linear(x, weight, mask, bias, "relu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.masked_linear(x, weight, mask[None], bias).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert_exact(ops.masked_linear(x, weight, mask, bias, "relu"), plain)
    doubles = [t.double() for t in (x, weight, bias)]
    y = under_autocast(doubles[0], doubles[1], mask, doubles[2])
    assert_exact(y, ops.masked_linear(doubles[0], doubles[1], mask, doubles[2], "relu"))


def test_on_the_meta_device_there_are_shapes():
    x, weight, mask, bias = (t.to("meta") for t in problem(9, 17, 6))
    y = ops.masked_linear(x, weight, mask, bias)
    assert (y.shape, y.dtype, y.device.type) == ((9, 6), torch.float32, "meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4)}, r"x: got shape \(2, 4\), wanted \[..., 3\]"),
        ({"mask": torch.ones(3, 2, dtype=torch.bool)}, r"mask: got shape \(3, 2\), wanted \(2, 3\)"),
        ({"mask": torch.ones(2, 3)}, "mask: got torch.float32, wanted torch.bool"),
        ({"mask": torch.ones(2, 1, dtype=torch.int32)}, r"mask: got shape \(2, 1\), wanted \(2, 4\)"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask: got shape \(3,\), wanted \[out_features, in_features\] or"),
        ({"bias": torch.ones(3)}, r"bias: got shape \(3,\), wanted \(2,\)"),
        ({"weight": torch.ones(2, 3, dtype=torch.float64)}, "weight: got torch.float64, wanted torch.float32"),
        ({"weight": torch.ones(3)}, r"weight: got shape \(3,\)"),
        ({"weight": torch.ones(2, 3, dtype=torch.bfloat16)}, "weight: got torch.bfloat16, wanted torch.float32"),
        ({"weight": torch.ones(2, 3, device="meta")}, "weight: got device meta, wanted cpu"),
        ({"bias": torch.ones(2, dtype=torch.float64)}, "bias: got torch.float64, wanted torch.float32"),
        ({"bias": torch.ones(2, device="meta")}, "bias: got device meta, wanted cpu"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, "mask: got device meta, wanted cpu"),
        ({"activation": "sigmoid"}, "activation: got 'sigmoid', wanted none or relu"),
    ],
)
def test_masked_linear_refuses(change, message):
    good = {"x": torch.ones(2, 3), "weight": torch.ones(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool), "bias": None}
    with pytest.raises(ValueError, match=message):
        ops.masked_linear(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.ones(1, 4, 3)},
            r"x: got shape \(1, 4, 3\), wanted \[rows, in_features\] or \[2, rows, ",
        ),
        ({"x": torch.ones(3)}, r"x: got shape \(3,\), wanted \[rows, in_features\] or \[2, rows, in_features\]"),
        ({"mask": torch.ones(2, 2, 4, dtype=torch.bool)}, r"mask: got shape \(2, 4\), wanted \(2, 3\)"),
        ({"activation": "gelu"}, "activation: got 'gelu', wanted none or relu"),
    ],
)
def test_masked_linear_of_tasks_refuses(change, message):
    good = {
        "x": torch.ones(4, 3),
        "weight": torch.ones(2, 3),
        "mask": torch.ones(2, 2, 3, dtype=torch.bool),
        "bias": None,
    }
    with pytest.raises(ValueError, match=message):
        ops.masked_linear(**(good | change))
