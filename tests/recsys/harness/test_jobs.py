"""Jobs run once what they need is done; an error stops the jobs that have not begun; a worker has one thread."""

import os
import select
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.recsys.data.memory import CACHE, cache_bytes
from lt4rec_sparse.recsys.harness.jobs import Job, run_jobs


def test_jobs_run_after_what_they_need_and_before_that_in_order():
    done = []
    jobs = {
        "c": Job(done.append, ("c",), ("a", "b")),
        "a": Job(done.append, ("a",)),
        "d": Job(done.append, ("d",), ("c",)),
        "b": Job(done.append, ("b",)),
    }
    told = []
    run_jobs(jobs, executor="here", progress=lambda now, total: told.append((now, total)))
    assert done == ["a", "b", "c", "d"]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert run_jobs({}) == {}


def test_an_error_stops_what_has_not_begun():
    done = []
    jobs = {"bad": Job(int, ("no number",)), "after": Job(done.append, (1,), ("bad",))}
    with pytest.raises(ValueError, match="invalid literal"):
        run_jobs(jobs, executor="here")
    assert not done


def test_jobs_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="nodes are in a cycle"):
        run_jobs({"a": Job(print, (), ("b",)), "b": Job(print, (), ("a",))}, executor="here")
    with pytest.raises(InputError, match="executor: got 'cloud', wanted one of processes, ray, here"):
        run_jobs({}, executor="cloud")


def test_workers_are_processes_of_one_thread_that_share_the_memory_of_caches(monkeypatch):
    monkeypatch.delenv(CACHE, raising=False)
    jobs = {
        "process": Job(os.getpid, ()),
        "threads": Job(torch.get_num_threads, ()),
        "cache": Job(cache_bytes, ()),
    }
    found = run_jobs(jobs, workers=2)
    assert found["cache"] == cache_bytes(2)
    assert found["process"] != os.getpid()
    assert found["threads"] == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_worker_ends_when_its_parent_is_killed(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    work = f"import time\nfile = open({str(pipe)!r}, 'w')\nprint('began', file=file, flush=True)\n"
    work += "time.sleep(20)\nprint('survived', file=file)"
    main = f"from lt4rec_sparse.recsys.harness.jobs import Job, run_jobs\nrun_jobs({{'a': Job(exec, ({work!r},))}}, 1)"
    parent = subprocess.Popen([sys.executable, "-c", main], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # Opened at once, since a parent that fails never opens its end.
    with parent, os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as file:
        while not select.select([file], [], [], 0.1)[0]:
            assert parent.poll() is None, "the parent ended before its worker began"
        os.set_blocking(file.fileno(), True)
        assert file.readline() == "began\n"
        parent.kill()
        assert file.read() == ""  # the worker's end of the pipe is closed


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_ray_is_asked_for_by_name_where_it_is_missing():
    with pytest.raises(InputError, match="pip install ray"):
        run_jobs({"a": Job(os.getpid, ())}, executor="ray")


KILLED_ONCE = """
import os, signal
from pathlib import Path
mark = Path(MARK)
if not mark.exists():
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)
mark.write_text("done by another worker")
"""


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")  # of Ray's own
@pytest.mark.skipif(find_spec("ray") is None, reason="no Ray: pip install ray")
def test_on_ray_a_job_outlives_its_worker_and_errors_arrive(tmp_path):
    mark = tmp_path / "mark"
    jobs = {
        "killed": Job(exec, (KILLED_ONCE.replace("MARK", repr(str(mark))), {})),
        "after": Job(mark.read_text, (), ("killed",)),
        "threads": Job(torch.get_num_threads, ()),
        "process": Job(os.getpid, ()),
    }
    results = run_jobs(jobs, workers=2, executor="ray")
    assert results["after"] == "done by another worker"
    assert results["threads"] == 1 and results["process"] != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        run_jobs({"bad": Job(int, ("no number",)), "after": Job(os.getpid, (), ("bad",))}, workers=2, executor="ray")
