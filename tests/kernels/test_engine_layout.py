"""The engine's door: the prepacked blob, refusals, guard pages, and the choice of the instruction set."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from oracle import assert_exact
from torch import Tensor

from lt4rec_sparse import kernels
from lt4rec_sparse.kernels import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason=f"no native engine: {native.absence_reason()}")


def full_layer(in_features: int, out_features: int, activation: str = "none") -> native.PackLayer:
    """Every weight kept and 1, no bias: each output is the sum of the row."""
    nnz = in_features * out_features
    return native.PackLayer(
        torch.arange(0, nnz + 1, in_features, dtype=torch.int32),
        torch.arange(in_features, dtype=torch.int32).repeat(out_features),
        torch.ones(nnz),
        None,
        in_features,
        activation,
    )


@pytest.fixture
def blob() -> Tensor:
    return native.prepack([[full_layer(10, 6), full_layer(6, 2)], [full_layer(10, 1)]])


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_describe_counts_what_is_stored(blob: Tensor) -> None:
    facts = native.describe(blob)
    # Slices of four: 6 rows are stored as 8 of 10 weights, 2 as 4 of 6, 1 as 4 of 10.
    assert facts == {
        "in_features": 10,
        "outputs": 3,
        "tasks": 2,
        "layers": 3,
        "nnz": 60 + 12 + 10,
        "stored": 80 + 24 + 40,
        "bytes": blob.numel(),
    }


def test_equal_networks_have_equal_blobs_anywhere_in_memory(blob: Tensor) -> None:
    again = native.prepack([[full_layer(10, 6), full_layer(6, 2)], [full_layer(10, 1)]])
    assert torch.equal(again, blob)
    moved = torch.zeros(blob.numel() + 8, dtype=torch.uint8)[8:]
    moved.copy_(blob)
    x, out = torch.ones(3, 10), torch.empty(3, 3)
    native.sparse_mlp(x, moved, out)
    assert_exact(out, torch.tensor([60.0, 60.0, 10.0]).expand(3, 3))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda blob: blob[:0],
        lambda blob: blob[:32],
        lambda blob: blob[:-64],
        lambda blob: torch.cat([blob, blob.new_zeros(64)]),
        lambda blob: torch.zeros_like(blob),
        lambda blob: torch.cat([blob[:4], blob[4:5] + 1, blob[5:]]),
        lambda blob: torch.cat([blob.new_zeros(1), blob])[1:],
        lambda blob: blob.float(),
        lambda blob: torch.stack([blob, blob], dim=1)[:, 0],
    ],
    ids=["empty", "header cut", "cut", "longer", "no magic", "version", "misaligned", "dtype", "strided"],
)
def test_what_is_no_blob_is_refused(blob: Tensor, spoil: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="prepacked: got"):
        native.sparse_mlp(torch.ones(1, 10), spoil(blob), torch.empty(1, 3))
    with pytest.raises(ValueError, match="prepacked: got"):
        native.describe(spoil(blob))


@pytest.mark.parametrize(
    ("x", "out", "threads", "message"),
    [
        (torch.ones(2, 11), torch.empty(2, 3), 1, "got in_features 11 and outputs 3, wanted 10 and 3"),
        (torch.ones(2, 10), torch.empty(2, 4), 1, "got in_features 10 and outputs 4, wanted 10 and 3"),
        (torch.ones(2, 10), torch.empty(3, 3), 1, "out: got batch 3, wanted 2"),
        (torch.ones(10), torch.empty(1, 3), 1, "x: got 1 dimensions, wanted 2"),
        (torch.ones(2, 10).double(), torch.empty(2, 3), 1, r"x: got torch.float64 on cpu, wanted torch.float32"),
        (torch.ones(2, 10), torch.empty(2, 3).double(), 1, r"out: got torch.float64 on cpu"),
        (torch.ones(2, 10, device="meta"), torch.empty(2, 3), 1, "x: got torch.float32 on meta"),
        (torch.ones(10, 2).T, torch.empty(2, 3), 1, r"x: got strides \(1, 2\), wanted 1 within a row"),
        (torch.ones(2, 10), torch.empty(3).expand(2, 3), 1, "out: got row stride 0, wanted at least 3"),
        (torch.ones(2, 10), torch.empty(2, 3), 0, "threads: got 0, wanted at least 1"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(
    blob: Tensor, x: Tensor, out: Tensor, threads: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        native.sparse_mlp(x, blob, out, threads)


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
        ({"col_indices": ints(-1, 1, 2, 0, 1, 2)}, r"col_indices\[0\]: got -1"),
        ({"col_indices": torch.arange(6)}, r"tasks\[0\]\[0\].col_indices: got torch.int64"),
        ({"crow_indices": ints()}, "out_features -1, wanted at least 1"),
        ({"crow_indices": ints(0)}, "out_features 0, wanted at least 1"),
        ({"crow_indices": ints(0, 3, 6)[None]}, r"crow_indices: got shape \(1, 3\), wanted \(3,\)"),
        ({"values": torch.ones(5)}, r"values: got shape \(5,\), wanted \(6,\)"),
        ({"values": torch.ones(12)[::2]}, "contiguous False"),
        ({"bias": torch.ones(3)}, r"bias: got shape \(3,\), wanted \(2,\)"),
        ({"in_features": 0}, "got in_features 0"),
        ({"activation": "tanh"}, "activation: got 'tanh', wanted one of none, relu, sigmoid"),
    ],
)
def test_a_layer_that_is_not_canonical_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.prepack([[full_layer(3, 2)._replace(**change)]])


def test_layers_that_do_not_chain_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tasks\[0\]\[1\].in_features: got 4, wanted 2"):
        native.prepack([[full_layer(3, 2), full_layer(4, 1)]])
    with pytest.raises(ValueError, match=r"tasks\[1\]\[0\].in_features: got 4, wanted 3"):
        native.prepack([[full_layer(3, 2)], [full_layer(4, 1)]])
    with pytest.raises(ValueError, match=r"tasks: got layer counts \[1, 0\]"):
        native.prepack([[full_layer(3, 2)], []])
    with pytest.raises(ValueError, match="tasks: got layer counts"):
        native.prepack([])


def test_more_rows_than_a_slice_can_name_are_refused() -> None:
    dead = full_layer(1, 1)._replace(col_indices=ints(), values=torch.ones(0))
    widest = native.prepack([[dead._replace(crow_indices=torch.zeros(65028, dtype=torch.int32))]])
    assert native.describe(widest)["outputs"] == 65027
    with pytest.raises(ValueError, match="out_features: got 65028, wanted at most 65027"):
        native.prepack([[dead._replace(crow_indices=torch.zeros(65029, dtype=torch.int32))]])


def test_a_failed_allocation_is_an_error_and_no_crash(blob: Tensor) -> None:
    stored, hidden_rows = blob[24:32].view(torch.int64), blob[48:52].view(torch.int32)  # BlobHeader of csrc/engine.h
    assert (stored.item(), hidden_rows.item()) == (80 + 24 + 40, 6 + 1)
    stored.fill_(10**9)  # enough work for a second thread
    hidden_rows.fill_(2**31 - 1)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**37, limits[1]))  # two tiles of 64 lanes would take eight times that
    try:
        for threads in (1, 2):
            with pytest.raises(MemoryError):
                native.sparse_mlp(torch.ones(200, 10), blob, torch.empty(200, 3), threads)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def before_guard_page(tensor: Tensor) -> Tensor:
    """A copy that ends where an inaccessible page begins: one byte read or written past it kills the process."""
    size = tensor.numel() * tensor.element_size()
    usable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, usable + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    prot_none = 0
    failed = ctypes.CDLL(None, use_errno=True).mprotect(
        ctypes.c_void_p(start + usable), ctypes.c_size_t(mmap.PAGESIZE), prot_none
    )
    assert not failed, os.strerror(ctypes.get_errno())
    guarded = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=usable - size)
    return guarded.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 3), (8, 8, 8), (16, 130, 16), (64, 128, 64), (65, 257, 129)])
def test_nothing_is_touched_past_the_end(shape: tuple[int, int, int]) -> None:
    batch, in_features, out_features = shape
    prepacked = before_guard_page(native.prepack([[full_layer(in_features, out_features)]]))
    x, out = before_guard_page(torch.ones(batch, in_features)), before_guard_page(torch.zeros(batch, out_features))
    for name in native.supported_isas():
        with native.forced_isa(name):
            native.sparse_mlp(x, prepacked, out.fill_(float("nan")), threads=2)
            assert_exact(out, torch.full((batch, out_features), float(in_features)))


def test_forcing_an_isa_lasts_as_long_as_its_context() -> None:
    before = native.isa()
    with native.forced_isa("scalar"):
        assert native.isa() == "scalar"
    assert native.isa() == before == native.supported_isas()[-1]
    with pytest.raises(ValueError, match="isa: got 'mmx', wanted one that this machine runs: scalar"):
        native.forced_isa("mmx").__enter__()
    assert native.isa() == before


@pytest.mark.parametrize(("wanted", "printed"), [("scalar", "scalar"), ("mmx", "LT4REC_SPARSE_ISA: isa: got 'mmx'")])
def test_the_environment_forces_an_isa_or_says_why_not(wanted: str, printed: str) -> None:
    command = [sys.executable, "-c", "from lt4rec_sparse.kernels import native; print(native.isa())"]
    environment = os.environ | {"LT4REC_SPARSE_ISA": wanted}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert printed in done.stdout + done.stderr
    assert (done.returncode == 0) == (wanted == "scalar")


def test_without_the_extension_the_module_imports_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kernels, "_engine")
    monkeypatch.setitem(sys.modules, "lt4rec_sparse.kernels._engine", None)
    spec = importlib.util.spec_from_file_location("native_without_engine", native.__file__)
    assert spec is not None
    assert spec.loader is not None
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    assert not bare.is_available()
    assert "_engine" in bare.absence_reason()
    with pytest.raises(RuntimeError, match="the native engine is absent"):
        bare.prepack([[full_layer(3, 2)]])
