"""The console script `lt4rec-sparse`: the command line, or one line that says what it needs."""

import sys

# What the extra `recsys` installs, by import name.
EXTRA = ("click", "markdown_it", "matplotlib", "pyarrow", "rich", "tomli", "typer")


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: With the exit code; without the extra `recsys`, with a line that says how to install it.
    """
    try:
        from lt4rec_sparse import cli

        cli.main()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        sys.exit(f"lt4rec-sparse needs {missing}, which the extra brings: pip install 'lt4rec-sparse[recsys]'")
