"""Real kills: a process that saves in a loop dies by SIGKILL at any moment; the file is the old one or the new one."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

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
                _save_for_ever(write, target)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"saving ended by itself: {status}"
            found["kills"] += 1
            found["left a temporary"] += len(list(target.parent.iterdir())) > 1
            found["neither old nor new"] += not target.exists() or target.read_bytes() not in whole
            write(target, 0)
            found["left beside the next save"] += len(list(target.parent.iterdir())) > 1
    counts = ("kills", "left a temporary", "neither old nor new", "left beside the next save")
    return {name: found[name] for name in counts} | {"seconds": round(time.perf_counter() - started, 1)}


def _save_for_ever(write: Callable[[Path, int], Any], target: Path) -> NoReturn:
    """Save until killed, in a forked process: whatever happens, it never returns into its parent's code."""
    try:
        for i in range(1 << 30):
            write(target, (i + 1) % 2)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
