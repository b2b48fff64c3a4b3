"""The command that drafts a schema: `lt4rec-sparse schema`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def schema(
    data: Annotated[Path, typer.Argument(help="A folder with Parquet or CSV files, in it or in its data/.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write, such as DATA/schema.toml. By default it is printed.")
    ] = None,
) -> None:
    """Draft a schema from the files of a folder.

    It guesses types, labels, times, users and keys of side tables, and says so in comments. Columns that give a label
    away are left out. Read it before you run.
    """
    from lt4rec_sparse.errors import InputError
    from lt4rec_sparse.files import write_whole
    from lt4rec_sparse.recsys.data.draft import draft_schema

    if out is not None and out.exists():
        raise InputError(f"--out: got {str(out)!r}, which is there, wanted a new file")
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out: got {str(out)!r}, wanted a file in a folder that exists")
    text = draft_schema(data)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_whole(out, text)
        typer.echo(f"{out}: read it, then lt4rec-sparse run --data {data}")
