"""`lt4rec-sparse`, and `python -m lt4rec_sparse`: the command line, or one line that says what it needs."""

from __future__ import annotations

import sys

# What the extras `recsys` and `serve` install, by import name.
EXTRA = ("click", "jinja2", "markdown_it", "matplotlib", "pyarrow", "rich", "tomli", "typer")
SERVE = ("httptools", "prometheus_client", "starlette", "uvicorn", "uvloop")


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: With the exit code; without the extra that a command needs, with a line that says how to install it.
    """
    try:
        from lt4rec_sparse.cli import app

        app(prog_name="lt4rec-sparse")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA + SERVE:
            raise
        extra = "serve" if missing in SERVE else "recsys"
        sys.exit(f"lt4rec-sparse needs {missing}, which the extra brings: pip install 'lt4rec-sparse[{extra}]'")


if __name__ == "__main__":
    main()
