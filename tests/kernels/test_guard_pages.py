"""Arrays between inaccessible pages: one byte read or written out of place kills the process.

`x`, `out` and the blob end where such a page begins, then begin where one ends. A sanitizer sees neither gathers nor
most vector loads; the hardware does. `python -m tests.kernels.sanitize` does the same for the engine's scratch memory.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from typing import NamedTuple

import pytest
import torch
from kernels.networks import (
    Kernel,
    Task,
    exact_reference,
    is_shared,
    pack_tasks,
    prepack,
    random_layer,
    random_mask,
    random_task,
)
from oracle import assert_exact, small_integers
from torch import Tensor

from lt4rec_sparse.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")

PROT_NONE = 0


class Pages:
    """Memory between two inaccessible pages; holds one tensor at a time, at its end or at its start."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, self.size + 2 * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        libc = ctypes.CDLL(None, use_errno=True)
        for page in (start, start + mmap.PAGESIZE + self.size):
            failed = libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE)
            assert not failed, os.strerror(ctypes.get_errno())

    def hold(self, tensor: Tensor, at: str, row_stride: int | None = None) -> Tensor:
        """Copy a tensor here; `row_stride` spreads its rows, of which the last still touches the page."""
        strides = tensor.stride() if row_stride is None else (row_stride, 1)
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) if tensor.numel() else 0
        bytes_held = span * tensor.element_size()
        offset = mmap.PAGESIZE + (self.size - bytes_held if at == "end" else 0)
        memory = torch.frombuffer(self._memory, dtype=tensor.dtype, count=span, offset=offset)
        return memory.as_strided(tensor.shape, strides).copy_(tensor)


class Case(NamedTuple):
    prepacked: Tensor
    x: Tensor
    wanted: Tensor


TASKS: dict[str, list[tuple[int, ...]]] = {
    "1 x 1": [(1, 1)],
    "33 x 3": [(33, 3)],
    "130 x 17 x 65 x 5": [(130, 17, 65, 5)],
    "several": [(63, 81, 2), (63, 1), (63, 16, 16, 33, 1)],
    "257 x 129": [(257, 129)],
    "shared": [(63, 81, 2), (63, 81, 7), (63, 81)],
}


def tasks_of(name: str) -> list[Task]:
    tasks: list[Task] = [random_task(features, 0.3, seed=10 * t) for t, features in enumerate(TASKS[name])]
    if name == "shared":  # by all tasks, and by the first two
        draw = random_layer(torch.ones(81, 63, dtype=torch.bool), "relu", seed=50)
        of_all, of_two = torch.arange(63) < 30, torch.arange(63) < 60
        for t, task in enumerate(tasks):
            mask = random_mask(81, 63, 0.2, seed=t) | (of_two if t < 2 else of_all)
            tasks[t] = [draw._replace(weight=draw.weight * mask, mask=mask), *task[1:]]
    return tasks


@functools.cache
def case_of(name: str, precision: str) -> Case:
    tasks = tasks_of(name)
    x = small_integers(70, TASKS[name][0][0], generator=torch.Generator().manual_seed(1))
    return Case(prepack(tasks, precision), x, exact_reference(x, tasks, precision))


@functools.cache
def pages() -> tuple[Pages, Pages, Pages]:
    return Pages(1 << 22), Pages(1 << 20), Pages(1 << 20)


@pytest.mark.parametrize("at", ("end", "start"))
@pytest.mark.parametrize("name", TASKS)
def test_nothing_is_touched_out_of_place(kernel: Kernel, name: str, at: str) -> None:
    case = case_of(name, kernel.precision)
    blob_pages, x_pages, out_pages = pages()
    prepacked = blob_pages.hold(case.prepacked, at)
    for batch in range(1, 71):
        x = case.x[:batch].bfloat16() if batch % 3 == 0 else case.x[:batch]
        wanted = case.wanted[:batch]
        is_strided = batch % 2 == 0
        x = x_pages.hold(x, at, row_stride=x.shape[1] + 5 if is_strided else None)
        out = out_pages.hold(
            torch.full_like(wanted, torch.nan), at, row_stride=wanted.shape[1] + 3 if is_strided else None
        )
        cpu.sparse_mlp(x, prepacked, out, threads=1 + batch % 2, path=kernel.path)
        assert_exact(out, wanted)


@functools.cache
def case_of_much_work(precision: str) -> Case:
    task = random_task((401, 320, 37, 3), 1.0, seed=1)
    task = [layer._replace(weight=layer.weight.sign()) for layer in task]
    x = small_integers(67, 401, generator=torch.Generator().manual_seed(2)).sign()
    return Case(prepack([task], precision), x, exact_reference(x, [task], precision))


@pytest.mark.parametrize("at", ("end", "start"))
def test_several_threads_touch_nothing_out_of_place(kernel: Kernel, at: str) -> None:
    case = case_of_much_work(kernel.precision)
    blob_pages, x_pages, out_pages = pages()
    out = out_pages.hold(torch.full_like(case.wanted, torch.nan), at)
    prepacked = blob_pages.hold(case.prepacked, at)
    cpu.sparse_mlp(x_pages.hold(case.x, at), prepacked, out, threads=4, path=kernel.path)
    assert_exact(out, case.wanted)


@pytest.mark.parametrize("at", ("end", "start"))
@pytest.mark.parametrize("precision", cpu.PRECISIONS)
def test_prepack_reads_nothing_out_of_place(precision: str, at: str) -> None:
    pages_of: dict[int, Tensor] = {}  # tasks that share a weight hold the same tensors

    def guarded(layer: cpu.PackLayer) -> cpu.PackLayer:
        arrays = {name: getattr(layer, name) for name in ("values", "planes", "bias")}
        for name, array in arrays.items():
            if array is not None:
                if id(array) not in pages_of:
                    pages_of[id(array)] = Pages(array.nbytes).hold(array, at)
                arrays[name] = pages_of[id(array)]
        return layer._replace(**arrays)

    shared = pack_tasks(tasks_of("shared"))
    dense = [layer._replace(planes=None) for layer in pack_tasks([random_task((63, 17, 2), 1.0, seed=2)])[0]]
    for packed, are_shared in ((shared, True), ([*shared, dense], False)):
        blob = cpu.prepack_layers([[guarded(layer) for layer in task] for task in packed], precision, cpu.UNSTRUCTURED)
        assert is_shared(blob) == are_shared
        assert torch.equal(blob, cpu.prepack_layers(packed, precision, cpu.UNSTRUCTURED))
