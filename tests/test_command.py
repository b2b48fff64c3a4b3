"""The console script without the extra that it needs, and a plain install without anything of it."""

import re
import subprocess
import sys
from pathlib import Path

from lt4rec_sparse import __main__ as command

ROOT = Path(__file__).parents[1]
BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if {name, name.partition(".")[0]} & set(absent):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
RUN = "from lt4rec_sparse.__main__ import main; sys.argv = ['lt4rec-sparse', '--help']; main()"


def run(absent: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    script = f"absent = {absent!r}{BLOCK}{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)


def test_without_the_extra_one_line_says_what_to_install():
    done = run(command.EXTRA, RUN)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(
        r"lt4rec-sparse needs \w+, which the extra brings: pip install 'lt4rec-sparse\[recsys\]'\n", done.stderr
    )


def test_another_missing_module_is_a_fault_of_ours():
    done = run(("lt4rec_sparse.cli",), RUN)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_the_extra_is_what_the_metadata_calls_recsys():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r"^recsys = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert extra is not None
    names = {name.replace("-py", "").replace("-", "_") for name in re.findall(r'^ +"([\w-]+)', extra[1], re.MULTILINE)}
    assert names | {"click"} == set(command.EXTRA)  # click is typer's


def test_library_and_ranker_need_no_extra():
    code = (
        "import lt4rec_sparse, lt4rec_sparse.ranker, lt4rec_sparse.lottery; assert not set(absent) & sys.modules.keys()"
    )
    done = run(command.EXTRA, code)
    assert done.returncode == 0, done.stderr
