"""The engine's door: what it refuses and why, when memory runs out, and the choice of the instruction set."""

from __future__ import annotations

import importlib.util
import itertools
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.networks import exact_reference, prepack, random_layer, random_mask
from oracle import assert_exact, small_integers
from torch import Tensor

from lt4rec_sparse import kernels
from lt4rec_sparse.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")


def full_layer(in_features: int, out_features: int, activation: str = "none") -> cpu.PackLayer:
    """Every weight kept and 1, no bias: each output is the sum of the row, in int8 too."""
    nnz = in_features * out_features
    return cpu.PackLayer(
        torch.arange(0, nnz + 1, in_features, dtype=torch.int32),
        torch.arange(in_features, dtype=torch.int32).repeat(out_features),
        torch.ones(nnz),
        None,
        in_features,
        activation,
        input_scale=1.0,
    )


def three_layers(precision: str) -> Tensor:
    return cpu.prepack([[full_layer(10, 6), full_layer(6, 2)], [full_layer(10, 1)]], precision)


@pytest.fixture(params=cpu.PRECISIONS)
def blob(request: pytest.FixtureRequest) -> Tensor:
    return three_layers(request.param)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_equal_networks_have_equal_blobs_anywhere_in_memory(blob: Tensor) -> None:
    assert torch.equal(three_layers(cpu.describe(blob).precision), blob)
    for offset, (batch, path) in itertools.product((8, 24, 56), itertools.product((3, 70), cpu.PATHS)):
        moved = torch.zeros(blob.numel() + offset, dtype=torch.uint8)[offset:]
        moved.copy_(blob)
        out = torch.empty(batch, 3)
        cpu.sparse_mlp(torch.ones(batch, 10), moved, out, path=path)
        # In int8 the second layer's weights are counted in steps of 1/127.
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
        cpu.Network(spoil(blob))


def test_a_blob_that_was_written_over_is_refused(blob: Tensor) -> None:
    network = cpu.Network(blob)
    blob.zero_()
    with pytest.raises(ValueError, match="prepacked: got no blob"):
        network.sparse_mlp(torch.ones(1, 10), torch.empty(1, 3))


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
        ({"crow_indices": ints(1, 3, 6)}, r"layer 0: crow_indices\[0\]: got 1, wanted exactly 0"),
        ({"crow_indices": ints(0, 3, 5)}, r"layer 0: crow_indices\[2\]: got 5, wanted nnz 6"),
        ({"crow_indices": ints(0, 7, 6)}, r"layer 0: crow_indices\[2\]: got 6, wanted at least 7"),
        ({"crow_indices": ints(0, -1, 6)}, r"layer 0: crow_indices\[1\]: got -1, wanted at least 0"),
        ({"col_indices": ints(0, 1, 3, 0, 1, 2)}, r"col_indices\[2\]: got 3, wanted less than in_features 3"),
        (
            {"col_indices": ints(0, 1, 1, 0, 1, 2)},
            r"col_indices\[2\]: got 1, wanted ascending within its row, at least 2",
        ),
        ({"col_indices": ints(2, 1, 0, 0, 1, 2)}, r"col_indices\[1\]: got 1, wanted ascending"),
        ({"col_indices": ints(-1, 1, 2, 0, 1, 2)}, r"col_indices\[0\]: got -1"),
        ({"col_indices": torch.arange(6)}, r"tasks\[0\]\[0\].col_indices: got torch.int64"),
        ({"crow_indices": ints()}, "out_features -1, wanted at least 1"),
        ({"crow_indices": ints(0)}, "out_features 0, wanted at least 1"),
        ({"crow_indices": ints(0, 3, 6)[None]}, r"crow_indices: got shape \(1, 3\), wanted \(3,\)|out_features 0"),
        ({"values": torch.ones(5)}, r"values: got shape \(5,\), wanted \(6,\)"),
        ({"values": torch.ones(12)[::2]}, "contiguous False"),
        ({"values": torch.ones(6).bfloat16()}, "values: got torch.bfloat16"),
        ({"bias": torch.ones(3)}, r"bias: got shape \(3,\), wanted \(2,\)"),
        ({"in_features": 0}, "got in_features 0"),
        ({"activation": "tanh"}, "activation: got 'tanh', wanted one of none, relu, sigmoid"),
    ],
)
def test_a_layer_that_is_not_canonical_is_refused(precision: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.prepack([[full_layer(3, 2)._replace(**change)]], precision)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_scale": 0.0}, "layer 0: input_scale: got 0, wanted above 0 and finite"),
        ({"input_scale": -0.5}, "input_scale: got -0.5"),
        ({"input_scale": float("nan")}, "input_scale: got -?nan"),
        ({"input_scale": float("inf")}, "input_scale: got inf"),
        ({"input_scale": 1e300}, "input_scale: got 1e[+]300"),
        ({"input_scale": 1e-39}, "input_scale: got 1e-39"),  # whose inverse is no float32
        ({"input_zero_point": 256}, r"input_zero_point\[0\]: got 256, wanted 0 to 255"),
        ({"input_zero_point": -1}, r"input_zero_point\[0\]: got -1, wanted 0 to 255"),
        ({"input_zero_point": 2**40}, r"input_zero_point\[0\]: got 1099511627776, wanted 0 to 255"),
        ({"values": torch.tensor([1, 1, 1, 1, float("nan"), 1])}, r"values\[4\]: got -?nan, wanted finite"),
        ({"values": torch.tensor([1, float("-inf"), 1, 1, 1, 1])}, r"values\[1\]: got -inf, wanted finite"),
        ({"bias": torch.tensor([1, float("nan")])}, r"bias\[1\]: got -?nan, wanted finite"),  # no code tells of it
    ],
)
def test_what_int8_cannot_count_is_refused(change: dict[str, object], message: str) -> None:
    layer = full_layer(3, 2)
    with pytest.raises(ValueError, match=message):
        cpu.prepack([[layer._replace(**change)]], "int8")
    with pytest.raises(ValueError, match=message.replace("layer 0", "layer 1")):
        cpu.prepack([[full_layer(4, 3), layer._replace(**change)]], "int8")
    for precision in ("fp32", "bf16"):  # where codes mean nothing, and NaN is a number like any other
        assert cpu.prepack([[layer._replace(**change)]], precision).numel() > 0


@pytest.mark.parametrize("change", ({"input_scale": 0.25}, {"input_zero_point": 3}))
def test_tasks_that_count_x_in_different_codes_are_refused(change: dict[str, object]) -> None:
    # x is counted once, for all tasks.
    with pytest.raises(ValueError, match="input_"):
        cpu.prepack(
            [[full_layer(3, 2)], [full_layer(3, 2), full_layer(2, 1)], [full_layer(3, 1)._replace(**change)]], "int8"
        )


def test_more_inputs_than_int8_can_sum_are_refused() -> None:
    cpu.prepack([[full_layer(32768, 1)]], "int8")
    with pytest.raises(ValueError, match="in_features in int8: got 32769, wanted at most 32768"):
        cpu.prepack([[full_layer(32769, 1)]], "int8")
    cpu.prepack([[full_layer(32769, 1)]], "bf16")


def test_a_precision_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="precision: got 'fp16', wanted one of fp32, bf16, int8"):
        cpu.prepack([[full_layer(3, 2)]], "fp16")


def test_layers_that_do_not_chain_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tasks\[0\]\[1\].in_features: got 4, wanted 2"):
        cpu.prepack([[full_layer(3, 2), full_layer(4, 1)]])
    with pytest.raises(ValueError, match=r"tasks\[1\]\[0\].in_features: got 4, wanted 3"):
        cpu.prepack([[full_layer(3, 2)], [full_layer(4, 1)]])
    with pytest.raises(ValueError, match=r"tasks: got layer counts \[1, 0\]"):
        cpu.prepack([[full_layer(3, 2)], []])
    with pytest.raises(ValueError, match="tasks: got layer counts"):
        cpu.prepack([])


@pytest.mark.parametrize("precision", cpu.PRECISIONS)
def test_more_rows_than_a_slice_can_name_are_refused(precision: str) -> None:
    dead = full_layer(1, 1)._replace(col_indices=ints(), values=torch.ones(0))
    widest = cpu.prepack([[dead._replace(crow_indices=torch.zeros(65028, dtype=torch.int32))]], precision)
    out = torch.empty(2, 65027)
    for path in cpu.PATHS:
        cpu.sparse_mlp(torch.ones(2, 1), widest, out.fill_(torch.nan), path=path)
        assert not out.any()
    with pytest.raises(ValueError, match="out_features: got 65028, wanted at most 65027"):
        cpu.prepack([[dead._replace(crow_indices=torch.zeros(65029, dtype=torch.int32))]], precision)


@pytest.mark.parametrize("precision", cpu.PRECISIONS)
@pytest.mark.parametrize("in_features", (2**31, 2**32 + 1, 2**62))
def test_more_columns_than_an_index_can_name_are_refused(precision: str, in_features: int) -> None:
    with pytest.raises(ValueError, match=f"in_features.*got {in_features}, wanted at most"):
        cpu.prepack([[full_layer(1, 1)._replace(in_features=in_features)]], precision)


# What a fuzzer writes into a layer: edges of int32, of the columns and of the row starts.
WRONG = st.sampled_from((-(2**31), -1, 0, 1, 2, 5, 6, 7, 8, 16, 2**24, 2**31 - 1))


@settings(max_examples=300)
@given(
    seed=st.integers(0, 50),
    precision=st.sampled_from(cpu.PRECISIONS),
    writes=st.lists(
        st.tuples(st.sampled_from(("crow_indices", "col_indices")), st.integers(0, 100), WRONG), max_size=3
    ),
    swap=st.none() | st.tuples(st.integers(0, 100), st.integers(0, 100)),
    is_second=st.booleans(),
)
def test_a_layer_is_right_or_refused(
    seed: int,
    precision: str,
    writes: list[tuple[str, int, int]],
    swap: tuple[int, int] | None,
    is_second: bool,
) -> None:
    in_features, out_features = 7, 5
    mask = random_mask(out_features, in_features, 0.5, seed)
    layer = random_layer(mask, "relu", seed)
    packed = layer.pack()
    for field, at, value in writes:
        array: Tensor = getattr(packed, field)
        array[at % len(array)] = value
    if swap:
        columns = packed.col_indices
        a, b = (at % len(columns) for at in swap)
        columns[[a, b]] = columns[[b, a]]
    task = [full_layer(4, in_features)._replace(input_scale=0.05), packed] if is_second else [packed]
    starts, columns = packed.crow_indices.tolist(), packed.col_indices.tolist()
    is_canonical = (
        (starts[0], starts[-1]) == (0, len(columns))
        and starts == sorted(starts)
        and all(0 <= column < in_features for column in columns)
        and all(columns[i] < columns[i + 1] for i in range(len(columns) - 1) if i + 1 not in starts)
    )
    if not is_canonical:
        with pytest.raises(ValueError, match=f"layer {int(is_second)}: (crow|col)_indices"):
            cpu.prepack([task], precision)
        return
    blob = cpu.prepack([task], precision)
    if is_second:
        return
    weight = torch.zeros(out_features, in_features)
    rows = torch.arange(out_features).repeat_interleave(packed.crow_indices.diff())
    weight[rows, packed.col_indices] = packed.values
    kept = torch.zeros_like(mask)
    kept[rows, packed.col_indices] = True
    accepted = layer._replace(weight=weight, mask=kept)
    x = small_integers(9, in_features, generator=torch.Generator().manual_seed(seed))
    out = torch.empty(9, out_features)
    cpu.sparse_mlp(x, blob, out)
    assert_exact(out, exact_reference(x, [[accepted]], precision))
    assert torch.equal(blob, prepack([[accepted]], precision))


@pytest.mark.parametrize("path", cpu.PATHS)
def test_a_failed_allocation_is_an_error_and_no_crash(blob: Tensor, path: cpu.Path) -> None:
    header = struct.Struct("<2I7Q8I")  # BlobHeader of csrc/engine.h
    fields = list(header.unpack_from(blob.numpy()))
    products, hidden_features = 6, 14
    assert (fields[products], fields[hidden_features]) == (60 + 12 + 10, 16)
    fields[products], fields[hidden_features] = 10**9, 2**32 - 16  # enough work for a second thread
    header.pack_into(blob.numpy(), 0, *fields)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**37, limits[1]))  # what it takes is above 2^38 on every path
    try:
        for threads in (1, 2):
            with pytest.raises(MemoryError):
                cpu.sparse_mlp(torch.ones(200, 10), blob, torch.empty(200, 3), threads, path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    # The scratch memory that this thread has lost is had anew.
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


def test_without_the_extension_the_module_imports_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kernels, "_engine")
    monkeypatch.setitem(sys.modules, "lt4rec_sparse.kernels._engine", None)
    spec = importlib.util.spec_from_file_location("native_without_engine", cpu.__file__)
    assert spec is not None
    assert spec.loader is not None
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    assert not bare.is_available()
    assert "_engine" in bare.absence_reason()
    with pytest.raises(RuntimeError, match="the native engine is absent"):
        bare.prepack([[full_layer(3, 2)]])
