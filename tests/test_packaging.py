"""What people install: a source distribution with all that its tests need, and a wheel tagged by what it holds."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "constraints.txt", "*.md", "LICENSE", ".ci/*")
FOLDERS = ("lt4rec_sparse", "csrc", "bench", "tests", "docs")

pytestmark = pytest.mark.packaging


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a checkout holds, so that nothing built before is found."""
    copy = tmp_path_factory.mktemp("tree")
    paths = [path for pattern in FILES for path in ROOT.glob(pattern)]
    for folder in FOLDERS:
        paths += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in paths:
        if path.suffix not in (".so", ".pyc"):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return copy


def setup(tree: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "LT4REC_SPARSE_REQUIRE_NATIVE"} | environment
    return subprocess.run(
        [sys.executable, "setup.py", "-q", command], cwd=tree, env=environment, capture_output=True, text=True
    )


def test_a_wheel_without_the_engine_is_pure_python_and_says_how_to_get_it(tree):
    done = setup(tree, "bdist_wheel", CC="false", CXX="false")
    assert done.returncode == 0, done.stderr
    assert "WITHOUT its CPU engine" in done.stderr and "LT4REC_SPARSE_REQUIRE_NATIVE=1" in done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lt4rec_sparse"}
    package = ROOT / "lt4rec_sparse"
    data = {path.relative_to(ROOT) for path in package.rglob("*") if path.suffix in (".toml", ".html", ".md", ".typed")}
    assert len(data) >= 5
    assert {str(path) for path in data} <= set(names)


def test_a_missing_compiler_is_fatal_where_the_engine_is_required(tree):
    done = setup(tree, "build_ext", CC="false", CXX="false", LT4REC_SPARSE_REQUIRE_NATIVE="1")
    assert done.returncode != 0 and "false" in done.stderr


def test_a_source_distribution_is_the_whole_checkout(tree):
    done = setup(tree, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    built = {"build", "dist", "lt4rec_sparse.egg-info"}
    source = {path.relative_to(tree) for path in tree.rglob("*") if path.is_file()}
    assert {str(path) for path in source if path.parts[0] not in built} <= packed
