"""Data sets at a URL: their files, copied to a folder of this machine, from which all readers read.

```text
<folder>/...        schema.toml and the files that the schema names, at their paths below the URL
<folder>.json       the URL, and per file what the remote side said of it when it was copied: size, times, checksums
```

A file of which the remote side says the same as then is not copied again. Any other is, and its bytes decide whether it
changed, as with files of this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from lt4rec_sparse.errors import InputError, told
from lt4rec_sparse.files import TEMPORARY, read_json, scratch_beside, whole_file, write_whole
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data.seen import is_table, table_suffix
from lt4rec_sparse.recsys.data.source import SCHEMA_FILE, TRUTH, DataError, check_pattern, kuairand_schema, schema_of

COPY = "copy"  # the folder of copies in a run folder
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# Of what a remote side says of a file, that it was read: no sign of a change.
READ_TIMES = ("time", "atime", "accessed", "last_access_time")

Progress = Callable[[str, int, int], None]
Found = TypeVar("Found")


def located(place: str | Path) -> str | Path:
    """Return a URL as it is, and any other place as a path; `file://` is one of this machine."""
    if isinstance(place, Path) or not URL.match(place):
        return Path(place)
    return Path(unquote(urlsplit(place).path)) if place.lower().startswith("file://") else place.rstrip("/")


def data_name(place: str | Path) -> str:
    """Return the name of a data set: that of its folder, or the last part of its URL."""
    place = located(place)
    return place.resolve().name if isinstance(place, Path) else PurePosixPath(URL.sub("", place)).name


def is_folder(place: str | Path) -> bool:
    """Return whether a place is a folder: of a URL, whether its name is not that of a table."""
    place = located(place)
    return place.is_dir() if isinstance(place, Path) else table_suffix(PurePosixPath(place)) is None


def local_data(
    place: str | Path,
    folder: Path,
    schema: Schema | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Path:
    """Return a folder of this machine with a data set: the place itself, or, of a URL, `folder` with its files copied.

    Copied are `schema.toml` and the files that it names, or those that `schema` names, from the URL or from `data/`
    below it. Of an earlier copy only what changed is copied; files that are no longer there are removed.

    Args:
        place: A folder, or a URL of a kind that fsspec knows: `s3://bucket/shop`, `gs://`, `hdfs://`, `memory://`.
        folder: Where copies go, beside `<folder>.json`.
        schema: The schema; None for the one there, or KuaiRand's.
        progress: Called with a stage, files done and files in all.

    Raises:
        InputError: If fsspec or the package that it needs for the URL is not installed; the message names it.
        DataError: If the URL cannot be read, or there is no file for a pattern of the schema.
    """
    place = located(place)
    if isinstance(place, Path):
        return place
    remote = _Remote(place)
    noted = folder.with_name(f"{folder.name}.json")
    if folder.is_dir() and any(folder.iterdir()) and not noted.is_file():
        raise DataError(
            f"{folder}: got files without {noted.name}, wanted a new, an empty or an earlier folder of copies"
        )
    there = [name for name in (SCHEMA_FILE, TRUTH) if remote.has(name)]
    copied = _Copy(remote, folder, progress)
    copied.take(there)
    if schema is None:
        schema = schema_of(folder) if SCHEMA_FILE in there else kuairand_schema()
        assert schema is not None
        if SCHEMA_FILE not in there and not any(remote.matching(pattern) for pattern in schema.files.log):
            wanted = f"{SCHEMA_FILE}, or KuaiRand's {' '.join(schema.files.log)} there or in data/"
            raise DataError(f"{place}: got no data set, wanted {wanted}")
    names = dict.fromkeys(there)
    for pattern in (*schema.files.log, *(pattern for join in schema.joins for pattern in join.files)):
        check_pattern(place, pattern)
        matches = remote.matching(pattern)
        if not matches:
            raise DataError(f"{place}: got no file {pattern!r}, wanted one there or in data/")
        names |= dict.fromkeys(matches)
    copied.take([name for name in names if name not in there])
    copied.drop_others(names)
    return folder


@contextmanager
def local_for(place: str | Path, out: Path, schema: Schema, progress: Progress) -> Iterator[Path]:
    """Give `local_data` for as long as `out` is made: copies are in a folder beside it, which is removed afterwards."""
    if isinstance(located(place), Path):
        yield local_data(place, out)
        return
    with scratch_beside(out) as scratch:
        yield local_data(place, scratch / data_name(place), schema, progress)


def local_tables(place: str | Path, scratch: Path, progress: Progress = lambda stage, done, total: None) -> Path:
    """Return a folder of this machine with all tables of a place, for a draft; `scratch` is for copies of a URL's.

    Raises what `local_data` does.
    """
    place = located(place)
    if isinstance(place, Path):
        return place
    remote, folder = _Remote(place), scratch / data_name(place)
    names = [name for name in remote.matching("*") if is_table(PurePosixPath(name))]
    if not names:
        raise DataError(f"{place}: got no files of tables, wanted .parquet, .csv, .tsv or .txt there or in data/")
    _Copy(remote, folder, progress).take(names)
    return folder


def copy_file(url: str, path: Path) -> None:
    """Copy one file from a URL, unless `path` has it already, as `local_data` copies several.

    Raises what `local_data` does.
    """
    copied, name = _copy_of(url, path)
    copied.take([name], {name: path})


def is_copy(url: str, path: Path) -> bool:
    """Return whether `path` is what `copy_file` wrote of a URL that has not changed since; raises what it does."""
    copied, name = _copy_of(url, path)
    return copied.has(name, path)


def _copy_of(url: str, path: Path) -> tuple[_Copy, str]:
    parent, _, name = url.rpartition("/")
    states = path.parent.with_name(f"{path.parent.name}.{path.name}.json")
    return _Copy(_Remote(parent), path.parent, lambda stage, done, total: None, states), name


class _Remote:
    """A folder at a URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            import fsspec
        except ImportError as error:
            raise InputError(f"{url}: got no fsspec, wanted it: pip install 'lt4rec-sparse[remote]'") from error
        try:
            self._system, root = fsspec.core.url_to_fs(url)
        except ImportError as error:  # such as "Install s3fs to access S3"
            raise InputError(f"{url}: got no package for it, wanted one: {told(error)}") from error
        except Exception as error:
            raise self._unreadable(error) from error
        self._root = root.rstrip("/")
        self._system.invalidate_cache()

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        return self._told(partial(self._is_file, f"{self._root}/{name}"))

    def _is_file(self, path: str) -> bool:
        # fsspec's own `isfile` takes every error for a "no", also that of a network.
        try:
            return bool(self._system.info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def matching(self, pattern: str) -> list[str]:
        """Return the files that a glob finds, or else in `data/`, sorted, as paths below the URL."""
        root = re.sub(r"([*?\[])", r"[\1]", self._root)
        for folder in ("", "data/"):
            found = self._told(partial(self._system.glob, f"{root}/{folder}{pattern}", detail=True))
            files = [path for path, info in found.items() if info["type"] == "file"]
            if files:
                # Some systems begin the paths of listings with another spelling of the root: "/" or none.
                names = [path.lstrip("/").removeprefix(self._root.lstrip("/")).lstrip("/") for path in files]
                for name in names:
                    check_pattern(self.url, name)  # a key of an object store may have any text
                return sorted(names)
        return []

    def state(self, name: str) -> dict[str, Any]:
        """Return what the remote side says of a file, as JSON can hold it."""
        info = self._told(partial(self._system.info, f"{self._root}/{name}"))
        state: dict[str, Any] = json.loads(json.dumps(info, default=str))
        return {key: value for key, value in state.items() if key not in READ_TIMES}

    def copy(self, name: str, path: Path) -> None:
        """Write a file to `path`."""
        self._told(partial(self._system.get_file, f"{self._root}/{name}", str(path)))

    def _told(self, call: Callable[[], Found]) -> Found:
        """Make a call; packages that fsspec brings in raise errors of all kinds, of access, names and networks."""
        try:
            return call()
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"{self.url}: got {type(error).__name__}: {told(error)}, wanted a folder that can be read")


class _Copy:
    """Copies of remote files in a folder, and what the remote side said of each."""

    def __init__(self, remote: _Remote, folder: Path, progress: Progress, states: Path | None = None) -> None:
        self._remote, self._folder, self._progress = remote, folder, progress
        self._path = states or folder.with_name(f"{folder.name}.json")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.is_file():  # before the folder: it says that its files are copies
            self._note({})
        folder.mkdir(exist_ok=True)
        content = read_json(self._path) if self._path.is_file() else {}
        known = content.get("files") if content.get("url") == remote.url else None
        self._states: dict[str, Any] = known if isinstance(known, dict) else {}

    def has(self, name: str, path: Path) -> bool:
        """Return whether a path is the copy that was made of a file as it is now."""
        is_there = path.is_file() and not path.is_symlink()
        return is_there and self._states.get(name) == {"remote": self._remote.state(name), "copy": _identity(path)}

    def take(self, names: Sequence[str], paths: Mapping[str, Path] | None = None) -> None:
        """Copy the named files that changed; each to its path, by default below the folder."""
        for done, name in enumerate(names):
            path = (paths or {}).get(name) or self._folder / name
            if self.has(name, path):
                continue
            state = self._remote.state(name)
            self._progress("copy files", done, len(names))
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                self._remote.copy(name, temporary)
                size, got = state.get("size"), temporary.stat().st_size
                if size not in (None, got):
                    raise DataError(f"{self._remote.url}/{name}: got {got:,} bytes, wanted {size:,}")
            self._states[name] = {"remote": state, "copy": _identity(path)}
            self._note(self._states)
        if names:
            self._progress("copy files", len(names), len(names))

    def _note(self, states: Mapping[str, Any]) -> None:
        write_whole(self._path, json.dumps({"url": self._remote.url, "files": states}, indent=1))

    def drop_others(self, names: Mapping[str, Any]) -> None:
        """Remove copies of files that are no longer there."""
        wanted = {self._folder / name for name in names}
        for path in self._folder.rglob("*"):
            is_underway = any(TEMPORARY.fullmatch(part.name) for part in path.parents)  # of another process
            if path.is_file() and path not in wanted and not is_underway:
                path.unlink()


def _identity(path: Path) -> list[int]:
    """Return what tells a file from another one that takes its place."""
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_mtime_ns]
