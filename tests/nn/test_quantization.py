"""Calibration: the range spans what enters a layer and 0, and what cannot be quantised is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_exact, assert_rounding, linear_reference

from lt4rec_sparse import MaskedLinear, MaskedMLP, freeze, ops
from lt4rec_sparse.network import QuantizationParameters as Parameters
from lt4rec_sparse.network import check_quantization
from lt4rec_sparse.nn.quantization import TOLERANCE, calibrate, is_tolerable

TASKS = ("ctr", "cvr")


def frozen_mlp(*widths, tasks=TASKS, seed=0):
    torch.manual_seed(seed)
    return freeze(MaskedMLP(widths[0], widths[1:], tasks=tasks))


def dequantized(h, parameters):
    """What `h` is after it was quantised, in float64."""
    q = torch.round(h.double() / parameters.scale + parameters.zero_point).clamp(0, 255)
    return (q - parameters.zero_point) * parameters.scale


@given(
    rows=st.integers(1, 50),
    low=st.sampled_from([-100.0, -1.0, 0.0, 3.0]),
    span=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_the_range_spans_all_that_enters_a_layer(rows, low, span, seed):
    mlp = frozen_mlp(13, 9, 7, seed=seed)
    x = low + span * torch.rand(rows, 13, generator=torch.Generator().manual_seed(seed))
    found = calibrate(mlp.network, x).quantization
    assert found["ctr"][0] == found["cvr"][0]
    for task in TASKS:
        assert len(found[task]) == 3
        for i, (h, code) in enumerate(zip(ops.layer_inputs(mlp.network, x, task), found[task], strict=True)):
            # A zero point is a whole number, which may push one end of the range out by half a step.
            assert (
                (dequantized(h, code) - h.double()).abs() <= code.scale * (0.501 if code.zero_point == 0 else 1.001)
            ).all()
            if i > 0:
                assert code.zero_point == 0
            assert dequantized(torch.zeros(1), code).item() == 0


@given(seed=st.integers(0, 2**31), density=st.sampled_from([0.0, 0.3, 1.0]))
def test_a_calibrated_layer_errs_by_its_steps_at_most(seed, density):
    torch.manual_seed(seed)
    layer = MaskedLinear(40, 9)
    layer.set_mask(torch.rand(9, 40) < density)
    x = torch.randn(30, 40)
    int8 = freeze(layer).calibrated(x).to_precision("int8")
    weight = (layer.weight * layer.mask()).detach()
    parameters = int8.network.quantization["task"][0]
    # Weights err by half a step each, activations by a step.
    weight_error = (weight.double().abs().amax(1, keepdim=True) / 127 / 2).expand_as(weight) * layer.mask()
    counted = dequantized(x, parameters)
    rounding = linear_reference(x, weight, layer.bias.detach(), torch.float32)
    bound = parameters.scale * weight.double().abs().sum(1) + counted.abs() @ weight_error.T
    assert_rounding(int8(x), rounding._replace(bound=2 * rounding.bound + 1.001 * bound))


@pytest.mark.parametrize("value", [0.0, 1e-42, -1e-42, 5.0, -5.0])
def test_constant_activations_can_be_quantised(value):
    mlp = frozen_mlp(6, 5)
    x = torch.full((4, 6), value)
    found = calibrate(mlp.network, x).quantization
    check_quantization(found, TASKS, 2)
    assert abs(dequantized(x, found["ctr"][0]) - value).max() <= 1e-6
    assert mlp.calibrated(x).to_precision("int8")(x).isfinite().all()


def test_a_layer_that_is_dead_on_these_rows_spans_one():
    mlp = MaskedMLP(3, (4,))
    mlp.layers[0].bias.data.fill_(-100)
    assert calibrate(freeze(mlp).network, torch.rand(5, 3)).quantization["task"][1] == Parameters(1 / 255, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_no_numbers_are_refused(bad):
    mlp, x = frozen_mlp(6, 5), torch.rand(4, 6)
    x[2, 3] = bad
    with pytest.raises(ValueError, match="x: got rows for which NaN or Inf enters layer 0 of ctr, wanted numbers"):
        mlp.calibrated(x)


def test_activations_that_overflow_are_refused():
    mlp = MaskedMLP(1, (1,))
    mlp.layers[0].weight.data.fill_(3e38)
    with pytest.raises(ValueError, match="enters layer 1 of task"):
        calibrate(freeze(mlp).network, torch.full((1, 1), 10.0))


@pytest.mark.parametrize("shape", [(0, 6), (6,)])
def test_no_rows_are_refused(shape):
    with pytest.raises(ValueError, match=r"x: got shape .*, wanted \[rows, 6\], at least one row"):
        calibrate(frozen_mlp(6, 5).network, torch.ones(shape))


def test_calibration_does_not_depend_on_the_precision_it_starts_from():
    mlp, x = frozen_mlp(20, 9), torch.randn(50, 20)
    calibrated = mlp.calibrated(x)
    assert calibrated.precision == "fp32"
    again = calibrated.to_precision("int8").calibrated(x)
    assert again.network.quantization == calibrated.network.quantization
    assert mlp.network.quantization is None
    assert_exact(calibrated(x), mlp(x))


GOOD = {task: (Parameters(0.5, 3), Parameters(0.25, 0)) for task in TASKS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"like": GOOD["ctr"]}, r"quantization: got tasks \['ctr', 'cvr', 'like'\], wanted \['ctr', 'cvr'\]"),
        ({"ctr": GOOD["ctr"][:1]}, "quantization of ctr: got 1 layers, wanted 2"),
        (
            {"cvr": (GOOD["cvr"][0], Parameters(0.0, 0))},
            "quantization of cvr, layer 1: got scale 0.0, wanted above 0",
        ),
        ({"cvr": (GOOD["cvr"][0], Parameters(-1.0, 0))}, "quantization of cvr, layer 1: got scale -1.0"),
        ({"cvr": (GOOD["cvr"][0], Parameters(math.nan, 0))}, "quantization of cvr, layer 1: got scale nan"),
        ({"cvr": (GOOD["cvr"][0], Parameters(math.inf, 0))}, "quantization of cvr, layer 1: got scale inf"),
        (
            {"cvr": (GOOD["cvr"][0], Parameters(1e-39, 0))},
            "got scale 1e-39, wanted above 0 and finite in float32",
        ),
        ({"cvr": (GOOD["cvr"][0], Parameters(1.0, 256))}, "got zero point 256, wanted 0 to 255"),
        ({"cvr": (GOOD["cvr"][0], Parameters(1.0, -1))}, "got zero point -1, wanted 0 to 255"),
        ({"cvr": (GOOD["cvr"][0], Parameters(1.0, 1.0))}, r"got zero point 1\.0, wanted 0 to 255"),
        (
            {"cvr": (Parameters(0.5, 4), GOOD["cvr"][1])},
            r"quantization: got .* for x, wanted the same for all tasks",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_refused(change, message):
    check_quantization(GOOD, TASKS, 2)
    mlp = frozen_mlp(6, 5)
    with pytest.raises(ValueError, match=message):
        mlp.network.with_quantization(GOOD | change)


def test_tolerance_is_a_loss_of_auc_and_a_rise_of_mse():
    assert TOLERANCE == {"auc": 0.0005, "mse": 0.002}
    assert is_tolerable("auc", 0.75 - 0.0004, 0.75)
    assert is_tolerable("auc", 0.9, 0.75)
    assert not is_tolerable("auc", 0.75 - 0.0006, 0.75)
    assert is_tolerable("mse", 0.1001, 0.1)
    assert is_tolerable("mse", 0.05, 0.1)
    assert not is_tolerable("mse", 0.1003, 0.1)
    for metric in TOLERANCE:
        assert not is_tolerable(metric, math.nan, 0.5)
        assert not is_tolerable(metric, 0.5, math.nan)
