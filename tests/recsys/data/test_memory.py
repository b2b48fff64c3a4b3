"""How much memory a process may use: the least of the machine's and of what its control groups allow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.recsys.data.memory import CACHE, CACHE_SHARE, cache_bytes, memory_bytes

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def root_of(folder: Path, groups: str, **limits: str) -> Path:
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in limits.items():
        path = folder / "sys" / "fs" / "cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize(
    ("groups", "limits", "wanted"),
    [
        ("", {}, MACHINE),
        ("0::/\n", {"memory_dot_max": "max"}, MACHINE),
        ("0::/\n", {"memory_dot_max": "1000"}, 1000),
        ("0::/a/b\n", {"a__memory_dot_max": "2000", "a__b__memory_dot_max": "max"}, 2000),
        ("0::/a/b\n", {"memory_dot_max": "3000", "a__b__memory_dot_max": "2000"}, 2000),
        ("0::/of/the:host\n", {"memory_dot_max": "1000"}, 1000),
        ("0::/../..\n", {"memory_dot_max": "1000"}, 1000),
        ("5:cpu,memory:/a\n0::/\n", {"memory__a__memory_dot_limit_in_bytes": "1000"}, 1000),
        ("5:cpu:/a\n", {"memory__a__memory_dot_limit_in_bytes": "1000"}, MACHINE),
        ("5:memory:/\n", {"memory__memory_dot_limit_in_bytes": str(1 << 62)}, MACHINE),
    ],
)
def test_the_least_limit_counts(tmp_path: Path, groups: str, limits: dict[str, str], wanted: int) -> None:
    assert memory_bytes(root_of(tmp_path, groups, **limits)) == wanted


def test_a_machine_without_control_groups_has_its_memory(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path) == MACHINE


def test_caches_take_a_part_of_it_or_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cache_bytes() == memory_bytes() // CACHE_SHARE
    assert cache_bytes(3) == memory_bytes() // CACHE_SHARE // 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cache_bytes() == memory_bytes() // CACHE_SHARE // 2
    monkeypatch.setenv(CACHE, "5000")
    assert cache_bytes() == cache_bytes(7) == 5000
    monkeypatch.setenv(CACHE, "4G")
    with pytest.raises(InputError, match=f"{CACHE}: got '4G', wanted a number of bytes"):
        cache_bytes()
