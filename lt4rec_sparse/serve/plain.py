"""A request in short JSON, for people, and its response.

`{"context": {...}, "candidates": {...} or [{...}, ...], "k": 10, "by": {"ctr": 1}}`: candidates as columns or as rows.
A column in `context` has one value; a multi-valued one or a vector has a list, or text with the schema's separator. A
missing value is `null`. `precision` may name another precision that the artefact has; a `name` is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lt4rec_sparse.errors import shown
from lt4rec_sparse.ranker.features.schema import Column
from lt4rec_sparse.ranker.ranking import Ranking
from lt4rec_sparse.serve.columns import Columns
from lt4rec_sparse.serve.requests import Request, check_exponents
from lt4rec_sparse.serve.settings import RequestError
from lt4rec_sparse.serve.tensors import check_text

KEYS = {"name", "context", "candidates", "k", "by", "precision"}


class Asked(NamedTuple):
    """A request, and the precision it names; empty for the server's."""

    request: Request
    precision: str


def read(content: Mapping[str, Any], columns: Columns) -> Asked:
    """Read a request that is parsed already.

    Raises:
        RequestError: If it is malformed; the message names the field.
    """
    stray = next((key for key in content if key not in KEYS), None)
    if stray is not None:
        raise RequestError(f"{shown(stray)}: got an unknown key, wanted some of {', '.join(sorted(KEYS))}")
    by = content.get("by")
    if by is not None and not isinstance(by, dict):
        raise RequestError(f"by: got {shown(by)}, wanted an object of exponents")
    check_exponents(by or {}, columns.limits)
    precision = content.get("precision", "")
    if not isinstance(precision, str):
        raise RequestError(f"precision: got {shown(precision)}, wanted text")
    context = content.get("context", {})
    if not isinstance(context, dict):
        raise RequestError(f"context: got {shown(context)}, wanted an object")
    candidates = _columns(content.get("candidates"), columns)
    for name in (*context, *candidates):
        if name not in columns.features and name not in (by or {}):
            raise RequestError(f"column {shown(name)}: got no column of the model, wanted {columns.known()}")
    once = {name: [value] for name, value in context.items()}
    rows = columns.check_rows({name: len(values) for name, values in candidates.items()})
    for name, values in (*once.items(), *candidates.items()):
        _check(name, values, columns)
    return Asked(Request(candidates, once, rows, content.get("k"), by), precision)


def write(ranking: Ranking, about: Mapping[str, Any]) -> bytes:
    """Return a response's body: what it is `about`, then the ranked candidates with their scores."""
    scores = {task: of_task.tolist() for task, of_task in ranking.scores.items()}
    ranked = [
        {"row": row, "rank_score": rank_score, "scores": {task: of_task[i] for task, of_task in scores.items()}}
        for i, (row, rank_score) in enumerate(zip(ranking.rows.tolist(), ranking.rank_scores.tolist(), strict=True))
    ]
    return json.dumps({**about, "ranking": ranked}, allow_nan=False).encode()


def _columns(candidates: Any, columns: Columns) -> dict[str, list[Any]]:
    if isinstance(candidates, dict) and candidates:
        stray = next((name for name, values in candidates.items() if not isinstance(values, list)), None)
        if stray is not None:
            raise RequestError(f"column {shown(stray)}: got {shown(candidates[stray])} in candidates, wanted a list")
        return candidates
    if not isinstance(candidates, list) or not candidates or not all(isinstance(row, dict) for row in candidates):
        wanted = "an object of columns, or a list of at least one object"
        raise RequestError(f"candidates: got {shown(candidates)}, wanted {wanted}")
    if len(candidates) > columns.limits.rows:
        raise RequestError(f"candidates: got {len(candidates)} rows, wanted at most {columns.limits.rows}")
    names = candidates[0].keys()
    if not names:
        raise RequestError("candidates: got a row without columns, wanted at least one")
    for i, row in enumerate(candidates):
        if row.keys() != names:
            name = min(row.keys() ^ names)
            place = i if name not in row else 0
            raise RequestError(f"column {shown(name)}: got it in some rows, not in row {place}, wanted it in all")
    return {name: [row[name] for row in candidates] for name in names}


def _check(name: str, values: list[Any], columns: Columns) -> None:
    """Refuse values that are too long, or lists where a column has none; the encoder judges their types."""
    column = columns.features.get(name, Column(name, "dense"))
    kinds = {*map(type, values)}
    if dict in kinds or (list in kinds and not column.is_list):
        stray = next(value for value in values if isinstance(value, dict | list))
        raise RequestError(f"column {name!r}: got {shown(stray)}, wanted one value")
    texts = {value for value in values if isinstance(value, str)} if str in kinds else set()
    if column.is_list:
        is_bag = column.kind == "multi"  # a vector has its size
        for text in texts if is_bag else ():
            columns.check_bag(column, text.count(column.separator) + 1)
        for bag in values:
            if isinstance(bag, list):
                if is_bag:
                    columns.check_bag(column, len(bag))
                if any(isinstance(value, list | dict) for value in bag):
                    raise RequestError(f"column {name!r}: got {shown(bag)}, wanted a list of values")
                texts |= {value for value in bag if isinstance(value, str)}
    for text in texts:
        check_text(f"column {name!r}", text, columns.limits)
