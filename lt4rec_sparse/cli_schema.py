"""The command that drafts a schema: `lt4rec-sparse schema`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer


def schema(
    data: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="A folder with Parquet or CSV files, in it or in its data/; or its URL, such as s3://bucket/shop.",
        ),
    ],
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
    from lt4rec_sparse.recsys.data.remote import local_tables

    if out is not None and out.exists():
        raise InputError(f"--out: got {str(out)!r}, which is there, wanted a new file")
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out: got {str(out)!r}, wanted a file in a folder that exists")
    with TemporaryDirectory(prefix="lt4rec-sparse-") as scratch:
        text = draft_schema(local_tables(data, Path(scratch)))
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_whole(out, text)
        typer.echo(f"{out}: read it, then lt4rec-sparse run --data {data}")
