"""How far the scores of two models are apart, on a file of candidates or on rows of a log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker import Ranker
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data import open_source, read_candidates
from lt4rec_sparse.recsys.data.batches import GROUP, SPLITS
from lt4rec_sparse.recsys.data.days import Progress, partition
from lt4rec_sparse.recsys.data.joined import group_ids
from lt4rec_sparse.recsys.data.reading import column_names
from lt4rec_sparse.recsys.data.rows import RowReader
from lt4rec_sparse.recsys.scoring import CHUNK_ROWS, chosen_rows

Floats = NDArray[np.float64]
Groups = NDArray[np.int64] | None
Part = tuple[Mapping[str, Any], Groups]  # raw features of rows, and the group of each


@dataclass(frozen=True)
class TaskScores:
    """How far one task's scores are apart.

    Attributes:
        mean: The mean of `|A - B|`.
        largest: The largest `|A - B|`.
        rank_correlation: Spearman's, over all rows, ties with their mean rank; None where a model's scores are all the
            same.
        top: How many of A's first `k` rows are among B's, over `k`: the mean over groups of more than `k` rows. Rows of
            one score are in their order. None without such groups.
    """

    mean: float
    largest: float
    rank_correlation: float | None
    top: float | None


@dataclass(frozen=True)
class ScoreDifference:
    """The scores of two models on the same rows: how many rows, `k`, groups of more than `k` rows; task -> scores."""

    rows: int
    k: int
    groups: int
    tasks: Mapping[str, TaskScores]


def compare_file(a: Ranker, b: Ranker, candidates: Path, k: int = 10) -> ScoreDifference:
    """Compare scores on a file with every feature of both models, CSV or Parquet, as `score` takes it.

    Groups are those of A's schema, if the file has the column.

    Raises:
        InputError: If a feature of one is absent or has a wrong value, `k` is below 1, or no task is in both.
    """

    def read(schema: Schema) -> Iterator[Part]:
        keep = [] if schema.group is None else [schema.group.column]
        keep = [name for name in keep if name in column_names(candidates)]
        features, kept = read_candidates(candidates, schema, keep)
        yield features, group_ids(kept[keep[0]].combine_chunks()) if keep and kept.num_rows else None

    of_a = list(read(a.encoder.schema))
    of_b = of_a if a.encoder.schema == b.encoder.schema else read(b.encoder.schema)
    return _compared(a, b, zip(of_a, of_b, strict=True), k)


def compare_log(
    a: Ranker,
    b: Ranker,
    data: Path,
    scratch: Path,
    days: str = "test",
    k: int = 10,
    progress: Progress = lambda stage, done, total: None,
    data_of_b: Path | None = None,
) -> ScoreDifference:
    """Compare scores on rows of a log, each as its own schema makes features of them; see `scoring.score_log`.

    `scratch` is an empty folder for temporary files of the size of the log, or twice of it if the schemas differ.
    `data_of_b` is another copy of the same log, with the side tables of B's schema, where `data` has only those of A's.

    Raises:
        InputError: As `score_log` and `check_same_rows`, if `k` is below 1, or no task is in both.
    """
    check_same_rows(a.encoder.schema, b.encoder.schema, days)

    def read(data: Path, schema: Schema) -> Iterator[Part]:
        source, folder = open_source(data, schema), scratch / str(len(list(scratch.iterdir())))
        folder.mkdir()
        log = partition(source, folder, CHUNK_ROWS, progress)
        split, wanted = chosen_rows(log, schema, days)
        for rows in RowReader(source, log).read(wanted, split):
            yield rows.features, rows.columns.get(GROUP)

    if a.encoder.schema == b.encoder.schema:
        return _compared(a, b, ((part, part) for part in read(data, a.encoder.schema)), k)
    return _compared(a, b, _alike(read(data, a.encoder.schema), read(data_of_b or data, b.encoder.schema)), k)


def check_same_rows(a: Schema, b: Schema, days: str) -> None:
    """Check that two schemas read the same rows of a log in the same order, since scores are compared row by row.

    Raises:
        InputError: If they differ in what decides it; the message names the first difference and both values.
    """
    decide = ("time", "group", *(("split",) if days in SPLITS else ()))
    found = [("files.log", a.files.log, b.files.log), ("duplicates", a.duplicates, b.duplicates)]
    for part in decide:
        of_a, of_b = getattr(a, part), getattr(b, part)
        if of_a is None or of_b is None:
            found.append((part, of_a, of_b))
        else:
            found += [(f"{part}.{x.name}", getattr(of_a, x.name), getattr(of_b, x.name)) for x in fields(of_a)]
    for name, first, second in found:
        if first != second:
            raise InputError(f"{name}: got {first!r} in A's schema and {second!r} in B's, wanted the same rows of both")


def _alike(of_a: Iterable[Part], of_b: Iterable[Part]) -> Iterator[tuple[Part, Part]]:
    """Pair the parts of two readings of the same rows."""
    try:
        yield from zip(of_a, of_b, strict=True)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError("rows: got fewer by one schema than by the other, wanted the same rows") from error


def _compared(a: Ranker, b: Ranker, parts: Iterable[tuple[Part, Part]], k: int) -> ScoreDifference:
    if k < 1:
        raise InputError(f"top_k: got {k}, wanted at least 1")
    tasks = [task for task in a.tasks if task in b.tasks]
    if not tasks:
        raise InputError(f"tasks: got {', '.join(a.tasks)} and {', '.join(b.tasks)}, wanted one that both have")
    scores: dict[str, tuple[list[Any], list[Any]]] = {task: ([], []) for task in tasks}
    groups: list[Any] = []
    for (features, of_group), (others, _) in parts:
        first, second = a.score(features), b.score(others)
        if len(first[tasks[0]]) != len(second[tasks[0]]):
            got = f"{len(first[tasks[0]])} and {len(second[tasks[0]])}"
            raise InputError(f"rows: got {got} by the two schemas, wanted the same rows")
        for task, (of_a, of_b) in scores.items():
            of_a.append(first[task])
            of_b.append(second[task])
        groups.append(of_group)
    whole = None if not groups or any(part is None for part in groups) else np.concatenate(groups)
    joined = {task: (_joined(of_a), _joined(of_b)) for task, (of_a, of_b) in scores.items()}
    rows = len(joined[tasks[0]][0])
    if not rows:
        raise InputError("rows: got none to score, wanted at least one")
    large = None if whole is None else np.unique(whole, return_counts=True)
    counted = 0 if large is None else int((large[1] > k).sum())
    return ScoreDifference(rows, k, counted, {t: _task(x, y, whole, k) for t, (x, y) in joined.items()})


def _joined(parts: Sequence[Any]) -> Floats:
    return np.concatenate([np.empty(0), *parts])


def _task(a: Floats, b: Floats, groups: Groups, k: int) -> TaskScores:
    apart = np.abs(a - b)
    return TaskScores(float(apart.mean()), float(apart.max()), _spearman(a, b), _top_overlap(a, b, groups, k))


def _spearman(a: Floats, b: Floats) -> float | None:
    """Return the correlation of ranks, ties with their mean rank."""
    first, second = _ranks(a), _ranks(b)
    if first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Floats) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (counts.cumsum() - (counts - 1) / 2)[place]
    return ranks


def _top_overlap(a: Floats, b: Floats, groups: Groups, k: int) -> float | None:
    if groups is None:
        return None
    _, group, counts = np.unique(groups, return_inverse=True, return_counts=True)
    large = counts[group] > k
    of_a = large & (_places(a, group, counts) < k)
    both = of_a & (_places(b, group, counts) < k)
    return float(both.sum() / of_a.sum()) if of_a.any() else None


def _places(scores: Floats, group: NDArray[np.intp], counts: NDArray[np.intp]) -> NDArray[np.int64]:
    """Return each row's place in its group, from 0, by descending score; rows of one score in their order."""
    order = np.lexsort((-scores, group))
    places = np.empty(len(scores), np.int64)
    places[order] = np.arange(len(scores)) - np.repeat(counts.cumsum() - counts, counts)
    return places
