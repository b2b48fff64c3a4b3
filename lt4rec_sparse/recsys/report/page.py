"""Pages from templates: text as Markdown, and the same as one HTML file that asks for nothing."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from markupsafe import Markup

from lt4rec_sparse.files import write_whole
from lt4rec_sparse.recsys.tables import count, table

HERE = "lt4rec_sparse.recsys.report"


def render(template: str, package: str = HERE, **values: Any) -> str:
    """Return a template of a package's folder `templates/`, filled in; what is put into HTML is escaped.

    In a template `table(header, rows)` and `count(number, of)` are those of `recsys.tables`. A name that it uses and
    that is not in `values` is an error.
    """
    return _templates(package).get_template(template).render(**values)


@lru_cache
def _templates(package: str) -> Environment:
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"count": count, "table": table}
    return environment


def write_page(text: str, title: str, folder: Path) -> Path:
    """Write Markdown as `report.md`, and as `report.html` with its pictures, `plots/<name>.png`, embedded.

    A picture from anywhere else, as the name of a folder or a column may ask for, stays text: a page asks for nothing.
    """

    def embedded(match: re.Match[str]) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    text = re.sub(r"!\[(?![^\[\]]*\]\(plots/\w+\.png\))", r"!\\[", text)
    write_whole(folder / "report.md", text)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    page = render("page.html", title=title, body=Markup(body))
    write_whole(folder / "report.html", re.sub(r'src="(plots/\w+\.png)"', embedded, page))
    return folder / "report.md"


def worded(text: str, counts: Mapping[str, Any]) -> str:
    """Return a text about the rows of splits, which are whole days only in a log that is split by day."""
    return re.sub(r"\b(training|validation|test) days\b", r"\1 rows", text) if "split_by" in counts else text
