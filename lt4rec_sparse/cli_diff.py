"""The command that says what differs between two artefacts: `lt4rec-sparse diff`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lt4rec_sparse.cli_training import Quiet

if TYPE_CHECKING:
    from lt4rec_sparse.ranker.diff import Difference, WeightDifference
    from lt4rec_sparse.recsys.score_diff import ScoreDifference

LONGEST = 40  # characters of a value in a table of facts


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="The artefact to start from: model.safetensors.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The artefact that is compared with it.")],
    requests: Annotated[
        Path | None,
        typer.Option(help="Also compare scores on a Parquet or CSV file of candidates, as `score` takes it."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Also compare scores on rows of the log in this folder, or at its URL, as `score --data`.",
        ),
    ] = None,
    days: Annotated[
        str | None,
        typer.Option(help="Which rows of --data: test (default), validation, train, or days such as DAY,DAY..DAY."),
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many rows at the top of each group are compared.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Show what differs between two artefacts.

    Schemas, vocabularies, embeddings, masks, weights, quantisation and bytes; and scores, on rows that are given. The
    exit code is 0 whatever differs.
    """
    from dataclasses import asdict

    from lt4rec_sparse.cli import shown_progress
    from lt4rec_sparse.errors import InputError
    from lt4rec_sparse.ranker.diff import diff as difference_of

    if requests is not None and data is not None:
        raise InputError("diff: got --requests and --data, wanted one of them")
    if days is not None and data is None:
        raise InputError(f"--days: got {days!r} without --data, wanted both")
    if top_k < 1:
        raise InputError(f"--top-k: got {top_k}, wanted at least 1")
    found = difference_of(a, b)
    with shown_progress(quiet) as progress:
        scores = _scores(a, b, requests, data, days or "test", top_k, progress)
    if as_json:
        typer.echo(json.dumps(asdict(found) | ({} if scores is None else {"scores": asdict(scores)}), indent=1))
        return
    for part in _parts(found, scores):
        typer.echo(part)


def _scores(
    a: Path, b: Path, requests: Path | None, data: str | None, days: str, top_k: int, progress: Any
) -> ScoreDifference | None:
    from tempfile import TemporaryDirectory

    from lt4rec_sparse.ranker import load
    from lt4rec_sparse.recsys.data.remote import local_data
    from lt4rec_sparse.recsys.score_diff import check_same_rows, compare_file, compare_log

    if requests is not None:
        return compare_file(load(a), load(b), requests, top_k)
    if data is None:
        return None
    first, second = load(a), load(b)
    of_a, of_b = first.encoder.schema, second.encoder.schema
    check_same_rows(of_a, of_b, days)  # before a log is copied
    with TemporaryDirectory() as copies, TemporaryDirectory() as scratch:
        folder = other = local_data(data, Path(copies) / "a" / "log", of_a, progress)
        if of_a.joins != of_b.joins:  # a copy has the side tables of one schema alone
            other = local_data(data, Path(copies) / "b" / "log", of_b, progress)
        return compare_log(first, second, folder, Path(scratch), days, top_k, progress, other)


def _parts(found: Difference, scores: ScoreDifference | None) -> Iterator[str]:
    if found.equal:
        yield "equal: A and B have the same bytes"
        if scores is None:
            return
    else:
        rows = [[where, _cut(of_a), _cut(of_b)] for where, of_a, of_b in found.facts]
        yield _table(["what", "A", "B"], rows) if rows else "schema, tasks and kinds of numbers: equal"
        yield "\n" + _table(["bytes", "A", "B"], [[n, f"{x:,}", f"{y:,}"] for n, (x, y) in found.nbytes.items()])
        header = ["table", "rows A", "rows B", "added", "removed", "moved", "embeddings", "such as"]
        yield "\n" + _table(header, list(_table_rows(found)))
        yield "\n" + _table(["layer", "shape", "weights", "biases", "kept, of both over of any"], list(_layers(found)))
        if found.quantization is not None:
            rows = [[task, *(f"{ratio:.3f}" for ratio in ratios)] for task, ratios in found.quantization.items()]
            header = ["scale B / A", *(f"input {i}" for i in range(max((len(row) - 1 for row in rows), default=0)))]
            yield "\n" + _table(header, rows)
        yield "\nWeights, biases and embeddings: |A - B| / |A|; embeddings of values that both have."
    if scores is not None:
        rows = [
            [task, f"{x.mean:.6f}", f"{x.largest:.6f}", _number(x.rank_correlation), _number(x.top)]
            for task, x in scores.tasks.items()
        ]
        top = f"top {scores.k} of both"
        yield "\n" + _table(["scores", "mean |A - B|", "largest", "rank correlation", top], rows)
        yield f"{scores.rows:,} rows; {scores.groups:,} groups of more than {scores.k}"


def _table_rows(found: Difference) -> Iterator[list[str]]:
    for name, x in found.tables.items():
        counts = ["" if count is None else f"{count:,}" for count in (x.added, x.removed, x.moved)]
        examples = ", ".join([*(f"+{key}" for key in x.examples[0]), *(f"-{key}" for key in x.examples[1])])
        sizes = ["none" if size is None else f"{size:,}" for size in x.rows]
        yield [name, *sizes, *counts, _relative(x.embeddings), _cut(examples)]


def _layers(found: Difference) -> Iterator[list[str]]:
    for name, x in found.layers.items():
        a, b = ("none" if shape is None else " x ".join(map(str, shape)) for shape in x.shape)
        kept = ", ".join(
            f"{task} {mask.density[0]:.1%} / {mask.density[1]:.1%}: {mask.overlap:.1%}"
            for task, mask in x.masks.items()
        )
        yield [name, a if a == b else f"{a} / {b}", _relative(x.weight), _relative(x.bias), kept]


def _relative(weights: WeightDifference | None) -> str:
    if weights is None:
        return "n/a"
    return "from 0" if weights.relative is None else f"{weights.relative:.4f}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _cut(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(line.rstrip() for line in lines)
