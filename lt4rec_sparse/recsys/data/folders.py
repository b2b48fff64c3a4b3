"""Folders that exist completely or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lt4rec_sparse.files import remove_abandoned, temporary_beside
from lt4rec_sparse.recsys.data.source import DataError


@contextmanager
def whole_folder(out: Path, marker: str) -> Iterator[Path]:
    """Give an empty folder beside `out` that takes its place on a clean exit and is removed otherwise.

    Parents that had to be made for `out` are removed with it.

    Args:
        out: A new or an empty folder, or an earlier one to be replaced.
        marker: The file that identifies an earlier one.

    Raises:
        DataError: If `out` holds anything else, which would be lost.
    """
    if out.exists() and not (out / marker).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: got files without {marker}, wanted a new, an empty or an earlier folder")
    made = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(out)
    fresh = temporary_beside(out)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        if out.exists():
            shutil.rmtree(out)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it holds `out`, or somebody else's files
                parent.rmdir()
