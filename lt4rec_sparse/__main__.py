"""`lt4rec-sparse`, and `python -m lt4rec_sparse`: the command line, or a line that says what it needs."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDS = ("typer", "rich", "pyarrow", "matplotlib", "markdown_it")


def main() -> None:
    """Run the command line."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        got = f"an installation without {', '.join(missing)}, which serves artefacts from Python only"
        sys.stderr.write(f"lt4rec-sparse: got {got}, wanted: pip install 'lt4rec-sparse[recsys]'\n")
        sys.exit(2)
    from lt4rec_sparse.cli import app

    app(prog_name="lt4rec-sparse")


if __name__ == "__main__":
    main()
