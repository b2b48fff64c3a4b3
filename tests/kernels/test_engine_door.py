"""The engine's door: what it refuses and why, when memory runs out, and the choice of the instruction set."""

from __future__ import annotations

import importlib.util
import itertools
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.networks import exact_reference, pack_bits, pack_together, prepack, random_layer, random_mask
from oracle import assert_exact, small_integers
from torch import Tensor

from lt4rec_sparse import kernels
from lt4rec_sparse.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")


def full_layer(in_features: int, out_features: int, activation: str = "none") -> cpu.PackLayer:
    """Every weight kept and 1, no bias: each output is the sum of the row, in int8 too."""
    mask = torch.ones(1, out_features, in_features, dtype=torch.bool)
    values = torch.ones(in_features * out_features)
    return cpu.PackLayer(values, pack_bits(mask), 0, None, in_features, out_features, activation, input_scale=1.0)


def three_layers(precision: str) -> Tensor:
    return cpu.prepack_layers([[full_layer(10, 6), full_layer(6, 2)], [full_layer(10, 1)]], precision, cpu.UNSTRUCTURED)


@pytest.fixture(params=cpu.PRECISIONS)
def blob(request: pytest.FixtureRequest) -> Tensor:
    return three_layers(request.param)


def rows_of_bits(*rows: int) -> Tensor:
    """One plane of rows with up to 8 columns."""
    return torch.tensor(rows, dtype=torch.uint8).reshape(1, -1, 1)


def test_equal_networks_have_equal_blobs_anywhere_in_memory(blob: Tensor) -> None:
    assert torch.equal(three_layers(cpu.describe(blob).precision), blob)
    paths = ("auto", *cpu.describe(blob).layouts)
    for offset, batch, path in itertools.product((8, 24, 56), (3, 70), paths):
        moved = torch.zeros(blob.numel() + offset, dtype=torch.uint8)[offset:]
        moved.copy_(blob)
        out = torch.empty(batch, 3)
        cpu.sparse_mlp(torch.ones(batch, 10), moved, out, path=path)
        # In int8 the second layer's weights are multiples of 1/127.
        assert_exact(out.round(), torch.tensor([60.0, 60.0, 10.0]).expand(batch, 3))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda blob: blob[:0],
        lambda blob: blob[:32],
        lambda blob: blob[:96],
        lambda blob: blob[:-64],
        lambda blob: torch.cat([blob, blob.new_zeros(64)]),
        lambda blob: torch.zeros_like(blob),
        lambda blob: torch.cat([blob[:4], blob[4:5] + 1, blob[5:]]),
        lambda blob: torch.cat([blob.new_zeros(1), blob])[1:],
        lambda blob: torch.cat([blob.new_zeros(4), blob])[4:],
        lambda blob: blob.float(),
        lambda blob: torch.stack([blob, blob], dim=1)[:, 0],
    ],
    ids=[
        "empty",
        "header cut",
        "header alone",
        "cut",
        "longer",
        "no magic",
        "version",
        "misaligned by 1",
        "misaligned by 4",
        "dtype",
        "strided",
    ],
)
def test_what_is_no_blob_is_refused(blob: Tensor, spoil: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="prepacked: got"):
        cpu.sparse_mlp(torch.ones(1, 10), spoil(blob), torch.empty(1, 3))
    with pytest.raises(ValueError, match="prepacked: got"):
        cpu.describe(spoil(blob))
    with pytest.raises(ValueError, match="prepacked: got"):
        cpu.Prepacked(spoil(blob))


def test_a_blob_that_was_written_over_is_refused(blob: Tensor) -> None:
    network = cpu.Prepacked(blob)
    blob.zero_()
    with pytest.raises(ValueError, match="prepacked: got no blob"):
        network.run(torch.ones(1, 10), torch.empty(1, 3))


@pytest.mark.parametrize(
    ("x", "out", "threads", "message"),
    [
        (torch.ones(2, 11), torch.empty(2, 3), 1, r"x: got shape \(2, 11\), wanted \[batch, 10\]"),
        (torch.ones(2, 10), torch.empty(2, 4), 1, r"out: got shape \(2, 4\), wanted \[2, 3\]"),
        (torch.ones(2, 10), torch.empty(3, 3), 1, r"out: got shape \(3, 3\), wanted \[2, 3\]"),
        (torch.ones(0, 10), torch.empty(1, 3), 1, r"out: got shape \(1, 3\), wanted \[0, 3\]"),
        (torch.ones(10), torch.empty(1, 3), 1, r"x: got shape \(10,\), wanted \[batch, 10\]"),
        (torch.ones(2, 10), torch.empty(6), 1, r"out: got shape \(6,\), wanted \[2, 3\]"),
        (torch.ones(2, 10).double(), torch.empty(2, 3), 1, r"x: got torch.float64 on cpu, wanted torch.float32"),
        (torch.ones(2, 10).half(), torch.empty(2, 3), 1, r"x: got torch.float16 on cpu, wanted torch.float32 or torch"),
        (torch.ones(2, 10), torch.empty(2, 3).double(), 1, r"out: got torch.float64 on cpu"),
        (torch.ones(2, 10), torch.empty(2, 3).bfloat16(), 1, r"out: got torch.bfloat16 on cpu, wanted torch.float32"),
        (torch.ones(2, 10, device="meta"), torch.empty(2, 3), 1, "x: got torch.float32 on meta"),
        (torch.ones(10, 2).T, torch.empty(2, 3), 1, r"x: got strides \(1, 2\), wanted 1 within a row"),
        (torch.ones(2, 20)[:, ::2], torch.empty(2, 3), 1, r"x: got strides \(20, 2\), wanted 1 within a row"),
        (torch.ones(2, 10), torch.empty(3, 2).T, 1, r"out: got strides \(1, 2\), wanted 1 within a row"),
        (torch.ones(2, 10), torch.empty(3).expand(2, 3), 1, "out: got row stride 0, wanted at least 3"),
        (torch.ones(2, 10), torch.empty(5).as_strided((2, 3), (2, 1)), 1, "out: got row stride 2, wanted at least 3"),
        (torch.ones(2, 10), torch.empty(2, 3), 0, "threads: got 0, wanted at least 1"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(
    blob: Tensor, x: Tensor, out: Tensor, threads: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.sparse_mlp(x, blob, out, threads)


def test_a_path_that_does_not_exist_is_refused(blob: Tensor) -> None:
    with pytest.raises(ValueError, match="'tiles'"):
        cpu.sparse_mlp(torch.ones(1, 10), blob, torch.empty(1, 3), path="tiles")  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", cpu.PRECISIONS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planes": rows_of_bits(0b1111, 0b111)}, "layer 0: padding of planes: got 1, wanted exactly 0"),
        ({"planes": rows_of_bits(0b111, 0b10000111)}, "layer 0: padding of planes: got 16, wanted exactly 0"),
        (
            {"planes": rows_of_bits(0b111, 0b101)},
            "layer 0: planes: got 5, wanted as many kept weights as there are values, 6",
        ),
        ({"planes": rows_of_bits(7, 7)[:0]}, r"planes: got shape \(0, 2, 1\), wanted \(1, 2, 1\)"),
        ({"planes": None, "values": torch.ones(0)}, "layer 0: values: got 0, wanted one for each weight of a dense"),
        ({"task": 1}, "layer 0: task: got 1, wanted 0 or more, below 1"),
        ({"task": -1}, "layer 0: task: got -1, wanted 0 or more, below 1"),
        ({"planes": rows_of_bits(7, 7)[0]}, r"tasks\[0\]\[0\].planes: got shape \(2, 1\), wanted \(2, 2, 1\)"),
        ({"planes": rows_of_bits(7, 7, 7)}, r"planes: got shape \(1, 3, 1\), wanted \(1, 2, 1\)"),
        ({"planes": rows_of_bits(7, 7).expand(1, 2, 2)}, r"planes: got shape \(1, 2, 2\), wanted \(1, 2, 1\)"),
        ({"planes": torch.tensor(7, dtype=torch.uint8)}, r"planes: got shape \(\), wanted \(1, 2, 1\)"),
        ({"planes": rows_of_bits(7, 7).to(torch.int8)}, "planes: got torch.int8 on cpu"),
        ({"planes": rows_of_bits(7, 7).bool()}, "planes: got torch.bool on cpu"),
        ({"planes": rows_of_bits(7, 0, 7, 0)[:, ::2]}, "planes: got torch.uint8 on cpu, contiguous False"),
        ({"planes": rows_of_bits(7, 7).to("meta")}, "planes: got torch.uint8 on meta"),
        ({"planes": None, "values": torch.ones(5)}, "layer 0: values: got 5, wanted one for each weight of a dense"),
        ({"planes": None, "values": torch.ones(7)}, "layer 0: values: got 7, wanted one for each .* layer, 6"),
        ({"values": torch.ones(5)}, "layer 0: planes: got 6, wanted as many kept weights as there are values, 5"),
        ({"values": torch.ones(2, 3)}, r"values: got shape \(2, 3\), wanted \(6,\)"),
        ({"values": torch.ones(12)[::2]}, "contiguous False"),
        ({"values": torch.ones(6).bfloat16()}, "values: got torch.bfloat16"),
        ({"bias": torch.ones(3)}, r"bias: got shape \(3,\), wanted \(2,\)"),
        ({"bias": torch.ones(2).double()}, "bias: got torch.float64"),
        ({"out_features": 0}, "out_features 0, wanted at least 1"),
        ({"in_features": 0}, "got in_features 0"),
        ({"activation": "cos"}, "activation: got 'cos', wanted one of none, relu, sigmoid, tanh"),
    ],
)
def test_a_layer_that_is_not_canonical_is_refused(precision: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.prepack_layers([[full_layer(3, 2)._replace(**change)]], precision)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_scale": 0.0}, "layer 0: input_scale: got 0, wanted above 0 and finite"),
        ({"input_scale": -0.5}, "input_scale: got -0.5"),
        ({"input_scale": float("nan")}, "input_scale: got -?nan"),
        ({"input_scale": float("inf")}, "input_scale: got inf"),
        ({"input_scale": 1e300}, "input_scale: got 1e[+]300"),
        ({"input_scale": 1e-39}, "input_scale: got 1e-39"),  # whose inverse is no float32
        ({"input_zero_point": 256}, r"input_zero_point: got 256, wanted 0 to 255"),
        ({"input_zero_point": -1}, r"input_zero_point: got -1, wanted 0 to 255"),
        ({"input_zero_point": 2**40}, r"input_zero_point: got 1099511627776, wanted 0 to 255"),
        ({"values": torch.tensor([1, 1, 1, 1, float("nan"), 1])}, r"values\[4\]: got -?nan, wanted finite"),
        ({"values": torch.tensor([1, float("-inf"), 1, 1, 1, 1])}, r"values\[1\]: got -inf, wanted finite"),
        ({"bias": torch.tensor([1, float("nan")])}, r"bias\[1\]: got -?nan, wanted finite"),  # int8 cannot pass it on
    ],
)
def test_what_int8_cannot_represent_is_refused(change: dict[str, object], message: str) -> None:
    layer = full_layer(3, 2)
    with pytest.raises(ValueError, match=message):
        cpu.prepack_layers([[layer._replace(**change)]], "int8")
    with pytest.raises(ValueError, match=message.replace("layer 0", "layer 1")):
        cpu.prepack_layers([[full_layer(4, 3), layer._replace(**change)]], "int8")
    for precision in ("fp32", "bf16"):  # which ignore quantisation parameters, and for which NaN is a number
        assert cpu.prepack_layers([[layer._replace(**change)]], precision).numel() > 0


@pytest.mark.parametrize("change", ({"input_scale": 0.25}, {"input_zero_point": 3}))
def test_tasks_that_quantise_x_differently_are_refused(change: dict[str, object]) -> None:
    # x is quantised once, for all tasks.
    with pytest.raises(ValueError, match="input_"):
        cpu.prepack_layers(
            [[full_layer(3, 2)], [full_layer(3, 2), full_layer(2, 1)], [full_layer(3, 1)._replace(**change)]], "int8"
        )


def test_more_inputs_than_int8_can_sum_are_refused() -> None:
    cpu.prepack_layers([[full_layer(32768, 1)]], "int8")
    with pytest.raises(ValueError, match="in_features in int8: got 32769, wanted at most 32768"):
        cpu.prepack_layers([[full_layer(32769, 1)]], "int8")
    cpu.prepack_layers([[full_layer(32769, 1)]], "bf16")


def test_a_precision_or_layout_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="precision: got 'fp16', wanted one of fp32, bf16, int8"):
        cpu.prepack_layers([[full_layer(3, 2)]], "fp16")
    for layouts in ((), ("tables", "tiles"), ("auto",)):
        with pytest.raises(
            ValueError, match=r"layouts: got \(.*\), wanted blocks alone, or some of tables, slices, filled"
        ):
            cpu.prepack_layers([[full_layer(3, 2)]], layouts=layouts)


@pytest.mark.parametrize(
    "layouts", (("tables",), ("slices",), ("filled",), ("slices", "tables", "slices")), ids="-".join
)
@pytest.mark.parametrize("precision", cpu.PRECISIONS)
def test_a_path_needs_its_layout(precision: str, layouts: Sequence[str]) -> None:
    tasks = [[random_layer(random_mask(20, 30, 0.4, seed=t), "relu", seed=t)] for t in range(2)]
    blob = prepack(tasks, precision, layouts)
    facts = cpu.describe(blob)
    held = tuple(layout for layout in cpu.UNSTRUCTURED if layout in layouts)
    if held == ("filled",) and precision == "int8":
        held = ("tables",)
    assert facts.layouts == held
    for layout, size, multiply_adds in (
        ("tables", facts.table_nbytes, facts.table_multiply_adds),
        ("slices", facts.slice_nbytes, facts.slice_multiply_adds),
        ("filled", facts.block_nbytes, facts.block_multiply_adds),
    ):
        assert (size > 0, multiply_adds > 0) == (layout in held, layout in held)
    x = small_integers(70, 30, generator=torch.Generator().manual_seed(1))
    wanted = exact_reference(x, tasks, precision)
    for batch, path in itertools.product((0, 1, 70), ("auto", *cpu.UNSTRUCTURED)):
        out = torch.full((batch, 40), torch.nan)
        if path in ("auto", *held):
            cpu.sparse_mlp(x[:batch], blob, out, path=path)
            assert_exact(out, wanted[:batch])
        else:
            message = rf"path: got '{path}', wanted what the blob was prepacked for: \('{held[0]}'"
            with pytest.raises(ValueError, match=message):
                cpu.sparse_mlp(x[:batch], blob, out, path=path)


def test_layers_that_do_not_chain_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tasks\[0\]\[1\].in_features: got 4, wanted 2"):
        cpu.prepack_layers([[full_layer(3, 2), full_layer(4, 1)]])
    with pytest.raises(ValueError, match=r"tasks\[1\]\[0\].in_features: got 4, wanted 3"):
        cpu.prepack_layers([[full_layer(3, 2)], [full_layer(4, 1)]])
    with pytest.raises(ValueError, match=r"tasks: got layer counts \[1, 0\]"):
        cpu.prepack_layers([[full_layer(3, 2)], []])
    with pytest.raises(ValueError, match="tasks: got layer counts"):
        cpu.prepack_layers([])


@pytest.mark.parametrize("precision", cpu.PRECISIONS)
@pytest.mark.parametrize("part", ("rows", "planes"))
def test_a_part_of_a_weight_is_a_weight_of_its_own(precision: str, part: str) -> None:
    # It has the whole one's address, and would read past its own end where it were taken for that.
    masks = [random_mask(33, 24, 0.8, seed=1), torch.ones(33, 24, dtype=torch.bool)]
    draw = random_layer(masks[1], "none", seed=1, bias=False)
    if part == "rows":
        whole = draw.pack()
        assert whole.planes is not None
        less = whole._replace(planes=whole.planes[:, :5], values=whole.values[: 5 * 24], out_features=5)
        layers = [draw, draw._replace(weight=draw.weight[:5], mask=draw.mask[:5])]
    else:
        layers = [draw._replace(weight=draw.weight * mask, mask=mask) for mask in masks]
        whole = pack_together(layers)[1]
        assert whole.planes is not None
        kept = draw.weight[masks[0]]
        memory = whole.values.clone()
        memory[: len(kept)] = kept
        whole = whole._replace(values=memory)
        less = whole._replace(planes=whole.planes[:1], values=memory[: len(kept)], task=0)
        layers = [draw._replace(weight=memory.reshape(33, 24)), layers[0]]
    assert less.planes is not None
    assert (less.planes.data_ptr(), less.values.data_ptr()) == (whole.planes.data_ptr(), whole.values.data_ptr())
    x = small_integers(9, 24, generator=torch.Generator().manual_seed(1))
    wanted = torch.cat([exact_reference(x, [[layer]], precision) for layer in layers], dim=1)
    for both, columns in (([whole, less], wanted), ([less, whole], wanted.roll(-33, dims=1))):
        out = torch.full_like(wanted, torch.nan)
        cpu.sparse_mlp(x, cpu.prepack_layers([[layer] for layer in both], precision, cpu.UNSTRUCTURED), out)
        assert_exact(out, columns)


@pytest.mark.parametrize("precision", cpu.PRECISIONS)
def test_a_layer_may_be_wide_but_not_endless(precision: str) -> None:
    def dead_layer(out_features: int) -> cpu.PackLayer:
        planes = torch.zeros(1, out_features, 1, dtype=torch.uint8)
        return full_layer(1, 1)._replace(values=torch.ones(0), planes=planes, out_features=out_features)

    widest = cpu.prepack_layers([[dead_layer(70001)]], precision, cpu.UNSTRUCTURED)
    out = torch.empty(2, 70001)
    for path in ("auto", *cpu.describe(widest).layouts):
        cpu.sparse_mlp(torch.ones(2, 1), widest, out.fill_(torch.nan), path=path)
        assert not out.any()
    with pytest.raises(ValueError, match="out_features: got 16777217, wanted at most 16777216"):
        cpu.prepack_layers([[dead_layer(2**24 + 1)]], precision)


@pytest.mark.parametrize("precision", cpu.PRECISIONS)
@pytest.mark.parametrize("in_features", (2**31, 2**32 + 1, 2**62))
def test_more_columns_than_an_index_can_name_are_refused(precision: str, in_features: int) -> None:
    with pytest.raises(ValueError, match=f"in_features.*got {in_features}, wanted at most"):
        cpu.prepack_layers([[full_layer(1, 1)._replace(planes=None, in_features=in_features)]], precision)


IN_FEATURES, OUT_FEATURES = 11, 5  # a row is two bytes, of which five bits are padding


def mask_of(plane: Tensor) -> Tensor:
    bits = np.unpackbits(plane.numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(bits[..., :IN_FEATURES].astype(bool))


@settings(max_examples=6 * settings.default.max_examples)  # 90, or 300 in the check
@given(
    seed=st.integers(0, 50),
    precision=st.sampled_from(cpu.PRECISIONS),
    flips=st.lists(st.tuples(st.integers(0, 2 * OUT_FEATURES * 2 - 1), st.integers(0, 7)), max_size=3),
    swap=st.none() | st.tuples(st.integers(0, 19), st.integers(0, 19)),
    more_values=st.sampled_from((-1, 0, 0, 0, 0, 1)),
    task=st.sampled_from((0, 1, 1, 1, 1, 2, -1, 2**40)),
    is_second=st.booleans(),
)
def test_a_layer_is_right_or_refused(
    seed: int,
    precision: str,
    flips: list[tuple[int, int]],
    swap: tuple[int, int] | None,
    more_values: int,
    task: int,
    is_second: bool,
) -> None:
    masks = [random_mask(OUT_FEATURES, IN_FEATURES, 0.6, seed + t) for t in range(2)]
    draw = random_layer(masks[0] | masks[1], "relu", seed)
    packed = pack_together([draw._replace(weight=draw.weight * mask, mask=mask) for mask in masks])
    planes = packed[0].planes
    assert planes is not None
    at = planes.flatten()
    for position, bit in flips:
        at[position] ^= 1 << bit
    if swap:
        at[list(swap)] = at[list(reversed(swap))]
    values = torch.cat([packed[0].values, torch.ones(1)])[: len(packed[0].values) + more_values]
    layers = [layer._replace(values=values) for layer in packed]
    layers[1] = layers[1]._replace(task=task)
    before = [full_layer(4, IN_FEATURES)._replace(input_scale=0.05)] if is_second else []
    tasks = [[*before, layer] for layer in layers]
    kept = [mask_of(plane) for plane in planes]
    union = kept[0] | kept[1]
    is_canonical = torch.equal(pack_bits(torch.stack(kept)), planes) and len(values) == union.sum() and task in (0, 1)
    if not is_canonical:
        with pytest.raises(ValueError, match=r"layer [0-3]: (padding of )?(planes|task): got"):
            cpu.prepack_layers(tasks, precision)
        return
    blob = cpu.prepack_layers(tasks, precision, cpu.UNSTRUCTURED)
    if is_second:
        return
    weight = torch.zeros(OUT_FEATURES, IN_FEATURES)
    weight[union] = values
    accepted = [[draw._replace(weight=weight * kept[t], mask=kept[t], bias=layers[0].bias)] for t in (0, task)]
    x = small_integers(9, IN_FEATURES, generator=torch.Generator().manual_seed(seed))
    out = torch.empty(9, 2 * OUT_FEATURES)
    cpu.sparse_mlp(x, blob, out)
    assert_exact(out, exact_reference(x, accepted, precision))
    assert torch.equal(blob, prepack(accepted, precision))


def test_a_failed_allocation_is_an_error_and_no_crash(blob: Tensor) -> None:
    paths = ("auto", *cpu.describe(blob).layouts)
    header = struct.Struct("<2I11Q8I")  # BlobHeader of csrc/engine.h
    fields = list(header.unpack_from(blob.numpy()))
    multiply_adds, hidden_features = 7, 18
    assert (fields[multiply_adds], fields[hidden_features]) == (60 + 12 + 10, 16)
    fields[multiply_adds], fields[hidden_features] = 10**9, 2**32 - 16  # enough work for a second thread
    header.pack_into(blob.numpy(), 0, *fields)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**37, limits[1]))  # every path needs more than 2^38 bytes
    try:
        for threads, path in itertools.product((1, 2), paths):
            with pytest.raises(MemoryError):
                cpu.sparse_mlp(torch.ones(200, 10), blob, torch.empty(200, 3), threads, path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    # This thread allocates its scratch memory again.
    out = torch.empty(200, 3)
    cpu.sparse_mlp(torch.ones(200, 10), three_layers("fp32"), out, path=path)
    assert_exact(out, torch.tensor([60.0, 60.0, 10.0]).expand(200, 3))


def test_forcing_an_isa_lasts_as_long_as_its_context() -> None:
    before = cpu.isa()
    with cpu.forced_isa("scalar"):
        assert cpu.isa() == "scalar"
    assert cpu.isa() == before == os.environ.get("LT4REC_SPARSE_ISA", cpu.supported_isas()[-1])
    with pytest.raises(ValueError, match="isa: got 'mmx', wanted one that this machine runs: scalar"):
        cpu.forced_isa("mmx").__enter__()
    assert cpu.isa() == before


@pytest.mark.parametrize(("wanted", "printed"), [("scalar", "scalar"), ("mmx", "LT4REC_SPARSE_ISA: isa: got 'mmx'")])
def test_the_environment_forces_an_isa_or_says_why_not(wanted: str, printed: str) -> None:
    command = [sys.executable, "-c", "from lt4rec_sparse.kernels import cpu; print(cpu.isa())"]
    environment = os.environ | {"LT4REC_SPARSE_ISA": wanted}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert printed in done.stdout + done.stderr
    assert (done.returncode == 0) == (wanted == "scalar")


def test_tensors_that_the_engine_cannot_read_make_it_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LT4REC_SPARSE_ISA", raising=False)
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    spec = importlib.util.spec_from_file_location("cpu_of_older_torch", cpu.__file__)
    assert spec is not None
    assert spec.loader is not None
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    assert not bare.is_available()
    assert "shows no tensors through DLPack" in bare.absence_reason()


def test_without_the_extension_the_module_imports_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LT4REC_SPARSE_ISA", raising=False)
    monkeypatch.delattr(kernels, "_engine")
    monkeypatch.setitem(sys.modules, "lt4rec_sparse.kernels._engine", None)
    spec = importlib.util.spec_from_file_location("cpu_without_engine", cpu.__file__)
    assert spec is not None
    assert spec.loader is not None
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    assert not bare.is_available()
    assert "_engine" in bare.absence_reason()
    with pytest.raises(RuntimeError, match="the native engine is absent"):
        bare.prepack_layers([[full_layer(3, 2)]])
    monkeypatch.setenv("LT4REC_SPARSE_ISA", "scalar")
    with pytest.raises(ValueError, match="LT4REC_SPARSE_ISA: the native engine is absent"):
        spec.loader.exec_module(bare)


@pytest.mark.skipif(
    not cpu.is_available() or "avx512_bf16" not in cpu.supported_isas(), reason="no AVX-512 with BF16 here"
)
def test_intel_takes_bfloat16_as_floats() -> None:
    """Its instruction for pairs takes twice as long as two products of floats; AMD's does not."""
    is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert cpu.supported_isas()[-1] == ("avx512_vnni" if is_intel else "avx512_bf16")
