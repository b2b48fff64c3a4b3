"""A step of training in one process, and in two that `torchrun` starts; each process has one thread.

One process leaves the second core idle, so that the ratio says what two processes gain. Cases run in turn, several
times; a figure is the median.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from bench import record
from lt4rec_sparse.recsys.tables import table

NAME = "processes"
TASKS = ("ctr", "cvr")
MODULE = (sys.executable, "-m")
TORCHRUN = (*MODULE, "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class Case(NamedTuple):
    """A network, and how a step of it is taken."""

    batch: int
    sparse_gradients: bool
    hidden: tuple[int, ...]
    steps: int


CASES = (
    Case(1024, False, (512, 256, 128), 30),
    Case(1024, True, (512, 256, 128), 30),
    Case(8192, True, (512, 256, 128), 6),
    Case(8192, True, (2048, 1024, 512), 3),
)
SHORT = (Case(256, True, (16, 8), 2),)


def run(data: Path) -> Path:
    """Measure steps on a prepared log and write `results/processes.json`."""
    return record.write(NAME, {"machine": record.machine(), "cases": measured(data, CASES, rounds=3)})


def measured(data: Path, cases: Sequence[Case], rounds: int) -> list[dict[str, Any]]:
    """Return milliseconds of a step, in one process and in two, per case."""
    found: list[dict[str, Any]] = [{**case._asdict(), "one_ms": [], "two_ms": []} for case in cases]
    for _ in range(rounds):
        for name, starter in (("one_ms", MODULE), ("two_ms", (*TORCHRUN, "-m"))):
            with tempfile.TemporaryDirectory() as folder:
                arguments = ["bench.processes", str(data), folder, json.dumps(cases)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                where = Path(__file__).parents[1]
                done = subprocess.run(
                    [*starter, *arguments], stdout=subprocess.PIPE, text=True, check=True, cwd=where, env=environment
                )
            for case, taken in zip(found, json.loads(done.stdout), strict=True):
                case[name].append(taken)
    return found


def table_of(cases: Sequence[dict[str, Any]]) -> str:
    """Return a row per case."""
    rows = []
    for case in cases:
        one, two = median(case["one_ms"]), median(case["two_ms"])
        gradients = "sparse" if case["sparse_gradients"] else "dense"
        hidden = ", ".join(map(str, case["hidden"]))
        rows.append([f"{case['batch']:,}", gradients, hidden, f"{one:,.0f}", f"{two:,.0f}", f"{one / two:.1f}"])
    header = ["rows per batch", "embeddings' gradients", "hidden layers", "one process, ms", "two, ms", "one over two"]
    return table(header, rows)


def _taken(data: Path, folder: Path, cases: Sequence[Case]) -> list[float]:
    """Return milliseconds per step of each case, of the processes that were started together."""
    from lt4rec_sparse.recsys.data import Prepared
    from lt4rec_sparse.recsys.harness import objectives
    from lt4rec_sparse.recsys.harness.starts import Starts
    from lt4rec_sparse.recsys.harness.trials import Training

    starts, taken = Starts(Prepared.load(data), folder), []
    for place, case in enumerate(cases):
        training = Training(hidden=tuple(case.hidden), batch_size=case.batch, sparse_gradients=case.sparse_gradients)
        model = starts.sparse_sharing(training, TASKS, 0)
        objective = objectives.plain(training, TASKS, starts.kinds)
        for name, steps in (("first", 2), ("timed", case.steps)):  # the first ones decode the rows
            begun = perf_counter()
            starts.train(starts.made("singles", f"{name}_{place}"), model, objective, training, 0, batches=steps)
        taken.append((perf_counter() - begun) * 1e3 / case.steps)
    return taken


if __name__ == "__main__":
    from lt4rec_sparse.recsys.training import led

    chosen = [Case(*case) for case in json.loads(sys.argv[3])]
    if (of_cases := led(lambda: _taken(Path(sys.argv[1]), Path(sys.argv[2]), chosen))) is not None:
        print(json.dumps(of_cases))
