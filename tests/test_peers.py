"""Opponents compute the MLP they are timed on; those that are wrong, raise or are missing are absent and say why."""

import subprocess
import sys

import pytest
import torch
from oracle import Bounded, Layer

from bench import peers
from bench.peers import NAMES, Peer


def mlp(*widths: int, last: str = "sigmoid") -> list[Layer]:
    generator = torch.Generator().manual_seed(0)
    layers = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        weight = torch.randn(fan_out, fan_in, generator=generator) * (2 / fan_in) ** 0.5
        weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
        layers.append(Layer(weight, torch.randn(fan_out, generator=generator), "relu"))
    return [*layers[:-1], layers[-1]._replace(activation=last)]


def rows(batch: int, width: int) -> torch.Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(1))


def peer(scores: torch.Tensor, calls: int = 1) -> Peer:
    return Peer("ours", "fp32", "dense", lambda: None, lambda: scores, calls)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "widths", "last"), [(1, (24, 16, 8, 1), "sigmoid"), (8, (33, 17, 3), "none")])
def test_a_peer_computes_the_mlp(name, batch, widths, last):
    with peers.peers(mlp(*widths, last=last), rows(batch, widths[0]), 1, [name]) as (present, absent):
        for missing in absent:
            assert "wrong" not in missing.reason, missing
            pytest.skip(missing.reason)
        (found,) = present
        assert found.name == name and found.precision == name.split()[-1]
        timing = peers.timings(present, rounds=2, round_us=1.0)[name]
        assert 0 < timing.p20_us <= timing.median_us <= timing.p80_us


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_gate_finds_a_layer_that_is_not_the_mlp(precision):
    layers, x = mlp(256, 128, 64, 1), rows(16, 256)
    expected = peers.reference(layers, x, precision)
    peers.check(peer(expected.value.float()), expected)
    middle = layers[1]
    wrong_layers = {
        "bias lost": middle._replace(bias=None),
        "activation lost": middle._replace(activation="none"),
        "rows rolled": middle._replace(weight=middle.weight.roll(1, 0)),
        "columns rolled": middle._replace(weight=middle.weight.roll(1, 1)),
        "every tenth row lost": middle._replace(weight=middle.weight * (torch.arange(64) % 10 > 0)[:, None]),
    }
    for fault, layer in wrong_layers.items():
        scores = peers.reference([layers[0], layer, layers[2]], x, precision).value.float()
        with pytest.raises(peers.WrongError):
            peers.check(peer(scores), expected)
            pytest.fail(fault)


def test_the_gate_of_fp32_finds_a_single_lost_weight():
    layers, x = mlp(256, 128, 64, 1), rows(16, 256)
    expected = peers.reference(layers, x, "fp32")
    weight = layers[0].weight.clone()
    weight[tuple(weight.nonzero()[0])] = 0
    lost = peers.reference([layers[0]._replace(weight=weight), *layers[1:]], x, "fp32").value
    with pytest.raises(peers.WrongError):
        peers.check(peer(lost.float()), expected)


def test_the_gate_lets_the_rounding_of_a_precision_pass():
    layers, x = mlp(256, 128, 64, 1), rows(16, 256)
    h = x.bfloat16()
    for weight, bias, activation, *_ in layers:
        h = peers._ACTIVATIONS[activation](torch.nn.functional.linear(h, weight.bfloat16(), bias.bfloat16()))
    peers.check(peer(h.float()), peers.reference(layers, x, "bf16"))
    with pytest.raises(peers.WrongError):
        peers.check(peer(h.float()), peers.reference(layers, x, "fp32"))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("onnxruntime fp32", "onnxruntime"),
        ("onnxruntime int8", "onnx"),
        ("openvino bf16", "openvino"),
        ("scipy csr fp32", "scipy.sparse"),
        ("sparseprop fp32", "sparseprop"),
    ],
)
def test_a_missing_library_is_a_reason(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with peers.peers(mlp(8, 4, 1), rows(2, 8), 1, [name]) as (present, absent):
        assert not present
        assert (absent[0].name == name and "No module named" in absent[0].reason) or module in absent[0].reason


@pytest.mark.parametrize(("python", "reason"), [("", "names no Python"), (sys.executable, "deepsparse")])
def test_a_python_without_deepsparse_is_a_reason(monkeypatch, python, reason):
    pytest.importorskip("onnx")
    if subprocess.run([sys.executable, "-c", "import deepsparse"], capture_output=True).returncode == 0:
        pytest.skip("this Python has DeepSparse")
    monkeypatch.setenv(peers.DEEPSPARSE_PYTHON, python)
    with peers.peers(mlp(8, 4, 1), rows(2, 8), 1, ["deepsparse fp32"]) as (present, absent):
        assert not present
        assert reason in absent[0].reason


class OddError(Exception):
    """Derives from nothing narrower, as the errors of ONNX Runtime do."""


@pytest.mark.parametrize("error", [RuntimeError, OddError])
@pytest.mark.parametrize("raises_late", [False, True])
def test_a_peer_that_raises_is_absent_and_the_others_are_not(monkeypatch, error, raises_late):
    def broken(*_):
        raise error("no such instruction\nand a second line")

    make = (lambda case: peers.Made(broken, broken)) if raises_late else broken
    monkeypatch.setitem(peers._MAKERS, "broken fp32", ("fp32", "dense", make))
    with peers.peers(mlp(8, 4, 1), rows(2, 8), 1, ["broken fp32", "torch fp32"]) as (present, absent):
        assert [peer.name for peer in present] == ["torch fp32"]
        assert absent == [("broken fp32", f"raised {error.__name__}: no such instruction")]


@pytest.mark.parametrize("name", ["torch fp32", "mkl fp32", "onednn bf16"])
def test_an_engine_of_torch_that_raises_is_no_absent_one(monkeypatch, name):
    """Its absence would leave weaker opponents, and better ratios."""

    def broken(case):
        raise ValueError("too many values to unpack")

    monkeypatch.setitem(peers._MAKERS, name, (name[-4:], "dense", broken))
    with pytest.raises(ValueError, match="too many values"), peers.peers(mlp(8, 4, 1), rows(2, 8), 1, [name]):
        pass


def test_a_wrong_peer_is_absent(monkeypatch):
    monkeypatch.setattr(peers, "reference", lambda layers, x, precision: Bounded(torch.ones(2, 1), torch.zeros(2, 1)))
    with peers.peers(mlp(8, 4, 1), rows(2, 8), 1, ["torch fp32"]) as (present, absent):
        assert not present
        assert "wrong scores" in absent[0].reason


def test_a_run_of_many_calls_counts_as_many():
    timing = peers.timings([peer(torch.zeros(1)), peer(torch.zeros(1), calls=1000)._replace(name="many")], rounds=5)
    assert timing["many"].median_us < timing["ours"].median_us
