"""`python -m tests.kernels.gpu.ahead_of_time` for the installed Triton, and its gates on figures that break them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from kernels.gpu.ahead_of_time import cases, faults, words_a_step

ROOT = Path(__file__).parents[3]

# A loop with a product, which loads 32 x 2 mask words and an offset; in it one without, which loads 4096 indices.
TTGIR = """\
tt.func public @kernel(%words_ptr: !tt.ptr<i32>) {
  %0 = ttg.async_copy_global_to_local %w, %s mask %m : tensor<512x2x!tt.ptr<i32>, #b> -> <512x2xi32, #s>
  %1 = scf.for %k = %c0 to %K step %c64 iter_args(%acc = %zeros) -> (tensor<64x64xf32, #mma>)  : i32 {
    scf.for %j = %c0 to %c2 step %c1 : i32 {
      %2 = tt.load %p : tensor<4096x!tt.ptr<i32>, #b>
    }
    %3 = tt.dot %a, %b, %acc : tensor<64x64xbf16, #x> * tensor<64x64xbf16, #y> -> tensor<64x64xf32, #mma>
    %4 = ttg.async_copy_global_to_local %w, %s mask %m : tensor<32x2x!tt.ptr<i32>, #b> -> <32x2xi32, #s>
    %5 = ttg.async_copy_global_to_local %x, %t mask %m : tensor<64x64x!tt.ptr<bf16>, #b> -> <64x64xbf16, #s>
    %6 = tt.load %offset : !tt.ptr<i32>
    scf.yield %3 : tensor<64x64xf32, #mma>
  }
  tt.return
}
"""


@pytest.mark.ahead_of_time
def test_every_kernel_compiles_within_its_gates() -> None:
    # Never in this process, whose kernels may be the interpreter's.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.gpu.ahead_of_time", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


WIDE = next(case for name, case in cases().items() if name.startswith("forward masked 16 128x"))
GOOD = {
    **dict.fromkeys(("spill_bytes", "stack_bytes", "LDL", "STL", "serialised", "HMMA", "TCGEN", "FFMA"), 0),
    "HGMMA": 4,
    "shared_bytes": 200_000,
    "words": [*WIDE.words],
}


def test_gates_let_a_good_kernel_pass() -> None:
    assert not list(faults(WIDE, 90, GOOD))


@pytest.mark.parametrize(
    "worse",
    [
        {"spill_bytes": 4},
        {"stack_bytes": 8},
        {"STL": 1},
        {"serialised": 1},
        {"shared_bytes": 227 * 1024 + 1},
        {"words": []},
        {"words": [*WIDE.words, 2 * WIDE.words[0]]},
        {"words": [32 * WIDE.words[0]]},  # one for each weight
        {"HGMMA": 0, "HMMA": 64},
        {"HGMMA": 0, "FFMA": 64},
        {"HMMA": 64},  # one product of two
    ],
    ids=str,
)
def test_gates_refuse(worse: dict[str, object]) -> None:
    assert len(list(faults(WIDE, 90, GOOD | worse))) == 1


def test_each_loop_has_words_of_its_own() -> None:
    tail = WIDE._replace(words=(128, 896))
    assert not list(faults(tail, 90, GOOD | {"words": [128, 896, 128]}))
    assert len(list(faults(tail, 90, GOOD | {"words": [128]}))) == 1
    assert len(list(faults(tail, 90, GOOD | {"words": [128, 512]}))) == 1


# Run in a process of its own, too. If N, which the JIT sees, were not a multiple of 16, it would compile again.
COMPILED_ANEW = """\
from tests.kernels.gpu.ahead_of_time import cases, compiled_anew
kinds = {}
for name, case in cases().items():
    assert not list(compiled_anew(case)), name
    if case.other_batches:
        kinds.setdefault(case.launch.kernel.__name__, case)
for kind, case in sorted(kinds.items()):
    if "N" in case.launch.arguments:
        seen = {**case.launch.arguments, "N": 33}
        changed = list(compiled_anew(case._replace(other_batches=(case.launch._replace(arguments=seen),))))
        assert changed == ["compiled anew for another batch: N"], (kind, changed)
    print(kind, len(case.other_batches))
"""


def test_no_batch_compiles_anew() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED_ANEW]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        "block_sparse_fwd_kernel 3",
        "fused_tail_kernel 3",
        "masked_matmul_dgrad_kernel 3",
        "masked_matmul_fwd_kernel 3",
        "masked_matmul_wgrad_kernel 3",
    ]


def test_gates_refuse_tensor_cores_in_float32_alone() -> None:
    plain = WIDE._replace(arithmetic="fp32")
    assert not list(faults(plain, 90, GOOD | {"HGMMA": 0, "FFMA": 64}))
    assert len(list(faults(plain, 90, GOOD | {"FFMA": 64}))) == 1


def test_words_are_counted_in_the_loop_with_the_product() -> None:
    assert words_a_step(TTGIR) == [65]
    assert words_a_step(TTGIR.replace("tt.dot", "tt.other")) == [4096, 65]  # without products, in every loop
    assert words_a_step(TTGIR.replace("scf.for", "scf.if").replace("tt.dot", "tt.other")) == [1024 + 4096 + 65]
