"""The commands that make features at serving time: `lt4rec-sparse candidates` and `features`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lt4rec_sparse.cli_training import Quiet

Model = Annotated[Path, typer.Argument(help="The artefact that `run` wrote: model.safetensors.")]
Data = Annotated[
    str,
    typer.Option(
        metavar="FOLDER",
        help="The folder with the log and its side tables, or its URL, as `run --data` takes it. How to read it, the "
        "model says.",
    ),
]


def candidates(
    model: Model,
    requests: Annotated[
        Path,
        typer.Argument(
            help="A Parquet or CSV file with one row per candidate: the group (such as user_id), the keys of the side "
            "tables (such as video_id), columns of the log that are known, and the day, if there is no --at."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(help="The file to write, .parquet or .csv, for `score`: the same rows, with every feature."),
    ],
    data: Data,
    at: Annotated[
        str | None,
        typer.Option(help="The day of all requests, written as in the log. Histories are of the days before it."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Make candidates of requests: join the side tables and add histories.

    Every row gets the features that training would have seen on its day.
    """
    from lt4rec_sparse.cli import check_out, shown_progress
    from lt4rec_sparse.files import scratch_beside
    from lt4rec_sparse.ranker import load
    from lt4rec_sparse.recsys.data import complete_requests, open_source
    from lt4rec_sparse.recsys.data.reading import list_columns
    from lt4rec_sparse.recsys.data.remote import local_for
    from lt4rec_sparse.recsys.data.written import check_flat, check_table_name, csv_table, written_table

    check_out(out, model, requests)
    check_table_name(out)
    schema = load(model).encoder.schema
    with shown_progress(quiet) as progress, local_for(data, out, schema, progress) as folder:
        source = open_source(folder, schema)
        check_out(out, *source.files)
        features = {column.name for column in schema.features}  # whose lists become text
        check_flat(out, sorted(list_columns(requests) - features))
        with scratch_beside(out) as scratch:
            made = complete_requests(source, requests, at, scratch, progress)
    table = csv_table(schema, made.table) if out.suffix == ".csv" else made.table
    with written_table(out) as append:
        append(table)
    if made.absent:
        typer.echo(f"missing in every row, since {requests} has none: {', '.join(made.absent)}", err=True)


def features(
    model: Model,
    out: Annotated[
        Path, typer.Argument(help="The file to write, for FeatureStore.open: features.safetensors beside MODEL.")
    ],
    data: Data,
    at: Annotated[
        str | None,
        typer.Option(help="The day that they are for, written as in the log. By default the day after its last."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write what a server looks up by user and item.

    The file holds the side tables, and histories of the days before; a request then brings ids and little else. Write
    it anew every day.
    """
    from lt4rec_sparse.cli import check_out, shown_progress
    from lt4rec_sparse.files import scratch_beside
    from lt4rec_sparse.ranker import load
    from lt4rec_sparse.ranker.store import write_features
    from lt4rec_sparse.recsys.data import open_source, take_snapshot
    from lt4rec_sparse.recsys.data.remote import local_for

    check_out(out, model)
    schema = load(model).encoder.schema
    with shown_progress(quiet) as progress, local_for(data, out, schema, progress) as folder:
        source = open_source(folder, schema)
        check_out(out, *source.files)
        with scratch_beside(out) as scratch:
            taken = take_snapshot(source, at, scratch, progress)
    write_features(out, schema, taken.tables, taken.day)
    found = taken.columns
    keys = tuple(dict.fromkeys(found.values()))
    rest = (column.name for column in schema.features if column.name not in found)
    brought = dict.fromkeys((*keys, *rest))
    typer.echo(f"{out}: {len(found)} features by {', '.join(keys)}")
    moment = "" if taken.day is None else f"as of {taken.day}; "
    typer.echo(f"{moment}a request brings {', '.join(brought)}")
