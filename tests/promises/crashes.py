"""What a power cut may leave of a file that is being saved: at every moment, in every order a file system may choose.

The operations of a save are recorded as they happen. Until a file is synced, what is on the disk of it may be nothing,
a part, zeros, or all; until a folder is synced, any of the changes of its names may be there and the others not. Each
such state is put on a disk of its own: the file must be the old or the new one, and a later save must leave nothing
beside it.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lt4rec_sparse import save, save_module
from lt4rec_sparse.files import whole_file, whole_folder, write_whole
from lt4rec_sparse.masks import Mask
from tests.promises import bases

Names = dict[str, int | None]  # path -> inode; None is a folder
Change = dict[str, int | str | None]  # path -> inode, None for a folder, "gone"
WATCHED = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "chmod")


@dataclass
class Moment:
    """What is certain to be on the disk, and what may be, between two operations."""

    names: Names
    contents: dict[int, bytes]
    changes: list[Change] = field(default_factory=list)  # of names, in order
    written: dict[int, bytes] = field(default_factory=dict)  # not synced

    def states(self) -> Iterator[dict[str, bytes | None]]:
        """Yield what the disk may hold: path -> contents, None for a folder."""
        for chosen in itertools.product((True, False), repeat=len(self.changes)):
            names = dict(self.names)
            for change in itertools.compress(self.changes, chosen):
                for path, inode in change.items():
                    if inode == "gone":
                        names.pop(path, None)
                    else:
                        names[path] = inode  # type: ignore[assignment]
            named = {inode for inode in names.values() if inode is not None}
            dirty = sorted(named & self.written.keys())
            for parts in itertools.product(*(self._forms(inode) for inode in dirty)):
                contents = {**self.contents, **dict(zip(dirty, parts, strict=True))}
                yield {path: None if inode is None else contents.get(inode, b"") for path, inode in names.items()}

    def _forms(self, inode: int) -> list[bytes]:
        new, old = self.written[inode], self.contents.get(inode, b"")
        return list(dict.fromkeys([old, new, new[: len(new) // 2], bytes(len(new)), new[:1] + bytes(len(new) - 1)]))


def recorded(folder: Path, act: Callable[[], Any]) -> list[Moment]:
    """Run a save and return every moment of it, from before the first operation to after the last."""
    names, contents = _seen(folder)
    state = Moment(dict(names), dict(contents))
    moments = [_copied(state)]

    def look() -> None:
        """Add what has changed since the last look."""
        nonlocal names, contents
        now, data = _seen(folder)
        gone: Change = dict.fromkeys(names.keys() - now.keys(), "gone")
        new: Change = {path: now[path] for path in now if path not in names or names[path] != now[path]}
        if new and gone and set(new.values()) & {names[path] for path in gone}:
            state.changes.append({**gone, **new})  # a rename, which is one change
        else:
            state.changes += [{path: change} for path, change in (*new.items(), *gone.items())]
        for inode, content in data.items():
            if content != contents.get(inode, b""):
                state.written[inode] = content
        if (now, data) != (names, contents):
            names, contents = now, data
            moments.append(_copied(state))

    def synced(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            for change in [c for c in state.changes if any((folder / p).parent == path for p in c)]:
                state.changes.remove(change)
                for name, inode in change.items():
                    if inode == "gone":
                        state.names.pop(name, None)
                    else:
                        state.names[name] = inode  # type: ignore[assignment]
        else:
            inode = path.stat().st_ino
            state.contents[inode] = state.written.pop(inode, state.contents.get(inode, b""))
        moments.append(_copied(state))

    with _watched(look, synced):
        act()
        look()
    return moments


def broken(folder: Path, moments: list[Moment], is_whole: Callable[[], bool], again: Callable[[], Any]) -> list[int]:
    """Return how many different states there are, and how many are broken or leave something beside the next save."""
    seen, wrong = set(), 0
    for moment in moments:
        for state in moment.states():
            key = tuple(sorted(state.items(), key=lambda item: item[0]))
            if key in seen:
                continue
            seen.add(key)
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            for name, content in sorted(state.items()):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir(exist_ok=True) if content is None else path.write_bytes(content)
            is_good = is_whole()
            again()
            wrong += not (is_good and len(list(folder.iterdir())) == 1)
    return [len(seen), wrong]


def run() -> dict[str, list[int]]:
    """Return for every kind of file: how many states a crash may leave, and how many of these are broken."""
    found = {}
    for name, write in SAVES.items():
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made) / "disk"
            folder.mkdir()
            target = folder / "file"
            write(target, 0)
            old = _content(target)
            moments = recorded(folder, lambda write=write, target=target: write(target, 1))
            wanted = (old, _content(target))
            assert wanted[0] != wanted[1]
            allowed = {repr(content) for content in (*wanted, *(({},) if name == "folder" else ()))}
            found[name] = broken(
                folder,
                moments,
                lambda allowed=allowed, target=target: repr(_content(target)) in allowed,
                lambda write=write, target=target: write(target, 1),
            )
    return found


def in_place(target: Path, which: int) -> None:
    """Write as one does without care."""
    target.write_bytes(bytes([65 + which]) * 100)


def without_sync(target: Path, which: int) -> None:
    """Write beside and rename, but leave it to the system when anything reaches the disk."""
    beside = target.with_name("beside")
    beside.write_bytes(bytes([65 + which]) * 100)
    beside.replace(target)


def _artefact(target: Path, which: int) -> None:
    save(bases.ranker(which), target)


def _module(target: Path, which: int) -> None:
    save_module(bases.ranker(which).mlp, target)


def _mask(target: Path, which: int) -> None:
    Mask({"layer": torch.arange(12).view(3, 4) % 2 == which}).save(target)


def _checkpoint(target: Path, which: int) -> None:
    with whole_file(target) as path:
        torch.save({"model": torch.full((3,), float(which))}, path)


def _text(target: Path, which: int) -> None:
    write_whole(target, f"text {which}")


def _folder(target: Path, which: int) -> None:
    with whole_folder(target) as fresh:
        for name in ("a", "b"):
            (fresh / name).write_text(f"{name} {which}")


SAVES = {
    "artefact": _artefact,
    "module file": _module,
    "mask": _mask,
    "checkpoint": _checkpoint,
    "text": _text,
    "folder": _folder,  # old, new or, for a moment, none
}


def _content(path: Path) -> Any:
    if path.is_dir():
        return {part.name: part.read_bytes() for part in sorted(path.iterdir())}
    return path.read_bytes() if path.exists() else {}


def _seen(folder: Path) -> tuple[Names, dict[int, bytes]]:
    names: Names = {}
    contents = {}
    for path in sorted(folder.rglob("*")):
        is_folder = path.is_dir()
        names[str(path.relative_to(folder))] = None if is_folder else path.stat().st_ino
        if not is_folder:
            contents[path.stat().st_ino] = path.read_bytes()
    return names, contents


def _copied(state: Moment) -> Moment:
    return Moment(dict(state.names), dict(state.contents), list(state.changes), dict(state.written))


@contextmanager
def _watched(look: Callable[[], None], synced: Callable[[int], None]) -> Iterator[None]:
    """Look before and after each of these operations of `os`; syncs are told apart."""
    own = {name: getattr(os, name) for name in WATCHED}

    def watched(name: str) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            look()
            result = own[name](*arguments, **options)
            if name == "fsync":
                synced(arguments[0])
            look()
            return result

        return act

    for name in WATCHED:
        setattr(os, name, watched(name))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(os, name, function)
