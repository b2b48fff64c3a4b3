"""Every tile of every table, alone, against cuBLAS: which tile wins where, and whether the rule picks it.

A case is a kernel, a layout of the weight and a shape. Two tasks throughout; masks keep a tenth, and overlap like
those that are served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu_serving import masks
from bench.gpu_setting import FAILURES, Case, Setting, float32_precision, named
from bench.peers import reference
from lt4rec_sparse.kernels.gpu import block_sparse, fused_tail, mask_and_cast, masked_matmul
from lt4rec_sparse.kernels.gpu.launch import Launch, Tile, arithmetic
from lt4rec_sparse.masks import pack_words
from tests.oracle import Bounded, Layer, assert_rounding, linear_reference

SPARSITY = 0.9
TASKS = ("ctr", "cvr")


class Shape(NamedTuple):
    """Rows of a task, and the widths that a product or a tail joins."""

    rows: int
    widths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.rows} rows {'-'.join(map(str, self.widths))}"


WIDE = tuple(Shape(rows, (4096, 1024)) for rows in (8192, 2048, 256))
TAILS = tuple(Shape(rows, (512, 256, 128, 1)) for rows in (2048, 256, 8192))
GRADIENTS = tuple(Shape(rows, (1024, 512)) for rows in (2048, 8192))
DRY, DRY_TAIL = Shape(20, (32, 16)), Shape(20, (16, 16, 16, 1))


class Problem:
    """Tensors of one shape, on the device; all tasks read the same x."""

    def __init__(self, setting: Setting, shape: Shape, structure: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows, (self.k, self.n) = shape.rows, shape.widths[:2]
        self.dtype = dtype
        kept = [mask["layers.0"] for mask in masks((self.k, self.n), structure, SPARSITY, 0)]
        weight = torch.randn(self.n, self.k, generator=generator) / self.k**0.5
        self.planes = torch.stack(kept).to(setting.device)
        self.words = pack_words(self.planes)
        self.weight = weight.to(dtype).float().to(setting.device)
        self.bias = torch.randn(self.n, generator=generator).to(setting.device, dtype)
        self.x = torch.randn(1, shape.rows, self.k, generator=generator).to(setting.device, dtype)
        self.dy = torch.randn(len(TASKS), shape.rows, self.n, generator=generator).to(setting.device, dtype)

    @property
    def masked(self) -> Tensor:
        """Each task's weight, `[tasks, n, k]` in float32."""
        return self.weight * self.planes


def suite(setting: Setting) -> Iterator[Case]:
    """Yield the cases: first what serving and training run in bf16."""
    tails = (DRY_TAIL,) if setting.is_dry else TAILS
    gradients, wide = ((DRY,), (DRY,)) if setting.is_dry else (GRADIENTS, WIDE)
    half = (setting.dtype, "ieee")
    for shape in tails:
        yield f"tail premasked {shape}", partial(_tail, setting, shape)
    for shape in wide[:2]:
        yield f"block32 {shape}", partial(_block, setting, shape, 32)
    for shape in gradients:
        yield f"forward masked {shape}", partial(_forward, setting, shape, *half)
        yield f"dgrad {shape}", partial(_dgrad, setting, shape, *half)
        yield f"wgrad {shape}", partial(_wgrad, setting, shape, *half)
    for block in () if setting.is_dry else (64, 16):
        for shape in wide[:2]:
            yield f"block{block} {shape}", partial(_block, setting, shape, block)
    for precision in ("tf32",) if setting.is_dry else ("tf32", "ieee"):
        for shape in gradients[:1]:
            single = (torch.float32, precision)
            yield f"forward masked {precision} {shape}", partial(_forward, setting, shape, *single)
            yield f"dgrad {precision} {shape}", partial(_dgrad, setting, shape, *single)
            yield f"wgrad {precision} {shape}", partial(_wgrad, setting, shape, *single)


def _forward(setting: Setting, shape: Shape, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    p = Problem(setting, shape, "unstructured", dtype)
    y = p.x.new_empty(len(TASKS), p.rows, p.n)
    parts = (p.x, p.weight, p.words, p.bias, y, "relu", precision)
    table = masked_matmul.FORWARD[arithmetic(dtype, precision)]
    launches = {tile: masked_matmul.forward_launch(*parts, tile) for tile in table}
    return _against_cublas(setting, p, y, launches, masked_matmul.forward_launch(*parts), dtype, precision)


def _dgrad(setting: Setting, shape: Shape, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    p = Problem(setting, shape, "unstructured", dtype)
    dx = torch.empty_like(p.x)
    parts = (p.dy, p.weight, p.words, dx, precision)
    table = masked_matmul.DGRAD[arithmetic(dtype, precision)]
    launches = {tile: masked_matmul.dgrad_launch(*parts, tile) for tile in table}
    own = _chosen(launches, masked_matmul.dgrad_launch(*parts))
    calls: dict[str, Callable[[], Tensor]] = {
        _name(tile): partial(_written, launch, dx[0]) for tile, launch in launches.items()
    }
    # Two tasks are one product twice as long. Side by side, as no layer has them, they are cuBLAS' best case.
    beside, stacked = torch.cat(list(p.dy), 1), p.masked.to(dtype).flatten(0, 1)
    calls["cuBLAS"] = partial(torch.mm, beside, stacked)
    calls["mask and cast"] = partial(_first, mask_and_cast.dgrad, p.dy, p.weight, p.words, True)
    wanted = linear_reference(beside, stacked.T, None, _sums(dtype, precision))
    return _measured(setting, calls, own, wanted, precision)


def _wgrad(setting: Setting, shape: Shape, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    p = Problem(setting, shape, "unstructured", dtype)
    own = _name(masked_matmul.wgrad_tile(p.n, p.k, dtype, precision))
    calls: dict[str, Callable[[], Tensor]] = {}
    for tile in masked_matmul.WGRAD[arithmetic(dtype, precision)]:
        splits = masked_matmul.wgrad_splits(p.rows, -(-p.n // tile.block_n) * -(-p.k // tile.block_k), tile)
        shares = p.weight.new_empty(splits, p.n, p.k)
        launch = masked_matmul.wgrad_launch(p.dy, p.x, p.words, shares, precision, tile)
        calls[_name(tile)] = partial(_summed, launch, shares)
    calls["mask and cast"] = partial(mask_and_cast.wgrad, p.dy, p.x, p.words, torch.float32)
    wanted = [linear_reference(dy.T, p.x[0].T, None, _sums(dtype, precision)) for dy in p.dy]
    value = sum(part.value * plane for part, plane in zip(wanted, p.planes, strict=True))
    # Adding the tasks up rounds once more, relative to at most the magnitudes of their bounds.
    bound = sum(
        (2 * part.bound + part.value.abs() * 2**-22) * plane for part, plane in zip(wanted, p.planes, strict=True)
    )
    return _measured(setting, calls, own, Bounded(value, bound), precision)


def _block(setting: Setting, shape: Shape, block: int) -> dict[str, Any]:
    p = Problem(setting, shape, f"block{block}", setting.half)
    together = len(TASKS) if len(TASKS) * block <= block_sparse.MAX_COLUMNS else 1
    weight = block_sparse.BlockWeight.from_dense(p.weight, p.planes, block, setting.half, together)
    y = p.x.new_empty(len(TASKS), p.rows, p.n)
    parts = (p.x, weight, p.bias, y, "relu")
    launches = {tile: block_sparse.block_sparse_launch(*parts, tile) for tile in block_sparse.TILES[together * block]}
    return _against_cublas(setting, p, y, launches, block_sparse.block_sparse_launch(*parts), setting.half, "ieee")


def _against_cublas(
    setting: Setting,
    p: Problem,
    y: Tensor,
    launches: Mapping[Tile, Launch],
    own: Launch,
    dtype: torch.dtype,
    precision: str,
) -> dict[str, Any]:
    """Time a forward product in every tile, and cuBLAS' of both tasks' neurons side by side."""
    calls: dict[str, Callable[[], Tensor]] = {_name(t): partial(_written, launch, y) for t, launch in launches.items()}
    dense = p.masked.to(dtype).flatten(0, 1).T
    calls["cuBLAS"] = partial(torch._addmm_activation, p.bias.repeat(len(TASKS)), p.x[0], dense)
    wanted = [linear_reference(p.x[0], task.to(dtype), p.bias, _sums(dtype, precision)) for task in p.masked]
    value, bound = torch.stack([w.value for w in wanted]).relu(), torch.stack([w.bound for w in wanted])
    return _measured(setting, calls, _chosen(launches, own), Bounded(value, bound), precision)


def _tail(setting: Setting, shape: Shape) -> dict[str, Any]:
    (d0, d1, d2, out), dtype = shape.widths, setting.half
    first, second = (
        Problem(setting, Shape(shape.rows, widths), "unstructured", dtype) for widths in ((d0, d1), (d1, d2))
    )
    weights = tuple(p.masked.to(dtype) for p in (first, second))
    generator = torch.Generator().manual_seed(2)
    head = (torch.randn(len(TASKS), out, d2, generator=generator) / d2**0.5).to(setting.device, dtype)
    head_bias = torch.randn(len(TASKS), out, generator=generator).to(setting.device, dtype)
    h = torch.randn(len(TASKS), shape.rows, d0, generator=generator).relu_().to(setting.device, dtype)
    tail = fused_tail.Tail(weights, (first.bias, second.bias), head, head_bias, "none")
    scores = torch.empty(shape.rows, len(TASKS) * out, device=setting.device)
    launches = {tile: fused_tail.fused_tail_launch(h, tail, scores, tile) for tile in fused_tail.TILES}
    calls: dict[str, Callable[[], Tensor]] = {
        _name(tile): partial(_written, launch, scores) for tile, launch in launches.items()
    }
    layers, wanted = [], []
    for t, rows in enumerate(h):
        hidden = [(p.masked[t], p.bias) for p in (first, second)]
        layers.append([(w.to(dtype).T, b) for w, b in (*hidden, (head[t], head_bias[t]))])
        as_checked = [
            *(Layer(w, b.float(), "relu") for w, b in hidden),
            Layer(head[t].float(), head_bias[t].float(), "none"),
        ]
        wanted.append(reference(as_checked, rows.float(), "bf16"))  # float16, of a rehearsal, rounds less
    calls["cuBLAS"] = partial(_chained, h, layers)
    both = Bounded(*(torch.cat(parts, 1) for parts in zip(*wanted, strict=True)))
    return _measured(setting, calls, _chosen(launches, fused_tail.fused_tail_launch(h, tail, scores)), both, "ieee")


def _measured(
    setting: Setting, calls: Mapping[str, Callable[[], Tensor]], own: str, wanted: Bounded, precision: str
) -> dict[str, Any]:
    """Check each, time those that are right; `own` is the choice of the rule."""
    with torch.inference_mode(), float32_precision("high" if precision == "tf32" else "highest"):
        failed = {name: why for name, call in calls.items() if (why := _failure(call, wanted))}
        right = {name: call for name, call in calls.items() if name not in failed}
        timings = setting.stopwatch.replayed(right)
    tiles_us = {name: timings[name].median_us for name in right if name.startswith("tile")}
    best = min(tiles_us, key=lambda name: tiles_us[name], default=None)
    others = [timings[name].median_us for name in right if not name.startswith("tile")]
    return {
        "contestants": {name: timing._asdict() for name, timing in timings.items()},
        "failed": failed,
        "own": own,
        "best": best,
        "own_over_best": tiles_us[own] / tiles_us[best] if best and own in tiles_us else None,
        "cublas_over_best": min(others) / tiles_us[best] if best and others else None,
    }


def _failure(call: Callable[[], Tensor], wanted: Bounded) -> str:
    """Say why a call must not be timed; return nothing if it is right."""
    try:
        y = call()
        # cuBLAS has the tasks side by side, and ours one after another.
        assert_rounding(y if y.shape == wanted.value.shape else torch.stack(y.chunk(len(TASKS), dim=1)), wanted)
    except FAILURES as error:
        return named(error)
    return ""


def _written(launch: Launch, y: Tensor) -> Tensor:
    launch.run()
    return y


def _first(call: Callable[..., Tensor], *parts: object) -> Tensor:
    return call(*parts)[0]


def _summed(launch: Launch, shares: Tensor) -> Tensor:
    launch.run()
    return shares[0] if len(shares) == 1 else shares.sum(0)


def _chained(h: Tensor, tasks: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    scores = []
    for rows, (*hidden, head) in zip(h, tasks, strict=True):
        for weight, bias in hidden:
            rows = torch._addmm_activation(bias, rows, weight)
        scores.append(torch.addmm(head[1], rows, head[0]))
    return torch.cat(scores, dim=1)


def _sums(dtype: torch.dtype, precision: str) -> torch.dtype:
    """Return the dtype whose unit roundoff bounds a sum: TF32 rounds its operands to the mantissa of float16."""
    return torch.float16 if dtype == torch.float32 and precision == "tf32" else torch.float32


def _chosen(launches: Mapping[Tile, Launch], own: Launch) -> str:
    """Name the tile that a launch chose by itself."""
    return next(
        _name(t) for t, found in launches.items() if (found.constants, found.warps) == (own.constants, own.warps)
    )


def _name(tile: Tile) -> str:
    return f"tile {tile.block_m}x{tile.block_n}x{tile.block_k} warps {tile.warps} stages {tile.stages}"
