"""Runs of mutants, over processes, by their numbers."""

from __future__ import annotations

import multiprocessing
import random
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.promises.judges import SUBJECTS

AT_ONCE = 1_000  # mutants of one task of a process


def run(name: str, first: int, count: int, processes: int = 1) -> dict[str, Any]:
    """Judge mutants `first` to `first + count - 1` of one kind of file.

    Returns:
        Counts of verdicts, seconds, mutants per second, and what failed: number -> the error's last line.
    """
    started, verdicts, failures = time.perf_counter(), Counter[str](), {}
    spans = [(start, min(AT_ONCE, first + count - start)) for start in range(first, first + count, AT_ONCE)]
    if processes == 1:
        results = map(partial(_span, name), spans)
        for of_span, failed in results:
            verdicts += of_span
            failures |= failed
    else:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            for of_span, failed in pool.map(partial(_span, name), spans):
                verdicts += of_span
                failures |= failed
    seconds = time.perf_counter() - started
    return {
        "count": count,
        "verdicts": dict(sorted(verdicts.items())),
        "failures": failures,
        "seconds": round(seconds, 1),
        "per_second": round(count / seconds),
        "processes": processes,
    }


def _span(name: str, span: tuple[int, int]) -> tuple[Counter[str], dict[int, str]]:
    torch.set_num_threads(1)
    subject, verdicts, failures = SUBJECTS[name](), Counter[str](), {}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # overflow in the float64 of the second reader
        for number in range(span[0], span[0] + span[1]):
            rng = random.Random(number)
            content = subject.mutant(rng)
            try:
                verdicts[subject.judge(Path(folder) / f"mutant.{subject.suffix}", content, rng)] += 1
            except Exception as error:  # whatever escapes is what is looked for
                where = traceback.extract_tb(error.__traceback__)[-1]
                failures[number] = (
                    f"{type(error).__name__}: {error!s:.200} ({Path(where.filename).name}:{where.lineno})"
                )
    return verdicts, failures
