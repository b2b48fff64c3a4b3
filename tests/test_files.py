import json
import os
import socket
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import JSON_DEPTH, parse_json, read_json, scratch_beside, whole_file, write_whole


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
