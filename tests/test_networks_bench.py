"""The benchmark of whole networks: what it prunes, how it knows a right result from a wrong one, and its tables."""

import copy
from contextlib import ExitStack
from itertools import product
from typing import Any

import pytest
import torch
from oracle import assert_rounding
from torch import nn

from bench import networks
from bench.architectures import SMALL, Architecture, Dlrm, GatedMlp, ResidualBlock, TransformerBlock, made
from bench.network_gate import references
from bench.network_peers import MAKERS, OLD_OPSET, OPSET, NetworkCase, _exported
from bench.peers import Peer, WrongError, check
from lt4rec_sparse import SparseMLP, freeze
from lt4rec_sparse.kernels import cpu

needs_engine = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")


def numbers(*shape: int) -> Any:
    return lambda batch, generator: (torch.randn(batch, *shape, generator=generator),)


SOME = {
    "attention": Architecture("attention", lambda: TransformerBlock(64, 4, 128), numbers(7, 64), (2,)),
    "gates": Architecture("gates", lambda: GatedMlp(64, 128), numbers(64), (3,)),
    "residual": Architecture(
        "residual", lambda: nn.Sequential(ResidualBlock(64, 128), nn.Linear(64, 1)), numbers(64), (16,)
    ),
    "dots": next(one for one in SMALL if one.name == "DLRM"),
}
some = pytest.mark.parametrize("name", SOME)


def case_of(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], list[Any]]:
    architecture = SOME[name]
    inputs, seen = networks._inputs(architecture, architecture.batches[0])
    return networks.pruned(made(architecture), 0.5, "weight"), inputs, seen


def peer(scores: torch.Tensor, precision: str = "fp32") -> Peer:
    return Peer("some", precision, "dense", lambda: None, lambda: scores)


@some
@pytest.mark.parametrize("granularity", ["weight", "16x4"])
def test_layers_are_pruned_to_the_sparsity_and_heads_are_not(name, granularity):
    model = made(SOME[name])
    before = copy.deepcopy(model.state_dict())
    for key, layer in networks.pruned(model, 0.75, granularity).named_modules():
        if isinstance(layer, nn.Linear):
            kept, old = layer.weight != 0, before[f"{key}.weight"]
            assert torch.equal(layer.weight[kept], old[kept])
            if layer.out_features < networks.LEAST_OUTPUTS:
                assert torch.equal(layer.weight, old)
            else:
                assert kept.sum() == kept.numel() // 4 or (granularity == "16x4" and kept.sum() <= kept.numel() / 4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@needs_engine
@some
def test_the_gate_lets_ours_and_torch_pass_in_fp32_and_int8(name):
    model, inputs, seen = case_of(name)
    expected = references(model, inputs, seen)
    frozen = freeze(model)
    int8 = networks.to_int8(frozen, seen)
    calls = [call for call in int8.modules() if isinstance(call, SparseMLP)]
    assert calls and {call.precision for call in calls} == {"int8"}
    assert {call.precision for call in frozen.modules() if isinstance(call, SparseMLP)} == {"fp32"}
    check(peer(model(*inputs)[:8]), expected["fp32"])
    check(peer(frozen(*inputs)[:8]), expected["fp32"])
    check(peer(int8(*inputs)[:8]), expected["int8"])
    with pytest.raises(WrongError):  # int8 is not fp32
        check(peer(int8(*inputs)[:8]), expected["fp32"])


FAULTS = {
    "a layer's rows rolled": lambda layer: layer.weight.copy_(layer.weight.roll(1, 0)),
    "a layer's columns rolled": lambda layer: layer.weight.copy_(layer.weight.roll(1, 1)),
    "every other row lost": lambda layer: layer.weight[::2].zero_(),
}


@some
@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_finds_a_layer_that_is_not_the_networks(name, fault):
    model, inputs, seen = case_of(name)
    expected = references(model, inputs, seen)
    layer = max((m for m in model.modules() if isinstance(m, nn.Linear)), key=lambda m: m.weight.numel())
    with torch.no_grad():
        FAULTS[fault](layer)
        scores = model(*inputs)[:8]
    for precision in ("fp32", "int8"):
        with pytest.raises(WrongError):
            check(peer(scores), expected[precision])
            pytest.fail(precision)


def test_the_gate_of_fp32_finds_a_single_lost_weight():
    model, inputs, seen = case_of("gates")
    expected = references(model, inputs, seen)["fp32"]
    weight = model.down.weight
    weight.view(-1)[weight.abs().argmax()] = 0
    with pytest.raises(WrongError):
        check(peer(model(*inputs)), expected)


def test_the_gate_counts_the_roundings_of_a_lower_precision():
    """bfloat16 is within int8's bound of a network, and beyond float32's."""
    model, inputs, seen = case_of("gates")
    expected = references(model, inputs, seen)
    scores = copy.deepcopy(model).bfloat16()(*(x.bfloat16() for x in inputs)).float()
    assert_rounding(scores, expected["int8"])
    with pytest.raises(AssertionError):
        assert_rounding(scores, expected["fp32"])


def test_the_gate_repeats_itself():
    model, inputs, seen = case_of("attention")
    first, second = (references(model, inputs, seen) for _ in range(2))
    assert all(torch.equal(a, b) for p in first for a, b in zip(first[p], second[p], strict=True))


def test_a_network_whose_package_is_absent_is_named():
    def absent() -> nn.Module:
        raise ImportError("No module named 'ranker_of_others'")

    (case,) = networks.measured(Architecture("theirs", absent, numbers(2), (1,)), [1], {})
    assert case["absent"] == {"theirs": "No module named 'ranker_of_others'"} and not case["contestants"]
    text = networks.tables_of({"cases": [case]})
    assert "| theirs" not in text and "- theirs: No module named 'ranker_of_others'; in every case" in text


def test_a_name_of_no_network_is_named():
    with pytest.raises(ValueError, match="networks: got Bert, wanted some of DistilBERT, "):
        networks.run(["Bert"])


def case(ours: float, dense: float, dense_int8: float) -> dict[str, Any]:
    calls = {"torch fp32": (dense, "fp32", "dense", None), "openvino static int8": (dense_int8, "int8", "dense", None)}
    for kind, sparsity, precision in product(("ours", "blocks"), (0.8, 0.9), ("fp32", "int8")):
        us = ours / (4 if precision == "int8" else 1) / (2 if sparsity == 0.9 else 1)
        calls[f"{kind} {sparsity:.0%} {precision}"] = (us, precision, kind, sparsity)
    return {
        "network": "any",
        "batch": 2,
        "threads": 1,
        "contestants": {
            name: {"median_us": us, "precision": p, "kind": k, "sparsity": s} for name, (us, p, k, s) in calls.items()
        },
    }


def test_the_tables_divide_dense_by_ours_of_the_same_sparsity_and_list_what_does_not_win():
    text = networks.tables_of({"cases": [case(ours=8, dense=8.2, dense_int8=4)]})
    assert "| any | 2 | 1 | 8 | 4 | 1.0 | 2.0 | 1.0 | 2.0 | 2.0 | 4.0 | 2.0 | 4.0 |" in text
    assert "any 2 1, single weights 80%: 1.02; any 2 1, blocks of 16 x 4 80%: 1.02." in text
    assert "| any | 2 | 1 | 2.0 / 2.0 |  |" in text
    assert "threads: none." in networks.tables_of({"cases": [case(ours=1, dense=8, dense_int8=4)]})


def test_absent_opponents_are_named_with_their_cases():
    some, other = case(ours=1, dense=8, dense_int8=4), case(ours=1, dense=8, dense_int8=4) | {"threads": 16}
    text = networks.tables_of(
        {"cases": [some | {"absent": {"openvino fp32": "wrong scores", "deepsparse fp32 80%": "no Python"}}, other]}
    )
    assert "- openvino fp32: wrong scores; in any 2 1\n- deepsparse fp32 80%: no Python; in any 2 1" in text
    both = {"absent": {"deepsparse fp32 80%": "no Python"}}
    assert "80%: no Python; in every case" in networks.tables_of({"cases": [some | both, other | both]})
    assert "No opponent is absent." in networks.tables_of({"cases": [some, other]})


def test_an_older_record_is_read_as_it_was_made():
    text = networks.tables_of({"cases": [case(ours=1, dense=8, dense_int8=4)], "absent": {"openvino fp32": "none"}})
    assert "- openvino fp32: none; in some case" in text
    assert "Weights are random, drawn alike for every row. Opset of the exported files: 14 for every runtime." in text
    newer = {"cases": [], "spread": 0.05, "opsets": {"DeepSparse": 14, "the others": 20}}
    wanted = (
        "scaled by log-normal factors of sigma 0.05. Opset of the exported files: 14 for DeepSparse, 20 for the others."
    )
    assert wanted in networks.tables_of(newer)


def test_weights_are_spread_unevenly_over_rows_and_columns_and_alike_each_time():
    wide = Architecture("wide", lambda: nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 300)), numbers(400), (1,))
    first, second = made(wide), made(wide)
    torch.manual_seed(0)
    drawn = wide.make()
    for layer, again, plain in zip(first, second, drawn, strict=True):
        assert torch.equal(layer.weight, again.weight)
        assert 0.7 < layer.weight.norm() / plain.weight.norm() < 1.4
    for of_kept, (model, is_spread) in product((0, 1), ((first, True), (drawn.requires_grad_(False), False))):
        kept = (networks.pruned(model, 0.9, "weight")[0].weight != 0).float().mean(of_kept)
        assert (kept.quantile(0.9) / kept.quantile(0.1) > 2.5) == is_spread


def test_weights_that_layers_share_are_scaled_once():
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model[1].weight = model[0].weight
        return model

    def alone() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64))

    pair = made(Architecture("tied", tied, numbers(64), (1,)))
    assert pair[0].weight is pair[1].weight
    assert torch.equal(pair[0].weight, made(Architecture("alone", alone, numbers(64), (1,)))[0].weight)


def test_files_are_exported_in_both_opsets(tmp_path):
    onnx = pytest.importorskip("onnx")
    model, inputs, seen = case_of("attention")
    with ExitStack() as stack:
        one = NetworkCase(model, inputs, seen, 1, tmp_path, stack)
        paths = [_exported(one), _exported(one, opset=OLD_OPSET)]
    graphs = [onnx.load(path) for path in paths]
    assert [graph.opset_import[0].version for graph in graphs] == [OPSET, OLD_OPSET]
    assert [any(node.op_type == "LayerNormalization" for node in g.graph.node) for g in graphs] == [True, False]


def test_every_engine_of_torch_is_known_as_one():
    """One that raises stops the run; the others would be absent with a reason."""
    assert [name for name in MAKERS if name.startswith("torch ")] == ["torch fp32", "torch compiled fp32"]


def test_dlrm_takes_every_pair_once():
    model = Dlrm(13, 16, (32,), (32,))
    pairs = {(int(a), int(b)) for a, b in model.pairs.T}
    assert len(pairs) == 27 * 26 // 2 and all(a > b for a, b in pairs)
