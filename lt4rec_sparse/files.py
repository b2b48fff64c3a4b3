"""Files that are there whole or not at all, whatever happens while they are written; and JSON read from them."""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lt4rec_sparse.errors import InputError

# Everything this package writes is nested less than half as deep. Python's own limit is one of its stack, and anything
# that walks through deeper data, such as `repr` for an error message, would meet it again.
JSON_DEPTH = 32


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; on a clean exit it takes the place of `path`, durably.

    Contents reach the disk before the name does, and the name before this returns: after a power cut `path` holds the
    old file or the new one. If the block raises, the temporary file is removed and `path` is as it was. The new file
    has the permissions that the umask gives, whatever its writer chose.
    """
    target = Path(path)
    remove_abandoned(target)
    temporary = temporary_beside(target)
    try:
        # Only the kernel can apply the umask without changing it for other threads.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        mode = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file through `whole_file`, in UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """Give an empty folder for temporary files, on the disk of `target`; on exit it is removed."""
    scratch = target.with_name(f"{target.name}.scratch")
    remove_abandoned(scratch)
    folder = temporary_beside(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_beside(target: Path) -> Path:
    """Return where this process prepares `target`: `.<name>.<host>.<pid>.tmp` in the same folder."""
    return target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def remove_abandoned(target: Path) -> None:
    """Remove what processes of this machine that have died while they prepared `target` left beside it."""
    start = f".{target.name}.{socket.gethostname()}."
    for path in target.parent.glob(f"{glob.escape(start)}*.tmp"):
        pid = path.name.removeprefix(start).removesuffix(".tmp")
        if pid.isdecimal() and not _is_alive(int(pid)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def parse_json(text: str, where: str | Path) -> dict[str, Any]:
    """Read a JSON object whose source is not trusted; error messages begin with `where`, such as the file's path.

    Raises:
        InputError: If the text is no JSON object, holds a number of thousands of digits, or is nested deeper than
            `JSON_DEPTH`.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise InputError(f"{where}: got JSON nested too deeply, wanted at most {JSON_DEPTH} levels") from error
    except ValueError as error:  # no JSON, or an int of more digits than Python converts
        raise InputError(f"{where}: got no JSON ({error}), wanted a JSON object") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: got JSON of type {type(content).__name__}, wanted a JSON object")
    check_depth(content, where)
    return content


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        InputError: As `parse_json` does, or if the file is not UTF-8; the message begins with the path.
        OSError: If the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: got bytes that are not UTF-8 ({error}), wanted a JSON object") from error
    return parse_json(text, path)


def check_depth(content: Any, where: str | Path) -> None:
    """Refuse parsed JSON or TOML that is nested deeper than `JSON_DEPTH` levels, without recursion."""
    level = [content]
    for _ in range(JSON_DEPTH + 1):
        nested = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [x for items in nested for x in items]
        if not level:
            return
    raise InputError(f"{where}: got contents nested too deeply, wanted at most {JSON_DEPTH} levels")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process; no process at all, and so none that we know of
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
