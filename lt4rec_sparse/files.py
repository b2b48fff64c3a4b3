"""Files that are there whole or not at all, whatever happens while they are written; and JSON read from them."""

from __future__ import annotations

import errno
import fcntl
import glob
import itertools
import json
import os
import re
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
# Of this release, and without the count, of those before it.
TEMPORARY = re.compile(r"\..+\.\d+(\.\d+)?\.tmp")


# What this process prepares now. Its number may be that of a process that died: containers count from 1 again.
_LIVE: set[Path] = set()
_COUNT = itertools.count()


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; on a clean exit the file there takes the place of `path`, durably.

    Contents reach the disk before the name does, and the name before this returns: after a power cut `path` holds the
    old file or the new one. If the block raises, what was written is removed and `path` is as it was. The new file has
    the permissions that the umask gives, whatever its writer chose. The temporary path is in a folder of its own, since
    writers such as safetensors have temporaries too: the folder goes as a whole, by the next writer if this one dies.

    Raises:
        InputError: If `path` is a folder, a device or a pipe.
    """
    target = Path(path)
    check_regular(target)
    remove_abandoned(target)
    with _temporary_folder(target) as folder:
        temporary = folder / target.name
        # Only the kernel can apply the umask without changing it for other threads.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        mode = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target`, which on a clean exit takes its place; otherwise it is removed.

    Contents reach the disk before the name does. An earlier folder is moved aside first: at no moment is there a part
    of one, but for a moment there is none. If the new one cannot take its place, it is put back.

    Raises:
        InputError: If `target` is there and no folder.
    """
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: got a file, wanted a folder")
    remove_abandoned(target)
    with _temporary_folder(target) as fresh:
        yield fresh
        take_place(fresh, target)


def take_place(fresh: Path, target: Path) -> None:
    """Move a folder to `target`, on the same disk, durably; an earlier folder is moved aside first, and removed."""
    for path in (*fresh.rglob("*"), fresh):
        if path.is_file() or path.is_dir():
            _sync(path)
    with _temporary_folder(target) as aside:
        old = aside / target.name
        try:
            if target.exists():
                target.rename(old)
            fresh.rename(target)
        except BaseException:
            if (old.exists() or old.is_symlink()) and not target.exists():
                old.rename(target)
            raise
        _sync(target.parent)


@contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """Give a folder `.<name>.unfinished` beside `target`, for what takes long: the next process goes on in it.

    A process that is killed or interrupted leaves it. On a clean exit, and after an error that starting again does not
    mend (`InputError`), it is removed, unless `take_place` has moved it. One process at a time has it, others wait.
    """
    remove_abandoned(target)
    folder = target.with_name(f".{target.name}.unfinished").absolute()
    with _locked(folder.with_name(f"{folder.name}.lock")):
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, made if it is absent and removed afterwards; a process that dies loses it.

    It is no lock of the folder itself: NFS gives an exclusive one only of what is open for writing.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _holds(path, descriptor):
                continue
            try:
                yield
            finally:
                if _holds(path, descriptor):
                    path.unlink()  # while it is held: whoever waits for it sees that it is gone
            return
        finally:
            os.close(descriptor)


def _holds(path: Path, descriptor: int) -> bool:
    """Wait for the lock of an open file; return whether it is still at its path: its last owner has removed it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # the second is NFS's, where another machine removed it
            raise
        return False


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """Make a folder `.<name>.<host>.<pid>.<count>.tmp` beside `target`, and remove it with all that is left in it."""
    name = f".{target.name}.{socket.gethostname()}.{os.getpid()}.{next(_COUNT)}.tmp"
    folder = target.with_name(name).absolute()
    _LIVE.add(folder)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _LIVE.discard(folder)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file through `whole_file`, in UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """Give an empty folder for temporary files, on the disk of `target`; on exit it is removed."""
    scratch = target.with_name(f"{target.name}.scratch")
    remove_abandoned(scratch)
    with _temporary_folder(scratch) as folder:
        yield folder


def remove_abandoned(target: Path) -> None:
    """Remove what processes of this machine that have died while they prepared `target` left beside it."""
    start = f".{target.name}.{socket.gethostname()}."
    for path in target.parent.glob(f"{glob.escape(start)}*.tmp"):
        pid = path.name.removeprefix(start).removesuffix(".tmp").partition(".")[0]
        is_own = pid == str(os.getpid())
        if pid.isdecimal() and (path.absolute() not in _LIVE if is_own else not _is_alive(int(pid))):
            _remove(path)


def sweep(folder: Path) -> None:
    """Remove what processes left that died while they prepared something in a folder or below it.

    The caller knows that no other process works there: those of other machines, and numbers that live again, count as
    dead.
    """
    for path in [path for path in folder.rglob(".*.tmp") if TEMPORARY.fullmatch(path.name)]:
        if not any(part in _LIVE for part in (path.absolute(), *path.absolute().parents)):
            _remove(path)


def check_regular(path: str | Path, wanted: str = "a regular file", kind: type[InputError] = InputError) -> None:
    """Refuse what is there and, links followed, is no regular file: reading a device or a pipe may never end.

    Raises:
        InputError: Of the `kind` given, if it is a folder, a device or a pipe.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise kind(f"{path}: got a folder, a device or a pipe, wanted {wanted}")


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


def read_json(path: str | Path, *keys: str) -> dict[str, Any]:
    """Read a file that holds a JSON object, with these keys at least.

    Raises:
        InputError: As `parse_json` does, if a key is absent, or if it is no regular file or not UTF-8; the message
            begins with the path.
        OSError: If the file cannot be read.
    """
    check_regular(path, "a JSON object")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: got bytes that are not UTF-8 ({error}), wanted a JSON object") from error
    content = parse_json(text, path)
    absent = next((key for key in keys if key not in content), None)
    if absent is not None:
        raise InputError(f"{path}: got JSON without {absent!r}, wanted {', '.join(keys)}")
    return content


def check_depth(content: Any, where: str | Path) -> None:
    """Refuse parsed JSON or TOML that is nested deeper than `JSON_DEPTH` levels, without recursion."""
    level = [content]
    for _ in range(JSON_DEPTH + 1):
        nested = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [x for items in nested for x in items]
        if not level:
            return
    raise InputError(f"{where}: got contents nested too deeply, wanted at most {JSON_DEPTH} levels")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
