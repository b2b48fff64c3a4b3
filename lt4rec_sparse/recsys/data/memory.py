"""How much memory this process may use, and how much of it caches may keep."""

from __future__ import annotations

import os
from pathlib import Path

from lt4rec_sparse.errors import InputError

CACHE = "LT4REC_SPARSE_CACHE_BYTES"
# The rest is for models, their optimisers, the window at hand and the system's own cache of files.
CACHE_SHARE = 4
# The hierarchies of control groups: folder, and the file of a limit there.
GROUPS = {"": ("sys/fs/cgroup", "memory.max"), "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes")}


def memory_bytes(root: Path = Path("/")) -> int:
    """Return the bytes of the machine's memory, or of the least limit of a control group (container) of this process.

    `root` is where `proc` and `sys` are.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = root / "proc" / "self" / "cgroup"
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        for controller in GROUPS.keys() & controllers.split(","):
            folder, name = GROUPS[controller]
            level = root / folder
            # In a container the path may be that of the host: what is there of it counts, and the top always.
            levels = [level, *(level := level / part for part in Path(path).parts[1:])]
            texts = [(level / name).read_text().strip() for level in levels if (level / name).is_file()]
            limits += [int(text) for text in texts if text.isdecimal()]
    return min(limits)


def cache_bytes(processes: int | None = None) -> int:
    """Return how many bytes this process may keep in caches.

    `LT4REC_SPARSE_CACHE_BYTES` says so, else they are a quarter of the memory, over the number of `processes` that
    share it; by default those that torchrun has started here (`LOCAL_WORLD_SIZE`), or one.

    Raises:
        InputError: If the variable holds no number.
    """
    said = os.environ.get(CACHE)
    if said is not None:
        if not said.isdecimal():
            raise InputError(f"{CACHE}: got {said!r}, wanted a number of bytes")
        return int(said)
    return memory_bytes() // CACHE_SHARE // (processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
