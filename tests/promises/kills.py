"""Real kills: a process that saves in a loop dies by SIGKILL at any moment; the file is the old one or the new one."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.promises.crashes import SAVES

KINDS = ("artefact", "module file", "checkpoint", "text")


def run(count: int, seed: int = 0) -> dict[str, Any]:
    """Kill `count` processes, each after a random time.

    Returns:
        How often a temporary was left, which says that a kill fell into a save; what the next save left beside its
        file, and files that were neither of the two, which are failures; seconds.
    """
    torch.set_num_threads(1)  # processes are forked: nothing may hold threads
    rng, found, started = random.Random(seed), Counter[str](), time.perf_counter()
    for number in range(count):
        write = SAVES[KINDS[number % len(KINDS)]]
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "file"
            whole = []
            for which in (1, 0):
                write(target, which)
                whole.append(target.read_bytes())
            child = os.fork()
            if not child:
                for i in range(1 << 30):  # until it is killed
                    write(target, (i + 1) % 2)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found["kills"] += 1
            found["left a temporary"] += len(list(target.parent.iterdir())) > 1
            found["neither old nor new"] += not target.exists() or target.read_bytes() not in whole
            write(target, 0)
            found["left beside the next save"] += len(list(target.parent.iterdir())) > 1
    counts = ("kills", "left a temporary", "neither old nor new", "left beside the next save")
    return {name: found[name] for name in counts} | {"seconds": round(time.perf_counter() - started, 1)}
