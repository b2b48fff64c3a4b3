"""`python -m tests.kernels.gpu.ahead_of_time [--check] [PART]`: every Triton kernel, compiled for absent GPUs.

Compiles all cases, or those with PART in their name, for each of their chips, and reads from what the compiler made:

- registers, spill_bytes, stack_bytes: from the log of ptxas. serialised: it gave up overlapping wgmma.
- shared_bytes: of a block.
- words: how many int32 a step of each loop with a product loads: the mask words.
- instructions, and HGMMA (wgmma), HMMA (mma), TCGEN (tcgen05), FFMA, LDG, LDGSTS (cp.async), LDL and STL of them.

Without `--check` the figures replace those of the installed Triton in `bench/results/gpu_compiled.json`: look at the
diff. With it, figures other than the committed ones are a fault, too. What every case must keep says `faults`; the exit
code is 1 where one does not. No GPU and no driver is asked for.

To add a kernel, write a function that returns its cases by name, made of META tensors, and append it to `SOURCES`.
A name says what tells the case from others of its kernel; half a second a chip is what a case adds to the test suite.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from lt4rec_sparse.kernels.gpu import block_sparse, fused_tail, mask_and_cast, masked_matmul
from lt4rec_sparse.kernels.gpu.block_sparse import BlockWeight
from lt4rec_sparse.kernels.gpu.fused_tail import Tail
from lt4rec_sparse.kernels.gpu.launch import Launch, Tile

COMMITTED = Path(__file__).parents[3] / "bench" / "results" / "gpu_compiled.json"
NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
COUNTED = {
    "HGMMA": "HGMMA",
    "HMMA": "HMMA",
    "TCGEN": r"UTC\w*MMA",
    "FFMA": "FFMA",
    "LDG": r"LDG\b",
    "LDGSTS": "LDGSTS",
    "LDL": "LDL",
    "STL": "STL",
}
MOST_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of a block
INSTRUCTION_BYTES = 16
WIDE_ROWS = 64  # what one wgmma or tcgen05 product has at least

Figures = dict[str, Any]


class Case(NamedTuple):
    """A launch of META tensors, and what its compiled form must keep."""

    launch: Launch
    arithmetic: str  # of its products, as in the kernels' tables; "" where it has none
    rows: int  # of a product: what a wide tensor-core instruction needs 64 of
    words: tuple[int, ...]  # int32 that a step of each loop with a product loads: any of these, and all are found
    chips: tuple[int, ...] = (80, 90)
    other_batches: tuple[Launch, ...] = ()  # launches that must run the same code


DTYPES = {"16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}  # by arithmetic


def masked_matmul_cases() -> dict[str, Case]:
    """Return every entry of the tables for a layer 1024-512 of two tasks, and what is special with the largest."""
    cases: dict[str, Case] = {}
    for arithmetic, dtype in DTYPES.items():
        for i, tile in enumerate(masked_matmul.FORWARD[arithmetic]):
            # Training: the weight is float32.
            cases |= _forward(arithmetic, tile, dtype, on_blackwell=i == 0)
        for i, tile in enumerate(masked_matmul.DGRAD[arithmetic]):
            cases |= _dgrad(arithmetic, tile, dtype, on_blackwell=i == 0 and arithmetic == "16")
        for i, tile in enumerate(masked_matmul.WGRAD[arithmetic]):
            cases |= _wgrad(arithmetic, tile, dtype, on_blackwell=i == 0 and arithmetic == "16")
    half, largest = torch.bfloat16, masked_matmul.FORWARD["16"][0]
    cases |= _forward("16", largest, half, half)
    cases |= _forward("16", largest, half, tasks="apart")
    cases |= _forward("tf32", masked_matmul.FORWARD["tf32"][0], torch.float32, tasks="apart")
    cases |= _dgrad("16", masked_matmul.DGRAD["16"][0], half, tasks="apart")
    cases |= _wgrad("16", masked_matmul.WGRAD["16"][0], half, tasks="apart")
    return cases


def mask_and_cast_cases() -> dict[str, Case]:
    """Return what surrounds cuBLAS in training: the cast of the weight, and the sum of its gradients."""
    shape, tasks = (OUT_FEATURES, IN_FEATURES), 2
    words, of_tile = _words(tasks, *shape), mask_and_cast.BLOCK_N * mask_and_cast.BLOCK_K // 32
    weight = _meta(torch.float32, *shape)
    products = _meta(torch.bfloat16, tasks, *shape)
    cast = mask_and_cast.mask_and_cast_launch(weight, words, products)
    total = mask_and_cast.mask_and_sum_launch(products, words, weight)
    return {
        "mask_and_cast fp32 to bf16": Case(cast, "", 0, (of_tile,)),
        "mask_and_sum bf16 to fp32": Case(total, "", 0, (of_tile,)),
    }


def fused_tail_cases() -> dict[str, Case]:
    """Return every entry of the table for 512-256-128-1 of two tasks, a tail of one hidden layer, and float16."""
    cases: dict[str, Case] = {}
    widths = (512, 256, 128, 1)
    for tile in fused_tail.TILES:
        cases |= _tail(tile, torch.bfloat16, widths)
    largest = fused_tail.TILES[0]
    cases |= _tail(largest, torch.bfloat16, (256, 128, 1), on_blackwell=True)
    cases |= _tail(largest, torch.float16, widths, on_blackwell=True)
    return cases


def block_sparse_cases() -> dict[str, Case]:
    """Return every entry of the table for 1024-512 of two tasks on one x."""
    cases: dict[str, Case] = {}
    blocks = {16: (16, 1), 32: (32, 1), 64: (32, 2), 128: (64, 2)}  # by columns: a block's side, tasks together
    for columns, entries in block_sparse.TILES.items():
        for tile in entries:
            cases |= _block_sparse(tile, *blocks[columns])
    return cases


SOURCES: tuple[Callable[[], dict[str, Case]], ...] = (
    masked_matmul_cases,
    mask_and_cast_cases,
    fused_tail_cases,
    block_sparse_cases,
)


@cache
def cases() -> dict[str, Case]:
    """Return all cases by name, in order of their names."""
    every: dict[str, Case] = {}
    for source in SOURCES:
        more = source()
        assert not every.keys() & more.keys(), f"two cases of one name: {sorted(every.keys() & more.keys())}"
        every |= more
    return dict(sorted(every.items()))


def faults(case: Case, chip: int, figures: Figures) -> Iterator[str]:
    """Yield what a compiled case must not be."""
    for name in ("spill_bytes", "stack_bytes", "LDL", "STL", "serialised"):
        if figures[name]:
            yield f"{name} {figures[name]}, wanted 0"
    if figures["shared_bytes"] > MOST_SHARED_BYTES[chip]:
        yield f"shared_bytes {figures['shared_bytes']}, a block of sm_{chip} has {MOST_SHARED_BYTES[chip]}"
    if set(figures["words"]) != set(case.words):
        yield f"int32 loaded a step: {figures['words']}, wanted {case.words}"
    wanted = _instruction(case, chip)
    products = [name for name in ("HGMMA", "HMMA", "TCGEN", "FFMA") if figures[name]]
    if (wanted and wanted not in products) or set(products) - {wanted, "FFMA"}:
        yield f"products by {products}, wanted {wanted or 'none'}"


def bind(launch: Launch, chip: int) -> tuple[Any, ...]:
    """Return a launch's arguments, what they specialise the kernel to, and its settings, as the JIT would.

    Triton's own binder specialises: on dtypes, multiples of 16, ones and None, also inside tuples.
    """
    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", chip, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    settings = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    bound, specialization, settings = binder(**launch.arguments, **launch.constants, **settings)
    return bound, specialization, settings


def compiled_anew(case: Case) -> Iterator[str]:
    """Yield what would make the JIT compile again for another batch of a case, which it must not."""
    bound, *key = bind(case.launch, case.chips[0])
    for launch in case.other_batches:
        _, *other = bind(launch, case.chips[0])
        if other != key:
            changed = [name for name, a, b in zip(bound, key[0], other[0], strict=True) if a != b]
            yield f"compiled anew for another batch: {', '.join(changed) or 'settings'}"


def compile_case(name: str, chip: int) -> tuple[Figures, bytes]:
    """Compile one case as its launch would on such a chip; return the figures, and the instructions, not yet read."""
    launch = cases()[name].launch
    target = GPUTarget("cuda", chip, 32)
    backend = make_backend(target)
    bound, specialization, settings = bind(launch, chip)
    options, *source = launch.kernel._pack_args(backend, settings, bound, specialization, settings)
    log = StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.cache.dir = folder
        knobs.compilation.always_compile = True  # or there is no log
        knobs.nvidia.dump_ptxas_log = True
        with redirect_stdout(log):
            compiled = triton.compile(ASTSource(launch.kernel, *source), target=target, options=options.__dict__)
    memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    assert memory and registers, log.getvalue()
    figures = {
        "registers": int(registers[1]),
        "stack_bytes": int(memory[1]),
        "spill_bytes": int(memory[2]) + int(memory[3]),
        "serialised": log.getvalue().count("wgmma.mma_async instructions are serialized"),
        "shared_bytes": compiled.metadata.shared,
        "words": words_a_step(compiled.asm["ttgir"]),
    }
    return figures, machine_code(compiled.asm["cubin"])


def machine_code(cubin: bytes) -> bytes:
    """Return the instructions of a compiled kernel: the section .text of an ELF file of 64 bits."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<I20xQQ", cubin, headers + size * i) for i in range(count)]
    texts = [
        cubin[start : start + length]
        for name, start, length in sections
        if cubin.startswith(b".text.", sections[names][1] + name)
    ]
    assert len(texts) == 1, f"{len(texts)} kernels in one cubin"
    return texts[0]


def count_instructions(codes: Sequence[bytes], chip: int) -> list[Figures]:
    """Disassemble the kernels of a chip and count: all in one go, for nvdisasm takes 0.4 s to start."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        raw.write_bytes(b"".join(codes))
        command = [str(NVDISASM), "--binary", f"SM{chip}", str(raw)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # "/*0050*/ @P0 EXIT ;"
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", text, re.MULTILINE)
    assert INSTRUCTION_BYTES * len(instructions) == sum(map(len, codes)), "nvdisasm read other than whole instructions"
    counts, start = [], 0
    for code in codes:
        own = instructions[start : start + len(code) // INSTRUCTION_BYTES]
        start += len(own)
        named = {name: sum(bool(re.match(pattern, i)) for i in own) for name, pattern in COUNTED.items()}
        counts.append({"instructions": len(own), **named})
    return counts


@dataclass
class Region:
    """A function or a loop in Triton's text, without the loops in it."""

    indent: int
    is_loop: bool
    has_product: bool = False
    words: int = 0


def words_a_step(ttgir: str) -> list[int]:
    """Return how many int32 a step of each loop with a product loads; without one, of each loop, or of the kernel.

    Read from the last form in which a load still has a shape, behind every pass that copies or moves loads.
    """
    found: list[Region] = []
    open_regions: list[Region] = []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if open_regions and line.lstrip().startswith("}") and indent == open_regions[-1].indent:
            found.append(open_regions.pop())
        elif opened := re.search(r"\b(tt\.func|scf\.for|scf\.while)\b", line):
            open_regions.append(Region(indent, opened[1] != "tt.func"))
        elif open_regions:
            region = open_regions[-1]
            region.has_product |= bool(re.search(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b", line))
            if load := re.search(
                r"\b(?:tt\.load|async_copy_global_to_local)\b.*?: (?:tensor<([0-9x]+)x)?!tt\.ptr<i32>", line
            ):
                region.words += math.prod(map(int, (load[1] or "1").split("x")))
    return next(
        [region.words for region in regions]
        for regions in (
            [region for region in found if region.is_loop and region.has_product],
            [region for region in found if region.is_loop and region.words],
            found,
        )
        if regions
    )


def main(arguments: list[str]) -> int:
    """Compile, compare or rewrite; return the exit code."""
    is_check = "--check" in arguments
    parts = [a for a in arguments if not a.startswith("--")]
    named = {name: case for name, case in cases().items() if all(part in name for part in parts)}
    jobs = [(name, chip) for name, case in named.items() for chip in case.chips]
    # Two, for each takes half a gigabyte; fresh ones, for torch has threads by now, which a fork does not take along.
    with ProcessPoolExecutor(2, get_context("spawn")) as workers:
        figures, codes = zip(*workers.map(compile_case, *zip(*jobs, strict=True)), strict=True)
    for chip in {chip for _, chip in jobs}:
        of_chip = [i for i, job in enumerate(jobs) if job[1] == chip]
        for i, counts in zip(of_chip, count_instructions([codes[i] for i in of_chip], chip), strict=True):
            figures[i].update(counts)
    record = json.loads(COMMITTED.read_text(encoding="utf-8"))["triton"] if COMMITTED.exists() else {}
    committed = record.get(triton.__version__)
    complaints = [f"{name}: {fault}" for name, case in named.items() for fault in compiled_anew(case)]
    compiled: dict[str, dict[str, Figures]] = {}
    for (name, chip), got in zip(jobs, figures, strict=True):
        compiled.setdefault(name, {})[f"sm_{chip}"] = got
        complaints += [f"{name}, sm_{chip}: {fault}" for fault in faults(named[name], chip, got)]
        if is_check and committed is not None:
            was = committed.get(name, {}).get(f"sm_{chip}", {})
            changed = [f"{key} {was.get(key)} -> {got[key]}" for key in got if got[key] != was.get(key)]
            complaints += [f"{name}, sm_{chip}: other than committed: {', '.join(changed)}"] if changed else []
    if not parts and is_check and committed is not None:
        complaints += [f"{name}: committed, and no case" for name in committed.keys() - named.keys()]
    if not is_check:
        kept = committed or {} if parts else {}
        _write({**record, triton.__version__: {**kept, **compiled}})
    sys.stdout.write("".join(f"{complaint}\n" for complaint in complaints))
    if any("committed" in complaint for complaint in complaints):
        sys.stdout.write(
            "`python -m tests.kernels.gpu.ahead_of_time` writes the new figures: read its diff before you commit it\n"
        )
    sys.stdout.write(f"Triton {triton.__version__}: {len(jobs)} compiled, {len(complaints)} faults\n")
    return bool(complaints)


TASKS = {"one": 1, "joint": 2, "apart": 2}  # two that read the same x, or each its own
ROWS, OTHER_ROWS = 2048, (16, 1, 7)  # the latter would compile anew if they were not hidden from Triton
OUT_FEATURES, IN_FEATURES = 512, 1024
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _forward(
    arithmetic: str,
    tile: Tile,
    dtype: torch.dtype,
    weight_dtype: torch.dtype = torch.float32,
    tasks: str = "joint",
    on_blackwell: bool = False,
) -> dict[str, Case]:
    count = TASKS[tasks]

    def launch(rows: int) -> Launch:
        return masked_matmul.forward_launch(
            _x(dtype, tasks, rows),
            _meta(weight_dtype, OUT_FEATURES, IN_FEATURES),
            _words(count, OUT_FEATURES, IN_FEATURES),
            _meta(torch.float32, count, OUT_FEATURES),
            _meta(dtype, count, rows, OUT_FEATURES),
            "relu",
            _precision(arithmetic),
            tile,
        )

    words = tile.block_n * tile.block_k // 32
    name = f"forward masked {arithmetic} {_size(tile)} {tasks} {_product_dtypes(dtype, weight_dtype)}"
    return _case(name, arithmetic, launch, tile.block_m, (words,), on_blackwell)


def _dgrad(
    arithmetic: str, tile: Tile, dtype: torch.dtype, tasks: str = "joint", on_blackwell: bool = False
) -> dict[str, Case]:
    count = TASKS[tasks]

    def launch(rows: int) -> Launch:
        return masked_matmul.dgrad_launch(
            _meta(dtype, count, rows, OUT_FEATURES),
            _meta(torch.float32, OUT_FEATURES, IN_FEATURES),
            _words(count, OUT_FEATURES, IN_FEATURES),
            _x(dtype, tasks, rows),
            _precision(arithmetic),
            tile,
        )

    products = launch(ROWS).constants["TOGETHER"]  # of a step
    words = products * tile.block_n * tile.block_k // 32
    name = f"dgrad masked {arithmetic} {_size(tile)} {tasks} {_product_dtypes(dtype, torch.float32)}"
    return _case(name, arithmetic, launch, tile.block_m, (words,), on_blackwell)


def _wgrad(
    arithmetic: str, tile: Tile, dtype: torch.dtype, tasks: str = "joint", on_blackwell: bool = False
) -> dict[str, Case]:
    count = TASKS[tasks]

    def launch(rows: int) -> Launch:
        splits = rows % 17 or 8  # of any kind: 8 of the case, and 16, 1 and 7 of other batches
        return masked_matmul.wgrad_launch(
            _meta(dtype, count, rows, OUT_FEATURES),
            _x(dtype, tasks, rows),
            _words(count, OUT_FEATURES, IN_FEATURES),
            _meta(torch.float32, splits * (count if tasks == "apart" else 1), OUT_FEATURES, IN_FEATURES),
            _precision(arithmetic),
            tile,
        )

    name = f"wgrad masked {arithmetic} {_size(tile)} {tasks} {_product_dtypes(dtype, torch.float32)}"
    return _case(name, arithmetic, launch, tile.block_n, (0,), on_blackwell)  # the words are loaded after the loop


def _block_sparse(tile: Tile, block: int, together: int) -> dict[str, Case]:
    dtype, tasks, entries, block_rows = torch.bfloat16, 2, 256, OUT_FEATURES // block
    weight = BlockWeight(
        (OUT_FEATURES, IN_FEATURES),
        block,
        tasks,
        together,
        _meta(dtype, entries, block, block),
        _meta(torch.int32, tasks // together, block_rows + 1),
        _meta(torch.int32, entries),
        _meta(torch.int32, entries, together),
    )

    def launch(rows: int) -> Launch:
        return block_sparse.block_sparse_launch(
            _x(dtype, "joint", rows),
            weight,
            _meta(torch.float32, tasks, OUT_FEATURES),
            _meta(dtype, tasks, rows, OUT_FEATURES),
            "relu",
            tile,
        )

    indices = tile.block_k * (1 + together * block)  # a block's column for each of its own, its place for each weight
    name = f"block_sparse {_size(tile)} joint block {block} together {together} {DTYPE_NAMES[dtype]}"
    return _case(name, "16", launch, tile.block_m, (indices,))


def _tail(tile: Tile, dtype: torch.dtype, widths: tuple[int, ...], on_blackwell: bool = False) -> dict[str, Case]:
    tasks, (d0, *hidden, out) = 2, widths
    tail = Tail(
        tuple(_meta(dtype, tasks, n, k) for n, k in zip(hidden, widths, strict=False)),
        tuple(_meta(torch.float32, tasks, n) for n in hidden),
        _meta(torch.float32, tasks, out, hidden[-1]),
        _meta(torch.float32, tasks, out),
        "sigmoid",
    )

    def launch(rows: int) -> Launch:
        h, scores = _meta(dtype, tasks, rows, d0), _meta(torch.float32, rows, tasks * out)
        return fused_tail.fused_tail_launch(h, tail, scores, tile)

    name = f"tail premasked {_size(tile)} {'-'.join(map(str, widths))} {DTYPE_NAMES[dtype]}"
    return _case(name, "16", launch, tile.block_m, (0,), on_blackwell)


def _case(
    name: str,
    arithmetic: str,
    launch: Callable[[int], Launch],
    rows: int,
    words: tuple[int, ...],
    on_blackwell: bool = False,
) -> dict[str, Case]:
    chips = (80, 90, 100) if on_blackwell else (80, 90)
    return {name: Case(launch(ROWS), arithmetic, rows, words, chips, tuple(map(launch, OTHER_ROWS)))}


def _size(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k} warps {tile.warps} stages {tile.stages}"


def _product_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    names = (DTYPE_NAMES[dtype], DTYPE_NAMES[weight_dtype])
    return names[0] if dtype == weight_dtype else "*".join(names)


def _precision(arithmetic: str) -> str:
    return "tf32" if arithmetic == "tf32" else "ieee"


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _words(tasks: int, n: int, k: int) -> torch.Tensor:
    return _meta(torch.int32, tasks, n, 4 * -(-k // 128))


def _x(dtype: torch.dtype, tasks: str, rows: int) -> torch.Tensor:
    """Return what the tasks read, or its gradient."""
    return _meta(dtype, 2 if tasks == "apart" else 1, rows, IN_FEATURES)


def _instruction(case: Case, chip: int) -> str:
    """Return which instruction a case's products must be made of, "" where it has none."""
    if case.arithmetic in ("", "fp32"):
        return "FFMA" if case.arithmetic else ""
    return {80: "HMMA", 90: "HGMMA", 100: "TCGEN"}[chip] if case.rows >= WIDE_ROWS else "HMMA"


def _write(record: dict[str, Any]) -> None:
    text = json.dumps({"triton": record}, indent=1, sort_keys=True)
    # A line for each chip of a case, so that a diff shows the case that changed.
    text = re.sub(r"\{[^{}]*\}", lambda innermost: " ".join(innermost[0].split()), text)
    COMMITTED.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "the interpreter takes the compiler's place"
    sys.exit(main(sys.argv[1:]))
