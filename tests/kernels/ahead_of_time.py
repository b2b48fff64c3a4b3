"""`python -m tests.kernels.ahead_of_time [--check] [PART]`: every Triton kernel, compiled for GPUs that are not there.

Compiles all cases, or those with PART in their name, for each of their chips, and reads from what the compiler made:

- registers, spill_bytes, stack_bytes: from the log of ptxas. serialised: it gave up overlapping wgmma.
- shared_bytes: of a block.
- words: how many int32 a step of each loop with a product loads: the mask words.
- instructions, and HGMMA (wgmma), HMMA (mma), TCGEN (tcgen05), FFMA, LDG, LDGSTS (cp.async), LDL and STL of them.

Without `--check` the figures replace those of the installed Triton in `bench/results/gpu_compiled.json`: look at the
diff. With it, figures other than the committed ones are a fault, too. What every case must keep says `faults`; the exit
code is 1 where one does not. No GPU and no driver is asked for.

To add a kernel, write a function that returns its cases by name, made of META tensors, and append it to `SOURCES`.
A name says what tells the case from others of its kernel; 0.7 s a chip is what a case adds to the test suite.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
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

from lt4rec_sparse.kernels import mask_and_cast, masked_matmul, tiles
from lt4rec_sparse.kernels.launch import Launch
from lt4rec_sparse.kernels.masked_matmul import Weight
from lt4rec_sparse.kernels.tiles import Tile

COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "gpu_compiled.json"
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
WIDE_ROWS = 64  # what one wgmma or tcgen05 product has at least

Figures = dict[str, Any]


class Case(NamedTuple):
    """A launch of META tensors, and what its compiled form must keep."""

    launch: Launch
    arithmetic: str  # of its products, as in the tables of `tiles`; "" where it has none
    rows: int  # of a product: what a wide tensor-core instruction needs 64 of
    words: int  # int32 that a step of each loop with a product may load, and has to
    chips: tuple[int, ...] = (80, 90)
    may_spill: tuple[int, ...] = ()  # of the chips; the figures still tell how much


def masked_matmul_cases() -> dict[str, Case]:
    """Return every entry of the tables for a layer 1024-512 of two tasks, and what is special with the largest."""
    cases = {}
    half, single = torch.bfloat16, torch.float32
    dtypes = {"16": half, "tf32": single, "fp32": single}
    everywhere = (80, 90, 100)
    for arithmetic, dtype in dtypes.items():
        for i, tile in enumerate(tiles.FORWARD[arithmetic]):
            chips = everywhere if i == 0 else (80, 90)
            cases |= _forward("masked", arithmetic, tile, dtype, chips=chips)  # training: the weight is float32
        for i, tile in enumerate(tiles.COMPRESSED[arithmetic]):
            chips = everywhere if i == 0 and arithmetic == "16" else (80, 90)
            cases |= _forward("shared", arithmetic, tile, dtype, dtype, chips=chips)
        for i, tile in enumerate(tiles.DGRAD[arithmetic]):
            cases |= _dgrad(arithmetic, tile, dtype, chips=everywhere if i == 0 and arithmetic == "16" else (80, 90))
        for i, tile in enumerate(tiles.WGRAD[arithmetic]):
            cases |= _wgrad(arithmetic, tile, dtype, chips=everywhere if i == 0 and arithmetic == "16" else (80, 90))
    for tile in tiles.FORWARD["16"]:
        cases |= _forward("premasked", "16", tile, half, half)  # serving
    largest = tiles.FORWARD["16"][0]
    cases |= _forward("masked", "16", largest, half, half)
    cases |= _forward("masked", "16", largest, half, ranges="ragged")
    # K is no multiple of 16, so Triton loads x element by element through registers, and an A100 spills 24 bytes (96
    # with Triton 3.6). A smaller tile would take more from who has a multiple than it gives here.
    cases |= _forward("masked", "16", largest, half, in_features=1141, may_spill=(80,))
    cases |= _forward("premasked", "16", largest, torch.float16, torch.float16)
    cases |= _forward("premasked", "16", largest, half, half, ranges="single")
    cases |= _forward("masked", "tf32", tiles.FORWARD["tf32"][0], single, ranges="ragged")
    cases |= _forward("shared", "16", tiles.COMPRESSED["16"][0], half, half, ranges="ragged")
    # A union of four masks: 36 bytes on an A100 (none with Triton 3.6).
    cases |= _forward("shared", "16", tiles.COMPRESSED["16"][0], half, half, ranges="four", may_spill=(80,))
    cases |= _dgrad("16", tiles.DGRAD["16"][0], half, ranges="ragged")
    cases |= _wgrad("16", tiles.WGRAD["16"][0], half, ranges="ragged")
    return cases


def mask_and_cast_cases() -> dict[str, Case]:
    """Return what stands around cuBLAS in training: the cast of the weight, and the sum of its gradients."""
    shape, tasks = (OUT_FEATURES, IN_FEATURES), 2
    words, of_tile = _words(tasks, IN_FEATURES), mask_and_cast.BLOCK_N * mask_and_cast.BLOCK_K // 32
    weight = _meta(torch.float32, *shape)
    products = _meta(torch.bfloat16, tasks, *shape)
    cast = mask_and_cast.mask_and_cast_launch(weight, words, products)
    total = mask_and_cast.mask_and_sum_launch(products, words, weight)
    return {
        "mask_and_cast fp32 to bf16": Case(cast, "", 0, of_tile),
        "mask_and_sum bf16 to fp32": Case(total, "", 0, of_tile),
    }


SOURCES: tuple[Callable[[], dict[str, Case]], ...] = (masked_matmul_cases, mask_and_cast_cases)


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
        if figures[name] and (name == "serialised" or chip not in case.may_spill):
            yield f"{name} {figures[name]}, wanted 0"
    if figures["shared_bytes"] > MOST_SHARED_BYTES[chip]:
        yield f"shared_bytes {figures['shared_bytes']}, a block of sm_{chip} has {MOST_SHARED_BYTES[chip]}"
    if not figures["words"] or set(figures["words"]) != {case.words}:
        yield f"int32 loaded a step: {figures['words']}, wanted {case.words} in each loop"
    wanted = _instruction(case, chip)
    products = [name for name in ("HGMMA", "HMMA", "TCGEN", "FFMA") if figures[name]]
    if wanted and wanted not in products:
        yield f"products by {products}, wanted {wanted}"
    if case.arithmetic in ("fp32", "") and set(products) - {"FFMA"}:
        yield f"{products} in float32"


def compile_case(name: str, chip: int) -> Figures:
    """Compile one case as its launch would on such a chip, and return the figures."""
    launch = cases()[name].launch
    target = GPUTarget("cuda", chip, 32)
    backend = make_backend(target)
    # Triton's own binder specialises: on dtypes, multiples of 16, ones and None, also inside tuples.
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    settings = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    bound, specialization, settings = bind(**launch.arguments, **launch.constants, **settings)
    options, *source = launch.kernel._pack_args(backend, settings, bound, specialization, settings)
    log = StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.cache.dir = folder
        knobs.compilation.always_compile = True  # or there is no log
        knobs.nvidia.dump_ptxas_log = True
        with redirect_stdout(log):
            compiled = triton.compile(ASTSource(launch.kernel, *source), target=target, options=options.__dict__)
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        code = subprocess.run([NVDISASM, "--print-code", cubin], capture_output=True, text=True, check=True).stdout
    memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    assert memory and registers, log.getvalue()
    # "/*0050*/ @P0 EXIT ;"
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", code, re.MULTILINE)
    return {
        "registers": int(registers[1]),
        "stack_bytes": int(memory[1]),
        "spill_bytes": int(memory[2]) + int(memory[3]),
        "serialised": log.getvalue().count("wgmma.mma_async instructions are serialized"),
        "shared_bytes": compiled.metadata.shared,
        "words": words_a_step(compiled.asm["ttgir"]),
        "instructions": len(instructions),
        **{name: sum(bool(re.match(pattern, i)) for i in instructions) for name, pattern in COUNTED.items()},
    }


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
        figures = list(workers.map(compile_case, *zip(*jobs, strict=True)))
    record = json.loads(COMMITTED.read_text(encoding="utf-8"))["triton"] if COMMITTED.exists() else {}
    committed = record.get(triton.__version__)
    complaints = []
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
            "`python -m tests.kernels.ahead_of_time` writes the new figures: look at the diff before it is committed\n"
        )
    sys.stdout.write(f"Triton {triton.__version__}: {len(jobs)} compiled, {len(complaints)} faults\n")
    return bool(complaints)


RANGES = {
    # x_starts and lengths, task by task. Tasks of one set of rows share a program; ragged ranges overlap, and no
    # multiple of 16 helps the compiler.
    "single": ((0,), (2048,)),
    "joint": ((0, 0), (2048, 2048)),
    "four": ((0,) * 4, (2048,) * 4),
    "ragged": ((0, 701), (1399, 1347)),
}
OUT_FEATURES, IN_FEATURES = 512, 1024


def _forward(
    form: str,
    arithmetic: str,
    tile: Tile,
    dtype: torch.dtype,
    weight_dtype: torch.dtype = torch.float32,
    ranges: str = "joint",
    in_features: int = IN_FEATURES,
    chips: tuple[int, ...] = (80, 90),
    may_spill: tuple[int, ...] = (),
) -> dict[str, Case]:
    x_starts, lengths = RANGES[ranges]
    tasks, shape = len(lengths), (OUT_FEATURES, in_features)
    words = _words(tasks, in_features)
    weight = {
        "premasked": Weight(form, shape, _meta(weight_dtype, tasks, *shape), None, None, tasks),
        "masked": Weight(form, shape, _meta(weight_dtype, *shape), words, None, tasks),
        "shared": Weight(
            form,
            shape,
            _meta(weight_dtype, 2**17),
            words,
            _meta(torch.int32, OUT_FEATURES, words.shape[2] // 4),
            tasks,
        ),
    }[form]
    launch = masked_matmul.forward_launch(
        _meta(dtype, 2048, in_features),
        weight,
        _meta(torch.float32, tasks, OUT_FEATURES),
        _meta(dtype, sum(lengths), OUT_FEATURES),
        x_starts,
        _y_starts(lengths),
        lengths,
        "relu",
        "tf32" if arithmetic == "tf32" else "ieee",
        tile,
    )
    of_tile = tile.block_n * tile.block_k // 32
    # Triton takes a load of fewer elements than threads for cheap, and repeats it for a second layout: the union's.
    copies = 2 if of_tile < 32 * tile.warps else 1
    shared = (copies * tasks + 1) * of_tile + tile.block_n  # and offsets
    budget = {"premasked": 0, "masked": of_tile, "shared": shared}[form]
    name = _name("forward", form, arithmetic, tile, ranges, dtype, weight_dtype, in_features)
    return {name: Case(launch, arithmetic, tile.block_m, budget, chips, may_spill)}


def _dgrad(
    arithmetic: str, tile: Tile, dtype: torch.dtype, ranges: str = "joint", chips: tuple[int, ...] = (80, 90)
) -> dict[str, Case]:
    x_starts, lengths = RANGES[ranges]
    launch = masked_matmul.dgrad_launch(
        _meta(dtype, sum(lengths), OUT_FEATURES),
        _meta(torch.float32, OUT_FEATURES, IN_FEATURES),
        _words(len(lengths), IN_FEATURES),
        _meta(dtype, 2048, IN_FEATURES),
        x_starts,
        _y_starts(lengths),
        lengths,
        "tf32" if arithmetic == "tf32" else "ieee",
        tile,
    )
    products = len(lengths) if launch.constants["TOGETHER"] else 1  # a step
    name = _name("dgrad", "masked", arithmetic, tile, ranges, dtype, torch.float32, IN_FEATURES)
    return {name: Case(launch, arithmetic, tile.block_m, products * tile.block_n * tile.block_k // 32, chips)}


def _wgrad(
    arithmetic: str, tile: Tile, dtype: torch.dtype, ranges: str = "joint", chips: tuple[int, ...] = (80, 90)
) -> dict[str, Case]:
    x_starts, lengths = RANGES[ranges]
    launch = masked_matmul.wgrad_launch(
        _meta(dtype, sum(lengths), OUT_FEATURES),
        _meta(dtype, 2048, IN_FEATURES),
        _words(len(lengths), IN_FEATURES),
        _meta(torch.float32, 4, OUT_FEATURES, IN_FEATURES),
        x_starts,
        _y_starts(lengths),
        lengths,
        "tf32" if arithmetic == "tf32" else "ieee",
        tile,
    )
    name = _name("wgrad", "masked", arithmetic, tile, ranges, dtype, torch.float32, IN_FEATURES)
    return {name: Case(launch, arithmetic, tile.block_n, 0, chips)}  # the words wait behind the loop


def _name(
    kernel: str,
    form: str,
    arithmetic: str,
    tile: Tile,
    ranges: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    in_features: int,
) -> str:
    short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    dtypes = short[dtype] if dtype == weight_dtype else f"{short[dtype]}*{short[weight_dtype]}"
    size = f"{tile.block_m}x{tile.block_n}x{tile.block_k} warps {tile.warps} stages {tile.stages}"
    return f"{kernel} {form} {arithmetic} {size} {ranges} {dtypes} K={in_features}"


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _words(tasks: int, in_features: int) -> torch.Tensor:
    return _meta(torch.int32, tasks, OUT_FEATURES, 4 * -(-in_features // 128))


def _y_starts(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(lengths[:t]) for t in range(len(lengths)))


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
