import errno
import fcntl
import json
import os
import re
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from lt4rec_sparse import Plan, load, load_module
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import (
    JSON_DEPTH,
    parse_json,
    read_json,
    scratch_beside,
    sweep,
    take_place,
    unfinished_folder,
    whole_file,
    whole_folder,
    write_whole,
)
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.stored import load_checkpoint, load_weights, read_seconds, save_weights


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path):
    target = tmp_path / "state.json"
    write_whole(target, "old")
    with pytest.raises(RuntimeError, match="half way"), whole_file(target) as path:
        path.write_text("new, but")
        raise RuntimeError("half way")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_new_file_takes_the_place_of_the_old(tmp_path):
    target = tmp_path / "state.json"
    for text in ("old", "new"):
        write_whole(target, text)
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_scratch_folder_is_gone_whatever_happens_and_so_is_that_of_a_dead_process(tmp_path):
    target = tmp_path / "out.csv"
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    abandoned = tmp_path / f".out.csv.scratch.{socket.gethostname()}.{dead.stdout.strip()}.tmp"
    abandoned.mkdir()
    (abandoned / "day").write_text("x")
    with scratch_beside(target) as folder:
        assert not abandoned.exists() and folder.parent == tmp_path
        (folder / "day").write_text("x")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(RuntimeError, match="half way"), scratch_beside(target) as folder:
        (folder / "day").write_text("x")
        raise RuntimeError("half way")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_gives_the_permissions_whoever_writes(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "text", "x")
        with whole_file(tmp_path / "tensors") as path:
            save_file({"a": torch.ones(1)}, path)  # by itself for the owner alone
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("text", "tensors")] == [mode, mode]


def test_what_a_dead_process_left_is_removed_and_a_living_ones_is_not(tmp_path):
    target = tmp_path / "state.json"
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host = socket.gethostname()
    names = {
        f".state.json.{host}.{int(dead.stdout)}.tmp": False,
        f".state.json.{host}.{os.getppid()}.tmp": True,
        f".state.json.another-{host}.{int(dead.stdout)}.tmp": True,  # nothing is known of its processes
        f".state.json.{host}.{'9' * 30}.tmp": True,
        ".state.json.tmp": True,
        f".other.json.{host}.{int(dead.stdout)}.tmp": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").touch()
    write_whole(target, "x")
    assert {path.name for path in tmp_path.iterdir()} == {name for name, kept in names.items() if kept} | {target.name}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "state.json: got no JSON"),
        ("[1]", "got JSON of type list, wanted a JSON object"),
        ("[" * 100_000, "got JSON nested too deeply"),
        ('{"a":' * 100_000, "got JSON nested too deeply"),
        ('{"a": %s}' % ("[" * 100 + "]" * 100), "got contents nested too deeply, wanted at most 32 levels"),
        ('{"a": %s}' % ("9" * 5_000), "got no JSON"),
        ("\xff", "got bytes that are not UTF-8"),
    ],
)
def test_json_that_cannot_be_used_is_one_line(tmp_path, text, message):
    path = tmp_path / "state.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_the_depth_of_json_is_counted_without_its_strings():
    for depth in (1, JSON_DEPTH, JSON_DEPTH + 1):
        text = '{"a":' * depth + '"[[[["' + "}" * depth
        if depth <= JSON_DEPTH:
            assert parse_json(text, "here") == json.loads(text)
        else:
            with pytest.raises(InputError, match="here: got contents nested too deeply"):
                parse_json(text, "here")


DOORS = {
    "artefact": load,
    "module": load_module,
    "mask": Mask.load,
    "plan": Plan.load,
    "schema": Schema.from_toml,
    "JSON": read_json,
    "ONNX model": lambda path: pytest.importorskip("lt4rec_sparse.onnx").from_onnx(path),
    "weights": lambda path: load_weights(torch.nn.Linear(1, 1), path),
    "checkpoint": load_checkpoint,
    "seconds": read_seconds,
}


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_regular_file_is_refused_and_not_read(tmp_path, door, kind):
    """Reading it would not end."""
    path = tmp_path / "odd"
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: got a folder, a device or a pipe, wanted [^\n]+$"):
        DOORS[door](path)


def test_what_a_writer_leaves_beside_its_file_goes_too(tmp_path):
    """As safetensors does, which writes a temporary file of its own first, if it is killed meanwhile."""
    target = tmp_path / "state.json"
    with pytest.raises(RuntimeError), whole_file(target) as path:
        (path.parent / ".tmpAbCdEf").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with whole_file(target) as path:
        (path.parent / ".tmpAbCdEf").touch()
        path.write_text("x")
    assert list(tmp_path.iterdir()) == [target]


def test_two_threads_write_one_file_and_it_is_one_of_the_two(tmp_path):
    target = tmp_path / "state.json"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: write_whole(target, chr(ord("A") + i) * 10_000), range(40)))
    text = target.read_text()
    assert text == text[0] * 10_000
    assert list(tmp_path.iterdir()) == [target]


def test_what_an_earlier_process_of_this_number_left_is_removed(tmp_path):
    """In a container processes are counted from 1 again."""
    target = tmp_path / "state.json"
    left = tmp_path / f".state.json.{socket.gethostname()}.{os.getpid()}.tmp"
    left.mkdir()
    with whole_file(target) as path:
        assert not left.exists()
        path.write_text("outer")
        write_whole(target, "inner")  # removes nothing that this process prepares
    assert target.read_text() == "outer"


def test_a_folder_that_nobody_works_in_is_swept_of_every_process(tmp_path):
    mine = [".a.json.host.12.tmp", "b/.model.safetensors.other.host.7.3.tmp"]
    others = [".lock", "b/.hidden.tmp", "b/x.1.tmp", ".a.12x.tmp", "b/model.safetensors"]
    for name in (*mine, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".data.host.9.0.tmp").mkdir()
    (tmp_path / ".data.host.9.0.tmp" / "part").touch()
    with whole_file(tmp_path / "b" / "mine") as path:
        sweep(tmp_path)
        assert path.exists()
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {*others, "b/mine"}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "data"
    with whole_folder(target) as fresh:
        (fresh / "old").touch()
    with pytest.raises(RuntimeError), whole_folder(target) as fresh:
        (fresh / "new").touch()
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]
    with whole_folder(target) as fresh:
        (fresh / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_whose_place_cannot_be_taken_keeps_the_old_one(tmp_path, monkeypatch, failing):
    """Whichever of the two renames fails."""
    target = tmp_path / "data"
    with whole_folder(target) as fresh:
        (fresh / "old").touch()
    renames, own = [], type(tmp_path).rename

    def rename(path, new):
        renames.append(new)
        if len(renames) == failing:
            raise OSError("no more space")
        return own(path, new)

    monkeypatch.setattr(type(tmp_path), "rename", rename)
    with pytest.raises(OSError, match="no more space"), whole_folder(target) as fresh:
        (fresh / "new").touch()
    assert len(renames) >= failing
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_is_no_regular_file_is_not_replaced_by_one(tmp_path, kind):
    path = tmp_path / "odd"
    if kind == "device":
        path.symlink_to("/dev/null")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    before = path.lstat().st_ino
    message = rf"^{re.escape(str(path))}: got a folder, a device or a pipe, wanted [^\n]+$"
    with pytest.raises(InputError, match=message), whole_file(path):
        pytest.fail("refused before anything is written")
    assert path.lstat().st_ino == before and list(tmp_path.iterdir()) == [path]


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "data").write_text("x")
    with pytest.raises(InputError, match=r"data: got a file, wanted a folder$"), whole_folder(tmp_path / "data"):
        pytest.fail("refused before anything is written")
    assert (tmp_path / "data").read_text() == "x"


def test_an_unfinished_folder_is_left_to_the_next_process_unless_the_input_was_wrong(tmp_path):
    target = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt), unfinished_folder(target) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == [".data.unfinished"]
    with pytest.raises(InputError), unfinished_folder(target) as folder:
        assert [path.name for path in folder.iterdir()] == ["half"]
        raise InputError("wrong")
    assert not list(tmp_path.iterdir())
    with unfinished_folder(target) as folder:
        (folder / "whole").touch()
        take_place(folder, target)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "whole"]


def test_one_at_a_time_has_an_unfinished_folder_and_the_next_one_gets_a_new_one(tmp_path):
    target = tmp_path / "data"

    def wait():
        with unfinished_folder(target) as folder:
            return target.exists(), list(folder.iterdir())

    with ThreadPoolExecutor() as pool:
        with unfinished_folder(target) as folder:
            (folder / "whole").touch()
            waiting = [pool.submit(wait) for _ in range(3)]
            assert not any(future.done() for future in waiting)
            take_place(folder, target)
        assert [future.result() for future in waiting] == [(True, [])] * 3
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "whole"]


def test_an_unfinished_folder_is_locked_where_only_files_open_for_writing_can_be(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, [True]

    def as_nfs(descriptor, how):
        if removed and removed.pop():  # by another machine, while this one waited
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if how & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    with unfinished_folder(tmp_path / "data") as folder:
        assert folder.is_dir()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_process_that_was_killed_holds_nobody_up(tmp_path):
    killed = (
        "import os, sys, pathlib; from lt4rec_sparse.files import unfinished_folder\n"
        "with unfinished_folder(pathlib.Path(sys.argv[1])) as folder: (folder / 'half').touch(); os._exit(9)"
    )
    target = tmp_path / "data"
    assert subprocess.run([sys.executable, "-c", killed, str(target)], check=False).returncode == 9
    assert {path.name for path in tmp_path.iterdir()} == {".data.unfinished", ".data.unfinished.lock"}
    with unfinished_folder(target) as folder:
        assert [path.name for path in folder.iterdir()] == ["half"]
    assert not list(tmp_path.iterdir())


def test_altered_weights_are_named_and_those_without_checksums_are_read(tmp_path):
    path = tmp_path / "level_0.safetensors"
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    save_weights(model, path)
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            load_weights(other, path)
        except InputError as error:
            assert re.fullmatch(rf"{re.escape(str(path))}: got a damaged file [^\n]*: delete it to go on", str(error))
            refused += 1
        else:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert refused > len(whole) * 0.9
    save_file(model.state_dict(), path)
    other.reset_parameters()
    load_weights(other, path)
    assert torch.equal(model.weight, other.weight)
