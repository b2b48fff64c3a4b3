"""The pages' links lead somewhere, their Python runs as written, and their commands exist."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import tables

ROOT = Path(__file__).parents[1]
PAGES = [*tables.pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_relative_to(ROOT), f"{target} leaves the repository"
        assert linked.exists(), f"{target} is absent"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading"


def test_every_page_is_linked_from_the_readme_and_from_the_index():
    index = ROOT / "docs" / "README.md"
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in prose(ROOT / "README.md")
        assert page == index or f"({page.name})" in prose(index)


def test_no_picture_of_the_readme_is_relative():
    """A package index shows the README without the repository's files."""
    assert all(re.match(r"https?://", target) for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", prose(PAGES[0])))


@pytest.mark.filterwarnings("default:the native CPU engine is absent:RuntimeWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=named)
def test_python_runs_as_written(page, tmp_path, monkeypatch):
    """The examples of a page run in its order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for code in blocks(page, "python"):
        exec(compile(code, named(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_source_files_named_in_the_text_exist(page):
    """As paths in the repository, in the package or in csrc/."""
    for name in re.findall(r"`([\w./]+\.(?:py|cpp|h|toml|txt|sh))`", prose(page)):
        places = [folder / name for folder in (ROOT, ROOT / "lt4rec_sparse", ROOT / "csrc", page.parent)]
        places.append(ROOT / "lt4rec_sparse" / "kernels" / "gpu" / name)
        assert any(place.exists() for place in places) or name in ("schema.toml",), name


def test_modules_that_the_pages_run_exist():
    for page in PAGES:
        for module in re.findall(r"python -m ([\w.]+)", page.read_text(encoding="utf-8")):
            assert find_spec(module) is not None, f"{named(page)}: {module}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh", "bash")], ids=named)
def test_commands_and_their_options_exist(page):
    typer = pytest.importorskip("typer", reason="the command line is an extra")
    from lt4rec_sparse.cli import app

    commands = typer.main.get_command(app).commands
    for line in "".join(blocks(page, "sh", "bash")).splitlines():
        words = shlex.split(line, comments=True)
        start = next((i for i, word in enumerate(words) if word.endswith("lt4rec-sparse")), None)
        if start is None:
            continue
        name, *rest = words[start + 1 :]
        assert name in commands, line
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known | {"--help"}, line
