"""`lt4rec-sparse`, and `python -m lt4rec_sparse`: the command line, or one line that says what it needs."""

from __future__ import annotations

import sys

# What the extra `recsys` installs, by import name.
EXTRA = ("click", "markdown_it", "matplotlib", "pyarrow", "rich", "tomli", "typer")


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: With the exit code; without the extra `recsys`, with a line that says how to install it.
    """
    try:
        from lt4rec_sparse.cli import app

        app(prog_name="lt4rec-sparse")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        sys.exit(f"lt4rec-sparse needs {missing}, which the extra brings: pip install 'lt4rec-sparse[recsys]'")


if __name__ == "__main__":
    main()
